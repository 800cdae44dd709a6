"""Tables as other people write them: CSV, with commas, semicolons or tabs, a byte order mark, CRLF, quotes.

The first line names the columns. A line that cannot be read is a fault of its own, and the others are read.
"""

import csv
import io
from pathlib import Path

from errors import InputError, cause_of, one_line, read_text
from prepare.common import Report, short

DELIMITERS = ",;\t|"
FORM = {"skipinitialspace": True, "strict": True}  # strict: a quote that nobody closes is a fault, not a long field


def rows(path: Path, needed: list[str], report: Report, delimiter: str = "") -> list[tuple[str, dict[str, str]]]:
    """(file and line, column -> text without blanks around it) of each line but the first.

    needed: columns that must be there. delimiter: "" for the one that parts the first line so that they are.
    """
    text = read_text(path)
    columns, delimiter = header(path, text, needed, delimiter)
    reader, found = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **FORM), []
    next(reader)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:  # of this row: the reader goes on behind it
            where = f"{path}:{start}"
            report.bad.add(where, InputError(f"{where}: cannot be read ({cause_of(error)}); correct the line"))
            continue
        where = f"{path}:{start}"
        if len(row) == len(columns):
            found.append((where, dict(zip(columns, map(str.strip, row), strict=True))))
        elif any(field.strip() for field in row):
            told = f"has {len(row)} fields, the first line names {len(columns)} columns"
            report.bad.add(where, InputError(f"{where}: {told}; correct the line"))


def header(path: Path, text: str, needed: list[str], delimiter: str) -> tuple[list[str], str]:
    """The names of the columns, and what parts them."""
    best, fewest, problem = ([], ","), len(needed) + 1, ""
    for mark in delimiter or DELIMITERS:
        try:
            columns = [
                name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=mark, **FORM), [])
            ]
        except csv.Error as error:
            problem = problem or f"{path}:1: cannot be read ({cause_of(error)}); restore it"
            continue
        lacking = len(set(needed) - set(columns))
        if (lacking, -len(columns)) < (fewest, -len(best[0])):
            best, fewest = (columns, mark), lacking
    columns, mark = best
    if not columns and problem:
        raise InputError(problem)
    if missing := sorted(set(needed) - set(columns)):
        raise InputError(f"{path}:1: column {missing[0]!r:.90} is missing; it has {one_line(short(columns))}")
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise InputError(f"{path}:1: column {twice[0]!r:.90} stands there twice; rename one")
    return columns, mark
