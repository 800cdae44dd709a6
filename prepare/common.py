"""What the scripts of this folder share: boxes as displayed, phrases, splits, and JSONL that is whole or not there.

A script only reads its source's layout and names what it finds: a list of Entry, one per object, in the source's own
coordinates; or one per picture, where the picture as a whole has a class (prepare/choices.py). convert() opens the
pictures, brings every box into the one frame that data.py knows (pixels of the image as displayed, half-open: x2 = last
column + 1) and writes one file per split.

What cannot be used goes one of two ways. A fault (a damaged or missing file, a size that does not fit, a line that
cannot be read) ends the run with a sentence, or leaves that picture out under --skip-bad N. What the method has no use
for (an empty mask, several objects under one phrase) is left out, and counted. Nothing is left out in silence.
"""

import argparse
import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import errors
from data import MAX_TEXT, BadRecords, counted, load_jsonl
from errors import InputError, named, one_line, read_json
from eval import overlay, sheet
from images import Box, Sample, size_and_orientation
from prepare.boxes import as_displayed, drawn_as_stored, mask_box
from prepare.grouped import grouped, grouped_flags
from prepare.layout import folder_of, words
from tasks import TASKS

HELD_OUT = ("test", "val", "train", "all")  # a picture in two splits belongs to the first of these
PARTS = {"largest": "the largest is taken", "union": "the box is around all of them", "drop": "left out"}  # --component
SHEET = 24  # pictures of --overlay
RAW = argparse.RawDescriptionHelpFormatter  # --help begins with a script's docstring
MAX_SENTENCE = 2000  # characters; names of files may have 255 bytes, and a path has many


@dataclass(frozen=True)
class Entry:
    """One object in one picture, as the source states it. Either mask is given or box, whose frame is what `size` says:
    (width, height) of the picture that the box was drawn in; None if the source does not tell."""

    image: Path
    source: str  # "train/labels/1.txt:3", for messages
    label: str = ""  # the name of its class
    box: Box | None = None  # half-open, in pixels; as shares of the picture's sides with shares=True
    shares: bool = False
    mask: Path | None = None
    more: tuple[Path, ...] = ()  # further masks of the picture, which count as parts of the first
    size: tuple[int, int] | None = None
    empty: bool = False  # nothing is marked in the picture: it may be a record without boxes (--group)
    crowd: bool = False  # several objects in one box: never a record, but its phrase is not unique any more
    split: str = "all"
    group: str = ""  # pictures of one group show the same thing and must share a split; see groups_of


def plain(text: Path | str) -> str:
    """A text for the terminal, whatever names of files and texts in them have in it: one line of printable characters,
    the others as repr() writes them; of a long one the beginning and the end, where the remedy stands."""
    text = text if len(str(text)) <= MAX_SENTENCE else f"{str(text)[:1200]} ... {str(text)[-700:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def short(value) -> str:
    """A value of any kind, size and depth out of other people's JSON, for a sentence."""
    return one_line(value if isinstance(value, str) else reprlib.repr(value))


class Report:
    """What was left out or changed on the way, by reason; and the faults that --skip-bad allows."""

    def __init__(self, allowed: int = 0):
        self.bad = BadRecords(allowed)
        self.notes: dict[str, list[str]] = defaultdict(list)  # reason -> where

    def note(self, reason: str, where: str | Path) -> None:
        self.notes[reason].append(str(where))

    def merge(self, other: "Report") -> None:
        for reason, where in other.notes.items():
            self.notes[reason] += where

    def lines(self, home: Path) -> list[str]:
        """One for each fault, one for each reason with how often and the first three places, below home."""
        notes = [counted(*note).replace(f"{home}{os.sep}", "") for note in self.notes.items()]
        return [plain(line) for line in self.bad.lines() + notes]


# ------------------------------------------------------------------------------------------------------------- boxes


