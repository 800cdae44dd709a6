"""Schedules that were tried, each a subclass of scheduler.Schedule: how to add one of your own without touching a file.

    python experiments/variants.py --schedule=quantile-50 --data phantoms:xray --out out      all else as train_grpo.py

What came of them: search/table.md and RESULTS.md.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules beside it

import errors  # noqa: E402
import scheduler  # noqa: E402
import train_grpo  # noqa: E402
from scheduler import REFRESH, Decision, MedLoc, MedLocSoft, Schedule, hit, medloc_decision, next_tau  # noqa: E402


class Quantile(Schedule):
    """tau is the q-quantile of the window's IoUs, from the first step on, up or down; reward sigmoid((u - tau)/s)."""

    own = ("tau_start", "soft_scale")
    q = 0.5

    def tau_at(self, step: int) -> float:
        return self.config.tau_start

    box_reward = MedLocSoft.box_reward

    def decide(self) -> Decision:
        statistics = self.window.hit_rate(self.tau), self.window.sigma(self.tau), self.window.margin(self.tau)
        ious = sorted(iou for _, group in self.window.entries for iou in group)
        tau = round(ious[min(int(self.q * len(ious)), len(ious) - 1)], 6)
        return Decision(self.tau, tau, (f"quantile {self.q} of the window",), *statistics)


class Quantile75(Quantile):
    q = 0.75


class Quantile90(Quantile):
    q = 0.9


class QuantileHard(Quantile):
    """1[u >= tau], tau as Quantile's."""

    own = ("tau_start",)

    def box_reward(self, iou: float, giou: float) -> float:
        return float(hit(iou, self.tau))


class Sharpening(MedLocSoft):
    """medloc-soft whose s falls as tau rises: in proportion to 1 - tau, from twice soft_scale at tau = 0."""

    def box_reward(self, iou: float, giou: float) -> float:
        scale = 2 * self.config.soft_scale * max(1 - self.tau, 0.02)
        return (1 + math.tanh((iou - self.tau) / scale / 2)) / 2


class Floor(MedLoc):
    """MedLoc's rule, and a raise also where half of the window's groups are all hits: these teach nothing more."""

    def decide(self) -> Decision:
        decision = medloc_decision(self.window, self.tau, self.config)
        if not decision.tighten and self.window.full and self.tau < self.config.tau_target:
            groups = [all(hit(iou, self.tau) for iou in group) for _, group in self.window.entries]
            if sum(groups) >= len(groups) / 2:
                raised = next_tau(self.tau, self.config)
                decision = replace(decision, tau_next=raised, reasons=("too many all hits",))
        if decision.tighten:
            self.window.drop_oldest(REFRESH[self.config.refresh])
        return decision


class FloorSoft(Floor):
    """Floor with medloc-soft's reward."""

    own = MedLocSoft.own
    box_reward = MedLocSoft.box_reward


class Ramp(Schedule):
    """pmAP itself, nearly: 0 to IoU .45, 1 from .95, a line between."""

    def box_reward(self, iou: float, giou: float) -> float:
        return min(max((iou - 0.45) / 0.5, 0.0), 1.0)


class Excess25(Quantile):
    """How far above tau, a quantile of the window, an answer is: max(u - tau, 0). Below it all are equally bad."""

    own = ("tau_start",)
    q = 0.25

    def box_reward(self, iou: float, giou: float) -> float:
        return max(iou - self.tau, 0.0)


class Hull(Schedule):
    """GIoU until the policy is good, then IoU: u - l (u - giou), where l falls from 1 to 0 while the window's mean IoU
    rises from `low` to `high`. u - giou is the share of the two boxes' hull that neither covers."""

    low, high = 0.4, 0.6

    def box_reward(self, iou: float, giou: float) -> float:
        groups = [group for _, group in self.window.entries]
        mean = fmean(map(fmean, groups)) if groups else 0.0
        return iou - min(max((self.high - mean) / (self.high - self.low), 0.0), 1.0) * (iou - giou)


class HullEarly(Hull):
    low, high = 0.3, 0.5


class HullSoft(MedLocSoft, Hull):
    """medloc-soft's reward of Hull's value: sigmoid((u - l (u - giou) - tau)/s)."""

    def box_reward(self, iou: float, giou: float) -> float:
        return MedLocSoft.box_reward(self, Hull.box_reward(self, iou, giou), giou)


class SoftHull(MedLocSoft, Hull):
    """medloc-soft's reward less Hull's term: sigmoid((u - tau)/s) - l (u - giou), which no sigmoid flattens."""

    def box_reward(self, iou: float, giou: float) -> float:
        return MedLocSoft.box_reward(self, iou, giou) + Hull.box_reward(self, iou, giou) - iou


VARIANTS = {
    "hull": Hull,
    "hull-early": HullEarly,
    "hull-soft": HullSoft,
    "soft-hull": SoftHull,
    "excess-25": Excess25,
    "quantile-50": Quantile,
    "quantile-75": Quantile75,
    "quantile-90": Quantile90,
    "quantile-hard": QuantileHard,
    "sharpening": Sharpening,
    "floor": Floor,
    "floor-soft": FloorSoft,
    "ramp": Ramp,
}

if __name__ == "__main__":
    scheduler.SCHEDULES |= VARIANTS
    errors.run(train_grpo.main, train_grpo.MEMORY)
