"""Why is my reward zero? What a run says when it has nothing to learn from, in one paragraph, with the flags to try.

Every BLOCK steps the answers of these steps are looked at together. Three findings are worth a paragraph: no answer
was a hit, most answers could not be read, almost no group had spread. It is said when it begins, not again
while it lasts. Nothing here changes the run.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch

from images import Sample
from rollout import Rollout
from scheduler import hit
from tasks import TASKS

BLOCK = 20  # optimiser steps
MOST_FAIL = 0.5  # share of answers that cannot be read
NO_SPREAD = 0.95  # share of groups in which every answer has the same reward


class Asked(NamedTuple):
    """Of a prompt what is kept: its patches would be megabytes."""

    sample: Sample
    target: Any
    scale: tuple[float, float]
    size: tuple[int, int]


class Watch:
    """Collects rollouts, and says what is wrong with them."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.short = True  # no block is whole yet
        self._begin()

    def _begin(self) -> None:
        self.steps = self.hits = self.answers = self.truncated = self.flat = self.groups = 0
        self.reasons: Counter[str] = Counter()
        self.us: list[float] = []  # of the answers that can be read
        self.taus: set[float | None] = set()
        self.prompts: list[Asked] = []  # with their groups of answers, for a task's own hint
        self.given: list = []

    def add(self, roll: Rollout, taus: list[float | None], last: bool = False) -> str | None:
        """Take in a step's rollout, each group rewarded under its tau (None: a hit is u above 0). What there is to say
        at the end of a block, or after the `last` step of a run shorter than one; else None."""
        self.steps += 1
        self.answers += roll.u.numel()
        self.groups += len(roll.prompts)
        self.flat += int((~roll.spread).sum())
        self.truncated += int(roll.truncated.sum())
        for us, reasons, tau in zip(roll.u.tolist(), roll.reasons, taus, strict=True):
            valid = [u for u, reason in zip(us, reasons, strict=True) if not reason]
            self.hits += sum(u > 0 if tau is None else hit(u, tau) for u in valid)
            self.us += valid
            self.reasons.update(reason for reason in reasons if reason)
        self.taus |= set(taus)
        self.prompts += [Asked(p.sample, p.target, p.scale, p.size) for p in roll.prompts]
        self.given += roll.answers
        if self.steps < BLOCK and not (last and self.short):
            return None
        self.short = False
        paragraph = self._paragraph(roll) if self.answers else None
        self._begin()
        return paragraph

    def _paragraph(self, roll: Rollout) -> str | None:
        failed = 1 - len(self.us) / self.answers
        tau = max((tau for tau in self.taus if tau is not None), default=None)
        units = "/".join(sorted({TASKS[prompt.sample.task].unit for prompt in self.prompts}))
        found = {
            "no hit": self.hits == 0,
            "no answer": failed > MOST_FAIL,
            "no spread": self.flat / self.groups >= NO_SPREAD,
        }
        new = [name for name, true in found.items() if true and name not in self.said]
        self.said = {name for name, true in found.items() if true}
        if not new:
            return None

        threshold = f"{units} above 0" if tau is None else f"{units} {tau:.2f}"
        words = [f"Why is my reward zero? In the last {self.steps} steps {self.hits} of {self.answers} answers reached"]
        words += [f"{threshold}; {self.flat / self.groups:.0%} of the groups have no spread (every answer the same"]
        words += [f"reward, so advantage 0); {failed:.0%} of the answers cannot be read"]
        if self.reasons:
            words += ["(" + ", ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common()) + ")"]
        words += [f"and {self.truncated / self.answers:.0%} are cut off at --max-tokens."]
        if self.us:
            q25, q50, q75 = torch.tensor(self.us).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            words += [f"{units} of the others: quartiles {q25:.2f} {q50:.2f} {q75:.2f}, best {max(self.us):.2f}."]
        samples = [text for group in zip(*roll.texts, strict=True) for text in group][
            :3
        ]  # of three prompts, if there are
        words += ["Three answers: " + ", ".join(f"{text!r:.120}" for text in samples) + "."]
        words += ["To try: " + "; ".join(self._advice(found, failed, tau)) + "."]
        return " ".join(words)

    def _advice(self, found: dict[str, bool], failed: float, tau: float | None) -> list[str]:
        advice = []
        if found["no answer"]:
            if self.truncated / self.answers > MOST_FAIL:
                advice += ["a larger --max-tokens, since the answers end too early"]
            advice += ["another --prompt, or train_sft.py first, so that the policy knows the form of an answer"]
        if found["no hit"] and self.us:
            q75 = torch.tensor(self.us).quantile(0.75).item()
            if hint := self._hint():
                advice += [hint]
            elif q75 < 0.05:
                advice += [
                    "look at overlay-*.png: is the green (the target) right?",
                    "train_sft.py first (a supervised start)",
                ]
            elif tau is not None:
                advice += [
                    f"--schedule=medloc:tau_start={max(0.05, q75 - 0.05):.2f}, which a quarter of the answers reach"
                ]
                advice += ["--schedule=raw or medloc-soft, which reward near misses"]
        if found["no spread"]:
            advice += [
                "a higher --temperature or a larger --group-size, so that answers differ",
                "--dynamic-sampling 3",
            ]
        return advice or ["train_sft.py first (a supervised start)"]

    def _hint(self) -> str:
        """What a task of the block knows of answers that are worth nothing, "" if it knows nothing."""
        mean = sum(self.us) / len(self.us)
        for name in {prompt.sample.task for prompt in self.prompts}:
            some = [i for i, prompt in enumerate(self.prompts) if prompt.sample.task == name]
            if hint := TASKS[name].hint([self.prompts[i] for i in some], [self.given[i] for i in some], mean):
                return hint
        return ""
