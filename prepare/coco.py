"""COCO detection or segmentation JSON -> JSONL.

    python -m prepare.coco --source FracAtlas/annotations.json --images FracAtlas/images --query "the fracture"
    python -m prepare.coco --source roboflow-export --overlay sheet.png

--source is a JSON file, or a folder below which the files are called ..coco.json (Roboflow) or instances_...json
(COCO itself), or are the only one. Pictures lie beside their JSON unless --images says where. The name of the file or
of its folder gives the split (train/_annotations.coco.json, instances_val2017.json).

bbox is [x, y, width, height], edges in pixels: half-open already.
"""

from collections import defaultdict
from pathlib import Path

import errors
from data import picture_path
from errors import InputError, named
from prepare import common
from prepare.common import Entry


def annotation_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = common.files_below(source, ".json")
    named = [f for f in files if f.name.endswith("coco.json") or f.name.startswith("instances")]
    if not named and len(files) != 1:
        raise InputError(f"--source {source}: holds {len(files)} JSON files, none is called ..coco.json; name the file")
    return named or files


def objects(
    image: dict, folder: Path, annotations: list[tuple[str, dict]], classes: dict, split: str, outside: bool
) -> list[Entry]:
    """The entries of one picture; annotations with the place where each stands."""
    size = (image.get("width"), image.get("height"))
    size = size if all(size) else None
    if not isinstance(image.get("file_name"), str):
        raise InputError("field 'file_name' must be a text")
    path = picture_path(folder, image["file_name"], "file_name", outside)
    entries = []
    for where, annotation in annotations:
        box, label = annotation.get("bbox"), classes.get(str(annotation.get("category_id")))
        if not isinstance(box, list) or [type(v) in (int, float) and abs(v) < 1e9 for v in box] != [True] * 4:
            raise InputError(
                f"{where}: field 'bbox' must be four finite numbers [x, y, width, height], not {str(box):.80}"
            )
        if label is None:
            raise InputError(f"{where}: field 'category_id' {annotation.get('category_id')!r} is none of 'categories'")
        x, y, width, height = map(float, box)
        box = (x, y, x + width, y + height)
        crowd = bool(annotation.get("iscrowd"))
        entries.append(Entry(path, where, label, box, size=size, crowd=crowd, split=split))
    return entries


def read_file(file: Path, args, report) -> list[Entry]:
    whole = common.read_json(file)
    lists = [whole.get(key) if isinstance(whole, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) and all(isinstance(item, dict) for item in part) for part in lists):
        raise InputError(f"{file}: must hold 'images', 'annotations' and 'categories', each a list of objects")
    images, annotations, categories = lists
    classes = {str(c.get("id")): c["name"] for c in categories if isinstance(c.get("name"), str)}
    split = common.split_of(file.stem, *common.folders_below(file, args.source))
    folder = Path(args.images).absolute() if args.images else file.parent
    of_image = defaultdict(list)
    for i, annotation in enumerate(annotations):
        of_image[str(annotation.get("image_id"))].append((f"{file} annotation {annotation.get('id', i)}", annotation))
    entries = []
    for image in images:
        where = f"{file} image {image.get('id')}"
        some = of_image.pop(str(image.get("id")), [])
        if not some:
            report.note("left out, nothing is marked in the picture", where)
        try:
            with named(where):
                entries += objects(image, folder, some, classes, split, args.allow_outside)
        except InputError as error:
            report.bad.add(where, error)
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
