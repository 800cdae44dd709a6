"""prepare/: every layout, and every trap on the way from a mask or an annotation to a box in the displayed picture.

What a reader refuses is asked of the reader; how a fault ends a script, or is left out and listed, is shown once.
"""

import io
import json
import math
import os
import re
import runpy
import shlex
import sys
import time
from contextlib import redirect_stderr
from importlib import import_module
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import errors
from data import load_jsonl
from prepare import (
    coco,
    common,
    ham10000,
    layout,
    masks,
    tn3k,
    vlm_r1,
    voc,
    yolo,
)  # fmt: skip
from prepare.boxes import as_displayed

# isort: split
from layouts import (  # noqa: I001
    BOX, HAM, SIZE, SMALL, augmented, bright, damaged, ham_folder, like, mask, names_of, one_coco, pairs, picture, read,
    reader, refusal, run, shares, tn3k_folder, voc_folder, write_coco, write_fold, write_metadata, xml, xywh,
    yolo_folder,
)  # fmt: skip

ROOT = Path(__file__).parents[1]


def test_empty_masks_parts_and_thresholds_are_flags_and_counted(tmp_path):
    flags, out = pairs(tmp_path, a=[], b=[]), tmp_path / "all.jsonl"
    assert "no record came out" in run(masks, *flags, expect=2) and not out.exists()
    mask(tmp_path / "masks" / "a_mask.png", BOX, value=1)
    run(masks, *flags, "--threshold", 0)
    bright(out)
    pairs(tmp_path, a=[BOX], c=[(0, 0, 2, 2), BOX], d=[])
    for choice, what, found in [
        ("largest", "the largest is taken", [BOX, BOX]), ("drop", "left out", [BOX]),
        ("union", "the box is around all of them", [BOX, (0, 0, 30, 28)]),
    ]:  # fmt: skip
        said = run(masks, *flags, "--component", choice)
        assert "left out, the mask is empty: 2 (masks/b_mask.png, masks/d_mask.png)" in said
        assert f"the mask has several parts: {what}: 1 (masks/c_mask.png)" in said and read(out, "bbox") == found
    assert "all.jsonl: 2 records of 2 pictures" in said


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_boxes_of_turned_pictures(tmp_path, orientation, frame):
    """The stated size tells the frame where the sides are exchanged, and only there; --frame says it elsewhere. Oracle:
    Pillow's exif_transpose, by way of the loader."""
    box = as_displayed(BOX, orientation, SIZE) if frame == "displayed" and orientation > 1 else BOX
    size = SIZE[::-1] if frame == "displayed" and orientation > 4 else SIZE
    flags = ["--source", one_coco(tmp_path, (0, xywh(box)), size=size, orientation=orientation)]
    if 2 <= orientation <= 4:
        said = run(coco, *flags, expect=2)
        assert f"EXIF turns the picture (orientation {orientation}) and no size tells" in said and "--overlay" in said
        flags += ["--frame", frame]
    turned = frame == "stored" and orientation > 1
    assert ("turned, the box was drawn in the picture as stored: 1" in run(coco, *flags)) == turned
    bright(tmp_path / "all.jsonl")
    if orientation > 4:  # a mask without EXIF is in the frame whose size it has; one with EXIF turns like its picture
        picture(tmp_path / "images" / "b.png", orientation=orientation)
        for stored in ({"size": size}, {"orientation": orientation}):
            mask(tmp_path / "masks" / "b_mask.png", box if "size" in stored else BOX, **stored)
            assert ("as stored: 1" in run(masks, *pairs(tmp_path))) == (turned and "size" in stored)
            bright(tmp_path / "all.jsonl")


def test_a_size_that_is_neither_or_not_the_wished_one_is_refused(tmp_path):
    for turned, stated, flags, why in [
        (6, (128, 96), (), "its box is of a picture of 128x96, the file is 48x64: it was resized or turned after"),
        (6, SIZE, ("--frame", "displayed"), "picture of 64x48, which it is not as displayed; --frame auto"),
        (6, SIZE[::-1], ("--frame", "stored"), "picture of 48x64, which it is not as stored; --frame auto"),
        (1, (640, 48), (), "its box is of a picture of 640x48, the file is 64x48"),
    ]:
        flags = ["--source", file := one_coco(tmp_path, size=stated, orientation=turned), *flags]
        assert like(f"error: {file} annotation 0: ..{why}", run(coco, *flags, expect=2))


B, S, CROWD, N = xywh(BOX), xywh(SMALL), {"iscrowd": 1}, [48, 64]
SQUARE, THREE = [10, 8, 30, 8, 30, 28, 10, 28], [(0, B), (0, [40, 10, 10, 10]), (1, S)]
TEXT = "X?d0l00000000000000000000000000000000000000hb1"  # pycocotools' for BOX


def seg(polygons, **more) -> tuple:
    """An annotation without bbox; (counts, size) for a mask in runs."""
    runs = isinstance(polygons, tuple)
    return 0, None, {"segmentation": dict(zip(("counts", "size"), polygons, strict=True)) if runs else polygons} | more


