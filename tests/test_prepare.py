"""prepare/: every layout, and every trap on the way from a mask or an annotation to a box in the displayed picture.

Pictures here are dark with one bright rectangle, so that a box can be held against the pixels that training would see.
"""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import errors
from data import load_jsonl
from errors import InputError
from images import load, size_and_orientation
from prepare import coco, common, ham10000, masks, tn3k, vlm_r1, voc, yolo
from prepare.boxes import as_displayed, components, mask_box
from prepare.data_yaml import KEYS, read_yaml
from prepare.rle import runs_box

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT.parent / "shared" / "data" / "fixtures"  # real images stay outside the repository
REAL = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"real images are not here: {FIXTURES}")
SIZE = (64, 48)
BOX = (10, 8, 30, 28)


def run(script, *flags, expect: int = 0) -> str:
    """A script as its __main__ block calls it -> stdout and stderr."""
    output, code = io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            errors.run(lambda: script.main([str(flag) for flag in flags]))
        except SystemExit as end:
            code = end.code
    assert code == expect, output.getvalue()
    return output.getvalue()


def picture(path: Path, box=BOX, size=SIZE, orientation: int = 1) -> Path:
    """A picture STORED at size, bright in box, no two alike; lossless unless the name says .jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(str(path).encode()))
    image = Image.fromarray(rng.integers(0, 40, size[::-1], np.uint8))
    image.paste(220, box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)
    return path


def mask(path: Path, *boxes, size=SIZE, orientation: int = 1, value: int = 255, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, 0)
    for box in boxes:
        image.paste(value, box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def read(path: Path) -> list[dict]:
    """The records of a file, after the loader of training has taken them."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    samples = load_jsonl(path, outside=True)
    assert [s.box for s in samples] == [tuple(r["bbox"]) for r in records]
    assert [s.size for s in samples] == [(r["width"], r["height"]) for r in records]
    return records


def boxes(path: Path) -> list[tuple]:
    return [tuple(record["bbox"]) for record in read(path)]


def bright(path: Path) -> None:
    """Every box of a file holds the bright pixels of its picture as displayed, all of them and no other."""
    for sample in load_jsonl(path):
        image, (x1, y1, x2, y2) = load(sample)
        inside = np.asarray(image.convert("L")) > 120
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x1, y1, x2, y2), sample.source


