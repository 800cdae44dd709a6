"""What is made ahead of a step, and what once a step: pictures by worker processes, image tokens of a frozen tower."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from pipeline import Readers
from test_train import ROOT, arguments, flags_for, grpo, lines, records, run, without_times  # noqa: F401  a fixture

import eval as evaluation
import train_grpo
import train_sft
from data import BadRecords, ImageConfig, load_samples, phantom_samples
from errors import InputError
from eval import Task
from model import Policy
from scheduler import ScheduleConfig, make_schedule
from vision import VisionTower
from weights import load_policy

IMAGES = ImageConfig()

# ----------------------------------------------------------------------------------------------------- worker processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine pictures of all kinds and sizes, some too large for the policy; the fifth is cut off behind its header."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(9):
            name, size = f"{i}.{'png jpg tif'.split()[i % 3]}", (40 + 60 * i, 200)
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name)
            box, query = [1, 2, 20 + i, 30], f"the {'very ' * i}dark spot"
            print(json.dumps({"image": name, "query": query, "bbox": box}), file=file)
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(load_policy(evaluation.NANO), evaluation.NANO, "answer")


def drawn(folder: Path, task: Task, workers: int) -> tuple[list, dict]:
    """Seven draws over two and a half epochs of files and phantoms -> all that they gave, and what was left out."""
    samples, bad = load_samples(str(folder / "train.jsonl"), 0, "train") + phantom_samples(None, 3, 0, 3), BadRecords(1)
    everything = []
    with Readers(workers) as readers:
        stream = train_grpo.Stream(samples, task, bad, arguments(batch_size=4, seed=2), 0, readers)
        for step, count in enumerate((4, 1, 5, 8, 4, 4, 7)):
            places = range(stream.drawn, stream.drawn + count)
            prompts, luck, failures = stream.draw(step, places.start, places)
            stream.advance(count, failures)
            everything.append((luck, failures, [vars(prompt) for prompt in prompts]))
    return everything, bad.sentences


def equal(a, b) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_drawn_does_not_depend_on_the_number_of_workers(folder, task, workers):
    expected, left_out = drawn(folder, task, 0)
    assert (
        sum(len(prompts) for *_, prompts in expected) == 30 and sum(len(failures) for _, failures, _ in expected) == 3
    )
    assert list(left_out) == [f"{folder}/train.jsonl:5"]  # of 33 places, and it broke thrice
    assert "4.jpg cannot be read" in left_out[f"{folder}/train.jsonl:5"]
    got, left_out_too = drawn(folder, task, workers)
    assert equal(got, expected) and left_out_too == left_out


def test_a_resumed_run_repeats_and_skips_nothing_that_was_read_ahead(records, tmp_path):  # noqa: F811
    """Two steps, stop, two more with another number of workers: those of four, though a picture breaks on the way."""
    folder = records.parent
    copies = tmp_path / "records"
    copies.mkdir()
    for file in folder.iterdir():
        (copies / file.name).write_bytes(file.read_bytes())
    order = train_grpo.Sampler(12, 4, 0).take(0, 12)
    (copies / f"{order[6]}.png").write_bytes((copies / f"{order[6]}.png").read_bytes()[:1500])
    flags = ["--data", str(copies / "train.jsonl"), "--val", str(records), "--skip-bad", "1", "--schedule", "raw"]
    flags += ["--batch-size", "4", "--group-size", "4", "--eval-limit", "1"]
    run(train_grpo, *flags, "--workers", "2", "--steps", "4", "--out", str(tmp_path / "straight"))
    run(train_grpo, *flags, "--workers", "3", "--steps", "2", "--out", str(tmp_path / "broken"))
    run(train_grpo, "--resume", "--workers", "1", "--steps", "4", "--out", str(tmp_path / "broken"))
    rows, again = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("straight", "broken"))
    assert again == rows and [row["drawn"] for row in rows] == [4, 9, 14, 18]  # twice: of 12
    assert all(row["grad_norm"] > 0 for row in rows)
    ends = [load_policy(tmp_path / name / "step-000004").parameters() for name in ("straight", "broken")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_sft_reads_ahead_too(records, tmp_path):  # noqa: F811
    losses = []
    for workers in "02":
        flags = ("--data", str(records), "--steps", "3", "--batch-size", "5", "--coarse", "--workers", workers)
        run(train_sft, *flags, "--out", str(tmp_path / workers))
        losses.append([row["loss"] for row in lines(tmp_path / workers / "metrics.jsonl")])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert "--workers must be at least 0" in run(train_sft, "--workers", "-1", "--out", "a", expect=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_ahead_is_bounded(workers):
    samples, asked = phantom_samples(None, 0, 0, 40, size=56), []
    indices = (asked.append(index) or index for index in range(40))
    with Readers(workers) as readers:
        views = readers.read(indices, samples, IMAGES, ahead=5)
        for used in range(1, 41):
            assert next(views)[0] == used - 1
            assert len(asked) == min(used + (5 if workers else 0), 40)
        assert next(views, None) is None
        assert len(readers.processes) <= workers


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_one_step_ahead_of_what_is_drawn(task, workers, monkeypatch):
    places, take = [], train_grpo.Sampler.take
    monkeypatch.setattr(train_grpo.Sampler, "take", lambda self, *a: places.append(a[0]) or take(self, *a))
    with Readers(workers) as readers:
        args = arguments(batch_size=4)
        stream = train_grpo.Stream(phantom_samples(None, 0, 0, 40, size=56), task, BadRecords(), args, 0, readers)
        for step in range(3):
            first = stream.drawn
            stream.draw(step, first, range(first, first + 4))
            stream.advance(4, [])
            assert stream.drawn == 4 * (step + 1) and places == list(range(stream.drawn + 4 * workers))


def test_workers_know_no_torch():
    check = "import pipeline, sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_the_processes_end_with_the_block_also_after_an_error():
    samples = phantom_samples(None, 0, 0, 9)
    with pytest.raises(KeyboardInterrupt), Readers(2) as readers:
        next(readers.read(range(9), samples, IMAGES, ahead=8))
        assert all(process.poll() is None for process in readers.processes)
        raise KeyboardInterrupt
    assert readers.processes and all(process.returncode is not None for process in readers.processes)


def test_the_end_waits_for_no_worker_and_signals_are_not_for_them():
    samples = phantom_samples(None, 0, 0, 99)
    with Readers(1) as readers:
        views = readers.read(range(99), samples, IMAGES, ahead=9)
        next(views)
        for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal, torchrun and a scheduler send them to all
            readers.processes[0].send_signal(number)
        for _ in range(20):
            next(views)
        readers.processes[0].send_signal(signal.SIGSTOP)  # as one that hangs in a read
        rescue = threading.Timer(30, readers.processes[0].kill)
        rescue.start()
    assert rescue.is_alive()
    rescue.cancel()


MAIN = """
import sys, time
from argparse import Namespace
from images import PhantomImage, Sample
from pipeline import Readers

