"""COCO detection or segmentation JSON -> JSONL.

    python -m prepare.coco --source FracAtlas/annotations.json --images FracAtlas/images --query "the fracture"
    python -m prepare.coco --source roboflow-export --overlay sheet.png

--source is a JSON file, or a folder below which the files are called ..coco.json (Roboflow) or instances_...json
(COCO itself), or are the only one. The name of the file or of its folder gives the split (train/_annotations.coco.json,
instances_val2017.json). Pictures lie where --images says; without it beside their JSON, or in a folder beside that or
its folder which the JSON's name or split names: train2017, train, images, images/train2017, images/train.

bbox is [x, y, width, height], edges in pixels: half-open already. Where there is none, the box is the extent of the
segmentation: polygons, or a mask in runs (RLE), written as numbers or compressed to a text (prepare/rle.py).
"""

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import errors
from data import picture_path
from errors import InputError, named, one_line, read_json
from images import Box
from prepare import common, layout
from prepare.common import Entry, short
from prepare.rle import runs_box

MAX_JSON = 2**32  # bytes; COCO's own largest file has half a gigabyte
BESIDE = ("annotations", "annotation", "labels")  # folders of JSON files, whose pictures lie beside the folder


def annotation_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = layout.files_below(source, ".json")
    named = [f for f in files if f.name.endswith("coco.json") or f.name.startswith("instances")]
    if not named and len(files) != 1:
        raise InputError(f"--source {source}: holds {len(files)} JSON files, none is called ..coco.json; name the file")
    return named or files


