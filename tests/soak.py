"""Long runs of the quickstart, which no test waits for: killed again and again; watched for a leak; what saves cost.

    python tests/soak.py kills OUT                 400 steps killed every ~20, against 400 undisturbed
    python tests/soak.py memory OUT                1,000 steps undisturbed: does resident memory grow?
    python tests/soak.py cost OUT                  200 steps, saved every 50: the share of the time that saves take
    python tests/soak.py kills OUT --steps 60      a short one

Further flags go to train_grpo.py. What was found is printed as JSON; exit code 1 if it is not as promised: bit by bit
the same run; at most 2 % more memory in the last hundred steps than in the second hundred; at most 3 % of the time.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from test_faults import ROOT, assert_same_run, checkpoint, lines, train_grpo

KILL_EVERY = 20  # steps, about
GROWTH, COST = 1.02, 0.03


def start(out: Path, *flags: str) -> subprocess.Popen:
    with open(out.parent / "log", "a") as log:
        return subprocess.Popen([sys.executable, ROOT / "train_grpo.py", "--out", out, *flags], stdout=log, stderr=log)


def finish(run: subprocess.Popen) -> None:
    if run.wait() != 0:
        sys.exit(f"a run ended with code {run.returncode}: see the log")


def kills(out: Path, steps: int, flags: list[str]) -> bool:
    """SIGKILL at a random moment within a step or two of every twentieth."""
    flags = ["--steps", str(steps), "--save-every", "5", "--keep", "2", *flags]
    finish(start(out / "straight", *flags))
    metrics, killed, luck = out / "killed" / "metrics.jsonl", 0, random.Random(0)
    run = start(out / "killed", *flags)
    while run.poll() is None:
        done = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        if done >= KILL_EVERY * (killed + 1):
            time.sleep(luck.uniform(0, 2 * lines(metrics)[-1]["seconds"]))
            run.send_signal(signal.SIGKILL)
            killed += run.wait() == -signal.SIGKILL
            run = start(out / "killed", "--resume")
        time.sleep(0.02)
    finish(run)
    assert_same_run(out / "straight", out / "killed")
    print(json.dumps({"steps": steps, "kills": killed, "same": True}))
    return True


def memory(out: Path, steps: int, flags: list[str]) -> bool:
    """Current resident memory of the main process, as metrics.jsonl has it; the mean over a hundred steps."""
    finish(start(out / "run", "--steps", str(steps), *flags))
    resident = [row["resident_mb"] for row in lines(out / "run" / "metrics.jsonl")]
    hundred = min(100, steps // 3)
    early, late = fmean(resident[hundred : 2 * hundred]), fmean(resident[-hundred:])
    print(json.dumps({"steps": steps, "early_mb": early, "late_mb": late, "ratio": late / early}))
    return late <= GROWTH * early


def cost(out: Path, steps: int, flags: list[str]) -> bool:
    """All of save(): writing, checksums, fsync, rename; timed inside the run, so that other load hits both alike."""
    seconds, save = [], checkpoint.save

    def timed(*arguments):
        begun = time.perf_counter()
        folder = save(*arguments)
        seconds.append(time.perf_counter() - begun)
        return folder

    checkpoint.save = timed
    sys.argv = ["train_grpo.py", "--out", str(out / "run"), "--steps", str(steps), "--save-every", "50", *flags]
    begun = time.perf_counter()
    train_grpo.main()
    whole = time.perf_counter() - begun
    share = sum(seconds) / (whole - sum(seconds))
    print(json.dumps({"seconds": whole, "saves": [round(s, 3) for s in seconds], "added": share}))
    return share <= COST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"kills": (kills, 400), "memory": (memory, 1000), "cost": (cost, 200)}
    parser.add_argument("what", choices=tuple(modes))
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--steps", type=int)
    args, flags = parser.parse_known_args()
    os.makedirs(args.out)
    what, steps = modes[args.what]
    sys.exit(not what(args.out, args.steps or steps, flags))


if __name__ == "__main__":
    main()