@pytest.mark.parametrize("annotations, flags, found, why", [
    (THREE, "", [SMALL], "left out, one phrase for several objects (--all keeps them): 1 (a.png: the lesion)"),
    (THREE, "--all", [BOX, (40, 10, 50, 20), SMALL], ""),
    ([(0, B), (1, S)], "--query it", [], "one phrase for several objects (--all keeps them): 1 (a.png: it)"),
    ([(0, B), (0, [10.001, 8, 20, 20])], "", [BOX], "left out, the same record again: 1 (coco.json annotation 1)"),
    ([(0, B), (0, B, CROWD), (1, S)], "", [SMALL], "left out, a crowd in one box: 1 (..one phrase for several"),
    ([(0, B), (0, B, CROWD), (1, S)], "--all", [BOX, SMALL], "a crowd in one box: 1 ("),
    ([(0, B, CROWD)], "", [], "a crowd in one box: 1 ("),
    # A slip of the mouse is no object: the other one of its phrase is still the only one.
    *[([(0, B), (0, slip)], "", [BOX], "less than a pixel wide or high: 1 (coco.json annotation 1)")
      for slip in ([10, 8, 0, 20], [10, 8, 20, 0.9], [10, 8, -5, 20], [64, 8, 1, 20], [-0.5, 8, 1, 20])],
    ([(0, [-0.5, 8, 65.5, 40.7])], "", [(0, 8, 64, 48)], "cut at the picture's edge, by a pixel at most: 1 ("),
    ([(0, [10, 8, 54.004, 40])], "", [(10, 8, 64, 48)], ""),
    ([(0, [10, 8, 55.5, 20])], "", [], "its box [10.0, 8.0, 65.5, 28.0] reaches 1.5 pixels out of the 64x48"),
    ([(0, [-10, 8, 99, 99])], "--clip-boxes", [(0, 8, 64, 48)], "edge (--clip-boxes): 1 (coco.json annotation 0)"),
    ([(0, [64, 8, 20, 20])], "--clip-boxes", [], "its box [64.0, 8.0, 84.0, 28.0] has nothing inside the 64x48"),
    ([(0, B), (0, [63.5, 8, 50, 20])], "--clip-boxes", [BOX], "(--clip-boxes): 1 (..less than a pixel wide"),
    ([seg([SQUARE])], "", [BOX], "without bbox, the box is the extent of the segmentation: 1 ("),
    *[([seg(polygons)], "", [BOX], "the extent of") for polygons in (
        SQUARE, [["10", 8, "30", 8, 30, "28", 10, 28]], [[10, 8, 12, 8, 12, 9], [29.5, 27, 30, 28, 29, 28]],
        (TEXT, N), ([488, *[20, 28] * 19, 20, 1652], N))],
    ([(0, B), seg(([3072], N))], "", [BOX], "less than a pixel wide or high: 1 (coco.json annotation 1)"),
    ([(1, B), seg((TEXT, N), iscrowd="1")], "", [BOX], "a crowd in one box: 1 (coco.json annotation 1)"),
    ([(0, [" 10.0", "8e0", 20.0, "20"], {"iscrowd": "0"})], "", [BOX], ""),  # as tables have numbers
])  # fmt: skip
def test_coco_objects(tmp_path, annotations, flags, found, why):
    said = run(coco, "--source", one_coco(tmp_path, *annotations), *flags.split(), expect=0 if found else 2)
    assert like(why, said.replace("\n", " ")) and (why or "out" not in said and "cut" not in said)
    assert not found or read(tmp_path / "all.jsonl", "bbox") == found


def test_coco_ids_and_sizes_as_other_tools_write_them(tmp_path):
    for image, annotation in [
        ({}, {"image_id": 0.0, "category_id": 1.0}), ({"id": 7.0}, {"image_id": 7}), ({"id": "7"}, {"image_id": 7.0}),
        ({"id": 1e300}, {"image_id": int(1e300)}), ({"width": "64", "height": 48.0}, {}),
        ({"width": 0, "height": 0}, {}), ({"width": None, "height": None}, {}),
    ]:  # fmt: skip
        (entry,) = reader(coco, one_coco(tmp_path, (1, B), first={"images": image, "annotations": annotation}))
        assert (entry.label, entry.box, entry.size or SIZE) == ("nodule", BOX, SIZE)


POINTS, RUNS = "a polygon must be three points or more [x1, y1, x2, y2, ...], not ", "'counts' must be lengths of runs"


@pytest.mark.parametrize("part, change, why", [
    *[("images", change, f"image ..: fields 'width' and 'height' must be positive integers, not {why}")
      for change, why in [({"width": "wide"}, "['wide', 48]"), ({"width": [64] * 10**5}, "[[64, 64,"),
                          ({"width": 63.5}, ""), ({"height": -48}, "")]],
    ("images", {"id": None}, "field 'id' must be a number or a text, and that of no other image"),
    *[("images", {"file_name": name}, why) for name, why in [
        ("a" * 10**6, "the picture ..aaa is not there"), ("\ud800.png", r"\ud800.png is not there, .. by --images"),
        ("../b.png", "field 'file_name' '../b.png' leads out of"), (None, "field 'file_name' must be a text")]],
    *[("annotations", {"image_id": odd}, "annotation 0: its 'image_id' is none of") for odd in (math.nan, [9])],
    ("annotations", {"category_id": 1.5}, "annotation 0: field 'category_id' 1.5 is none of 'categories'"),
    ("annotations", {"category_id": "x" * 10**6}, "xxx is none of 'categories'"),
    ("categories", {"id": 1}, "two of 'categories' have the id 1: lesion and nodule"),
    *[("annotations", {"bbox": bad}, "annotation 0: field 'bbox' must be four finite numbers [x, y, width, height]")
      for bad in ([1, 2, 3], ["1", 2, 3, "four"], "[1, 2, 3, 4]", {"x": 1}, [True, 1, 2, 3], [10**400, 1, 2, 3],
                  [10, 8, "nan", 20], [10, 8, "9" * 400, 20], [10, 8, 1e999, 20], [[[[[]]]]] * 10**4)],
    ("annotations", {"bbox": []}, "not [], and there is no 'segmentation' to take it from"),
    *[("annotations", seg(polygons)[2] | {"bbox": None}, f"annotation 0: field 'segmentation': {why}")
      for polygons, why in [
          ([[10, 8, 30, 8]], POINTS + "[10, 8, 30, 8]"), (["10,8,30,28"], POINTS), ([[]], POINTS), (1, POINTS),
          ([[10, 8, 30, 8, 30, 28, 10]], POINTS), ([[10, 8, 30, 8, 30, float("nan")]], POINTS), ("X?d0", POINTS),
          ([10, 8, 30, 8, 30, [28]], POINTS), (([3072], None), "'size' must be [height, width] of the mask"),
          (([0], [0, 64]), "'size' must be"), (([3072], [48.5, 64]), "'size' must"), (([9], [10**9, 64]), "'siz"),
          (([3071], N), "'counts' are of 3071 pixels, but 'size' [48, 64] has 3072"), (([3073, -1], N), RUNS),
          (([10**4000], N), "'counts' are of "), ((None, N), RUNS), (("é", N), "'counts' is no text of py"),
          (("o" * 10**6, N), "'counts' is no text"), (("X?d", N), "'counts' ends within a number: X?d"),
      ]],
    ("annotations", seg(([2880], [48, 60]))[2] | {"bbox": None}, "its mask is of 60x48, its picture of 64x48; m"),
])  # fmt: skip
def test_coco_values_that_are_refused(tmp_path, part, change, why):
    assert like(f"coco.json..{why}", refusal(reader, coco, one_coco(tmp_path, first={part: change})))


@pytest.mark.parametrize("case", [
    "annotations/instances_train2017.json train2017 train", "labels/train.json images/train train",
    "annotations/instances_train2017.json images/train2017 train", "annotations/instances_val.json images/valid val",
    "annotations/instances_default.json images/default all", "annotations/instances_default.json images all",
    "result.json images all", "train/_annotations.coco.json train train", "train/x.coco.json train/images train",
    "Annotations/test.json test test", "annotations/instances_val2017.json images/val val",
])  # fmt: skip
def test_coco_layouts(tmp_path, case):
    """Without --images: CVAT's, Label Studio's, Roboflow's, COCO's own. A picture's name elsewhere changes nothing."""
    file, folder, split = case.split()
    picture(tmp_path / folder / "a.png"), picture(tmp_path / "other" / "a.png", SMALL)
    write_coco(tmp_path / file, [("a.png", *SIZE)], [(0, 0, B)])
    for source in (tmp_path, tmp_path / file)[: 1 if "train/" in file else 2]:
        (entry,) = reader(coco, source)
        assert entry.image == tmp_path / folder / "a.png" and (source != tmp_path or entry.split == split)


