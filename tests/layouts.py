"""Folders as the sources of prepare/ unpack, with pictures drawn for them, and what may be asked of the outcome.

A picture is dark with one bright rectangle, so that a box can be held against the pixels that training would see.
"""

import csv
import json
import re
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import programs
import pytest
from PIL import Image

import errors
from data import load_jsonl
from images import load
from prepare import common, ham10000
from tasks import TASKS

SIZE, BOX, SMALL = (64, 48), (10, 8, 30, 28), (1, 2, 4, 6)
HAM = "HAM10000_metadata.csv"


def run(script, *flags, expect: int = 0) -> str:
    return programs.run(script, *map(str, flags), expect=expect)


def refusal(work, *args, **named) -> str:
    """The sentence that a reader refuses something with, of bounded length."""
    with pytest.raises(errors.InputError) as caught:
        work(*args, **named)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def reader(script, source: Path, **flags) -> list[common.Entry]:
    """What a script reads; the first fault is an InputError."""
    default = dict(images=None, allow_outside=False, one_based=False, fold=0, clip_boxes=False, grouped=False)
    return script.read(Namespace(source=source, **default | flags), common.Report())


def like(pattern: str, said: str) -> bool:
    """Whether the pieces of the pattern, which ".." parts, stand in what was said in their order."""
    return bool(re.search(".*".join(map(re.escape, pattern.split(".."))), said))


def picture(path: Path, *drawn, size=SIZE, orientation: int = 1, value: int = 220, noise: int = 40, mode="L") -> Path:
    """A picture STORED at size, bright in the boxes, no two alike; lossless unless the name says .jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, image, exif = np.random.default_rng(zlib.crc32(str(path).encode())), Image.new(mode, size), Image.Exif()
    if noise:
        image = Image.fromarray(rng.integers(0, noise, size[::-1], np.uint8))
    for box in drawn or ([BOX] if noise else []):
        image.paste(value, box)
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)
    return path


def mask(path: Path, *drawn, **options) -> Path:
    return picture(path, *drawn, **{"value": 255, "noise": 0} | options)


def read(path: Path, field: str | None = None) -> list:
    """The records of a file, or a field of each, after the loader of training has taken them."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    samples = load_jsonl(path, TASKS, outside=True)
    assert [s.target for s in samples] == [tuple(r["bbox"]) for r in records]
    assert [s.size for s in samples] == [(r["width"], r["height"]) for r in records]
    return [tuple(r[field]) if field == "bbox" else r[field] for r in records] if field else records


def names_of(path: Path) -> list[str]:
    return sorted(Path(name).name for name in read(path, "image"))


def bright(*paths: Path) -> None:
    """Every box of the files holds the bright pixels of its picture as displayed, all of them and no other."""
    for sample in (sample for path in paths for sample in load_jsonl(path, TASKS)):
        image, box = load(sample)
        inside = np.asarray(image.convert("L")) > 120
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == box, sample.source


def xywh(box) -> list:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def write_coco(path: Path, images: list, annotations: list, classes=("lesion", "nodule"), first=None) -> Path:
    """images: (name, width, height); annotations: (number of the image, class number, [x, y, w, h], more); first:
    part -> what else the first of it says."""
    whole = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, w, h) in enumerate(images)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "bbox": box} | (more[0] if more else {})
            for i, (image, kind, box, *more) in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }
    for part, more in (first or {}).items():
        whole[part][0] |= more
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    return path


def one_coco(folder: Path, *annotations, size=SIZE, first=None, orientation: int = 1) -> Path:
    """A folder with one picture and its annotations (class, [x, y, width, height], more), by default one."""
    picture(folder / "a.png", orientation=orientation)
    objects = [(0, *annotation) for annotation in annotations or [(0, xywh(BOX))]]
    return write_coco(folder / "coco.json", [("a.png", *size)], objects, first=first)


def pairs(folder: Path, **masks_of) -> list:
    for name, parts in masks_of.items():
        picture(folder / "images" / f"{name}.png")
        mask(folder / "masks" / f"{name}_mask.png", *parts)
    flags = "--images images/*.png --masks masks/*_mask.png --query it --overwrite"
    return ["--source", folder, *flags.split()]


def damaged(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def augmented(folder: Path, **names_of) -> Path:
    """A Roboflow export, a COCO file in the folder of each split."""
    for split, names in names_of.items():
        images = [(picture(folder / split / name).name, *SIZE) for name in names]
        write_coco(folder / split / "_annotations.coco.json", images, [(i, 0, xywh(BOX)) for i in range(len(names))])
    return folder


def tn3k_folder(folder: Path, numbers=(0, 1, 2, 5, 7, 10, 30, 100)) -> Path:
    """Names with gaps and without leading zeros; the box of each tells its number."""
    for part, n in [("trainval", n) for n in numbers] + [("test", n) for n in (0, 9, 10)]:
        picture(folder / f"{part}-image" / f"{n}.jpg", box := (n % 20, 3, n % 20 + 20, 30))
        mask(folder / f"{part}-mask" / f"{n}.jpg", box)
    return write_fold(folder, [0, 1, 3, 4, 6, 7], [2, 5])


def write_fold(folder: Path, train, val, fold: int = 0) -> Path:
    (folder / f"tn3k-trainval-fold{fold}.json").write_text(json.dumps({"train": train, "val": val}))
    return folder


def ham_folder(folder: Path, lesions: int = 6, metadata: str = HAM) -> list[dict]:
    """Lesions of 1, 2 or 3 pictures, in two parts, with masks; the rows of the metadata."""
    rows = []
    for lesion in (i for i in range(lesions) for _ in range(i % 3 + 1)):
        n, name = len(rows), f"ISIC_{len(rows):07d}"
        picture(folder / f"HAM10000_images_part_{n % 2 + 1}" / f"{name}.jpg", box := (n % 30, 5, n % 30 + 20, 25))
        mask(folder / "masks" / f"{name}_segmentation.png", box)
        dx = list(ham10000.DIAGNOSES)[lesion % 7]
        rows.append({"lesion_id": f"HAM_{lesion:07d}", "image_id": name, "dx": dx, "age": ""})
    return write_metadata(folder / metadata, rows)


def write_metadata(path: Path, rows: list[dict]) -> list[dict]:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tab" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def xml(path: Path, filename: str, *objects, size=SIZE) -> Path:
    """objects: (name, xmin, ymin, xmax, ymax)."""
    one = "<object><name>{}</name><bndbox>" + "".join(f"<{c}>{{}}</{c}>" for c in ("xmin", "ymin", "xmax", "ymax"))
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    things = stated + "".join(one.format(*thing) + "</bndbox></object>" for thing in objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{filename}</filename>{things}</annotation>")
    return path


def voc_folder(folder: Path, *names: str) -> Path:
    for name in names:
        picture(folder / "JPEGImages" / f"{name}.png")
        xml(folder / "Annotations" / f"{name}.xml", f"{name}.png", ("Nodule", *BOX))
    return folder


def shares(box, size=SIZE) -> str:
    (w, h), (x1, y1, x2, y2) = size, box
    return f"{(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}"


def yolo_folder(folder: Path, yaml: str = "path: .\ntrain: train/images\nval: valid/images\nnc: 2", line="") -> Path:
    for split in ("train", "valid"):
        picture(folder / split / "images" / f"{split}.png")
        (folder / split / "labels").mkdir(exist_ok=True)
        (folder / split / "labels" / f"{split}.txt").write_text(line or f"1 {shares(BOX)}\n")
    (folder / "data.yaml").write_text(f"{yaml}\nnames: ['RBC', 'WBC']\n")
    return folder
