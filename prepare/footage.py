"""What the scripts for clips share: records of the tasks span and tube in span-train.jsonl, tube-train.jsonl ...

A script's read() makes a Take of each record, media as paths; convert() parts them into splits, has the loader that
training uses read every one, leaves out what it refuses (--skip-bad) and writes one file a task and split. Takes of one
group (a video, a surgeon) stay in one split. Long videos become windows of --length seconds; what reaches over a
window's edge is cut there.
"""

import argparse
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import BadRecords, load_jsonl
from errors import InputError
from eval import overlay, sheet
from images import Sample
from prepare import common
from prepare.common import Entry, Report
from submission import unlabelled
from tasks import TASKS

Seconds = tuple[float, float]
QUESTIONS = "questions"  # what files of records without an answer begin with


@dataclass(frozen=True)
class Take(Entry):
    """One record; `image` is what its clip belongs to."""

    record: dict = field(default_factory=dict)  # "frames" as paths or "video" as one; without dataset
    kind: str = "span"  # what the name of its file begins with: its task, or QUESTIONS


def seconds(text: str) -> float:
    value = float(text)
    if not 1e-3 <= value <= 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def windows(last: float, length: float) -> list[Seconds]:
    """(start, end) of consecutive windows from 0 to last; less than half a window belongs to the one before."""
    starts = [i * length for i in range(max(int(last / length + 0.5), 1))]
    return list(zip(starts, [*starts[1:], last], strict=True))


def within(spans: list[Seconds], window: Seconds) -> list[Seconds]:
    """The parts of spans that lie in a window, in seconds from its start."""
    start, end = window
    parts = ((max(a, start) - start, min(b, end) - start) for a, b in spans)
    return [(round(a, 3), round(b, 3)) for a, b in parts if round(b, 3) > round(a, 3)]


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Half-open runs of whole numbers that rise."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = found[-1][0], n + 1
        else:
            found.append((n, n + 1))
    return found


def spans_in(what: dict[str, list[Seconds]], window: Seconds, question: str, where: str, report: Report) -> list[dict]:
    """Fields of the records of a window: when is each of `what` in it? question: with {what} in it."""
    records = []
    for name, spans in what.items():
        segments = within(spans, window)
        if segments == [(0.0, round(window[1] - window[0], 3))]:
            report.note("left out, it fills the clip", f"{where}: {name}")
        elif segments:
            query = question.replace("{what}", name)
            records.append({"task": "span", "query": query, "segments": [list(s) for s in segments]})
    return records


def convert(args, read: Callable) -> None:
    """Read the source, check every record, write --out, say what came out and what did not. read(args, report) -> a
    list of Take."""
    with common.printable():
        _convert(args, read)


def _convert(args, read: Callable) -> None:
    args.source = Path(os.path.realpath(args.source))
    if not os.path.exists(args.source):
        raise InputError(f"--source {args.source}: is not there")
    home = args.source if args.source.is_dir() else args.source.parent
    args.out = Path(os.path.realpath(args.out or home))
    if args.dataset is not None:
        common.usable(args.dataset, "--dataset")
    report = Report(args.skip_bad)
    takes = read(args, report)
    groups = {take.image: take.group or str(take.image) for take in takes}
    if takes and (args.val or args.test):
        takes = common.make_splits(takes, groups, args.val, args.test, args.seed)
    takes = common.part_groups(takes, groups, args.leaks, report)
    files = defaultdict(list)
    for take in takes:
        files[args.out / f"{take.kind}-{take.split}.jsonl"].append(take)
    for path in files:
        common.free(path, args.overwrite)
    partial = {path: path.with_name(f".partial-{path.name}") for path in files}
    samples, kept = [], {}
    try:
        for path, some in sorted(files.items()):
            with unlabelled(path.name.startswith(QUESTIONS)):
                kept[path], found = checked(partial[path], some, args, report)
            samples += found
        for line in report.lines(home):
            tqdm.write(line)
        if not samples:
            raise InputError(f"--source {args.source}: no record came out of it")
        for path in kept:
            if kept[path]:
                os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    if args.overlay:
        count = min(len(samples), common.SHEET)
        some = [samples[i * len(samples) // count] for i in range(count)]
        sheet([overlay(s, [], f"{s.source.rpartition('-')[2]}: {s.query.splitlines()[0]}") for s in some], 6).save(
            args.overlay
        )
    for path, some in kept.items():
        each = Counter(take.record["query"] for take in some).most_common(3)
        shown = ", ".join(f"{query!r:.60}: {n}" for query, n in each)
        tqdm.write(
            common.plain(f"{path}: {len(some)} records of {len({take.image for take in some})} videos ({shown})")
        )


def checked(path: Path, takes: list[Take], args, report: Report) -> tuple[list[Take], list[Sample]]:
    """Write a file of those that the loader takes; -> them, and their samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(as_written(take, args), ensure_ascii=False) + "\n" for take in takes]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")  # half a character as JSON escapes it
    bad, samples = BadRecords(len(takes)), []
    try:
        samples = load_jsonl(path, TASKS, bad, outside=True, clip=getattr(args, "clip_boxes", False))
    except InputError:
        if len(bad.sentences) < len(takes):
            raise
    name, kept = repr(str(path))[1:-1], []
    for number, (take, line) in enumerate(zip(takes, lines, strict=True), 1):
        where = f"{name}:{number}"
        if where in bad.sentences:
            report.bad.add(take.source, InputError(f"{take.source}: {bad.sentences[where].removeprefix(f'{where}: ')}"))
            continue
        if where in bad.clipped:
            report.note("clipped at the picture's edge (--clip-boxes)", take.source)
        kept.append((take, line))
    path.write_text("".join(line for _, line in kept), encoding="utf-8", errors="backslashreplace")
    return [take for take, _ in kept], samples


def as_written(take: Take, args) -> dict:
    """The record, its paths relative to --out."""

    def name(path: Path) -> str:
        return common.usable(Path(os.path.relpath(path, args.out)).as_posix(), "the path")

    record = dict(take.record)
    if "frames" in record:
        record["frames"] = [name(path) for path in record["frames"]]
    else:
        record["video"] = name(record["video"])
    return record | {"dataset": record.get("dataset") or args.dataset or args.source.stem}
