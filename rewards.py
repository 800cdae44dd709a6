"""Rewards: the text of an answer -> a box -> numbers (IoU, GIoU, valid, format), and their weighted sum.

METHODS of the field differ in what they accept; answers are read tolerantly here, because a box that stands there but is
not found is a reward stuck at 0 with no word why: ints, floats, exponents, JSON or bare lists, any key, corners as two
points, line breaks anywhere. What cannot be read has a named reason (REASONS). One scan over the text's tokens; it never
needs the text to be JSON, since half of the answers early in training are not.

Frames: an answer is in pixels of the MODEL frame (the resized image), targets are in pixels of the ORIGINAL image, and
IoU is taken in the original.

Left out: the threshold (schedules decide hits), normalisation (kernels.group_advantage), other tasks' rewards.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from errors import InputError

REASONS = {
    "": "a box",
    "no box": "no number in the answer",
    "incomplete box": "fewer than four numbers, or a bracket that never closes: the answer was cut off or garbled",
    "too many numbers": "a list of more than four numbers",
    "not finite": "NaN, infinity, or a number too large for a float",
    "absurd value": "a coordinate beyond a million pixels",
    "inverted": "x2 < x1 or y2 < y1",
    "degenerate": "zero width or height",
}
MAX_COORDINATE = 1e6  # pixels; whole-slide images stay below it
MAX_CHARACTERS = 100_000  # the end of a longer answer is read: the last box counts, and junk must not cost seconds

# One alternative per kind of token, tried in this order. Separators and keys may stand between the numbers of a box,
# anything else ends it. A number is a whole word: not the 2 of bbox_2d, not the 10 of 10px.
TOKEN = re.compile(
    r"""(?P<key> "[^"\n]{0,40}"\s*: | '[^'\n]{0,40}'\s*: | [a-z_]\w{0,40}\s*[:=] )
      | (?P<number> [+-]?(?: (?:[0-9]+(?:\.[0-9]*)? | \.[0-9]+) (?:e[+-]?[0-9]+)? | nan | inf(?:inity)? ) (?!\.?\w) )
      | (?P<open> [\[({] ) | (?P<close> [\])}] )
      | (?P<separator> [\s,;:]+ | ["'] )
      | (?P<other> \w+ | . )""",
    re.VERBOSE | re.IGNORECASE,
)
CORNERS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))


class Parsed(NamedTuple):
    box: tuple[float, float, float, float] | None  # (x1, y1, x2, y2) as written: pixels of the model frame
    reason: str  # "" or the key of REASONS that says why there is none


def parse_box(text: str) -> Parsed:
    """The last complete box inside the last <answer>, or of the whole text if it has no such tag. Never raises.

    Complete: exactly four numbers in a row, as a list, two points, or an object of x1, y1, x2, y2 (in any order). If the
    last complete box is not a sound one (inverted, not finite ...) that is the reason; an earlier one is not tried.
    """
    text = text[-MAX_CHARACTERS:]
    start = text.lower().rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>") :]
        end = text.lower().find("</answer>")
        text = text if end < 0 else text[:end]

    runs: list[list[float] | None] = []  # numbers in a row; None for a run inside a bracket that never closed
    numbers: list[float] = []
    keys: list[str] = []
    key, depth = "", 0

    def finish(closed: bool) -> None:
        nonlocal key
        if numbers:
            by_key = dict(zip(keys, numbers, strict=True))
            named = [[by_key[name] for name in names] for names in CORNERS if set(names) == set(keys)]
            runs.append((named[0] if named else list(numbers)) if closed else None)
        numbers.clear()
        keys.clear()
        key = ""

    for token in TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "number":
            numbers.append(float(token.group()))
            keys.append(key)
            key = ""
        elif kind == "key":
            key = token.group().rstrip(":= \t\r\n").strip("\"'").lower()
        elif kind == "open":
            if len(numbers) != 2:  # two numbers may be the first of two corners: [[x1, y1], [x2, y2]]
                finish(closed=True)
            depth += 1
        elif kind == "close":
            depth = max(0, depth - 1)
            if len(numbers) != 2:
                finish(closed=True)
        elif kind == "other":
            finish(closed=depth == 0 or len(numbers) == 2)
            depth = 0
    finish(closed=depth == 0)

    complete = [run for run in runs if run is not None and len(run) == 4]
    if complete:
        return _checked(*complete[-1])
    if not runs:
        return Parsed(None, "no box")
    return Parsed(None, "too many numbers" if runs[-1] and len(runs[-1]) > 4 else "incomplete box")


def _checked(x1: float, y1: float, x2: float, y2: float) -> Parsed:
    box = (x1, y1, x2, y2)
    if not all(math.isfinite(v) for v in box):
        return Parsed(None, "not finite")
    if any(abs(v) > MAX_COORDINATE for v in box):
        return Parsed(None, "absurd value")
    if x2 < x1 or y2 < y1:
        return Parsed(None, "inverted")
    if x2 == x1 or y2 == y1:
        return Parsed(None, "degenerate")
    return Parsed(box, "")


def format_reward(text: str) -> float:
    """1 if the whole text is <think>...</think><answer>... a box ...</answer>, space around the tags aside, else 0."""
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    if not (once and text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    between = text.partition("</think>")[2].partition("<answer>")
    return float(between[1] != "" and between[0].strip() == "" and parse_box(text).box is not None)


@dataclass
class Scores:
    """N answers in numbers."""

    boxes: Tensor  # (N, 4) fp32, ORIGINAL pixels; NaN where there is none
    iou: Tensor  # (N,) in [0, 1], 0 where there is no box
    giou: Tensor  # (N,) in [-1, 1], 0 where there is no box: ask `valid`
    valid: Tensor  # (N,) bool
    format: Tensor  # (N,) 0 or 1
    reasons: list[str]  # (N,) keys of REASONS


def score(texts: list[str], targets: Tensor, scale: Tensor) -> Scores:
    """texts (N,); targets (N, 4) boxes in ORIGINAL pixels; scale (N, 2): original pixels per model pixel, x and y."""
    parsed = [parse_box(text) for text in texts]
    boxes = torch.tensor([p.box or (math.nan,) * 4 for p in parsed], dtype=torch.float64).view(-1, 4)
    boxes = (boxes * scale.to(torch.float64).repeat(1, 2)).float()
    targets = targets.float()
    return Scores(
        boxes=boxes,
        iou=kernels.box_iou(boxes, targets),
        giou=kernels.box_iou(boxes, targets, giou=True),
        valid=torch.tensor([p.box is not None for p in parsed], dtype=torch.bool),
        format=torch.tensor([format_reward(text) for text in texts]),
        reasons=[p.reason for p in parsed],
    )


def combine(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Weighted sum of the reward parts, all of one shape; a part without a weight counts 0. Normalise afterwards."""
    if unknown := sorted(weights.keys() - parts.keys()):
        raise InputError(f"no reward is called {unknown[0]!r}; there are {', '.join(sorted(parts))}")
    return sum(weights[name] * parts[name] for name in weights)
