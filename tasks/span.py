"""When something happens in a clip: text of an answer -> spans of seconds -> temporal IoU. Temporal action
localisation, TAL of MedGRPO (arXiv 2512.06581).

    {"frames": ["f/0001.jpg", ...], "fps": 1.0, "task": "span", "query": "when is the duct clipped?",
     "segments": [[1.1, 3.0]]}

Seconds count from the first frame. u of one span is its temporal IoU; of several the sum over the best one-to-one
matching, divided by the larger of both counts, so that a span too many costs as much as one that is missing. Answers
are read tolerantly (1.1-3.0, 1.1 to 3.0 s, 0:01.1-0:03, JSON), and what cannot be read has a named reason. The question
states the clip's length: apart from that, M-RoPE's time is a policy's only clock.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from data import Record
from errors import InputError, short
from prompts import Prompt
from scheduler import hit
from settings import Settings, setting
from tasks.boxes import assign
from tasks.label import HYPHENS
from tasks.task import ANSWER, TRUTH, Scores, Task, answer_text

Seconds = tuple[float, float]  # start, end

MOST = 100  # spans of an answer or a record
SLACK = 0.1 + 1e-6  # seconds that an answer may reach over the clip's end: its own last digit
THRESHOLDS = (0.3, 0.5, 0.7)
THOUGHT = "I look for when it begins and when it ends."

# A point in time: seconds with or without their unit, or m:ss, h:mm:ss. A number begins and ends where a word does;
# what is followed by another unit is none (10-20 %, 1-2 minutes).
_CLOCK = r"(?:\d{1,3}:)?\d{1,3}:[0-5]\d(?:\.\d+)?"
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?"
TIME = rf"(?<![\w.:])([+-]?(?:{_CLOCK}|{_NUMBER}))(?: ?(?:seconds?|secs?|s|秒))?(?!\.?\w|:\d| ?(?:%|min|frame))"
_TO = r" ?(?:-|~|to|until|till|到|至) ?"
_Q = "[\"']?"
_NAMED = r"(?:[ _]\w{1,20})?"  # start_time; no longer, or start_start_start_ would take quadratic time
_PAIR = re.compile(
    "|".join(
        (
            rf"between {TIME} and {TIME}",
            rf"start{_NAMED}{_Q} ?[:=] ?{_Q}{TIME}{_Q}[ ,;]*{_Q}end{_NAMED}{_Q} ?[:=] ?{_Q}{TIME}",
            rf"[\[(] ?{_Q}{TIME}{_Q} ?, ?{_Q}{TIME}{_Q} ?[\])]",
            rf"{TIME}{_Q}{_TO}{_Q}{TIME}",
        )
    ),
    re.ASCII,
)
# What is left, each span in it a |, when an answer was cut off, or has three points in time in a row.
_CUT = re.compile(rf"\|{_TO}{TIME}|(?:^|[|\[(])[ ,;]*{TIME}[ ,]*$|{TIME}{_TO}$", re.ASCII)


class Span(NamedTuple):
    """A span's target; rows of an evaluation hold it as [[[start, end], ...], seconds]."""

    segments: tuple[Seconds, ...]
    seconds: float  # of the clip


@dataclass(frozen=True)
class Temporal(Settings):
    u: str = setting(
        "matched",
        "sum of tIoU of the best pairs / larger count; IoU of both as sets of moments (what public ports pay); or as "
        "matched, each tIoU times (1 - |ds| / D) (1 - |de| / D) (Time-R1's; D: the clip)",
        "matched", "union", "time-r1",
    )  # fmt: skip