def number(value: Any) -> float:
    """A number, also one that a table has made a text of; NaN for anything else."""
    try:
        return float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def key(value: Any) -> str | None:
    """An id as other ids are to be compared with it: 1, 1.0 and "1" are one; None for what is no id."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, float, str) else None


def pictures_folder(file: Path, images: list[dict], split: str, source: Path) -> Path:
    """Where the pictures of a file lie: beside it, or else, of the folders that layouts have, where the most are."""
    bases = [file.parent]
    if file.parent.name.lower() in BESIDE or source in file.parent.parents:  # never above --source otherwise
        bases.append(file.parent.parent)
    word = file.stem.partition("_")[2]  # instances_train2017 -> train2017
    words = [word, file.stem, *(w for w, s in layout.SPLITS.items() if s == split)]
    below = ["", *words, *(f"images/{w}" for w in words), "images"]
    folders = dict.fromkeys(base / name for name in below for base in bases)
    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]

    if any(os.path.isfile(file.parent / name) for name in names):
        return file.parent

    def count(folder: Path) -> int:
        return sum(os.path.isfile(folder / name) for name in names if ".." not in name)

    return max((folder for folder in folders if os.path.isdir(folder)), key=count, default=file.parent)


def box_of(annotation: dict) -> tuple[Box, tuple[int, int] | None]:
    """(x1, y1, x2, y2) of an annotation, and the size of its mask if it has one that says so."""
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if not box and segmentation:
        with named("field 'segmentation'"):
            return runs_box(segmentation) if isinstance(segmentation, dict) else (polygons_box(segmentation), None)
    numbers = [number(v) for v in box] if isinstance(box, list) else []
    if [abs(v) < 1e9 for v in numbers] != [True] * 4:
        but = "" if box else ", and there is no 'segmentation' to take it from"
        raise InputError(f"field 'bbox' must be four finite numbers [x, y, width, height], not {short(box)}{but}")
    x, y, width, height = numbers
    return (x, y, x + width, y + height), None


def polygons_box(polygons: Any) -> Box:
    """The extent of [x1, y1, x2, y2, ...], or of a list of these."""
    polygons = polygons if isinstance(polygons, list) and isinstance(polygons[0], list) else [polygons]
    xs, ys = [], []
    for polygon in polygons:
        points = [number(v) for v in polygon] if isinstance(polygon, list) else []
        if len(points) < 6 or len(points) % 2 or not all(abs(v) < 1e9 for v in points):
            raise InputError(f"a polygon must be three points or more [x1, y1, x2, y2, ...], not {short(polygon)}")
        xs += points[::2]
        ys += points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def objects(
    image: dict, folder: Path, annotations: list[tuple[str, dict]], classes: dict, split: str, outside: bool
) -> list[Entry]:
    """The entries of one picture; annotations with the place where each stands."""
    size = (image.get("width"), image.get("height"))
    if all(size):
        size = tuple(map(number, size))
        if not all(side > 0 and side.is_integer() for side in size):
            stated = short([image["width"], image["height"]])
            raise InputError(f"fields 'width' and 'height' must be positive integers, not {stated}")
    if not isinstance(image.get("file_name"), str):
        raise InputError("field 'file_name' must be a text")
    path = picture_path(folder, image["file_name"], "file_name", outside)
    if annotations and not os.path.isfile(path):
        raise InputError(
            f"the picture {one_line(path)} is not there, nor is it where layouts that are known have it; name the "
            "folder that file_name starts from by --images"
        )
    entries = []
    for where, annotation in annotations:
        label = classes.get(key(annotation.get("category_id")))
        with named(where):
            if label is None:
                raise InputError(f"field 'category_id' {short(annotation.get('category_id'))} is none of 'categories'")
            box, mask_size = box_of(annotation)
            if mask_size and all(size) and mask_size != size:
                raise InputError(
                    f"its mask is of {mask_size[0]}x{mask_size[1]}, its picture of {size[0]:g}x{size[1]:g}; mend 'size'"
                )
            crowd = number(annotation.get("iscrowd") or 0) != 0
        stated = mask_size or (tuple(map(int, size)) if all(size) else None)
        entries.append(Entry(path, where, label, box, size=stated, crowd=crowd, split=split))
    return entries or [Entry(path, str(path), split=split, empty=True)]


def read_file(file: Path, args, report) -> list[Entry]:
    whole = read_json(file, most=MAX_JSON)
    lists = [whole.get(key) if isinstance(whole, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) and all(isinstance(item, dict) for item in part) for part in lists):
        raise InputError(f"{file}: must hold 'images', 'annotations' and 'categories', each a list of objects")
    images, annotations, categories = lists
    classes = {}
    for category in categories:
        if isinstance(category.get("name"), str):
            name = classes.setdefault(key(category.get("id")), category["name"])
            if name != category["name"]:
                both = f"{short(name)} and {short(category['name'])}"
                raise InputError(f"{file}: two of 'categories' have the id {short(category.get('id'))}: {both}")
    split = layout.split_of(file.stem, *layout.folders_below(file, args.source))
    folder = Path(args.images).absolute() if args.images else pictures_folder(file, images, split, args.source)
    of_image, seen = defaultdict(list), set()
    for i, annotation in enumerate(annotations):
        where = f"{file} annotation {short(annotation.get('id', i))}"
        of_image[key(annotation.get("image_id"))].append((where, annotation))
    entries = []
    for image in images:
        where, name = f"{file} image {short(image.get('id'))}", key(image.get("id"))
        try:
            with named(where):
                if name is None or name in seen:
                    raise InputError("field 'id' must be a number or a text, and that of no other image")
                seen.add(name)
                some = of_image.pop(name, [])
                made = objects(image, folder, some, classes, split, args.allow_outside)
                entries += made if some or args.grouped else []
        except InputError as error:
            report.bad.add(where, error)
            continue
        if not some and not args.grouped:
            report.note("left out, nothing is marked in the picture", where)
        for place, annotation in some:
            if not annotation.get("bbox"):
                report.note("without bbox, the box is the extent of the segmentation", place)
    for orphans in of_image.values():
        report.bad.add(orphans[0][0], InputError(f"{orphans[0][0]}: its 'image_id' is none of 'images'"))
    return entries


def read(args, report) -> list[Entry]:
    return [entry for file in annotation_files(args.source) for entry in read_file(file, args, report)]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("coco", __doc__)
    parser.add_argument("--images", help="folder that file_name is relative to; default: that of the JSON")
    parser.add_argument("--allow-outside", action="store_true", help="file_name may lead out of that folder")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
