"""Records of boxes -> labels of the same pictures: which of the things asked for is in it?

    python -m prepare.classes --source bccd --names names.json --query "which cell is in the picture?"

--source is a file of records, ours or VLM-R1's, or a folder with train.jsonl, val.jsonl, test.jsonl or all.jsonl. A
record's query is its class; names.json gives words to them, {"the leukocyte": "white cell", ...}, and null to what does
not count. Without it "the " is taken off. A picture in which several classes occur has no answer: left out and counted.
Splits stay, labels-train.jsonl is of the pictures of train.jsonl.
"""

from functools import partial
from pathlib import Path

import errors
from data import load_jsonl
from errors import InputError
from prepare import choices, common, layout
from prepare.common import Entry
from tasks import TASKS

FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "all.jsonl")
BOXES = {"box": TASKS["box"]}  # records of another task are faults


def read(args, report, dataset: str | None) -> list[Entry]:
    files = [args.source] if args.source.is_file() else [f for f in map(args.source.joinpath, FILES) if f.is_file()]
    if not files:
        raise InputError(f"--source {args.source}: holds none of {', '.join(FILES)}; name a file of records")
    entries, sets = [], {}
    for file in files:
        for sample in load_jsonl(file, BOXES, report.bad, outside=args.allow_outside, clip=True):
            sets.setdefault(sample.dataset, sample.source)
            label = sample.query if args.names else sample.query.removeprefix("the ")
            split = layout.split_of(file.stem)
            entries.append(Entry(Path(sample.media).absolute(), sample.source, label, split=split))
    if not dataset and len(sets) > 1:
        (one, here), (other, there) = list(sets.items())[:2]
        both = f"{here} is of dataset {one!r:.90}, {there} of {other!r:.90}"
        raise InputError(f"{both}; convert one at a time, or name both by --dataset")
    args.dataset = dataset or next(iter(sets))
    return alone(choices.settle(entries, args, report), report)


def alone(entries: list[Entry], report) -> list[Entry]:
    """One entry of each picture in which one class occurs."""
    classes, kept = {}, {}
    for entry in entries:
        classes.setdefault((entry.image, entry.split), set()).add(entry.label)
    for entry in entries:
        place = entry.image, entry.split
        if place not in kept and len(classes[place]) > 1:
            report.note("left out, several classes are in the picture", entry.source)
        kept.setdefault(place, entry)
    return [entry for place, entry in kept.items() if len(classes[place]) == 1]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("classes", __doc__, query=None, boxes=False)
    choices.flags(parser)
    parser.add_argument("--allow-outside", action="store_true", help="records may name pictures outside their folder")
    args = parser.parse_args(argv)
    common.convert(args, partial(read, dataset=args.dataset), choices.record_of, (choices.KIND,))


if __name__ == "__main__":
    errors.run(main)
