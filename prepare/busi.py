"""BUSI, breast ultrasound (Al-Dhabyani et al., Data in Brief 28, 2020) -> boxes and labels of the same pictures.

    python -m prepare.busi --source Dataset_BUSI_with_GT --overlay sheet.png

    benign/benign (1).png with benign (1)_mask.png, some with benign (1)_mask_1.png too; malignant/..; normal/..

train.jsonl ... hold a box for each picture in which one is found, labels-train.jsonl ... the class of every picture, in
the same splits: train on boxes first, then on classes. Several masks of a picture are parts of one: --component. Normal
pictures have empty masks, so no box. The set has no official split, and names no patients; ours are by picture, copies
together, --val and --test give the shares.
"""

import re

import errors
from errors import InputError
from prepare import choices, common, layout
from prepare.common import Entry

CLASSES = ("benign", "malignant", "normal")
MASK = re.compile(r"(.+)_mask(?:_(\d+))?")


def read(args, report) -> list[Entry]:
    entries = []
    for kind in CLASSES:
        files = layout.files_below(args.source / kind, ".png")
        if not files:
            raise InputError(
                f"--source {args.source}: {kind}/ holds no .png; it must be the folder of {', '.join(CLASSES)}"
            )
        masks = {}
        for file in files:
            if found := MASK.fullmatch(file.stem):
                masks.setdefault(file.with_name(f"{found[1]}.png"), []).append((int(found[2] or 0), file))
        pictures = [file for file in files if not MASK.fullmatch(file.stem)]
        for file in pictures:
            if file not in masks:
                report.bad.add(str(file), InputError(f"{file}: has no {file.stem}_mask.png; unpack the archive anew"))
                continue
            first, *more = [mask for _, mask in sorted(masks[file])]
            entries.append(Entry(file, str(file), kind, mask=first, more=tuple(more)))
        for file in sorted(masks.keys() - set(pictures)):
            mask = masks[file][0][1]
            report.bad.add(
                str(mask), InputError(f"{mask}: its picture {file.name} is not there; unpack the archive anew")
            )
    return choices.settle(entries, args, report, CLASSES)


def records_of(image, entries, phrase, args, report) -> list[tuple[str, dict]]:
    """The records of a picture, of both kinds; where one has a fault, none."""
    boxes = common.records_of(image, entries, phrase, args, report)
    return boxes + choices.record_of(image, entries, phrase, args, report)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("busi", __doc__, query="the breast lesion", masks=True)
    choices.flags(parser, query="--question")
    parser.set_defaults(dataset="busi", val=0.1, test=0.1)
    common.convert(parser.parse_args(argv), read, records_of, ("", choices.KIND))


if __name__ == "__main__":
    errors.run(main)
