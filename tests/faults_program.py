"""Runs of train_grpo.py in processes that test_faults.py can kill, without the seconds that imports take each time.

A line on stdin is one run: [where its output goes, flags ...]. A forked process makes it, in a session of its own as
torchrun's are; its pid is printed, and how it ended: its exit code, or minus the signal.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import errors  # noqa: E402
import train_grpo  # noqa: E402


def run(log: str, flags: list[str]) -> None:
    os.setsid()
    for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(path, mode, 0o644), stream)
    os.dup2(1, 2)
    sys.argv = ["train_grpo.py", *flags]
    try:
        code = 0
        errors.run(train_grpo.main, train_grpo.MEMORY)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        log, *flags = json.loads(line)
        pid = os.fork()
        if not pid:
            run(log, flags)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
