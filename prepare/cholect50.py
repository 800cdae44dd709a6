"""CholecT50, laparoscopic cholecystectomy (Nwoye et al., Medical Image Analysis 78, 2022) -> records of clips.

    python -m prepare.cholect50 --source CholecT50 --length 60 --overlay sheet.png

videos/VID01/000000.png ..., a frame a second, and labels/VID01.json. Each video becomes windows of --length seconds. Of
a window come spans, when each instrument does what it does and when each phase is, and tubes, where each instrument is,
every --every seconds. A frame stands for the second that it begins. An instrument that is there twice at such a second
has no tube in that window; most videos have no boxes at all. Both are counted.

Splits are the ones of the set's paper (--val and --test make new ones, by video).
"""

import re
from pathlib import Path
from typing import Any

import errors
from errors import InputError, named, read_object, short
from prepare import common, footage, layout
from prepare.common import Report
from prepare.footage import Take, runs

VAL = {8, 12, 29, 50, 78}
TEST = {6, 10, 14, 32, 42, 51, 73, 74, 80, 111}
# A row: triplet, instrument, its confidence and box, verb, target, its confidence and box, phase; -1 is nothing. Boxes
# are left, top, width, height as shares of the frame's sides.
LENGTH, INSTRUMENT, BOX, VERB, TARGET, PHASE = 15, 1, slice(3, 7), 7, 8, 14
NO_VERB = ("null_verb", "null_target")
NO_INSTRUMENT = ("null_instrument", "no_instrument")


def names_of(table: dict, kind: str) -> dict[int, str]:
    """Number -> name of a category."""
    values = table.get(kind)
    if not isinstance(values, dict) or not all(re.fullmatch(r"-?\d{1,9}", k) for k in values):
        raise InputError(f"field 'categories': {kind!r} must map numbers to names, not {short(values)}; restore it")
    return {int(number): str(name) for number, name in values.items()}


def row_of(row: Any, where: str) -> list[float]:
    if (
        not isinstance(row, list)
        or len(row) != LENGTH
        or not all(type(v) in (int, float) and abs(v) < 1e9 for v in row)
    ):
        raise InputError(f"{where}: a row must be {LENGTH} numbers, not {short(row)}; restore it")
    return row


def video(path: Path, frames: Path, args, report: Report) -> list[Take]:
    """The records of one video."""
    values = read_object(path)
    table = values.get("categories")
    annotations = values.get("annotations")
    if not isinstance(table, dict) or not isinstance(annotations, dict) or not annotations:
        raise InputError("fields 'categories' and 'annotations' must be objects; restore it")
    if not all(re.fullmatch(r"\d{1,6}", key) for key in annotations):
        raise InputError(f"field 'annotations': {short(list(annotations))} are no frames; restore it")
    names = {kind: names_of(table, kind) for kind in ("instrument", "verb", "target", "phase")}
    seconds: dict[str, dict[str, list[int]]] = {"acts": {}, "phase": {}}
    boxes: dict[str, dict[int, list | None]] = {}  # instrument -> second -> its box; None: several, or without one
    for key in sorted(annotations, key=int):
        second, where = int(key), f"field 'annotations', frame {key}"
        rows = annotations[key]
        if not isinstance(rows, list):
            raise InputError(f"{where}: must be a list of rows, not {short(rows)}; restore it")
        there = [row_of(row, where) for row in rows]
        for name in dict.fromkeys(names["phase"].get(int(row[PHASE]), "") for row in there):
            if name:
                seconds["phase"].setdefault(f"the phase {layout.words(name.replace('-', ' '))}", []).append(second)
        acts, instances = set(), {}
        for row in there:
            tool = names["instrument"].get(int(row[INSTRUMENT]), NO_INSTRUMENT[0])
            if tool in NO_INSTRUMENT:
                continue
            box = tuple(row[BOX])
            instances.setdefault(layout.words(tool), set()).add(box)  # one instrument may do two things
            verb, target = (names[k].get(int(row[i]), NO_VERB[0]) for k, i in (("verb", VERB), ("target", TARGET)))
            if verb not in NO_VERB and target not in NO_VERB:
                acts.add(f"the {layout.words(tool)} {layout.words(verb)} the {layout.words(target)}")
        for act in sorted(acts):  # a set's order is another one in every process
            seconds["acts"].setdefault(act, []).append(second)
        for tool, found in instances.items():
            only = next(iter(found)) if len(found) == 1 else None
            boxes.setdefault(tool, {})[second] = only if only and min(only) >= 0 and min(only[2:]) > 0 else None
    last = max(map(int, annotations)) + 1
    takes = []
    asks = (("acts", "when does {what}?"), ("phase", "when is {what}?"))
    for window in footage.windows(last, args.length):
        start, end = map(int, window)
        where = f"{path} {start}-{end} s"
        files = [frames / f"{second:06d}.png" for second in range(start, end)]
        base = {"frames": files, "fps": 1.0}
        made = []
        for kind, ask in asks:
            what = {name: [(float(a), float(b)) for a, b in runs(them)] for name, them in seconds[kind].items()}
            made += footage.spans_in(what, (start, end), ask, where, report)
        made += tubes(boxes, files, start, args, where, report)
        split = layout_split(path.stem)
        takes += [
            Take(
                frames,
                f"{where}: {fields['query']}",
                split=split,
                group=path.stem,
                record=base | fields,
                kind=fields["task"],
            )
            for fields in made
        ]
    return takes


def tubes(boxes: dict, files: list[Path], start: int, args, where: str, report: Report) -> list[dict]:
    """Fields of the tubes of a window: each instrument at every args.every-th second at which it is there."""
    made, size = [], None
    for tool, found in sorted(boxes.items()):
        asked = [t for t in range(start, start + len(files), args.every) if t in found]
        if not asked:
            continue
        if any(found[t] is None for t in asked):
            report.note("no tube, an instrument is there twice or has no box", f"{where}: {tool}")
            continue
        if size is None:
            size, _ = common.opened(files[0], where)
        tube = {}
        for t in asked:
            x, y, w, h = (v * side for v, side in zip(found[t], size * 2, strict=True))
            tube[f"{t - start:.1f}"] = [round(v, 2) for v in (x, y, min(x + w, size[0]), min(y + h, size[1]))]
        made.append({"task": "tube", "query": f"the {tool}", "tube": tube})
    return made


def layout_split(name: str) -> str:
    number = int(name.removeprefix("VID"))
    return "val" if number in VAL else "test" if number in TEST else "train"


def read(args, report: Report) -> list[Take]:
    files = sorted((args.source / "labels").glob("VID*.json"))
    if not files:
        raise InputError(
            f"--source {args.source}: labels/ holds no VID01.json; it must be the folder of videos and labels"
        )
    takes = []
    for path in files:
        try:
            if not path.stem.removeprefix("VID").isdecimal():
                raise InputError(f"{path}: its name must be VID and a number")
            with named(path):
                takes += video(path, args.source / "videos" / path.stem, args, report)
        except InputError as error:
            report.bad.add(str(path), error)
    return takes


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("cholect50", __doc__, query=None, boxes=False)
    parser.add_argument("--length", type=footage.whole, default=60, help="seconds of a clip; default 60")
    parser.add_argument("--every", type=footage.whole, default=5, help="seconds between the boxes of a tube; default 5")
    parser.set_defaults(dataset="cholect50")
    footage.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