def locate(entry: Entry, size: tuple[int, int], orientation: int, args, report: Report) -> Box | None:
    """The entry's box in pixels as displayed, None if there is nothing to find. size: of the picture as displayed."""
    box, stated = entry.box, entry.size
    if entry.mask:
        box, parts, stated = mask_box(entry.mask, args.threshold, args.component, entry.more)
        if parts == 0:
            report.note("left out, the mask is empty", entry.mask)
        elif parts > 1:
            report.note(f"the mask has several parts: {PARTS[args.component]}", entry.mask)
        if box is None:
            return None
    if not all(math.isfinite(v) for v in box):
        raise InputError(f"its box {list(box)} is not four finite numbers")
    stored = drawn_as_stored(stated, size, orientation, args.frame)
    frame = size[::-1] if stored and orientation > 4 else size
    if entry.shares:
        box = tuple(v * side for v, side in zip(box, frame * 2, strict=True))
    inside = tuple(min(max(v, 0), side) for v, side in zip(box, frame * 2, strict=True))
    beyond = max(abs(a - b) for a, b in zip(box, inside, strict=True))
    if beyond > 1:
        shown = f"its box {[round(v, 2) for v in box]}"
        if not args.clip_boxes:
            over = f"reaches {beyond:.1f} pixels out of the {frame[0]}x{frame[1]} picture"
            raise InputError(f"{shown} {over}; correct it, or have boxes cut by --clip-boxes")
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise InputError(f"{shown} has nothing inside the {frame[0]}x{frame[1]} picture; correct it")
        report.note("clipped at the picture's edge (--clip-boxes)", entry.source)
    elif beyond > 0.01:  # less is what is left of a share's six decimals
        report.note("cut at the picture's edge, by a pixel at most", entry.source)
    if inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
        report.note("left out, the box is less than a pixel wide or high", entry.source)
        return None
    if stored:
        report.note("turned, the box was drawn in the picture as stored", entry.source)
        inside = as_displayed(inside, orientation, frame)
    return tuple(int(v) if v == int(v) else v for v in (round(v, 2) for v in inside))


# ----------------------------------------------------------------------------------------------------------- phrases


def phrase_of(query: str | None, source: Path) -> Callable[[Entry], str | None]:
    """--query as a function: a text with {class} and {folder}, or a JSON file {class: phrase}, None for other classes.

    Where there is no --query, the label is a phrase already.
    """
    if query is None:
        return lambda entry: entry.label
    if query.endswith(".json"):
        table = read_json(query)
        if not isinstance(table, dict) or not all(isinstance(v, str) and v.strip() for v in table.values()):
            example = '{"WBC": "the white blood cell"}'
            raise InputError(f"--query {query}: must hold one object of texts, such as {example}")
        return lambda entry: table.get(entry.label)
    if re.search(r"[{}]", query.replace("{class}", "").replace("{folder}", "")) or not query.strip():
        raise InputError(f"--query {query!r}: {{class}} and {{folder}} are the fields that it can have")

    def phrase(entry: Entry) -> str:
        text = query.replace("{class}", words(entry.label))
        return text.replace("{folder}", words(folder_of(entry.image, source))) if "{folder}" in text else text

    return phrase


# ------------------------------------------------------------------------------------------------------------ splits