samples = [Sample(PhantomImage("xray", 0, 0, 140), "", None, "")] * 999
with Readers(1) as readers:
    config = Namespace(limits=(28, 10**6, 10**6), view=lambda picture: picture)
    for _ in readers.read(range(999), samples, config, ahead=20):
        print("read", flush=True)
        time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["killed", "terminated", "interrupted", "killed while a picture is on its way"])
def test_no_process_outlives_the_main_one(how):
    """They share its stdout, which is at its end when the last of them is gone."""
    command = [sys.executable, "-c", MAIN, "60" if "way" not in how else "0"]
    main = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert main.stdout.readline() == "read\n"
    if how == "interrupted":  # as a terminal does it: the whole group
        os.killpg(main.pid, signal.SIGINT)
    else:
        main.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    try:
        _, error = main.communicate(timeout=60)
    finally:
        if main.returncode is None:
            os.killpg(main.pid, signal.SIGKILL)
    assert error == ("stopped by Ctrl-C\n" if how == "interrupted" else ""), error


def test_a_lost_process_is_named_with_the_picture_it_had():
    samples = phantom_samples("xray", 0, 0, 50)
    with Readers(1) as readers:
        views = readers.read(range(50), samples, IMAGES, ahead=3)
        next(views)
        readers.processes[0].kill()
        words = "phantoms:xray seed 0 index [1-5]: the process that reads pictures was ended by signal 9 .* --workers"
        with pytest.raises(InputError, match=words):
            list(views)
    with Readers(1) as readers:  # a fault of ours in it: its traceback is on stderr
        odd = [replace(samples[0], image=replace(samples[0].image, size=None))]
        with pytest.raises(InputError, match="index 0: the process that reads pictures was ended by code 1;"):
            list(readers.read([0], odd, IMAGES, ahead=3))


