"""One of ordered grades: text of an answer -> a grade -> how near it is. VRFT-Aug's multi-grade fuzzy reward (MFRS).

    {"image": "a.png", "task": "grade", "query": "how severe is the retinopathy?", "grades": 5, "label": 2}
    {"image": ..., "task": "grade", "query": ..., "grades": ["none", "mild", "severe"], "label": "mild"}

Partial credit for a near miss revives groups that exact reward leaves without spread; it also draws a policy in doubt
to the middle, so look at recall by grade (the confusion) beside MAE and kappa. The paper gives its reward at a distance
of 2 both as .0625 and as .1; which function it is, is assumed: --tasks grade:ordinal=....
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data import Record
from errors import InputError, short
from settings import Settings, setting
from tasks.label import ChoiceTask, denied, named_in, pattern_of, plain, read_options
from tasks.task import require

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?!\w)")
MOST = 1000  # grades


class Grade(NamedTuple):
    """A grade's target; rows of an evaluation hold it as [grade, [names]]."""

    grade: int  # 0 .. K - 1
    options: tuple[str, ...]  # K names; "0", "1" ... where there are none


@dataclass(frozen=True)
class Ordinal(Settings):
    """u of an answer that is d grades off, of K."""

    ordinal: str = setting(
        "power", "base^-d, a table, 1 - d / (K - 1), 1 / (1 + (c d)^2), or 1 if d = 0",
        "power", "table", "linear", "cauchy", "exact",
    )  # fmt: skip
    base: float = setting(4.0, "of power: 1, .25, .0625, the paper's as far as it is told", low=1.0, high=1e6)
    c: float = setting(1.5, "of cauchy", high=1e6)
    d1: float = setting(0.5, "of the table, at d = 1")
    d2: float = setting(0.1, "at d = 2, the paper's other figure")
    d3: float = setting(0.0, "at d = 3 and beyond")

    RISING = ("d3", "d2"), ("d2", "d1")

    def u(self, d: int, count: int) -> float:
        if d == 0:
            return 1.0
        if self.ordinal == "table":
            return (self.d1, self.d2, self.d3)[min(d, 3) - 1]
        if self.ordinal == "linear":
            return 1 - d / (count - 1)
        if self.ordinal == "cauchy":
            return 1 / (1 + (self.c * d) ** 2)
        return self.base**-d if self.ordinal == "power" else 0.0


class GradeTask(ChoiceTask):
    name = "grade"
    Settings = Ordinal
    settings = Ordinal()
    reasons = {
        "": "a grade",
        "no grade": "no grade is named",
        "out of range": "a number that is no grade",
        "several grades": "more than one grade is named: hedging is no answer",
        "denied": "the one that is named is named to be denied",
    }

    def read(self, record: Record) -> Grade:
        """ "grades": their count, or a list of names from the lowest on; "label": the index, or the name."""
        value = record["grades"]
        if isinstance(value, list):
            names = read_options(record, "grades", 2)
            for i, name in enumerate(names):  # a number in an answer is an index
                if NUMBER.fullmatch(plain(name)) and float(plain(name)) != i:
                    where = f"field '{record.names['grades']}[{i}]' is {short(name)}"
                    raise InputError(f"{where}, but a number in an answer is an index; write a word, as 'grade {name}'")
        else:
            rule = f"a count from 2 to {MOST}, or a list of names"
            require(type(value) is int and 2 <= value <= MOST, record, "grades", rule)
            names = tuple(str(i) for i in range(value))
        label = record["label"]
        if isinstance(label, str):
            known = [plain(name) for name in names]
            require(plain(label) in known, record, "label", f"one of the grades {', '.join(names)}")
            return Grade(known.index(plain(label)), names)
        require(type(label) is int and 0 <= label < len(names), record, "label", f"from 0 to {len(names) - 1}")
        return Grade(label, names)

    def phrase(self, query: str, target: Grade) -> str:
        names = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(target.options)]
        return f"{query}\nGrades: {', '.join(names)}."

    def judge(self, text: str, truth: int, options: Sequence[str]) -> tuple[int | None, str, float]:
        grade, reason = read_grade(text, tuple(options))
        return grade, reason, 0.0 if grade is None else self.settings.u(abs(grade - truth), len(options))

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """Those of labels; u; mae, in grades, and kappa, quadratic weighted, for which an answer that cannot be read is
        the grade farthest from the truth."""
        found, mean = super().metrics(rows), sum(row["u"] for row in rows) / len(rows)
        pairs = []
        for row in rows:
            truth, last = row["target"][0], len(row["target"][1]) - 1
            farthest = 0 if 2 * truth > last else last
            pairs.append((truth, farthest if row["reason"] else row["answer"]))
        mae = sum(abs(a - b) for a, b in pairs) / len(pairs)
        confusion = found.pop("confusion")
        found |= {"mae": round(mae, 6), "kappa": round(quadratic_kappa(pairs), 6), "u": round(mean, 6)}
        return found | {"confusion": confusion}

    def order(self, labels: set[str], rows: list[dict]) -> list[str]:
        return [str(grade) for grade in sorted(map(int, labels))]

    def summary(self, m: dict) -> str:
        return f"{super().summary(m)}  MAE {m['mae']:.3f}  kappa {m['kappa']:.3f}  u {m['u']:.3f}"


def read_grade(text: str, names: tuple[str, ...]) -> tuple[int | None, str]:
    """(grade, "") or (None, reason). By number, by name where there are names, or by both if they agree."""
    text, found, beyond = plain(text), {}, False  # found: grade -> whether it is denied
    if names != tuple(str(i) for i in range(len(names))):
        found = named_in(text, names)
        text = pattern_of(tuple(map(plain, names))).sub("/", text)  # a name's own digits are no number
    for number in NUMBER.finditer(text):
        value = float(number[0])
        if value in range(len(names)):
            found[int(value)] = found.get(int(value), False) or denied(text, number.start())
        else:
            beyond = True
    if len(found) != 1 or beyond:
        return None, "several grades" if found else "out of range" if beyond else "no grade"
    ((grade, no),) = found.items()
    return (None, "denied") if no else (grade, "")


def quadratic_kappa(pairs: list[tuple[int, int]]) -> float:
    """Cohen's, weighted by the squared distance; 0 where truths and answers are all one and the same grade."""
    n = len(pairs)
    observed = sum((a - b) ** 2 for a, b in pairs) / n
    truths, answers = zip(*pairs, strict=True)
    # Of independent draws, the mean of (a - b)^2 is E a^2 + E b^2 - 2 E a E b.
    expected = sum(a * a for a in truths) / n + sum(b * b for b in answers) / n
    expected -= 2 * (sum(truths) / n) * (sum(answers) / n)
    return 1 - observed / expected if expected else 0.0