def test_coco_pictures_elsewhere_and_files_by_name(tmp_path):
    picture(tmp_path / "x" / "Fractured" / "a.png"), picture(tmp_path / "a.png")  # above the source: not looked at
    file = write_coco(tmp_path / "x" / "annotations" / "instances_val2017.json", [("a.png", *SIZE)], [(0, 0, B)])
    file.with_name("captions_val2017.json").write_text("[]")
    images = {"images": tmp_path / "x" / "Fractured"}
    assert reader(coco, tmp_path / "x", **images)[0].split == "val"
    said = refusal(reader, coco, tmp_path / "x")
    assert f"the picture {tmp_path}/x/annotations/a.png is not there" in said and "starts from by --images" in said
    file = file.rename(file.with_name("boxes.json"))
    assert "holds 2 JSON files, none is called ..coco.json; name the file" in refusal(reader, coco, file.parent)
    run(coco, "--source", file, "--images", tmp_path / "x" / "Fractured")
    assert read(file.parent / "all.jsonl", "image") == ["../Fractured/a.png"]


def test_damaged_pictures_are_named_and_skipped_as_the_flag_says(tmp_path):
    """A picture is used as a whole or not at all: with one object left out, another would pass for the only one of its
    phrase. Nor is anything counted of it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8))
    names = ["a.jpg", "cut.jpg", "cut.png", "text.jpg", "gone.png", "out.jpg"]
    for name in names:
        noise.save(tmp_path / name)
    damaged(tmp_path / "cut.jpg", 0.7), damaged(tmp_path / "cut.png", 0.7)  # behind the header: only decoding finds it
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "gone.png").unlink()
    objects = [(i, c, B) for i in range(5) for c in range(2)] + [(5, 0, B), (5, 0, [1, 2, 99, 9]), (5, 0, [1, 2, 0, 0])]
    images = [(name, *SIZE) for name in (*names, "unmarked.png")]
    flags = ["--source", write_coco(tmp_path / "coco.json", images, objects)]
    assert "(this is bad record number 5, --skip-bad allows 4)" in run(coco, *flags, "--skip-bad", 4, expect=2)
    assert not list(tmp_path.glob("*.jsonl"))
    said = run(coco, *flags, "--skip-bad", 5)
    for why in [*(f"/{name} cannot be read" for name in names[1:4]), "gone.png is not there", "pixels out of the"]:
        assert like(f"left out: ..{why}", said)
    assert "left out, nothing is marked in the picture: 1 (coco.json image 6)" in said and "less than a" not in said
    assert said.count("left out: ") == 5 and names_of(tmp_path / "all.jsonl") == ["a.jpg", "a.jpg"]


def test_faults_of_masks_and_of_names_are_those_of_their_pictures(tmp_path):
    flags = pairs(tmp_path, a=[BOX], b=[BOX], e=[BOX])
    damaged(tmp_path / "masks" / "b_mask.png", 0.7)
    (tmp_path / "masks" / "e_mask.png").rename(tmp_path / "masks" / "c_mask.png")
    for folder, end in (("images", ".png"), ("masks", "_mask.png")):  # a name of bytes that are not UTF-8
        (tmp_path / folder / f"d\udcff{end}").write_bytes((tmp_path / folder / f"a{end}").read_bytes() + b"\0")
    said = run(masks, *flags, "--skip-bad", 4)
    assert "b_mask.png cannot be read" in said and r"d\udcff.png' cannot be written in UTF-8; rename it" in said
    assert "e.png: has no mask; * would stand for 'e'" in said and "c_mask.png: has no picture; * would sta" in said
    assert names_of(tmp_path / "all.jsonl") == ["a.png"]
    assert r"error: --dataset '\udcff' cannot be wri" in run(masks, *flags, "--dataset", "\udcff", expect=2)


@pytest.mark.parametrize("length", [1, 2000])
def test_names_of_others_reach_the_terminal_as_printable_text_of_bounded_length(tmp_path, length):
    """Of files, classes and ids: what is said is one sentence, or a list of them."""
    name = "X\r\x1b[2J\x1b[31mX\x1b]0;title\x07\nsecond\u202e\x9b'\"" * length
    flags = pairs(tmp_path / "m", **{name[:40]: [SMALL, BOX]})
    mask(tmp_path / "m" / "masks" / f"{name[:40]}4_mask.png", BOX)
    objects = [(1, 0, B), (1, 1, [1, 2, 300, 4], {"id": name}), (0, 0, [name] * 4, {"image_id": name}), (1, 0, S)]
    images = [(name, 9, 9), (picture(tmp_path / f"{name[:40]}.png").name, *SIZE)]
    source = ["--source", write_coco(tmp_path / "c.json", images, objects, [name, "b"], {"images": {"id": name}})]
    allowed, end = ["--clip-boxes", "--all", "--skip-bad", 3], 2 * (length > 1)
    said = [run(coco, *source, expect=2), run(coco, *source, *allowed, expect=end)]
    for text in (*said, run(masks, *flags, expect=2), run(masks, *flags, *allowed)):
        lines = [line for line in text.split("\n") if line and not line.startswith("\rpictures")]
        assert lines and all(line.isprintable() and len(line) < 2100 for line in lines), lines
    assert common.plain("a\x1bb\nc") == r"a\x1bb\nc" and common.plain(r"a\x1b 'ä'") == r"a\x1b 'ä'"
    assert like("begin..remedy", common.plain("begin" + "x" * 10**6 + "remedy"))


@pytest.mark.parametrize("script, name, content, why", [
    *[(voc, "a.xml", b'<?xml version="1.0" encoding="%s"?><annotation/>' % encoding, "is not XML that can be read")
      for encoding in (b"foo", b"rot13", b"undefined", b"gb2312")],
    (voc, "a.xml", b"<a>" * 10**4, "is not XML that can be read"), (voc, "a.xml", b"", "read (no element found"),
    (voc, "a.xml", b"<annotation><filename>%s</filename></annotation>" % (b"a" * 5000), "no picture ..aaa is besi"),
    (coco, "a.json", b"[]", "a.json: must hold 'images', 'annotations' and 'categories', each a list of objects"),
    (coco, "a.json", b'{"images": [1], "annotations": [], "categories": []}', "each a list of objects"),
    (ham10000, HAM, b"lesion_id," + b"m" * 200_000, "csv:1: cannot be read (field larger than"),
    (ham10000, HAM, b"x," * 50_000, "csv:1: column 'dx' is missing; it has "),
    (tn3k, "trainval-image/\xb2.png", b"", "trainval-image: pictures are named by number"),
    (tn3k, "test-image/1.png", b"", "trainval-image: no pictures are there; --source must be the folder that"),
    (yolo, "data.yaml", b"[" * 10**4, "data.yaml: is not valid YAML ("),
])  # fmt: skip
def test_files_that_are_wrong_in_odd_ways_are_one_sentence(tmp_path, script, name, content, why):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    for allowed in (0, 5):
        said = run(script, "--source", tmp_path, "--skip-bad", allowed, expect=2)
        assert like(why, said) and said.count("error: ") == 1 and max(map(len, said.splitlines())) < 600


@pytest.mark.parametrize("script", [coco, yolo, vlm_r1, voc, ham10000, tn3k])
def test_sources_that_are_not_there_or_never_end_are_refused(tmp_path, script, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero"):
        assert re.fullmatch("error: .*\n", run(script, "--source", source, expect=2))
    monkeypatch.setattr(sys, "argv", [script.__name__, "--source", str(tmp_path / "none")])  # as a program
    monkeypatch.delitem(sys.modules, script.__name__)
    with pytest.raises(SystemExit, match="2"), redirect_stderr(io.StringIO()) as output:
        runpy.run_module(script.__name__, run_name="__main__")
    assert output.getvalue() == f"error: --source {tmp_path}/none: is not there\n"


def test_pipes_and_hidden_files_within_a_source_are_no_files(tmp_path):
    """Archives made on a Mac hold a ._a.jpg beside each a.jpg, which is no picture, and a ._a.xml, which is no XML."""
    folders = {yolo: yolo_folder, voc: voc_folder, tn3k: tn3k_folder, ham10000: ham_folder, masks: pairs}
    for script, make in folders.items():
        named = {"a": [BOX]} if make is pairs else {}
        make(folder := tmp_path / script.__name__, *["a"][: make is voc_folder], **named)
        for file in [f for f in folder.rglob("*.*") if f.suffix not in (".yaml", ".json")]:
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
        found = reader(script, folder, images="images/*.png", masks="masks/*_mask.png")
        assert found and not any("._" in str(entry) for entry in found)
    (tmp_path / "prepare.yolo" / "train" / "labels" / "train.txt").unlink()
    for name in ("train/labels/train.txt", "train/images/pipe.png"):
        os.mkfifo(tmp_path / "prepare.yolo" / name)
    said = run(yolo, "--source", tmp_path / "prepare.yolo")
    assert "nothing is marked in the picture: 1 (train/images/train.png)" in said


def test_copies_of_one_picture_in_two_splits(tmp_path):
    """By Roboflow's names, or by equal bytes under any names; one name in two folders is two pictures."""
    train, val = ["x_jpg.rf.01ab.png", "x_jpg.rf.02cd.png", "c.png", "y.png"], ["d.png", "x_jpg.rf.9f.png", "y.png"]
    folder = augmented(tmp_path, train=train, valid=[*val])
    (folder / "valid" / "d.png").write_bytes((folder / "train" / "c.png").read_bytes())
    (folder / "valid" / "y.png").write_bytes((folder / "train" / "y.png").read_bytes()[:-1] + b"\0")  # as long only
    flags, parts = ["--source", folder, "--skip-bad", 1, "--overwrite"], [folder / "train.jsonl", folder / "val.jsonl"]
    said = run(coco, *flags, expect=2)
    assert "error: 2 pictures or copies of them are in two splits: " in said and "--leaks drop" in said
    assert "train/x_jpg.rf.01ab.png in train" in said and "valid/x_jpg.rf.9f.png in val" in said
    said = run(coco, *flags, "--leaks", "drop")
    assert "left out of train, a copy is in a more held-out split (--leaks drop): 3" in said
    assert [names_of(part) for part in parts] == [["y.png"], val]
    assert "kept in two splits (--leaks keep): 5 (" in run(coco, *flags, "--leaks", "keep")
    assert [names_of(part) for part in parts] == [sorted(train), val]
    for seed in range(6):
        run(coco, *flags, "--val", 0.3, "--seed", seed)
        for names in map(names_of, parts):
            assert sum("x_" in name for name in names) in (0, 3) and len({"c.png", "d.png"} & set(names)) != 1