def test_a_lost_process_ends_the_run_is_no_bad_picture_and_costs_no_step(records, tmp_path, monkeypatch):  # noqa: F811
    started = []
    monkeypatch.setattr(pipeline.Readers, "__enter__", lambda self: started.append(self) or self)
    observe = train_grpo.Schedule.observe

    def lose(self, ious):
        for process in started[0].processes:
            process.kill()
        return observe(self, ious)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Schedule, "observe", lose)
        flags = ("--skip-bad", "9", "--steps", "6", "--schedule", "raw")
        output = grpo(tmp_path / "run", records, *flags, "--workers", "2", expect=2)
    assert "left out" not in output and "was ended by signal 9" in output
    saved = len(lines(tmp_path / "run" / "metrics.jsonl"))
    assert 1 <= saved <= 3 and f"All up to step {saved} is saved" in output
    run(train_grpo, "--resume", "--out", str(tmp_path / "run"))
    grpo(tmp_path / "straight", records, *flags, "--workers", "0")
    rows, again = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("straight", "run"))
    assert rows == again


# ----------------------------------------------------------------------------------------------- frozen vision tower


def one_step(monkeypatch, once: bool, **options) -> tuple[int, int, list[torch.Tensor]]:
    """Rollout and update in float64, with every pass looking for itself unless `once` -> images that went through a
    tower, groups rolled out, and the step's numbers: log-probs, then weights."""
    args = arguments(dtype="float64", **options)
    policy, actor, reference = train_grpo.make_policies(args, evaluation.NANO, evaluation.NANO)
    task = Task(policy, evaluation.NANO, "answer")
    samples = [phantom_samples(None, 3, i, 1, size=84 + i % 2 * 56)[0] for i in range(12)]
    stream = train_grpo.Stream(samples, task, BadRecords(), args)
    schedule = make_schedule(args.schedule, ScheduleConfig(tau_start=0.2), 10)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    forward, images = VisionTower.forward, []

    def counted(self, patches, grids, *rest):
        images.extend(grids)
        return forward(self, patches, grids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(VisionTower, "forward", counted)
        if not once:
            patch.setattr(Policy, "see", lambda self, prompts: None)
        _, seen, used = train_grpo.rollout(policy, actor, reference, task, stream, 0, schedule, args)
        before = [p.detach().clone() for p in policy.parameters()]
        train_grpo.update(policy, optimizer, used, args)
    assert any((a != b).any() for a, b in zip(before, policy.parameters(), strict=True))
    logps = [logp for logp in (used.logp_old, used.logp_ref) if logp is not None]
    return len(images), len(seen.prompts), [*logps, *(p.detach() for p in policy.parameters())]


FROZEN = {
    "frozen": dict(freeze_vision=True, schedule="raw", inner_steps=3, beta=0.04),
    "recomputed": dict(freeze_vision=True, schedule="raw", checkpointing=True, beta=0.04),
    "one pass is the step": dict(freeze_vision=True, schedule="raw", micro_batch=4, beta=0.04),
    "adapters": dict(lora_rank=4, lora_alpha=64.0, schedule="raw", inner_steps=2, beta=0.04),
    "groups replaced": dict(freeze_vision=True, schedule="medloc", inner_steps=2, beta=0.04, dynamic_sampling=2),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_tower_sees_an_image_once_a_step_and_every_number_stays(name, monkeypatch):
    """Without it: rollout, reference and each inner step. Between them groups are dropped and batched anew."""
    options = dict(batch_size=4, micro_batch=3) | FROZEN[name]
    images, groups, numbers = one_step(monkeypatch, True, **options)
    assert images == groups >= 4 and (groups > 4) == (name == "groups replaced")
    more, _, expected = one_step(monkeypatch, False, **options)
    assert more > images
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(numbers, expected, strict=True))


def test_a_trained_tower_looks_in_every_pass(monkeypatch):
    options = dict(batch_size=4, micro_batch=3, schedule="raw", inner_steps=3, beta=0.04)
    images, groups, _ = one_step(monkeypatch, True, **options)
    assert groups == 4 and images == 4 * (1 + 1 + 3)  # rollout, reference, inner steps


@pytest.mark.parametrize("flags", [("--freeze-vision",), ("--lora-rank", "4")], ids=" ".join)
def test_image_tokens_in_bfloat16_are_the_same_to_the_bit(flags, records, tmp_path, monkeypatch):  # noqa: F811
    """Actor, policy and reference hold the tower as bfloat16, as fp32 cast per block, and as bfloat16: one tower."""
    flags += ("--dtype", "bfloat16", "--beta", "0.1", "--inner-steps", "2", "--steps", "2", "--schedule", "raw")
    rows = []
    for name in "ab":
        grpo(tmp_path / name, records, *flags, "--lr", "1e-3", "--warmup", "0")
        rows.append(without_times(lines(tmp_path / name / "metrics.jsonl")))
        monkeypatch.setattr(Policy, "see", lambda self, prompts: None)
    assert rows[0] == rows[1] and rows[0][1]["kl"] > 0
