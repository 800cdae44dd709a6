"""Prior knowledge in the prompt: a line for every option, in words (VRFT-Aug's PA_p, arXiv 2602.10619).

    --knowledge FILE.json[:at=before,used=train,lines=shuffled]        {dataset or "*": {option: sentence}}
    --knowledge records                                                each record's own "knowledge": {option: sentence}

The block tells of ALL options, in their order, so it is a function of what is asked and never of the answer. Tasks
without options have none. Assumed, since the paper's text is not known: the block stands behind question and options,
and is there in training and in evaluation; used=train asks whether it went into the weights, lines=shuffled whether it
is read at all: no option has its own line, and whose it has is dealt anew for every record, so that no fixed code can
be learned. What remains to be read is which option it is NOT: of two options that is the answer, so shuffle more.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import settings
from data import check_text
from errors import InputError, named, one_line, read_object, short
from images import Sample
from settings import Settings, setting

RECORDS = "records"  # in the place of a file


@dataclass(frozen=True)
class Shown(Settings):
    """What stands behind --knowledge FILE:."""

    at: str = setting("after", "where the block stands: behind question and options, or in front", "after", "before")
    used: str = setting("both", "in training and evaluation, or in training alone", "both", "train")
    lines: str = setting("true", "shuffled: every option has another one's, the control", "true", "shuffled")


class Knowledge:
    """What --knowledge says. attach() gives it to samples; complete(), once all have theirs, says what reached none."""

    def __init__(self, text: str):
        name, self.shown = settings.behind_file(text, "--knowledge", Shown)
        self.name = one_line(name)
        self.used: dict[str, set[str]] = {}  # part of the file -> options that have been given their line
        self.table: dict[str, dict[str, str]] | None = None
        if name != RECORDS:
            if not name.endswith(".json"):
                raise InputError(f"--knowledge {self.name}: name a .json file, or say {RECORDS}")
            self.table = read_table(Path(name))

    def attach(self, samples: list[Sample]) -> list[Sample]:
        """The samples with their blocks, in Sample.knowledge and around the query. InputError where an option has no
        line, or a record's own line no option."""
        found, blocks = [], {}
        for sample in samples:
            options = getattr(sample.target, "options", None)
            if options is None:
                found.append(sample)
                continue
            section, lines = self.lines_of(sample)
            record = sample.source.rpartition("/")[2] if self.shown.lines == "shuffled" else None  # in whatever folder
            asked = section, options, record
            if self.table is None or asked not in blocks:  # thousands of records ask the same
                with named(sample.source), named(f"--knowledge {self.name}"):
                    blocks[asked] = block(lines, options, section, record)
            if self.table is None and (idle := lines.keys() - options):
                raise InputError(f"{sample.source}: {section}: {short(min(idle))} is none of the record's options")
            self.used.setdefault(section, set()).update(options)
            told = blocks[asked]
            around = (told, sample.query) if self.shown.at == "before" else (sample.query, told)
            found.append(replace(sample, query="\n".join(around), knowledge=told))
        return found

    def complete(self) -> None:
        """InputError if no sample, of training or evaluation, had options, or a line of the file was no one's option: a
        slip in its name would go unnoticed. Parts of the file for other datasets than these stay unread."""
        if not self.used:
            raise InputError(f"--knowledge {self.name} reaches no record: none has options; drop it")
        for section, options in self.used.items() if self.table else ():
            if idle := self.table[section].keys() - options:
                raise InputError(f"--knowledge {self.name}: {section}: {short(min(idle))} is no option of any record")

    def lines_of(self, sample: Sample) -> tuple[str, Mapping[str, str]]:
        """(the part of the file, or where else they are from; option -> line)."""
        if self.table is None:
            lines = sample.extra.get("knowledge")
            with named(sample.source):
                if lines is None:
                    raise InputError(f"has no field 'knowledge', as --knowledge {RECORDS} wants: write one")
                return "field 'knowledge'", check_lines(lines, "field 'knowledge'")
        section = sample.dataset if sample.dataset in self.table else "*"
        if section not in self.table:
            raise InputError(
                f'--knowledge {self.name}: has nothing for dataset {sample.dataset!r}, and no "*" for all others'
            )
        return section, self.table[section]


def read_table(file: Path) -> dict[str, dict[str, str]]:
    content = read_object(file, 'write {dataset or "*": {option: sentence}}')
    if not content:
        raise InputError(f'{one_line(file)}: is empty; write {{dataset or "*": {{option: sentence}}}}')
    return {dataset: check_lines(lines, f"{one_line(file)}: {short(dataset)}") for dataset, lines in content.items()}


def check_lines(lines: Any, where: str) -> dict[str, str]:
    if not isinstance(lines, dict) or not lines:
        raise InputError(f"{where}: must be an object {{option: sentence}}, not {short(lines)}")
    with named(where):
        found = {option: check_text(line, option) for option, line in lines.items()}
        if broken := [option for option, line in found.items() if any(c in line for c in "\r\n")]:
            raise InputError(f"{short(broken[0])} must be one line")
    return found


def block(lines: Mapping[str, str], options: tuple[str, ...], section: str, record: str | None) -> str:
    """ "Knowledge:" and a line for each option. With the name of a record every option has another one's line: that of
    the next one in a ring, which the name alone orders, the same in every process and for every label. All others are
    equally likely; two options have only this one way."""
    if missing := [option for option in options if option not in lines]:
        raise InputError(f"{section}: has no line for the option {short(missing[0])}; write one for each")
    whose = dict(zip(options, options, strict=True))
    if record is not None:
        ring = sorted(options, key=lambda option: hashlib.sha256(f"{record}/{option}".encode()).digest())
        whose = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return "\n".join(["Knowledge:", *(f"{option}: {lines[whose[option]]}" for option in options)])
