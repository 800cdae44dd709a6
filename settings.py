"""Settings that stand beside what they set, and are written behind its name: `medloc:window=60,refresh=full`.

    @dataclass(frozen=True)
    class MedLoc(Settings):
        window: int = setting(30, "N, what decisions look back on", low=1, high=10**5)

    name, settings = read("medloc:window=60", "--schedule", {"medloc": MedLoc})

The default's type is the value's: a number, a word out of choices or any, on or off, or a table, rows of numbers
0:.8:.2/.6:.75:.35. Nonsense is an InputError, wherever it comes from.
"""

from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from typing import Any

from errors import InputError, short


def setting(default: Any, why: str, *choices: str, low: float = 0.0, high: float = 1.0) -> Any:
    """A field with its default and the reason for it; `choices` of a word, or the least and the largest number."""
    return field(default=default, metadata={"why": why, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Base: every field is a setting(). RISING: pairs of fields of which the second must not be below the first."""

    RISING = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            low, high = meta["low"], meta["high"]
            if meta["choices"]:
                require(value in meta["choices"], f.name, f"one of {', '.join(meta['choices'])}", value)
            elif isinstance(f.default, tuple):
                shape = len(f.default), len(f.default[0])
                rows = isinstance(value, tuple) and [len(row) == shape[1] and fits(row, low, high) for row in value]
                fine = (
                    bool(rows)
                    and all(rows)
                    and len(rows) == shape[0]
                    and list(value) == sorted(value, key=lambda row: row[0])
                )
                fine = fine and value[0][0] == f.default[0][0]
                rule = f"{shape[0]} rising rows of {shape[1]} numbers from {low:g} to {high:g}, as {written(f.default)}"
                require(fine, f.name, rule, value)
            elif isinstance(f.default, bool):
                require(isinstance(value, bool), f.name, "on or off", value)
            elif isinstance(f.default, str):
                require(isinstance(value, str), f.name, "a text", value)
            else:
                whole = isinstance(f.default, int)
                fine = type(value) in ((int,) if whole else (int, float)) and fits([value], low, high)
                require(fine, f.name, f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}", value)
        for name, other in self.RISING:
            bound = getattr(self, other)
            require(getattr(self, name) <= bound, name, f"at most {other}, {bound}", getattr(self, name))


def fits(numbers: Any, low: float, high: float) -> bool:
    return all(type(x) in (int, float) and isfinite(x) and low <= x <= high for x in numbers)


def require(ok: bool, name: str, rule: str, value: Any) -> None:
    if not ok:
        raise InputError(f"{name} must be {rule}, not {short(value)}")


def read(text: str, flag: str, kinds: dict[str, type[Settings]]) -> tuple[str, Settings]:
    """ "name:key=value,key=value" -> (name, its settings). InputError, which begins with the flag, for all else."""
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise InputError(f"{flag}: there is no {short(name)}; there are {', '.join(kinds)}")
    known = {f.name: f.default for f in fields(kinds[name]) if f.default is not MISSING}
    values = {}
    for part in rest.split(",") if rest else []:
        key, sign, value = part.strip().partition("=")
        if key not in known or not sign:
            there = f"it has {', '.join(known)}" if known else "it has no settings"
            raise InputError(f"{flag} {name}: {short(part)} is none of its settings; {there}")
        if key in values:
            raise InputError(f"{flag} {name}: {key} is given twice")
        values[key] = value_of(value, known[key])
    try:
        return name, kinds[name](**values)
    except InputError as error:
        raise InputError(f"{flag} {name}: {error}") from None


def behind_file(text: str, flag: str, kind: type[Settings]) -> tuple[str, Settings]:
    """ "FILE:key=value" -> (FILE, the settings behind it). InputError as read()'s."""
    file, _, rest = text.partition(":")
    return file, read(f"FILE:{rest}", flag, {"FILE": kind})[1]


def value_of(text: str, default: Any) -> Any:
    """The text as the default's type, or as it is, which Settings will refuse."""
    try:
        if isinstance(default, bool):
            return {"on": True, "off": False}.get(text, text)
        if isinstance(default, tuple):
            return tuple(tuple(float(number) for number in row.split(":")) for row in text.split("/"))
        return type(default)(text)
    except ValueError:
        return text


def written(value: Any) -> str:
    """A value as read() reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "/".join(":".join(f"{number:g}" for number in row) for row in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def explained(kinds: dict[str, type[Settings]]) -> str:
    """Every name with its settings, their defaults and the reasons for them."""
    lines = []
    for name, kind in kinds.items():
        lines.append(name)
        for f in fields(kind):
            choices = f" [{', '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
            lines.append(f"  {f.name}={written(f.default)}  {f.metadata['why']}{choices}")
    return "\n".join(lines)
