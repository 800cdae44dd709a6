"""Rewards of many datasets on one scale: MedGRPO's cross-dataset normalisation (arXiv 2512.06581).

    r' = 1 / (1 + exp(-k (r - p50) / (p75 - p25)))        per (dataset, task, reward): the median answer earns .5

The quartiles are those of the policy that training starts from (eval.py --write-norms), and stay as they are. Assumed,
since the paper does not say: a floor under p75 - p25; answers that cannot be read count as 0 when the quartiles are
taken, and earn exactly 0 afterwards; a reward that is 0 or 1 has no quartiles and is left as it is. Far above its
median r' saturates: at p50 + 3 IQR its slope is 4e-4 of that at the median. refresh takes the quartiles anew from the
policy as it becomes, which the paper does not.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ranks
import settings
from errors import InputError, named, one_line, read_object, short
from settings import Settings, setting

LEAST = 30  # answers from which quartiles are taken
MOST = 30.0  # the exponent's bound: exp(30) is 1e13, and beyond nothing is told apart any more
AT_ONCE = 2**24  # bytes read at a time
ASKED = ("prompt", "temperature", "max_tokens", "knowledge")  # flags that decide what the answers are
Key = tuple[str, str]  # (dataset, task)


@dataclass(frozen=True)
class Normalise(Settings):
    """What stands behind --normalise FILE:."""

    k: float = setting(3.0, "slope at the median, the paper's", low=0.01, high=100)
    min_iqr: float = setting(0.02, "floor of p75 - p25", low=1e-6, high=1)
    refresh: int = setting(
        0, "quartiles anew, of so many steps, every so many steps; 0: never, as the paper", high=10**6
    )
    model: str = setting("same", "any: the quartiles may be another policy's than --model", "same", "any")


@dataclass(frozen=True)
class Quartiles:
    """Of one reward's values in one (dataset, task)."""

    p25: float
    p50: float
    p75: float
    n: int  # answers
    invalid: float | None = None  # share of them that could not be read; None: not known, as of those of a refresh
    zero_one: bool = False  # all values are 0 or 1: not normalised

    @classmethod
    def of(cls, values: Iterable[float], invalid: float | None = None) -> "Quartiles":
        """numpy's percentiles, interpolation "linear"."""
        x = np.asarray(list(values), np.float64)
        p25, p50, p75 = (float(p) for p in np.percentile(x, (25, 50, 75), method="linear"))
        return cls(p25, p50, p75, len(x), invalid, bool(np.isin(x, (0, 1)).all()))


def logistic(x: Tensor, quartiles: Quartiles, k: float, min_iqr: float) -> Tensor:
    """Any shape -> float64, in (0, 1)."""
    z = k * (x.double() - quartiles.p50) / max(quartiles.p75 - quartiles.p25, min_iqr)
    return torch.sigmoid(z.clamp(-MOST, MOST))


