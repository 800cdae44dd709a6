"""Where something is at given seconds of a clip: text of an answer -> a box each -> IoU over space and time.
Spatio-temporal grounding, STG of MedGRPO (arXiv 2512.06581).

    {"frames": ["f/0001.jpg", ...], "fps": 1.0, "task": "tube", "query": "the hook",
     "tube": {"1.0": [10, 20, 30, 40], "5.0": [12, 22, 33, 41]}}

Keys are seconds from the first frame with one decimal, boxes are in original pixels. The question lists the seconds
that are asked for, which are the truth's; a box at any other one costs. u is vIoU, the sum of IoU over the seconds that
both have / the number of seconds that one has. Boxes of answers are in pixels of the MODEL frame, as tasks/box.py's,
unless --tasks tube:frame=original.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

import kernels
from data import Record
from errors import InputError, short
from images import Box
from prompts import Prompt
from scheduler import hit
from settings import Settings, setting
from tasks.box import REASONS as OF_ONE
from tasks.box import BoxTask, check_numbers, find_boxes, read_box, to_model, whole_pixels
from tasks.span import SLACK, TIME, plain, second, seconds_of
from tasks.task import Scores, Task

MOST = 1000  # boxes of an answer or a record
SHOWN = 3  # frames of a picture
STAMP = re.compile(r"\d{1,6}\.\d")
THRESHOLDS = (0.3, 0.5)
THOUGHT = "I look for what the question names at each of the seconds and frame it."

# A second and its box: 1.0 seconds: [1, 2, 3, 4], {"1.0": [1, 2, 3, 4]}, {"time": 1.0, "bbox_2d": [1, 2, 3, 4]}.
# The box itself is read by find_boxes, so that both tasks mean the same by it.
_PLACE = re.compile(
    TIME + r"""["']? ?(?::|=|->|,)? ?(?:\{? ?["']?[a-z]\w*["']? ?[:=] ?)?([\[(][^\[\]()]*[\])])""", re.ASCII
)


class Tube(NamedTuple):
    """A tube's target; rows of an evaluation hold it as [{"1.0": box, ...}, seconds]."""

    boxes: dict[str, Box | None]  # in the order of their seconds; None where nobody knows: Task.unlabelled
    seconds: float  # of the clip


class Place(NamedTuple):
    """A box at one second, in a prompt's place."""

    target: Box
    scale: tuple[float, float]
    size: tuple[int, int]


@dataclass(frozen=True)
class Tubes(Settings):
    u: str = setting(
        "viou", "vIoU; or the mean IoU over the truth's seconds, more of which cost nothing", "viou", "siou"
    )
    frame: str = setting(
        "model", "of an answer's pixels; MedVidBench's own models answer in the original", "model", "original"
    )

    def scale(self, scale: tuple[float, float]) -> tuple[float, float]:
        """Original pixels per pixel of an answer, of those per pixel of the model frame."""
        return scale if self.frame == "model" else (1.0, 1.0)


