"""What is made ahead of a step, and what once a step: the order, pictures by workers, a frozen tower's tokens."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import ROOT, grpo, lines, records, run, without_times  # noqa: F401  (records is a fixture)
from test_data import refused

import config
import scheduler
import train_grpo
from data import BadRecords, load_samples, phantom_samples
from errors import InputError
from images import ImageConfig
from model import Policy
from prompts import Processor
from rewards import Schedules
from runtime.readers import Readers
from runtime.stream import Sampler, Stream
from tasks import TASKS
from vision import VisionTower
from weights import NANO

IMAGES = ImageConfig()

# --------------------------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63), st.integers(0, 500), st.integers(0, 200))
def test_every_epoch_is_a_permutation_and_a_place_needs_no_history(n, batch_size, seed, first, count):
    """Resume is random access; and the batch size only cuts the stream, it does not change it."""
    sampler, ones = Sampler(n, batch_size, seed), Sampler(n, 1, seed)
    stream = [i for step in range(-(-max(3 * n, first + count) // batch_size)) for i in sampler.indices(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert sampler.take(first, count) == stream[first : first + count] == ones.take(first, count)
    assert Sampler(n, batch_size, seed).indices(2) == ones.take(2 * batch_size, batch_size)


def test_order_depends_on_seed_and_epoch_and_never_changes():
    a, b = Sampler(50, 50, 0), Sampler(50, 50, 1)
    assert len({tuple(order) for order in (a.indices(0), a.indices(1), b.indices(0), b.indices(1), range(50))}) == 5
    golden = [[0, 2, 1], [4, 3, 3], [2, 4, 1], [0, 2, 1]]  # a run saved today resumes with any numpy and torch
    assert [Sampler(5, 3, 0).indices(step) for step in range(4)] == golden
    for n, batch_size, seed in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        refused("must be at least", Sampler, n, batch_size, seed)


# ----------------------------------------------------------------------------------------------------- worker processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine pictures of all kinds and sizes, some too large for the policy; the fifth is cut off behind its header."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(9):
            name, size = f"{i}.{'png jpg tif'.split()[i % 3]}", (40 + 60 * i, 200)
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name)
            record = {"image": name, "query": f"the {'very ' * i}dark spot", "bbox": [1, 2, 20 + i, 30]}
            print(json.dumps(record), file=file)
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(NANO, "answer", TASKS)


def drawn(folder: Path, processor: Processor, workers: int) -> tuple[list, dict]:
    """Seven draws over two and a half epochs of files and phantoms -> all that they gave, and what was left out."""
    samples, bad = load_samples(str(folder / "train.jsonl"), TASKS, 0, "train"), BadRecords(1)
    everything = []
    with Readers(workers) as readers:
        stream = Stream(samples + phantom_samples(None, 3, 0, 3), processor, bad, 4, 2, 5, 2, readers)
        for step, count in enumerate((4, 1, 5, 8, 4, 4, 7)):
            found, uniforms = stream.draw(step, count)
            everything.append((uniforms, stream.failures, [vars(prompt) for prompt in found]))
            stream.advance(count, stream.failures)
    return everything, bad.sentences


def equal(a, b) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_drawn_does_not_depend_on_the_number_of_workers(folder, processor):
    expected, left_out = drawn(folder, processor, 0)
    assert sum(len(found) for *_, found in expected) == 30 and sum(len(lost) for _, lost, _ in expected) == 3
    assert list(left_out) == [f"{folder}/train.jsonl:5"]  # of 33 places, and it broke thrice
    assert "4.jpg cannot be read" in left_out[f"{folder}/train.jsonl:5"]
    for workers in (1, 3):
        got, left_out_too = drawn(folder, processor, workers)
        assert equal(got, expected) and left_out_too == left_out


def test_no_picture_that_can_be_read_ends_the_run_in_words(folder, processor):
    broken = load_samples(str(folder / "train.jsonl"), TASKS, 0, "train")[4:5]
    stream = Stream(broken, processor, BadRecords(1), 2, 2, 3, 0)
    assert stream.draw(0, 2)[0] == [] and len(stream.failures) == 2
    with pytest.raises(InputError, match="no picture of --data can be read any more; the last one: .*4.jpg cannot be"):
        stream.advance(2, stream.failures)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_ahead_is_bounded(workers, processor, monkeypatch):
    """By Readers' `ahead`; and a stream is one step ahead of what is drawn."""
    samples, asked = phantom_samples(None, 0, 0, 40, size=56), []
    indices = (asked.append(index) or index for index in range(40))
    places, take = [], Sampler.take
    monkeypatch.setattr(Sampler, "take", lambda self, *a: places.append(a[0]) or take(self, *a))
    with Readers(workers) as readers:
        views = readers.read(indices, samples, IMAGES, ahead=5)
        for used in range(1, 41):
            assert next(views)[0] == used - 1
            assert len(asked) == min(used + (5 if workers else 0), 40)
        assert next(views, None) is None
        assert len(readers.processes) <= workers
        stream = Stream(samples, processor, BadRecords(), 4, 1, 1, 0, readers)
        for step in range(3):
            stream.draw(step, 4)
            stream.advance(4, [])
            assert stream.drawn == 4 * (step + 1) and places == list(range(stream.drawn + (4 if workers else 0)))