class Norms:
    """The quartiles of a run: frozen, or with refresh taken anew every so many steps. Its state goes with checkpoints.

    name: the file's, for messages; that a resumed run has the same file is seen to by config.check_digests.
    """

    def __init__(
        self, table: dict[tuple[Key, str], Quartiles], chosen: Normalise, name: str, made_by: dict | None = None
    ):
        self.table, self.settings, self.name = table, chosen, name
        self.made_by = made_by or {}  # the settings that its answers were asked for with
        self.steps = 0  # since the quartiles were taken
        self.seen: dict[tuple[Key, str], list[float]] = {}  # values since then

    def check(self, places: list[tuple[Key, str]], run: dict[str, Any] | None = None) -> list[str]:
        """InputError unless there are quartiles for each (key, reward); -> what is to be said: of rewards that stay as
        they are, of quartiles that lie too close, and where the run's settings are others than those of the file's
        answers."""
        for key, term in places:
            if (key, term) not in self.table:
                missing = f"no quartiles of the reward {term!r} for dataset {key[0]!r}, task {key[1]!r}"
                datasets = short(sorted({dataset for (dataset, _), _ in self.table}))
                remedy = f"its datasets are {datasets}: write it anew by eval.py --write-norms on data that has it"
                raise InputError(f"--normalise {self.name}: has {missing}; {remedy}")
        found = {f"{'/'.join(key)}: {term}": self.table[key, term] for key, term in places}
        kept = [place for place, q in found.items() if q.zero_one]
        close = [place for place, q in found.items() if not q.zero_one and q.p75 - q.p25 < self.settings.min_iqr]
        greedy = ("temperature",) * (self.made_by.get("samples") == 0)
        asked = {name: self.made_by[name] for name in (run or {}).keys() & self.made_by.keys() if name not in greedy}
        other = [f"{name} {short(was)}, here {short(run[name])}" for name, was in asked.items() if was != run[name]]
        said = {
            "not normalised, since it was 0 or 1 throughout": kept,
            f"min_iqr {self.settings.min_iqr:g} stands for p75 - p25, which is smaller": close,
            f"warning: --normalise {self.name} is of answers under other settings": sorted(other),
        }
        return [f"{words}: {', '.join(places)}" for words, places in said.items() if places]

    def apply(self, term: str, values: Tensor, valid: Tensor, keys: list[Key]) -> Tensor:
        """values (N, G) of a reward, valid (N, G) bool, the groups' keys -> (N, G) fp32 in [0, 1]; those of a key that
        the reward is not paid for (check) stay as they are."""
        rows = []
        for own, key in zip(values, keys, strict=True):
            quartiles = self.table.get((key, term))
            stays = quartiles is None or quartiles.zero_one
            rows.append(own.float() if stays else self._row(own, quartiles))
        normalised = torch.stack(rows) if rows else values.float()
        return normalised.where(valid, 0.0)

    def _row(self, values: Tensor, quartiles: Quartiles) -> Tensor:
        return logistic(values, quartiles, self.settings.k, self.settings.min_iqr).float()

    def observe(self, keys: list[Key], parts: dict[str, Tensor]) -> None:
        """A step's rewards as they were before; with refresh they are the next quartiles', where they are enough."""
        if not self.settings.refresh:
            return
        for term, values in parts.items():
            for key, own in zip(keys, values.tolist(), strict=True):
                if (key, term) in self.table:  # also one that was 0 or 1 throughout: the next answers may be others
                    self.seen.setdefault((key, term), []).extend(x for x in own if math.isfinite(x))
        self.steps += 1
        if self.steps == self.settings.refresh:
            self.table |= {place: Quartiles.of(x) for place, x in self.seen.items() if len(x) >= LEAST}
            self.steps, self.seen = 0, {}

    def state_dict(self) -> dict[str, Any]:
        seen = [[*key, term, values] for (key, term), values in self.seen.items()]
        return {"steps": self.steps, "table": rows_of(self.table), "seen": seen}

    def load_state_dict(self, state: dict[str, Any], where: str) -> None:
        """InputError, which names `where`, if these are none that a run with this file could have saved."""
        with named(f"{where}: field 'norms'"):
            if not isinstance(state, dict) or state.keys() != {"steps", "table", "seen"}:
                raise InputError(f"must hold steps, table and seen, not {short(state)}")
            table, steps, seen = read_rows(state["table"]), state["steps"], state["seen"]
            if table.keys() != self.table.keys():
                raise InputError(f"its table is not of the rows of {self.name}; restore it")
            if not self.settings.refresh and table != self.table:
                raise InputError(f"its table is not that of {self.name}, and without refresh it stays; restore it")
            if type(steps) is not int or not 0 <= steps < max(self.settings.refresh, 1):
                raise InputError(f"steps must be from 0 to {self.settings.refresh} (refresh), not {short(steps)}")
            entries = isinstance(seen, list) and [
                isinstance(entry, list) and [type(part) for part in entry] == [str, str, str, list] for entry in seen
            ]
            if entries is False or not all(entries):
                raise InputError("seen must be a list of [dataset, task, reward, [value, ...]]")
            found = {((dataset, task), term): values for dataset, task, term, values in seen}
            if not found.keys() <= table.keys() or not all(is_number(x) for values in found.values() for x in values):
                raise InputError("seen must hold finite numbers of rows that are in the table")
            self.table, self.steps, self.seen = table, steps, found


