"""YOLO labels (Ultralytics, Roboflow), a text file per picture -> JSONL.

    python -m prepare.yolo --source export --query phrases.json --overlay sheet.png

--source holds data.yaml (or is that file). It names the pictures of train, val and test; labels lie in a folder
`labels` where the pictures' is `images`, or beside them. A line is a class number and

    cx cy width height        a box, as shares of the picture's sides
    x1 y1 x2 y2 x3 y3 ...     a polygon of three points or more (segments, oriented boxes): its extent is taken

What data.yaml names must lie in its folder, where Roboflow's ../train/images is looked for too, else --allow-outside.
Shares are taken of the picture as displayed where EXIF does not turn it; else --frame must say what they are of.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import errors
from errors import InputError, cause_of, one_line, read_text
from prepare import common, layout
from prepare.common import Entry

MAX_YAML = 2**20  # bytes; class names, even of LVIS, are a fiftieth of it
LEADS_OUT = "leads out of the folder of data.yaml; move it there, or allow it by --allow-outside"


def read_yaml(path: Path) -> dict[str, Any]:
    """What a data.yaml says, all scalars as the texts that stand there: YAML's types would make False of a class `no`.
    No tag makes an object; an alias is the thing itself again, not a copy, so that none of any number unfolds."""
    try:
        import yaml
    except ImportError as error:
        raise InputError("data.yaml is read by PyYAML, which is not installed: pip install pyyaml") from error

    class Texts(yaml.BaseLoader):
        def construct_mapping(self, node, deep=False):
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):  # the last would win
                raise yaml.MarkedYAMLError(problem="a key stands there twice", problem_mark=node.start_mark)
            return mapping

    try:
        values = Texts(read_text(path, most=MAX_YAML)).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # of odd numbers; of depth
        mark = getattr(error, "problem_mark", None)
        place = f"{one_line(path)}:{mark.line + 1}" if mark else one_line(path)
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"{place}: is not valid YAML ({one_line(why)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{one_line(path)}: must hold `key: value` lines, not {common.short(values)}")
    return values


def class_names(path: Path, values: dict[str, Any]) -> dict[int, str]:
    names = values.get("names")
    names = {str(i): name for i, name in enumerate(names)} if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path}: names: must list the classes, such as ['RBC', 'WBC']")
    found = {}
    for key, name in names.items():
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) in found or not isinstance(name, str) or not name.strip():
            pair = f"{common.short(key)}: {common.short(name)}"
            raise InputError(f"{path}: names: '{pair}' is not a new class number and its name")
        found[int(key)] = name
    if values.get("nc", str(len(names))) != str(len(names)):
        raise InputError(f"{path}: nc is {common.short(values['nc'])}, but names has {len(names)} classes")
    return found


def place_names(path: Path, values: dict[str, Any], key: str) -> list[str]:
    """What data.yaml names under a key: nothing, a place, or several."""
    named = values.get(key) or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: {key}: must be a folder, a .txt file, or a list of these, not {common.short(named)}")
    return named


def pictures(path: Path, values: dict[str, Any], split: str, outside: bool) -> list[Path]:
    """The pictures of a split: a folder, a .txt that lists them, or several of these; in path's folder or `outside`."""
    base = path.parent.joinpath(*place_names(path, values, "path")[:1])
    base = base if os.path.exists(base) else path.parent  # the path of another machine
    found = []
    for name in place_names(path, values, split):
        # Roboflow writes ../train/images for a folder that lies beside data.yaml
        choices = [base / name, path.parent / name, path.parent / re.sub(r"^(\.\./)+", "", name)]
        there = [Path(os.path.normpath(choice)) for choice in choices if os.path.exists(choice)]
        place = next((choice for choice in there if outside or inside(choice, path)), None)
        if there and not place:
            raise InputError(f"{path}: {split}: {one_line(name)} {LEADS_OUT}")
        if place is None:
            away = f"is not there, from {one_line(base)}; unpack it or take the line out"
            raise InputError(f"{path}: {split}: {one_line(name)} {away}")
        if place.is_dir():
            found += layout.files_below(place, *layout.PICTURES)
            continue
        for number, line in enumerate(map(str.strip, read_text(place).splitlines()), 1):
            image = Path(os.path.normpath((place.parent if line.startswith("./") else base) / line))
            if line and not outside and not inside(image, path):
                raise InputError(f"{place}:{number}: {one_line(line)} {LEADS_OUT}")
            found += [image] if line else []
    return found


def inside(place: Path, yaml: Path) -> bool:
    """Whether a place is in the folder of data.yaml, which may come from anywhere. Links in it are its owner's."""
    return place == yaml.parent or yaml.parent in place.parents


def label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def objects(image: Path, label: Path, names: dict[int, str], split: str) -> list[Entry]:
    entries = []
    for number, line in enumerate(read_text(label).splitlines(), 1):
        if not line.split():
            continue
        where = f"{label}:{number}"
        try:
            kind, *numbers = map(float, line.split())
        except ValueError as error:
            raise InputError(f"{where}: {cause_of(error)}; a line is a class number and coordinates") from None
        if kind not in names:
            raise InputError(f"{where}: class {kind:g} is none of data.yaml's names")
        if not all(map(math.isfinite, numbers)):  # min() and max() would step over a NaN
            raise InputError(f"{where}: coordinates must be finite numbers, not {common.short(numbers)}")
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
        for image in pictures(path, values, split, args.allow_outside):
            label = label_file(image)
            labelled.setdefault(label.parent, set()).add(label)
            try:
                some = objects(image, label, names, layout.SPLITS[split]) if os.path.isfile(label) else []
            except InputError as error:
                report.bad.add(str(image), error)
                continue
            if not some and args.grouped:
                some = [Entry(image, str(image), split=layout.SPLITS[split], empty=True)]
            elif not some:
                report.note("left out, nothing is marked in the picture", image)
            entries += some
    for folder, labels in labelled.items():
        for label in sorted(set(folder.glob("*.txt")) - labels):
            if label.name != "classes.txt" and label.name[0] != ".":
                report.bad.add(str(label), InputError(f"{label}: no picture of that name is in data.yaml's folders"))
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("yolo", __doc__)
    parser.add_argument("--allow-outside", action="store_true", help="data.yaml may name places out of its folder")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
