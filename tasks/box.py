"""One phrase, one box: text of an answer -> a box -> IoU. The task of MedLoc-R1 and of referring expressions.

Answers are read tolerantly, because a box that stands there and is not found is a reward stuck at 0 with no word why:
ints, floats, exponents, JSON or a bare list, any key, corners as two points, line breaks anywhere. What cannot be read
has a named reason. One regular expression finds the lists of numbers in one linear pass; the text need not be JSON,
since many answers of an untrained policy are not.

Frames: an answer is in pixels of the MODEL frame (the resized image), a target in pixels of the ORIGINAL image, and IoU
is taken in the original.
"""

import json
import re
from collections.abc import Callable, Sequence
from math import floor, isfinite
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

import kernels
from data import REC_QUESTION, Record
from errors import InputError, short
from images import Box
from prompts import Prompt
from scheduler import hit
from tasks.task import ANSWER, TRUTH, Scores, Task

THRESHOLDS = [round(0.5 + 0.05 * i, 2) for i in range(10)]  # of pmAP
THOUGHT = "I look for the region that the question describes and frame it."
ANSWERS = {
    "answer": "[{},{},{},{}]",
    "think": f'<think> {THOUGHT} </think>\n<answer>{{{{"bbox_2d": [{{}}, {{}}, {{}}, {{}}]}}}}</answer>',
    "qwen": '```json\n[\n\t{{"bbox_2d": [{}, {}, {}, {}], "label": {}}}\n]\n```',  # to the tab as Qwen2.5-VL answers
}
# Numbers that are meant in another frame than the one asked for are the usual cause of a reward that stays at zero:
# name -> (answer's numbers (N, 4), size of the original image (N, 4) as w, h, w, h) -> boxes in original pixels.
OTHER_FRAMES = {
    "pixels of the ORIGINAL image": lambda box, size: box,
    "thousandths of the image's width and height": lambda box, size: box * size / 1000,
    "shares of the image's width and height, 0 to 1": lambda box, size: box * size,
}

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
    boxes, others = find_boxes(answer)
    if not boxes:
        if not others:
            return Parsed(None, "no box")
        return Parsed(None, "too many numbers" if len(others[-1]) > 4 else "incomplete box")
    box = tuple(float(number) for number in boxes[-1])
    reason = check_numbers(box)
    return Parsed(None if reason else box, reason)


def check_numbers(box: Box) -> str:
    """Why four numbers of an answer are no box, a key of REASONS; "" if they are one."""
    x1, y1, x2, y2 = box
    if not all(isfinite(v) for v in box):
        return "not finite"
    if any(abs(v) > MAX_COORDINATE for v in box):
        return "absurd value"
    if x2 < x1 or y2 < y1:
        return "inverted"
    return "degenerate" if x2 == x1 or y2 == y1 else ""


def find_boxes(answer: str) -> tuple[list[list[str]], list[list[str]]]:
    """(the lists of exactly four numbers, the lists of another length), in their order, strings of labels left out."""
    boxes: list[list[str]] = []
    others: list[list[str]] = []
    last: list[str] = []
    corners: dict[str, str] = {}
    point_end = -1  # where the last list ended, if it was made of points
    for found in _LIST.finditer(answer := _LABEL.sub('"label"', answer).translate(_ASCII)):
        key, opened, text, closed = found.groups()
        numbers = text.replace(",", " ").split()
        if key and len(numbers) == 1:
            corner = key.lower()
            if corner in corners:  # a second x1 begins a second box
                corners = {}
            elif last and len(corners) == len(last) and others and others[-1] is last:
                others.pop()  # the same box, with one corner less
            corners[corner] = numbers[0]
            numbers = [corners[c] for c in CORNERS if c in corners]
        elif opened and not closed and len(numbers) == 4:
            numbers = numbers[:3]  # cut off: the fourth may be half a number
        elif not opened and len(numbers) == 1:
            continue
        is_point = bool(opened and closed and len(numbers) == 2)
        if is_point and point_end >= 0 and not answer[point_end : found.start()].strip(", \t\r\n\f\v"):
            last += numbers  # (10, 20), (30, 40): two points are a box, three are a polygon and no box any more
            if len(last) == 4:
                boxes.append(others.pop())
            elif len(last) == 6:
                others.append(boxes.pop())
        else:
            last = numbers
            (boxes if len(last) == 4 else others).append(last)
        point_end = found.end() if is_point else -1
    return boxes, others


