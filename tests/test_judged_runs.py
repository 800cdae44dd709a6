"""Runs with captions and a judge: the key stays out of all files, a resumed run hears what it heard, boxes, labels and
captions learn together, too many failed calls end the run with a sentence and a checkpoint."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from programs import grpo, lines, run, sentence, small, without_times, write_records
from test_judge import GOOD, KEY, completion, server

import eval as evaluation
import tasks
import train_grpo
import train_sft
from judge import ASPECTS
from tasks import configure
from weights import NANO_TASKS

LEXICON = {"aspects": {"anatomy": ["upper", "left"], "action": ["round", "1", "2", "3"]}}
SHORT = ["--max-tokens", "10", "--lr", "1e-3", "--recipe", "nano"]


@pytest.fixture(autouse=True)
def as_before():
    yield
    configure(None, set())


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    return write_records(folder, task="caption", references=["a round lesion", "1 2 3 in the upper left"])


def unsteady(number: int, body: dict) -> tuple:
    """Another verdict at every call, so that only a kept one can be the same twice."""
    digest = hashlib.sha256(str(number).encode()).digest()
    return 200, {}, completion("\n".join(f"{name}: {1 + digest[i] % 5}" for i, name in enumerate(ASPECTS)))


def test_a_resumed_run_hears_what_it_heard_and_no_file_has_the_key(captions, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    out, counted, by_task = tmp_path / "o", [0], tasks.by_task

    def watched(texts, prompts):  # a step's scores: how many calls there were when they were asked for, and after them
        counted.append(len(calls))
        found = by_task(texts, prompts)
        counted.append(len(calls))
        return found

    monkeypatch.setattr(tasks, "by_task", watched)
    with server(unsteady) as (url, calls):
        judge = ["--judge", f"{url}:model=m,key=JUDGE_KEY,wait=0.01,threads=8"]
        flags = [*SHORT, *judge, "--rewards", "similarity=.5,judge=.5", "--save-every", "2"]
        said = grpo(out, captions, *flags, "--steps", "4")
        straight = lines(out / "metrics.jsonl")
        asked, kept = len(calls), lines(out / "judge-0.jsonl")
        before, after = counted[1::2], counted[2::2]  # of two micro-batches the first is judged beside the second
        assert len(before) == 4 and all(b > a for b, a in zip(before[1:], after, strict=False))
        assert len(kept) == asked == len({row["key"] for row in kept})
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers, _ in calls)
        shutil.rmtree(out / "step-000004")  # as a kill before it was saved leaves it
        before = json.loads((out / "eval.json").read_text())
        said += grpo(out, captions, "--resume", "--steps", "4")
        assert len(calls) == asked  # nobody was asked again, but for what was new: nothing
    assert without_times(lines(out / "metrics.jsonl")) == without_times(straight)
    assert json.loads((out / "eval.json").read_text()) == before
    row = straight[-1]
    assert row["judge"] == "model m" and row["unjudged"] == 0 and 0 < row["judge_mean"] < 1
    assert row["reward_mean"] == pytest.approx(0.5 * row["similarity_mean"] + 0.5 * row["judge_mean"], abs=1e-6)
    assert row["u_mean"] == pytest.approx(row["reward_mean"], abs=1e-6) and before["final"]["judge"] == "model m"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 20 and not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in said and "key=JUDGE_KEY" in (out / "config.json").read_text()
    words = grpo(out, captions, "--resume", "--steps", "4", "--judge", f"{url}:model=another", expect=2)
    assert "--resume goes on with --judge" in sentence(words)


def test_a_run_whose_judge_fails_too_often_stops_and_goes_on_when_it_is_mended(captions, tmp_path):
    """One failed call in six is counted; then all fail: the step is not taken, and what was learned is saved."""
    broken = []

    def answers(number, body):
        if broken or number % 6 == 0:
            return 400, {}, b""
        return 200, {}, completion(GOOD)

    out = tmp_path / "o"
    with server(answers) as (url, calls):
        flags = [*SHORT, "--judge", f"{url}:model=m,wait=0.01", "--rewards", "similarity=.5,judge=.5"]
        said = grpo(out, captions, *flags, "--steps", "2")
        rows = lines(out / "metrics.jsonl")
        assert sum(row["unjudged"] for row in rows) > 0 and "have no verdict of the judge (status 400)" in said
        broken.append(True)
        said = sentence(grpo(out, captions, "--resume", "--steps", "3", expect=2))
        assert "answers have no verdict (status 400), more than 20%; mend the judge" in said
        assert "All up to step 2 is saved" in said and len(lines(out / "metrics.jsonl")) == 2
        broken.clear()
        grpo(out, captions, "--resume", "--steps", "3")
    assert len(lines(out / "metrics.jsonl")) == 3


def test_boxes_labels_and_captions_learn_in_one_run_with_rewards_on_one_scale(tmp_path):
    """Quartiles by eval.py, of u for boxes and labels, of both terms for captions; a lexicon, as every line says."""
    parts = {
        "boxes": {}, "labels": {"task": "label", "options": ["1", "7"], "label": "1"},
        "captions": {"task": "caption", "references": ["1 2 3 round"]},
    }  # fmt: skip
    files = []
    for name, more in parts.items():
        (tmp_path / name).mkdir()
        files.append(write_records(tmp_path / name, dataset=name, **more).rename(tmp_path / name / f"{name}.jsonl"))
    (tmp_path / "l.json").write_text(json.dumps(LEXICON))
    judge = ["--judge", f"lexicon:{tmp_path / 'l.json'}"]
    out, norms, data = tmp_path / "o", tmp_path / "n.json", ["--data", *map(str, files)]
    said = run(
        evaluation, *data, *judge, "--write-norms", str(norms), "--max-tokens", "10", "--out", str(tmp_path / "e")
    )
    places = {(row["dataset"], row["reward"]) for row in json.loads(norms.read_text())["table"]}
    assert {("captions", "similarity"), ("captions", "judge"), ("boxes", "task"), ("labels", "task")} <= places
    assert not {("boxes", "judge"), ("labels", "similarity")} & places
    assert "quartiles of captions/caption/similarity" in said and "no LLM and not clinical" in said
    bare = [*small(out, files[2])[2:], *data, *judge, *SHORT]
    flags = [*bare, "--normalise", str(norms), "--schedule", "raw", "--batch-size", "6", "--save-every", "2"]
    weights = ["--rewards", "task=1,similarity=.5,judge=.5"]
    run(train_grpo, *flags, *weights, "--steps", "4")
    straight = lines(out / "metrics.jsonl")
    shutil.rmtree(out / "step-000004")
    run(train_grpo, "--resume", "--out", str(out), "--steps", "4")
    assert without_times(lines(out / "metrics.jsonl")) == without_times(straight)
    for row in straight:
        assert row["judge"].endswith("l.json: counts shared terms, no LLM and not clinical")
    shares = [sum(row[f"groups/{name}/{task}"] for row in straight) for name, task in
              (("boxes", "box"), ("labels", "label"), ("captions", "caption"))]  # fmt: skip
    assert sum(shares) == 24 and min(shares) >= 4
    evaluated = json.loads((out / "eval.json").read_text())["history"][-1]
    assert evaluated["judge"].endswith("no LLM and not clinical") and 1 <= evaluated["judge_score"] <= 5
    for more, words in (
        (["--rewards", "similarity=.5,judge=.5"], "pays nothing for the task 'box'; weigh task"),
        (["--rewards", "task=1,f1=1"], "f1 pays no record's task"),
    ):
        assert words in sentence(run(train_grpo, *bare, *more, "--out", str(tmp_path / "p"), expect=2))
    (tmp_path / "l.json").write_text(json.dumps(LEXICON | {"synonyms": {"left": ["l"]}}))
    words = sentence(run(train_grpo, "--resume", "--out", str(out), "--steps", "5", expect=2))
    assert "--judge" in words and "is not the file that the run began with" in words


def test_what_makes_no_sense_is_refused_before_the_run(captions, tmp_path):
    boxes = write_records(tmp_path)
    for data, more, words in (
        (captions, ["--rewards", "similarity=.5,judge=.5"], "judge wants --judge, an endpoint or a lexicon"),
        (
            boxes,
            ["--judge", "http://127.0.0.1:9/v1:model=m"],
            "--judge: no record has the task caption or dvc; drop it",
        ),
        (captions, ["--judge", "http://127.0.0.1:9/v1"], "model=NAME is needed"),
        (captions, ["--judge", f"http://127.0.0.1:9/v1:model=m,key={KEY}"], "key= must be the NAME"),
        (captions, ["--judge", "gpt"], "--judge must be lexicon:FILE.json, or http"),
    ):
        said = grpo(tmp_path / "o", data, *SHORT, *more, "--steps", "1", expect=2)
        assert words in said and KEY not in said
    assert not (tmp_path / "o").exists()
    schedules = run(train_grpo, "--help-schedules")
    assert "--judge" in schedules and "timeout=30" in schedules


def test_captions_learn_by_supervision_without_a_judge_and_say_so(tmp_path):
    """Two steps on the phantoms' sentences, judged by likeness alone; another program asks, with a lexicon."""
    file = write_records(tmp_path, 4, task="caption", references=["a round lesion"])
    flags = [
        "--model",
        str(NANO_TASKS),
        "--data",
        str(file),
        "--val",
        str(file),
        "--prompt",
        "answer",
        "--workers",
        "0",
    ]
    out = tmp_path / "o"
    run(train_sft, *flags, "--steps", "2", "--warmup", "1", "--batch-size", "4", "--out", str(out))
    found = json.loads((out / "eval.json").read_text())["final"]
    assert (
        found["judge"] == "none: u is the similarity alone"
        and found["u"] == found["chrf"]
        and "judge_score" not in found
    )
    (tmp_path / "l.json").write_text(json.dumps(LEXICON))
    model = ["--model", str(out / "step-000002"), "--data", str(file), "--judge", f"lexicon:{tmp_path / 'l.json'}"]
    said = run(evaluation, *model, "--train", str(file), "--out", str(tmp_path / "e"))
    assert said.count("no LLM and not clinical") >= 2 and "constant answer" in said
    rows = lines(tmp_path / "e" / "predictions.jsonl")
    assert all({"similarity", "judge", "unjudged"} <= row["parts"].keys() for row in rows)
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["constant"]["judge_score"] == 5.0
