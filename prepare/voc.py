"""PASCAL VOC, an XML file per picture -> JSONL.

    python -m prepare.voc --source BCCD --query phrases.json --overlay sheet.png

    Annotations/a.xml with JPEGImages/a.jpg (or images/), ImageSets/Main/train.txt ... for the splits; or, as Roboflow
    exports it, train/a.xml beside train/a.jpg. Any *.xml below --source counts.

Coordinates. What tools write today (labelImg, CVAT, Roboflow) are a box's edges: taken as they are. PASCAL's own files
count pixels from 1 and include the last one: --one-based takes 1 off xmin and ymin. The wrong choice is off by a pixel.
"""

import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import errors
from errors import InputError, cause_of, named, one_line, read_text
from prepare import common, layout
from prepare.common import Entry


def picture_of(file: Path, stated: str, pictures: dict[tuple[Path, str], Path]) -> Path:
    """VOC pairs by name: a.xml tells of a.jpg; stated, its <filename>, must not be another picture that is there.

    pictures: (folder, name without its ending) -> file.
    """
    folders = [file.parent, file.parent.parent / "JPEGImages", file.parent.parent / "images"]
    stated = stated.replace("\\", "/").rpartition("/")[2]
    named = next((folder / stated for folder in folders if stated and os.path.isfile(folder / stated)), None)
    paired = next((pictures[folder, file.stem] for folder in folders if (folder, file.stem) in pictures), None)
    if named and paired and named.stem != paired.stem:
        raise InputError(
            f"its <filename> is {one_line(stated)}, its own name tells of {paired.name}, and both are there"
        )
    if not named and not paired:
        raise InputError(f"no picture {one_line(stated or file.stem)} is beside it, in JPEGImages or in images")
    return named or paired


def number(parent, path: str) -> float:
    text = parent.findtext(path)
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"<{path.replace('/', '><')}> must be a number, not {text!r:.80}") from None


def objects(file: Path, pictures: dict[tuple[Path, str], Path], one_based: bool) -> list[Entry]:
    """The entries of one file; pictures as in picture_of."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # LookupError: of its encoding's name
        raise InputError(f"is not XML that can be read ({cause_of(error)})") from error
    image = picture_of(file, root.findtext("filename") or "", pictures)
    stated = root.find("size") is not None
    size = tuple(number(root, f"size/{side}") for side in ("width", "height")) if stated else (0, 0)
    entries = []
    for i, thing in enumerate(root.iter("object"), 1):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise InputError(f"<object> {i} has no <name>")
        x1, y1, x2, y2 = (number(thing, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if one_based and min(x1, y1) < 1:
            raise InputError(f"<object> {i} begins at {min(x1, y1):g}, so pixels do not count from 1: no --one-based")
        box = (x1 - one_based, y1 - one_based, x2, y2)
        entries.append(Entry(image, f"{file} object {i}", name, box, size=size if all(size) else None))
    return entries or [Entry(image, str(file), empty=True)]


def split_lists(source: Path) -> dict[str, str]:
    """Picture's name -> split, by ImageSets/Main/train.txt, val.txt and test.txt; other lists there are of classes."""
    splits = {}
    for file in sorted(source.rglob("ImageSets/Main/*.txt")):
        if file.stem in layout.SPLITS:
            lines = read_text(file).splitlines()
            splits |= {line.split()[0]: layout.SPLITS[file.stem] for line in lines if line.strip()}
    return splits


def read(args, report) -> list[Entry]:
    files = layout.files_below(args.source, ".xml")
    if not files:
        raise InputError(f"--source {args.source}: holds no .xml")
    pictures = {(f.parent, f.stem): f for f in layout.files_below(args.source, *layout.PICTURES)}
    listed, entries = split_lists(args.source), []
    for file in files:
        split = listed.get(file.stem) if listed else layout.split_of(*layout.folders_below(file, args.source))
        if split is None:
            report.note("left out, in no list of ImageSets/Main", file)
            continue
        try:
            with named(file):
                some = objects(file, pictures, args.one_based)
        except InputError as error:
            report.bad.add(str(file), error)
            continue
        if some[0].empty and not args.grouped:
            report.note("left out, nothing is marked in the picture", file)
            continue
        entries += [replace(entry, split=split) for entry in some]
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("voc", __doc__)
    parser.add_argument("--one-based", action="store_true", help="PASCAL's own coordinates: from 1, the last included")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
