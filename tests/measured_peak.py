"""One whole run of train_grpo.py on a CPU, and what it really took: the measurement behind plan.py's promise.

    [torchrun --nproc-per-node=2] python tests/measured_peak.py FOLDER FLAG ...

Prints a JSON object: peak resident bytes of a run with these flags, beyond what the same process had in use after a
small run of the nano policy (interpreter, libraries, whatever is loaded late), and plan.py's estimate of the run. Of
several ranks it is the first that is measured.

glibc is made to hand memory back as soon as it is freed, so that what is resident is what tensors hold. Otherwise
malloc keeps freed pieces for later, and the same run has a peak that is 1.2 to 1.9 times as high. Linux only.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import ranks
import train_grpo
from runtime import checkpoint, plan


def in_use(name: str) -> int:
    """Bytes; VmRSS now, VmHWM at most since the mark was reset."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def train(out: str, *flags: str) -> None:
    sys.argv = ["train_grpo.py", "--steps", "2", "--eval-limit", "1", "--out", out, *flags]
    train_grpo.main()


def measure(folder: Path, flags: list[str]) -> dict:
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD, in force from here on
    torch.set_num_threads(1)  # each thread has buffers of its own
    ranks.start("cpu")
    ranks.start = ranks.end = lambda *device: None  # once for both runs
    if "--shard" in flags:  # rank 0 writes them whole, from the memory of the host: beside a GPU that is another one
        checkpoint.save = lambda *rest: ""
    small = "--steps", "1", "--batch-size", "2", "--group-size", "2", "--max-tokens", "8"
    train(str(folder / "warm"), *small, *{"--shard"}.intersection(flags))
    runs, settle = [], plan.settle

    def noting(*arguments):
        run, words = settle(*arguments)
        runs.append(run)
        return run, words

    plan.settle = noting
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = in_use("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(str(folder / "run"), *flags)
    always = sum(plan.moments(runs[0])["always there"].values())
    return {"measured": in_use("VmHWM") - before, "estimated": plan.peak(runs[0]), "always": always}


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr
    result = measure(Path(sys.argv[1]), sys.argv[2:])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), file=stdout)
