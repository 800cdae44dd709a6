"""The trainer: what a run writes, what a step is, dynamic sampling, evaluation, the supervised start."""

import json
import math
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_rows import full_logprobs
from PIL import Image
from programs import grpo, lines, records, run, tiny_folder, without_times  # noqa: F401  (records is a fixture)
from safetensors.torch import load_file, save_file

import config
import eval as evaluation
import rollout
import train_grpo
import train_sft
from data import BadRecords, load_samples, phantom_samples
from images import Sample, load
from model import Policy, collate
from prompts import Processor
from rewards import Schedules
from runtime.stream import Sampler, Stream, uniforms
from scheduler import MedLoc, Schedule
from tasks import TASKS
from tasks.box import parse_box
from tasks.boxes import parse_boxes
from weights import NANO, load_policy

WHOLE = ("--save-every", "3", "--schedule", "medloc:window=4,tau_start=.1")
METRICS = (
    "step tau hit_rate sigma margin decision u_mean u_q25 u_q50 u_q75 reward_mean reward_task giou_mean zero_spread "
    "no_hit parse_failures truncated clip_low clip_high entropy grad_norm loss lr seconds seconds_rollout tokens "
    "peak_mb groups dropped drawn skipped seconds_input seconds_update resident_mb"
).split()


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):  # noqa: F811
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    grpo(out, records, "--steps", "6", *WHOLE)
    return out


def changed(a, b) -> set[str]:
    """Names of the weights that differ between two folders."""
    start, end = load_policy(a), load_policy(b)
    return {n for (n, p), q in zip(start.named_parameters(), end.parameters(), strict=True) if not torch.equal(p, q)}


def test_a_run_writes_all_that_it_promises(whole):
    rows = lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == {*METRICS, "kl"} and row["kl"] is None for row in rows)  # --beta 0: no KL, so no number
    assert all(math.isfinite(row[key]) for row in rows for key in METRICS if key != "decision")
    saved = json.loads((whole / "config.json").read_text())
    assert saved["arguments"]["lr"] == 1e-4 and "torch" in saved["versions"]
    assert saved["arguments"]["schedule"] == ["medloc:window=4,tau_start=.1"]
    report = json.loads((whole / "eval.json").read_text())
    for part in (report["start"], report["final"]):
        assert {"miou", "acc@0.3", "acc@0.5", "acc@0.8", "pmap", "n", "parse_failures", "datasets"} <= part.keys()
    (sample,) = lines(whole / "samples.jsonl")
    assert sample["step"] == 1
    assert all(len(sample[key]) == 4 for key in ("texts", "answers", "u", "rewards", "advantages", "reasons"))
    assert Image.open(whole / "overlay-000001.png").width > 500 and (whole / "sheet-000006.png").exists()
    assert sorted(f.name for f in whole.glob("step-*")) == ["step-000003", "step-000006"]
    assert changed(NANO, whole / "step-000006")


def test_a_used_folder_is_not_overwritten(whole, records):  # noqa: F811
    assert "is not empty" in grpo(whole, records, "--steps", "6", expect=2)
    again = ("--resume", "--out", str(whole))
    assert "--resume goes on with --lr 0.0001, not 0.1" in run(train_grpo, *again, "--lr", "0.1", expect=2)
    assert "step-000006 has 6 already" in run(train_grpo, *again, "--steps", "5", expect=2)
    assert len(lines(whole / "metrics.jsonl")) == 6


