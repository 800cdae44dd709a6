"""Pairs of pictures and masks, in folders and under names of your own -> JSONL.

    python -m prepare.masks --source data --images 'images/*.jpg' --masks 'masks/*_mask.png' --query "the polyp"

Both patterns are relative to --source and have one * each. It stands for any text, folders included, and what it stands
for must be the same in a picture's name and in its mask's: that is the pair. A folder named train, val or test (or
ISIC-2017_Training_Data: one such word) gives the split.
"""

from pathlib import Path

import errors
from errors import InputError
from prepare import common, layout
from prepare.common import Entry


def matches(source: Path, pattern: str, flag: str) -> dict[str, Path]:
    """What the * of the pattern stands for -> file."""
    before, star, after = pattern.partition("*")
    if not star or "*" in after:
        raise InputError(f"{flag} {pattern!r}: exactly one * is needed, such as 'images/*.jpg'")
    folder = source / before.rpartition("/")[0]
    files = {f.relative_to(source).as_posix(): f for f in layout.files_below(folder, *layout.PICTURES)}
    size = len(before) + len(after)
    found = {
        name[len(before) : len(name) - len(after)]: file
        for name, file in files.items()
        if name.startswith(before) and name.endswith(after) and len(name) >= size
    }
    if not found:
        raise InputError(f"{flag} {pattern!r}: fits none of {len(files)} pictures in {folder}; quote it for the shell")
    return found


def read(args, report) -> list[Entry]:
    masks = matches(args.source, args.masks, "--masks")
    taken = set(masks.values())
    images = {key: file for key, file in matches(args.source, args.images, "--images").items() if file not in taken}
    for key in sorted(masks.keys() ^ images.keys()):
        file, lacks = (images[key], "mask") if key in images else (masks[key], "picture")
        report.bad.add(str(file), InputError(f"{file}: has no {lacks}; * would stand for {key!r}"))
    entries = []
    for key in (key for key in images if key in masks):
        file = images[key]
        split = layout.split_of(*layout.folders_below(file, args.source))
        entries.append(Entry(file, str(file), mask=masks[key], split=split))
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("masks", __doc__, query="", masks=True)
    parser.add_argument("--images", required=True, help="pattern of the pictures, such as 'images/*.jpg'")
    parser.add_argument("--masks", required=True, help="pattern of the masks, such as 'masks/*_mask.png'")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
