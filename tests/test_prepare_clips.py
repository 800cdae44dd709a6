"""prepare/ where a source has clips: MedVidBench, CholecT50 and JIGSAWS as they unpack, each with a bad row; and what
eval.py --submission makes of answers to MedVidBench."""

import json
from types import SimpleNamespace

import pytest
from layouts import picture, run
from PIL import Image
from programs import NANO

import eval as evaluation
from data import load_jsonl
from errors import InputError
from prepare import cholect50, footage, jigsaws, medvidbench
from tasks import TASKS
from tasks.tube import Tube

SIZE = (64, 48)


def records(path) -> list[dict]:
    """After the loader of training has taken them."""
    load_jsonl(path, TASKS, outside=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(qa_type: str, info, answer: str | None, name="vid1", frames=4, question="<video>\nWhen is it cut?", **metadata):
    """As MedVidBench has it: paths of another machine, numbers as texts."""
    talk = [{"from": "human", "value": question}]
    talk += [{"from": "gpt", "value": answer}] if answer is not None else []
    given = {"fps": "2.0", "video_id": name, "input_video_start_frame": "30", "input_video_end_frame": "90"} | metadata
    video = [f"/elsewhere/data/AVOS/frames/{name}/{i:04d}.png" for i in range(frames)]
    rest = {"qa_type": qa_type, "data_source": "AVOS", "struc_info": info, "is_RC": False, "RC_info": {}}
    return {"conversations": talk, "video": video, "metadata": given} | rest


def bench(folder, *rows, name="MedVidU_train.json"):
    for video in ("vid1", "vid2"):
        for i in range(4):
            picture(folder / "pictures" / "AVOS" / "frames" / video / f"{i:04d}.png")
    (folder / name).write_text(json.dumps(list(rows)))
    return ["--source", folder / name, "--images", folder / "pictures", "--overwrite"]


BOXES = {"0.0": [1, 2, 30, 40], "1.0": [5, 6, 25, 30]}


def test_medvidbench_as_released(tmp_path):
    """Its eleven kinds; truths from struc_info in both of its forms, else from the answer's text."""
    others = [row(kind, {}, "x") for kind, to in medvidbench.CONVERTERS.items() if to is None]
    flags = bench(
        tmp_path,
        row(
            "tal",
            [{"action": "cut", "spans": [{"start": 0.5, "end": 1.0}]}, {"spans": [{"start": 1.2, "end": 2.3}]}],
            "?",
        ),
        row("tal", {"spans": [{"start": "0", "end": "1.5"}]}, None, input_video_start_frame=None),
        row("tal", [], "0.5-1.0, 1.5-2.0 seconds.", name="vid2"),
        row(
            "stg",
            [{"object": "hook", "start": 0, "end": 1, "stride": 1, "bbox_dict": BOXES}, {"object": "clipper"}],
            "?",
        ),
        row("stg", BOXES, "?"),
        row("stg", [], "0.0 seconds: [1,2,30,40] 1.0 seconds: [5,6,25,30]"),
        *others,
    )
    said = run(medvidbench, *flags, "--overlay", tmp_path / "sheet.png")
    assert len(others) == 9 and all(
        f"left out, {r['qa_type']} is not converted: 1 (MedVidU_train.json record" in said for r in others
    )
    assert "a span was cut at the clip's end: 1 (MedVidU_train.json record 1)" in said
    assert "of several objects in 'struc_info' the first was taken: 1 (MedVidU_train.json record 4)" in said
    spans, tubes = records(tmp_path / "span-train.jsonl"), records(tmp_path / "tube-train.jsonl")
    assert [r["segments"] for r in spans] == [[[0.5, 1.0], [1.2, 2.0]], [[0.0, 1.5]], [[0.5, 1.0], [1.5, 2.0]]]
    assert [{t: list(map(int, box)) for t, box in r["tube"].items()} for r in tubes] == [BOXES] * 3
    assert spans[0]["query"] == "When is it cut?" and spans[0]["id"] == "vid1&&30&&90&&2.0"
    assert spans[0]["frames"][3] == "pictures/AVOS/frames/vid1/0003.png" and spans[0]["fps"] == 2.0
    assert (spans[0]["dataset"], spans[0]["qa_type"], tubes[0]["task"]) == ("AVOS", "tal", "tube")
    assert Image.open(tmp_path / "sheet.png").width > 1000
    # A video stays in one split; the second has a video of its own.
    run(medvidbench, *flags, "--val", 0.5)
    assert {r["id"].partition("&&")[0] for r in records(tmp_path / "span-val.jsonl")} in ({"vid1"}, {"vid2"})


@pytest.mark.parametrize(
    "bad, words",
    [
        (row("tal", {"spans": [{"start": 1.0, "end": 0.5}]}, None), r"[1.0, 0.5] is no span; write 0 <= start < end"),
        (row("tal", {"spans": [{"start": "x"}]}, None), "is no span with start and end"),
        (row("tal", [], "I cannot tell"), "its answer 'I cannot tell' cannot be read: no span"),
        (row("tal", [], "1-2", fps="fast"), "field 'metadata': 'fps' must be frames per second, not 'fast'"),
        (row("tal", [], "1-2", name="vid9"), "/elsewhere/data/AVOS/frames/vid9/0000.png is not below"),
        (row("tal", [], "1-2", frames=5), "frames[4]' names 'pictures/AVOS/frames/vid1/0004.png', which is not a file"),
        (row("tag", [], "1-2"), "field 'qa_type' is 'tag'; there are tal, stg, next_action"),
        (row("stg", {"0.0": [1, 2, 70, 40]}, None), "reaches outside the 64x48 image"),
        (row("stg", {"0.01": [1, 2, 7, 40], "0.0": [1, 2, 7, 40]}, None), "a second is there twice"),
        (row("stg", {"hook": [1, 2, 7, 40]}, None), "are no seconds"),
        (row("stg", [], None), "has no answer, and its question does not say at which seconds"),
        (row("stg", 5, None), "field 'struc_info' must hold objects, not 5"),
        (row(["tal"], [], "1-2"), "field 'qa_type' is ['tal']; there are tal"),
        (
            row("stg", [], None, question=f"from {'9' * 400} to {'9' * 400} seconds, every second"),
            "for too many seconds",
        ),
        (row("tal", [], "0-1", name="x" * 300), "is not below"),
        (row("tal", [], "0-1", question="half \ud800"), "holds half a surrogate pair"),
        ({"qa_type": "tal"}, "field 'metadata' must be an object, not None"),
        ("x", "must be an object, not 'x'"),
    ],
)
def test_a_row_of_medvidbench_that_is_bad(tmp_path, bad, words):
    good = row("tal", [], "0.5-1.0 seconds.")
    flags = bench(tmp_path, good, bad)
    said = run(medvidbench, *flags, expect=2)
    assert words in said and f"{tmp_path}/MedVidU_train.json record 2: " in said
    assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob(".partial*"))
    said = run(medvidbench, *flags, "--skip-bad", 1)
    assert "left out: " in said and len(records(tmp_path / "span-train.jsonl")) == 1