def test_groups_that_share_a_picture_are_one_group(tmp_path):
    """Lesions a and b share one, b and c another: none of their pictures may be apart, in whatever order they come."""
    files = [picture(tmp_path / f"{name}.png") for name in ("a", "ab", "ba", "bc", "cb", "c", "other")]
    for copy in (2, 4):
        files[copy].write_bytes(files[copy - 1].read_bytes())
    for a, b, c in permutations("012"):
        lesions = zip(files, a + a + b + b + c + c + "3", strict=True)
        groups = common.groups_of([common.Entry(file, "", group=f"lesion {n}") for file, n in lesions])
        assert [groups[file] for file in files] == ["lesion 0"] * 6 + ["lesion 3"]


def test_new_splits_are_repeatable_and_of_the_asked_size(tmp_path):
    entries = [common.Entry(Path(f"{i}.png"), "") for i in range(40)]
    groups = {entry.image: entry.image.stem for entry in entries}
    seeds = [[e.split for e in common.make_splits(entries, groups, 0.25, 0.1, seed)] for seed in (0, 0, 1, 2)]
    assert {tuple(map(splits.count, ("train", "val", "test"))) for splits in seeds} == {(26, 10, 4)}
    assert seeds[0] == seeds[1] and seeds[0] != seeds[2] != seeds[3]
    said = run(coco, "--source", one_coco(tmp_path), "--val", 0.5, expect=2)
    assert "--val 0.5 --test 0 leave nothing to train on: the pictures make 1 groups" in said
    assert "--val: must be at least 0 and below 1" in run(coco, "--source", tmp_path, "--val", 1, expect=2)
    for split, names in {
        "train": ["instances_train2017", "ISIC-2017_Training_Data"], "val": ["valid", "Validation"],
        "test": ["test-image"], "all": ["testimony", "trainval-image", "train_val", "IMG"],
    }.items():  # fmt: skip
        assert {layout.split_of(name) for name in names} == {split}
        assert layout.split_of("IMG", names[0], "test") == (split if split != "all" else "test")  # the nearest