def test_bfloat16_rolls_out_a_copy_of_float32_weights_that_a_rate_of_1e_6_still_moves(records, tmp_path, monkeypatch):  # noqa: F811
    """Runs compute in bfloat16 here, as on a GPU."""
    made, rolled, generate, make = [], [], Policy.generate, train_grpo.make_policies

    def policies(args, *folders):
        args.dtype = "bfloat16"
        made[:] = make(args, *folders)
        return tuple(made)

    def spy(self, *arguments):
        policy, actor, _ = made
        assert self is actor and actor is not policy
        rolled.append(torch.cat([p.flatten() for p in actor.parameters()]))
        assert torch.equal(rolled[-1], torch.cat([p.bfloat16().flatten() for p in policy.parameters()]))
        return generate(self, *arguments)

    monkeypatch.setattr(train_grpo, "make_policies", policies)
    monkeypatch.setattr(Policy, "generate", spy)
    grpo(tmp_path / "a", records, "--steps", "2", "--lr", "1e-2", "--warmup", "0", "--schedule", "raw")
    assert not torch.equal(rolled[0], rolled[-1])
    grpo(tmp_path / "b", records, "--steps", "2", "--lr", "1e-6", "--schedule", "raw")
    start, end = load_policy(NANO), load_policy(tmp_path / "b" / "step-000002")
    moved = [(a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 1e-7 < max(moved) < 1e-5


def test_the_flags_reach_what_they_are_for(records, tmp_path, monkeypatch):  # noqa: F811
    """Clipping, recomputation, the adapters' rank and the temperature of the old log-probs, as the parts get them."""
    seen = {}
    clip, add, logprobs = torch.nn.utils.clip_grad_norm_, train_grpo.lora.add, Policy.logprobs
    loss = train_grpo.grpo_loss

    def spy(self, prefix, ids, lengths, temperature=1.0, entropy=False):
        seen.setdefault("temperatures", set()).add(temperature)
        seen["checkpointing"] = self.checkpointing
        return logprobs(self, prefix, ids, lengths, temperature, entropy)

    monkeypatch.setattr(Policy, "logprobs", spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: seen.update(most=most) or clip(p, most))
    monkeypatch.setattr(train_grpo.lora, "add", lambda *a: seen.update(lora=a[1:]) or add(*a))
    monkeypatch.setattr(train_grpo, "grpo_loss", lambda *a, **k: seen.update(loss=k) or loss(*a, **k))
    flags = ("--checkpointing", "--lora-rank", "3", "--seed", "8", "--temperature", "0.7", "--inner-steps", "2")
    flags += ("--beta", "0.1", "--clip", ".1", ".3", "--loss", "dr-grpo:kl=k3+")
    grpo(tmp_path / "run", records, "--steps", "1", *flags)
    assert seen.pop("loss") == dict(kind="dr-grpo", kl="k3+", clip_low=0.1, clip_high=0.3, beta=0.1)
    assert seen == dict(most=1.0, checkpointing=True, lora=(3, 64.0, 8), temperatures={0.7})


def test_checkpointing_changes_no_number_and_a_frozen_tower_stays(whole, records, tmp_path):  # noqa: F811
    grpo(tmp_path / "run", records, "--steps", "2", *WHOLE, "--checkpointing", "--freeze-vision")
    grpo(tmp_path / "other", records, "--steps", "2", *WHOLE, "--freeze-vision")
    rows = [without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "other")]
    assert rows[0] == rows[1] and rows[0][0]["loss"] == lines(whole / "metrics.jsonl")[0]["loss"]
    names = changed(NANO, tmp_path / "run" / "step-000002")
    assert names and not any(name.startswith("visual.") for name in names)


def test_adapters_are_saved_merged_and_the_reference_is_the_policy_without_them(records, tmp_path):  # noqa: F811
    flags = ("--lora-rank", "4", "--beta", "0.1", "--lr", "1e-3", "--schedule", "raw", "--steps", "2")
    assert "M trained)" in grpo(tmp_path / "a", records, *flags)
    rows, last = lines(tmp_path / "a" / "metrics.jsonl"), tmp_path / "a" / "step-000002"
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    names = changed(NANO, last)
    assert names and all(name.startswith("model.layers.") and name.endswith("proj.weight") for name in names)
    result = json.loads((tmp_path / "a" / "eval.json").read_text())["final"]
    run(evaluation, "--model", str(last), "--data", str(records), "--limit", "4", "--out", str(tmp_path / "e"))
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["miou"] == pytest.approx(result["miou"], abs=1e-6)


def test_max_pixels_is_obeyed_and_stays_with_the_checkpoint(records, tmp_path):  # noqa: F811
    grpo(tmp_path / "run", records, "--steps", "1", "--max-pixels", "3136")
    processor = Processor(tmp_path / "run" / "step-000001", "answer", TASKS)
    assert processor.image_config.max_pixels == 3136
    assert processor.prompt(load_samples(str(records), TASKS, 0, "train")[0]).grid == (1, 4, 4)  # 84 x 84 seen at 56


# ------------------------------------------------------------------------------------------------------------- a step


def settings(**changes) -> train_grpo.GRPO:
    base = train_grpo.algorithm(config.parse("train_grpo.py", ["--group-size", "4", "--max-tokens", "20"]))
    return replace(base, **{"micro_batch": 3} | changes)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(NANO, "answer", TASKS)


@pytest.fixture(scope="module")
def wide() -> Policy:
    """In float64, where a difference of 1e-10 is a mistake and not rounding."""
    policy = load_policy(NANO, dtype=torch.float64)
    policy.compute_dtype = torch.float64
    return policy


def experience(policy: Policy, processor: Processor, samples: list, grpo: train_grpo.GRPO, schedule: str = "raw"):
    """One round of a step -> (this rank's rollout, ready for update(), its prefix)."""
    stream = Stream(samples, processor, BadRecords(), len(samples), grpo.group_size, grpo.max_tokens, 0)
    prompts, numbers = stream.draw(0, len(samples))
    roll, prefix = rollout.sample(policy if grpo.one_pass else None, policy, processor, prompts, numbers, grpo)
    everyone = rollout.share(rollout.score(roll, grpo.weights, stream.keys), stream)
    roll.reward = train_grpo.combine(everyone, Schedules([schedule], stream.keys, 10), grpo.weights)
    roll.advantage = train_grpo.group_advantage(roll.reward, grpo.advantage)
    return roll, prefix


OPTIONS = [
    dict(kind="grpo"),
    dict(kind="dapo", overlong="mask"),
    dict(kind="grpo", overlong="mask"),
    dict(kind="dr-grpo", advantage="none", overlong="mask", beta=0.1, kl="k3+"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_step_is_the_formula_over_the_whole_batch_however_it_is_cut(wide, processor, options, monkeypatch):
    """update()'s gradient of every weight, in one, two and four micro-batches, is that of the loss written token by
    token on plain full rows: ragged lengths, and cut-off completions where the longest is 15 tokens."""
    monkeypatch.setattr(train_grpo, "GRAD_CLIP", 1e9)
    grpo = settings(max_tokens=15, **options)
    roll, _ = experience(wide, processor, phantom_samples(None, 3, 0, 4, size=84), grpo)
    assert roll.truncated.any() and not roll.truncated.all() and len(set(roll.lengths.flatten().tolist())) > 1
    batch = collate(roll.prompts)
    with torch.no_grad():  # a reference that is not the policy
        roll.logp_ref = full_logprobs(wide, batch, roll.ids, roll.lengths) - 0.3 if grpo.beta else None

    wide.zero_grad()
    logp = full_logprobs(wide, batch, roll.ids, roll.lengths)
    kept = [(b, g) for b in range(4) for g in range(4) if grpo.overlong == "keep" or not roll.truncated[b, g]]
    tokens = sum(int(roll.lengths[b, g]) for b, g in kept)
    loss = 0
    for b, g in kept:
        n, r = int(roll.lengths[b, g]), roll.reward[b]
        a = (r[g] - r.mean()) / (1 if grpo.advantage == "none" else r.std() + 1e-4)
        for t in range(n):
            new = logp[b, g, t]
            term = -torch.exp(new - new.detach()) * a
            if grpo.beta:
                gap = roll.logp_ref[b, g, t] - new  # k3+'s gradient is that of gap^2 / 2
                term = term + grpo.beta * gap**2 / 2
            loss = loss + term / {"grpo": n * 16, "dapo": tokens, "dr-grpo": 16 * 15}[grpo.kind]
    loss.backward()
    expected = [p.grad.clone() for p in wide.parameters()]
    largest = max(g.abs().max() for g in expected)
    for micro_batch in (1, 2, 4):
        optimizer, grads = torch.optim.SGD(wide.parameters(), lr=0.0), []
        optimizer.step = lambda grads=grads: grads.extend(p.grad.clone() for p in wide.parameters())
        train_grpo.update(wide, None, optimizer, roll, None, replace(grpo, micro_batch=micro_batch))
        # Advantages are held in float32: against them the plain formula is right to seven digits.
        assert max((a - b).abs().max() for a, b in zip(grads, expected, strict=True)) < 1e-6 * largest
    assert largest > 1e-3


def test_one_pass_over_the_prompts_serves_rollout_and_update(wide, processor, monkeypatch):
    """Where the step is one forward pass, the update goes on from the prefix that was decoded on, to the same bits."""
    looks, look, gradients = [], wide.visual.forward, []
    monkeypatch.setattr(wide.visual, "forward", lambda *a: looks.append(1) or look(*a))
    grpo, samples = settings(micro_batch=4), phantom_samples(None, 3, 0, 4, size=84)
    roll, prefix = experience(wide, processor, samples, grpo)
    for start in (prefix, None):
        optimizer = torch.optim.SGD(wide.parameters(), lr=0.0)
        monkeypatch.setattr(optimizer, "step", lambda: gradients.append([p.grad.clone() for p in wide.parameters()]))
        train_grpo.update(wide, None, optimizer, roll, start, grpo)
        assert len(looks) == (1 if start else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    for unlike in (dict(micro_batch=3), dict(micro_batch=4, inner_steps=2), dict(micro_batch=4, dynamic_sampling=1)):
        assert experience(wide, processor, samples, settings(**unlike))[1] is None


def test_a_step_leaves_the_next_rollout_the_memory_that_it_took(records, tmp_path, monkeypatch):  # noqa: F811
    """With a reference, in one forward pass: no gradient is held on to, nor the prompts' keys and values."""
    import gc

    held, step = [], train_grpo.step

    def watched(number, policy, *rest):
        gc.collect()
        held.append(any(p.grad is not None for p in policy.parameters()))
        with warnings.catch_warnings():  # of torch's, for looking at names that it has given up
            warnings.simplefilter("ignore")
            held.append(any(isinstance(thing, train_grpo.Prefix) for thing in gc.get_objects()))
        return step(number, policy, *rest)

    monkeypatch.setattr(train_grpo, "step", watched)
    grpo(tmp_path / "run", records, "--steps", "3", "--micro-batch", "4", "--beta", "0.05", "--schedule", "raw")
    assert held == [False] * 6


def test_a_rollout_is_scored_in_original_pixels(processor):
    """A 130-pixel picture is seen at 140: the answer is scaled back before it is compared."""
    roll, _ = experience(load_policy(NANO), processor, phantom_samples("dermoscopy", 3, 7, 1, size=130), settings())
    assert roll.prompts[0].scale == pytest.approx((130 / 140, 130 / 140))
    for text, box in zip(roll.texts[0], roll.answers[0], strict=True):
        assert box == pytest.approx([v * 130 / 140 for v in parse_box(text).box], rel=1e-6)


def test_uniforms_depend_on_seed_step_and_sample_only():
    a = uniforms(1, 2, [0, 1, 2], [10, 11, 12], 3, 5)
    assert torch.equal(a[1:], uniforms(1, 2, [1, 2], [11, 12], 3, 5))
    others = [uniforms(*key, 3, 5) for key in ((0, 2, [0], [10]), (1, 3, [0], [10]), (1, 2, [0], [11]))]
    assert all(not torch.equal(a[:1], other) for other in others) and a.min() >= 0 and a.max() < 1


def test_master_weights_move_at_a_learning_rate_of_1e_6_and_bfloat16_ones_do_not(records, tmp_path):  # noqa: F811
    """Fifty optimiser steps of the paper's size in bfloat16 arithmetic: next to all fp32 master weights have moved; of
    weights that are bfloat16 themselves next to none, as each step of 1e-6 is rounded away."""
    moved = {}
    tiny, small = tiny_folder(tmp_path), Processor(NANO, "answer", TASKS, max_pixels=56 * 56)
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(tiny).to(dtype)
        policy.compute_dtype = torch.bfloat16
        grpo = settings(group_size=2, max_tokens=6, inner_steps=2)
        roll, _ = experience(policy, small, load_samples(str(records), TASKS, 0, "train")[:1], grpo)
        roll.advantage, roll.logp_old = torch.tensor([[1.0, -1.0]]), None
        before = [p.detach().clone() for p in policy.parameters()]
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        for _ in range(25):
            assert train_grpo.update(policy, None, optimizer, roll, None, grpo)["skipped"] == 0
        count = sum((a != b).sum().item() for a, b in zip(before, policy.parameters(), strict=True))
        moved[dtype] = count / sum(p.numel() for p in policy.parameters())
    assert moved[torch.float32] > 0.9 and moved[torch.bfloat16] < 0.05, moved


# -------------------------------------------------------------------------------------------------------- not finite


def test_five_steps_without_a_number_end_the_run_and_change_nothing(records, tmp_path, monkeypatch):  # noqa: F811
    """Each is skipped, counted, over a resume too, and written as null; a good one in between begins the count anew."""
    good, calls = train_grpo.grpo_loss, Counter()

    def sometimes(*tensors, **options):
        calls["all"] += 1
        loss, stats = good(*tensors, **options)
        return (loss if calls["all"] in (9, 10) else loss * math.nan), stats  # two micro-batches a step: step 5 is good

    monkeypatch.setattr(train_grpo, "grpo_loss", sometimes)
    out = tmp_path / "run"
    grpo(out, records, "--steps", "7", "--save-every", "4", "--schedule", "raw")
    assert not changed(NANO, out / "step-000004")
    output = run(train_grpo, "--resume", "--out", str(out), "--steps", "30", expect=2)
    assert "error: 5 steps in a row had a non-finite loss or gradient; start anew with a lower --lr" in output
    rows = lines(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [bool(row["skipped"]) for row in rows]
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_weights_that_are_no_numbers_end_the_run_in_words(records, tmp_path):  # noqa: F811
    model = shutil.copytree(NANO, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, model / "model.safetensors")
    output = grpo(tmp_path / "run", records, "--model", str(model), "--recipe", "nano", "--steps", "9", expect=2)
    assert "5 steps in a row had a non-finite loss or gradient" in output


# -------------------------------------------------------------------------------------------------- dynamic sampling

FLAT, SPREAD, HIT = [0.1, 0.1], [0.1, 0.9], [0.9, 0.95]


def scripted(monkeypatch, hits: list[list[float]]) -> list[list[int]]:
    """In place of rollouts: the k-th prompt of the stream is answered with the u's hits[k mod n]. Returns what was
    asked for, the places of each round."""
    asked = []

    def draw(self, step, count):
        self.places, self.good = range(self.drawn, self.drawn + count), [*range(count)]
        self.failures, self.fault = [], None
        asked.append(list(self.places))
        prompt = dict(sample=self.samples[0], target=(0, 0, 1, 1), scale=(1, 1), size=(1, 1))
        return [SimpleNamespace(place=place, **prompt) for place in self.places], torch.zeros(count, 2, 1)

    def sample(policy, actor, processor, prompts, numbers, grpo):
        b = len(prompts)
        ids = torch.full((b, 2, prompts[0].place % 3 + 1), 7)
        lengths, cut = torch.ones(b, 2, dtype=torch.long), torch.zeros(b, 2, dtype=torch.bool)
        return rollout.Rollout(prompts, ids, lengths, cut, [["", ""]] * b), None

    def by_task(texts, prompts):
        u = torch.tensor([hits[p.place % len(hits)][i % 2] for i, p in enumerate(prompts)])
        n = len(texts)
        return train_grpo.TASKS["box"].score([], []).__class__(u, u >= 0, [""] * n, [None] * n, {"giou": u})

    monkeypatch.setattr(Stream, "draw", draw)
    monkeypatch.setattr(train_grpo, "sample", sample)
    monkeypatch.setattr(rollout.tasks, "by_task", by_task)
    monkeypatch.setattr("runtime.run.write_samples", lambda *a: None)
    return asked


def scripted_step(processor, dynamic_sampling: int, monkeypatch):
    """step() on scripted answers -> (everyone, rollout, what update() was given)."""
    used = []
    monkeypatch.setattr(train_grpo, "update", lambda p, r, o, roll, *rest: used.append(roll) or {})
    samples = phantom_samples(None, 3, 0, 1)
    stream = Stream(samples, processor, BadRecords(), 4, 2, 3, 0)
    grpo = settings(batch_size=4, group_size=2, dynamic_sampling=dynamic_sampling)
    everyone, roll, *_ = train_grpo.step(0, None, None, None, None, stream, Schedules(["fixed"], stream.keys, 9), grpo)
    return everyone, roll, used[0], stream


def test_groups_without_spread_are_replaced_by_fresh_prompts(processor, monkeypatch):
    asked = scripted(monkeypatch, [SPREAD, FLAT, HIT, SPREAD, FLAT, SPREAD, SPREAD])
    everyone, roll, used, stream = scripted_step(processor, 3, monkeypatch)
    # Four prompts, of which 1 and 2 are flat; two more, of which 4 is flat; one more: 6.
    assert asked == [[0, 1, 2, 3], [4, 5], [6]] and stream.drawn == 7
    assert [p.place for p in roll.prompts] == list(range(7)) and roll.u.shape == (7, 2)
    assert [p.place for p in used.prompts] == [0, 3, 5, 6] and used.spread.all() and used.ids.shape == (4, 2, 2)
    from runtime.metrics import rollout_metrics

    row = rollout_metrics(everyone, {("phantoms", "box"): 0.5})
    assert row["groups"] == 7 and row["zero_spread"] == pytest.approx(3 / 7)
    assert row["no_hit"] == pytest.approx(2 / 7)  # the third without spread has hits only
    assert rollout_metrics(everyone, {("phantoms", "box"): None})["no_hit"] is None


GIVING_UP = [(1, [SPREAD, *[FLAT] * 4], 7, [0, 5]), (2, [FLAT], 12, []), (0, [FLAT], 4, [0, 1, 2, 3])]


@pytest.mark.parametrize(("rounds", "hits", "seen", "kept"), GIVING_UP)
def test_dynamic_sampling_drops_what_is_flat_after_k_rounds(rounds, hits, seen, kept, processor, monkeypatch):
    """Off, flat groups stay in the batch and in its normalisation."""
    scripted(monkeypatch, hits)
    _, roll, used, _ = scripted_step(processor, rounds, monkeypatch)
    assert len(roll.prompts) == seen and [p.place for p in used.prompts] == kept


def test_the_schedule_sees_every_group_that_was_rolled_out(records, tmp_path, monkeypatch):  # noqa: F811
    """A whole run with dynamic sampling: tau's trace is that of a schedule that is shown all rollouts. Shown the
    update's groups alone, as in a naive implementation, the hit rate never gets there."""
    script = [HIT] * 5 + [SPREAD] + [HIT] * 4 + [SPREAD]
    asked, used = scripted(monkeypatch, script), []
    losses = dict.fromkeys(("loss", "grad_norm")) | {"skipped": 0, "seconds_update": 0.0}
    monkeypatch.setattr(train_grpo, "update", lambda p, r, o, roll, *rest: used.append(roll) or losses)
    flags = ("--schedule", "medloc:window=12", "--dynamic-sampling", "3", "--group-size", "2")
    grpo(tmp_path / "run", records, "--steps", "30", *flags)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    without, naive, expected, places = (*(Schedule("medloc", MedLoc(window=12), 30) for _ in range(2)), [], 0)
    for row, roll in zip(rows, used, strict=True):
        expected.append(without.tau)
        without.observe([script[place % len(script)] for place in range(places, row["drawn"])])
        places = row["drawn"]
        naive.observe(roll.u.tolist())
        assert roll.spread.all()
    assert [row["tau"] for row in rows] == expected and len(set(expected)) >= 3 and naive.tau == 0.3
    assert sum(map(len, asked)) == places


def test_a_step_without_any_spread_is_said_and_changes_nothing(records, tmp_path, monkeypatch):  # noqa: F811
    scripted(monkeypatch, [FLAT])
    output = grpo(tmp_path / "run", records, "--steps", "2", "--dynamic-sampling", "1", "--group-size", "2")
    assert "step 1: none of 8 groups had spread, no update" in output and "step 2: none of 8" in output
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["groups"], row["dropped"], row["loss"]) for row in rows] == [(8, 8, None)] * 2
    assert not changed(NANO, tmp_path / "run" / "step-000002")


# ------------------------------------------------------------------------------------------------------- evaluation


def test_metrics_equal_the_definitions():
    us = [0.0, 0.3, 0.5, 0.55, 0.8, 0.95, 1.0]
    rows = [{"u": u, "dataset": "ab"[i % 2], "reason": "" if u else "no box"} for i, u in enumerate(us)]
    rows = [row | {"task": "box", "target": [0.0, 0.0, 9.0, 9.0]} for row in rows]
    result = evaluation.metrics(rows)
    assert result["miou"] == pytest.approx(np.mean(us), abs=1e-6)
    assert result["miou_standard_error"] == pytest.approx(np.std(us, ddof=1) / math.sqrt(7), abs=1e-6)
    for t in (0.3, 0.5, 0.8):
        assert result[f"acc@{t}"] == pytest.approx(np.mean([u >= t for u in us]), abs=1e-6)
    pmap = np.mean([np.mean([u >= t - 1e-9 for u in us]) for t in np.linspace(0.5, 0.95, 10)])
    assert result["pmap"] == pytest.approx(pmap, abs=1e-6)
    assert result["n"] == 7 and result["parse_failures"] == 1 and result["datasets"]["a"]["n"] == 4


def test_the_constant_answer_is_the_median_of_training_shares():
    train = phantom_samples("xray", 0, 0, 5, size=100)
    boxes = np.array([load(s)[1] for s in train])
    text = TASKS["box"].constant([(load(s)[0].size, load(s)[1]) for s in train])((50, 100), None)
    assert parse_box(text).box == pytest.approx(np.median(boxes, axis=0) * [0.5, 1, 0.5, 1], abs=1e-4)
    assert 0 < evaluation.constant(train, train)["miou"] < 1


def test_predictions_of_another_model_are_scored_in_original_pixels(records, tmp_path):  # noqa: F811
    truth = [json.loads(line)["bbox"] for line in records.read_text().splitlines()]
    answers = [{"box": truth[0]}, {"text": f"It is here: {truth[1]}"}, {"box": None}, {"text": "I cannot see"}]
    answers += [{"box": box} for box in truth[4:]]
    file, out = tmp_path / "answers.jsonl", tmp_path / "out"
    file.write_text("\n".join(map(json.dumps, answers)))
    flags = ["--predictions", str(file), "--data", str(records), "--out", str(out)]
    run(evaluation, *flags, "--train", str(records))
    report = json.loads((out / "eval.json").read_text())
    assert report["n"] == 12 and report["parse_failures"] == 2 and report["constant"]["n"] == 12
    assert report["miou"] == pytest.approx(10 / 12, abs=1e-5) and (out / "sheet.png").exists()
    file.write_text(json.dumps({"bbox": [1, 2, 3, 4]}))
    assert "answers.jsonl:1: needs the field 'box'" in run(evaluation, *flags, expect=2)
    file.write_text(json.dumps({"box": [1, 2, 3, 4]}))
    assert "1 answers for 12 samples" in run(evaluation, *flags, expect=2)


def test_eval_asks_about_one_picture(records, tmp_path):  # noqa: F811
    image = records.parent / "0.png"
    output = run(evaluation, "--image", str(image), "--query", "the skin lesion", "--out", str(tmp_path))
    assert "box in original pixels" in output and (tmp_path / "overlay.png").exists()


# --------------------------------------------------------------------------------------------------------------- SFT


def test_coarse_boxes_keep_the_place_and_lose_the_size():
    rng, coarse = np.random.Generator(np.random.PCG64(0)), train_sft.Coarse()
    boxes = np.array([train_sft.coarse_box((60, 60, 80, 80), 1000, 1000, rng, coarse) for _ in range(4000)])
    sizes = np.log((boxes[:, 2:] - boxes[:, :2]) / 20)
    assert sizes.mean() == pytest.approx(0.8, abs=0.03) and sizes.std() == pytest.approx(0.35, abs=0.03)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - 70
    assert np.abs(centres.mean(0)).max() < 0.5 and centres.std() == pytest.approx(4.4, abs=0.3)
    edge = np.array([train_sft.coarse_box((0, 0, 20, 100), 100, 100, rng, coarse) for _ in range(1000)])
    assert edge.min() >= 0 and edge.max() <= 100 and (edge[:, 2:] > edge[:, :2]).all()


def test_several_coarse_boxes_are_valid_answers_and_sometimes_one_less_or_more():
    """Counts by the shares that are said; what is kept lies where it was; every answer can be read."""
    rng, coarse, task = np.random.Generator(np.random.PCG64(0)), train_sft.Coarse(), TASKS["boxes"]
    far = [(0.0, 0.0, 12.0, 20.0), (100.0, 100.0, 140.0, 139.0), (60.0, 5.0, 80.0, 20.0)]
    for boxes in ([], far[:1], far):
        counts = Counter()
        for _ in range(3000):
            coarsened = train_sft.coarse_boxes(boxes, 140, 140, rng, coarse)
            found, reason = parse_boxes(task.answer(coarsened, (1.0, 1.0), "answer", ""))
            assert reason == "" and len(found) == len(coarsened)
            assert all(0 <= x1 < x2 <= 140 and 0 <= y1 < y2 <= 140 for x1, y1, x2, y2 in found)
            counts[len(found) - len(boxes)] += 1
        both = coarse.missed * coarse.invented if boxes else 0
        expected = {1: coarse.invented - both, -1: coarse.missed - both if boxes else 0}
        assert all(counts[k] / 3000 == pytest.approx(share, abs=0.03) for k, share in expected.items())
    exact = train_sft.Coarse(0, 0, 0, missed=0, invented=0)
    assert train_sft.coarse_boxes(far, 140, 140, rng, exact) == far
    # As the trainer asks for them: in the model's frame, others at every step, the same at the same one.
    prompt = SimpleNamespace(
        sample=Sample(None, "it", far, "d", "boxes"), target=far, scale=(2.0, 0.5), grid=(1, 20, 5)
    )
    asked = prompt, SimpleNamespace(style="answer", image_config=SimpleNamespace(patch_size=14))
    settings = train_sft.Sft(9, 9, 9, 1e-3, 9, seed=0)
    plain = train_sft.answer_of(*asked, settings, 0, 0)
    assert plain == task.answer(far, (2.0, 0.5), "answer", "it")
    assert plain == train_sft.answer_of(*asked, replace(settings, coarse=exact), 0, 0)
    said = [train_sft.answer_of(*asked, replace(settings, coarse=coarse), step, 0) for step in (0, 1, 2, 0)]
    assert len(set(said)) == 3 and said[0] == said[3] and all(not parse_boxes(text)[1] for text in said)


def test_sft_learns(records, tmp_path):  # noqa: F811
    """Twenty steps on twelve pictures: the likelihood of their boxes rises."""
    flags = ("--data", str(records), "--val", str(records), "--steps", "20", "--batch-size", "6", "--lr", "1e-3")
    run(train_sft, *flags, "--warmup", "5", "--out", str(tmp_path / "a"))
    rows = lines(tmp_path / "a" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    report = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert report["final"]["miou"] > report["start"]["miou"]


def test_an_epoch_shows_every_sample_once_and_places_follow_from_the_seed():
    order = Sampler(8, 3, 5).take(0, 16)
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and order[:8] != order[8:]
    assert Sampler(8, 3, 5).indices(2) == order[6:9] and Sampler(8, 3, 6).take(0, 8) != order[:8]
