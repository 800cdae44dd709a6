"""Runs of train_grpo.py and train_sft.py in processes that tests can kill, without the seconds that imports take.

A line on stdin is one run: [where its output goes, train_grpo or train_sft, flags ...]. A forked process makes it, in a
session of its own as torchrun's are; its pid is printed, and how it ended: its exit code, or minus the signal.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


import errors  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402


def run(log: str, program: str, flags: list[str]) -> None:
    os.setsid()
    for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(path, mode, 0o644), stream)
    os.dup2(1, 2)
    sys.argv = [f"{program}.py", *flags]
    try:
        code = 0
        errors.run({"train_grpo": train_grpo, "train_sft": train_sft}[program].main, train_grpo.MEMORY)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        log, program, *flags = json.loads(line)
        pid = os.fork()
        if not pid:
            run(log, program, flags)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
