"""Records -> the same records, asked for in other words.

    python -m prepare.queries train.jsonl phrases.json --out train-phrases.jsonl
    python -m prepare.queries val.jsonl phrases.json --out val-phrases.jsonl --first

phrases.json: the query of a record, such as its class -> the phrase to ask with, or a list of several, of which --seed
and the record's place in its file choose one, once for all. For evaluation take the --first: every policy is then asked
the same. Everything else in a record stays, and so does what its paths mean, wherever --out lies.
"""

import copy
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

import errors
from data import BadRecords, check_text, load_jsonl
from errors import InputError, named, one_line, read_object, short
from images import Sample
from prepare import common
from tasks import TASKS
from tasks.task import Task

REMEDY = 'write {"query of the records": "phrase to ask with", ...}'


def read_queries(path: Path) -> dict[str, list[str]]:
    """A JSON object: query of a record -> the phrases to ask with instead, one or a list of them."""
    table = read_object(path, REMEDY)
    with named(one_line(path)):
        phrases = {query: value if isinstance(value, list) else [value] for query, value in table.items()}
        if empty := [query for query, some in phrases.items() if not some]:
            raise InputError(f"field {short(empty[0])} has no phrase; {REMEDY}")
        return {query: [check_text(phrase, query) for phrase in some] for query, some in phrases.items()}


def bare(task: Task) -> Task:
    """A task whose samples have their record's query alone, without what it lets them choose from."""
    task = copy.copy(task)
    task.phrase = lambda query, target: query
    return task


def choose(phrases: list[str], seed: int | None, index: int) -> str:
    """The phrase of record number `index`, from 0; seed None: the first."""
    luck = 0 if seed is None else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    return phrases[luck % len(phrases)]


def asked(record: dict, sample: Sample, phrase: str) -> dict:
    """The record with another phrase where it holds its query; the name of its file no longer says its dataset."""
    if sample.query_field == "conversations[0].value":
        question, answer = record["conversations"]
        return record | {"conversations": [question | {"value": phrase}, answer], "dataset": sample.dataset}
    return record | {sample.query_field: phrase, "dataset": sample.dataset}


def rewrite(path: Path, out: Path, table: Path, seed: int | None, bad: BadRecords, outside: bool) -> list[dict]:
    """The records of path as out is to have them; those that cannot be used, or have no phrase, go to bad."""
    phrases, name, records = read_queries(table), repr(str(path))[1:-1], []
    # Boxes over the picture's edge stay as they are: whether to cut them is for the one to say who trains.
    tasks = {name: bare(task) for name, task in TASKS.items()}
    samples = {s.source: s for s in load_jsonl(path, tasks, bad, outside=outside, clip=True)}
    if next(iter(samples)).startswith(f"{name} record "):
        raise InputError(f"{name}: is a JSON list; write one JSON object per line, or let prepare.vlm_r1 do it")
    here, there = (Path(os.path.realpath(file.parent)) for file in (path, out))
    index = -1
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            index += bool(line.strip())
            if not (sample := samples.get(f"{name}:{number}")):
                continue
            if sample.query not in phrases:
                field = f"field {sample.query_field!r} {short(sample.query)}"
                why = f"{sample.source}: {field} is not in {one_line(table)}; add it there"
                bad.add(sample.source, InputError(why))
                continue
            record = asked(json.loads(line.decode("utf-8-sig")), sample, choose(phrases[sample.query], seed, index))
            if here != there:
                record["image"] = Path(os.path.relpath(here / record["image"], there)).as_posix()
            records.append(record)
    if not records:
        raise InputError(f"{one_line(table)}: holds none of the queries of {len(samples)} records")
    return records


def main(argv: list[str] | None = None) -> None:
    parser = errors.Parser(prog="-m prepare.queries", description=__doc__, formatter_class=common.RAW)
    flag = parser.add_argument
    flag("records", type=Path, metavar="RECORDS.jsonl", help="a file of records, ours or VLM-R1's lines")
    flag("queries", type=Path, metavar="QUERIES.json", help="query of a record -> the phrase to ask with, or several")
    flag("--out", type=Path, required=True, metavar="NEW.jsonl", help="the file to write")
    flag("--seed", type=int, default=0, help="chooses among several phrases")
    flag("--first", action="store_true", help="the first of several phrases, always: for evaluation")
    flag("--skip-bad", type=int, default=0, help="records that may be unusable; they are left out and listed")
    flag("--allow-outside", action="store_true", help="records may name pictures outside the folder of their file")
    flag("--overwrite", action="store_true", help="replace --out if it is there")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must not be negative")
    with common.printable():
        common.free(args.out, args.overwrite)
        bad, seed = BadRecords(args.skip_bad), None if args.first else args.seed
        records = rewrite(args.records, args.out, args.queries, seed, bad, args.allow_outside)
        common.write({args.out: records}, clip=True)
    for sentence in bad.sentences.values():
        tqdm.write(common.plain(f"left out: {sentence}"))
    tqdm.write(common.plain(f"{args.out}: {len(records)} records"))
    if any(Path(record["image"]).is_absolute() or ".." in Path(record["image"]).parts for record in records):
        tqdm.write(common.plain(f"image paths lead out of {args.out.parent}: train with --allow-outside"))


if __name__ == "__main__":
    errors.run(main)
