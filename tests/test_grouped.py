"""--group of prepare/: one record a picture and phrase with all its boxes, and records of pictures without any."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from programs import run

from data import load_jsonl
from prepare import coco, voc, yolo
from tasks import TASKS

BCCD = Path(__file__).parent.parent.parent / "shared" / "data" / "bccd"
CELL, DISC = "the cell", "the disc"
BOXES = {  # picture -> class -> boxes
    "a": {"Cell": [[1, 2, 11, 12], [20, 20, 30, 36]], "Disc": [[5, 5, 9, 9]]},
    "b": {"Cell": [[3, 4, 13, 14]]},
    "c": {},
}


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(BOXES):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{name}.png")


def as_voc(folder: Path) -> Path:
    pictures(folder)
    for name, classes in BOXES.items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            "</bndbox></object>"
            for label, boxes in classes.items()
            for x1, y1, x2, y2 in boxes
        )
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")
    return folder


def as_coco(folder: Path, **changes) -> Path:
    pictures(folder)
    ids = {label: i + 1 for i, label in enumerate(("Cell", "Disc"))}
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(BOXES)]
    annotations = [
        {"id": 100 * i + j, "image_id": i, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1]} | changes
        for i, classes in enumerate(BOXES.values())
        for j, (label, (x1, y1, x2, y2)) in enumerate((label, box) for label, boxes in classes.items() for box in boxes)
    ]
    categories = [{"id": i, "name": label} for label, i in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "x_coco.json").write_text(json.dumps(content))
    return folder


def as_yolo(folder: Path) -> Path:
    pictures(folder / "train" / "images")
    (folder / "data.yaml").write_text("train: train/images\nnames: [Cell, Disc]\n")
    (folder / "train" / "labels").mkdir(exist_ok=True)
    for name, classes in BOXES.items():
        lines = [
            f"{('Cell', 'Disc').index(label)} {(x1 + x2) / 80} {(y1 + y2) / 80} {(x2 - x1) / 40} {(y2 - y1) / 40}"
            for label, boxes in classes.items()
            for x1, y1, x2, y2 in boxes
        ]
        (folder / "train" / "labels" / f"{name}.txt").write_text("\n".join(lines))
    return folder


def records(folder: Path) -> dict[tuple[str, str], list]:
    """(picture, phrase) -> boxes, of all files that were written; the loader has read them back."""
    found = {}
    for file in folder.glob("*.jsonl"):
        for record in map(json.loads, file.read_text().splitlines()):
            assert record["task"] == "boxes"
            found[Path(record["image"]).stem, record["query"]] = record["boxes"]
        assert len(load_jsonl(file, TASKS)) > 0
    return found


@pytest.mark.parametrize("script, made", [(voc, as_voc), (coco, as_coco), (yolo, as_yolo)])
def test_a_picture_and_phrase_have_one_record_with_all_boxes(script, made, tmp_path):
    source = made(tmp_path / "set")
    said = run(script, "--source", str(source), "--query", "the {class}", "--group")
    expected = {("a", CELL): BOXES["a"]["Cell"], ("a", DISC): BOXES["a"]["Disc"], ("b", CELL): BOXES["b"]["Cell"]}
    assert records(source) == expected and "3 records of 2 pictures" in said
    run(script, "--source", str(source), "--query", "the {class}", "--group", "--negatives", "1", "--overwrite")
    assert records(source) == expected | {("b", DISC): [], ("c", CELL): [], ("c", DISC): []}
    for wrong in ("-.1", "1.1", "x"):
        assert "--negatives" in run(script, "--source", str(source), "--group", "--negatives", wrong, expect=2)


def test_negatives_are_a_share_that_follows_from_names_and_seed(tmp_path):
    """200 pictures, one with an object: half of the others, the same ones each time, others with another seed."""
    source = tmp_path / "set"
    source.mkdir()
    images = []
    for i in range(200):
        Image.new("RGB", (8, 8), (i, i // 2, 0)).save(source / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
    one = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    content = {"images": images, "annotations": one, "categories": [{"id": 1, "name": "cell"}]}
    (source / "x_coco.json").write_text(json.dumps(content))
    found = []
    for seed in ("0", "0", "1"):
        flags = ["--group", "--negatives", ".5", "--seed", seed, "--overwrite"]
        run(coco, "--source", str(source), *flags)
        found.append({picture for (picture, _), boxes in records(source).items() if not boxes})
    assert found[0] == found[1] != found[2] and 75 < len(found[0]) < 125


def test_what_is_left_out_makes_no_negative(tmp_path):
    """A crowd, and a box below a pixel: the object is there, so the picture is none without it."""
    source = as_coco(tmp_path / "crowd", iscrowd=1)
    said = run(coco, "--source", str(source), "--group", "--negatives", "1")
    assert "left out, a crowd stands for several objects: 3" in said
    assert records(source) == {("b", DISC): [], ("c", CELL): [], ("c", DISC): []}
    tiny = as_coco(tmp_path / "tiny")
    content = json.loads((tiny / "x_coco.json").read_text())
    content["annotations"][3]["bbox"] = [3, 4, 0.5, 10]  # b's only cell
    (tiny / "x_coco.json").write_text(json.dumps(content))
    said = run(coco, "--source", str(tiny), "--query", "the {class}", "--group", "--negatives", "1")
    assert "less than a pixel" in said and ("b", CELL) not in records(tiny) and ("b", DISC) in records(tiny)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the real blood smears are not here")
def test_bccd_s_red_cells_come_with_all_their_boxes(tmp_path):
    source = tmp_path / "bccd"
    for part in ("Annotations", "images"):
        shutil.copytree(BCCD / part, source / part)
    (tmp_path / "q.json").write_text(
        json.dumps({"WBC": "the white cell", "Platelets": "the platelet", "RBC": "the red cell"})
    )
    run(
        voc, "--source", str(source), "--query", str(tmp_path / "q.json"), "--group", "--negatives", "1", "--clip-boxes"
    )
    counts = {}
    for (_, query), boxes in records(source).items():
        counts.setdefault(query, []).append(len(boxes))
    assert {query: sum(n) for query, n in counts.items()} == {
        "the white cell": 283, "the platelet": 283, "the red cell": 3234,
    }  # fmt: skip
    assert all(len(n) == 282 for n in counts.values())
