"""prepare/ on real pictures: small parts of the sets as they unpack, which stay outside the repository."""

import json
from pathlib import Path

import pytest
from layouts import names_of, read, run
from PIL import Image

from data import load_jsonl
from images import load
from prepare import coco, ham10000, masks, tn3k, vlm_r1, voc, yolo
from tasks import TASKS

FIXTURES = Path(__file__).parents[2] / "shared" / "data" / "fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"real images are not here: {FIXTURES}")

CELLS = {  # BCCD's own boxes, of BloodImage_00000 ... 7: white cells and platelets that are the only one of their class
    (0, "WBC"): (260, 177, 491, 376), (1, "WBC"): (68, 315, 286, 480), (2, "WBC"): (283, 1, 567, 106),
    (3, "WBC"): (127, 40, 344, 226), (3, "platelet"): (335, 268, 370, 299), (4, "WBC"): (109, 134, 324, 321),
    (4, "platelet"): (127, 47, 163, 81), (5, "WBC"): (230, 288, 441, 480), (6, "WBC"): (117, 190, 290, 360),
    (7, "WBC"): (193, 92, 387, 285),
}  # fmt: skip


@pytest.mark.parametrize("script, flags", [(coco, []), (voc, []), (yolo, ["--val", 0.25])])
def test_bccd_gives_the_same_boxes_in_each_format(tmp_path, script, flags):
    (tmp_path / "q.json").write_text('{"WBC": "WBC", "Platelets": "platelet"}')
    source = FIXTURES / script.__name__.removeprefix("prepare.")
    said = run(script, "--source", source, "--out", tmp_path, "--query", tmp_path / "q.json", *flags)
    records = [record for file in tmp_path.glob("*.jsonl") for record in read(file)]
    assert {(int(Path(r["image"]).stem[-5:]), r["query"]): tuple(r["bbox"]) for r in records} == CELLS
    assert "one phrase for several objects (--all keeps them): 2 (" in said  # platelets of pictures 5 and 6
    assert f"class 'RBC' has no phrase in --query: {127 * (2 if script is yolo else 1)} (" in said


def test_real_pictures_of_each_layout(tmp_path):
    def records(script, source, *flags, splits=("all",)) -> list[dict]:
        run(script, "--source", FIXTURES / source, "--out", tmp_path, "--overwrite", *flags)
        return [record for split in splits for record in read(tmp_path / f"{split}.jsonl")]

    native = [json.loads(line) for line in (FIXTURES / "native.jsonl").read_text().splitlines()]
    want, splits = {Path(record["image"]).stem: record["bbox"] for record in native}, ("train", "val", "test")
    assert {Path(r["image"]).stem: r["bbox"] for r in records(ham10000, "ham10000", splits=splits)} == want
    lesions = [{int(Path(name).stem[-2:]) // 2 for name in names_of(tmp_path / f"{split}.jsonl")} for split in splits]
    assert [*map(len, lesions), len(set.union(*lesions))] == [4, 1, 1, 6]  # of two pictures each
    for record in (found := records(tn3k, "tn3k", "--fold", 2, splits=splits)):  # JPEG masks, each of one part
        gray = Image.open(str(tmp_path / record["image"]).replace("-image", "-mask"))
        assert tuple(record["bbox"]) == gray.point(lambda v: 255 * (v > 127)).getbbox()
    assert [int(Path(r["image"]).stem) for r in found] == [0, 1, 3, 4, 5, 6, 8, 9, 2, 7, 0, 1, 2, 3, 4, 5]
    # Stored 373x454 and turned by EXIF; the annotation states 454x373: its box is of the displayed picture.
    (record,) = records(coco, "exif", "--query", "the fracture")
    assert (record["width"], record["height"], record["bbox"]) == (454, 373, [177.31, 74.85, 214.12, 99.08])
    found = records(vlm_r1, "vlmr1_rec.jsonl", "--images", FIXTURES / "ham10000")
    assert [r["bbox"] for r in found] == list(want.values()) and {r["query"] for r in found} == {"the skin lesion"}
    flags = ["--images", "trainval-image/*.jpg", "--masks", "trainval-mask/*.jpg", "--query", "the nodule"]
    assert len(records(masks, "tn3k", *flags)) == 10
    for name, counts in {"isic2017": (2000, 150), "bccd": (248, 108), "fracatlas": (418, 73)}.items():
        for split, n in zip(splits, counts, strict=False):
            samples = load_jsonl(FIXTURES.parent / name / f"{split}.jsonl", TASKS)
            assert len(samples) == n and {sample.dataset for sample in samples} == {name}
        for image, box, sample in ((*load(sample), sample) for sample in samples[:10]):
            assert image.size == sample.size and box == sample.target
