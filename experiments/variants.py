"""Schedules and rewards that were tried and are worth having: how to add one of your own without touching a file.

    python experiments/variants.py --schedule=hull-soft --data phantoms:xray --out out      all else as train_grpo.py

What came of them and of a dozen others: search/table.md and RESULTS.md.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules beside it

import torch  # noqa: E402

import errors  # noqa: E402
import kernels  # noqa: E402
import train_grpo  # noqa: E402
from phantoms import phantom  # noqa: E402
from rewards import REWARDS  # noqa: E402
from scheduler import SCHEDULES, Decision, Kind, Schedule, Soft, Watch, by_step, medloc  # noqa: E402

LOW, HIGH = 0.4, 0.6  # of the window's mean IoU: where GIoU begins to give way to IoU, and has


def hull(s: Schedule, u: float, parts: dict) -> float:
    """GIoU until the policy is good, then IoU: u - l (u - giou), where l falls from 1 to 0 while the window's mean IoU
    rises from LOW to HIGH. u - giou is the share of the two boxes' hull that neither covers."""
    groups = [group for _, group in s.window.entries]
    mean = fmean(map(fmean, groups)) if groups else 0.0
    return u - min(max((HIGH - mean) / (HIGH - LOW), 0.0), 1.0) * (u - parts["giou"])


def sigmoid(s: Schedule, u: float) -> float:
    return (1 + math.tanh((u - s.tau) / s.settings.scale / 2)) / 2


def median(s: Schedule) -> Decision:
    """tau is the median of the window's u, from the first step on, up or down."""
    us = sorted(u for _, group in s.window.entries for u in group)
    return Decision(s.tau, round(us[len(us) // 2], 6), ("median of the window",), *s.window.statistics(s.tau))


SCHEDULES |= {
    "hull": by_step(hull, lambda s, share: None, Watch, part="giou"),
    "hull-soft": Kind(  # medloc-soft's reward of hull's value, tau by MedLoc's rule
        lambda s, u, parts: sigmoid(s, hull(s, u, parts)), lambda s: s.tau_start, medloc, Soft, part="giou"
    ),
    "quantile-50": Kind(lambda s, u, parts: sigmoid(s, u), lambda s: s.tau_start, median, Soft),
}


def elsewhere(texts: list[str], scores, samples: list) -> torch.Tensor:
    """IoU with the box of ANOTHER phantom: what boxes teach beside where the lesion is (transfer.toml's control)."""
    nowhere = [float("nan")] * 4
    others = [phantom(s.media.kind, s.media.seed, s.media.index + 1, s.media.size).box for s in samples]
    answers = torch.tensor([answer or nowhere for answer in scores.answers])
    return kernels.box_iou(answers, torch.tensor(others, dtype=torch.float32))


REWARDS |= {
    "elsewhere": elsewhere,
    "length": lambda texts, scores, samples: [float(len(text)) for text in texts],  # on a scale of its own (sums.toml)
}

if __name__ == "__main__":
    errors.run(train_grpo.main, train_grpo.MEMORY)