def test_phrases_of_classes_folders_and_a_file(tmp_path):
    table, image = tmp_path / "q.json", tmp_path / "Bad_Knee" / "train" / "images" / "a.png"
    table.write_text('{"Heel_Spur": "the spur"}')
    for query, label, phrase in [
        ("the {class}", "WBC", "the WBC"), ("{class}", "left  Lung", "left lung"), (None, "Heel_Spur", "Heel_Spur"),
        ("the {folder} of it", "", "the bad knee of it"), (str(table), "Heel_Spur", "the spur"), ("x", "y", "x"),
    ]:  # fmt: skip
        assert common.phrase_of(query, tmp_path)(common.Entry(image, "", label)) == phrase
    for query in ("the {klass}", "{", " "):
        assert "{class} and {folder} are the fields" in refusal(common.phrase_of, query, tmp_path)
    for content in ('["a"]', '{"a": 1}', '{"a": " "}'):
        table.write_text(content)
        assert "q.json: must hold one object of texts" in refusal(common.phrase_of, str(table), tmp_path)
    nameless = common.Entry(Path("/train/images/a.png"), "")
    assert "no folder's name says what is to be found" in refusal(common.phrase_of("the {folder}", tmp_path), nameless)
    table.write_text('{"spur": "the spur"}')
    for name, query, why in [
        ("x" * 10**5, table, "left out, class '..xxx' has no phrase in --query: 1 (..no record came out"),
        ("x" * 10**5, "{class}", "its phrase '..xxx' has 100000 characters; 1 to 10000 are possible"),
        ("a\ud800", "{class}", r"its phrase 'a\ud800' cannot be written in UTF-8; rename it"),
    ]:
        file = one_coco(tmp_path, first={"categories": {"name": name}})
        assert like(why, run(coco, "--source", file, "--query", query, expect=2).replace("\n", " "))


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    flags = ["--source", augmented(tmp_path, train=["a.png"], valid=["b.png"]), "--query"]
    run(coco, *flags, "it")
    before, said = (tmp_path / "train.jsonl").read_bytes(), run(coco, *flags, "changed", expect=2)
    assert f"{tmp_path}/train.jsonl is already there; name another --out, or give --overwrite" in said

    def full(path, *args, **named):
        if "val" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return load_jsonl(path, *args, **named)

    monkeypatch.setattr(common, "load_jsonl", full)
    assert "No space left on device" in run(coco, *flags, "changed", "--overwrite", expect=2)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train", "train.jsonl", "val.jsonl", "valid"]


def test_paths_start_at_the_jsonl_also_through_links(tmp_path):
    folder = augmented(tmp_path / "größe", train=["ä b.png"])
    assert "lead out" not in run(coco, "--source", folder)
    assert '"train/ä b.png"' in (folder / "train.jsonl").read_text(encoding="utf-8")  # for people, too
    folder = folder.rename(tmp_path / "data")
    bright(folder / "train.jsonl")  # both together, elsewhere
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    said = run(coco, "--source", folder / "train", "--out", tmp_path / "link")
    assert f"image paths lead out of {tmp_path}/deep/er: train with --allow-outside, or write --out" in said
    assert read(tmp_path / "link" / "all.jsonl", "image") == ["../../data/train/ä b.png"]
    (tmp_path / "source").symlink_to(folder / "train")  # a linked source: its folder is where the paths start
    run(coco, "--source", tmp_path / "source")
    assert read(folder / "train" / "all.jsonl", "image") == ["ä b.png"]


