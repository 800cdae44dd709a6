"""One of a closed list: text of an answer -> an option -> right or wrong. The task of VRFT-Aug (arXiv 2602.10619).

    {"image": "a.png", "task": "label", "query": "what lesion is this?", "options": ["nevus", "melanoma"],
     "label": "melanoma"}

Answers are read tolerantly (case, punctuation, JSON, a sentence around it), but exactly ONE option must be named, or
the answer cannot be read: hedging never pays. Nor does an option that is named to be denied ("not melanoma"); a denial
is known by the word right before the option, in English and Chinese, so "melanoma is unlikely" does name melanoma.
The question shows all options, and is a function of them alone.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from data import Record, check_text
from errors import InputError, short
from prompts import Prompt
from tasks.task import ANSWER, TRUTH, Scores, Task, answer_text, require

THOUGHT = "I look for what tells the options apart and name the one that fits."
EDGES = " \t\r\n.,;:!?\"'`*_()[]{}<>"  # around an answer, none of it
FIELDS = ("label", "answer", "grade")  # of a JSON object, what states the answer
HYPHENS = dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212), "-")  # as typography has them
# What right before an option denies it, with words in between as in "no sign of a melanoma".
DENIAL = re.compile(
    r"(?:\b(?:no|not|non|never|neither|nor|without|cannot|rather than|instead of|rule[sd]? out|excludes?)|n['’]t)"
    r"(?: (?:be|a|an|any|the|evidence|signs?|of|for))* \Z|(?:不|不是|并非|非|没有|无)\Z"
)
REACH = 60  # characters before an option in which it is looked for
MOST = 1000  # options


class Choice(NamedTuple):
    """A label's target; rows of an evaluation hold it as [label, [options]]."""

    label: str
    options: tuple[str, ...]


def plain(text: str) -> str:
    """As texts are compared: full-width letters as usual ones, small letters, one kind of hyphen, single blanks, bare
    at its edges."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(HYPHENS).casefold().split()).strip(EDGES)


def stated(text: str) -> str:
    """What an answer states: of a JSON object in it the values of FIELDS, else all that is no thought."""
    text = answer_text(text)
    try:
        # An object is a tuple here, so that a field that is given twice is hedging too.
        pairs = json.loads(re.sub(r"\A\s*```(?:json)?|```\s*\Z", "", text), object_pairs_hook=tuple)
        values = [value for key, value in pairs if key.casefold() in FIELDS] if isinstance(pairs, tuple) else []
        words = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    except (ValueError, RecursionError):
        return text
    return "; ".join(words) or text


@lru_cache(maxsize=4096)
def pattern_of(options: tuple[str, ...]) -> re.Pattern:
    """Finds plain options as whole words, the longest first. A hyphen is part of a word: non-malignant is not
    malignant. Scripts that are written without blanks have no words to be whole."""

    def whole(option: str) -> str:
        before, after = ("" if unicodedata.east_asian_width(c) in "WF" else r"[\w-]" for c in (option[0], option[-1]))
        return (f"(?<!{before})" if before else "") + re.escape(option) + (f"(?!{after})" if after else "")

    return re.compile("|".join(whole(option) for option in sorted(options, key=len, reverse=True)))


def named_in(text: str, options: tuple[str, ...]) -> dict[int, bool]:
    """Index of each option that a text names, in their order there -> whether it is denied there, once at least."""
    text, known, found = plain(text), tuple(plain(option) for option in options), {}
    for match in pattern_of(known).finditer(text):
        index = known.index(match[0])
        found[index] = found.get(index, False) or denied(text, match.start())
    return found


def denied(text: str, start: int) -> bool:
    return bool(DENIAL.search(text[max(0, start - REACH) : start]))


def read_option(text: str, options: tuple[str, ...]) -> tuple[int | None, str]:
    """(index, "") or (None, reason)."""
    found = named_in(text, options)
    if len(found) != 1:
        return None, "several options" if found else "no option"
    ((index, no),) = found.items()
    return (None, "denied") if no else (index, "")


def read_options(record: Record, field: str, least: int) -> tuple[str, ...]:
    """A record's list of texts that can be told apart when they are read in an answer."""
    values, name = record[field], record.names.get(field, field)
    require(isinstance(values, list) and least <= len(values) <= MOST, record, field, f"a list of {least} to {MOST}")
    options = tuple(check_text(value, f"{name}[{i}]") for i, value in enumerate(values))
    for i, option in enumerate(options):
        if not plain(option):
            raise InputError(f"field '{name}[{i}]' {short(option)} has no letter or digit; name it by a word")
        if any(c in option for c in "\r\n"):
            raise InputError(f"field '{name}[{i}]' {short(option)} must be one line")
    counts = Counter(map(plain, options))
    if len(counts) < len(options):
        twice = next(option for option in options if counts[plain(option)] > 1)
        raise InputError(f"field {name!r} holds {short(twice)} twice (case and punctuation do not count)")
    return options


