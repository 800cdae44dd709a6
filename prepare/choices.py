"""Pictures that have a class as a whole -> records of the tasks label and grade, in labels-train.jsonl ...

A reader names one Entry per picture, whose label is the class as the source writes it. settle() turns that into a word
of --names, and sees that it is one of --options or --grades. record_of() makes the record. The files have names of
their own, so that they can lie beside the train.jsonl of boxes in the same pictures.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import errors
from data import check_text
from errors import InputError, named, one_line, read_json, read_object
from prepare import common
from prepare.common import Entry, Report, short
from tasks.label import plain

KIND = "labels-"  # what the names of the files begin with
ASK = {"label": "what does the picture show?", "grade": "which grade does the picture show?"}
NAMES = 'write {"what the source calls a class": "what records call it", ...}, null to leave the class out'


def question(text: str) -> str:
    if not text.strip() or re.search(r"[{}]", text) or text.endswith(".json"):
        raise argparse.ArgumentTypeError("must be one question for all pictures: {class} would tell the answer")
    return text


def flags(parser: errors.Parser, query: str = "--query") -> None:
    """What label records need; query: the name of the flag that asks."""
    flag = parser.add_argument
    flag(query, dest="question", type=question, help=f"what is asked of every picture; default: {ASK['label']!r}")
    flag("--names", help='a JSON file: class of the source -> its word, as in {"mel": "melanoma"}; null leaves it out')
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--options", help="the words to choose from, in their order: a,b,c or a JSON list in a file")
    answers.add_argument("--grades", help="classes have an order: how many, 0 first; or their names: none,mild,severe")


def listed(text: str, flag: str) -> list[str]:
    """The words of a flag: parted by commas, or of a JSON file."""
    words = read_json(text) if text.endswith(".json") else text.split(",")
    place = f"{flag} {one_line(text)}"
    with named(place):
        if not isinstance(words, list):
            raise InputError(f"must hold a list of texts, not {short(words)}")
        return [check_class(word, f"word {i}") for i, word in enumerate(words, 1)]


def check_class(value: Any, what: str) -> str:
    """A class as a record can hold it, and as one line of a question can list it."""
    text = check_text(value, what)
    if not text.isprintable() or not plain(text) or len(text) > 200:
        raise InputError(f"{what} {short(text)} must be a word, or some on one line, of at most 200 characters")
    return text


def check_different(words: list[str], where: str) -> None:
    """Answers are read without regard to case and punctuation, so classes must differ in more."""
    if len(words) < 2:
        raise InputError(
            f"{where}: {'one class alone' if words else 'no class'} ({short(words)}), but a choice needs two"
        )
    seen = {}
    for word in words:
        if (key := plain(word)) in seen:
            raise InputError(
                f"{where}: classes {seen[key]!r:.90} and {word!r:.90} are one when read; join them by --names"
            )
        seen[key] = word


def renamed(entries: list[Entry], order: Sequence[str], path: str, report: Report) -> tuple[list[Entry], list[str]]:
    """The entries, and the classes in order, under the names that a file gives to them."""
    table = read_object(path, NAMES)
    with named(one_line(path)):
        words = {code: word if word is None else check_class(word, code) for code, word in table.items()}
    found = []
    for entry in entries:
        if entry.label not in words:
            told = f"class {entry.label!r:.90} is not in {one_line(path)}; add it there, null leaves it out"
            report.bad.add(entry.source, InputError(f"{entry.source}: {told}"))
        elif words[entry.label] is None:
            report.note(f"left out, --names has null for class '{one_line(entry.label)}'", entry.source)
        else:
            found.append(replace(entry, label=words[entry.label]))
    return found, [word for word in dict.fromkeys(words.get(code) for code in order) if word]


def grade_of(label: str, names: list[str]) -> int | None:
    """The number of a grade: its name's place, or a number that is written out."""
    if label in names:
        return names.index(label)
    number = re.fullmatch(r"(\d{1,3})(\.0*)?", label)  # 2.0: a table that had empty fields once
    return int(number[1]) if number and int(number[1]) < len(names) else None


def natural(word: str) -> list:
    """Sorts 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", word) if part]


def settle(entries: list[Entry], args, report: Report, order: Sequence[str] = ()) -> list[Entry]:
    """The entries that have an answer; args.answers becomes all answers, in order.

    order: all classes of the source in its own order, where it has one; else those that are found are sorted.
    """
    if args.names:
        entries, order = renamed(entries, order, args.names, report)
    args.answers = answers_of(entries, args, order)
    found = []
    for entry in entries:
        if answer_of(entry, args) is None:
            flag = f"--grades {one_line(args.grades)}" if args.grades else f"--options {one_line(args.options)}"
            told = f"class {entry.label!r:.90} is none of {flag}; correct it, or map it by --names"
            report.bad.add(entry.source, InputError(f"{entry.source}: {told}"))
        else:
            found.append(entry)
    answers = {entry.image: answer_of(entry, args) for entry in found}
    for files in common.equal_files(answers):
        if len({answers[file] for file in files}) > 1:
            report.note("equal files of different classes", " and ".join(map(str, files[:2])))
    return found


def answers_of(entries: list[Entry], args, order: Sequence[str]) -> list[str]:
    """The classes, or the names of the grades ("0", "1", ... of a number of them), in order."""
    if args.grades:
        number = re.fullmatch(r" *(\d{1,3}) *", args.grades)
        words = list(map(str, range(int(number[1])))) if number else listed(args.grades, "--grades")
        if numbers := [word for word in words if not number and re.fullmatch(r"[\d.]+", word)]:
            told = "is a number, as every grade has one, from 0 on; give words, such as 'stage 1'"
            raise InputError(f"--grades: the name {numbers[0]!r:.90} {told}")
        check_different(words, f"--grades {one_line(args.grades)}")
    elif args.options:
        check_different(words := listed(args.options, "--options"), f"--options {one_line(args.options)}")
    else:
        for entry in entries:
            with named(entry.source):
                check_class(entry.label, "class")
        words = list(order) or sorted({entry.label for entry in entries}, key=natural)
        check_different(words, str(args.source))
    return words


def answer_of(entry: Entry, args) -> int | str | None:
    """What the record says: a grade as its number, else the class; None if it is none of the answers."""
    if args.grades:
        return grade_of(entry.label, args.answers)
    return entry.label if entry.label in args.answers else None


def record_of(image: Path, entries: list[Entry], phrase, args, report: Report) -> list[tuple[str, dict]]:
    """(file, record) of one picture. InputError if it cannot be read, or if its entries do not agree."""
    size, _ = common.opened(image, entries[0].source)
    first = entries[0]
    for entry in entries:
        for what in ("label", "group"):
            if (one := getattr(entry, what)) != (other := getattr(first, what)):
                told = f"{what} {one!r:.90}, but {first.source} has {other!r:.90} for the same picture"
                raise InputError(f"{entry.source}: {told}; correct one")
    task = "grade" if args.grades else "label"
    answers = {"options": args.answers}
    if args.grades:  # names, or how many
        answers = {"grades": len(args.answers) if args.answers[0] == "0" else args.answers}
    asked = {"task": task, "query": args.question or ASK[task], **answers, "label": answer_of(first, args)}
    record = common.start_of(image, size, args.out) | asked | {"dataset": args.dataset}
    splits = [entry.split for entry in entries]
    for i, entry in enumerate(entries):
        if entry.split in splits[:i]:
            report.note("left out, the same record again", entry.source)
    return [(KIND + split, record) for split in dict.fromkeys(splits)]
