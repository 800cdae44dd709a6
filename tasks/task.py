"""What an answer means: one Task says how its target is read, asked for, answered, scored, measured and drawn.

A task of your own is one file: subclass Task, fill in what is below, and enter it in TASKS (tasks/__init__.py, or from
outside). THE CONTRACT IS u IN [0, 1]: what an answer is worth (IoU of a box, 1 or 0 of a label). Schedules, windows,
evaluation and plots speak of u alone, so MedLoc-R1's curriculum works on every task; further numbers go into `parts`.
An answer that cannot be read earns exactly 0 everywhere, and has a named reason.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from data import Record
from errors import InputError, short
from images import Sample
from prompts import Prompt
from settings import Settings

TRUTH, ANSWER = (40, 220, 90), (255, 70, 60)  # colours: ground truth, answers


@dataclass
class Scores:
    """What N answers are worth. CPU."""

    u: Tensor  # (N,) fp32 in [0, 1]; 0 where invalid
    valid: Tensor  # (N,) bool: an answer could be read
    reasons: list[str]  # N keys of the task's reasons, "" where valid
    answers: list[Any]  # N: what was read, in the original frame and ready for JSON; None where invalid
    # name -> (N,) fp32: further numbers. 0 where invalid; NaN where there is none, but never one of the task's terms
    # that is rewarded.
    parts: dict[str, Tensor] = field(default_factory=dict)


class Task:
    """Base of all tasks; a target is whatever read() returns."""

    name: str  # a record's "task"
    reasons: dict[str, str]  # why an answer cannot be read -> what that means; "" is success
    parts: tuple[str, ...] = ()  # names in Scores.parts
    terms: tuple[str, ...] = ()  # those of them that u is made of, which --rewards may weigh one by one
    questions: dict[str, str] = {}  # style -> question with {query} in it
    unit = "u"  # what u is called on pictures
    bar = 0  # pixels of height that draw() wants under a picture, for the truth and for each answer
    field: str | None = None  # of the record: what VLM-R1's kind of record has as its answer; None: read() needs others
    Settings: type[Settings] = Settings  # what --tasks NAME:key=value may set
    settings: Settings = Settings()  # as set (tasks.configure)
    unlabelled = False  # whether a record may come without its answer: eval.py --submission

    def read(self, record: Record) -> Any:
        """The target of a record: record["field"] is a field that must be there. InputError names a field that is
        wrong; file and line are put in front of it."""
        raise NotImplementedError

    def known(self, target: Any) -> bool:
        """False for the target of a record without its answer, of which there are some where `unlabelled`."""
        return True

    def phrase(self, query: str, target: Any) -> str:
        """What stands for {query}: the record's query, and what is to be chosen from. Never a function of the answer
        in the target."""
        return query

    def question(self, style: str) -> str:
        """The wording, with {query} in it: of a name in prompts.STYLES, else `style` itself."""
        return self.questions.get(style, style)

    def answer(self, target: Any, scale: tuple[float, float], style: str, query: str) -> str:
        """What supervised training wants to hear; the EOS is not in it. scale: Prompt.scale."""
        raise NotImplementedError

    def begin(self, samples: Sequence[Sample]) -> None:
        """Once it is configured: all records of this task that the program has read."""

    def ahead(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> None:
        """Begin what score() of these will have to wait for, while the rollout goes on."""

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        """N answers, each to its prompt, of which target and scale count."""
        raise NotImplementedError

    def metrics(self, rows: list[dict]) -> dict[str, float]:
        """Of evaluated rows with "u", "reason", "answer" and "target" -> what eval.json says; always with n and
        parse_failures, numbers of answers."""
        n = len(rows)
        mean = sum(row["u"] for row in rows) / n
        spread = sqrt(sum((row["u"] - mean) ** 2 for row in rows) / max(n - 1, 1) / n)
        values = {"u": round(mean, 6), "u_standard_error": round(spread, 6)}
        return values | {"n": n, "parse_failures": sum(row["reason"] != "" for row in rows)}

    def summary(self, metrics: dict) -> str:
        """metrics() as a line for the terminal."""
        shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        return "  ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )

    def constant(self, train: list[tuple[tuple[int, int], Any]]) -> Callable[[tuple[int, int], Any], str]:
        """(size of the picture, target) of the training records -> a function of another such pair: the one answer that
        a policy would give which never looks, in the original frame. The row to beat. Of the target it may use what the
        question says (phrase), as a clip's length."""
        raise InputError(f"--train: the task {self.name!r} has no constant answer; drop it")

    def told(self, row: dict) -> str:
        """What an evaluated row that could be read says, in the original frame and the form that leaderboards read."""
        return answer_text(row["text"]).strip()

    def moments(self, target: Any) -> list[float]:
        """The seconds of a clip whose frames stand side by side in a picture of it; none: some, evenly."""
        return []

    def draw(self, image: Image.Image, scale: float, target: Any, answers: list[Any]) -> None:
        """Target (None: do not show it) and answers onto a picture that is `scale` times the original. By default as
        words."""
        canvas, y = ImageDraw.Draw(image), 2
        for value, colour in [(target, TRUTH), *((answer, ANSWER) for answer in answers)]:
            if value is not None:
                canvas.text((3, y), str(value), fill=colour)
                y += 11

    def hint(self, prompts: list[Prompt], answers: list[list[Any]], u: float) -> str:
        """For a run whose rewards stay 0: what else the answers (B x G) might mean. u: their mean."""
        return ""


def answer_text(text: str) -> str:
    """The part of an answer that counts: the last <answer>, else what is no thought. A thought that was cut off is one
    to the end."""
    _, tag, answer = text.rpartition("<answer>")
    if tag:
        return answer.partition("</answer>")[0]
    return re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)


def require(ok: bool, record: Record, field: str, rule: str) -> None:
    """InputError unless ok: `field` of the record must be what the rule says."""
    if not ok:
        raise InputError(f"field {record.names.get(field, field)!r} must be {rule}, not {short(record.fields[field])}")