def test_the_overlay_shows_the_boxes(tmp_path):
    run(coco, "--source", one_coco(tmp_path), "--overlay", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    rows, columns = np.nonzero((np.abs(sheet - (40, 220, 90)) < 3).all(2))
    seen = [columns.min(), rows.min() - 16, columns.max() + 1, rows.max() - 15]  # below a line of text, 16 pixels high
    assert np.abs(np.array(seen) * SIZE[0] / 280 - BOX).max() < 0.5
    assert "--overlay: must end in .png" in run(coco, "--source", tmp_path, "--overlay", "sheet", expect=2)


def test_the_commands_of_the_data_page_and_of_the_scripts_have_flags_that_exist(monkeypatch):
    files = (file for file in (ROOT / "prepare").glob("*.py") if "errors.run(main)" in file.read_text())
    scripts = {module.__name__: module for module in (import_module(f"prepare.{file.stem}") for file in files)}
    parsed, parse = [], errors.Parser.parse_args
    monkeypatch.setattr(errors.Parser, "parse_args", lambda *a: parsed.append(parse(*a)) or sys.exit(7))
    texts = [(ROOT / "prepare" / "README.md").read_text()] + [script.__doc__ for script in scripts.values()]
    found = (re.findall(r"^ *(python -m prepare.*)", text.replace("\\\n", " "), re.M) for text in texts)
    commands = [shlex.split(command) for some in found for command in some]
    for _, _, module, *flags in commands:
        run(scripts[module], *flags, expect=7)
    assert len(parsed) == len(commands) >= 18 and {command[2] for command in commands} == set(scripts)
    assert run(coco, "--al", "--nonsense", expect=2).endswith("(python -m prepare.coco --help lists all flags)\n")


def test_tn3k_folds_are_indices_into_the_files_by_number(tmp_path):
    flags = ["--source", folder := tn3k_folder(tmp_path), "--overwrite"]
    run(tn3k, *flags)
    for split, numbers in {"train": (0, 1, 5, 7, 30, 100), "val": (2, 10), "test": (0, 9, 10)}.items():
        bright(file := tmp_path / f"{split}.jsonl")
        assert read(file, "image") == [f"{'test' if split == 'test' else 'trainval'}-image/{n}.jpg" for n in numbers]
        assert {(r["query"], r["dataset"]) for r in read(file)} == {("the thyroid nodule", "tn3k")}
    write_fold(tmp_path, [2, 5, 0, 1, 3, 4], [6, 7], fold=3)
    assert [e.image.stem for e in reader(tn3k, folder, fold=3) if e.split == "val"] == ["30", "100"]
    for train, val, why in [
        ([0, 1, 3, 4, 6, 7], [2, 5, 7], "picture 7 is in it twice"),
        ([0, 1, 3, 4, 6], [2, 5], "picture 7 is in neither train nor val; are all pictures unpacked?"),
        ([0, 1, 3, 4, 6, 8], [2, 5], "field 'train' must list indices of 8 pictures, 0 to 7"),
        ([], [2, -1], "field 'val' must list"), (["0.jpg"], [], "field 'train' must"), ([True], [], "field 'train' m"),
    ]:  # fmt: skip
        assert f"fold0.json: {why}" in refusal(reader, tn3k, write_fold(folder, train, val))
    assert "fold4.json: does not exist" in refusal(reader, tn3k, folder, fold=4)
    (folder / "test-mask" / "9.jpg").unlink()
    said = run(tn3k, *flags, "--fold", 3, expect=2)
    assert f"test-image/9.jpg: the mask {folder}/test-mask/9.jpg is not there" in said


@pytest.mark.parametrize("metadata", [HAM, "HAM10000_metadata.tab", "HAM10000_metadata"])
def test_ham_is_split_by_lesion(tmp_path, metadata):
    """As Dataverse has it, and as Kaggle: pictures twice, in folders whose names differ in case, and more of them."""
    rows, parts = ham_folder(tmp_path, 30, metadata), []
    picture(tmp_path / "ham10000_images_part_1" / "ISIC_0000000.jpg"), picture(tmp_path / "Test" / "ISIC_9999999.jpg")
    said = run(ham10000, "--source", tmp_path)
    assert "not used, a second file of that name: 1 (ham10000_images_part_1/" in said
    assert "not used, the metadata does not name the picture: 1 (Test/ISIC_9999999.jpg)" in said
    for split in ("train", "val", "test"):
        bright(file := tmp_path / f"{split}.jsonl")
        parts.append({row["lesion_id"] for row in rows if f"{row['image_id']}.jpg" in names_of(file)})
        assert len(names_of(file)) == sum(row["lesion_id"] in parts[-1] for row in rows)
    assert [*map(len, parts), len(set.union(*parts))] == [24, 3, 3, 30]
    labels = {entry.image.stem: entry.label for entry in reader(ham10000, tmp_path)}
    assert labels == {row["image_id"]: ham10000.DIAGNOSES[row["dx"]] for row in rows}


def test_ham_that_is_not_whole(tmp_path):
    rows, where = ham_folder(tmp_path), f"{tmp_path}/{HAM}"
    (tmp_path / "masks" / "ISIC_0000003_segmentation.png").unlink()
    assert f"{where}:5: ISIC_0000003_segmentation.png is not there; unpack all" in refusal(reader, ham10000, tmp_path)
    write_metadata(tmp_path / HAM, [rows[0], rows[1] | {"age": "9" * 200_000}, *rows[2:]])
    said = run(ham10000, "--source", tmp_path, "--val", 0, "--test", 0, "--skip-bad", 2)
    assert said.count("left out: ") == 2 and "metadata.csv:3: cannot be read (field larger than" in said
    assert len(read(tmp_path / "all.jsonl")) == len(rows) - 2  # a line too long for csv costs one record
    (tmp_path / "HAM10000_metadata").write_text("")
    assert f"its lesion_id, found {tmp_path}/HAM10000_metadata, {where}" in refusal(reader, ham10000, tmp_path)
    assert "found none" in refusal(reader, ham10000, tmp_path / "masks")


def test_voc_coordinates_and_splits(tmp_path):
    folder = voc_folder(tmp_path, "a", "b", "c", "d")
    run(voc, "--source", folder)
    bright(tmp_path / "all.jsonl")
    assert set(read(tmp_path / "all.jsonl", "query")) == {"the nodule"}
    (lists := folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, text in {"train": "a\n", "val": "b\n\n", "trainval": "a\nb\nc\n", "Nodule_test": "a 1\nd -1\n"}.items():
        (lists / f"{name}.txt").write_text(text)
    said = run(voc, "--source", folder)
    assert "left out, in no list of ImageSets/Main: 2 (Annotations/c.xml, Annotations/d.xml)" in said
    assert names_of(tmp_path / "train.jsonl") == ["a.png"] and names_of(tmp_path / "val.jsonl") == ["b.png"]
    picture(tmp_path / "r" / "valid" / "e.png")  # Roboflow: pictures and annotations side by side
    for size in ((0, 0), None):  # some tools do not know it
        file = xml(tmp_path / "r" / "valid" / "e.xml", "e.png", ("Nodule", 11, 9, 30, 28), size=size)
        (entry,) = reader(voc, tmp_path / "r", one_based=True)  # PASCAL's, from 1 with the last one included
        assert (entry.split, entry.box, entry.size) == ("val", BOX, None)
    xml(file, "e.png", ("Nodule", 0, 9, 30, 28))
    said = refusal(reader, voc, tmp_path / "r", one_based=True)
    assert f"{file}: <object> 1 begins at 0, so pixels do not count from 1" in said


def test_voc_pairs_by_name_and_files_that_are_wrong_somewhere(tmp_path):
    folder = voc_folder(tmp_path, "a", "b") / "Annotations"
    xml(folder / "a.xml", "C:\\elsewhere\\A0.jpg", ("Nodule", *BOX))  # the file's own name stands
    xml(folder / "c.xml", "b.png", ("Nodule", *SMALL))  # no c.png: what it names stands
    xml(folder / "d.xml", "b.png")
    assert "nothing is marked in the picture: 1 (Annotations/d.xml)" in run(voc, "--source", tmp_path, "--all")
    assert names_of(tmp_path / "all.jsonl") == ["a.png", "b.png", "b.png"]
    whole = xml(folder / "a.xml", "a.png", ("Nodule", *BOX)).read_text()
    for old, new, why in [
        (">a.png", ">b.png", "its <filename> is b.png, its own name tells of a.png, and both are there"),
        (">10<", ">ten<", "<bndbox><xmin> must be a number, not 'ten'"), (">Nodule<", "> <", "<object> 1 has no <na"),
        (">64<", ">?<", "<size><width> must be a number, not '?'"), ("<ymax>28</ymax>", "", "<bndbox><ymax> must be"),
    ]:  # fmt: skip
        (folder / "a.xml").write_text(whole.replace(old, new))
        assert f"a.xml: {why}" in refusal(reader, voc, tmp_path)
    xml(folder / "a.xml", "e.png", ("Nodule", *BOX)).rename(folder / "0.xml")
    assert "0.xml: no picture e.png is beside it, in JPEGImages or in images" in refusal(reader, voc, tmp_path)
    assert "holds no .xml" in refusal(reader, voc, tmp_path / "JPEGImages")
    picture(tmp_path / "s" / " a.png")
    for box, why in ((BOX, "path ' a.png' begins or ends with a blank"), ((1, "nan", 2, 3), "is not four finite numb")):
        xml(tmp_path / "s" / " a.xml", "", ("it", *box))
        assert why in run(voc, "--source", tmp_path / "s", expect=2)


def test_yolo_boxes_and_polygons(tmp_path):
    """Six decimals are not pixels: rounding brings them back. Shares of a turned picture need to be told."""
    x1, y1, x2, y2 = (v / side for v, side in zip(BOX, SIZE * 2, strict=True))
    for corners in ([], [x1, y1, x2, y1, x2, y2, x1, y2], [x1, (y1 + y2) / 2, (x1 + x2) / 2, y1, x2, y2]):
        folder = yolo_folder(tmp_path, line=corners and "1 " + " ".join(f"{v:.6f}" for v in corners))
        run(yolo, "--source", folder / "data.yaml", "--overwrite")
        bright(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    assert read(tmp_path / "val.jsonl", "query") == ["the WBC"]
    picture(folder / "train" / "images" / "train.png", orientation=6)
    for frame, box, size in (("stored", BOX, SIZE), ("displayed", as_displayed(BOX, 6, SIZE), SIZE[::-1])):
        (folder / "train" / "labels" / "train.txt").write_text(f"1 {shares(box, size)}\n")
        said = run(yolo, "--source", folder, "--overwrite", expect=2)
        assert "labels/train.txt:1: EXIF turns the picture (orientation 6) and no size tells" in said
        run(yolo, "--source", folder, "--frame", frame, "--overwrite")
        bright(folder / "train.jsonl")


def test_yolo_labels(tmp_path, monkeypatch):
    """Lines that are wrong, pictures without labels, labels without pictures; one folder for train and val."""
    label = yolo_folder(tmp_path) / "valid" / "labels" / "valid.txt"
    for line, why in [
        ("2 .5 .5 .1 .1", "class 2 is none of data.yaml's names"), ("0.5 .5 .5 .1 .1", "class 0.5 is none of"),
        ("1 .5 .5", "2 coordinates are neither"), (f"1 {'x' * 10**5}", "...xxx"), ("nan .5 .5 .1 .1", "class nan is"),
        ("1 .5 .5 .1 .1 .9", "5 coordinates are neither a box (4) nor a polygon (6, 8, ...)"),
        ("WBC .5 .5 .1 .1", "could not convert string to float: 'WBC'; a line is a class number and coordinates"),
        *[(f"1 .5 .5 {odd} .1", "coordinates must be finite numbers, not [0.5, 0.5, ") for odd in ("nan", "inf")],
    ]:  # fmt: skip
        label.write_text(f"1 {shares(BOX)}\n\n{line}\n")
        assert f"{label}:3: {why}" in refusal(reader, yolo, tmp_path)
    picture(tmp_path / "train" / "images" / "none.png"), picture(tmp_path / "train" / "images" / "empty.png")
    for name, text in (("empty", "\n"), ("classes", "RBC\nWBC\n"), ("lost", "")):
        (tmp_path / "train" / "labels" / f"{name}.txt").write_text(text)
    said = run(yolo, "--source", tmp_path, "--skip-bad", 2)
    assert f"left out: {label}:3: " in said and not (tmp_path / "val.jsonl").exists()  # the picture as a whole
    assert "nothing is marked in the picture: 2 (train/images/empty.png, train/images/none.png)" in said
    assert "labels/lost.txt: no picture of that name is in data.yaml's folders" in said
    folder = yolo_folder(tmp_path / "same", "train: train/images\nval: train/images")
    said = run(yolo, "--source", folder, expect=2)
    assert f"{folder}/train/images/train.png in train, {folder}/train/images/train.png in val" in said
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "read by PyYAML, which is not installed: pip install pyyaml" in refusal(reader, yolo, folder)


@pytest.mark.parametrize("places, named", [
    ("train: ../train/images\nval: ../valid/images\n", ""),  # Roboflow's
    ("path: /of/another/machine\ntrain: train/images\nval: [valid/images]\ntest:\n", ""),
    ("path: /of/another/machine\ntrain: lists/train.txt\nvalid: valid.txt\n", ""),
    ("train:\n  - HERE/train/images\nval: ../../valid/images/\n", ""),
    ("path: /\ntrain: train/images\nval: valid/images", ""),
    # A file of other people says which folders are walked and which pictures overlays show.
    ("train: /", "train: /"), ("train: ..", "train: .."), ("path: ELSEWHERE\ntrain: images", "train: images"),
    ("train: [train/images, ../elsewhere/images]", "train: ../elsewhere/images"),
    ("train: ELSEWHERE/list.txt", "train: ..here/list"),
    ("train: list.txt", "list.txt:2: ../elsewhere/images/a"), ("train: full.txt", "full.txt:1: ..elsewhere/im"),
])  # fmt: skip
def test_yolo_reads_nothing_out_of_its_folder_unless_it_may(tmp_path, places, named):
    elsewhere = picture(tmp_path / "elsewhere" / "images" / "a.png").parent.parent
    places = places.replace("ELSEWHERE", str(elsewhere)).replace("HERE", str(tmp_path / "set"))
    folder = yolo_folder(tmp_path / "set", places)
    for file, text in {
        elsewhere / "labels" / "a.txt": f"1 {shares(BOX)}", elsewhere / "list.txt": "./images/a.png\n",
        folder / "list.txt": "train/images/train.png\n../elsewhere/images/a.png\n",
        folder / "full.txt": f"{elsewhere}/images/a.png",
        folder / "lists" / "train.txt": "./../train/images/train.png\n", folder / "valid.txt": "valid/images/valid.png",
    }.items():  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    if named:
        said = refusal(reader, yolo, folder)
        assert like(f"{named}..leads out of the folder of data.yaml; ..by --allow-outside", said)
    if "here" in named:
        assert "a.png" in [e.image.name for e in reader(yolo, folder, allow_outside=True)]
    if "list.txt" in places:
        (elsewhere / "images" / "a.png").unlink()
        assert "the picture " in run(yolo, "--source", folder, "--allow-outside", expect=2)
    if not named:
        found = [(e.image.relative_to(folder).as_posix(), e.split) for e in reader(yolo, folder)]
        assert found == [("train/images/train.png", "train"), ("valid/images/valid.png", "val")]


NEXT = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a {b: c}\n" + "".join(f"{c}: &{c} X{', '.join([f'*{b}'] * 10)}Y\n" for b, c in NEXT)


@pytest.mark.parametrize("text, names", [
    ("names: ['RBC', \"WBC\", left lung]", ["RBC", "WBC", "left lung"]),
    ("names:\n  0: 'it''s'  # a comment\n\n  2: no\n  1: 1:30", {0: "it's", 2: "no", 1: "1:30"}),
    ("names:\n- a b\n- 'x: y'\n- c#d\nnc: 3 # three\n...\n", ["a b", "x: y", "c#d"]),
    ("names: [\n 'ä',\n  0x10 ,]\r\nx: |\n  import os\n  [\nkpt_shape: [17, 3]", ["ä", "0x10"]),
    # An alias is the thing itself, ten times ten times ..., and a tag makes no object.
    (f"names: [a]\n{BOMB.replace('X', '[').replace('Y', ']')}", ["a"]),
    (f"names: [a]\n{BOMB.replace('X', '{<<: [').replace('Y', ']}')}", ["a"]),
    ("names: !!python/object/apply:os.system [a]", ["a"]),
    ("names: [a, [b]]", "names: '1: ['b']' is not a new class number and its name"),
    ("names:\n  - a\n  -", "names: '1: ' is not a new class"), ("names: {\u00b2: a}", "'\u00b2: a' is not"),
    ("names:\n  0: a\n  00: b", "'00: b' is not a new"), ("names: {%s: a}" % ("9" * 500), "9: a' is not a new cl"),
    ("names:\n  0: a\n  0: b", "data.yaml:2: is not valid YAML (a key stands there twice)"),
    ("names: &x [*x]", "data.yaml:1: is not valid YAML (found unconstructable recursive node)"),
    ("names: [\"\\UFFFFFFFF\"]", "data.yaml: is not valid YAML ("), ("train: \0", "is not valid YAML (spec"),
    ("- a", "data.yaml: must hold `key: value` lines, not ['a']"), ("", "data.yaml: must hold `key: value` lines"),
    ("#" * (2**20 + 1), "data.yaml: has more than 1048576 bytes"),
    ("train: nowhere\nnames: [a]", "data.yaml: train: nowhere is not there, from"),
    ("train: [[a]]\nnames: [a]", "data.yaml: train: must be a folder, a .txt file, or a list of these, not [["),
    (f"train: {'a' * 5000}\nnames: [a]", "data.yaml: train: ..aaa is not there"),
    *[(text, "names: must list the classes") for text in ("train: train/images", "names: lesion", "names: []")],
    ("nc: 3\nnames: [a, b]\n", "nc is 3, but names has 2 classes"),
])  # fmt: skip
def test_yolo_what_a_data_yaml_says(tmp_path, text, names):
    (path := tmp_path / "data.yaml").write_bytes(text.encode())
    if isinstance(names, str):
        assert like(names, refusal(reader, yolo, tmp_path))
    else:
        names = dict(enumerate(names)) if isinstance(names, list) else names
        assert yolo.class_names(path, yolo.read_yaml(path)) == names


def test_mask_patterns_pair_through_folders_and_in_one_folder(tmp_path):
    isic = picture(tmp_path / "ISIC-2017_Training_Data" / "I.jpg")
    picture(isic.with_name("I_superpixels.png")), picture(tmp_path / "ISIC-2017_Validation_Data" / "V.jpg")
    mask(tmp_path / "ISIC-2017_Training_Part1_GroundTruth" / "I_segmentation.png", BOX)
    part = "ISIC-2017_Training"
    patterns = {"images": f"{part}_Data/*.jpg", "masks": f"{part}_Part1_GroundTruth/*_segmentation.png"}
    assert [(entry.image, entry.split) for entry in reader(masks, tmp_path, **patterns)] == [(isic, "train")]
    for kind in ("benign", "malignant"):  # BUSI: masks beside the pictures
        mask(picture(tmp_path / "busi" / kind / f"{kind} (1).png").with_name(f"{kind} (1)_mask.png"), BOX)
    flags = ["--source", tmp_path / "busi", "--images", "*.png", "--masks", "*_mask.png"]
    run(masks, *flags, "--query", "the {folder} tumour")
    found = [(r["image"], r["query"]) for r in read(tmp_path / "busi" / "all.jsonl")]
    assert found == [(f"{k}/{k} (1).png", f"the {k} tumour") for k in ("benign", "malignant")]
    assert "--query" in run(masks, *flags, expect=2)  # there is no class that could name the thing
    mask(tmp_path / "x" / "aXa.png"), mask(tmp_path / "x" / "a.png")  # begins with a and ends with a.png: one a only
    assert list(masks.matches(tmp_path, "x/a*a.png", "--masks")) == ["X"]
    none = f"fits none of 2 pictures in {tmp_path}/x; quote it for the shell"
    for pattern, why in {"x": "exactly one * is needed", "*/*.png": "exactly one * is needed", "x/*.tif": none}.items():
        assert f"--masks '{pattern}': {why}" in refusal(masks.matches, tmp_path, pattern, "--masks")


def test_vlm_r1_with_pictures_elsewhere(tmp_path):
    asked = "<image>Please provide the bounding box coordinate of the region this sentence describes: the big_lesion."
    (file := tmp_path / "annotations" / "rec.jsonl").parent.mkdir()
    with open(file, "w") as lines:
        for n, answer in enumerate([f"<answer>{list(BOX)}</answer>", [B, S], "[10, 8, 99, 28]", str(list(BOX))]):
            name = picture(tmp_path / "coco" / f"{n}.png").relative_to(tmp_path).as_posix()
            print(json.dumps({"image": name, "conversations": [{"value": asked}, {"value": answer}]}), file=lines)
    assert f"{file}:1: field 'image' names 'coco/0.png', which is not a file" in run(vlm_r1, "--source", file, expect=2)
    flags = ["--source", file, "--images", tmp_path, "--out", tmp_path, "--val", 0.3, "--clip-boxes"]
    said = run(vlm_r1, *flags, expect=2)
    assert f"{file}:2: field 'conversations[1].value' holds 2 boxes, but one phrase, one box is the method" in said
    assert like("clipped at the picture's edge..: 1 (", run(vlm_r1, *flags, "--skip-bad", 1))
    records = [*read(tmp_path / "train.jsonl"), *read(tmp_path / "val.jsonl")]
    assert {r["image"]: r["bbox"][2] for r in records} == {"coco/0.png": 30, "coco/2.png": 64, "coco/3.png": 30}
    assert {r["query"] for r in records} == {"the big_lesion"} and len(read(tmp_path / "val.jsonl")) == 1


@pytest.mark.slow
def test_two_thousand_pictures_and_masks_take_seconds(tmp_path):
    """Ten thousand must take less than a minute: a fifth of both. Measured it is a quarter of that on one free core."""
    start = tn3k_folder(tmp_path / "one", numbers=(3,))
    for part, kind, n in [(p, k, n) for p, n in (("trainval", 1900), ("test", 100)) for k in ("image", "mask")]:
        (folder := tmp_path / "many" / f"{part}-{kind}").mkdir(parents=True)
        for i in range(n):  # a few bytes behind the picture make no two files equal
            content = (start / f"trainval-{kind}" / "3.jpg").read_bytes() + f"{part}{i}".encode()
            (folder / f"{i:04d}.jpg").write_bytes(content)
    folder = write_fold(tmp_path / "many", list(range(1500)), list(range(1500, 1900)))
    begin = time.process_time()
    assert "train.jsonl: 1500 records of 1500 pictures" in run(tn3k, "--source", folder)
    assert time.process_time() - begin < 12