def write_coco(path: Path, images: list, annotations: list, classes=("lesion", "nodule")) -> Path:
    """images: (file name, width, height); annotations: (number of the image, class number, [x, y, w, h], **more)."""
    whole = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, w, h) in enumerate(images)],
        "annotations": [
            {"id": i, "image_id": a[0], "category_id": a[1], "bbox": a[2]} | (a[3] if len(a) > 3 else {})
            for i, a in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    return path


def xywh(box) -> list:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def one_coco(tmp_path, *annotations, **options) -> Path:
    """A folder with one picture and its annotations."""
    picture(tmp_path / "a.png", **options)
    return write_coco(tmp_path / "coco.json", [("a.png", *SIZE)], list(annotations))


# ---------------------------------------------------------------- masks


def flood(mask: np.ndarray) -> tuple[list, list]:
    """Brute force: boxes and pixel counts of the 8-connected parts, in reading order."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found, areas = [], []
    for start in sorted(left):
        if start not in left:
            continue
        left.discard(start)
        part, todo = [], [start]
        while todo:
            y, x = todo.pop()
            part.append((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.discard(near)
                    todo.append(near)
        ys, xs = zip(*part, strict=True)
        found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        areas.append(len(part))
    return found, areas


def assert_parts(mask: np.ndarray) -> None:
    found, areas = components(mask)
    assert (list(map(tuple, found.tolist())), areas.tolist()) == flood(mask)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_parts_are_those_of_a_flood_fill(height, width, density, seed):
    assert_parts(np.random.default_rng(seed).random((height, width)) < density)


def test_parts_of_shapes_that_are_easy_to_get_wrong():
    spiral = np.zeros((41, 41), bool)
    y, x, dy, dx = 0, 0, 0, 1
    spiral[0, 0] = True
    for _ in range(900):  # one long part whose runs meet again and again
        ahead = y + 2 * dy, x + 2 * dx
        if not (0 <= y + dy < 41 and 0 <= x + dx < 41) or (min(ahead) >= 0 and max(ahead) < 41 and spiral[ahead]):
            dy, dx = dx, -dy
        if spiral[(y + dy) % 41, (x + dx) % 41]:
            break
        y, x = y + dy, x + dx
        spiral[y, x] = True
    comb = np.zeros((9, 33), bool)
    comb[:8, ::2], comb[8] = True, True  # sixteen teeth that meet in the last row only
    rows = np.zeros((3, 6), bool)
    rows[0, 5], rows[1, 0] = True, True  # the end of a row does not touch the beginning of the next
    for case in (spiral, comb, comb[::-1], rows, np.eye(9, dtype=bool), np.eye(9, dtype=bool)[::-1]):
        assert_parts(case)
        assert_parts(case.T)
    assert len(components(spiral)[1]) == len(components(comb)[1]) == 1
    assert components(np.zeros((4, 5), bool))[0].shape == (0, 4)
    assert components(np.ones((4, 5), bool))[0].tolist() == [[0, 0, 5, 4]]


def ellipses(tmp_path, count: int = 40):
    """JPEG masks of ellipses, with the boxes before compression."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image, (w, h) = Image.new("L", (160, 120)), rng.integers(15, 60, 2)
        x, y = rng.integers(2, 160 - w - 2), rng.integers(2, 120 - h - 2)
        ImageDraw.Draw(image).ellipse((int(x), int(y), int(x + w), int(y + h)), fill=255)
        image.save(tmp_path / f"{i}.jpg")
        yield tmp_path / f"{i}.jpg", image.getbbox()


def test_jpeg_masks_keep_their_box(tmp_path):
    """And the two readings that one finds elsewhere do not, or this test could not fail."""
    moved = {"divided by the maximum": 0, "above 0": 0}
    for file, want in ellipses(tmp_path):
        assert mask_box(file, 127, "largest")[0] == mask_box(file, 127, "union")[0] == want
        gray = np.asarray(Image.open(file))
        moved["divided by the maximum"] += Image.fromarray((gray / gray.max()).astype(np.uint8)).getbbox() != want
        moved["above 0"] += Image.fromarray(gray).getbbox() != want
    assert min(moved.values()) >= 4, moved


def test_the_largest_part_the_box_of_all_or_none(tmp_path):
    small, large, equal = (1, 1, 3, 3), (20, 10, 40, 30), (44, 20, 64, 40)
    parts = mask(tmp_path / "parts.png", small, large)
    assert mask_box(parts, 127, "largest") == (large, 2, SIZE)
    assert mask_box(parts, 127, "union") == ((1, 1, 40, 30), 2, SIZE)
    assert mask_box(parts, 127, "drop") == (None, 2, SIZE)
    assert mask_box(mask(tmp_path / "one.png", large), 127, "drop") == (large, 1, SIZE)
    assert mask_box(mask(tmp_path / "tie.png", large, equal), 127, "largest")[0] == large  # the first of equal ones
    line = Image.open(mask(tmp_path / "line.png", (45, 2, 55, 12)))
    ImageDraw.Draw(line).line((0, 0, 39, 39), fill=255)  # the largest by its box, not by its 40 pixels
    line.save(tmp_path / "line.png")
    assert mask_box(tmp_path / "line.png", 127, "largest") == ((45, 2, 55, 12), 2, SIZE)


def test_boxes_are_half_open_to_the_last_pixel(tmp_path):
    assert mask_box(mask(tmp_path / "a.png", (63, 47, 64, 48)), 127, "largest")[0] == (63, 47, 64, 48)
    assert mask_box(mask(tmp_path / "b.png", (0, 0, *SIZE)), 127, "largest")[0] == (0, 0, 64, 48)


def test_masks_of_other_kinds(tmp_path):
    assert mask_box(mask(tmp_path / "bits.png", BOX, mode="1"), 127, "largest")[0] == BOX
    assert mask_box(mask(tmp_path / "rgb.png", BOX, mode="RGB", value=(255, 255, 255)), 127, "largest")[0] == BOX
    deep = np.zeros((48, 64), np.uint16)
    deep[8:28, 10:30], deep[0, 0] = 700, 600  # 8 bits hold neither
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert mask_box(tmp_path / "deep.png", 650, "largest")[0] == BOX
    for value in (1, 127):
        dim = mask(tmp_path / "dim.png", BOX, value=value)
        with pytest.raises(
            InputError, match=f"dim.png: its largest value is {value}, --threshold is 127; --threshold 0"
        ):
            mask_box(dim, 127, "largest")
    assert mask_box(dim, 0, "largest")[0] == mask_box(dim, 126, "largest")[0] == BOX
    palette = mask(tmp_path / "palette.png", BOX, mode="P", value=1)
    image = Image.open(palette)
    image.putpalette([0, 0, 0, 128, 0, 0])  # as PASCAL colours its first class
    image.save(palette)
    with pytest.raises(InputError, match="palette.png: its largest value is 38"):
        mask_box(palette, 127, "largest")
    assert mask_box(palette, 0, "largest")[0] == BOX


def pairs(tmp_path, **masks_of):
    for name, parts in masks_of.items():
        picture(tmp_path / "images" / f"{name}.png")
        mask(tmp_path / "masks" / f"{name}_mask.png", *parts)
    return ["--source", tmp_path, "--images", "images/*.png", "--masks", "masks/*_mask.png", "--query", "the polyp"]


def test_empty_masks_and_parts_are_counted(tmp_path):
    flags = pairs(tmp_path, a=[BOX], b=[], c=[(0, 0, 2, 2), BOX], d=[])
    said = run(masks, *flags)
    assert "left out, the mask is empty: 2 (masks/b_mask.png, masks/d_mask.png)" in said
    assert "the mask has several parts: the largest is taken: 1 (masks/c_mask.png)" in said
    assert boxes(tmp_path / "all.jsonl") == [BOX, BOX] and "all.jsonl: 2 records of 2 pictures" in said
    assert "the box is around all of them: 1" in run(masks, *flags, "--component", "union", "--overwrite")
    assert boxes(tmp_path / "all.jsonl") == [BOX, (0, 0, 30, 28)]
    assert "several parts: left out: 1" in run(masks, *flags, "--component", "drop", "--overwrite")
    assert boxes(tmp_path / "all.jsonl") == [BOX]
    assert "no record came out" in run(masks, *pairs(tmp_path / "none", a=[]), expect=2)
    assert not list((tmp_path / "none").glob("*.jsonl"))


def test_thresholds_are_a_flag(tmp_path):
    picture(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "a.png", BOX, value=1)
    flags = ["--source", tmp_path, "--images", "images/*", "--masks", "masks/*", "--query", "it"]
    assert "a.png: its largest value is 1, --threshold is 127; --threshold 0 suits" in run(masks, *flags, expect=2)
    run(masks, *flags, "--threshold", 0)
    assert boxes(tmp_path / "all.jsonl") == [BOX]


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_turn_with_the_picture(tmp_path, orientation):
    """Oracle: Pillow's exif_transpose, by way of the loader."""
    stored = picture(tmp_path / "a.png", orientation=orientation)
    assert size_and_orientation(stored) == (SIZE if orientation < 5 else SIZE[::-1], orientation)
    box = as_displayed(BOX, orientation, SIZE)
    size, _ = size_and_orientation(stored)
    record = {"image": "a.png", "query": "it", "bbox": box, "width": size[0], "height": size[1]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    bright(tmp_path / "a.jsonl")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_coco_boxes_of_turned_pictures(tmp_path, orientation, frame):
    """The stated size tells the frame where the sides are exchanged, and only there; --frame says it elsewhere."""
    picture(tmp_path / "a.png", orientation=orientation)
    turned = frame == "displayed" and orientation > 1
    box = as_displayed(BOX, orientation, SIZE) if turned else BOX
    size = SIZE[::-1] if frame == "displayed" and orientation > 4 else SIZE
    file = write_coco(tmp_path / "coco.json", [("a.png", *size)], [(0, 0, xywh(box))])
    if 2 <= orientation <= 4:
        said = run(coco, "--source", file, expect=2)
        assert f"EXIF turns the picture (orientation {orientation}) and no size tells" in said and "--overlay" in said
        said = run(coco, "--source", file, "--frame", frame)
    else:
        said = run(coco, "--source", file)
    assert ("turned, the box was drawn in the picture as stored: 1" in said) == (frame == "stored" and orientation > 1)
    bright(tmp_path / "all.jsonl")


def test_a_size_that_is_neither_or_not_the_wished_one_is_refused(tmp_path):
    picture(tmp_path / "a.png", orientation=6)
    for stated, flags, why in [
        ((128, 96), (), "its box is of a picture of 128x96, the file is 48x64: it was resized or turned after"),
        (
            SIZE,
            ("--frame", "displayed"),
            "its box is of a picture of 64x48, which it is not as displayed; --frame auto",
        ),
        (
            SIZE[::-1],
            ("--frame", "stored"),
            "its box is of a picture of 48x64, which it is not as stored; --frame auto",
        ),
    ]:
        file = write_coco(tmp_path / "coco.json", [("a.png", *stated)], [(0, 0, xywh(BOX))])
        said = run(coco, "--source", file, *flags, expect=2)
        assert f"error: {file} annotation 0: {why}" in said
    plain = one_coco(tmp_path / "plain", (0, 0, xywh(BOX)))
    plain.write_text(plain.read_text().replace('"width": 64', '"width": 640'))
    assert "its box is of a picture of 640x48, the file is 64x48" in run(coco, "--source", plain, expect=2)


def test_a_square_picture_tells_nothing(tmp_path):
    picture(tmp_path / "a.png", size=(64, 64), orientation=6)
    file = write_coco(tmp_path / "coco.json", [("a.png", 64, 64)], [(0, 0, xywh(BOX))])
    assert "(orientation 6) and no size tells" in run(coco, "--source", file, expect=2)
    run(coco, "--source", file, "--frame", "stored")
    bright(tmp_path / "all.jsonl")


@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_masks_of_a_turned_picture(tmp_path, frame):
    """A mask without EXIF is in the frame whose size it has; one with EXIF turns like its picture."""
    picture(tmp_path / "images" / "a.png", orientation=8)
    picture(tmp_path / "images" / "b.png", orientation=8)
    if frame == "stored":
        mask(tmp_path / "masks" / "a_mask.png", BOX)
    else:
        mask(tmp_path / "masks" / "a_mask.png", as_displayed(BOX, 8, SIZE), size=SIZE[::-1])
    mask(tmp_path / "masks" / "b_mask.png", BOX, orientation=8)
    said = run(masks, *pairs(tmp_path))
    assert ("as stored: 1" in said) == (frame == "stored")
    bright(tmp_path / "all.jsonl")
    mask(tmp_path / "masks" / "a_mask.png", BOX, size=(65, 48))
    assert "its box is of a picture of 65x48, the file is 48x64" in run(
        masks, *pairs(tmp_path), "--overwrite", expect=2
    )


# ---------------------------------------------------------------- objects


def test_one_phrase_for_several_objects_is_left_out_or_kept(tmp_path):
    other = (40, 10, 50, 20)
    file = one_coco(tmp_path, (0, 0, xywh(BOX)), (0, 0, xywh(other)), (0, 1, [1, 2, 3, 4]))
    said = run(coco, "--source", file)
    assert "left out, one phrase for several objects (--all keeps them): 1 (a.png: the lesion)" in said
    assert [(r["query"], r["bbox"]) for r in read(tmp_path / "all.jsonl")] == [("the nodule", [1, 2, 4, 6])]
    run(coco, "--source", file, "--all", "--overwrite")
    assert boxes(tmp_path / "all.jsonl") == [BOX, other, (1, 2, 4, 6)]
    # what counts is the phrase: two classes that --query gives one phrase are two objects of it
    file = one_coco(tmp_path / "two", (0, 0, [1, 2, 3, 4]), (0, 1, [5, 6, 7, 8]))
    said = run(coco, "--source", file, "--query", "it", expect=2)
    assert "one phrase for several objects (--all keeps them): 1 (a.png: it)" in said


def test_the_same_record_twice_is_one(tmp_path):
    file = one_coco(tmp_path, (0, 0, xywh(BOX)), (0, 0, [10.001, 8, 20, 20]))
    assert "left out, the same record again: 1 (coco.json annotation 1)" in run(coco, "--source", file)
    assert boxes(tmp_path / "all.jsonl") == [BOX]


def test_a_crowd_is_no_object_but_makes_its_phrase_ambiguous(tmp_path):
    crowd = (0, 0, [0, 0, 60, 40], {"iscrowd": 1})
    file = one_coco(tmp_path, (0, 0, xywh(BOX)), crowd, (0, 1, [1, 2, 3, 4]))
    assert "one phrase for several objects" in run(coco, "--source", file)
    assert boxes(tmp_path / "all.jsonl") == [(1, 2, 4, 6)]
    assert "left out, a crowd in one box: 1 (coco.json annotation 1)" in run(coco, "--source", file, "--overwrite")
    assert "left out, a crowd in one box: 1 (" in run(coco, "--source", file, "--all", "--overwrite")
    assert boxes(tmp_path / "all.jsonl") == [BOX, (1, 2, 4, 6)]
    assert "a crowd in one box: 1" in run(coco, "--source", one_coco(tmp_path / "b", crowd), expect=2)


@pytest.mark.parametrize("box", [[10, 8, 0, 20], [10, 8, 20, 0.9], [10, 8, -5, 20], [64, 8, 1, 20], [-0.5, 8, 1, 20]])
def test_degenerate_boxes_are_counted_and_no_object(tmp_path, box):
    """A slip of the mouse makes such a box, so that the other object of its phrase is still the only one."""
    said = run(coco, "--source", one_coco(tmp_path, (0, 0, xywh(BOX)), (0, 0, box)))
    assert "left out, the box is less than a pixel wide or high: 1 (coco.json annotation 1)" in said
    assert boxes(tmp_path / "all.jsonl") == [BOX]


def test_a_pixel_beyond_the_edge_is_cut_and_said_and_more_is_refused(tmp_path):
    said = run(coco, "--source", one_coco(tmp_path, (0, 0, [-0.5, 8, 65.5, 40.7])))
    assert "cut at the picture's edge, by a pixel at most: 1" in said
    assert boxes(tmp_path / "all.jsonl") == [(0, 8, 64, 48)]
    assert "cut" not in run(coco, "--source", one_coco(tmp_path, (0, 0, [10, 8, 54.004, 40])), "--overwrite")
    assert boxes(tmp_path / "all.jsonl") == [(10, 8, 64, 48)]
    file = one_coco(tmp_path, (0, 0, [10, 8, 55.5, 20]))
    said = run(coco, "--source", file, "--overwrite", expect=2)
    assert f"{file} annotation 0: its box [10.0, 8.0, 65.5, 28.0] reaches 1.5 pixels out of the 64x48 picture" in said
    for number in ("NaN", "Infinity", "1e999"):
        file.write_text(file.read_text().replace("55.5", number))
        assert "must be four finite numbers" in run(coco, "--source", file, "--overwrite", expect=2)
        file.write_text(file.read_text().replace(number, "55.5"))


@pytest.mark.parametrize("script", [coco, voc, yolo, vlm_r1])
def test_boxes_over_the_edge_are_cut_and_counted_where_that_is_asked_for(tmp_path, script):
    """Of a, b and c; d's box lies outside, so that there is nothing to cut."""
    wide = {"a": (-10, -5, 40, 35), "b": (50, 40, 90, 80), "c": BOX, "d": (70, 8, 90, 28)}
    source = tmp_path
    for name, box in wide.items():
        picture(tmp_path / "images" / f"{name}.png")
        xml(tmp_path / "v" / f"{name}.xml", f"{name}.png", ("it", *box))
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{name}.txt").write_text(f"0 {shares(box)}")
    if script is coco:
        objects = [(i, 0, xywh(box)) for i, box in enumerate(wide.values())]
        write_coco(tmp_path / "coco.json", [(f"images/{name}.png", *SIZE) for name in wide], objects)
    elif script is yolo:
        (tmp_path / "data.yaml").write_text("val: images\nnames: [it]")
    elif script is vlm_r1:
        records = [{"image": f"images/{name}.png", "problem": "it", "solution": box} for name, box in wide.items()]
        source = tmp_path / "rec.json"
        source.write_text(json.dumps(records))
    flags = ["--source", source, "--skip-bad", 1]
    said = run(script, *flags, expect=2)
    assert "outside the 64x48 image" in said if script is vlm_r1 else "pixels out of the 64x48 picture" in said
    said = run(script, *flags, "--clip")
    assert said.count("left out: ") == 1 and ("lies outside" in said or "has nothing inside the 64x48 picture" in said)
    assert re.search(r"clipped at the picture's edge.*: 2 \(", said)
    found = boxes(tmp_path / ("val.jsonl" if script is yolo else "all.jsonl"))
    assert found == [(0, 0, 40, 35), (50, 40, 64, 48), BOX]


def test_a_box_is_cut_in_the_frame_that_it_was_drawn_in(tmp_path):
    picture(tmp_path / "a.png", (50, 8, 64, 28), orientation=6)
    file = write_coco(tmp_path / "coco.json", [("a.png", *SIZE)], [(0, 0, [50, 8, 400, 20])])
    assert "clipped at the picture's edge (--clip): 1 (coco.json annotation 0)" in run(coco, "--source", file, "--clip")
    bright(tmp_path / "all.jsonl")


def test_what_a_cut_leaves_of_a_box_may_be_too_little(tmp_path):
    file = one_coco(tmp_path, (0, 0, [63.5, 8, 50, 20]), (0, 0, xywh(BOX)))
    said = run(coco, "--source", file, "--clip")
    assert "less than a pixel wide or high: 1 (coco.json annotation 0)" in said and "edge (--clip): 1 (" in said
    assert boxes(tmp_path / "all.jsonl") == [BOX]


# ---------------------------------------------------------------- faults


def damaged(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "text.jpg", "gone.png"])
def test_a_damaged_picture_is_named_and_skipped_as_the_flag_says(tmp_path, name):
    """cut: the header is whole, so that only decoding finds it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8))
    for good in ("a.jpg", "b.jpg", name):
        noise.save(tmp_path / good)
    bad = tmp_path / name
    if name == "gone.png":
        bad.unlink()
    elif name == "text.jpg":
        bad.write_text("this is no picture")
    else:
        damaged(bad, 0.7)
        assert size_and_orientation(bad)[0] == SIZE
    images = [(file, *SIZE) for file in ("a.jpg", name, "b.jpg")]
    file = write_coco(tmp_path / "coco.json", images, [(i, c, xywh(BOX)) for i in range(3) for c in range(2)])
    said = run(coco, "--source", file, expect=2)
    assert f"{bad} is not there" in said if name == "gone.png" else f"/{name} cannot be read" in said
    assert "--skip-bad N leaves up to N such records out" in said and not list(tmp_path.glob("*.jsonl"))
    said = run(coco, "--source", file, "--skip-bad", 1)
    assert said.count("left out: ") == 1 and f"/{name}" in said  # one fault, whatever the number of its objects
    assert [r["image"] for r in read(tmp_path / "all.jsonl")] == ["a.jpg", "a.jpg", "b.jpg", "b.jpg"]


def test_a_damaged_or_missing_mask_is_named(tmp_path):
    flags = pairs(tmp_path, a=[BOX], b=[BOX])
    damaged(tmp_path / "masks" / "b_mask.png", 0.7)
    assert "b_mask.png cannot be read" in run(masks, *flags, expect=2)
    run(masks, *flags, "--skip-bad", 1)
    assert len(read(tmp_path / "all.jsonl")) == 1
    (tmp_path / "masks" / "b_mask.png").unlink()
    said = run(masks, *flags, expect=2)
    assert f"{tmp_path}/images/b.png: has no mask; * would stand for 'b'" in said
    mask(tmp_path / "masks" / "c_mask.png", BOX)
    assert "bad record number 2, --skip-bad allows 1" in run(masks, *flags, "--skip-bad", 1, expect=2)
    said = run(masks, *flags, "--skip-bad", 2, "--overwrite")
    assert "c_mask.png: has no picture; * would stand for 'c'" in said


def test_a_picture_is_used_as_a_whole_or_not_at_all(tmp_path):
    """With an object that cannot be read left out, the other one would pass for the only one of its phrase."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    objects = [(0, 0, xywh(BOX)), (0, 0, [10, 8, 500, 20]), (1, 0, xywh(BOX))]
    file = write_coco(tmp_path / "coco.json", [("a.png", *SIZE), ("b.png", *SIZE)], objects)
    run(coco, "--source", file, "--skip-bad", 1)
    assert [r["image"] for r in read(tmp_path / "all.jsonl")] == ["b.png"]


def test_counts_are_those_of_the_pictures_that_are_used(tmp_path):
    objects = [(0, 0, [10, 8, 0, 0]), (0, 0, [10, 8, 500, 20]), (1, 0, xywh(BOX))]
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    file = write_coco(tmp_path / "coco.json", [("a.png", *SIZE), ("b.png", *SIZE)], objects)
    assert "less than a pixel" not in run(coco, "--source", file, "--skip-bad", 1)


HAM_CSV, LETTERS = "HAM10000_metadata.csv", b"m" * 200_000  # more than csv takes for a field
NASTY = "\r\x1b[2J\x1b[31mX\x1b]0;title\x07\nsecond\u202e\x9b"


def nasty_coco(folder: Path, name: str) -> list:
    objects = [(0, 0, xywh(BOX)), (0, 0, [1, 2, 3, 4]), (0, 1, [1, 2, 300, 4], {"id": name})]
    picture(folder / f"{name[:40]}.png")
    file = write_coco(folder / "coco.json", [(f"{name[:40]}.png", *SIZE), (name, 9, 9)], objects, [name, f"{name}2"])
    whole = json.loads(file.read_text())
    whole["images"][1] |= {"id": name}
    whole["annotations"].append({"id": name, "image_id": name, "category_id": 0, "bbox": [name] * 4})
    whole["annotations"].append({"id": name, "image_id": f"{name}2"})
    file.write_text(json.dumps(whole))
    (folder / "q.json").write_text("{}")
    return [["--skip-bad", n, *query] for n in range(4) for query in ([], ["--query", folder / "q.json"])]


def nasty_voc(folder: Path, name: str) -> list:
    """XML cannot hold control characters, but names of files can, and letters that turn the line around."""
    short = name[:40]
    picture(folder / f"{short}.png")
    xml(folder / f"{short}.xml", name[-9:-7] * 10**5, (f"\u202e\n{name[-9:-7] * 10**5}", *BOX), ("a\u2028", 1, 2, 3, 4))
    xml(folder / f"{short}2.xml", "\u202e", ("it", *BOX))
    xml(folder / f"{short}3.xml", f"{short[-1]}\u202e" * 10**5, ("it", 1, "\u202e\n" * 10**5, 3, 4))
    return [["--skip-bad", n] for n in range(4)]


def nasty_yolo(folder: Path, name: str) -> list:
    short = name[:40]
    picture(folder / "images" / f"{short}.png")
    picture(folder / "images" / "b.png")
    names = name.replace("\n", "").replace("'", "")
    (folder / "labels").mkdir()
    (folder / "labels" / f"{short}.txt").write_text(f"0 {shares(BOX)}\n1 {shares(BOX)}\n1 .1 .1 .1 .1")
    (folder / "labels" / f"{short}2.txt").write_text(f"0 {shares(BOX)}")
    (folder / "labels" / "b.txt").write_text(f"0 {name}")
    (folder / "data.yaml").write_text(f"train: images\nnames: ['{names}', '{names}2']\nval: {names}")
    (folder / "list.yaml").write_text(f"train: images\nnames: ['{names}', '{names}2']\nval: list.txt")
    (folder / "list.txt").write_text(f"../{name}")
    (folder / "good.yaml").write_text(f"train: images\nnames: ['{names}', '{names}2']\n{names}: a")
    return [
        ["--source", folder / f, "--skip-bad", n] for f in ("data.yaml", "list.yaml", "good.yaml") for n in range(4)
    ]


def nasty_ham(folder: Path, name: str) -> list:
    ham_folder(folder, 2)
    rows = [
        ["ISIC_0000000", name[:9], name],
        ["ISIC_0000001", "L", "nv"],
        [name, name, name],
        ["I", "L" * 200_000, "nv"],
    ]
    lines = [["image_id", "lesion_id", "dx"], *rows]
    with open(folder / "HAM10000_metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    picture(folder / f"{name[:40]}.jpg")
    flags = ["--val", 0, "--test", 0, "--query", "{class}"]
    return [[*flags, "--skip-bad", n] for n in range(9)]


def nasty_masks(folder: Path, name: str) -> list:
    pairs(folder, **{name[:40]: [(0, 0, 2, 2), BOX], f"{name[:40]}2": []})
    picture(folder / "images" / f"{name[:40]}3.png")
    mask(folder / "masks" / f"{name[:40]}4_mask.png", BOX)
    flags = ["--images", "images/*.png", "--masks", "masks/*_mask.png", "--query", "the {folder}"]
    return [[*flags, "--skip-bad", n] for n in range(4)]


def nasty_vlm_r1(folder: Path, name: str) -> list:
    picture(folder / f"{name[:40]}.png")
    good = {"image": f"{name[:40]}.png", "problem": name[:5000], "solution": BOX}
    bad = [{"image": name}, {"solution": name}, {name: name}, {"solution": [name]}, {"dataset": [name]}]
    (folder / "rec.jsonl").write_text("".join(json.dumps(good | some) + "\n" for some in [{}, *bad]))
    return [["--source", folder / "rec.jsonl", "--skip-bad", n] for n in range(6)]


@pytest.mark.parametrize("name", [NASTY, f"{NASTY}'\"{NASTY * 2000}"], ids=["short", "long"])
@pytest.mark.parametrize(
    "script, make",
    [(coco, nasty_coco), (voc, nasty_voc), (yolo, nasty_yolo), (ham10000, nasty_ham), (masks, nasty_masks)]
    + [(vlm_r1, nasty_vlm_r1)],
)
def test_names_of_others_reach_the_terminal_as_printable_text_of_bounded_length(tmp_path, script, make, name):
    """Wherever a name stands: each run is one sentence or a list of them, and some of them come through."""
    ends = []
    for flags in make(tmp_path / "set", name):
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            try:
                errors.run(
                    lambda flags=flags: script.main(
                        ["--source", str(tmp_path / "set"), *map(str, flags), "--overwrite"]
                    )
                )
                ends.append(0)
            except SystemExit as end:
                ends.append(end.code)
        lines = [line for line in output.getvalue().split("\n") if line and not line.startswith("\rpictures")]
        assert lines and all(line.isprintable() and len(line) < 2100 for line in lines), lines
        known = r"error: |left out|not used|.*: \d+ records of|the mask has|clipped|image paths|.*: no record$"
        assert all(re.match(known, line) for line in lines), lines
    assert set(ends) <= {0, 2} and 2 in ends


def test_an_id_or_a_message_of_a_megabyte_is_cut(tmp_path):
    assert common.plain("a\x1bb\nc") == r"a\x1bb\nc" and common.plain(r"a\x1b 'ä'") == r"a\x1b 'ä'"
    long = common.plain("begin" + "x" * 10**6 + "remedy")
    assert len(long) < 2000 and long.startswith("begin") and long.endswith("remedy")


@pytest.mark.parametrize(
    "script, name, content, why",
    [
        (
            voc,
            "a.xml",
            b'<?xml version="1.0" encoding="foo"?><annotation/>',
            "is not XML that can be read .unknown encoding: foo",
        ),
        (voc, "a.xml", b'<?xml version="1.0" encoding="rot13"?><annotation/>', "is not XML that can be read"),
        (voc, "a.xml", b'<?xml version="1.0" encoding="utf-7"?><annotation/>', "a.xml: "),
        (voc, "a.xml", b'<?xml version="1.0" encoding="base64"?><annotation/>', "is not XML that can be read"),
        (voc, "a.xml", b'<?xml version="1.0" encoding="undefined"?><annotation/>', "is not XML that can be read"),
        (voc, "a.xml", b'<?xml version="1.0" encoding="gb2312"?><annotation/>', "is not XML that can be read"),
        (voc, "a.xml", b"<a>" * 10**5, "is not XML that can be read"),
        (
            voc,
            "a.xml",
            b"<annotation><filename>" + b"a" * 5000 + b"</filename></annotation>",
            "no picture .*aaa is bes",
        ),
        (voc, "a.xml", b"", "is not XML that can be read .no element found"),
        (coco, "a.json", b"[" * 10**5, "a.json: is not valid JSON .maximum recursion"),
        (coco, "a.json", b"\xff", "a.json: cannot be read .'utf-8'"),
        (coco, "a.json", b"9" * 5000, "a.json: is not valid JSON .Exceeds the limit"),
        (yolo, "data.yaml", b"names:\n  \xc2\xb2: a", "'\xb2: a' is not a new class number"),
        (yolo, "data.yaml", b"names:\n  " + b"9" * 5000 + b": a", "is not a new class number"),
        (yolo, "data.yaml", b"names: [a]\ntrain: " + b"a" * 5000, "data.yaml: train: .*aaa is not there"),
        (yolo, "data.yaml", b"names: [a]\npath: " + b"a" * 5000 + b"\ntrain: \0", r"train: .x00 is not there"),
        (yolo, "data.yaml", b"names: [a]\nnc: " + b"9" * 5000, "nc is .*999, but names has 1 classes"),
        (ham10000, HAM_CSV, b"lesion_id,image_id,dx\nL,I," + LETTERS, "csv:2: cannot be read .field la"),
        (ham10000, HAM_CSV, b"lesion_id," + LETTERS, "csv:1: cannot be read .field larger than"),
        (ham10000, HAM_CSV, b"x," * 50_000, "csv:1: column 'dx' is missing; it has "),
        (ham10000, HAM_CSV, b'lesion_id,image_id,dx\n"' + b"L\n" * 140_000, "csv:.*(.field larger|.jpg is not)"),
        (tn3k, "trainval-image/\xb2.png", b"", "trainval-image: pictures are named by number"),
        (vlm_r1, "a.json", b"[" * 10**5, "a.json: not valid JSON in UTF-8 .maximum recursion"),
    ],
)
def test_files_that_are_wrong_in_odd_ways_are_one_sentence(tmp_path, script, name, content, why):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    source = tmp_path / name if script is vlm_r1 else tmp_path
    for allowed in (0, 5):
        said = run(script, "--source", source, "--skip-bad", allowed, expect=2)
        assert re.search(f"{tmp_path}.*{why}", said), said
        assert said.count("error: ") == 1 and max(map(len, said.splitlines())) < 600


@pytest.mark.parametrize("script", [coco, yolo, vlm_r1, voc, ham10000, tn3k])
@pytest.mark.parametrize("source", ["pipe", "/dev/zero", "loop"])
def test_sources_that_never_end_are_refused(tmp_path, script, source):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = run(script, "--source", tmp_path / source, expect=2)
    assert said.startswith("error: ") and said.count("\n") == 1


def test_pipes_within_a_source_are_no_files(tmp_path):
    folder = yolo_folder(tmp_path / "y")
    (folder / "train" / "labels" / "train.txt").unlink()
    for name in ("train/labels/train.txt", "train/images/pipe.png"):
        os.mkfifo(folder / name)
    assert "nothing is marked in the picture: 1 (train/images/train.png)" in run(yolo, "--source", folder)
    (folder / "data.yaml").unlink()
    os.mkfifo(folder / "data.yaml")
    assert run(yolo, "--source", folder, expect=2) == f"error: {folder}/data.yaml: is not a file\n"
    os.mkfifo(tmp_path / "a.png")
    file = write_coco(tmp_path / "coco.json", [("a.png", *SIZE)], [(0, 0, xywh(BOX))])
    assert "a.png is not there" in run(coco, "--source", file, expect=2)


def test_one_line_too_long_for_csv_costs_one_record(tmp_path):
    rows = ham_folder(tmp_path, 3)
    write_metadata(tmp_path / "HAM10000_metadata.csv", [rows[0], rows[1] | {"age": "9" * 200_000}, *rows[2:]])
    said = run(ham10000, "--source", tmp_path, "--val", 0, "--test", 0, "--skip-bad", 1)
    assert said.count("left out: ") == 1 and "HAM10000_metadata.csv:3: cannot be read (field larger than" in said
    assert len(read(tmp_path / "all.jsonl")) == len(rows) - 1


def test_names_of_files_that_are_not_utf8_are_faults_of_their_pictures(tmp_path):
    flags = pairs(tmp_path, a=[BOX])
    for folder, end in (("images", ".png"), ("masks", "_mask.png")):
        (tmp_path / folder / f"b\udcff{end}").write_bytes((tmp_path / folder / f"a{end}").read_bytes() + b"\0")
    said = run(masks, *flags, expect=2)
    assert r"b\udcff.png' cannot be written in UTF-8; rename it" in said
    run(masks, *flags, "--skip-bad", 1)
    assert names_of(tmp_path / "all.jsonl") == ["a.png"]
    said = run(masks, *flags, "--skip-bad", 1, "--dataset", "\udcff", "--overwrite", expect=2)
    assert r"error: --dataset '\udcff' cannot be written in UTF-8" in said


# ---------------------------------------------------------------- splits


def augmented(tmp_path, where: dict[str, list[str]]) -> Path:
    """A Roboflow export: {split: names}, a COCO file in each folder."""
    for split, names in where.items():
        for name in names:
            picture(tmp_path / split / name)
        images = [(name, *SIZE) for name in names]
        objects = [(i, 0, xywh(BOX)) for i in range(len(names))]
        write_coco(tmp_path / split / "_annotations.coco.json", images, objects)
    return tmp_path


def names_of(path: Path) -> list[str]:
    return sorted(Path(record["image"]).name for record in read(path))


def test_copies_of_one_picture_in_two_splits(tmp_path):
    train, val = ["x_jpg.rf.01ab.png", "x_jpg.rf.02cd.png", "y_jpg.rf.03.png"], ["x_jpg.rf.9f.png", "z_jpg.rf.04.png"]
    folder = augmented(tmp_path, {"train": train, "valid": val})
    said = run(coco, "--source", folder, expect=2)
    assert "error: 1 pictures or copies of them are in two splits: " in said and "--leaks drop" in said
    assert "train/x_jpg.rf.01ab.png in train" in said and "valid/x_jpg.rf.9f.png in val" in said
    said = run(coco, "--source", folder, "--leaks", "drop")
    assert "left out of train, a copy is in a more held-out split (--leaks drop): 2" in said
    assert names_of(tmp_path / "train.jsonl") == ["y_jpg.rf.03.png"] and names_of(tmp_path / "val.jsonl") == sorted(val)
    said = run(coco, "--source", folder, "--leaks", "keep", "--overwrite")
    assert "kept in two splits (--leaks keep): 3 (" in said and len(read(tmp_path / "train.jsonl")) == 3
    for seed in range(6):
        run(coco, "--source", folder, "--val", 0.3, "--seed", seed, "--overwrite")
        parts = [{n.split(".rf.")[0] for n in names_of(tmp_path / f"{s}.jsonl")} for s in ("train", "val")]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == {"x_jpg", "y_jpg", "z_jpg"}


def test_files_of_equal_bytes_are_one_picture_whatever_their_names(tmp_path):
    folder = augmented(tmp_path, {"train": ["a.png", "b.png", "c.png"], "valid": ["d.png", "e.png"]})
    (folder / "valid" / "d.png").write_bytes((folder / "train" / "b.png").read_bytes())
    (folder / "valid" / "e.png").write_bytes((folder / "train" / "c.png").read_bytes()[:-1] + b"\0")  # as long only
    said = run(coco, "--source", folder, expect=2)
    assert "error: 1 pictures or copies of them are in two splits: " in said
    assert "train/b.png in train" in said and "valid/d.png in val" in said
    run(coco, "--source", folder, "--leaks", "drop", "--skip-bad", 1)
    assert names_of(tmp_path / "train.jsonl") == ["a.png", "c.png"]
    for seed in range(4):
        flags = ["--val", 0.3, "--seed", seed, "--overwrite", "--skip-bad", 1]
        run(coco, "--source", folder, *flags)
        parts = [set(names_of(tmp_path / f"{split}.jsonl")) for split in ("train", "val")]
        assert len({"b.png", "d.png"} & parts[0]) != 1, seed


@pytest.mark.parametrize("a, b, c", list(permutations(range(3))))
def test_groups_that_share_a_picture_are_one_group(tmp_path, a, b, c):
    """Lesions a and b share one, b and c another: none of their pictures may be apart, in whatever order they come."""
    lesions = {"a": a, "ab": a, "ba": b, "bc": b, "cb": c, "c": c, "other": 3}
    files = {name: picture(tmp_path / f"{name}.png") for name in lesions}
    for one, copy in (("ab", "ba"), ("bc", "cb")):
        files[copy].write_bytes(files[one].read_bytes())
    groups = common.groups_of([common.Entry(files[name], "", group=f"lesion {n}") for name, n in lesions.items()])
    assert {groups[files[name]] for name, n in lesions.items() if n < 3} == {"lesion 0"}
    assert groups[files["other"]] == "lesion 3"


def test_equal_names_in_two_folders_are_two_pictures(tmp_path):
    run(coco, "--source", augmented(tmp_path, {"train": ["0.png", "1.png"], "valid": ["0.png"], "test": ["0.png"]}))
    assert [len(read(tmp_path / f"{split}.jsonl")) for split in ("train", "val", "test")] == [2, 1, 1]


def test_new_splits_are_repeatable_and_of_the_asked_size(tmp_path):
    folder = augmented(tmp_path, {"": [f"{i}.png" for i in range(40)]})
    found = []
    for flags in ([], [], ["--seed", 1], ["--seed", 2]):
        run(coco, "--source", folder, "--val", 0.25, "--test", 0.1, "--overwrite", *flags)
        found.append([names_of(tmp_path / f"{split}.jsonl") for split in ("train", "val", "test")])
        assert list(map(len, found[-1])) == [26, 10, 4] and len(set(sum(found[-1], []))) == 40
    assert found[0] == found[1] and found[0] != found[2] != found[3]
    said = run(coco, "--source", augmented(tmp_path / "one", {"": ["0.png"]}), "--val", 0.5, expect=2)
    assert "--val 0.5 --test 0 leave nothing to train on: the pictures make 1 groups" in said
    assert "--val: must be at least 0 and below 1" in run(coco, "--source", folder, "--val", 1, expect=2)


@pytest.mark.parametrize(
    "name, split",
    {"instances_train2017": "train", "ISIC-2017_Training_Data": "train", "valid": "val", "Validation": "val"}.items()
    | {"test-image": "test", "testimony": "all", "trainval-image": "all", "train_val": "all", "IMG": "all"}.items(),
)
def test_words_that_name_a_split(name, split):
    assert common.split_of(name) == split
    assert common.split_of("IMG", name, "test") == (split if split != "all" else "test")  # the nearest that says one


# ---------------------------------------------------------------- phrases


def test_phrases_of_classes_folders_and_a_file(tmp_path):
    folder = tmp_path / "Heel_Spur"
    write_coco(folder / "train" / "x.coco.json", [("images/a.png", *SIZE)], [(0, 0, xywh(BOX))], ["Heel_Spur"])
    picture(folder / "train" / "images" / "a.png")
    (tmp_path / "q.json").write_text('{"Heel_Spur": "the heel spur, a bony outgrowth"}')
    for query, phrase in [
        ("the {class}", "the heel spur"),
        ("the {folder} of the foot", "the heel spur of the foot"),
        ("the calcaneus", "the calcaneus"),
        (tmp_path / "q.json", "the heel spur, a bony outgrowth"),
    ]:
        run(coco, "--source", folder, "--query", query, "--overwrite")
        record = read(folder / "train.jsonl")[0]
        assert (record["query"], record["dataset"]) == (phrase, "Heel_Spur")
    (tmp_path / "q.json").write_text('{"spur": "the spur"}')
    said = run(coco, "--source", folder, "--query", tmp_path / "q.json", "--overwrite", expect=2)
    assert "left out, class 'Heel_Spur' has no phrase in --query: 1" in said and "no record came out" in said
    for content, why in [
        ('["a"]', "must hold one object"),
        ('{"a": 1}', "must hold one object"),
        ("{", "not valid JSON"),
    ]:
        (tmp_path / "q.json").write_text(content)
        assert why in run(coco, "--source", folder, "--query", tmp_path / "q.json", expect=2)
    for query in ("the {klass}", "{", " "):
        assert "{class} and {folder} are the fields" in run(coco, "--source", folder, "--query", query, expect=2)


def test_acronyms_stay_and_underscores_go():
    assert [common.words(w) for w in ("WBC", "Heel_Spur", "left  Lung")] == ["WBC", "heel spur", "left lung"]


# ---------------------------------------------------------------- files


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = augmented(tmp_path, {"train": ["a.png"], "valid": ["b.png"]})
    run(coco, "--source", folder)
    before = (tmp_path / "train.jsonl").read_bytes()
    said = run(coco, "--source", folder, "--all", expect=2)
    assert f"{tmp_path}/train.jsonl is already there; name another --out, or give --overwrite" in said

    def full(path, **named):
        if "val" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return load_jsonl(path, **named)

    monkeypatch.setattr(common, "load_jsonl", full)
    said = run(coco, "--source", folder, "--overwrite", "--query", "changed", expect=2)
    assert "No space left on device" in said and "Traceback" not in said
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train", "train.jsonl", "val.jsonl", "valid"]


def test_paths_start_at_the_jsonl_also_through_links(tmp_path):
    folder = augmented(tmp_path / "data" / "größe", {"train": ["ä b.png"]})
    assert "lead out" not in run(coco, "--source", folder)
    assert read(folder / "train.jsonl")[0]["image"] == "train/ä b.png"
    assert "ä b.png" in (folder / "train.jsonl").read_text(encoding="utf-8")  # for people, too
    (folder / "train.jsonl").rename(folder.parent / "moved.jsonl")
    (folder / "train").rename(folder.parent / "train")
    assert len(read(folder.parent / "moved.jsonl")) == 1  # both together, elsewhere
    folder = augmented(tmp_path / "data", {"train": ["a.png"]})
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    said = run(coco, "--source", folder / "train", "--out", tmp_path / "link")
    assert f"image paths lead out of {tmp_path}/deep/er: train with --allow-outside, or write --out" in said
    assert read(tmp_path / "link" / "all.jsonl")[0]["image"] == "../../data/train/a.png"
    (tmp_path / "source").symlink_to(folder / "train")  # a linked source: its folder is where the paths start
    run(coco, "--source", tmp_path / "source")
    assert read(folder / "train" / "all.jsonl")[0]["image"] == "a.png"


def test_the_overlay_shows_the_boxes(tmp_path):
    file = one_coco(tmp_path, (0, 0, xywh(BOX)))
    run(coco, "--source", file, "--overlay", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    rows, columns = np.nonzero((np.abs(sheet - (40, 220, 90)) < 3).all(2))
    scale = 280 / SIZE[0]  # of a tile; above it stands a line of text, 16 pixels
    seen = [columns.min() / scale, (rows.min() - 16) / scale, (columns.max() + 1) / scale, (rows.max() - 15) / scale]
    assert np.abs(np.subtract(seen, BOX)).max() < 0.5
    assert "--overlay: must end in .png" in run(coco, "--source", file, "--overlay", "sheet", expect=2)


def test_a_source_that_is_not_there(tmp_path):
    for script in (coco, ham10000, tn3k, vlm_r1, voc, yolo):
        said = run(script, "--source", tmp_path / "none", expect=2)
        assert said == f"error: --source {tmp_path}/none: is not there\n"


def test_as_a_program(tmp_path):
    file = one_coco(tmp_path, (0, 0, xywh(BOX)))
    command = [sys.executable, "-m", "prepare.coco", "--source", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/all.jsonl: 1 records of 1 pictures\n"
    said = run(coco, "--source", file, "--al", "--nonsense", expect=2)
    assert said.startswith("error: ") and said.endswith("(python -m prepare.coco --help lists all flags)\n")


SCRIPTS = {script.__name__: script for script in (coco, ham10000, masks, tn3k, vlm_r1, voc, yolo)}


def test_the_commands_of_the_data_page_and_of_the_scripts_have_flags_that_exist(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "convert", lambda args, read: asked.append(args))
    texts = [(ROOT / "prepare" / "README.md").read_text()] + [script.__doc__ for script in SCRIPTS.values()]
    found = (re.findall(r"^ *(python -m prepare.*)", text.replace("\\\n", " "), re.M) for text in texts)
    commands = [command for some in found for command in some]
    for command in commands:
        _, _, module, *flags = shlex.split(command)
        SCRIPTS[module].main(flags)
    assert len(asked) == len(commands) >= 14 and {c.split()[2] for c in commands} == set(SCRIPTS)


# ---------------------------------------------------------------- TN3K


def tn3k_folder(tmp_path, numbers=(0, 1, 2, 5, 7, 10, 30, 100), width=0) -> Path:
    """Names with gaps and without leading zeros; the box of each tells its number."""
    for part, some in (("trainval", numbers), ("test", (0, 9, 10))):
        for n in some:
            box = (n % 20, 3, n % 20 + 20, 30)
            picture(tmp_path / f"{part}-image" / f"{n:0{width}d}.jpg", box)
            mask(tmp_path / f"{part}-mask" / f"{n:0{width}d}.jpg", box)
    write_fold(tmp_path, [0, 1, 3, 4, 6, 7], [2, 5])
    return tmp_path


def write_fold(folder: Path, train, val, fold: int = 0) -> None:
    (folder / f"tn3k-trainval-fold{fold}.json").write_text(json.dumps({"train": train, "val": val}))


def test_tn3k_folds_are_indices_into_the_files_by_number(tmp_path):
    run(tn3k, "--source", tn3k_folder(tmp_path))
    assert [r["image"] for r in read(tmp_path / "val.jsonl")] == ["trainval-image/2.jpg", "trainval-image/10.jpg"]
    assert [Path(r["image"]).stem for r in read(tmp_path / "train.jsonl")] == ["0", "1", "5", "7", "30", "100"]
    assert [r["image"] for r in read(tmp_path / "test.jsonl")] == [f"test-image/{n}.jpg" for n in (0, 9, 10)]
    for split in ("train", "val", "test"):
        bright(tmp_path / f"{split}.jsonl")
        assert {(r["query"], r["dataset"]) for r in read(tmp_path / f"{split}.jsonl")} == {
            ("the thyroid nodule", "tn3k")
        }
    write_fold(tmp_path, [2, 5, 0, 1, 3, 4], [6, 7], fold=3)
    run(tn3k, "--source", tmp_path, "--fold", 3, "--overwrite")
    assert [Path(r["image"]).stem for r in read(tmp_path / "val.jsonl")] == ["30", "100"]


@pytest.mark.parametrize(
    "train, val, why",
    [
        ([0, 1, 3, 4, 6, 7], [2, 5, 7], "picture 7 is in it twice"),
        ([0, 1, 3, 4, 6], [2, 5], "picture 7 is in neither train nor val; are all pictures unpacked?"),
        ([0, 1, 3, 4, 6, 8], [2, 5], "field 'train' must list indices of 8 pictures, 0 to 7"),
        ([0, 1, 3, 4, 6, 7], [2, -1], "field 'val' must list indices of 8 pictures"),
        ([0, True], [2], "field 'train' must list indices"),
        (["0000.jpg"], [2], "field 'train' must list indices"),
        (None, [2], "field 'train' must list indices"),
    ],
)
def test_tn3k_folds_that_do_not_fit_are_refused(tmp_path, train, val, why):
    write_fold(tn3k_folder(tmp_path), train, val)
    assert f"fold0.json: {why}" in run(tn3k, "--source", tmp_path, expect=2)


def test_tn3k_layouts_that_are_not_whole(tmp_path):
    folder = tn3k_folder(tmp_path)
    assert "fold4.json: does not exist" in run(tn3k, "--source", folder, "--fold", 4, expect=2)
    picture(folder / "trainval-image" / "x1.jpg")
    assert "trainval-image: pictures are named by number" in run(tn3k, "--source", folder, expect=2)
    said = run(tn3k, "--source", folder / "test-image", expect=2)
    assert "trainval-image: no pictures are there; --source must be the folder that holds it" in said
    (folder / "trainval-image" / "x1.jpg").unlink()
    (folder / "test-mask" / "9.jpg").unlink()
    assert f"test-image/9.jpg: the mask {folder}/test-mask/9.jpg is not there" in run(
        tn3k, "--source", folder, expect=2
    )


# ---------------------------------------------------------------- HAM10000


def ham_folder(tmp_path, lesions: int = 30, metadata: str = "HAM10000_metadata.csv") -> list[dict]:
    """Lesions of 1, 2 or 3 pictures, in two parts, with masks; the rows of the metadata."""
    rows = []
    for lesion in range(lesions):
        for _ in range(lesion % 3 + 1):
            name = f"ISIC_{len(rows):07d}"
            box = (len(rows) % 30, 5, len(rows) % 30 + 20, 25)
            picture(tmp_path / f"HAM10000_images_part_{len(rows) % 2 + 1}" / f"{name}.jpg", box)
            mask(tmp_path / "HAM10000_segmentations_lesion_tschandl" / f"{name}_segmentation.png", box)
            dx = list(ham10000.DIAGNOSES)[lesion % 7]
            rows.append({"lesion_id": f"HAM_{lesion:07d}", "image_id": name, "dx": dx, "age": ""})
    write_metadata(tmp_path / metadata, rows)
    return rows


def write_metadata(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tab" else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("metadata", ["HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata"])
def test_ham_is_split_by_lesion(tmp_path, metadata):
    rows = ham_folder(tmp_path, metadata=metadata)
    lesion_of = {row["image_id"]: row["lesion_id"] for row in rows}
    run(ham10000, "--source", tmp_path)
    parts = {}
    for split in ("train", "val", "test"):
        bright(tmp_path / f"{split}.jsonl")
        names = [Path(r["image"]).stem for r in read(tmp_path / f"{split}.jsonl")]
        parts[split] = {lesion_of[name] for name in names}
        assert sorted(names) == sorted(name for name, lesion in lesion_of.items() if lesion in parts[split])
    assert {split: len(some) for split, some in parts.items()} == {"train": 24, "val": 3, "test": 3}
    assert len(set.union(*parts.values())) == 30
    run(ham10000, "--source", tmp_path, "--query", "the {class}", "--overwrite", "--val", 0, "--test", 0)
    found = {Path(r["image"]).stem: r["query"] for r in read(tmp_path / "all.jsonl")}
    assert all(found[row["image_id"]] == f"the {ham10000.DIAGNOSES[row['dx']]}" for row in rows)


def test_ham_as_kaggle_unpacks_it(tmp_path):
    """The pictures lie twice under names that differ in case, masks one folder deeper, and there are pictures more."""
    ham_folder(tmp_path, 6)
    for part in (1, 2):
        folder = tmp_path / f"HAM10000_images_part_{part}"
        for file in folder.iterdir():
            picture(tmp_path / f"ham10000_images_part_{part}" / file.name)
    picture(tmp_path / "ISIC2018_Task3_Test_Images" / "ISIC_9999999.jpg")
    said = run(ham10000, "--source", tmp_path)
    assert "not used, a second file of that name: 12 (ham10000_images_part_1/" in said
    assert "not used, the metadata does not name the picture: 1 (ISIC2018_Task3_Test_Images/ISIC_9999999.jpg)" in said
    for split in ("train", "val", "test"):
        bright(tmp_path / f"{split}.jsonl")


def test_ham_that_is_not_whole(tmp_path):
    rows = ham_folder(tmp_path, 6)
    (tmp_path / "HAM10000_segmentations_lesion_tschandl" / "ISIC_0000003_segmentation.png").unlink()
    said = run(ham10000, "--source", tmp_path, expect=2)
    where = f"{tmp_path}/HAM10000_metadata.csv"
    assert f"error: {where}:5: ISIC_0000003_segmentation.png is not there; unpack all archives" in said
    (tmp_path / "HAM10000_images_part_2" / "ISIC_0000003.jpg").unlink()
    assert f"{where}:5: ISIC_0000003.jpg is not there" in run(ham10000, "--source", tmp_path, expect=2)
    run(ham10000, "--source", tmp_path, "--skip-bad", 1, "--val", 0, "--test", 0)
    assert len(read(tmp_path / "all.jsonl")) == len(rows) - 1
    write_metadata(tmp_path / "HAM10000_metadata.csv", [{"image_id": "ISIC_0000000", "dx": "nv"}])
    assert f"{where}:1: column 'lesion_id' is missing" in run(ham10000, "--source", tmp_path, expect=2)
    (tmp_path / "HAM10000_metadata").write_text("")
    assert f"is needed for its lesion_id, found {tmp_path}/HAM10000_metadata, {where}" in run(
        ham10000, "--source", tmp_path, expect=2
    )
    assert "found none" in run(ham10000, "--source", tmp_path / "HAM10000_images_part_1", expect=2)


# ---------------------------------------------------------------- COCO


def test_coco_pictures_elsewhere_and_files_by_name(tmp_path):
    """COCO's and FracAtlas' layouts: annotations in a folder of their own."""
    picture(tmp_path / "images" / "Fractured" / "a.png")
    write_coco(tmp_path / "annotations" / "instances_val2017.json", [("a.png", *SIZE)], [(0, 0, xywh(BOX))])
    (tmp_path / "annotations" / "captions_val2017.json").write_text("[]")
    flags = ["--source", tmp_path, "--images", tmp_path / "images" / "Fractured"]
    run(coco, *flags)
    assert read(tmp_path / "val.jsonl")[0]["image"] == "images/Fractured/a.png"
    said = run(coco, "--source", tmp_path, "--overwrite", expect=2)
    assert f"the picture {tmp_path}/annotations/a.png is not there" in said
    (tmp_path / "annotations" / "instances_val2017.json").rename(tmp_path / "annotations" / "boxes.json")
    said = run(coco, *flags, expect=2)
    assert "holds 2 JSON files, none is called ..coco.json; name the file" in said
    run(coco, "--source", tmp_path / "annotations" / "boxes.json", *flags[2:])
    assert read(tmp_path / "annotations" / "all.jsonl")[0]["image"] == "../images/Fractured/a.png"


def test_coco_files_that_are_wrong_somewhere(tmp_path):
    file = one_coco(tmp_path, (0, 0, xywh(BOX)))
    whole = json.loads(file.read_text())

    def said(change) -> str:
        changed = json.loads(json.dumps(whole))
        change(changed)
        file.write_text(json.dumps(changed))
        return run(coco, "--source", file, expect=2)

    where = f"error: {file}"
    for bad in (None, [1, 2, 3], ["1", 2, 3, "four"], "[1, 2, 3, 4]", {"x": 1}, [True, 1, 2, 3], [10**400, 1, 2, 3]):
        assert (
            f"{where} image 0: {file} annotation 0: field 'bbox' must be four finite numbers [x, y, width, height]"
            in said(lambda w, bad=bad: w["annotations"][0].update(bbox=bad))
        )
    assert "annotation 0: field 'category_id' 7 is none of 'categories'" in said(
        lambda w: w["annotations"][0].update(category_id=7)
    )
    assert f"{where} annotation 0: its 'image_id' is none of 'images'" in said(
        lambda w: w["annotations"][0].update(image_id=[9])
    )
    assert "field 'file_name' must be a text" in said(lambda w: w["images"][0].update(file_name=None))
    for key in ("images", "annotations", "categories"):
        assert "must hold 'images', 'annotations' and 'categories'" in said(lambda w, key=key: w.pop(key))
        assert "each a list of objects" in said(lambda w, key=key: w.update({key: [1]}))
    file.write_text("[]")
    assert f"{where}: must hold" in run(coco, "--source", file, expect=2)
    file.write_bytes(b"\xff")
    assert f"{where}: cannot be read" in run(coco, "--source", file, expect=2)
    whole["images"].append({"id": 1, "file_name": "unmarked.png"})
    del whole["images"][0]["width"]  # then nothing can be compared
    file.write_text(json.dumps(whole))
    assert "left out, nothing is marked in the picture: 1 (coco.json image 1)" in run(coco, "--source", file)
    bright(tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    "image, annotation",
    [
        ({}, {"image_id": 0.0, "category_id": 1.0}),
        ({"id": 7.0}, {"image_id": 7}),
        ({"id": "7"}, {"image_id": 7.0}),
        ({"id": "a 7"}, {"image_id": "a 7"}),
        ({"id": 1e300}, {"image_id": 10**300 + (int(1e300) - 10**300)}),
        ({}, {"bbox": ["10", "8", "20", "20"]}),
        ({}, {"bbox": [" 10.0", "8e0", 20.0, 20]}),
        ({"width": "64", "height": "48"}, {}),
        ({"width": 64.0, "height": 48.0}, {}),
        ({"width": None, "height": None}, {}),
        ({"width": 0, "height": 0}, {"iscrowd": "0"}),
        ({}, {"iscrowd": 0.0}),
        ({}, {"bbox": None, "segmentation": [[10, 8, "30", 8, 30, "28", 10, 28]]}),
    ],
)
def test_coco_numbers_as_other_tools_write_them(tmp_path, image, annotation):
    file = one_coco(tmp_path, (0, 1, xywh(BOX)))
    whole = json.loads(file.read_text())
    whole["images"][0] |= image
    whole["annotations"][0] |= {"image_id": image.get("id", 0)} | annotation
    file.write_text(json.dumps(whole))
    run(coco, "--source", file)
    bright(tmp_path / "all.jsonl")
    assert read(tmp_path / "all.jsonl")[0]["query"] == "the nodule"


@pytest.mark.parametrize(
    "part, change, why",
    [
        ("images", {"width": "wide"}, "fields 'width' and 'height' must be positive integers, not ['wide', 48]"),
        ("images", {"width": [64] * 10**5}, "must be positive integers, not [[64, 64,"),
        ("images", {"width": 63.5}, "must be positive integers"),
        ("images", {"height": -48}, "must be positive integers"),
        ("images", {"id": None}, "field 'id' must be a number or a text, and that of no other image"),
        ("images", {"id": [0]}, "field 'id' must be a number or a text"),
        ("images", {"file_name": "\ud800.png"}, r"the picture .*\ud800.png is not there, .* by --images"),
        ("images", {"file_name": "a" * 10**6}, "the picture .*aaa is not there"),
        ("images", {"file_name": "\0.png"}, r"\x00.png is not there"),
        ("annotations", {"image_id": float("nan")}, "its 'image_id' is none of 'images'"),
        ("annotations", {"category_id": 1.5}, "field 'category_id' 1.5 is none of 'categories'"),
        ("annotations", {"category_id": "x" * 10**6}, "xxx is none of 'categories'"),
        ("annotations", {"bbox": ["10", "8", "wide", "20"]}, "must be four finite numbers .*, not ['10', '8', 'wide'"),
        ("annotations", {"bbox": ["10", "8", "nan", "20"]}, "must be four finite numbers"),
        ("annotations", {"bbox": ["10", "8", "9" * 400, "20"]}, "must be four finite numbers"),
        ("annotations", {"bbox": []}, "not [], and there is no 'segmentation' to take it from"),
        ("annotations", {"bbox": [[[[[]]]]] * 10**4}, "must be four finite numbers"),
        ("categories", {"name": ""}, "its phrase '' has 0 characters; 1 to 10000 are possible"),
        ("categories", {"name": "x" * 10**5}, "xxx' has 100000 characters"),
        ("categories", {"name": "a\ud800"}, r"its phrase 'a\ud800' cannot be written in UTF-8; rename it"),
        ("categories", {"id": 1}, "two of 'categories' have the id 1: lesion and nodule"),
    ],
)
def test_coco_values_that_are_refused_in_one_bounded_sentence(tmp_path, part, change, why):
    file = one_coco(tmp_path, (0, 0, xywh(BOX)))
    whole = json.loads(file.read_text())
    whole[part][0] |= change
    file.write_text(json.dumps(whole))
    said = run(coco, "--source", file, "--query", "{class}", expect=2).splitlines()[-1]
    pattern = ".*".join(map(re.escape, why.split(".*")))
    assert re.match(f"error: {re.escape(str(file))}.*{pattern}", said), said
    assert len(said) < 600 and said.isprintable()
    picture(tmp_path / "b.png")
    if part != "categories" and change != {"id": None}:
        whole["images"].append({"id": 9, "file_name": "b.png"})
        whole["annotations"].append({"id": 9, "image_id": 9, "category_id": 1, "bbox": xywh(BOX)})
        file.write_text(json.dumps(whole))
        run(coco, "--source", file, "--skip-bad", 2)
        assert names_of(tmp_path / "all.jsonl") == ["b.png"]


def runs_of(mask: np.ndarray) -> list[int]:
    """The lengths of a mask's runs, column by column, of zeros first."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [1 - mask[-1, -1]]])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat))])).tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_the_box_of_runs_is_that_of_their_pixels(height, width, density, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(int)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    want = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if mask.any() else (0, 0, 0, 0)
    assert runs_box({"counts": runs_of(mask), "size": [height, width]}) == (want, (width, height))


@pytest.mark.parametrize(
    "counts, box",
    {  # what pycocotools 2.0 writes for masks of 64x48, and the box that it finds
        "X?d0l00000000000000000000000000000000000000hb1": (10, 8, 30, 28),
        "Pn0:V10Po1": (20, 0, 22, 10),
        "`7P3`e2": (5, 0, 7, 48),  # whole columns
        "X`0;]_2": (10, 0, 12, 48),  # one run, from the foot of a column to the head of the next
        "c:1" + "2" + "0" * 23 + "Y60gI" + "0" * 23 + "Vh0": None,  # cut: not as many pixels as it says
        "0PP3": (0, 0, 64, 48),
        "PP3": (0, 0, 0, 0),
        "Pa09U14M2N2N2N2N2O0O2O0O2O0O2O0000000000000000000000000001N101N101N101N2N2N2N2N3Lbd0": (11, 6, 50, 35),
    }.items(),
)
def test_compressed_runs(counts, box):
    mask = {"counts": counts, "size": [48, 64]}
    if box:
        assert runs_box(mask) == (box, SIZE)
    else:
        with pytest.raises(InputError, match="pixels, but 'size' .48, 64. has 3072"):
            runs_box(mask)


@pytest.mark.parametrize(
    "segmentation, box",
    [
        ([[10, 8, 30, 8, 30, 28, 10, 28]], BOX),
        ([10, 8, 30, 8, 30, 28, 10, 28], BOX),
        ([[10, 8, 12, 8, 12, 9], [29.5, 27, 30, 28, 29, 28]], BOX),
        ({"counts": "X?d0l00000000000000000000000000000000000000hb1", "size": [48, 64]}, BOX),
        ({"counts": [488, *[20, 28] * 19, 20, 1652], "size": [48, 64]}, BOX),
        ([[10, 8, 30, 8]], "a polygon must be three points or more [x1, y1, x2, y2, ...], not [10, 8, 30, 8]"),
        ([[10, 8, 30, 8, 30, 28, 10]], "a polygon must be three points"),
        ([[10, 8, 30, 8, 30, float("nan")]], "a polygon must be three points"),
        ([10, 8, 30, 8, 30, [28]], "a polygon must be three points"),
        (["10,8,30,28"], "a polygon must be three points"),
        ([[]], "a polygon must be three points"),
        ("X?d0", "a polygon must be three points or more [x1, y1, x2, y2, ...], not X?d0"),
        (1, "a polygon must be three points"),
        ({"counts": [3072]}, "'size' must be [height, width] of the mask, not None"),
        ({"counts": [0], "size": [0, 64]}, "'size' must be [height, width]"),
        ({"counts": [3072], "size": [48.5, 64]}, "'size' must be [height, width]"),
        ({"counts": [3072], "size": [10**9, 64]}, "'size' must be [height, width]"),
        ({"counts": [3071], "size": [48, 64]}, "'counts' are of 3071 pixels, but 'size' [48, 64] has 3072"),
        ({"counts": [3073, -1], "size": [48, 64]}, "'counts' must be lengths of runs"),
        ({"counts": [10**4000], "size": [48, 64]}, "'counts' are of "),
        ({"counts": None, "size": [48, 64]}, "'counts' must be lengths of runs"),
        ({"counts": "P?\n", "size": [48, 64]}, "'counts' is no text of pycocotools: P?\\n"),
        ({"counts": "é", "size": [48, 64]}, "'counts' is no text of pycocotools"),
        ({"counts": "o" * 10**6, "size": [48, 64]}, "'counts' is no text of pycocotools"),
        ({"counts": "X?d", "size": [48, 64]}, "'counts' ends within a number: X?d"),
        ({"counts": [2880], "size": [48, 60]}, "its mask is of 60x48, its picture of 64x48; mend 'size'"),
        (None, "field 'bbox' must be four finite numbers .*and there is no 'segmentation' to take it from"),
        ([], "there is no 'segmentation'"),
    ],
)
def test_coco_boxes_from_segmentations(tmp_path, segmentation, box):
    file = one_coco(tmp_path, (0, 0, None, {"segmentation": segmentation}))
    if isinstance(box, tuple):
        said = run(coco, "--source", file)
        assert "without bbox, the box is the extent of the segmentation: 1 (coco.json annotation 0)" in said
        bright(tmp_path / "all.jsonl")
    else:
        said = run(coco, "--source", file, expect=2)
        assert re.search("annotation 0: .*" + ".*".join(map(re.escape, box.split(".*"))), said) and len(said) < 600


def test_coco_masks_that_are_empty_or_crowds_are_counted(tmp_path):
    empty = {"segmentation": {"counts": [3072], "size": [48, 64]}}
    crowd = {"segmentation": {"counts": "Pn0:V10Po1", "size": [48, 64]}, "iscrowd": "1"}
    file = one_coco(tmp_path, (0, 0, xywh(BOX)), (0, 0, [], empty), (0, 1, None, crowd))
    said = run(coco, "--source", file)
    assert "less than a pixel wide or high: 1 (coco.json annotation 1)" in said
    assert "a crowd in one box: 1 (coco.json annotation 2)" in said and "extent of the segmentation: 2 (" in said
    bright(tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    "file, folder, split",
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "images/train2017", "train"),
        ("annotations/instances_val2017.json", "images/val", "val"),
        ("annotations/instances_val2017.json", "val", "val"),
        ("annotations/instances_val.json", "images/valid", "val"),
        ("annotations/instances_default.json", "images/default", "all"),  # CVAT
        ("annotations/instances_default.json", "images", "all"),
        ("Annotations/test.json", "test", "test"),
        ("labels/train.json", "images/train", "train"),
        ("result.json", "images", "all"),  # Label Studio
        ("train/_annotations.coco.json", "train", "train"),
        ("train/_annotations.coco.json", "train/images", "train"),
    ],
)
def test_coco_layouts(tmp_path, file, folder, split):
    """Without --images; a folder whose pictures are others, and a picture's name alone elsewhere, change nothing."""
    picture(tmp_path / folder / "a.png")
    picture(tmp_path / "other" / "a.png", (0, 0, 5, 5))
    (tmp_path / "images").mkdir(exist_ok=True)
    write_coco(tmp_path / file, [("a.png", *SIZE)], [(0, 0, xywh(BOX))])
    for source in (tmp_path, tmp_path / file):
        if source == tmp_path or file != "train/_annotations.coco.json":
            run(coco, "--source", source, "--out", tmp_path, "--overwrite", "--allow-outside")
            names = {"train": "train", "val": "val", "test": "test"}
            found = read(tmp_path / f"{names.get(split, 'all')}.jsonl")
            assert [r["image"] for r in found] == [f"{folder}/a.png"]
            bright(tmp_path / f"{split}.jsonl")
            (tmp_path / f"{split}.jsonl").unlink()


def test_coco_pictures_are_not_looked_for_above_the_source(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "images" / "a.png")
    write_coco(tmp_path / "set" / "coco.json", [("a.png", *SIZE)], [(0, 0, xywh(BOX))])
    said = run(coco, "--source", tmp_path / "set", expect=2)
    assert f"the picture {tmp_path}/set/a.png is not there" in said and "starts from by --images" in said


# ---------------------------------------------------------------- VOC


def xml(path: Path, filename: str, *objects, size=SIZE) -> Path:
    """objects: (name, xmin, ymin, xmax, ymax)."""
    things = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for n, a, b, c, d in objects
    )
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{filename}</filename>{stated}{things}</annotation>")
    return path


def voc_folder(tmp_path, *names: str) -> Path:
    for name in names:
        picture(tmp_path / "JPEGImages" / f"{name}.png")
        xml(tmp_path / "Annotations" / f"{name}.xml", f"{name}.png", ("Nodule", *BOX))
    return tmp_path


def test_voc_coordinates_are_edges_or_pascals(tmp_path):
    run(voc, "--source", voc_folder(tmp_path, "a"))
    bright(tmp_path / "all.jsonl")
    assert read(tmp_path / "all.jsonl")[0]["query"] == "the nodule"
    # the same pixels, counted from 1 with the last one included
    xml(tmp_path / "Annotations" / "a.xml", "a.png", ("Nodule", 11, 9, 30, 28))
    run(voc, "--source", tmp_path, "--one-based", "--overwrite")
    bright(tmp_path / "all.jsonl")
    xml(tmp_path / "Annotations" / "a.xml", "a.png", ("Nodule", 0, 9, 30, 28))
    said = run(voc, "--source", tmp_path, "--one-based", "--overwrite", expect=2)
    assert f"{tmp_path}/Annotations/a.xml: <object> 1 begins at 0, so pixels do not count from 1" in said


def test_voc_splits_of_lists_and_of_folders(tmp_path):
    folder = voc_folder(tmp_path, "a", "b", "c", "d")
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for name, text in {"train": "a\n", "val": "b\n\n", "trainval": "a\nb\nc\n", "Nodule_test": "a 1\nd -1\n"}.items():
        (sets / f"{name}.txt").write_text(text)
    said = run(voc, "--source", folder)
    assert "left out, in no list of ImageSets/Main: 2 (Annotations/c.xml, Annotations/d.xml)" in said
    assert names_of(folder / "train.jsonl") == ["a.png"] and names_of(folder / "val.jsonl") == ["b.png"]
    for split in ("train", "valid"):  # Roboflow: pictures and annotations side by side
        picture(tmp_path / "r" / split / f"{split}.png")
        xml(tmp_path / "r" / split / f"{split}.xml", f"{split}.png", ("Nodule", *BOX))
    run(voc, "--source", tmp_path / "r")
    assert names_of(tmp_path / "r" / "val.jsonl") == ["valid.png"]


def test_voc_pairs_by_name_and_says_so_if_two_names_disagree(tmp_path):
    folder = voc_folder(tmp_path, "a", "b")
    xml(folder / "Annotations" / "a.xml", "C:\\elsewhere\\A0.jpg", ("Nodule", *BOX))  # the file's own name stands
    xml(folder / "Annotations" / "c.xml", "b.png", ("Nodule", 1, 2, 3, 4))  # no c.png: what it names stands
    run(voc, "--source", folder, "--all")
    assert names_of(folder / "all.jsonl") == ["a.png", "b.png", "b.png"]
    xml(folder / "Annotations" / "a.xml", "b.png", ("Nodule", *BOX))
    said = run(voc, "--source", folder, "--overwrite", expect=2)
    assert "a.xml: its <filename> is b.png, its own name tells of a.png, and both are there" in said
    xml(folder / "Annotations" / "a.xml", "a.png")
    xml(folder / "Annotations" / "d.xml", "e.png", ("Nodule", *BOX))
    said = run(voc, "--source", folder, "--overwrite", expect=2)
    assert "d.xml: no picture e.png is beside it, in JPEGImages or in images" in said
    said = run(voc, "--source", folder, "--overwrite", "--skip-bad", 1, "--all")
    assert "left out, nothing is marked in the picture: 1 (Annotations/a.xml)" in said


def test_voc_files_that_are_wrong_somewhere(tmp_path):
    folder = voc_folder(tmp_path, "a")
    file = folder / "Annotations" / "a.xml"
    whole = file.read_text()
    for old, new, why in [
        ("</annotation>", "", "is not XML that can be read"),
        ("<xmin>10</xmin>", "<xmin>ten</xmin>", "<bndbox><xmin> must be a number, not 'ten'"),
        ("<ymax>28</ymax>", "", "<bndbox><ymax> must be a number, not None"),
        ("<name>Nodule</name>", "<name> </name>", "<object> 1 has no <name>"),
        ("<width>64</width>", "<width>640</width>", "its box is of a picture of 640.0x48.0, the file is 64x48"),
        ("<width>64</width>", "<width>?</width>", "<size><width> must be a number, not '?'"),
    ]:
        file.write_text(whole.replace(old, new))
        assert why in run(voc, "--source", folder, expect=2)
    for size in (None, (0, 0)):  # some tools do not know it
        xml(file, "a.png", ("Nodule", *BOX), size=size)
        run(voc, "--source", folder, "--overwrite")
    file.unlink()
    assert "holds no .xml" in run(voc, "--source", folder, expect=2)


# ---------------------------------------------------------------- YOLO

YAML = "path: .\ntrain: train/images\nval: valid/images\nnc: 2\nnames: ['RBC', 'WBC']\n"


def shares(box, size=SIZE) -> str:
    (w, h), (x1, y1, x2, y2) = size, box
    return f"{(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}"


def yolo_folder(tmp_path, yaml: str = YAML, line: str = f"1 {shares(BOX)}\n") -> Path:
    for split in ("train", "valid"):
        picture(tmp_path / split / "images" / f"{split}.png")
        (tmp_path / split / "labels").mkdir(exist_ok=True)
        (tmp_path / split / "labels" / f"{split}.txt").write_text(line)
    (tmp_path / "data.yaml").write_text(yaml)
    return tmp_path


def test_yolo_boxes_and_polygons(tmp_path):
    """Six decimals are not pixels: rounding brings them back."""
    run(yolo, "--source", yolo_folder(tmp_path))
    for split in ("train", "val"):
        bright(tmp_path / f"{split}.jsonl")
        assert read(tmp_path / f"{split}.jsonl")[0]["query"] == "the WBC"
    x1, y1, x2, y2 = (v / side for v, side in zip(BOX, SIZE * 2, strict=True))
    for polygon in ([x1, y1, x2, y1, x2, y2, x1, y2], [x1, (y1 + y2) / 2, (x1 + x2) / 2, y1, x2, y2]):
        yolo_folder(tmp_path, line="0 " + " ".join(f"{v:.6f}" for v in polygon))
        run(yolo, "--source", tmp_path / "data.yaml", "--overwrite")
        bright(tmp_path / "val.jsonl")


def test_yolo_shares_of_a_turned_picture_need_to_be_told(tmp_path):
    folder = yolo_folder(tmp_path)
    for frame, box, size in (("stored", BOX, SIZE), ("displayed", as_displayed(BOX, 6, SIZE), SIZE[::-1])):
        picture(folder / "train" / "images" / "train.png", orientation=6)
        (folder / "train" / "labels" / "train.txt").write_text(f"1 {shares(box, size)}\n")
        said = run(yolo, "--source", folder, expect=2)
        assert f"{folder}/train/labels/train.txt:1: EXIF turns the picture (orientation 6) and no size tells" in said
        run(yolo, "--source", folder, "--frame", frame, "--overwrite")
        bright(folder / "train.jsonl")
        for file in folder.glob("*.jsonl"):
            file.unlink()


@pytest.mark.parametrize(
    "line, why",
    [
        ("2 .5 .5 .1 .1", "class 2 is none of data.yaml's names"),
        ("0.5 .5 .5 .1 .1", "class 0.5 is none of"),
        ("nan .5 .5 .1 .1", "class nan is none of"),
        ("1 .5 .5 .1 .1 .9", "5 coordinates are neither a box (4) nor a polygon (6, 8, ...)"),
        ("1 .5 .5", "2 coordinates are neither"),
        ("WBC .5 .5 .1 .1", "could not convert string to float: 'WBC'; a line is a class number and coordinates"),
        ("1 .5 .5 nan .1", "coordinates must be finite numbers, not [0.5, 0.5, nan, 0.1]"),
        ("1 .1 .1 nan .5 .5 .5", "coordinates must be finite numbers"),
        ("1 .1 .1 .2 .5 inf .5", "coordinates must be finite numbers"),
        ("1 .1 .1 .2 .5 .5 -1e999", "coordinates must be finite numbers"),
        (f"1 {'x' * 10**5}", "xxx'; a line is a class number and coordinates"),
        ("1 32 24 10 10", "pixels out of the 64x48 picture"),
    ],
)
def test_yolo_lines_that_are_wrong(tmp_path, line, why):
    folder = yolo_folder(tmp_path)
    (folder / "valid" / "labels" / "valid.txt").write_text(f"1 {shares(BOX)}\n\n{line}\n")
    said = run(yolo, "--source", folder, expect=2)
    assert f"error: {folder}/valid/labels/valid.txt:3: " in said and why in said
    run(yolo, "--source", folder, "--skip-bad", 1)
    assert not (folder / "val.jsonl").exists()  # the picture as a whole


def test_yolo_pictures_without_labels_and_labels_without_pictures(tmp_path):
    folder = yolo_folder(tmp_path)
    picture(folder / "train" / "images" / "empty.png")
    (folder / "train" / "labels" / "empty.txt").write_text("\n")
    picture(folder / "train" / "images" / "none.png")
    (folder / "train" / "labels" / "classes.txt").write_text("RBC\nWBC\n")
    said = run(yolo, "--source", folder)
    assert "nothing is marked in the picture: 2 (train/images/empty.png, train/images/none.png)" in said
    (folder / "train" / "labels" / "lost.txt").write_text("")
    said = run(yolo, "--source", folder, "--overwrite", expect=2)
    assert f"{folder}/train/labels/lost.txt: no picture of that name is in data.yaml's folders" in said


@pytest.mark.parametrize(
    "places",
    [
        "train: ../train/images\nval: ../valid/images\n",  # Roboflow's
        "path: /of/another/machine\ntrain: train/images\nval: [valid/images]\ntest:\n",
        "path: /of/another/machine\ntrain: lists/train.txt\nvalid: valid.txt\n",
        "train:\n  - train/images\nval: valid/images/\n",
    ],
)
def test_yolo_places(tmp_path, places):
    folder = yolo_folder(tmp_path, places + "names: [RBC, WBC]")
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text("./../train/images/train.png\n")
    (folder / "valid.txt").write_text("valid/images/valid.png\n")
    run(yolo, "--source", folder)
    assert names_of(folder / "train.jsonl") == ["train.png"] and names_of(folder / "val.jsonl") == ["valid.png"]
    assert read(folder / "train.jsonl")[0]["image"] == "train/images/train.png"


@pytest.mark.parametrize(
    "places, named",
    [
        ("train: /", "train: /"),
        ("train: .", ""),
        ("train: ..", "train: .."),
        ("train: ../..", "train: ../.."),
        ("train: ../elsewhere/images", "train: ../elsewhere/images"),
        ("train: [train/images, ../elsewhere/images]", "train: ../elsewhere/images"),
        ("path: ELSEWHERE\ntrain: images", "train: images"),
        ("path: ..\ntrain: elsewhere/images", "train: elsewhere/images"),
        ("path: ../..\ntrain: train/images", ""),
        ("train: ELSEWHERE/images", "train: .*elsewhere/images"),
        ("train: ELSEWHERE/list.txt", "train: .*elsewhere/list.txt"),
        ("train: list.txt", "list.txt:2: ../elsewhere/images/a.png"),
        ("train: absolute.txt", "absolute.txt:1: .*elsewhere/images/a.png"),
        ("path: /\ntrain: train/images", ""),
        ("train: ../train/images", ""),
        ("train: ../../train/images", ""),
        ("train: HERE/train/images", ""),
        ("train: link/images", ""),
    ],
)
def test_yolo_reads_nothing_out_of_its_folder_unless_it_may(tmp_path, places, named):
    """A file of other people says which folders are walked and which pictures overlays show."""
    folder, elsewhere = yolo_folder(tmp_path / "set"), tmp_path / "elsewhere"
    picture(elsewhere / "images" / "a.png")
    (elsewhere / "labels").mkdir()
    (elsewhere / "labels" / "a.txt").write_text(f"1 {shares(BOX)}")
    (elsewhere / "list.txt").write_text("./images/a.png\n")
    (folder / "list.txt").write_text("train/images/train.png\n../elsewhere/images/a.png\n")
    (folder / "absolute.txt").write_text(f"{elsewhere}/images/a.png\n")
    (folder / "link").symlink_to(elsewhere)  # made by the owner of the folder
    places = places.replace("ELSEWHERE", str(elsewhere)).replace("HERE", str(folder))
    (folder / "data.yaml").write_text(f"{places}\nnames: [RBC, WBC]")
    if named:
        said = run(yolo, "--source", folder, expect=2)
        assert re.search(f"{named} leads out of the folder of data.yaml; .* allow it by --allow-outside", said)
        if "elsewhere" in named:
            said = run(yolo, "--source", folder, "--allow-outside")
            assert "image paths lead out of" in said and "a.png" in names_of(folder / "train.jsonl")
    else:
        run(yolo, "--source", folder, "--leaks", "keep")
        bright(folder / "train.jsonl")


def test_yolo_the_same_folder_for_train_and_val(tmp_path):
    folder = yolo_folder(tmp_path, "train: train/images\nval: train/images\nnames: [RBC, WBC]")
    said = run(yolo, "--source", folder, expect=2)
    assert f"{folder}/train/images/train.png in train, {folder}/train/images/train.png in val" in said
    picture(folder / "train" / "images" / "other.png")
    (folder / "train" / "labels" / "other.txt").write_text(f"0 {shares(BOX)}")
    said = run(yolo, "--source", folder, "--val", 0.5)
    assert "left out, the same record again: 2" in said
    assert [len(read(folder / f"{split}.jsonl")) for split in ("train", "val")] == [1, 1]


def test_yolo_folders_and_names_that_are_not_there(tmp_path):
    for yaml, why in [
        ("train: nowhere\nnames: [a]", "data.yaml: train: nowhere is not there"),
        ("train: train/images\n", "data.yaml: names: must list the classes"),
        ("names: lesion\n", "names: must list the classes"),
        ("names: []\n", "names: must list the classes"),
        ("nc: 3\nnames: [a, b]\n", "nc is 3, but names has 2 classes"),
        ("names: [a]\n", "no record came out"),
    ]:
        assert why in run(yolo, "--source", yolo_folder(tmp_path, yaml), expect=2)
    (tmp_path / "data.yaml").unlink()
    assert "data.yaml: does not exist" in run(yolo, "--source", tmp_path, expect=2)


GOOD_YAML = [
    "names: ['RBC', \"WBC\", Platelets]",
    "names: [ 'a',\n  'b' ,\n  c,]\nnc: 3 # three",
    "names:\n  0: RBC\n  1: 'it''s'  # a comment\n\n  2: \"left, right\"\n",
    "names:\n- a b\n- 'x: y'\n- c#d\n",
    "names:\n    - a, b\n    - Sever's disease\n",
    "names: {0: a, 1: 'b, c', 2: Sever's disease}",
    "names: [Sever's disease, heel spur]  # two",
    "# a 'comment\n---\npath: ../datasets/x # root\ntrain: [a, b]\nval: 'C:/x y'\ntest: # none\nnames: [x]",
    '"names": [x]\nroboflow:\n  workspace: w\n  version: 1\nkpt_shape: [17, 3]\ntrain: a\nx: |\n  import os\n  [',
    "names: ['ä', ß]\nval: größe\n",
    "names: [a]\r\ntrain: x\r\n",
]


@pytest.mark.parametrize("text", GOOD_YAML, ids=range(len(GOOD_YAML)))
def test_what_is_read_of_a_data_yaml_is_what_yaml_means(tmp_path, text):
    yaml = pytest.importorskip("yaml")  # transformers brings it; the oracle here, not needed otherwise
    (tmp_path / "data.yaml").write_bytes(text.encode())

    def plain(value):
        if isinstance(value, list):
            return [str(v) for v in value]
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else str(value or "")

    want = {key: plain(value) for key, value in yaml.safe_load(text).items() if key in KEYS}
    assert read_yaml(tmp_path / "data.yaml") == want


@pytest.mark.parametrize(
    "text, why",
    [
        ("names: [a, [b]]", r"names: '\[b\]' is YAML that is not understood here"),
        ("names: [a, 'b]", r"names: \"'b\" is YAML that is not understood here"),
        ("names: &x [a]", "names: '&x .a.' is YAML that is not understood"),
        ("train: *x", "train: '.x' is YAML"),
        ("train: !!str x", "train: '!!str x' is YAML"),
        ("train: |\n  a\n  b", "train: '|   a   b' is YAML"),
        ('names: ["a\\u0041"]', "names: .* is YAML that is not understood"),
        ("names:\n  - a\n  b: c", "names: 'b: c' is no item of a list"),
        ("names:\n  a: b", "names: 'a: b' is not a new class number, a colon and a name"),
        ("names: {0: a, 0: b}", "names: '0: b' is not a new class number"),
        ("train: a: b", "train: 'a: b' is YAML"),
        ("  train: a", "data.yaml:1: '  train: a' is not `key: value`"),
        ("names: [a]\ntrain", "data.yaml:2: 'train' is not `key: value`"),
        ("train:a", "data.yaml:1: 'train:a' is not"),
    ],
)
def test_yaml_that_is_not_understood_is_refused(tmp_path, text, why):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError, match=why):
        read_yaml(tmp_path / "data.yaml")


def test_hidden_files_that_archives_of_a_mac_hold_are_no_pictures(tmp_path):
    """A ._a.jpg beside each a.jpg, which is no picture, and a ._a.xml, which is no XML."""
    yolo_folder(tmp_path / "y")
    voc_folder(tmp_path / "v", "a")
    tn3k_folder(tmp_path / "t")
    flags = pairs(tmp_path / "m", a=[BOX])
    ham_folder(tmp_path / "h", 6)
    for file in [f for f in tmp_path.rglob("*.*") if f.is_file() and f.suffix not in (".yaml", ".json")]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
    for script, folder in ((yolo, "y"), (voc, "v"), (tn3k, "t"), (ham10000, "h")):
        said = run(script, "--source", tmp_path / folder)
        assert "._" not in said
    assert "._" not in run(masks, *flags)


# ---------------------------------------------------------------- pairs of folders


def test_mask_patterns_pair_through_folders_and_in_one_folder(tmp_path):
    for split in ("Training", "Validation"):
        folder = tmp_path / f"ISIC-2017_{split}_Data"
        picture(folder / f"ISIC_{split}.jpg")
        picture(folder / f"ISIC_{split}_superpixels.png")
        mask(tmp_path / f"ISIC-2017_{split}_Part1_GroundTruth" / f"ISIC_{split}_segmentation.png", BOX)
    flags = ["--images", "ISIC-2017_Training_Data/*.jpg", "--query", "the skin lesion"]
    run(masks, "--source", tmp_path, *flags, "--masks", "ISIC-2017_Training_Part1_GroundTruth/*_segmentation.png")
    bright(tmp_path / "train.jsonl")
    for kind in ("benign", "malignant"):  # BUSI: masks beside the pictures
        picture(tmp_path / "busi" / kind / f"{kind} (1).png")
        mask(tmp_path / "busi" / kind / f"{kind} (1)_mask.png", BOX)
    flags = ["--source", tmp_path / "busi", "--images", "*.png", "--masks", "*_mask.png"]
    run(masks, *flags, "--query", "the {folder} tumour")
    found = [(r["image"], r["query"]) for r in read(tmp_path / "busi" / "all.jsonl")]
    assert found == [(f"{k}/{k} (1).png", f"the {k} tumour") for k in ("benign", "malignant")]
    assert "--query" in run(masks, *flags, expect=2)  # there is no class that could name the thing


def test_the_two_ends_of_a_pattern_do_not_overlap(tmp_path):
    picture(tmp_path / "images" / "X.png")
    mask(tmp_path / "masks" / "aXa.png", BOX)
    mask(tmp_path / "masks" / "a.png", BOX)  # begins with a and ends with a.png, but there is one a only
    run(masks, "--source", tmp_path, "--images", "images/*.png", "--masks", "masks/a*a.png", "--query", "it")
    bright(tmp_path / "all.jsonl")


def test_mask_patterns_that_fit_nothing(tmp_path):
    flags = pairs(tmp_path, a=[BOX])
    for pattern in ("images", "*/*.png"):
        said = run(masks, *flags, "--images", pattern, expect=2)
        assert f"--images '{pattern}': exactly one * is needed" in said
    said = run(masks, *flags, "--masks", "masks/*.tif", expect=2)
    assert f"--masks 'masks/*.tif': fits none of 1 pictures in {tmp_path}/masks; quote it for the shell" in said


# ---------------------------------------------------------------- VLM-R1


def test_vlm_r1_with_pictures_elsewhere(tmp_path):
    asked = "<image>Please provide the bounding box coordinate of the region this sentence describes: the big_lesion."
    for n in range(4):
        picture(tmp_path / "coco" / f"{n}.png")
    lines = [
        {"image": f"coco/{n}.png", "conversations": [{"value": asked}, {"value": f"<answer>{list(BOX)}</answer>"}]}
        for n in range(4)
    ]
    file = tmp_path / "annotations" / "rec.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"{file}:1: field 'image' names 'coco/0.png', which is not a file" in run(vlm_r1, "--source", file, expect=2)
    run(vlm_r1, "--source", file, "--images", tmp_path, "--out", tmp_path, "--val", 0.25)
    bright(tmp_path / "train.jsonl")
    assert len(read(tmp_path / "train.jsonl")) == 3
    record = read(tmp_path / "val.jsonl")[0]
    assert record["query"] == "the big_lesion" and record["image"].startswith("coco/")
    lines[1]["conversations"][1]["value"] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run(vlm_r1, "--source", file, "--images", tmp_path, "--overwrite", expect=2)
    assert f"{file}:2: field 'conversations[1].value' holds 2 boxes, but one phrase, one box is the method" in said
    run(vlm_r1, "--source", file, "--images", tmp_path, "--skip-bad", 1)
    assert len(read(file.parent / "all.jsonl")) == 3


@pytest.mark.parametrize("box", [[[1, 2, 3, 4], [5, 6, 7, 8]], [{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]])
def test_a_record_with_several_boxes_is_refused(tmp_path, box):
    picture(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "query": "it", "bbox": box}))
    with pytest.raises(
        InputError, match="a.jsonl:1: field 'bbox' holds 2 boxes, but one phrase, one box is the method"
    ):
        load_jsonl(tmp_path / "a.jsonl")


# ---------------------------------------------------------------- size


def test_two_thousand_pictures_and_masks_with_a_broken_one_among_them(tmp_path):
    """Ten thousand must take less than a minute: a fifth of both. Measured it is a quarter of that on one free core."""
    start = tn3k_folder(tmp_path / "one", numbers=(3,))
    count, broken = 1900, 1234
    for part, n in (("trainval", count), ("test", 100)):
        for kind in ("image", "mask"):
            folder = tmp_path / "many" / f"{part}-{kind}"
            folder.mkdir(parents=True)
            content = (start / f"trainval-{kind}" / "3.jpg").read_bytes()
            for i in range(n):  # a few bytes behind the picture make no two files equal
                (folder / f"{i:04d}.jpg").write_bytes(content + f"{part}{i}".encode())
    write_fold(tmp_path / "many", list(range(0, 1500)), list(range(1500, count)))
    bad = damaged(tmp_path / "many" / "trainval-image" / f"{broken}.jpg", 0.8)
    said = run(tn3k, "--source", tmp_path / "many", expect=2)
    assert "error: image " in said and f"/{bad.name} cannot be read (image file is truncated" in said
    begin = time.process_time()
    said = run(tn3k, "--source", tmp_path / "many", "--skip-bad", 1)
    assert time.process_time() - begin < 12
    assert "left out: image " in said and f"/{bad.name} cannot be read" in said
    assert "pictures: 100%" in said and "2000/2000" in said  # the progress bar
    assert "train.jsonl: 1499 records of 1499 pictures" in said and "val.jsonl: 400 records" in said


# ---------------------------------------------------------------- real layouts

PHRASES = {"WBC": "the white blood cell", "Platelets": "the platelet"}
CELLS = {  # BCCD's own boxes, of BloodImage_00000 ... 7: those that are the only one of their class
    (0, "the white blood cell"): (260, 177, 491, 376),
    (1, "the white blood cell"): (68, 315, 286, 480),
    (2, "the white blood cell"): (283, 1, 567, 106),
    (3, "the white blood cell"): (127, 40, 344, 226),
    (3, "the platelet"): (335, 268, 370, 299),
    (4, "the white blood cell"): (109, 134, 324, 321),
    (4, "the platelet"): (127, 47, 163, 81),
    (5, "the white blood cell"): (230, 288, 441, 480),
    (6, "the white blood cell"): (117, 190, 290, 360),
    (7, "the white blood cell"): (193, 92, 387, 285),
}


@REAL
@pytest.mark.parametrize("script, flags", [(coco, []), (voc, []), (yolo, ["--val", 0.25])])
def test_bccd_gives_the_same_boxes_in_each_format(tmp_path, script, flags):
    (tmp_path / "q.json").write_text(json.dumps(PHRASES))
    source = FIXTURES / script.__name__.removeprefix("prepare.")
    said = run(script, "--source", source, "--out", tmp_path, "--query", tmp_path / "q.json", *flags)
    found = {}
    for file in tmp_path.glob("*.jsonl"):
        for record in read(file):
            found[int(Path(record["image"]).stem[-5:]), record["query"]] = tuple(record["bbox"])
    assert found == CELLS
    assert "one phrase for several objects (--all keeps them): 2 (" in said  # platelets of pictures 5 and 6
    assert f"class 'RBC' has no phrase in --query: {127 * (2 if script is yolo else 1)} (" in said


@REAL
def test_bccd_with_all_its_objects(tmp_path):
    run(voc, "--source", FIXTURES / "voc", "--out", tmp_path, "--all")
    records = read(tmp_path / "all.jsonl")
    count = {q: sum(r["query"] == q for r in records) for q in ("the RBC", "the WBC", "the platelets")}
    assert count == {"the RBC": 127, "the WBC": 8, "the platelets": 8}


@REAL
def test_ham_fixture(tmp_path):
    run(ham10000, "--source", FIXTURES / "ham10000", "--out", tmp_path)
    want = [json.loads(line) for line in (FIXTURES / "native.jsonl").read_text().splitlines()]
    want = {Path(record["image"]).stem: tuple(record["bbox"]) for record in want}
    found, lesions = {}, []
    for split in ("train", "val", "test"):
        names = {Path(r["image"]).stem: tuple(r["bbox"]) for r in read(tmp_path / f"{split}.jsonl")}
        lesions.append({int(name[-2:]) // 2 for name in names})  # two pictures of each lesion, in a row
        found |= names
    assert found == want and list(map(len, lesions)) == [4, 1, 1] and len(set.union(*lesions)) == 6


@REAL
def test_tn3k_fixture(tmp_path):
    """Its masks are JPEGs; the oracle is Pillow's getbbox behind a threshold, as each has one part."""
    run(tn3k, "--source", FIXTURES / "tn3k", "--out", tmp_path, "--fold", 2)
    numbers = {split: [] for split in ("train", "val", "test")}
    for split, some in numbers.items():
        for record in read(tmp_path / f"{split}.jsonl"):
            image = tmp_path / record["image"]
            binary = Image.open(Path(str(image).replace("-image", "-mask"))).point(lambda v: 255 * (v > 127))
            assert tuple(record["bbox"]) == binary.getbbox()
            some.append(int(image.stem))
    assert numbers == {"train": [0, 1, 3, 4, 5, 6, 8, 9], "val": [2, 7], "test": [0, 1, 2, 3, 4, 5]}


@REAL
def test_exif_fixture(tmp_path):
    """Stored 373x454 and turned by EXIF; the annotation states 454x373, so that its box is of the displayed picture."""
    run(coco, "--source", FIXTURES / "exif", "--out", tmp_path, "--query", "the fracture")
    (record,) = read(tmp_path / "all.jsonl")
    assert (record["width"], record["height"], record["bbox"]) == (454, 373, [177.31, 74.85, 214.12, 99.08])


@REAL
def test_vlm_r1_fixture(tmp_path):
    run(vlm_r1, "--source", FIXTURES / "vlmr1_rec.jsonl", "--images", FIXTURES / "ham10000", "--out", tmp_path)
    want = [json.loads(line)["bbox"] for line in (FIXTURES / "native.jsonl").read_text().splitlines()]
    records = read(tmp_path / "all.jsonl")
    assert [r["bbox"] for r in records] == want and {r["query"] for r in records} == {"the skin lesion"}


@REAL
def test_pairs_of_folders_fixture(tmp_path):
    flags = ["--images", "trainval-image/*.jpg", "--masks", "trainval-mask/*.jpg", "--query", "the nodule"]
    run(masks, "--source", FIXTURES / "tn3k", *flags, "--out", tmp_path)
    assert len(read(tmp_path / "all.jsonl")) == 10


@REAL
@pytest.mark.parametrize("name, count", {"isic2017": (2000, 150), "bccd": (248, 108), "fracatlas": (418, 73)}.items())
def test_the_real_sets_load(name, count):
    folder = FIXTURES.parent / name
    for split, n in zip(("train", "val"), count, strict=True):
        assert len(load_jsonl(folder / f"{split}.jsonl")) == n