class SpanTask(Task):
    name = "span"
    Settings = Temporal
    settings = Temporal()
    reasons = {
        "": "one span, or several",
        "no span": "no two points in time that make a span",
        "incomplete span": "a span without its end, or three points in time in a row",
        "too many spans": f"more than {MOST}",
        "not finite": "a NaN, an infinity, or a number too large for a float",
        "reversed": "a span that ends before it begins",
        "empty span": "a span that ends where it begins",
        "beyond the clip": f"a span before 0, or more than {SLACK:.1g} seconds over the clip's end",
        "the same span twice": "a span that stands there more than once",
    }
    unit = "tIoU"
    bar = 5
    field = "segments"
    questions = {
        "answer": "{query}",
        "think": "{query} First output the thinking process in <think> </think> tags and then output the final answer "
        "in <answer> </answer> tags. Answer with the seconds as start-end, several separated by commas.",
        "qwen": "{query} Answer with the seconds as start-end, several separated by commas.",
    }

    def read(self, record: Record) -> Span:
        """ "segments": a list of [start, end] in seconds from the first frame, none twice."""
        if record.seconds is None:
            raise InputError("a span wants a clip; name its frames and their fps")
        if self.unlabelled and "segments" not in record.fields:
            return Span((), record.seconds)
        values, field = record["segments"], record.names.get("segments", "segments")
        if not isinstance(values, list) or not 1 <= len(values) <= MOST:
            raise InputError(f"field {field!r} must be a list of 1 to {MOST} spans, not {short(values)}")
        found: list[Seconds] = []
        for i, value in enumerate(values):
            where = f"field '{field}[{i}]' {short(value)}"
            if not isinstance(value, list) or [type(v) in (int, float) and abs(v) < 1e9 for v in value] != [True] * 2:
                raise InputError(f"field '{field}[{i}]' must be [start, end] in seconds, not {short(value)}")
            start, end = map(float, value)
            if not 0 <= start < end:
                raise InputError(f"{where} is no span; write 0 <= start < end")
            if end > record.seconds + SLACK:
                raise InputError(f"{where} ends behind the clip of {second(record.seconds)} seconds; mend it or fps")
            if (start, end) in found:
                raise InputError(f"{where} is there twice; write each span once")
            found.append((start, min(end, record.seconds)))
            if found[-1][0] >= found[-1][1]:
                raise InputError(f"{where} begins at the clip's end, {second(record.seconds)} seconds; mend it or fps")
        return Span(tuple(sorted(found)), record.seconds)

    def known(self, target: Span) -> bool:
        return bool(target[0])

    def phrase(self, query: str, target: Span) -> str:
        return f"{query}\nThe clip lasts {second(target.seconds)} seconds."

    def answer(self, target: Span, scale: tuple[float, float], style: str, query: str) -> str:
        """MedVidBench's form, `1.1-3.0 seconds.`; of the style "answer" the spans alone."""
        words = ", ".join(f"{second(a)}-{second(b)}" for a, b in target.segments)
        if style == "think":
            return f"<think> {THOUGHT} </think>\n<answer>{words} seconds.</answer>"
        return words if style == "answer" else f"{words} seconds."

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        u, reasons, answers = [], [], []
        for text, prompt in zip(texts, prompts, strict=True):
            true, seconds = prompt.target
            found, reason = parse_spans(text, seconds)
            reasons.append(reason)
            answers.append(None if found is None else [list(span) for span in found])
            u.append(0.0 if found is None else self.u(found, true, seconds))
        valid = torch.tensor([reason == "" for reason in reasons], dtype=torch.bool)
        return Scores(torch.tensor(u, dtype=torch.float32), valid, reasons, answers)

    def u(self, found: Sequence[Seconds], true: Sequence[Seconds], seconds: float) -> float:
        if self.settings.u == "union":
            return union_iou(found, true)
        worth = tiou
        if self.settings.u == "time-r1":

            def worth(a: Seconds, b: Seconds) -> float:
                near = (max(1 - abs(x - y) / seconds, 0.0) for x, y in zip(a, b, strict=True))
                return tiou(a, b) * next(near) * next(near)

        return matched(found, true, worth)

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """miou: sum of tIoU over the best one-to-one pairs / the larger count, 0 for what cannot be read; r@t, the
        share of answers where that is at least t; and the leaderboard's own (leaderboard())."""
        worth = [matched(row["answer"] or [], row["target"][0], tiou) for row in rows]
        base = super().metrics([row | {"u": value} for row, value in zip(rows, worth, strict=True)])
        values = {"miou": base["u"], "miou_standard_error": base["u_standard_error"]}
        values |= {f"r@{t}": round(sum(hit(v, t) for v in worth) / len(rows), 6) for t in THRESHOLDS}
        for t in THRESHOLDS:
            pairs = [leaderboard(row["answer"] or [], row["target"][0], t) for row in rows]
            for name, column in zip(("miou", "recall"), zip(*pairs, strict=True), strict=True):
                values[f"leaderboard_{name}@{t}"] = round(sum(column) / len(rows), 6)
        return values | super().metrics(rows)

    def summary(self, m: dict) -> str:
        recalls = "  ".join(f"R@.{round(10 * t)} {m[f'r@{t}']:.3f}" for t in THRESHOLDS)
        board = f"{m['leaderboard_miou@0.3']:.3f} {m['leaderboard_miou@0.5']:.3f}"
        head = f"mIoU {m['miou']:.3f} +- {m['miou_standard_error']:.3f}  {recalls}  leaderboard's @.3 @.5 {board}"
        return f"{head}  n {m['n']}  cannot be read {m['parse_failures']}"

    def constant(self, train: list[tuple[tuple[int, int], Span]]) -> Callable[[tuple[int, int], Span], str]:
        """One span: the median of all, as shares of their clips."""
        shares = [(a / t.seconds, b / t.seconds) for _, t in train for a, b in t.segments]
        start, end = (median(column) for column in zip(*shares, strict=True))
        return lambda size, target: f"{second(start * target[1])}-{second(end * target[1])}"

    def told(self, row: dict) -> str:
        return f"{', '.join(f'{second(a)}-{second(b)}' for a, b in row['answer'])} seconds."

    def draw(self, image: Image.Image, scale: float, target: Span | None, answers: list[Any]) -> None:
        """A bar each along the lower edge, whose width is the clip: the truth, then the answers."""
        canvas, bar = ImageDraw.Draw(image), self.bar
        ends = [end for spans in answers for _, end in spans or []]
        seconds = target[1] if target else max(ends, default=1.0)  # how long a clip lasts is its target's to know
        rows = [(target[0], TRUTH)] * bool(target) + [(spans or [], ANSWER) for spans in answers]
        y = image.height - bar * len(rows)
        for spans, colour in rows:
            canvas.rectangle((0, y, image.width, y + bar - 1), fill=(0, 0, 0))
            for start, end in spans:
                left, right = (min(v / seconds, 1.0) * image.width for v in (start, end))
                canvas.rectangle((left, y + 1, max(right - 1, left), y + bar - 2), fill=colour)
            y += bar