class TubeTask(Task):
    name = "tube"
    Settings = Tubes
    settings = Tubes()
    reasons = OF_ONE | {
        "": "boxes at seconds",
        "no second": "a box without its second",
        "the same second twice": "two boxes at one second",
        "beyond the clip": f"a second before 0, or more than {SLACK:.1g} over the clip's end",
        "too many boxes": f"more than {MOST}",
    }
    parts = ("siou",)
    unit = "vIoU"
    field = "tube"
    questions = {
        "answer": "{query}",
        "think": "{query} First output the thinking process in <think> </think> tags and then output the final answer "
        "in <answer> </answer> tags. Answer with second: [x1, y1, x2, y2] for each of the seconds.",
        "qwen": "{query} Answer with second: [x1, y1, x2, y2] for each of the seconds.",
    }

    def read(self, record: Record) -> Tube:
        """ "tube": {"1.0": [x1, y1, x2, y2], ...}, original frame; cut at the picture's edge with --clip-boxes. Where
        the answer may be missing, "seconds": [1.0, ...] says what is asked."""
        if record.seconds is None:
            raise InputError("a tube wants a clip; name its frames and their fps")
        if self.unlabelled and "tube" not in record.fields:
            values, field = record["seconds"], record.names.get("seconds", "seconds")
            fine = isinstance(values, list) and all(type(v) in (int, float) and 0 <= v < 1e6 for v in values)
            if not fine or not 1 <= len(values) <= MOST:
                raise InputError(f"field {field!r} must be a list of 1 to {MOST} seconds, not {short(values)}")
            boxes = {f"{value:.1f}": None for value in sorted(values)}
        else:
            values, field, boxes = record["tube"], record.names.get("tube", "tube"), {}
            if not isinstance(values, dict) or not 1 <= len(values) <= MOST:
                example = 'such as {"1.0": [x1, y1, x2, y2]}'
                raise InputError(
                    f"field {field!r} must hold 1 to {MOST} boxes by second, {example}, not {short(values)}"
                )
            for stamp, value in values.items():
                if not STAMP.fullmatch(stamp) or stamp != f"{float(stamp):.1f}":
                    raise InputError(f"field {field!r}: {short(stamp)} is no second; write one decimal, such as '1.0'")
                boxes[stamp], cut = read_box(value, f"{field}['{stamp}']", record.size, record.clip)
                record.cut = record.cut or cut
        for stamp in boxes:
            if float(stamp) > record.seconds + SLACK:
                where = f"field {field!r}: {stamp} lies behind the clip of {second(record.seconds)} seconds"
                raise InputError(f"{where}; mend it or fps")
        return Tube(dict(sorted(boxes.items(), key=lambda item: float(item[0]))), record.seconds)

    def known(self, target: Tube) -> bool:
        return None not in target[0].values()

    def phrase(self, query: str, target: Tube) -> str:
        return f"{query}\nSeconds: {', '.join(target.boxes)}."

    def answer(self, target: Tube, scale: tuple[float, float], style: str, query: str) -> str:
        """MedVidBench's form, in whole pixels."""
        words = written({stamp: to_model(box, self.settings.scale(scale)) for stamp, box in target.boxes.items()})
        return f"<think> {THOUGHT} </think>\n<answer>{words}</answer>" if style == "think" else words

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        """All pairs of boxes of all answers go through the IoU kernel at once."""
        parsed = [parse_tube(text, prompt.target[1]) for text, prompt in zip(texts, prompts, strict=True)]
        scales = [self.settings.scale(prompt.scale) for prompt in prompts]
        answers = [
            found and {t: [v * s for v, s in zip(box, scale * 2, strict=True)] for t, box in found.items()}
            for (found, _), scale in zip(parsed, scales, strict=True)
        ]
        shares = viou([(answer or {}, prompt.target[0]) for answer, prompt in zip(answers, prompts, strict=True)])
        u = [volume if self.settings.u == "viou" else space for volume, space, _ in shares]
        return Scores(
            u=torch.tensor(u, dtype=torch.float32),
            valid=torch.tensor([answer is not None for answer in answers], dtype=torch.bool),
            reasons=[reason for _, reason in parsed],
            answers=answers,
            parts={"siou": torch.tensor([space for _, space, _ in shares], dtype=torch.float32)},
        )

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """m_viou, and the shares of answers where vIoU is at least t; siou, the mean IoU over the truth's seconds;
        m_tiou, seconds of both / of either; an answer that cannot be read has 0 in all. And the leaderboard's own mean
        (leaderboard()), which leaves such answers out."""
        shares = viou([(row["answer"] or {}, row["target"][0]) for row in rows])
        volumes, spaces, times = zip(*shares, strict=True)
        base = super().metrics([row | {"u": value} for row, value in zip(rows, volumes, strict=True)])
        values = {"m_viou": base["u"], "m_viou_standard_error": base["u_standard_error"]}
        values |= {f"viou@{t}": round(sum(hit(v, t) for v in volumes) / len(rows), 6) for t in THRESHOLDS}
        values |= {"siou": round(sum(spaces) / len(rows), 6), "m_tiou": round(sum(times) / len(rows), 6)}
        board = [value for value in leaderboard(rows) if value is not None]
        values |= {"leaderboard_miou": round(sum(board) / max(len(board), 1), 6), "leaderboard_n": len(board)}
        return values | super().metrics(rows)

    def summary(self, m: dict) -> str:
        head = f"m_vIoU {m['m_viou']:.3f} +- {m['m_viou_standard_error']:.3f}"
        shares = "  ".join(f"vIoU@.{round(10 * t)} {m[f'viou@{t}']:.3f}" for t in THRESHOLDS)
        board = f"leaderboard's {m['leaderboard_miou']:.3f} of {m['leaderboard_n']}"
        rest = f"sIoU {m['siou']:.3f}  m_tIoU {m['m_tiou']:.3f}  {board}  n {m['n']}"
        return f"{head}  {shares}  {rest}  cannot be read {m['parse_failures']}"

    def constant(self, train: list[tuple[tuple[int, int], Tube]]) -> Callable[[tuple[int, int], Tube], str]:
        """At every second that is asked for the median box of all, as tasks/box.py's."""
        box = BoxTask().constant([(size, box) for size, target in train for box in target.boxes.values()])
        return lambda size, target: " ".join(f"{stamp} seconds: {box(size, None)}" for stamp in target[0])

    def hint(self, prompts: list[Prompt], answers: list[list[Any]], u: float) -> str:
        """As tasks/box.py's, of each box."""
        pairs = [
            (Place(prompt.target[0][t], self.settings.scale(prompt.scale), prompt.size), [box])
            for prompt, group in zip(prompts, answers, strict=True)
            for answer in group
            for t, box in (answer or {}).items()
            if t in prompt.target[0]
        ]
        places, boxes = [place for place, _ in pairs], [group for _, group in pairs]
        return BoxTask().hint(places, boxes, u) if self.settings.frame == "model" else ""

    def told(self, row: dict) -> str:
        return written(row["answer"])

    def moments(self, target: Tube) -> list[float]:
        stamps = list(target[0])
        count = min(len(stamps), SHOWN)
        return [float(stamps[i * (len(stamps) - 1) // max(count - 1, 1)]) for i in range(count)]

    def draw(self, image: Image.Image, scale: float, target: Tube | None, answers: list[Any]) -> None:
        """Each frame of moments(), side by side, with its boxes and its second."""
        if target is None:
            return
        moments = self.moments(target)
        width = image.width // len(moments)
        for i, moment in enumerate(moments):
            stamp = f"{moment:.1f}"
            frame = image.crop((i * width, 0, (i + 1) * width, image.height))
            BoxTask().draw(frame, scale, target[0][stamp], [(answer or {}).get(stamp) for answer in answers])
            ImageDraw.Draw(frame).text((3, 2), f"{stamp} s", fill=(255, 255, 255))
            image.paste(frame, (i * width, 0))


def written(boxes: dict[str, Box]) -> str:
    """In whole pixels of the frame that the boxes are in, in the order of their seconds."""
    stamps = sorted(boxes, key=float)
    return " ".join(f"{t} seconds: [{','.join(map(str, whole_pixels(tuple(boxes[t]))))}]" for t in stamps)


def parse_tube(text: str, seconds: float) -> tuple[dict[str, Box] | None, str]:
    """(the boxes of an answer by their seconds, in pixels of the MODEL frame, "") or (None, a key of TubeTask.reasons).
    Never raises; linear in the text."""
    answer = plain(text)
    boxes: dict[str, Box] = {}
    places = list(_PLACE.finditer(answer))
    found, others = find_boxes("; ".join(place[2] for place in places))
    if others:
        return None, "too many numbers" if len(others[-1]) > 4 else "incomplete box"
    rest, others = find_boxes(_PLACE.sub("|", answer))
    if rest:
        return None, "no second"
    if others:
        return None, "incomplete box"
    if not found:
        return None, "no box"
    if len(found) != len(places):  # a list without numbers
        return None, "incomplete box"
    if len(found) > MOST:
        return None, "too many boxes"
    for place, numbers in zip(places, found, strict=True):
        time, box = seconds_of(place[1]), tuple(map(float, numbers))
        if reason := check_numbers(box) if isfinite(time) else "not finite":
            return None, reason
        if not 0 <= time <= seconds + SLACK:
            return None, "beyond the clip"
        if (stamp := f"{time:.1f}") in boxes:
            return None, "the same second twice"
        boxes[stamp] = box
    return boxes, ""


# ----------------------------------------------------------------------------------------------------------- measuring


def viou(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[float, float, float]]:
    """(answer, truth), boxes by second -> (vIoU, sIoU, tIoU) of each: the sum of IoU over the seconds that both have,
    divided by the number that one has, and by the truth's; the number that both have, divided by that one has."""
    common = [[t for t in true if t in found] for found, true in pairs]
    sums, at = iou_of([(found[t], true[t]) for (found, true), ts in zip(pairs, common, strict=True) for t in ts]), 0
    shares = []
    for (found, true), stamps in zip(pairs, common, strict=True):
        whole, either = sum(sums[at : at + len(stamps)]), len(found.keys() | true.keys())
        at += len(stamps)
        shares.append((whole / either, whole / len(true), len(stamps) / either))
    return shares


def iou_of(pairs: list[tuple[Any, Any]]) -> list[float]:
    """IoU of each pair of boxes; of a box that nobody knows 0."""
    nothing = (float("nan"),) * 4
    flat = torch.tensor([(tuple(a), tuple(b or nothing)) for a, b in pairs], dtype=torch.float32).view(-1, 2, 4)
    return kernels.box_iou(flat[:, 0].contiguous(), flat[:, 1].contiguous()).tolist()


def leaderboard(rows: list[dict]) -> list[float | None]:
    """The value of each answer as MedVidBench's leaderboard has it (evaluation/eval_stg.py), for comparison alone: the
    mean IoU over the truth's seconds, where one without a box takes the box before; those before the first box, and an
    answer without any such second, are left out (None), not 0. Left out: its own reading of texts."""
    pairs, counts = [], []
    for row in rows:
        found, last, start = row["answer"] or {}, None, len(pairs)
        for stamp, box in row["target"][0].items():
            last = found.get(stamp, last)
            if last is not None:
                pairs.append((last, box))
        counts.append(len(pairs) - start)
    ious, at, means = iou_of(pairs), 0, []
    for count in counts:
        means.append(sum(ious[at : at + count]) / count if count else None)
        at += count
    return means
