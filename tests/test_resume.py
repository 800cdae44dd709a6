"""Resume is exact: a run that was stopped goes on as if it never had been, whatever it does."""

import json
from pathlib import Path

import pytest
import torch
from programs import ROOT, as_main, fork, grpo, lines, records, run, small, without_times, write_records  # noqa: F401

import train_grpo
import train_sft
from tasks import TASKS
from weights import load_policy


@pytest.fixture(scope="module", autouse=True)
def toy():
    """A second task, as long as this file's tests run."""
    import toy_task

    TASKS["kind"] = toy_task.Kind()
    yield
    del TASKS["kind"]


WAYS = {  # what else the run does -> flags
    "plain": "--schedule medloc:window=4,tau_start=.1",
    "everything": "--schedule medloc-soft --beta .1 --inner-steps 3 --lr 1e-3 --rewards task=1,format=.5 --clip .01 .01"
    " --loss dapo:kl=k3+,overlong=mask --eval-every 1",
    "dynamic sampling": "--schedule fixed:tau=.3 --dynamic-sampling 2",
    "adapters": "--schedule raw --lora-rank 4 --beta .1 --lr 1e-3",
    "a line": "--schedule progress:tau_start=.05,end=.3 --lr 1e-3 --freeze-vision",
}


def equal(a: Path, b: Path) -> bool:
    return all(torch.equal(*pair) for pair in zip(*(load_policy(f).parameters() for f in (a, b)), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_as_if_it_never_had_been(way, records, tmp_path):  # noqa: F811
    """Two steps, a kill in the next one, then on to three: metrics, samples and evaluations equal line by line (times
    aside), weights bit by bit. The same --steps throughout, as schedules may go by their share."""
    straight, broken = tmp_path / "a", tmp_path / "b"
    flags = [*WAYS[way].split(), "--steps", "3", "--save-every", "2"]
    grpo(straight, records, *flags)
    with pytest.MonkeyPatch.context() as patch:
        step = train_grpo.step
        patch.setattr(train_grpo, "step", lambda number, *rest: step(number, *rest) if number < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grpo(broken, records, *flags)
    with open(broken / "metrics.jsonl", "a") as file:  # which a kill has left
        file.write('{"step": 3, "loss": 0}\n{"step": 4, "lo')
    run(train_grpo, "--resume", "--out", str(broken))
    rows = lines(straight / "metrics.jsonl")
    assert any(row["grad_norm"] for row in rows)  # else the weights below are equal for nothing
    assert without_times(lines(broken / "metrics.jsonl")) == without_times(rows)
    for name in ("samples.jsonl", "eval.json"):
        assert (straight / name).read_text() == (broken / name).read_text()
    assert equal(straight / "step-000003", broken / "step-000003")
    assert not equal(straight / "step-000003", straight / "step-000002")


def test_two_tasks_and_two_datasets_have_a_tau_each_and_resume_with_them(tmp_path):
    """Boxes of two datasets and labels: three schedules, each fed with its own u alone, one of another kind."""
    for name in ("east", "west"):
        (tmp_path / name).mkdir()
    a, b = (write_records(tmp_path / name, 4, dataset=name) for name in ("east", "west"))
    labels = tmp_path / "west" / "labels.jsonl"
    kinds = ("dermoscopy", "xray", "ultrasound", "dermoscopy")
    rows = [row | {"task": "kind", "kind": kind, "view": "AP"} for row, kind in zip(lines(b), kinds, strict=True)]
    labels.write_text("\n".join(map(json.dumps, rows)))
    flags = f"--data {a},{b},{labels} --batch-size 6 --group-size 3 --micro-batch 3 --workers 0 --seed 3 --schedule"
    flags = f"{flags} medloc:window=2,tau_start=.1,check_stability=off,check_margin=off kind=raw".split()
    for out, steps in ((tmp_path / "a", 4), (tmp_path / "b", 2)):
        run(train_grpo, *flags, "--out", str(out), "--steps", str(steps))
    run(train_grpo, "--resume", "--out", str(tmp_path / "b"), "--steps", "4")
    straight = lines(tmp_path / "a" / "metrics.jsonl")
    assert without_times(lines(tmp_path / "b" / "metrics.jsonl")) == without_times(straight)
    keys = {name.removeprefix("tau/") for name in straight[0] if name.startswith("tau")}
    assert keys == {"east/box", "west/box", "west/kind"}
    assert all(row["tau/west/kind"] is None for row in straight)
    state = json.loads((tmp_path / "a" / "step-000004" / "trainer.json").read_text())["schedule"]
    assert [(s["dataset"], s["task"]) for s in state] == [("east", "box"), ("west", "box"), ("west", "kind")]
    assert all(len(entry[1]) == 3 for s in state for entry in s["window"])
    wrong = run(train_grpo, *flags, "--out", str(tmp_path / "c"), "--schedule", "giou", expect=2)
    assert "--schedule giou goes by giou, which answers of the task 'kind' do not have" in wrong


def test_a_toy_task_in_one_file_trains_evaluates_draws_and_resumes(tmp_path):
    """tests/toy_task.py as a user starts it; a supervised start first, so that there is something to reward."""
    folder = tmp_path / "data"
    folder.mkdir()
    file = write_records(folder, 9)
    kinds = ("dermoscopy", "xray", "ultrasound") * 3
    rows = [row | {"task": "kind", "kind": k, "query": "kind?"} for row, k in zip(lines(file), kinds, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = f"--data {file} --val {file} --steps 12 --batch-size 9 --lr 3e-3 --warmup 2 --workers 0".split()
    run(train_sft, *flags, "--prompt", "answer", "--out", str(tmp_path / "sft"))
    start = str(tmp_path / "sft" / "step-000012")
    own = ["--model", start, "--recipe", "nano", "--lr", "1e-3", "--warmup", "0", "--schedule", "medloc:window=4"]
    assert len((ROOT / "tests" / "toy_task.py").read_text().splitlines()) <= 40
    command = [ROOT / "tests" / "toy_task.py", *small(tmp_path / "run", file), *own, "--steps", "4"]
    job = fork(tmp_path / "log", lambda: as_main(*command))
    job.join()
    output = (tmp_path / "log").read_text()
    assert job.exitcode == 0 and "step 4: u 0." in output, output
    run(train_grpo, "--resume", "--out", str(tmp_path / "run"), "--steps", "6")
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 6 and any(row["grad_norm"] for row in rows) and rows[0]["u_mean"] > 0.2
    sample = lines(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["target"] in kinds and (tmp_path / "run" / "overlay-000001.png").exists()
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["final"]["task"] == "kind" and 0 <= report["final"]["u"] <= 1 and report["final"]["n"] == 4