class ChoiceTask(Task):
    """What label and grade have in common: one option out of a list, and how often which was taken for which."""

    field = "label"
    questions = {
        "answer": "{query}",
        "think": "{query} First output the thinking process in <think> </think> tags and then output the final answer "
        "in <answer> </answer> tags.",
        "qwen": "{query} Answer with the name alone.",
    }

    def answer(self, target: Any, scale: tuple[float, float], style: str, query: str) -> str:
        word = str(target[0])
        return f"<think> {THOUGHT} </think>\n<answer>{word}</answer>" if style == "think" else word

    def judge(self, text: str, truth: Any, options: Sequence[str]) -> tuple[Any, str, float]:
        """What an answer states -> (the option, or None; reason; u)."""
        raise NotImplementedError

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        told = [self.judge(stated(text), *prompt.target) for text, prompt in zip(texts, prompts, strict=True)]
        reasons, u = [reason for _, reason, _ in told], torch.tensor([u for *_, u in told], dtype=torch.float32)
        valid = torch.tensor([reason == "" for reason in reasons], dtype=torch.bool)
        return Scores(u, valid, reasons, [answer for answer, *_ in told])

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """accuracy; balanced_accuracy, the mean recall, and macro_f1, the mean F1, of the classes that occur; an answer
        that cannot be read is a class of its own, in the last column of the confusion."""
        base, n = super().metrics(rows), len(rows)
        pairs = [(str(row["target"][0]), None if row["reason"] else str(row["answer"])) for row in rows]
        truths, answers = Counter(truth for truth, _ in pairs), Counter(answer for _, answer in pairs)
        hits = Counter(truth for truth, answer in pairs if truth == answer)
        accuracy = sum(hits.values()) / n
        recalls = [hits[label] / count for label, count in truths.items()]
        f1 = [2 * hits[label] / (count + answers[label]) for label, count in truths.items()]
        labels = self.order(truths.keys() | (answers.keys() - {None}), rows)
        counted = Counter(pairs)
        return {
            "accuracy": round(accuracy, 6),
            "accuracy_standard_error": round(sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)), 6),
            "balanced_accuracy": round(sum(recalls) / len(recalls), 6),
            "macro_f1": round(sum(f1) / len(f1), 6),
            "n": n,
            "parse_failures": base["parse_failures"],
            "confusion": {
                "labels": labels,
                "rows": [[counted[truth, answer] for answer in (*labels, None)] for truth in labels],
            },
        }

    def order(self, labels: set[str], rows: list[dict]) -> list[str]:
        """As the records list them; of records that list them otherwise, as they come."""
        listed = dict.fromkeys(str(option) for row in rows for option in row["target"][1])
        return [option for option in listed if option in labels]

    def summary(self, m: dict) -> str:
        found = f"accuracy {m['accuracy']:.3f} +- {m['accuracy_standard_error']:.3f}"
        others = f"balanced {m['balanced_accuracy']:.3f}  macro-F1 {m['macro_f1']:.3f}"
        return f"{found}  {others}  n {m['n']}  cannot be read {m['parse_failures']}"

    def constant(self, train: list[tuple[tuple[int, int], Any]]) -> Callable[[tuple[int, int], Any], str]:
        """The most frequent of the training labels, the first of several."""
        word = Counter(str(target[0]) for _, target in train).most_common(1)[0][0]
        return lambda size, _: word

    def draw(self, image: Image.Image, scale: float, target: Any, answers: list[Any]) -> None:
        canvas, y = ImageDraw.Draw(image), 2
        truth = None if target is None else str(target[0])
        told = Counter(str(answer) for answer in answers if answer is not None)
        lines = [(truth, TRUTH)] * (truth is not None)
        lines += [
            (word if len(answers) == 1 else f"{count} x {word}", TRUTH if word == truth else ANSWER)
            for word, count in told.most_common()
        ]
        for words, colour in lines:
            box = canvas.textbbox((3, y), words)
            canvas.rectangle((box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1), fill=(0, 0, 0))
            canvas.text((3, y), words, fill=colour)
            y += 13


class LabelTask(ChoiceTask):
    name = "label"
    unit = "correct"
    reasons = {
        "": "an option",
        "no option": "none of the options is named",
        "several options": "more than one option is named: hedging is no answer",
        "denied": "the one that is named is named to be denied",
    }

    def read(self, record: Record) -> Choice:
        """ "options": a list of texts, "label": one of them."""
        options, label = read_options(record, "options", 2), record.text("label")
        known = {plain(option): option for option in options}
        require(plain(label) in known, record, "label", f"one of the options {short(list(options))}")
        return Choice(known[plain(label)], options)

    def phrase(self, query: str, target: Choice) -> str:
        return f"{query}\nOptions: {', '.join(target.options)}."

    def judge(self, text: str, truth: str, options: Sequence[str]) -> tuple[str | None, str, float]:
        index, reason = read_option(text, tuple(options))
        answer = None if index is None else options[index]
        return answer, reason, float(answer == truth)
