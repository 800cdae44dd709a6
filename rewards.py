"""Rewards: the text of an answer -> a box -> numbers (IoU, GIoU, valid, format), and their weighted sum.

Answers are read tolerantly, because a box that stands there and is not found is a reward stuck
at 0 with no word why: ints, floats, exponents, JSON or a bare list, any key, corners as two points, line breaks
anywhere. What cannot be read has a named reason (REASONS). One regular expression finds the lists of numbers in one
linear pass; the text need not be JSON, since many answers of an untrained policy are not.

Frames: an answer is in pixels of the MODEL frame (the resized image), a target in pixels of the ORIGINAL image, and IoU
is taken in the original.

Left out: thresholds (the schedules decide hits), normalisation (kernels.group_advantage), rewards of other tasks (enter
yours in REWARDS).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from errors import InputError

Box = tuple[float, float, float, float]

# Every reason why an answer has no box, with its meaning; the empty reason is success.
REASONS = {
    "": "a box",
    "no box": "no list of numbers in the answer",
    "incomplete box": "fewer than four numbers, or a bracket that is not closed behind them",
    "too many numbers": "a list of more than four numbers",
    "not finite": "a NaN, an infinity, or a number too large for a float",
    "absurd value": "a coordinate beyond +-1e6 pixels",
    "inverted": "x2 < x1 or y2 < y1",
    "degenerate": "zero width or zero height",
}
MAX_COORDINATE = 1e6  # pixels; larger than any image that fits into a model, small enough for areas in fp32
CORNERS = ("x1", "y1", "x2", "y2")
# Qwen's JSON repeats the question's phrase behind the box; numbers in it are no coordinates. A string ends at the kind
# of quote that it began with: the others are part of it.
_STRING = "|".join(rf"{a}(?:[^{b}\\]|\\.)*{b}?" for a, b in ('""', "“”", "＂＂"))
_LABEL = re.compile(rf'["“”＂]label["“”＂]\s*[:：]\s*(?:{_STRING})', re.DOTALL)
# How Chinese text writes brackets, commas, colons, quotes, signs and digits -> ASCII, one character for one.
_ASCII = {0xFEE0 + c: c for c in range(0x21, 0x7F)}  # the fullwidth forms
_ASCII |= str.maketrans("【】〔〕、“”‘’−\u3000\xa0", "[][],\"\"''-  ")

# A list of numbers with its brackets, and the key in front if that names a corner. Linear in the text: behind the first
# number everything is optional, so a match that has begun cannot fail late; and a number begins and ends where a word
# does (not the 2 of bbox_2d, not the 10 of 10px), so a long one that failed is not tried again from its second digit.
_NUMBER = r"""[+-]? (?: (?: [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ ) (?:e[+-]?[0-9]+)? | nan | inf(?:inity)? ) (?! \.?\w )"""
_LIST = re.compile(
    rf"""
    (?: (?<!\w) (?P<key>[xy][12]) ["']? \s* [:=] \s* )?
    (?P<opened> [\[(] \s* )?
    (?P<numbers> (?<![\w.]) {_NUMBER} (?: [\s,]+ {_NUMBER} )* )
    [\s,]* (?P<closed> [\])] )?
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,  # ASCII: float() must be able to read whatever [0-9], inf and nan match
)


class Parsed(NamedTuple):
    """An answer's box, or the reason why there is none."""

    box: Box | None  # x1, y1, x2, y2 as written, pixels of the model frame
    reason: str  # a key of REASONS; "" if there is a box


def parse_box(text: str) -> Parsed:
    """The box that an answer states, in pixels of the MODEL frame as written. Never raises; linear in the text.

    Read is what stands behind the last <answer>, up to </answer> or the end; the whole text if there is no such tag.
    There the last complete box counts, in one of three forms:
        10, 20, 30, 40          four numbers between commas or spaces; in [], () or nothing, under any key or none
        (10, 20), (30, 40)      two points with nothing but commas and spaces between them, also inside one more bracket
        "x1": 10, "y1": 20, "x2": 30, "y2": 40      the corners by name, in any order, with : or =

    The last complete box decides even if it is inverted or infinite: no earlier box is tried, so hedging does not pay.
    A list of fewer or more than four numbers, or one cut off before its bracket closes (its last number may be half of
    one), is not a complete box; it does not hide one before it, and gives the reason where there is none. A lone number
    in prose is no list, nor is anything inside the string of a "label". Fullwidth digits, brackets, commas, colons and
    quotes, as Chinese text has them, are read as their ASCII twins; digits of other scripts are not.
    """
    _, tag, answer = text.rpartition("<answer>")
    if tag:
        answer, _, _ = answer.partition("</answer>")
    numbers, last = _find_box(_LABEL.sub('"label"', answer).translate(_ASCII))
    if numbers is None:
        if not last:
            return Parsed(None, "no box")
        return Parsed(None, "too many numbers" if len(last) > 4 else "incomplete box")

    box = x1, y1, x2, y2 = tuple(float(number) for number in numbers)
    if not all(isfinite(v) for v in box):
        return Parsed(None, "not finite")
    if any(abs(v) > MAX_COORDINATE for v in box):
        return Parsed(None, "absurd value")
    if x2 < x1 or y2 < y1:
        return Parsed(None, "inverted")
    if x2 == x1 or y2 == y1:
        return Parsed(None, "degenerate")
    return Parsed(box, "")


def _find_box(answer: str) -> tuple[list[str] | None, list[str]]:
    """(the last list of exactly four numbers, the last list of any length), each None or [] where there is none."""
    boxes: list[list[str]] = []
    last: list[str] = []
    corners: dict[str, str] = {}
    point_end = -1  # where the last list ended, if it was made of points
    for found in _LIST.finditer(answer):
        key, opened, text, closed = found.groups()
        numbers = text.replace(",", " ").split()
        if key and len(numbers) == 1:
            corner = key.lower()
            corners = {} if corner in corners else corners  # a second x1 begins a second box
            corners[corner] = numbers[0]
            numbers = [corners[c] for c in CORNERS if c in corners]
        elif opened and not closed and len(numbers) == 4:
            numbers = numbers[:3]  # cut off: the fourth may be half a number
        elif not opened and len(numbers) == 1:
            continue
        is_point = bool(opened and closed and len(numbers) == 2)
        if is_point and point_end >= 0 and not answer[point_end : found.start()].strip(", \t\r\n\f\v"):
            last += numbers  # (10, 20), (30, 40): two points are a box, three are a polygon and no box any more
            if len(last) == 6:
                boxes.pop()
        else:
            last = numbers
        if len(last) == 4:
            boxes.append(last)
        point_end = found.end() if is_point else -1
    return (boxes[-1] if boxes else None), last


def format_reward(text: str) -> float:
    """1.0 if the whole text is <think>...</think> <answer>... a box ...</answer>, each tag once, else 0.0.

    White space is free around the two blocks and between them; the box must be one that parse_box accepts.
    """
    parts = re.split(r"(</?(?:think|answer)>)", text)
    if parts[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    before, _thought, between, _answer, after = parts[::2]
    return float(not (before + between + after).strip() and parse_box(text).box is not None)


@dataclass
class Scores:
    """What N answers are worth; tensors on the targets' device."""

    boxes: Tensor  # (N, 4) fp32, pixels of the ORIGINAL image; NaN where invalid, so that no one draws or averages it
    iou: Tensor  # (N,) fp32 in [0, 1]; 0 where invalid
    giou: Tensor  # (N,) fp32 in [-1, 1]; 0 where invalid, which is no mark of it: look at `valid`
    valid: Tensor  # (N,) bool: a box could be read
    format: Tensor  # (N,) fp32, 0 or 1: format_reward
    reasons: list[str]  # N keys of REASONS, "" where valid


def score(texts: list[str], targets: Tensor, scale: Tensor) -> Scores:
    """Read N answers and hold them against their targets, in the ORIGINAL frame.

    targets (N, 4) x1, y1, x2, y2 in pixels of the original image; scale (N, 2) the factors (sx, sy) that map the model
    frame to the original one (original size / resized size). Raises ValueError for shapes that do not fit.
    """
    n = len(texts)
    if targets.shape != (n, 4) or scale.shape != (n, 2):
        raise ValueError(
            f"{n} texts want targets ({n}, 4) and scale ({n}, 2), got {tuple(targets.shape)}, {tuple(scale.shape)}"
        )
    parsed = [parse_box(text) for text in texts]
    nothing = (float("nan"),) * 4
    boxes = torch.tensor([p.box or nothing for p in parsed], dtype=torch.float64).view(n, 4)  # view: also for n = 0
    boxes = boxes * scale.double().cpu().repeat(1, 2)  # model frame -> original; x1, y1, x2, y2 times sx, sy, sx, sy
    boxes = boxes.float().to(targets.device)  # (N, 4)
    return Scores(
        boxes=boxes,
        iou=kernels.box_iou(boxes, targets.float()),
        giou=kernels.box_iou(boxes, targets.float(), giou=True),
        valid=torch.tensor([p.box is not None for p in parsed], dtype=torch.bool, device=targets.device),
        format=torch.tensor([format_reward(text) for text in texts], dtype=torch.float32, device=targets.device),
        reasons=[p.reason for p in parsed],
    )


# Rewards beside the one for the box: name -> function(texts, scores, samples) -> (N,) tensor, any range. N answers,
# their Scores and the data.Sample that each answers; a sample's `task` and `dataset` can choose what is rewarded.
REWARDS: dict[str, Callable[[list[str], Scores, list], Tensor]] = {
    "format": lambda texts, scores, samples: scores.format,
}


def read_weights(text: str) -> dict[str, float]:
    """ "box=1,format=0.5" -> name -> weight. InputError for what is not a known reward and a finite number."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in ("box", *REWARDS):
            raise InputError(f"no reward is called {name!r}; there are box, {', '.join(REWARDS)}")
        if name in weights:
            raise InputError(f"{name!r} is named twice")
        try:
            weights[name] = float(number)
        except ValueError:
            raise InputError(f"{part!r} must be NAME=WEIGHT, such as box=1") from None
        if not isfinite(weights[name]):
            raise InputError(f"{part!r} must have a finite weight")
    if not any(weights.values()):
        raise InputError(f"{text!r} gives every reward the weight 0; one must count")
    return weights


def parts_of_reward(
    names: Iterable[str], texts: list[str], scores: Scores, samples: list, schedule
) -> dict[str, Tensor]:
    """name -> (N,) rewards on the CPU: "box" is the schedule's, under its present threshold; the others are REWARDS'.

    InputError where one of them does not give a finite number to each answer.
    """
    parts = {}
    for name in names:
        if name == "box":
            rows = zip(scores.iou.tolist(), scores.giou.tolist(), scores.valid.tolist(), strict=True)
            part = torch.tensor([schedule.reward(*row) for row in rows])
        else:
            part = torch.as_tensor(REWARDS[name](texts, scores, samples), dtype=torch.float32).cpu()
        if part.shape != (len(texts),) or not part.isfinite().all():
            raise InputError(
                f"reward {name!r} must give {len(texts)} finite numbers, one an answer; "
                f"it gave {tuple(part.shape)}, {int((~part.isfinite()).sum())} of them not finite"
            )
        parts[name] = part
    return parts


def combine(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Several rewards -> one, before normalisation (as VLM-R1: weighted sum, then normalise)."""
    return sum(weight * parts[name] for name, weight in weights.items())
