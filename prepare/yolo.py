"""YOLO labels (Ultralytics, Roboflow), a text file per picture -> JSONL.

    python -m prepare.yolo --source export --query phrases.json --overlay sheet.png

--source holds data.yaml (or is that file). It names the pictures of train, val and test; labels lie in a folder
`labels` where the pictures' is `images`, or beside them. A line is a class number and

    cx cy width height        a box, as shares of the picture's sides
    x1 y1 x2 y2 x3 y3 ...     a polygon of three points or more (segments, oriented boxes): its extent is taken

Shares are taken of the picture as displayed where EXIF does not turn it; else --frame must say what they are of.
"""

import os
import re
from pathlib import Path

import errors
from errors import InputError
from prepare import common
from prepare.common import Entry
from prepare.data_yaml import read_yaml


def class_names(path: Path, values: dict) -> dict[int, str]:
    names = values.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path}: names: must list the classes, such as ['RBC', 'WBC']")
    if values.get("nc", str(len(names))) != str(len(names)):
        raise InputError(f"{path}: nc is {values['nc']}, but names has {len(names)} classes")
    return names


def pictures(path: Path, values: dict, split: str) -> list[Path]:
    """The pictures of a split: a folder, a .txt that lists them, or several of these."""
    base = path.parent / str(values.get("path", ""))
    base = base if base.exists() else path.parent  # the path of another machine
    named = values.get(split) or []
    found = []
    for name in map(str, [named] if isinstance(named, str) else named):
        # Roboflow writes ../train/images for a folder that lies beside data.yaml
        choices = [base / name, path.parent / name, path.parent / re.sub(r"^(\.\./)+", "", name)]
        place = next((Path(os.path.normpath(choice)) for choice in choices if choice.exists()), None)
        if place is None:
            raise InputError(f"{path}: {split}: {name} is not there, from {base}; unpack it or take the line out")
        if place.is_dir():
            found += common.files_below(place, *common.PICTURES)
        else:
            listed = [line.strip() for line in common.read_text(place).splitlines() if line.strip()]
            places = ((place.parent if line.startswith("./") else base) / line for line in listed)
            found += [Path(os.path.normpath(place)) for place in places]
    return found


def label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def objects(image: Path, label: Path, names: dict[int, str], split: str) -> list[Entry]:
    entries = []
    for number, line in enumerate(common.read_text(label).splitlines(), 1):
        if not line.split():
            continue
        where = f"{label}:{number}"
        try:
            kind, *numbers = map(float, line.split())
        except ValueError as error:
            raise InputError(f"{where}: {error}; a line is a class number and coordinates") from None
        if kind not in names:
            raise InputError(f"{where}: class {kind:g} is none of data.yaml's names")
        if len(numbers) == 4:
            cx, cy, width, height = numbers
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            box = (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
        else:
            raise InputError(f"{where}: {len(numbers)} coordinates are neither a box (4) nor a polygon (6, 8, ...)")
        entries.append(Entry(image, where, names[kind], box, shares=True, split=split))
    return entries


def read(args, report) -> list[Entry]:
    path = args.source if args.source.is_file() else args.source / "data.yaml"
    values = read_yaml(path)
    names, entries, labelled = class_names(path, values), [], {}
    for split in ("train", "val", "valid", "test"):
        for image in pictures(path, values, split):
            label = label_file(image)
            labelled.setdefault(label.parent, set()).add(label)
            try:
                some = objects(image, label, names, common.SPLITS[split]) if label.is_file() else []
            except InputError as error:
                report.bad.add(str(image), error)
                continue
            if not some:
                report.note("left out, nothing is marked in the picture", image)
            entries += some
    for folder, labels in labelled.items():
        for label in sorted(set(folder.glob("*.txt")) - labels):
            if label.name != "classes.txt" and label.name[0] != ".":
                report.bad.add(str(label), InputError(f"{label}: no picture of that name is in data.yaml's folders"))
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("yolo", __doc__)
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