# ------------------------------------------------------------------------------------------------------------- reading


def plain(text: str) -> str:
    """The part of an answer that counts: ASCII's letters, digits, hyphens and brackets, single blanks."""
    text = unicodedata.normalize("NFKC", answer_text(text)).translate(HYPHENS | {0x2014: "-", 0x301C: "~"})
    return " ".join(text.translate(str.maketrans("“”‘’【】〔〕、", "\"\"''[][],")).casefold().split())


def seconds_of(time: str) -> float:
    """A point in time as TIME finds it: seconds, m:ss or h:mm:ss."""
    sign, total = -1.0 if time[0] == "-" else 1.0, 0.0
    for part in time.lstrip("+-").split(":"):
        total = 60 * total + float(part)
    return sign * total


def second(value: float) -> str:
    """A point in time as answers state it: one decimal, as many as three where they are needed."""
    text = f"{value:.3f}".rstrip("0")
    return f"{text}0" if text[-1] == "." else text


def parse_spans(text: str, seconds: float) -> tuple[list[Seconds] | None, str]:
    """(the spans of an answer about a clip that lasts so long, "") or (None, a key of SpanTask.reasons). Never raises;
    linear in the text."""
    answer = plain(text)
    found = [tuple(seconds_of(time) for time in pair.groups() if time) for pair in _PAIR.finditer(answer)]
    if _CUT.search(_PAIR.sub("|", answer)):
        return None, "incomplete span"
    if not found:
        return None, "no span"
    if len(found) > MOST:
        return None, "too many spans"
    for start, end in found:
        if not (isfinite(start) and isfinite(end)):
            return None, "not finite"
        if end < start:
            return None, "reversed"
        if end == start:
            return None, "empty span"
        if start < 0 or end > seconds + SLACK:
            return None, "beyond the clip"
    return (None, "the same span twice") if len(set(found)) < len(found) else (found, "")


# ----------------------------------------------------------------------------------------------------------- measuring


def tiou(a: Seconds, b: Seconds) -> float:
    """Intersection over union of two spans, none of which is empty."""
    inner = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return inner / ((a[1] - a[0]) + (b[1] - b[0]) - inner)


def matched(found: Sequence[Seconds], true: Sequence[Seconds], worth: Callable[[Seconds, Seconds], float]) -> float:
    """The largest sum of worth over one-to-one pairs, divided by the larger count."""
    table = [[worth(a, b) for b in true] for a in found]
    return sum(table[i][j] for i, j in assign(table)) / max(len(found), len(true), 1)


def merged(spans: Sequence[Seconds]) -> list[Seconds]:
    """The same moments in spans that do not touch."""
    whole: list[Seconds] = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], end)
        else:
            whole.append((start, end))
    return whole


def union_iou(found: Sequence[Seconds], true: Sequence[Seconds]) -> float:
    """IoU of two sets of moments."""
    a, b = merged(found), merged(true)
    inner = sum(max(min(x[1], y[1]) - max(x[0], y[0]), 0.0) for x in a for y in b)
    whole = sum(end - start for start, end in (*a, *b)) - inner
    return inner / whole if whole else 0.0


def leaderboard(found: Sequence[Seconds], true: Sequence[Seconds], tau: float) -> tuple[float, float]:
    """(mean IoU, recall) of one answer as MedVidBench's leaderboard has them (evaluation/eval_tal.py), for comparison
    alone: true spans in their order each take the best answer that is left; its IoU divides by the hull; the mean goes
    over the pairs from tau on, so that neither spans too many nor those that were missed count. Left out: its own
    reading of texts, and that its head line weighs (dataset, fps) groups alike."""
    left, ious = list(found), []
    for b in true:
        values = [max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) / (max(a[1], b[1]) - min(a[0], b[0])) for a in left]
        best = max(values, default=0.0)
        if best >= tau:
            left.pop(values.index(best))
            ious.append(best)
    return sum(ious) / max(len(ious), 1), len(ious) / len(true)
