"""Several grades in one answer: surgical skill, the critical view of safety. MedGRPO's SA and CVS (arXiv 2512.06581).

    {"frames": [...], "fps": 1.0, "task": "skill", "query": "how skilled is it?",
     "label": {"Respect for tissue": 2, "Time and motion": 4, ...}}                                     1 to 5 each
    {"image": "a.png", "task": "cvs", "query": "is the critical view of safety reached?",
     "label": {"Two structures": 2, "Cystic plate": 1, "Hepatocystic triangle": 0}}                     0 to 2 each

An answer is "Respect for tissue: 2/5, Time and motion: 4/5, ...", or without /5 for cvs; in any order, but every aspect
once, and nothing else graded out of range: else it cannot be read. u is the mean over the aspects of tasks/grade.py's
ordinal reward.

The leaderboard scores a level that follows from all grades together, and forgives what cannot be read: level_paper is
its rule (skill: of any n/5 in the text, answers without one left out; cvs: an aspect that is not found counts 0, which
is often right), level the same with such answers wrong.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from data import Record
from errors import InputError, short
from prompts import Prompt
from tasks.grade import Ordinal
from tasks.label import plain
from tasks.task import Scores, Task, answer_text, require

THOUGHT = "I look at each aspect and grade it."
MOST = 20  # aspects


class Grades(NamedTuple):
    """A target; rows of an evaluation hold it as [[grade, ...], [aspect, ...]]."""

    grades: tuple[int, ...]
    aspects: tuple[str, ...]


class GradesTask(Task):
    """What both have in common. low, high: of a grade; of: what an answer may write behind it; levels: their bounds."""

    low: int
    high: int
    of = ""
    levels: tuple[tuple[float, str], ...]  # of total(grades): the largest that still is this level, from the lowest on
    unit = "u"
    field = "label"
    Settings = Ordinal
    settings = Ordinal()
    reasons = {
        "": "a grade for each aspect",
        "an aspect is missing": "not every aspect is graded",
        "an aspect twice": "an aspect has two grades: hedging is no answer",
        "out of range": "a number that is no grade",
    }
    questions = {
        "answer": "{query}",
        "think": "{query} First output the thinking process in <think> </think> tags and then output the final answer "
        "in <answer> </answer> tags.",
        "qwen": "{query}",
    }

    def total(self, grades: Sequence[int]) -> float:
        raise NotImplementedError

    def forgiving(self, text: str, aspects: Sequence[str]) -> list[int]:
        """The grades that the leaderboard reads, [] for an answer that it leaves out."""
        raise NotImplementedError

    def level(self, grades: Sequence[int]) -> str:
        total = self.total(grades)
        return next(name for most, name in self.levels if total <= most)

    def read(self, record: Record) -> Grades:
        """ "label": {aspect: grade}, in the order in which they are asked for."""
        value, name = record["label"], record.names.get("label", "label")
        require(isinstance(value, dict) and 0 < len(value) <= MOST, record, "label", f"1 to {MOST} {{aspect: grade}}")
        for aspect, grade in value.items():
            if not plain(aspect) or re.search(r"[\d:=]", aspect) or not aspect.isprintable():
                raise InputError(f"field {name!r}: aspect {short(aspect)} must be words without digits, : and =")
            if type(grade) is not int or not self.low <= grade <= self.high:
                where = f"field {name!r}: {short(aspect)}"
                raise InputError(f"{where} must be a whole number from {self.low} to {self.high}, not {short(grade)}")
        if len(set(map(plain, value))) < len(value):
            raise InputError(f"field {name!r} has an aspect twice (case and punctuation do not count)")
        return Grades(tuple(value.values()), tuple(value))

    def phrase(self, query: str, target: Grades) -> str:
        form = f"{target.aspects[0]}: GRADE{self.of}"
        return f"{query}\nAspects: {', '.join(target.aspects)}. Grades: {self.low} to {self.high}, written {form}."

    def answer(self, target: Grades, scale: tuple[float, float], style: str, query: str) -> str:
        said = ", ".join(f"{name}: {grade}{self.of}" for grade, name in zip(*target, strict=True))
        return f"<think> {THOUGHT} </think>\n<answer>{said}</answer>" if style == "think" else said

    def read_answer(self, text: str, aspects: tuple[str, ...]) -> tuple[list[int] | None, str]:
        """(grades in the order of the aspects, "") or (None, reason)."""
        found: dict[str, str] = {}
        for name, number, of in graded(aspects).findall(plain(answer_text(text))):
            if name in found:
                return None, "an aspect twice"
            if not re.fullmatch(r"\d{1,3}", number) or (of and f"/{of}" != self.of):
                return None, "out of range"
            found[name] = number
        if len(found) < len(aspects):
            return None, "an aspect is missing"
        grades = [int(found[plain(aspect)]) for aspect in aspects]
        fine = all(self.low <= grade <= self.high for grade in grades)
        return (grades, "") if fine else (None, "out of range")

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        read = [self.read_answer(text, tuple(p.target[1])) for text, p in zip(texts, prompts, strict=True)]
        u = []
        for (grades, _), prompt in zip(read, prompts, strict=True):
            off = [abs(a - b) for a, b in zip(grades, prompt.target[0], strict=True)] if grades else []
            u.append(fmean(self.settings.u(d, self.high - self.low + 1) for d in off) if off else 0.0)
        return Scores(
            u=torch.tensor(u, dtype=torch.float32),
            valid=torch.tensor([reason == "" for _, reason in read], dtype=torch.bool),
            reasons=[reason for _, reason in read],
            answers=[grades for grades, _ in read],
        )

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """aspect_accuracy, the share of grades that are right; mae, of a grade that cannot be read the largest there
        is; all_right, the share of answers without a wrong one; level and level_paper."""
        pairs = [(a, b) for row in rows for a, b in zip(row["answer"] or [None] * MOST, row["target"][0], strict=False)]
        widest = self.high - self.low
        levels, forgiven = [], []
        for row in rows:
            true = self.level(row["target"][0])
            levels.append(row["answer"] is not None and self.level(row["answer"]) == true)
            if said := self.forgiving(row["text"], row["target"][1]):
                forgiven.append(self.level(said) == true)
        found = {
            "aspect_accuracy": fmean(a == b for a, b in pairs),
            "mae": fmean(widest if a is None else abs(a - b) for a, b in pairs),
            "all_right": fmean(row["answer"] == list(row["target"][0]) for row in rows),
            "level": fmean(levels),
            "level_paper": fmean(forgiven) if forgiven else None,
        }
        found = {name: value if value is None else round(value, 6) for name, value in found.items()}
        return found | {"left_out_by_paper": len(rows) - len(forgiven)} | super().metrics(rows)

    def constant(self, train: list[tuple[tuple[int, int], Grades]]) -> Callable[[tuple[int, int], Any], str]:
        """The most frequent grade of each aspect."""
        counts: dict[str, Counter] = {}
        for _, target in train:
            for grade, aspect in zip(*target, strict=True):
                counts.setdefault(aspect, Counter())[grade] += 1
        most = Grades(tuple(c.most_common(1)[0][0] for c in counts.values()), tuple(counts))
        return lambda size, _: self.answer(most, (1.0, 1.0), "answer", "")


def graded(aspects: Sequence[str]) -> re.Pattern:
    """Finds (aspect, number, what it is out of) in plain text, of two aspects with one beginning the longer one."""
    names = "|".join(re.escape(plain(aspect)) for aspect in sorted(aspects, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])({names})[\"'*` ]*[:=][\"'*` ]*([-+]?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?")


class SkillTask(GradesTask):
    name = "skill"
    settings = Ordinal()
    low, high, of = 1, 5, "/5"
    levels = ((2.0, "novice"), (3.5, "intermediate"), (5.0, "expert"))

    def total(self, grades: Sequence[int]) -> float:
        return fmean(grades)

    def forgiving(self, text: str, aspects: Sequence[str]) -> list[int]:
        return [int(grade) for grade in re.findall(r"(?<!\d)([1-5])\s*/\s*5(?!\d)", text)]


class CvsTask(GradesTask):
    name = "cvs"
    settings = Ordinal()
    low, high = 0, 2
    levels = ((1, "poor"), (3, "fair"), (5, "good"), (float("inf"), "excellent"))

    def total(self, grades: Sequence[int]) -> float:
        return sum(grades)

    def forgiving(self, text: str, aspects: Sequence[str]) -> list[int]:
        found = {
            name: int(number) for name, number, _ in graded(aspects).findall(plain(text)) if number in ("0", "1", "2")
        }
        return [found.get(plain(aspect), 0) for aspect in aspects]
