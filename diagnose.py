"""Why is my reward zero? What a run says when it has nothing to learn from, in one paragraph, with the flags to try.

Every BLOCK steps the answers of these steps are looked at together. Three findings are worth a paragraph: no answer
was a hit, most answers had no box that could be read, almost no group had spread. It is said when it begins, not again
while it lasts. Nothing here changes the run.
"""

from collections import Counter

import torch

import kernels
from scheduler import hit

BLOCK = 20  # optimiser steps
MOST_FAIL = 0.5  # share of answers without a box
NO_SPREAD = 0.95  # share of groups in which every answer has the same reward

# Numbers that are meant in another frame than the one asked for are the usual cause of a reward that stays at zero:
# name -> (answer's numbers (N, 4), size of the original image (N, 4) as w, h, w, h) -> boxes in original pixels.
OTHER_FRAMES = {
    "pixels of the ORIGINAL image": lambda box, size: box,
    "thousandths of the image's width and height": lambda box, size: box * size / 1000,
    "shares of the image's width and height, 0 to 1": lambda box, size: box * size,
}


class Watch:
    """Collects rollouts, and says what is wrong with them."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.short = True  # no block is whole yet
        self._begin()

    def _begin(self) -> None:
        self.steps = self.hits = self.answers = self.truncated = self.flat = self.groups = 0
        self.reasons: Counter[str] = Counter()
        self.ious: list[float] = []  # of the answers that have a box
        self.frames: list[torch.Tensor] = []  # (N, 12): their numbers as written, target, size of the original image

    def add(self, roll, tau: float | None, last: bool = False) -> str | None:
        """Take in a step's train_grpo.Rollout, rewarded under tau (None: a hit is an IoU above 0). What there is to say
        at the end of a block, or after the `last` step of a run shorter than one; else None."""
        self.steps += 1
        self.answers += roll.iou.numel()
        self.groups += len(roll.prompts)
        self.flat += int((~roll.spread).sum())
        self.truncated += int(roll.truncated.sum())
        self.hits += sum(u > 0 if tau is None else hit(u, tau) for u in roll.iou[roll.valid].tolist())
        self.ious += roll.iou[roll.valid].tolist()
        self.reasons.update(reason for group in roll.reasons for reason in group if reason)
        for prompt, boxes, valid in zip(roll.prompts, roll.boxes, roll.valid, strict=True):
            rows = torch.tensor([*prompt.scale, *prompt.scale, *prompt.box, *prompt.size, *prompt.size])
            rows = rows.expand(int(valid.sum()), -1)
            self.frames.append(torch.cat((boxes[valid] / rows[:, :4], rows[:, 4:]), dim=1))
        if self.steps < BLOCK and not (last and self.short):
            return None
        self.short = False
        paragraph = self._paragraph(roll, tau)
        self._begin()
        return paragraph

    def _paragraph(self, roll, tau: float | None) -> str | None:
        failed = 1 - len(self.ious) / self.answers
        found = {
            "no hit": self.hits == 0,
            "no box": failed > MOST_FAIL,
            "no spread": self.flat / self.groups >= NO_SPREAD,
        }
        new = [name for name, true in found.items() if true and name not in self.said]
        self.said = {name for name, true in found.items() if true}
        if not new:
            return None

        threshold = "an IoU above 0" if tau is None else f"an IoU of {tau:.2f}"
        words = [f"Why is my reward zero? In the last {self.steps} steps {self.hits} of {self.answers} answers reached"]
        words += [f"{threshold}; {self.flat / self.groups:.0%} of the groups have no spread (every answer the same"]
        words += [f"reward, so advantage 0); {failed:.0%} of the answers have no box that can be read"]
        if self.reasons:
            words += ["(" + ", ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common()) + ")"]
        words += [f"and {self.truncated / self.answers:.0%} are cut off at --max-tokens."]
        if self.ious:
            q25, q50, q75 = torch.tensor(self.ious).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            words += [f"IoU of those with a box: quartiles {q25:.2f} {q50:.2f} {q75:.2f}, best {max(self.ious):.2f}."]
        samples = [text for group in zip(*roll.texts, strict=True) for text in group][
            :3
        ]  # of three prompts, if there are
        words += ["Three answers: " + ", ".join(f"{text!r:.120}" for text in samples) + "."]
        words += ["To try: " + "; ".join(self._advice(found, failed, tau)) + "."]
        return " ".join(words)

    def _advice(self, found: dict[str, bool], failed: float, tau: float | None) -> list[str]:
        advice = []
        if found["no box"]:
            if self.truncated / self.answers > MOST_FAIL:
                advice += ["a larger --max-tokens, since the answers end before their box does"]
            advice += ["another --prompt, or train_sft.py first, so that the policy knows the form of an answer"]
        if found["no hit"] and self.ious:
            q75 = torch.tensor(self.ious).quantile(0.75).item()
            if frame := self._better_frame():
                advice += [f"look at the frame: read as {frame}, but answers are taken as pixels of the RESIZED image"]
            elif q75 < 0.05:
                advice += [
                    "look at overlay-*.png: are the green boxes right?",
                    "train_sft.py first (a supervised start)",
                ]
            elif tau is not None:
                advice += [
                    f"--schedule=medloc --tau-start={max(0.05, q75 - 0.05):.2f}, which a quarter of the answers reach"
                ]
                advice += ["--schedule=raw or medloc-soft, which reward near misses"]
        if found["no spread"]:
            advice += [
                "a higher --temperature or a larger --group-size, so that answers differ",
                "--dynamic-sampling 3",
            ]
        return advice or ["train_sft.py first (a supervised start)"]

    def _better_frame(self) -> str:
        """The other frame in which the answers' numbers would mean something, "" if there is none."""
        written, target, size = torch.cat(self.frames).split(4, dim=1)
        best = max(0.1, 2 * sum(self.ious) / len(self.ious))
        name = ""
        for frame, read in OTHER_FRAMES.items():
            mean = kernels.box_iou(read(written, size), target).mean().item()
            if mean > best:
                best, name = mean, f"{frame} their mean IoU would be {mean:.2f}"
        return name