def read_box(value: Any, field: str, size: tuple[int, int], clip: bool) -> tuple[Box, bool]:
    """A record's [x1, y1, x2, y2] in a picture of that size, original frame, and whether it was cut at its edge."""
    # The bound refuses NaN, infinities and integers beyond floats too; a bool is an int to Python, but no coordinate.
    numbers = isinstance(value, list) and [type(v) in (int, float) and abs(v) < 1e9 for v in value]
    if numbers != [True] * 4:
        raise InputError(f"field {field!r} must be four finite numbers [x1, y1, x2, y2], not {short(value)}")
    x1, y1, x2, y2 = map(float, value)
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"field {field!r} {short(value)} is an empty or inverted box; write x1 < x2 and y1 < y2")
    if x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]:
        outside = f"lies outside the {size[0]}x{size[1]} image"
        raise InputError(f"field {field!r} {short(value)} {outside}; write pixels of the displayed image")
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
    cut = inside != (x1, y1, x2, y2)
    if cut and not clip:
        remedy = "write pixels of the displayed image, or have boxes cut by --clip-boxes"
        raise InputError(f"field {field!r} {short(value)} reaches outside the {size[0]}x{size[1]} image; {remedy}")
    return inside, cut


def whole_pixels(box: Box) -> tuple[int, int, int, int]:
    """Each side moves by half a pixel at most, unless the box would vanish: then it becomes the pixel that it lies
    in."""
    x1, y1, x2, y2 = map(round, box)
    if x1 == x2:
        x1, x2 = floor(box[0]), floor(box[0]) + 1
    if y1 == y2:
        y1, y2 = floor(box[1]), floor(box[1]) + 1
    return x1, y1, x2, y2