def groups_of(entries: list[Entry]) -> dict[Path, str]:
    """Picture -> the name of its group: pictures of the same thing, which belong into one split.

    That is what the source says (Entry.group), Roboflow's copies x_jpg.rf.<hash>.jpg of one x.jpg, and files whose
    bytes are equal, whatever their names: real sets have some.
    """
    groups = {}
    for entry in entries:
        copy = re.fullmatch(r"(.+)\.rf\.[0-9A-Za-z]+", entry.image.stem)
        groups[entry.image] = entry.group or (copy[1] if copy else str(entry.image))
    joined = {}  # name of a group -> name of the one that it went into

    def name(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for files in equal_files(groups):
        first, *others = sorted({name(groups[file]) for file in files})
        joined |= dict.fromkeys(others, first)
    return {image: name(group) for image, group in groups.items()}


def equal_files(files: Iterable[Path]) -> list[list[Path]]:
    """The files of equal bytes, together. Only those are read whose size another one has too."""
    of_size, of_content = defaultdict(list), defaultdict(list)
    for file in files:
        if os.path.isfile(file):  # if not, it is named when its turn comes to be opened
            of_size[file.stat().st_size].append(file)
    for file in (file for some in of_size.values() if len(some) > 1 for file in some):
        try:
            of_content[hashlib.sha256(file.read_bytes()).digest()].append(file)
        except OSError:
            continue  # the same
    return [some for some in of_content.values() if len(some) > 1]


def make_splits(entries: list[Entry], groups: dict[Path, str], val: float, test: float, seed: int) -> list[Entry]:
    """New splits, whole groups at a time. A group's place follows from its name and the seed, on every machine."""
    names = sorted(set(groups.values()), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    sizes = {name: max(1, round(part * len(names))) for name, part in (("test", test), ("val", val)) if part}
    if len(names) <= sum(sizes.values()):
        raise InputError(f"--val {val} --test {test} leave nothing to train on: the pictures make {len(names)} groups")
    splits = [name for name, size in sizes.items() for _ in range(size)]
    split = dict(zip(names, splits + ["train"] * (len(names) - len(splits)), strict=True))
    return [replace(entry, split=split[groups[entry.image]]) for entry in entries]


def part_groups(entries: list[Entry], groups: dict[Path, str], leaks: str, report: Report) -> list[Entry]:
    """See that no group is in two splits: what a policy is trained on is then not what it is measured on."""
    splits = defaultdict(dict)  # group -> split -> a picture
    for entry in entries:
        splits[groups[entry.image]].setdefault(entry.split, entry.image)
    shared = {group: where for group, where in splits.items() if len(where) > 1}
    if shared and leaks == "refuse":
        (a, one), (b, other) = list(next(iter(shared.values())).items())[:2]
        raise InputError(
            f"{len(shared)} pictures or copies of them are in two splits: {one} in {a}, {other} in {b}; --val SHARE "
            "makes new splits that keep copies together, --leaks drop keeps each in its most held-out split alone"
        )
    kept = []
    for entry in entries:
        where = shared.get(groups[entry.image], {})
        if leaks == "drop" and where and entry.split != min(where, key=HELD_OUT.index):
            report.note(f"left out of {entry.split}, a copy is in a more held-out split (--leaks drop)", entry.source)
            continue
        if where and leaks == "keep":
            report.note("kept in two splits (--leaks keep)", entry.source)
        kept.append(entry)
    return kept


# ----------------------------------------------------------------------------------------------------------- records


def records_of(image: Path, entries: list[Entry], phrase: Callable, args, report: Report) -> list[tuple[str, dict]]:
    """(split, record) of one picture. InputError if it or one of its objects cannot be read: the others might then
    not be the only ones of their phrase any more, so that a picture is used as a whole or not at all."""
    size, orientation = opened(image, entries[0].source)
    found, crowded = defaultdict(list), set()  # phrase -> [(box or None for a crowd, split)]
    for entry in (entry for entry in entries if not entry.empty):
        query = phrase(entry)
        if query is None:
            report.note(f"left out, class '{one_line(entry.label)}' has no phrase in --query", entry.source)
            continue
        if entry.crowd:
            if not args.grouped:
                report.note("left out, a crowd in one box", entry.source)
            crowded.add(query)
        with named(entry.source):
            usable(query, "its phrase")
            box = None if entry.crowd else locate(entry, size, orientation, args, report)
        if (box, entry.split) in (of_phrase := found[query]) and box:
            report.note("left out, the same record again", entry.source)
        elif box or entry.crowd:
            of_phrase.append((box, entry.split))
    start, records = start_of(image, size, args.out), []
    if args.grouped:
        return grouped(found, crowded, entries[0].split, start, args, report, image)
    for query, boxes in found.items():
        if not args.all and len({box for box, _ in boxes}) > 1:
            report.note("left out, one phrase for several objects (--all keeps them)", f"{image}: {one_line(query)}")
            continue
        for box, split in boxes:
            if box is not None:
                records.append((split, start | {"query": query, "bbox": list(box), "dataset": args.dataset}))
    return records


def opened(image: Path, source: str) -> tuple[tuple[int, int], int]:
    """The size of a picture as displayed, and EXIF's orientation; all of it is decoded. source: what speaks of it."""
    if not os.path.isfile(image):  # unlike Path.is_file, False also for names that no file can have
        raise InputError(f"{source}: the picture {one_line(image)} is not there")
    return size_and_orientation(image, whole=True)


def start_of(image: Path, size: tuple[int, int], out: Path) -> dict:
    """What every record of a picture begins with."""
    name = usable(Path(os.path.relpath(image, out)).as_posix(), "the picture's path")
    if name != name.strip():  # the loader would strip it
        raise InputError(f"the picture's path '{one_line(name)}' begins or ends with a blank; rename it")
    return {"image": name, "width": size[0], "height": size[1]}


def usable(text: str, what: str) -> str:
    """The text, if a record can hold it and the loader will take it."""
    if not text.strip() or len(text) > MAX_TEXT:
        raise InputError(f"{what} '{one_line(text)}' has {len(text.strip())} characters; 1 to {MAX_TEXT} are possible")
    if re.search("[\ud800-\udfff]", text):  # half a character, or a byte of a file's name that is not UTF-8
        raise InputError(f"{what} '{one_line(text)}' cannot be written in UTF-8; rename it")
    return text


def convert(args, read: Callable, records: Callable = records_of, kinds: tuple[str, ...] = ("",)) -> None:
    """Read the source, look at every picture, write --out, say what came out and what did not.

    read(args, report) -> a list of Entry. records: as records_of; its splits have one of `kinds` in front, with which
    the name of their file begins, such as "labels-" for labels-train.jsonl.
    """
    with printable():
        _convert(args, read, records, kinds)


@contextmanager
def printable() -> Iterator[None]:
    """An InputError from inside has names in it that other people gave."""
    try:
        yield
    except InputError as error:
        raise InputError(plain(str(error))) from error


def _convert(args, read: Callable, records: Callable, kinds: tuple[str, ...]) -> None:
    args.source = Path(os.path.realpath(args.source))  # pictures may be links, the folder that paths start from may not
    if not os.path.exists(args.source):
        raise InputError(f"--source {args.source}: is not there")
    home = args.source if args.source.is_dir() else args.source.parent
    args.out = Path(os.path.realpath(args.out or home))
    args.dataset = usable(args.dataset or home.name or "data", "--dataset")
    phrase, report = phrase_of(args.query, home), Report(args.skip_bad)
    entries = read(args, report)
    groups = groups_of(entries)
    if entries and (args.val or args.test):
        entries = make_splits(entries, groups, args.val, args.test, args.seed)
    entries = part_groups(entries, groups, args.leaks, report)
    found = sorted({entry.split for entry in entries}, key=HELD_OUT.index, reverse=True)
    splits = {f"{kind}{split}": [] for kind in kinds for split in found}
    for split in splits:
        free(args.out / f"{split}.jsonl", args.overwrite)
    args.phrases = sorted({phrase(entry) or "" for entry in entries if not entry.empty} - {""}) if args.grouped else ()
    look(entries, partial(records, phrase=phrase, args=args), splits, report)
    for line in report.lines(home):
        tqdm.write(line)
    if not any(splits.values()):
        raise InputError(f"--source {args.source}: no record came out of it")
    samples = write({args.out / f"{split}.jsonl": records for split, records in splits.items() if records})
    if args.overlay:
        some = [samples[i * len(samples) // SHEET] for i in range(SHEET)] if len(samples) > SHEET else samples
        tiles = [overlay(sample, [], f"{sample.media.name}: {sample.query.splitlines()[0]}") for sample in some]
        sheet(tiles, 6).save(args.overlay)
    for split, records in splits.items():
        tqdm.write(plain(f"{args.out / split}.jsonl: {count_of(records)}"))
    if any(record["image"].startswith("../") for records in splits.values() for record in records):
        tqdm.write(plain(f"image paths lead out of {args.out}: train with --allow-outside, or write --out {home}"))


def look(entries: list[Entry], records: Callable, splits: dict[str, list[dict]], report: Report) -> None:
    """Open every picture, its masks too, and put the records into their splits."""
    pictures = defaultdict(list)
    for entry in entries:
        pictures[entry.image].append(entry)
    for image, some in tqdm(pictures.items(), desc="pictures", unit=""):
        notes = Report()  # of this picture, which may turn out unusable
        try:
            for split, record in records(image, some, report=notes):
                splits[split].append(record)
        except InputError as error:
            report.bad.add(str(image), error)
        else:
            report.merge(notes)


def count_of(records: list[dict]) -> str:
    """How many there are, and of labels how many of each."""
    if not records:
        return "no record"
    labels = Counter(record["label"] for record in records if "label" in record)
    each = ", ".join(f"{one_line(label)}: {n}" for label, n in sorted(labels.items()))
    return f"{len(records)} records of {len({r['image'] for r in records})} pictures" + (f" ({each})" if each else "")


def free(path: Path, overwrite: bool) -> None:
    """See that a file may be written."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} is already there; name another --out, or give --overwrite")


def write(targets: dict[Path, list[dict]], clip: bool = False) -> list[Sample]:
    """Write files of records: all of them whole or none, after the loader that training uses has read them back."""
    partial = {path: path.with_name(f".partial-{path.name}") for path in targets}
    samples = []
    try:
        for path, records in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            partial[path].write_text(text, encoding="utf-8")
            samples += load_jsonl(partial[path], TASKS, outside=True, clip=clip)  # --out may not be above pictures
        for path in targets:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return samples


# -------------------------------------------------------------------------------------------------------- command line


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return value


def png(text: str) -> str:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError("must end in .png")
    return text


def parser(
    script: str, doc: str, query: str | None = "the {class}", masks: bool = False, boxes: bool = True
) -> errors.Parser:
    """The flags that all scripts share. query: default of --query; "" if it must be given; None if the source has
    phrases of its own, and boxes as displayed. masks: the flags of masks too. boxes: those of boxes."""
    made = errors.Parser(prog=f"-m prepare.{script}", description=doc, formatter_class=RAW)
    flag = made.add_argument
    flag("--source", required=True, help="folder of the dataset, as unpacked; or a file, where that is said above")
    flag("--out", help="folder for train.jsonl ...; default: --source, so that pictures and paths can move together")
    flag("--dataset", help="name in the records; default: the folder's")
    if boxes:
        flag("--all", action="store_true", help="keep several objects of one phrase, a record for each")
        grouped_flags(flag)
        flag("--clip-boxes", action="store_true", help="cut boxes that reach over the picture's edge, and count them")
    flag("--val", type=share, default=0, help="make new splits: this share of the pictures, copies together, for val")
    flag("--test", type=share, default=0, help="and this share for test")
    flag("--seed", type=int, default=0, help="of the new splits")
    leaks = ["refuse", "drop", "keep"]
    flag("--leaks", choices=leaks, default="refuse", help="when a picture, or copies of it, are in two splits")
    flag("--skip-bad", type=int, default=0, help="pictures that may be unusable; they are left out and listed")
    flag("--overlay", type=png, help="a PNG of some pictures with what their records say: look at it")
    flag("--overwrite", action="store_true", help="replace train.jsonl ... if they are there")
    made.set_defaults(query=None, frame="displayed", grouped=False, negatives=0.0)
    if query is not None:
        note = "phrase: a text, {class} and {folder} stand for names; or a JSON file {class: phrase}"
        flag("--query", default=query, required=not query, help=note + (f"; default {query!r}" if query else ""))
        frames = ["auto", "displayed", "stored"]
        flag("--frame", choices=frames, default="auto", help="where EXIF turns a picture: how boxes were drawn")
    if masks:
        flag("--component", choices=list(PARTS), default="largest", help="of a mask of several parts")
        flag("--threshold", type=int, default=127, help="what is brighter is inside; 0 for masks of 0 and 1")
    return made
