"""prepare/ where a picture as a whole has a class: tables, folders, paths, MedMNIST, BUSI, and records of boxes."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from layouts import BOX, HAM, SIZE, SMALL, ham_folder, like, mask, names_of, picture, run
from PIL import Image

from data import load_jsonl
from prepare import busi, classes, ham10000, labels, medmnist
from tasks import TASKS

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = {"mel": "melanoma", "nv": "nevus", "bcc": "carcinoma"}


def records(folder: Path, split: str = "all") -> list[dict]:
    """Of labels-SPLIT.jsonl, after the loader of training has taken them."""
    path = folder / f"labels-{split}.jsonl"
    assert len(load_jsonl(path, TASKS, outside=True)) == len(path.read_text().splitlines())
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(folder: Path, split: str = "all") -> dict:
    """Picture's name without its ending -> label."""
    return {Path(record["image"]).stem: record["label"] for record in records(folder, split)}


def table(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    return path


def few(folder: Path, *names: str) -> list:
    """The flags of a folder with pictures, and what its table is called."""
    for name in names or ("a.png", "b.png", "c.png"):
        picture(folder / name)
    return ["--source", folder, "--overwrite", "--csv", folder / "t.csv", "--image", "name"]


@pytest.mark.parametrize(
    "lines, how",
    [
        (["name,dx", "a,mel", "b,nv", "c,mel"], {}),
        (["name;dx", "a.png;mel", "b.png;nv", "c.png;mel"], {"encoding": "utf-8-sig", "end": "\r\n"}),
        (["x\tname\tdx", "1\ta\tmel", "2\tb\tnv", "", "3\tc\tmel"], {}),
        (['"name", "age, years",dx', ' a ,"1,5",mel', 'b,"said ""old""\nor so",nv', "c,,mel"], {"end": "\r"}),
        (["dx|name", "mel|C:\\sets\\a.png", "nv|/of/another/machine/b", "mel|c"], {}),
    ],
)
def test_a_table_in_each_of_its_forms(tmp_path, lines, how):
    flags = few(tmp_path)
    table(tmp_path / "t.csv", *lines, **how)
    said = run(labels, *flags, "--label", "dx")
    assert answers(tmp_path) == {"a": "mel", "b": "nv", "c": "mel"} and "not used" not in said
    assert "labels-all.jsonl: 3 records of 3 pictures (mel: 2, nv: 1)" in said
    (sample, *_), record = load_jsonl(tmp_path / "labels-all.jsonl", TASKS), records(tmp_path)[0]
    assert sample.query == "what does the picture show?\nOptions: mel, nv." and sample.target == ("mel", ("mel", "nv"))
    assert record == {
        "image": "a.png", "width": 64, "height": 48, "task": "label", "query": "what does the picture show?",
        "options": ["mel", "nv"], "label": "mel", "dataset": tmp_path.name,
    }  # fmt: skip


def test_names_options_order_and_classes_that_do_not_count(tmp_path):
    flags = [*few(tmp_path, "a.png", "b.png", "c.png", "d.png"), "--label", "dx", "--query", "what lesion is this?"]
    table(tmp_path / "t.csv", "name,dx", "a,mel", "b,nv", "c,vasc", "d,10")
    (names := tmp_path / "names.json").write_text(json.dumps(WORDS | {"vasc": None, "10": "2"}))
    said = run(labels, *flags, "--names", names)
    assert "left out, --names has null for class 'vasc': 1 (t.csv:4)" in said
    assert answers(tmp_path) == {"a": "melanoma", "b": "nevus", "d": "2"}
    assert {(r["query"], *r["options"]) for r in records(tmp_path)} == {
        ("what lesion is this?", *"2 melanoma nevus".split())
    }
    run(labels, *flags, "--names", names, "--options", "nevus, carcinoma,melanoma,2")  # also what does not occur
    assert records(tmp_path)[0]["options"] == ["nevus", "carcinoma", "melanoma", "2"]
    (tmp_path / "options.json").write_text('["vasc", "nv", "mel", "10"]')
    run(labels, *flags, "--options", tmp_path / "options.json")
    assert records(tmp_path)[0]["options"] == ["vasc", "nv", "mel", "10"]
    run(labels, *flags, "--overlay", tmp_path / "sheet.png")
    assert records(tmp_path)[0]["options"] == ["10", "mel", "nv", "vasc"] and (tmp_path / "sheet.png").is_file()
    table(tmp_path / "t.csv", "name,dx", *(f"{name},{n}" for name, n in zip("abcd", (10, 9, 2, 1), strict=True)))
    run(labels, *flags)
    assert records(tmp_path)[0]["options"] == ["1", "2", "9", "10"]


def test_one_hot_columns_give_the_options_in_their_order(tmp_path):
    """As ISIC 2018 has them: 0.0 and 1.0, a table for each split, whose name tells it."""
    flags = few(
        tmp_path,
        *(f"ISIC2018_Task3_{part}_Input/{i}.jpg" for part, i in (("Training", 1), ("Training", 2), ("Test", 3))),
    )
    train = table(
        tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", "image,NV,MEL,BCC", "1,0.0,1.0,0.0", "2,1.0,0,0"
    )
    test = table(tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv", "image,NV,MEL,BCC", "3,0.0,0.0,1.0")
    flags = [*flags[:3], "--csv", train, test, "--image", "image", "--one-hot"]
    run(labels, *flags)
    assert answers(tmp_path, "train") == {"1": "MEL", "2": "NV"} and answers(tmp_path, "test") == {"3": "BCC"}
    assert records(tmp_path, "test")[0]["options"] == ["NV", "MEL", "BCC"]
    (names := tmp_path / "names.json").write_text('{"MEL": "malignant", "BCC": "malignant", "NV": "benign"}')
    run(labels, *flags, "--names", names)
    assert answers(tmp_path, "train") == {"1": "malignant", "2": "benign"}
    assert records(tmp_path, "test")[0]["options"] == ["benign", "malignant"]
    table(train, "image,NV,MEL,n,BCC", "1,0.0,1.0,7,0.0", "2,1.0,0,7,0", "3,1.0,1.0,7,0")
    said = run(labels, *flags, expect=2)
    assert f"{train}:2: column 'n' must be 0 or 1, not '7'" in said
    flags = [*flags[:3], "--csv", train, "--image", "image", "--one-hot", "NV,MEL, BCC", "--skip-bad"]
    assert f"{train}:4: 2 of its columns are 1 (NV, MEL), but a picture has one class" in run(
        labels, *flags, 0, expect=2
    )
    run(labels, *flags, 1)
    assert answers(tmp_path, "train") == {"1": "MEL", "2": "NV"}
    table(train, "image,NV,MEL", "1,0,0", "2,1,0")
    assert f"{train}:2: none of its columns is 1, but" in run(labels, *flags[:7], "--one-hot", expect=2)


def test_ham_by_diagnosis_lies_beside_its_boxes_in_the_same_splits(tmp_path):
    rows = ham_folder(tmp_path, 30)
    run(ham10000, "--source", tmp_path, "--query", "the {class}")
    (names := tmp_path / "names.json").write_text(json.dumps(ham10000.DIAGNOSES))
    flags = ["--source", tmp_path, "--csv", tmp_path / HAM, "--image", "image_id", "--label", "dx", "--names", names]
    said = run(labels, *flags, "--group", "lesion_id", "--val", 0.1, "--test", 0.1, "--images", "HAM10000_images_*.jpg")
    kind, parts = {row["image_id"]: ham10000.DIAGNOSES[row["dx"]] for row in rows}, []
    for split in ("train", "val", "test"):
        found = answers(tmp_path, split)
        assert sorted(f"{name}.jpg" for name in found) == names_of(tmp_path / f"{split}.jsonl")
        assert found == {name: kind[name] for name in found}
        parts.append({row["lesion_id"] for row in rows if row["image_id"] in found})
    assert [*map(len, parts), len(set.union(*parts))] == [24, 3, 3, 30] and "not used" not in said


def test_grades(tmp_path):
    """As APTOS has them: id_code, diagnosis from 0 to 4. Also by names, and as tables write numbers."""
    flags = [*few(tmp_path, *(f"train_images/{i}.png" for i in "abcde")), "--label", "dx"]
    table(tmp_path / "t.csv", "name,dx", "a,0", "b,4", "c,2.0", "d,1.", "e,3")
    said = run(labels, *flags, "--grades", 5)
    assert (
        answers(tmp_path, "train") == {"a": 0, "b": 4, "c": 2, "d": 1, "e": 3}
        and "(0: 1, 1: 1, 2: 1, 3: 1, 4: 1)" in said
    )
    record = records(tmp_path, "train")[0]
    assert (record["task"], record["grades"], record["query"]) == ("grade", 5, "which grade does the picture show?")
    (sample,) = [s for s in load_jsonl(tmp_path / "labels-train.jsonl", TASKS) if s.media.stem == "b"]
    assert sample.query.endswith("\nGrades: 0, 1, 2, 3, 4.") and sample.target[0] == 4 and "options" not in record
    assert "t.csv:3: class '4' is none of --grades 4; correct it, or map it by --names" in run(
        labels, *flags, "--grades", 4, expect=2
    )
    table(tmp_path / "t.csv", "name,dx", "a,none", "b,severe", "c,2", "d,1", "e,MILD")
    names = ["--grades", "none,mild,severe"]
    assert "t.csv:6: class 'MILD' is none of --grades none,mild,severe" in run(labels, *flags, *names, expect=2)
    (tmp_path / "n.json").write_text('{"none": "none", "severe": "severe", "2": "severe", "1": "mild", "MILD": "mild"}')
    run(labels, *flags, *names, "--names", tmp_path / "n.json")
    assert answers(tmp_path, "train") == {"a": 0, "b": 2, "c": 2, "d": 1, "e": 1}
    assert records(tmp_path, "train")[0]["grades"] == ["none", "mild", "severe"]
    for grades, why in {
        "1": "--grades 1: one class alone (['0']), but a choice needs two", "0,1": "the name '0' is a number, as every",
        "a,,b": "--grades a,,b: field 'word 2' must be a non-empty string", "a,A": "classes 'a' and 'A' are one when",
    }.items():  # fmt: skip
        assert why in run(labels, *flags, "--grades", grades, expect=2)


@pytest.mark.parametrize(
    "lines, flags, why",
    [
        ([], "", "t.csv:1: column 'dx' is missing; it has []"),
        (["name,label", "a,mel"], "", "t.csv:1: column 'dx' is missing; it has ['name', 'label']"),
        (["name,dx"], "", "t.csv: has no line below the first, which names the columns"),
        (["name,dx,dx", "a,mel,nv"], "", "t.csv:1: column 'dx' stands there twice; rename one"),
        (["name,dx", "a,mel", "b"], "", "t.csv:3: has 1 fields, the first line names 2 columns; correct the line"),
        (["name,dx", "a,mel", "b,nv,1"], "", "t.csv:3: has 3 fields, the first line names 2 columns"),
        (["name,dx", "a,mel", 'b,"nv', "c,nv"], "", "t.csv:3: cannot be read (unexpected end of data)"),
        (["name,dx", "a,mel", "b, "], "", "t.csv:3: column 'dx' is empty"),
        (["name,dx", "a,mel", ",nv"], "", "t.csv:3: column 'name' is empty"),
        (["name,dx", "a,mel", "d,nv"], "", "t.csv:3: the picture d is not there; unpack all archives"),
        (["name,dx", "a,mel", "a.jpg,nv"], "", "t.csv:3: the picture a.jpg is not there"),
        (["name,dx", "a,mel", "../a.png,nv"], "", "t.csv:3: label 'nv', but ..t.csv:2 has 'mel' for the same p"),
        (["name,dx", "a,mel", "b,nv"], "--options mel,bcc", "t.csv:3: class 'nv' is none of --options mel,bcc; c"),
        (["name,dx", "a,mel", "b,nv"], "--names NAMES", "t.csv:3: class 'nv' is not in ..names.json; add it there"),
        (["name,dx", "a,mel", "b,mel"], "", ": one class alone (['mel']), but a choice needs two"),
        (["name,dx", "a,mel", "b,Mel"], "", ": classes 'Mel' and 'mel' are one when read; join them by --names"),
        (["name,dx", "a,mel", "b,m\x07l"], "", "t.csv:3: class m\\x07l must be a word, or some on one line, of at m"),
        (["name,dx,who", "a,mel,1", "a,mel,2"], "--options mel,nv --group who", "t.csv:3: group '2', but ..:2 has"),
        (["name,dx,who", "a,mel,1", "b,nv,"], "--group who", "t.csv:3: column 'who' is empty"),
        (["name,dx,part", "a,mel,train", "b,nv,7"], "--split part", "t.csv:3: '7' is no split; there are train, train"),
        (["name,dx", "a,mel", "b,nv"], "--group who", "t.csv:1: column 'who' is missing"),
        (["name,dx", "a,mel", "b,nv"], "--delimiter ;", "t.csv:1: column 'dx' is missing; it has ['name,dx']"),
        (["name,dx", "a,mel", "e,nv"], "", "t.csv:3: e may be e.jpg and e.png; choose by --images, such as 'images"),
        (["name,dx", "a,mel", "b,nv"], "--query {class}", "--query: must be one question for all pictures: {class}"),
        (["name,dx", "a,mel", "b,nv"], "--images *.tif", "--images '*.tif': fits none of 5 pictures"),
    ],
)  # fmt: skip
def test_tables_that_are_wrong(tmp_path, lines, flags, why):
    table(tmp_path / "t.csv", *lines)
    (tmp_path / "names.json").write_text('{"mel": "melanoma"}')
    flags = flags.replace("NAMES", str(tmp_path / "names.json")).split()
    said = run(labels, *few(tmp_path, "a.png", "b.png", "c.png", "e.png", "e.jpg"), "--label", "dx", *flags, expect=2)
    assert like(f"error: ..{why}", said) and said.count("error: ") == 1 and not list(tmp_path.glob("*.jsonl"))


def test_lines_that_may_be_wrong_are_left_out_and_listed(tmp_path):
    flags = [*few(tmp_path, "a.png", "b.png", "c.png", "d.png"), "--label", "dx"]
    table(tmp_path / "t.csv", "name,dx", "a,mel", "lost,nv", "b,nv", "b,mel", "c,nv", "c,nv", "d")
    said = run(labels, *flags, "--skip-bad", 3)
    assert answers(tmp_path) == {"a": "mel", "c": "nv"}  # which of b's two is right, nobody knows
    assert said.count("left out: ") == 3 and "left out, the same record again: 1 (t.csv:7)" in said
    assert "not used, no line of a table names the picture: 1 (d.png)" in said


def test_a_name_in_several_folders(tmp_path):
    """Its folders choose, as far as they are named; equal files are one picture; others are not guessed between."""
    for name in ("one/x.png", "two/x.png", "one/y.png", "two/y.png", "z.png", "w.png"):
        picture(tmp_path / name)
    (tmp_path / "two" / "y.png").write_bytes((tmp_path / "one" / "y.png").read_bytes())
    (tmp_path / "w.png").write_bytes((tmp_path / "z.png").read_bytes())
    flags = ["--source", tmp_path, "--csv", tmp_path / "t.csv", "--image", "name", "--label", "dx", "--overwrite"]
    table(tmp_path / "t.csv", "name,dx", "two/x.png,mel", "y,nv", "z,mel", "w,nv")
    said = run(labels, *flags)
    assert {r["image"]: r["label"] for r in records(tmp_path)} == {
        "two/x.png": "mel", "one/y.png": "nv", "z.png": "mel", "w.png": "nv",
    }  # fmt: skip
    assert "not used, a second file of that name: 1 (two/y.png)" in said
    assert like("equal files of different classes: 1 (..z.png", said)
    table(tmp_path / "t.csv", "name,dx", "x.png,mel", "y,nv")
    assert "t.csv:2: x.png may be one/x.png and two/x.png; choose by --images" in run(labels, *flags, expect=2)
    table(tmp_path / "t.csv", "name,dx", "three/x.png,mel", "y,nv")
    assert "t.csv:2: the picture three/x.png is not there" in run(labels, *flags, expect=2)


def test_splits_by_column_and_groups_that_reach_over_two(tmp_path):
    flags = [*few(tmp_path, *(f"{i}.png" for i in range(20))), "--label", "dx", "--split", "part", "--group", "who"]
    part = ["train"] * 12 + ["valid"] * 4 + ["Test"] * 4
    lines = [f"{i},{'mel' if i % 3 else 'nv'},{part[i]},p{i // 2}" for i in range(20)]
    table(tmp_path / "t.csv", "name,dx,part,who", *lines)
    run(labels, *flags)
    assert [len(records(tmp_path, split)) for split in ("train", "val", "test")] == [12, 4, 4]
    table(tmp_path / "t.csv", "name,dx,part,who", *lines[:-1], "19,mel,train,p9")
    assert "1 pictures or copies of them are in two splits: " in run(labels, *flags, expect=2)
    run(labels, *flags, "--leaks", "drop")
    assert "19" not in answers(tmp_path, "train") and len(records(tmp_path, "test")) == 3
    run(labels, *flags, "--val", 0.2, "--seed", 3)
    parts = [{int(name) // 2 for name in answers(tmp_path, split)} for split in ("train", "val")]
    assert [*map(len, parts), len(parts[0] & parts[1])] == [8, 2, 0]


def test_a_folder_for_each_class(tmp_path):
    for split in ("train", "val"):
        for kind in ("NORMAL", "Bacterial_Pneumonia"):
            picture(tmp_path / split / kind / "images" / f"{split}-{kind}.png")
    flags = ["--source", tmp_path, "--folders", "--overwrite"]
    run(labels, *flags)
    assert answers(tmp_path, "val") == {"val-NORMAL": "NORMAL", "val-Bacterial_Pneumonia": "bacterial pneumonia"}
    (names := tmp_path / "names.json").write_text('{"NORMAL": "normal", "Bacterial_Pneumonia": "pneumonia"}')
    run(labels, *flags, "--names", names)
    assert answers(tmp_path, "train") == {"train-NORMAL": "normal", "train-Bacterial_Pneumonia": "pneumonia"}
    stray = picture(tmp_path / "train" / "stray.png")
    assert f"{stray}: lies in no folder of a class below {tmp_path}" in run(labels, *flags, expect=2)
    assert "left out: " in run(labels, *flags, "--skip-bad", 1)
    one = ["--source", tmp_path / "train" / "NORMAL", "--folders"]
    assert "lies in no folder of a class" in run(labels, *one, expect=2)
    picture(tmp_path / "one" / "benign" / "a.png"), picture(tmp_path / "one" / "benign" / "b.png")
    said = run(labels, "--source", tmp_path / "one", "--folders", expect=2)
    assert f"error: {tmp_path}/one: one class alone (['benign']), but a choice needs two" in said
    (tmp_path / "empty").mkdir()
    assert "empty: holds no picture (.jpg, " in run(labels, "--source", tmp_path / "empty", "--folders", expect=2)


MURA = r"(?P<group>patient\d+)/.*_(?P<label>positive|negative)/"


def test_the_class_in_the_path(tmp_path):
    """As MURA has it: a study's folder says it, a patient may have several."""
    for name in (
        "train/XR_WRIST/patient00001/study1_positive/image1", "train/XR_WRIST/patient00001/study1_positive/image2",
        "train/XR_HAND/patient00001/study2_negative/image1", "train/XR_HAND/patient00002/study1_negative/image1",
        "train/XR_HAND/patient00003/study1_negative/image1", "valid/XR_HAND/patient11185/study1_positive/image1",
        "valid/XR_HAND/patient11186/study1_negative/image1", "docs/figure",
    ):  # fmt: skip
        picture(tmp_path / f"{name}.png")
    flags = ["--source", tmp_path, "--overwrite", "--pattern"]
    said = run(labels, *flags, MURA)
    assert Counter(r["label"] for r in records(tmp_path, "train")) == {"positive": 2, "negative": 3}
    assert {r["image"].split("/")[2]: r["label"] for r in records(tmp_path, "val")} == {
        "patient11185": "positive", "patient11186": "negative",
    }  # fmt: skip
    assert "left out, --pattern does not fit its path: 1 (docs/figure.png)" in said
    for seed in range(5):
        run(labels, *flags, MURA, "--val", 0.4, "--seed", seed)
        of = [{r["image"].split("/")[2] for r in records(tmp_path, split)} for split in ("train", "val")]
        assert [*map(len, of), len(of[0] & of[1])] == [3, 2, 0]
    for pattern, why in {
        "(": "is no regular expression (missing ), unterminated subpattern at position 0)",
        "(.*)": "needs a group (?P<label>...), the class", "(?P<label>x{9})": "fits no path of a picture below",
    }.items():  # fmt: skip
        assert f"--pattern {pattern}: {why}" in run(labels, *flags, pattern, expect=2)


def test_flags_that_do_not_go_together(tmp_path):
    flags = few(tmp_path)
    for more, why in [
        (flags, "--csv needs --image, and --label or --one-hot"),
        ([*flags, "--label", "dx", "--one-hot"], "--csv needs --image, and --label or --one-hot"),
        ([*flags[:5], "--label", "dx"], "--csv needs --image"),
        ([*flags, "--label", "dx", "--delimiter", "::"], "--delimiter must be one character, or one of comma, semi"),
        (["--source", tmp_path, "--folders", "--group", "who"], "--group speaks of columns, so it goes with --csv"),
        (["--source", tmp_path], "one of the arguments --csv --folders --pattern is required"),
        ([*flags, "--folders"], "not allowed with argument"),
        ([*flags, "--label", "dx", "--options", "a,b", "--grades", "2"], "not allowed with argument"),
        ([*flags, "--label", "dx", "--clip-boxes"], "unrecognized arguments: --clip-boxes"),
    ]:
        assert why in run(labels, *more, expect=2)
    for content, why in [
        ("[]", "names.json: holds [] and no JSON object; write {"), ('{"mel": 1}', "field 'mel' must be a non-empty"),
        ('{"mel": ""}', "field 'mel' must be a non-empty"), ("{", "names.json: is not valid JSON"),
        ('{"mel": "a\\nb"}', "names.json: mel a\\nb must be a word, or some on one line, of at m"),
    ]:  # fmt: skip
        (names := tmp_path / "names.json").write_text(content)
        table(tmp_path / "t.csv", "name,dx", "a,mel", "b,nv")
        assert why in run(labels, *flags, "--label", "dx", "--names", names, expect=2)
    names.write_text('{"a": 1}')
    said = run(labels, *flags, "--label", "dx", "--options", names, expect=2)
    assert like("--options ..names.json: must hold a list of texts, not {'a': 1}", said)


# ------------------------------------------------------------------------------------------------------------ MedMNIST


def arrays(counts=(7, 3, 2), side: int = 28, channels: int = 0, kinds: int = 7) -> dict[str, np.ndarray]:
    rng, made = np.random.default_rng(side + kinds), {}
    for part, n in zip(medmnist.PARTS, counts, strict=True):
        shape = (n, side, side, channels) if channels else (n, side, side)
        made[f"{part}_images"] = rng.integers(0, 256, shape, np.uint8)
        made[f"{part}_labels"] = (np.arange(n, dtype=np.uint8) % kinds)[:, None]
    return made


def npz(path: Path, change=None, compressed: bool = True, **how) -> Path:
    """change: array -> another value for it, None to leave it out."""
    whole = arrays(**how) | (change or {})
    (np.savez_compressed if compressed else np.savez)(path, **{k: v for k, v in whole.items() if v is not None})
    return path


@pytest.mark.parametrize("side, channels, compressed", [(28, 0, True), (64, 3, False), (224, 3, True)])
def test_medmnist_pictures_and_classes_of_each_size(tmp_path, side, channels, compressed):
    source = npz(tmp_path / f"dermamnist_{side}.npz", compressed=compressed, side=side, channels=channels)
    said, whole = run(medmnist, "--source", source), np.load(source)
    names = medmnist.SETS["dermamnist"].split(", ")
    for part in medmnist.PARTS:
        found = records(tmp_path, part)
        assert [names.index(r["label"]) for r in found] == whole[f"{part}_labels"][:, 0].tolist()
        for i, record in enumerate(found):
            assert record["image"] == f"dermamnist_{side}/{part}/{i:06d}.png" and record["options"] == names
            assert np.array_equal(np.asarray(Image.open(tmp_path / record["image"])), whole[f"{part}_images"][i])
    assert {(r["task"], r["dataset"], r["width"]) for r in found} == {("label", f"dermamnist_{side}", side)}
    assert "labels-val.jsonl: 3 records of 3 pictures" in said


def test_medmnist_names_grades_limits_and_a_second_run(tmp_path):
    flags = ["--source", npz(tmp_path / "retinamnist.npz", kinds=5, counts=(30, 5, 5)), "--out", tmp_path / "out"]
    run(medmnist, *flags, "--limit", 6)
    found = answers(tmp_path / "out", "train")
    assert len(found) == 6 and found == {name: int(name) % 5 for name in found} and sorted(found) == list(found)
    record = records(tmp_path / "out", "val")[0]
    assert (record["task"], record["grades"]) == ("grade", 5) and len(records(tmp_path / "out", "val")) == 5
    assert list(found) != [f"{i:06d}" for i in range(6)]
    said = run(medmnist, *flags, "--limit", 6, expect=2)
    assert like("png is already there; name another --out, or give --overwrite", said)
    run(medmnist, *flags, "--limit", 6, "--overwrite", "--grades", "none,mild,moderate,severe,proliferative")
    assert answers(tmp_path / "out", "train") == found and records(tmp_path / "out", "val")[0]["grades"][1] == "mild"
    assert "invalid limit value: '0'" in run(medmnist, *flags, "--limit", 0, expect=2)
    source = npz(tmp_path / "own_28.npz", kinds=3, counts=(9, 3, 3))
    run(medmnist, "--source", source, "--out", tmp_path / "own")
    assert records(tmp_path / "own", "test")[2]["label"] == "2" and records(tmp_path / "own", "val")[0][
        "options"
    ] == list("012")
    (names := tmp_path / "names.json").write_text('{"0": "benign", "1": "malignant", "2": null}')
    run(medmnist, "--source", source, "--out", tmp_path / "own", "--names", names, "--overwrite")
    assert [r["label"] for r in records(tmp_path / "own", "test")] == ["benign", "malignant"]


def test_medmnist_sets_by_name():
    """Eleven of the twelve: ChestMNIST has several classes a picture."""
    counts = {name: len(set(names.split(", "))) for name, names in medmnist.SETS.items()}
    assert counts == {
        "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2,
        "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
    }  # fmt: skip


Z, L = np.zeros((7, 28, 28), np.uint8), np.zeros((7, 1), np.uint8)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"val_images": None}, "array 'val_images' is missing; it has ['train_images'"),
        ({"test_labels": None}, "array 'test_labels' is missing"),
        ({"train_labels": np.zeros((7, 14), np.uint8)}, "'train_labels': is of shape (7, 14): each picture may have"),
        ({"train_labels": np.array([[{}]] * 7, object)}, "array 'train_labels': holds Python objects, which would"),
        ({"train_images": np.array([None] * 7, object)}, "array 'train_images': holds Python objects"),
        ({"train_labels": L.astype(float)}, "'train_labels': must be whole numbers of shape (N, 1), not float64 of"),
        ({"train_labels": L[:6]}, "array 'train_labels' has 6 labels, train_images has 7 pictures; download"),
        ({"train_labels": L + 9}, "train_labels[0]: is 9, but dermamnist has classes 0 to 6"),
        ({"val_labels": np.array([[0], [-1], [0]])}, "val_labels[1]: is -1, but dermamnist has classes 0 to 6"),
        ({"train_images": Z.astype(np.float32)}, "must be uint8 of shape (N, S, S) or (N, S, S, 3), not float32"),
        ({"train_images": Z[0]}, "must be uint8 of shape (N, S, S) or (N, S, S, 3), not uint8 of (28, 28)"),
        ({"train_images": np.zeros((7, 28, 28, 28), np.uint8)}, "(7, 28, 28, 28): volumes of the 3D sets are not read"),
        ({"train_images": np.zeros((7, 5000, 1), np.uint8)}, "must be uint8 of shape (N, S, S) or"),
        ({"train_images": np.asfortranarray(Z)}, "stands column by column; save it by numpy.ascontiguousarray"),
        ({f"{part}_labels": np.zeros((n, 1), int) for part, n in (("train", 7), ("val", 3), ("test", 2))}, ""),
    ],
)  # fmt: skip
def test_medmnist_files_that_are_wrong(tmp_path, change, why):
    source = npz(tmp_path / "dermamnist.npz", change)
    said = run(medmnist, "--source", source, expect=2 if why else 0)
    assert not why or like(f"dermamnist.npz..{why}", said) and [f.name for f in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("what", ["text", "cut", "header", "short", "long", "bits", "shape", "version"])
def test_medmnist_files_that_are_damaged(tmp_path, what):
    """One sentence, and none of the pictures that came before stay."""
    source, images = npz(tmp_path / "dermamnist.npz", compressed=False), arrays()["val_images"]
    content = source.read_bytes()
    if what == "text":
        source.write_text("this is no archive")
    elif what == "cut":
        source.write_bytes(content[: len(content) // 2])
    elif what == "bits":  # zip's checksum finds it, at the end of the array
        at = content.index(images.tobytes()) + 9
        source.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        buffer = io.BytesIO()
        np.save(buffer, images)
        array = buffer.getvalue()
        array = {
            "header": array.replace(b"{", b"(", 1), "short": array[:-1], "long": array + b"0",
            "shape": array.replace(b"(3, 28, 28)", b"(-3, 28, 8)"),
            "version": array.replace(b"\x01\x00", b"\x09\x00", 1),
        }[what]  # fmt: skip
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "new.npz", "w") as new:
            for name in old.namelist():
                new.writestr(name, array if name == "val_images.npy" else old.read(name))
        (tmp_path / "new.npz").replace(source)
    said = run(medmnist, "--source", source, expect=2)
    place = "dermamnist.npz: is no .npz file (" if what in ("text", "cut") else "dermamnist.npz: array 'val_images': "
    assert like(f"error: ..{place}", said) and said.count("error: ") == 1 and len(said.splitlines()[-1]) < 400
    assert [f.name for f in tmp_path.iterdir()] == [source.name]


# ---------------------------------------------------------------------------------------------------------------- BUSI


def busi_folder(folder: Path) -> Path:
    for kind, n in (("benign", 12), ("malignant", 8), ("normal", 5)):
        for i in range(1, n + 1):
            file = picture(folder / kind / f"{kind} ({i}).png", *[BOX] * (kind != "normal"))
            mask(file.with_name(f"{file.stem}_mask.png"), *[BOX] * (kind != "normal"))
    mask(folder / "benign" / "benign (3)_mask_1.png", SMALL)
    mask(folder / "benign" / "benign (3)_mask_2.png", (50, 40, 52, 42))
    return folder


def test_busi_boxes_and_labels_are_of_the_same_splits(tmp_path):
    flags = ["--source", busi_folder(tmp_path), "--question", "what does the ultrasound show?"]
    said = run(busi, *flags)
    assert "left out, the mask is empty: 5 (normal/normal (1)_mask.png, " in said
    assert "the mask has several parts: the largest is taken: 1 (benign/benign (3)_mask.png)" in said
    total = Counter()
    for split in ("train", "val", "test"):
        boxes = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        labelled = {r["image"]: r["label"] for r in records(tmp_path, split)}
        assert all(image.startswith(f"{label}/") for image, label in labelled.items())
        assert {r["image"] for r in boxes} == {image for image, label in labelled.items() if label != "normal"}
        assert {tuple(r["bbox"]) for r in boxes} == {BOX} and {r["query"] for r in boxes} == {"the breast lesion"}
        total.update(labelled.values())
    assert total == {"benign": 12, "malignant": 8, "normal": 5} and len(labelled) == 2
    record = records(tmp_path, "train")[0]
    assert (record["options"], record["query"]) == (["benign", "malignant", "normal"], "what does the ultrasound show?")
    assert len(load_jsonl(tmp_path / "train.jsonl", TASKS)) + len(records(tmp_path, "train")) > 30


def test_busi_masks_and_what_is_not_whole(tmp_path):
    flags = ["--source", busi_folder(tmp_path), "--overwrite", "--val", 0, "--test", 0]
    for choice, box in {"union": [1, 2, 52, 42], "drop": None}.items():
        run(busi, *flags, "--component", choice, "--query", "the {class} tumour")
        boxes = {r["image"]: r for r in map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())}
        assert boxes.get("benign/benign (3).png", {}).get("bbox") == box and answers(tmp_path)["benign (3)"] == "benign"
        assert boxes["malignant/malignant (1).png"]["query"] == "the malignant tumour"
    (names := tmp_path / "names.json").write_text('{"benign": "no cancer", "malignant": "cancer", "normal": null}')
    assert "null for class 'normal': 5" in run(busi, *flags, "--names", names)
    assert Counter(answers(tmp_path).values()) == {"no cancer": 12, "cancer": 8}
    mask(tmp_path / "benign" / "benign (3)_mask_2.png", SMALL, size=(65, 48))
    said = run(busi, *flags, expect=2)
    assert like("masks of one picture, ..(3)_mask.png and ..(3)_mask_2.png, are of 64x48 and 65x48; mend one", said)
    (tmp_path / "benign" / "benign (1)_mask.png").unlink(), (tmp_path / "normal" / "normal (2).png").unlink()
    (tmp_path / "malignant" / "malignant (4).png").write_text("no picture")
    said = run(busi, *flags, "--skip-bad", 4)
    assert "benign/benign (1).png: has no benign (1)_mask.png; unpack" in said and "left out: image " in said
    assert "normal/normal (2)_mask.png: its picture normal (2).png is not there" in said
    assert Counter(answers(tmp_path).values()) == {"benign": 10, "malignant": 7, "normal": 4}
    assert len(load_jsonl(tmp_path / "all.jsonl", TASKS)) == 17  # neither kind of record of a picture with a fault
    (tmp_path / "malignant").rename(tmp_path / "cancer")
    assert "malignant/ holds no .png; it must be the folder of benign, malignant, normal" in run(
        busi, *flags, "--skip-bad", 9, expect=2
    )


# ----------------------------------------------------------------------------------------------------- records of boxes


def boxes(folder: Path, split: str, *queries: tuple, dataset: str = "cells") -> Path:
    """A record of each query of each picture."""
    folder.mkdir(exist_ok=True)
    with open(folder / f"{split}.jsonl", "w") as file:
        for i, some in enumerate(queries):
            image = picture(folder / "images" / f"{split}{i}.png").relative_to(folder).as_posix()
            for query in some:
                record = {"image": image, "width": SIZE[0], "height": SIZE[1], "query": query, "bbox": BOX}
                print(json.dumps(record | {"dataset": dataset}), file=file)
    return folder


def test_classes_of_pictures_with_boxes_of_one_class(tmp_path):
    white, plate, red = "the white cell", "the platelet", "the red cell"
    boxes(tmp_path, "train", [white], [plate, white], [white, white], [plate], [red])
    flags = ["--source", boxes(tmp_path, "val", [white], [white, red]), "--overwrite"]
    before = (tmp_path / "train.jsonl").read_bytes()
    said = run(classes, *flags)
    assert answers(tmp_path, "train") == {
        "train0": "white cell",
        "train2": "white cell",
        "train3": "platelet",
        "train4": "red cell",
    }
    assert answers(tmp_path, "val") == {"val0": "white cell"} and (tmp_path / "train.jsonl").read_bytes() == before
    assert "left out, several classes are in the picture: 2 (train.jsonl:2, val.jsonl:2)" in said
    record = records(tmp_path, "val")[0]
    assert (record["dataset"], record["options"]) == ("cells", ["platelet", "red cell", "white cell"])
    (names := tmp_path / "names.json").write_text(json.dumps({white: "leukocyte", plate: "thrombocyte", red: None}))
    said = run(classes, *flags, "--names", names, "--query", "which cell is it?")
    assert answers(tmp_path, "val") == {"val0": "leukocyte", "val1": "leukocyte"} and "null for class 'the red" in said
    assert set(answers(tmp_path, "train")) == {"train0", "train2", "train3"}
    run(classes, "--source", tmp_path / "train.jsonl", "--overwrite", "--out", tmp_path / "out", "--dataset", "mine")
    assert {r["dataset"] for r in records(tmp_path / "out", "train")} == {"mine"}


def test_classes_of_records_that_cannot_be_used(tmp_path):
    flags = ["--source", boxes(tmp_path / "a", "train", ["the x"], ["the x"])]
    assert "one class alone (['x']), but a choice needs two" in run(classes, *flags, expect=2)
    flags = ["--source", boxes(tmp_path / "a", "val", ["the y"], dataset="other"), "--overwrite"]
    assert like(
        "train.jsonl:1 is of dataset 'cells', ..val.jsonl:1 of 'other'; convert one", run(classes, *flags, expect=2)
    )
    (tmp_path / "a" / "val.jsonl").write_text('{"image": "x.png"}\n')
    assert "val.jsonl:1: field 'query' is missing" in run(classes, *flags, expect=2)
    run(classes, *flags[:2], "--dataset", "it", "--options", "x,y", "--skip-bad", 1, expect=2)  # a file with no record
    assert "holds none of train.jsonl, val.jsonl" in run(classes, "--source", tmp_path, expect=2)


# ----------------------------------------------------------------------------------------------------------- real files


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real images are not here: {DATA}")
def test_real_records_and_metadata(tmp_path):
    run(classes, "--source", DATA / "bccd", "--out", tmp_path / "bccd")
    counts = [Counter(answers(tmp_path / "bccd", split).values()) for split in ("train", "val")]
    assert counts == [{"white blood cell": 143, "platelet": 3}, {"white blood cell": 62}]
    parts = {f"the fracture in the {part}": part for part in ("hand", "leg", "hip", "shoulder")}
    (names := tmp_path / "names.json").write_text(json.dumps(parts | {"the bone fracture": None}))
    run(classes, "--source", DATA / "fracatlas", "--out", tmp_path / "bones", "--names", names)
    counts = [Counter(answers(tmp_path / "bones", split).values()) for split in ("train", "val")]
    assert counts == [{"hand": 225, "leg": 97, "shoulder": 10, "hip": 8}, {"hand": 36, "leg": 22}]
    ham = DATA / "fixtures" / "ham10000"
    flags = ["--csv", ham / HAM, "--image", "image_id", "--label", "dx", "--group", "lesion_id", "--val", 0.2]
    run(labels, "--source", ham, "--out", tmp_path / "ham", *flags)
    found = [answers(tmp_path / "ham", split) for split in ("train", "val")]
    assert [*map(len, found)] == [10, 2] and found[0]["ISIC_9000004"] == "akiec"
