"""Long runs of the quickstart, which no test waits for: watched for a leak; what saves cost.

    python tests/soak.py memory OUT                1,000 steps: does resident memory grow?
    python tests/soak.py cost OUT                  200 steps, saved every 50: the share of the time that saves take

Further flags go to train_grpo.py. Exit code 1 if it is not as promised: at most 2 % more memory in the last hundred
steps than in the second hundred; at most 3 % of the time.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean

from programs import lines, train_grpo

from runtime import checkpoint


def main(what: str, out: str, *flags: str) -> bool:
    seconds, save = [], checkpoint.save

    def timed(*arguments):
        """All of it: writing, checksums, fsync, rename; inside the run, so that other load hits both alike."""
        begun = time.perf_counter()
        folder = save(*arguments)
        seconds.append(time.perf_counter() - begun)
        return folder

    checkpoint.save = timed
    steps = {"memory": ["--steps", "1000"], "cost": ["--steps", "200", "--save-every", "50"]}[what]
    sys.argv = ["train_grpo.py", "--out", out, *steps, *flags]
    begun = time.perf_counter()
    train_grpo.main()
    whole = time.perf_counter() - begun
    if what == "cost":
        share = sum(seconds) / (whole - sum(seconds))
        print(json.dumps({"seconds": whole, "saves": [round(s, 3) for s in seconds], "added": share}))
        return share <= 0.03
    resident = [row["resident_mb"] for row in lines(Path(out) / "metrics.jsonl")]
    hundred = min(100, len(resident) // 3)
    early, late = fmean(resident[hundred : 2 * hundred]), fmean(resident[-hundred:])
    print(json.dumps({"steps": len(resident), "early_mb": early, "late_mb": late, "ratio": late / early}))
    return late <= 1.02 * early


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