# --------------------------------------------------------------------------------------------------------------- files


def rows_of(table: dict[tuple[Key, str], Quartiles]) -> list[dict]:
    return [{"dataset": key[0], "task": key[1], "reward": term} | asdict(q) for (key, term), q in table.items()]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # neither NaN nor what no difference can be taken of


def read_rows(rows: Any) -> dict[tuple[Key, str], Quartiles]:
    """What rows_of() writes. InputError names the row and the field."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"field 'table' must be a list of rows, not {short(rows)}")
    names, table = [f.name for f in fields(Quartiles)], {}
    for i, row in enumerate(rows, 1):
        with named(f"row {i} of 'table'"):
            if not isinstance(row, dict) or row.keys() != {"dataset", "task", "reward", *names}:
                raise InputError(f"must have the fields dataset, task, reward, {', '.join(names)}, not {short(row)}")
            if not all(isinstance(row[name], str) for name in ("dataset", "task", "reward")):
                raise InputError("dataset, task and reward must be texts")
            p25, p50, p75, n, invalid, zero_one = (row[name] for name in names)
            if not all(is_number(p) for p in (p25, p50, p75)) or not p25 <= p50 <= p75:
                raise InputError(f"p25, p50 and p75 must be rising finite numbers, not {short([p25, p50, p75])}")
            if type(n) is not int or n < LEAST:
                raise InputError(f"n must be at least {LEAST} answers, not {short(n)}; write it from more samples")
            known = invalid is None or (is_number(invalid) and 0 <= invalid <= 1)
            if not known or type(zero_one) is not bool:
                raise InputError("invalid must be from 0 to 1 or null, and zero_one true or false")
            place = (row["dataset"], row["task"]), row["reward"]
            if place in table:
                raise InputError(f"{'/'.join((*place[0], place[1]))} is there twice")
            table[place] = Quartiles(float(p25), float(p50), float(p75), n, invalid, zero_one)
    return table


def read_norms(text: str, model: str | None) -> Norms:
    """--normalise -> its Norms. model: fingerprint() of the policy that the run begins with; None: whatever it is."""
    file, chosen = settings.behind_file(text, "--normalise", Normalise)
    name, remedy = one_line(file), "write it by eval.py --write-norms"
    content = read_object(file, remedy)
    with named(name):
        table, made_by = read_rows(content.get("table")), content.get("made_by")
        if not isinstance(made_by, dict) or not isinstance(made_by.get("model"), str):
            raise InputError(f"field 'made_by' must say of which model it is; {remedy}")
        if chosen.model == "same" and model not in (None, made_by["model"]):
            raise InputError(
                f"its quartiles are those of another policy than --model; {remedy}, or say --normalise {name}:model=any"
            )
    return Norms(table, chosen, name, made_by)


def read_alike(text: str, folder: Path | None) -> Norms:
    """read_norms() on every rank, of its own copy of the policy in `folder` (None: not looked at, an estimate may have
    no weights). InputError on all where one cannot, or has another file: each computes all rewards, and they must be
    the same."""
    found: list[Norms] = []

    def read() -> list[dict]:
        found.append(read_norms(text, folder and fingerprint(folder)))
        return rows_of(found[0].table)

    first, *others = ranks.gather_objects(read)
    if any(table != first for table in others):
        raise InputError(f"--normalise {found[0].name}: is not the same file on all ranks; give them one")
    return found[0]


def fingerprint(folder: Path) -> str:
    """sha256 of a checkpoint's weights, by name and content of its files."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("model"):
            total.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as opened:
                for part in iter(lambda: opened.read(AT_ONCE), b""):
                    total.update(part)
    return total.hexdigest()


def write_norms(file: Path, table: dict[tuple[Key, str], Quartiles], made_by: dict) -> None:
    """The whole file or none."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps({"made_by": made_by, "table": rows_of(table)}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