class BoxTask(Task):
    name = "box"
    reasons = REASONS
    parts = ("giou",)  # in [-1, 1]
    unit = "IoU"
    field = "bbox"
    questions = {
        "answer": "{query}",  # box only: what the nano policy is trained on
        "think": REC_QUESTION + " First output the thinking process in <think> </think> tags and then output the final "
        "answer in <answer> </answer> tags. Output the final answer in JSON format.",
        "qwen": "Locate {query}, output its bbox coordinates using JSON format.",  # of Qwen2.5-VL's grounding examples
    }

    def read(self, record: Record) -> Box:
        """ "bbox": [x1, y1, x2, y2], original frame; cut at the picture's edge with --clip-boxes, where record.cut."""
        value, field, size = record["bbox"], record.names.get("bbox", "bbox"), record.size
        if isinstance(value, list) and len(value) > 1 and all(isinstance(v, list | dict) for v in value):
            raise InputError(
                f"field {field!r} holds {len(value)} boxes, but one phrase, one box is the method; write a record for "
                'each, with a phrase that fits it alone, or of the task "boxes" with a field "boxes"'
            )
        box, record.cut = read_box(value, field, size, record.clip)
        return box

    def answer(self, target: Box, scale: tuple[float, float], style: str, query: str) -> str:
        """In whole pixels of the model frame. style "think": a fixed thought and VLM-R1's JSON; "qwen": Qwen's JSON,
        with the query as label; else [x1,y1,x2,y2]."""
        box = whole_pixels(to_model(target, scale))
        return ANSWERS.get(style, ANSWERS["answer"]).format(*box, json.dumps(query, ensure_ascii=False))

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        """u is the IoU, in the original frame."""
        parsed = [parse_box(text) for text in texts]
        nothing = (float("nan"),) * 4
        boxes = torch.tensor([p.box or nothing for p in parsed], dtype=torch.float64).view(
            -1, 4
        )  # view: also for n = 0
        scale = torch.tensor([prompt.scale for prompt in prompts], dtype=torch.float64).view(-1, 2)
        boxes = (boxes * scale.repeat(1, 2)).float()  # model frame -> original; x1, y1, x2, y2 times sx, sy, sx, sy
        targets = torch.tensor([prompt.target for prompt in prompts]).view(-1, 4)
        return Scores(
            u=kernels.box_iou(boxes, targets),
            valid=torch.tensor([p.box is not None for p in parsed], dtype=torch.bool),
            reasons=[p.reason for p in parsed],
            answers=[None if p.box is None else box for p, box in zip(parsed, boxes.tolist(), strict=True)],
            parts={"giou": kernels.box_iou(boxes, targets, giou=True)},
        )

    def metrics(self, rows: list[dict]) -> dict[str, float]:
        """MedLoc-R1's: A@t = share of answers with IoU >= t; pmAP = mean of A@t over t = .50, .55 ... .95; mIoU."""
        base, us = super().metrics(rows), [row["u"] for row in rows]
        accuracy = {t: sum(hit(u, t) for u in us) / len(us) for t in (0.3, 0.8, *THRESHOLDS)}
        values = {"miou": base["u"], "miou_standard_error": base["u_standard_error"]}
        values |= {f"acc@{t}": round(accuracy[t], 6) for t in (0.3, 0.5, 0.8)}
        values |= {"pmap": round(sum(accuracy[t] for t in THRESHOLDS) / len(THRESHOLDS), 6)}
        return values | {name: base[name] for name in ("n", "parse_failures")}

    def summary(self, m: dict) -> str:
        return (
            f"mIoU {m['miou']:.3f} +- {m['miou_standard_error']:.3f}  A@.5 {m['acc@0.5']:.3f}  A@.8 {m['acc@0.8']:.3f} "
            f" pmAP {m['pmap']:.3f}  n {m['n']}  without a box {m['parse_failures']}"
        )

    def constant(self, train: list[tuple[tuple[int, int], Box]]) -> Callable[[tuple[int, int], Any], str]:
        """The median of the boxes as shares of width and height."""
        shares = [[v / side for v, side in zip(box, size * 2, strict=True)] for size, box in train]
        median = torch.tensor(shares).quantile(0.5, dim=0)  # (4,)
        return lambda size, _: str((median * torch.tensor(size * 2)).tolist())

    def draw(self, image: Image.Image, scale: float, target: Box | None, answers: list[Box | None]) -> None:
        draw, most = ImageDraw.Draw(image), 10 * image.width
        for box in answers:
            if box is not None:
                x1, y1, x2, y2 = (max(-most, min(most, v * scale)) for v in box)
                inner = (x1, y1, x2 - 1, y2 - 1) if x2 - 1 > x1 and y2 - 1 > y1 else (x1, y1, x2, y2)
                draw.rectangle(inner, outline=ANSWER)
        if target is not None:
            draw.rectangle([v * scale - (i > 1) for i, v in enumerate(target)], outline=TRUTH, width=2)

    def hint(self, prompts: list[Prompt], answers: list[list[Any]], u: float) -> str:
        """The other frame in which the answers' numbers would mean something."""
        rows = [
            (*(v / s for v, s in zip(box, prompt.scale * 2, strict=True)), *prompt.target, *prompt.size, *prompt.size)
            for prompt, group in zip(prompts, answers, strict=True)
            for box in group
            if box is not None
        ]
        if not rows:
            return ""
        written, target, size = torch.tensor(rows).split(4, dim=1)
        best, words = max(0.1, 2 * u), ""
        for frame, read in OTHER_FRAMES.items():
            mean = kernels.box_iou(read(written, size), target).mean().item()
            if mean > best:
                best, words = mean, f"{frame} their mean IoU would be {mean:.2f}"
        return words and f"look at the frame: read as {words}, but answers are taken as pixels of the RESIZED image"


def to_model(box: Box, scale: tuple[float, float]) -> Box:
    """Original frame -> model frame; scale = (original width / model width, original height / model height)."""
    return box[0] / scale[0], box[1] / scale[1], box[2] / scale[0], box[3] / scale[1]


def to_original(box: Box, scale: tuple[float, float]) -> Box:
    """Model frame -> original frame; scale as in to_model."""
    return box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]
