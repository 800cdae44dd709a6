"""The part of YAML that a YOLO data.yaml is written in; anything else is refused, not guessed.

    train: ../train/images     # a text, plain or quoted; a comment
    names: ['RBC', "WBC"]      # a list of texts, also over several lines
    names:                     # the same as a block: `- RBC`, or `0: RBC` for class numbers
      0: RBC

Left out, and refused under a key that matters: nesting, anchors, tags, multi-line texts, escapes.
"""

import re
from pathlib import Path

from errors import InputError, named, one_line, read_text

KEYS = ("path", "train", "val", "valid", "test", "nc", "names")  # all that matters; other keys are stepped over
QUOTED = r"""(?:'(?:[^']|'')*'|"[^"\\]*")"""
ITEM = re.compile(rf"\s*((?:\d+\s*:\s*)?(?:{QUOTED}|[^,'\"][^,]*))\s*(?:,|$)")  # of [..] or {..}


def read_yaml(path: Path) -> dict[str, str | list[str] | dict[int, str]]:
    """The KEYS that the file has, with their values."""
    found, lines = {}, None  # lines: those of the key that was read last
    for number, line in enumerate(map(uncomment, read_text(path).splitlines()), 1):
        if not line or line in ("---", "..."):
            continue
        if line[0] in " \t-]}" and lines:
            lines.append(line)
            continue
        key, colon, rest = line.partition(":")
        if not colon or line[0] in " \t-]}" or (rest and not rest[0].isspace()):
            raise InputError(f"{one_line(path)}:{number}: {line!r:.80} is not `key: value`")
        lines = found[key.strip("'\" ")] = [rest]
    values = {}
    for key in (key for key in KEYS if key in found):
        with named(f"{one_line(path)}: {key}"):
            values[key] = value(found[key])
    return values


def uncomment(line: str) -> str:
    """The line up to its comment: a # that begins a word, outside quotes."""
    quote, before = "", " "
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and before in " \t[{,:":
            quote = c
        elif c == "#" and before in " \t":
            return line[:i].rstrip()
        before = c
    return line.rstrip()


def value(lines: list[str]) -> str | list[str] | dict[int, str]:
    """What stands behind a key, on its line and the lines below it."""
    text, block = " ".join(lines).strip(), [line.strip() for line in lines[1:]]
    if text[:1] + text[-1:] == "[]":
        return [scalar(item) for item in items(text[1:-1])]
    if text[:1] + text[-1:] == "{}":
        return numbered(items(text[1:-1]))
    if lines[0].strip() or not block:
        return scalar(text) if text else ""
    return [scalar(line[2:]) for line in dashed(block)] if block[0].startswith("-") else numbered(block)


def dashed(block: list[str]) -> list[str]:
    if odd := [line for line in block if not line.startswith("- ")]:
        raise InputError(f"{odd[0]!r:.80} is no item of a list, which begins with a dash and a space")
    return block


def numbered(texts: list[str]) -> dict[int, str]:
    """The texts `number: name` as a dictionary."""
    names = {}
    for text in texts:
        key, colon, name = text.partition(":")
        if not colon or not re.fullmatch("[0-9]{1,9}", key.strip()) or int(key) in names:
            raise InputError(f"{text.strip()!r:.80} is not a new class number, a colon and a name")
        names[int(key)] = scalar(name)
    return names


def items(text: str) -> list[str]:
    """What stands between the commas of [..] or {..}; one comma more at the end is allowed."""
    found, at = [], 0
    while text[at:].strip():
        match = ITEM.match(text, at)
        if not match:
            raise InputError(f"{text[at:].strip()!r:.80} is YAML that is not understood here; write it plainly")
        found.append(match[1])
        at = match.end()
    return found


def scalar(text: str) -> str:
    """A quoted or a plain text."""
    text = text.strip()
    if re.fullmatch(QUOTED, text):
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    if not text or text[0] in "'\"[]{}&*!|>%@`,?" or ": " in text:
        raise InputError(f"{text!r:.80} is YAML that is not understood here; write it plainly")
    return text