def test_the_processes_know_no_torch_and_end_with_the_block_also_after_an_error():
    check = "import runtime.readers, sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
    with pytest.raises(KeyboardInterrupt), Readers(2) as readers:
        next(readers.read(range(9), phantom_samples(None, 0, 0, 9), IMAGES, ahead=8))
        assert all(process.poll() is None for process in readers.processes)
        raise KeyboardInterrupt
    assert readers.processes and all(process.returncode is not None for process in readers.processes)


def test_the_end_waits_for_no_worker_and_signals_are_not_for_them():
    with Readers(1) as readers:
        views = readers.read(range(99), phantom_samples(None, 0, 0, 99), IMAGES, ahead=9)
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
from runtime.readers import Readers

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
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    main = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
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
        refused(words, list, views)
    with Readers(1) as readers:  # a fault of ours in it: its traceback is on stderr
        odd = [replace(samples[0], media=replace(samples[0].media, size=None))]
        with pytest.raises(InputError, match="index 0: the process that reads pictures was ended by code 1;"):
            list(readers.read([0], odd, IMAGES, ahead=3))


@pytest.mark.slow
def test_a_lost_process_ends_the_run_is_no_bad_picture_and_costs_no_step(records, tmp_path, monkeypatch):  # noqa: F811
    started, observe = [], scheduler.Schedule.observe
    monkeypatch.setattr(Readers, "__enter__", lambda self: started.append(self) or self)

    def lose(self, groups):
        for process in started[0].processes:
            process.kill()
        return observe(self, groups)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.Schedule, "observe", lose)
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


def one_step(monkeypatch, processor, once: bool, schedule="raw", **options) -> tuple[int, int, list[torch.Tensor]]:
    """A step in float64, with every pass looking for itself unless `once` -> images that went through a tower, groups
    rolled out, and the step's numbers: log-probs, then weights."""
    args = config.parse("train_grpo.py", ["--batch-size", "4", "--group-size", "4", "--max-tokens", "20"])
    vars(args).update(dict(micro_batch=3, beta=0.04, dtype="float64") | options)
    policy, actor, reference = train_grpo.make_policies(args, NANO, NANO)
    samples = [phantom_samples(None, 3, i, 1, size=84 + i % 2 * 56)[0] for i in range(12)]
    stream = Stream(samples, processor, BadRecords(), 4, 4, 20, 0)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    forward, looks = VisionTower.forward, []
    before = [p.detach().clone() for p in policy.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(VisionTower, "forward", lambda self, p, grids, *a: looks.extend(grids) or forward(self, p, grids))
        if not once:
            patch.setattr(Policy, "cache_image_tokens", lambda self, prompts: None)
        rest = stream, Schedules([schedule], stream.keys, 10), train_grpo.algorithm(args)
        _, roll, *_ = train_grpo.step(0, policy, actor, reference, optimizer, *rest)
    assert any((a != b).any() for a, b in zip(before, policy.parameters(), strict=True))
    return len(looks), len(roll.prompts), [roll.u, *(p.detach() for p in policy.parameters())]


FROZEN = {
    "frozen": dict(freeze_vision=True, inner_steps=3),
    "recomputed": dict(freeze_vision=True, checkpointing=True),
    "one pass is the step": dict(freeze_vision=True, micro_batch=4),
    "adapters": dict(lora_rank=4, inner_steps=2),
    "groups replaced": dict(freeze_vision=True, schedule="medloc:tau_start=.2", inner_steps=2, dynamic_sampling=2),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_tower_sees_an_image_once_a_step_and_every_number_stays(name, processor, monkeypatch):
    """Without it: rollout, reference and each inner step. Between them groups are dropped and batched anew."""
    looks, groups, numbers = one_step(monkeypatch, processor, True, **FROZEN[name])
    assert looks == groups >= 4 and (groups > 4) == (name == "groups replaced")
    more, _, expected = one_step(monkeypatch, processor, False, **FROZEN[name])
    assert more > looks
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(numbers, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--freeze-vision",), ("--lora-rank", "4")], ids=" ".join)
def test_image_tokens_in_bfloat16_are_the_same_to_the_bit(flags, records, tmp_path, monkeypatch):  # noqa: F811
    """Actor, policy and reference hold the tower as bfloat16, as fp32 cast per block, and as bfloat16: one tower."""
    flags += ("--beta", "0.1", "--inner-steps", "2", "--steps", "2", "--schedule", "raw", "--lr", "1e-3")
    make, rows = train_grpo.make_policies, []

    def in_bfloat16(args, *folders):
        args.dtype = "bfloat16"
        return make(args, *folders)

    monkeypatch.setattr(train_grpo, "make_policies", in_bfloat16)
    for name in "ab":
        grpo(tmp_path / name, records, *flags, "--warmup", "0")
        rows.append(without_times(lines(tmp_path / name / "metrics.jsonl")))
        monkeypatch.setattr(Policy, "cache_image_tokens", lambda self, prompts: None)
    assert rows[0] == rows[1] and rows[0][1]["kl"] > 0