def test_frames_lie_below_their_folder_whatever_their_names_say(tmp_path):
    """A root of two slashes is one too."""
    picture(outside := tmp_path / "secret.png")
    (home := tmp_path / "home").mkdir()
    for name in (f"/{outside}", f"{outside}", "../secret.png", "a/../../secret.png"):
        with pytest.raises(InputError, match="is not below"):
            medvidbench.frames_below(home, [name])
    picture(home / "secret.png")
    assert medvidbench.frames_below(home, [f"/{outside}"] * 2) == [home / "secret.png"] * 2


def test_questions_without_answers_go_to_the_leaderboard(tmp_path):
    """The test set has no answers: training refuses what comes of it, eval.py --submission answers it."""
    ask = "<video>\nTrack the hook from 0.0 to 1.0 seconds, predicting its location every 0.5 seconds."
    flags = bench(
        tmp_path,
        row("tal", [], None),
        row("stg", [], None, question=ask, id="own&&1&&2&&3"),
        row("tal", [], None, name="vid2", input_video_start_frame="7"),
        name="cleaned_test_data.json",
    )
    rows = json.loads((tmp_path / "cleaned_test_data.json").read_text())
    rows[1]["id"] = "own\ud800&&1&&2&&3"
    rows[2]["metadata"] = {"fps": "2.0", "video_id": "vid2", "start_frame": 7, "end_frame": 9}
    (tmp_path / "cleaned_test_data.json").write_text(json.dumps(rows))
    run(medvidbench, *flags)
    file, out = tmp_path / "questions-test.jsonl", tmp_path / "out"
    assert not TASKS["tube"].unlabelled
    with pytest.raises(InputError, match="questions-test.jsonl:1: field 'segments' is missing"):
        load_jsonl(file, TASKS)
    labelled = {
        "frames": ["pictures/AVOS/frames/vid1/0000.png"],
        "fps": 1.0,
        "task": "tube",
        "query": "it",
        "id": "x",
        "qa_type": "stg",
    }
    with open(file, "a") as more:
        more.write(json.dumps(labelled | {"tube": {"0.0": [0, 0, 20, 20]}}) + "\n")
    told = ["from 0.5 to 1 s", "0.0: [1, 2, 30, 40]", "<think>hm</think> no idea", "0 s: (0, 0, 20, 10)"]
    (answers := tmp_path / "answers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    argv = ["eval.py", "--data", file, "--predictions", answers, "--submission", out / "s.json", "--out", out]
    said = run(evaluation, *argv[1:])
    assert json.loads((out / "s.json").read_text()) == [
        {"id": "vid1&&30&&90&&2.0", "qa_type": "tal", "prediction": "0.5-1.0 seconds."},
        {"id": "own\ud800&&1&&2&&3", "qa_type": "stg", "prediction": "0.0 seconds: [1,2,30,40]"},
        {"id": "vid2&&7&&9&&2.0", "qa_type": "tal", "prediction": "no idea"},
        {"id": "x", "qa_type": "stg", "prediction": "0.0 seconds: [0,0,20,10]"},
    ]
    assert "s.json: 4 answers, 3 of them without a truth" in said and "m_vIoU 0.500" in said
    assert json.loads((out / "eval.json").read_text())["n"] == 1
    assert not TASKS["tube"].unlabelled
    said = run(evaluation, "--data", file, "--submission", "s.json", "--write-norms", tmp_path / "n.json", expect=2)
    assert "--write-norms wants answers that are known" in said
    assert "field 'segments' is missing" in run(evaluation, *argv[1:5], "--out", out, expect=2)
    question = labelled | {"seconds": [0]}
    answers.write_text(json.dumps({"text": "?"}) + "\n")
    file.write_text(json.dumps(question) + "\n")
    assert "1 answers, 1 of them without a truth\nanswers that cannot be read: 1 x no box" in run(evaluation, *argv[1:])
    assert json.loads((out / "s.json").read_text())[0]["prediction"] == "?"
    file.write_text(json.dumps({name: value for name, value in question.items() if name != "id"}) + "\n")
    said = run(evaluation, *argv[1:], expect=2)
    assert "questions-test.jsonl:1: field 'id' must be MedVidBench's, a text, for --submission" in said


def cholec(folder, number: int, annotations: dict, count: int) -> None:
    categories = {
        "triplet": {"0": "x"}, "instrument": {"0": "grasper", "2": "hook", "-1": "null_instrument"},
        "verb": {"1": "retract", "9": "null_verb"}, "target": {"0": "cystic_plate", "14": "null_target"},
        "phase": {"0": "preparation", "1": "carlot-triangle-dissection"},
    }  # fmt: skip
    for i in range(count):
        picture(folder / "videos" / f"VID{number:02d}" / f"{i:06d}.png")
    (folder / "labels").mkdir(exist_ok=True)
    file = {"video": number, "fps": 1, "num_frames": count, "categories": categories, "annotations": annotations}
    (folder / "labels" / f"VID{number:02d}.json").write_text(json.dumps(file))


def seen(tool=-1, verb=-1, target=-1, phase=0, box=(-1, -1, -1, -1)) -> list:
    return [0, tool, 1, *box, verb, target, -1, -1, -1, -1, -1, phase]


def test_cholect50(tmp_path):
    """A frame a second; the hook retracts in seconds 1 and 2 and again in 4; the phase changes with second 3."""
    box, half = (0.25, 0.5, 0.5, 0.25), (0.0, 0.0, 0.5, 0.5)
    frames = {str(i): [seen(phase=int(i >= 3))] for i in range(8)}
    for i in (1, 2, 4):
        frames[str(i)] = [seen(2, 1, 0, int(i >= 3), box), seen(0, 9, 14, int(i >= 3), half)]
    frames["2"] += [seen(0, 9, 14, 0, box)]  # a second grasper
    frames["6"] = [seen(2, 9, 14, 1)]  # a hook without a box
    cholec(tmp_path, 1, frames, 8)
    cholec(tmp_path, 8, {"0": [seen(phase=1)], "1": [seen(2, 1, 0, 1)]}, 2)
    said = run(cholect50, "--source", tmp_path, "--length", 5, "--every", 2, "--overlay", tmp_path / "s.png")
    assert {r["query"]: r["segments"] for r in records(tmp_path / "span-train.jsonl")} == {
        "when does the hook retract the cystic plate?": [[1, 3], [4, 5]],
        "when is the phase preparation?": [[0, 3]],
        "when is the phase carlot triangle dissection?": [[3, 5]],
    }
    assert "left out, it fills the clip: 2 (labels/VID01.json 5-8 s: the phase carlot triangle dissection" in said
    (hook,), known = records(tmp_path / "tube-train.jsonl"), [16, 24, 48, 36]
    assert (hook["query"], hook["tube"], len(hook["frames"])) == ("the hook", {"2.0": known, "4.0": known}, 5)
    assert "no tube, an instrument is there twice or has no box: 1 (labels/VID01.json 0-5 s: grasper)" in said
    said = run(cholect50, "--source", tmp_path, "--length", 3, "--every", 1, "--overwrite")
    assert [(r["query"], r["tube"]) for r in records(tmp_path / "tube-train.jsonl")] == [
        ("the hook", {"1.0": known, "2.0": known}),
        ("the grasper", {"1.0": [0, 0, 32, 24]}),
        ("the hook", {"1.0": known}),
    ]
    assert "no box: 3 (labels/VID01.json 0-3 s: grasper, labels/VID01.json 6-8 s: hook, labels/VID08" in said
    said = run(cholect50, "--source", tmp_path, "--overwrite")
    assert "left out, it fills the clip: 1 (labels/VID08.json 0-2 s: the phase carlot" in said
    assert [r["query"] for r in records(tmp_path / "span-val.jsonl")] == [
        "when does the hook retract the cystic plate?"
    ]
    cholec(tmp_path, 2, {"0": [seen()[:14]]}, 1)
    said = run(cholect50, "--source", tmp_path, "--overwrite", expect=2)
    assert "labels/VID02.json: field 'annotations', frame 0: a row must be 15 numbers" in said
    assert "left out: " in run(cholect50, "--source", tmp_path, "--overwrite", "--skip-bad", 1)
    for key, one in (("0", float("nan")), ("0", float("inf")), ("9" * 12, 0), ("9" * 5000, 0)):
        cholec(tmp_path, 2, {key: [seen(phase=one)]}, 1)
        said = run(cholect50, "--source", tmp_path, "--overwrite", expect=2)
        assert "a row must be 15 numbers" in said or "are no frames; restore it" in said
    cholec(tmp_path, 2, {"0": [seen()[:14]]}, 1)
    (tmp_path / "videos" / "VID01" / "000004.png").unlink()
    assert "frames[4]'" in run(cholect50, "--source", tmp_path, "--overwrite", "--skip-bad", 1, expect=2)


def test_jigsaws(tmp_path):
    """30 frames a second, of which every 15th is taken: 4 seconds are 8 frames."""
    home = tmp_path / "Suturing"
    (home / "transcriptions").mkdir(parents=True)
    for trial in ("B001", "C002"):
        (home / "transcriptions" / f"Suturing_{trial}.txt").write_text("1 30 G1 \n31 60 G2\n61 120 G1\n\n")
        for i in range(120):
            (folder := home / "video" / f"Suturing_{trial}_capture1").mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(folder / f"{i:04d}.png")
    run(jigsaws, "--source", tmp_path, "--fps", 2, "--val", 0.5)
    train, val = (records(tmp_path / f"span-{split}.jsonl") for split in ("train", "val"))
    assert {r["query"]: r["segments"] for r in train} == {
        "when is the surgeon reaching for the needle with the right hand?": [[0, 1], [2, 4]],
        "when is the surgeon positioning the needle?": [[1, 2]],
    }
    assert [name[-8:] for name in train[0]["frames"]] == [f"{i:04d}.png" for i in range(0, 120, 15)]
    assert {r["frames"][0][:31] for r in train}.isdisjoint(r["frames"][0][:31] for r in val) and train[0]["fps"] == 2.0
    said = run(jigsaws, "--source", tmp_path, "--length", 2, "--overwrite")
    cut = [r["segments"] for r in records(tmp_path / "span-all.jsonl")]
    assert cut == [[[0, 1]], [[1, 2]]] * 2 and "left out, it fills the clip: 2" in said
    (home / "transcriptions" / "Suturing_C002.txt").write_text("1 30 G1\n31 60 G16\n")
    said = run(jigsaws, "--source", tmp_path, "--overwrite", expect=2)
    assert "Suturing_C002.txt:2: '31 60 G16' is no 'start end G1' to G15; correct the line" in said
    (home / "transcriptions" / "Suturing_C002.txt").write_text("1 300 G1\n")
    assert "has 120 frames, number 270 is asked for" in run(jigsaws, "--source", tmp_path, "--overwrite", expect=2)
    (home / "transcriptions" / "Suturing_D001.txt").write_text("1 30 G1\n")
    assert "Suturing_D001_capture1.avi nor a folder" in run(
        jigsaws, "--source", tmp_path, "--overwrite", "--skip-bad", 1, expect=2
    )


def test_frames_are_counted_by_their_numbers(tmp_path):
    """Written by hand, names may not be padded."""
    for i in range(60):
        picture(tmp_path / "video" / "T_capture1" / f"frame{i}.png")
    found = jigsaws.media(tmp_path, "T", (0.0, 2.0), SimpleNamespace(camera=1, fps=5))
    assert [file.name for file in found["frames"]] == [f"frame{i}.png" for i in range(0, 60, 6)]


def test_what_happens_at_once_is_in_one_order(tmp_path):
    """Not that of a set, which is another one in every process."""
    cholec(tmp_path, 1, {"0": [seen(tool, 1, 0, 1) for tool in range(8)], "1": [seen()]}, 2)
    file = tmp_path / "labels" / "VID01.json"
    table = json.loads(file.read_text())
    table["categories"]["instrument"] = {str(i): f"tool{i}" for i in range(8)}
    file.write_text(json.dumps(table))
    run(cholect50, "--source", tmp_path)
    asked = [r["query"] for r in records(tmp_path / "span-train.jsonl") if "tool" in r["query"]]
    assert asked == [f"when does the tool{i} retract the cystic plate?" for i in range(8)]


def test_windows_lose_nothing():
    assert footage.windows(100, 30) == [(0, 30), (30, 60), (60, 100)]
    assert footage.windows(110, 30) == [(0, 30), (30, 60), (60, 90), (90, 110)]
    assert footage.windows(10, 30) == [(0, 10)]
    assert footage.within([(0, 35), (40, 50), (58, 70)], (30, 60)) == [(0, 5), (10, 20), (28, 30)]
    assert footage.runs([1, 2, 3, 7, 9, 10]) == [(1, 4), (7, 8), (9, 11)] and footage.runs([]) == []


def test_a_clip_becomes_a_strip_of_frames(tmp_path):
    """The frames at the seconds that are asked for, each with its own box."""
    for i in range(6):
        Image.new("RGB", SIZE, (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    fields = {"frames": [f"{i}.png" for i in range(6)], "fps": 2.0, "query": "it"}
    tube = {"0.5": [0, 0, 32, 24], "2.5": [32, 24, 64, 48]}
    lines = [fields | {"task": "tube", "tube": tube}, fields | {"task": "span", "segments": [[0, 1.5]]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = load_jsonl(tmp_path / "a.jsonl", TASKS)
    strip = evaluation.overlay(samples[0], [None], "", side=128)
    assert strip.size == (128, 16 + 48) and isinstance(samples[0].target, Tube)
    assert strip.getpixel((40, 16 + 40)) == (10, 0, 0) and strip.getpixel((66, 16 + 20)) == (50, 0, 0)
    assert strip.getpixel((31, 16 + 12)) == strip.getpixel((64 + 32, 16 + 36)) == (40, 220, 90)
    bars = evaluation.overlay(samples[1], [[[1.5, 3.0]]], "", side=128)
    assert bars.getpixel((10, bars.height - 8)) == (40, 220, 90) and bars.getpixel((100, bars.height - 3)) == (
        255,
        70,
        60,
    )
    assert evaluation.constant(samples, samples)["tasks"]["span"]["miou"] == 1.0 and NANO.is_dir()
