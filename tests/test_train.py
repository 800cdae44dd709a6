"""train_grpo.py, train_sft.py, eval.py and checkpoint.py as a user runs them, on the nano policy and small pictures."""

import io
import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from full_rows import full_logprobs
from PIL import Image
from safetensors.torch import load_file, save_file

import errors
import eval as evaluation
import train_grpo
import train_sft
from data import BadRecords, load, load_samples, phantom_samples
from eval import Task, metrics
from model import Policy, collate
from scheduler import ScheduleConfig, make_schedule
from weights import load_policy, read_config

ROOT = Path(__file__).parent.parent
METRICS = (
    "step tau hit_rate sigma margin iou_mean iou_q25 iou_q50 iou_q75 reward_mean reward_box zero_spread no_hit "
    "parse_failures truncated kl clip_low clip_high entropy grad_norm loss lr seconds seconds_rollout seconds_update "
    "tokens peak_mb groups dropped drawn skipped seconds_input resident_mb"
).split()
TIMES = {"seconds", "seconds_input", "seconds_rollout", "seconds_update", "peak_mb", "resident_mb"}


def run(script, *flags: str, expect: int = 0) -> str:
    """A script's main() as its __main__ block calls it -> stdout and stderr. In this process, since importing torch
    takes longer than most runs here; `whole` below is the one run in a process of its own."""
    output, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [script.__name__ + ".py", *flags])
        try:
            errors.run(script.main, train_grpo.MEMORY)
        except SystemExit as end:
            code = end.code
    assert code == expect, output.getvalue()
    assert "Traceback" not in output.getvalue()
    return output.getvalue()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Twelve phantoms as files and a JSONL, 84 x 56 pixels so that a step is quick; two prompts of unequal length."""
    folder = tmp_path_factory.mktemp("records")
    with open(folder / "train.jsonl", "w") as file:
        for i in range(12):
            sample = phantom_samples(None, 5, i, 1, size=84)[0]
            image, box = load(sample)
            image.save(folder / f"{i}.png")
            record = {"image": f"{i}.png", "query": sample.query, "bbox": box, "dataset": sample.dataset}
            print(json.dumps(record), file=file)
    return folder / "train.jsonl"


def flags_for(out: Path, records: Path) -> list[str]:
    small = ["--batch-size", "4", "--group-size", "4", "--micro-batch", "2", "--eval-limit", "4"]
    return ["--data", str(records), "--val", str(records), "--out", str(out), *small]


def grpo(out: Path, records: Path, *flags: str, expect: int = 0) -> str:
    return run(train_grpo, *flags_for(out, records), *flags, expect=expect)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


WHOLE = ("--samples-every", "2", "--save-every", "3", "--window", "4", "--tau-start", "0.1")


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory) -> Path:
    """A finished run of six steps that everything below looks at."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "train_grpo.py", *flags_for(out, records), "--steps", "6", *WHOLE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_writes_all_that_it_promises(whole):
    rows = lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(set(METRICS) <= row.keys() for row in rows)
    assert all(math.isfinite(row[key]) for row in rows for key in METRICS if key != "kl")
    assert all(row["kl"] is None for row in rows)  # --beta 0: no reference, so no number
    config = json.loads((whole / "config.json").read_text())
    assert (
        config["arguments"]["lr"] == 1e-4 and config["arguments"]["tau_start"] == 0.1 and "torch" in config["versions"]
    )
    report = json.loads((whole / "eval.json").read_text())
    for part in (report["start"], report["final"]):
        assert {"miou", "acc@0.3", "acc@0.5", "acc@0.8", "pmap", "n", "parse_failures", "datasets"} <= part.keys()
    samples = lines(whole / "samples.jsonl")
    assert [s["step"] for s in samples] == [1, 2, 4, 6]
    assert all(len(samples[0][key]) == 4 for key in ("texts", "boxes", "ious", "rewards", "advantages", "reasons"))
    assert Image.open(whole / "overlay-000006.png").width > 500
    assert sorted(f.name for f in whole.glob("step-*")) == ["step-000003", "step-000006"]


def test_learning_moves_the_weights_and_the_checkpoint_holds_them(whole):
    start, end = load_policy(evaluation.NANO), load_policy(whole / "step-000006")
    moved = [(a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 1e-5 < max(moved) < 0.1


def test_resume_goes_on_as_if_never_stopped(whole, records, tmp_path):
    """Three steps, stop, resume to six: metrics equal line by line (times aside), weights bit by bit."""
    out = tmp_path / "run"
    grpo(out, records, "--steps", "3", *WHOLE)
    with open(out / "metrics.jsonl", "a") as file:  # a kill came in step 5
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')
    run(train_grpo, "--resume", "--out", str(out), "--steps", "6")
    assert without_times(lines(out / "metrics.jsonl")) == without_times(lines(whole / "metrics.jsonl"))
    assert lines(out / "samples.jsonl")[-1] == lines(whole / "samples.jsonl")[-1]
    for a, b in zip(
        load_policy(out / "step-000006").parameters(),
        load_policy(whole / "step-000006").parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_every_option_of_the_loop_runs_together(records, tmp_path):
    """KL to a reference, several inner steps, micro-batches, a format reward, evaluation in between."""
    out = tmp_path / "run"
    grpo(
        out, records, "--steps", "2", "--beta", "0.1", "--inner-steps", "3", "--lr", "1e-3", "--eval-every", "1",
        "--rewards", "box=1,format=0.5", "--kl", "k3+", "--loss", "dapo", "--overlong", "mask",
        "--schedule", "medloc-soft", "--clip-high", "0.01", "--clip-low", "0.01",
    )  # fmt: skip
    rows = lines(out / "metrics.jsonl")
    assert rows[1]["kl"] > 0 and rows[0]["clip_low"] + rows[0]["clip_high"] > 0
    assert all(row["reward_mean"] == pytest.approx(row["reward_box"] + 0.5 * row["reward_format"]) for row in rows)
    assert [h["step"] for h in json.loads((out / "eval.json").read_text())["history"]] == [1, 2]


def test_bfloat16_rolls_out_with_the_weights_it_has_trained(records, tmp_path, monkeypatch):
    """What rolls out and what is evaluated is a bfloat16 copy of the weights, refreshed after each step."""
    policies, rolled = [], []
    make, generate = train_grpo.make_policies, Policy.generate
    monkeypatch.setattr(train_grpo, "make_policies", lambda *a: policies.append(make(*a)) or policies[0])

    def spy(self, *arguments):
        policy, actor, _ = policies[0]
        assert self is actor and actor is not policy
        rolled.append(torch.cat([p.flatten() for p in actor.parameters()]))
        assert torch.equal(rolled[-1], torch.cat([p.bfloat16().flatten() for p in policy.parameters()]))
        return generate(self, *arguments)

    monkeypatch.setattr(Policy, "generate", spy)
    flags = ("--steps", "2", "--dtype", "bfloat16", "--lr", "1e-2", "--warmup", "0", "--schedule", "raw")
    grpo(tmp_path / "run", records, *flags)
    assert not torch.equal(rolled[0], rolled[-1])


def test_the_flags_reach_what_they_are_for(records, tmp_path, monkeypatch):
    """Clipping, recomputation, the adapters' scale and the temperature of the old log-probs, as the parts get them."""
    seen = {}
    clip, add, logprobs = torch.nn.utils.clip_grad_norm_, train_grpo.lora.add, Policy.logprobs

    def spy(self, prefix, ids, lengths, temperature=1.0, entropy=False):
        seen.setdefault("temperatures", set()).add(temperature)
        seen["checkpointing"] = self.checkpointing
        return logprobs(self, prefix, ids, lengths, temperature, entropy)

    monkeypatch.setattr(Policy, "logprobs", spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: seen.update(grad_clip=most) or clip(p, most))
    monkeypatch.setattr(train_grpo.lora, "add", lambda *a: seen.update(lora=a[1:]) or add(*a))
    flags = ("--grad-clip", "0.25", "--checkpointing", "--lora-rank", "3", "--lora-alpha", "5", "--seed", "8")
    flags += ("--temperature", "0.7", "--inner-steps", "2", "--beta", "0.1", "--clip-low", "0.1")
    grpo(tmp_path / "run", records, "--steps", "1", *flags)
    assert seen == dict(grad_clip=0.25, checkpointing=True, lora=(3, 5.0, 8), temperatures={0.7})


def test_the_reference_of_a_resumed_run_is_still_the_policy_it_started_from(records, tmp_path):
    """KL to --model's weights, in full training: two steps, stop, resume to four gives the numbers of four."""
    straight, broken = tmp_path / "a", tmp_path / "b"
    flags = ("--beta", "0.1", "--lr", "1e-3", "--schedule", "raw")
    grpo(straight, records, "--steps", "4", *flags)
    grpo(broken, records, "--steps", "2", *flags)
    run(train_grpo, "--resume", "--out", str(broken), "--steps", "4")
    rows = lines(straight / "metrics.jsonl")
    assert rows[3]["kl"] > 1e-3 and without_times(lines(broken / "metrics.jsonl")) == without_times(rows)


def test_a_run_is_not_resumed_to_fewer_steps_than_it_has(whole):
    output = run(train_grpo, "--resume", "--out", str(whole), "--steps", "5", expect=2)
    assert "step-000006 has 6 already" in output and len(lines(whole / "metrics.jsonl")) == 6
    assert json.loads((whole / "config.json").read_text())["arguments"]["steps"] == 6


def test_bfloat16_trains_float32_weights(records, tmp_path):
    """The arithmetic is bfloat16, and a step of 1e-6 is not lost in it."""
    out = tmp_path / "run"
    grpo(out, records, "--steps", "2", "--dtype", "bfloat16", "--lr", "1e-6", "--schedule", "raw")
    start, end = load_policy(evaluation.NANO), load_policy(out / "step-000002")
    moved = [(a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 1e-7 < max(moved) < 1e-5
    assert all(row["kl"] is None and row["clip_high"] == 0 for row in lines(out / "metrics.jsonl"))


def test_a_used_folder_is_not_overwritten(whole, records):
    assert "is not empty" in grpo(whole, records, "--steps", "6", expect=2)
    assert "--resume goes on with --lr 0.0001" in run(
        train_grpo, "--resume", "--out", str(whole), "--lr", "0.1", expect=2
    )
    assert len(lines(whole / "metrics.jsonl")) == 6


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(load_policy(evaluation.NANO), evaluation.NANO, "answer")


def arguments(**changes) -> Namespace:
    args = train_grpo.parse_arguments([])
    vars(args).update({"group_size": 4, "micro_batch": 3, "max_tokens": 20} | changes)
    return args


def make_rollout(task: Task, args: Namespace, samples: list, step: int = 0) -> train_grpo.Rollout:
    schedule = make_schedule(args.schedule, ScheduleConfig(), 10)
    args.batch_size = len(samples)
    stream = train_grpo.Stream(samples, task, BadRecords(), args)
    return train_grpo.rollout(task.policy, task.policy, None, task, stream, step, schedule, args)[2]


@pytest.fixture(scope="module")
def wide() -> Task:
    """In float64, where a difference of 1e-10 is a mistake and not rounding."""
    policy = load_policy(evaluation.NANO, dtype=torch.float64)
    policy.compute_dtype = torch.float64
    return Task(policy, evaluation.NANO, "answer")


OPTIONS = [
    dict(loss="grpo"),
    dict(loss="dapo"),
    dict(loss="dr-grpo"),
    dict(loss="grpo", overlong="mask"),
    dict(loss="dapo", overlong="mask"),
    dict(loss="dr-grpo", overlong="mask", beta=0.1, kl="k3+"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_step_is_the_formula_over_the_whole_batch_however_it_is_cut(wide, options):
    """update()'s gradient of every weight, in one, two and four micro-batches, is that of the loss written token by
    token on plain full rows: ragged lengths, and cut-off completions where the longest is 15 tokens."""
    policy = wide.policy
    args = arguments(schedule="raw", grad_clip=1e9, max_tokens=15, **options)
    samples = phantom_samples(None, 3, 0, 4, size=84)
    roll = make_rollout(wide, args, samples)
    assert roll.truncated.any() and not roll.truncated.all() and len(set(roll.lengths.flatten().tolist())) > 1
    batch = collate(roll.prompts)
    with torch.no_grad():  # a reference that is not the policy
        roll.logp_ref = full_logprobs(policy, batch, roll.ids, roll.lengths) - 0.3 if args.beta else None

    policy.zero_grad()
    logp = full_logprobs(policy, batch, roll.ids, roll.lengths)
    kept = [
        (b, g) for b in range(4) for g in range(args.group_size) if args.overlong == "keep" or not roll.truncated[b, g]
    ]
    tokens = sum(int(roll.lengths[b, g]) for b, g in kept)
    loss = 0
    for b, g in kept:
        n, r = int(roll.lengths[b, g]), roll.reward[b]
        a = (r[g] - r.mean()) / (1 if args.loss == "dr-grpo" else r.std() + 1e-4)
        weight = {"grpo": 1 / (n * 16), "dapo": 1 / tokens, "dr-grpo": 1 / (16 * 15)}[args.loss]
        for t in range(n):
            loss = loss - weight * a * torch.exp(logp[b, g, t] - logp[b, g, t].detach())
            if args.beta:
                loss = loss + weight * args.beta * (logp[b, g, t] - roll.logp_ref[b, g, t]).square() / 2
    loss.backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    largest = max(g.abs().max() for g in expected)
    gradients = []
    for size in (4, 2, 1):
        args.micro_batch = size
        train_grpo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), roll, args)
        gradients.append([p.grad.clone() for p in policy.parameters()])
    policy.zero_grad()
    for grads in gradients:
        assert max((a - b).abs().max() for a, b in zip(grads, gradients[0], strict=True)) < 1e-10
        # Advantages are held in float32: against them the plain formula is right to seven digits.
        assert max((a - b).abs().max() for a, b in zip(grads, expected, strict=True)) < 1e-6 * largest
    assert largest > 1e-3


def test_one_pass_over_the_prompts_serves_rollout_and_update(wide, monkeypatch):
    """Where the step is one forward pass, the update goes on from the prefix that was decoded on, to the same bits."""
    policy, looks, look = wide.policy, [], wide.policy.visual.forward
    monkeypatch.setattr(policy.visual, "forward", lambda *a: looks.append(1) or look(*a))
    args = arguments(schedule="raw", micro_batch=4)
    roll = make_rollout(wide, args, phantom_samples(None, 3, 0, 4, size=84))
    gradients = []
    for again in range(2):  # the second time there is no prefix any more
        assert (roll.prefix is None) == bool(again)
        train_grpo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), roll, args)
        assert len(looks) == 1 + again
        gradients.append([p.grad.clone() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    for unlike in (dict(micro_batch=3), dict(micro_batch=4, inner_steps=2), dict(micro_batch=4, dynamic_sampling=1)):
        roll = make_rollout(wide, arguments(schedule="raw", **unlike), phantom_samples(None, 3, 0, 4, size=84))
        assert roll.prefix is None


def test_a_rollout_is_scored_in_original_pixels(task):
    """A 130-pixel picture is seen at 140: the answer is scaled back before it is compared."""
    roll = make_rollout(task, arguments(), phantom_samples("dermoscopy", 3, 7, 1, size=130))
    assert roll.prompts[0].scale == pytest.approx((130 / 140, 130 / 140))
    assert roll.valid.all()  # else the loop below would say nothing
    for text, box in zip(roll.texts[0], roll.boxes[0].tolist(), strict=True):
        written = evaluation.rewards.parse_box(text).box
        assert box == pytest.approx([v * 130 / 140 for v in written], rel=1e-6)


def test_luck_depends_on_seed_step_and_sample_only():
    a = train_grpo.uniforms(1, 2, [0, 1, 2], [10, 11, 12], 3, 5)
    assert torch.equal(a[1:], train_grpo.uniforms(1, 2, [1, 2], [11, 12], 3, 5))
    others = [train_grpo.uniforms(*key, 3, 5) for key in ((0, 2, [0], [10]), (1, 3, [0], [10]), (1, 2, [0], [11]))]
    assert all(not torch.equal(a[:1], other) for other in others)
    assert a.min() >= 0 and a.max() < 1


def test_a_step_that_is_not_finite_changes_nothing(task):
    policy = load_policy(evaluation.NANO)
    own = Task(policy, evaluation.NANO, "answer")
    args = arguments(schedule="raw")
    roll = make_rollout(own, args, phantom_samples(None, 3, 0, 2, size=84))
    roll.advantage[0, 0] = math.nan
    before = [p.clone() for p in policy.parameters()]
    result = train_grpo.update(policy, torch.optim.AdamW(policy.parameters(), lr=1.0), roll, args)
    assert result["skipped"] == 1 and math.isnan(result["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_five_steps_without_a_number_end_the_run_and_change_nothing(records, tmp_path, monkeypatch):
    """Each is skipped, counted and written as null; a good one in between begins the count anew."""
    good, calls = train_grpo.grpo_loss, Counter()

    def sometimes(*tensors, **settings):
        calls["all"] += 1
        loss, stats = good(*tensors, **settings)
        return (loss if calls["all"] in (9, 10) else loss * math.nan), stats  # two micro-batches a step: step 5 is good

    monkeypatch.setattr(train_grpo, "grpo_loss", sometimes)
    out = tmp_path / "run"
    output = grpo(out, records, "--steps", "30", "--save-every", "4", "--schedule", "raw", expect=2)
    assert "error: 5 steps in a row had a non-finite loss or gradient; start anew with a lower --lr" in output
    rows = lines(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [bool(row["skipped"]) for row in rows]
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    pairs = zip(
        load_policy(evaluation.NANO).parameters(),
        load_policy(out / "step-000004").parameters(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_that_are_no_numbers_end_the_run_in_words(records, tmp_path):
    """One NaN in the checkpoint: answers are rubbish, every loss is NaN, five skipped steps end the run."""
    model = shutil.copytree(evaluation.NANO, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, model / "model.safetensors")
    output = grpo(tmp_path / "run", records, "--model", str(model), "--recipe", "nano", "--steps", "9", expect=2)
    assert "5 steps in a row had a non-finite loss or gradient" in output


def test_bad_steps_in_a_row_are_counted_over_a_resume(records, tmp_path, monkeypatch):
    good = train_grpo.grpo_loss

    def bad(*tensors, **settings):
        loss, stats = good(*tensors, **settings)
        return loss * math.nan, stats

    monkeypatch.setattr(train_grpo, "grpo_loss", bad)
    out = tmp_path / "run"
    grpo(out, records, "--steps", "3", "--schedule", "raw")
    run(train_grpo, "--resume", "--out", str(out), "--steps", "9", expect=2)
    assert len(lines(out / "metrics.jsonl")) == 5


def test_master_weights_move_at_a_learning_rate_of_1e_6_and_bfloat16_ones_do_not(records):
    """200 optimiser steps of the paper's size in bfloat16 arithmetic: next to all fp32 master weights have moved; of
    weights that are bfloat16 themselves next to none, as each step of 1e-6 is rounded away."""
    moved = {}
    config = json.loads((evaluation.NANO / "config.json").read_text()) | {"hidden_size": 64, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config["vision_config"] |= {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(read_config(config), (2,)).init_weights(0).to(dtype)
        policy.compute_dtype = torch.bfloat16
        own = Task(policy, evaluation.NANO, "answer", max_pixels=56 * 56)
        args = arguments(schedule="raw", group_size=2, max_tokens=6)
        roll = make_rollout(own, args, load_samples(str(records), 0, "train")[:1])
        roll.advantage = torch.tensor([[1.0, -1.0]])
        before = [p.detach().clone() for p in policy.parameters()]
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        for _ in range(200):
            assert train_grpo.update(policy, optimizer, roll, args)["skipped"] == 0
        changed = sum((a != b).sum().item() for a, b in zip(before, policy.parameters(), strict=True))
        moved[dtype] = changed / sum(p.numel() for p in policy.parameters())
    assert moved[torch.float32] > 0.9, moved
    assert moved[torch.bfloat16] < 0.05, moved


def test_deterministic_asks_torch_for_it_and_changes_no_number_on_a_cpu(whole, records, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    out = tmp_path / "run"
    grpo(out, records, "--steps", "2", *WHOLE, "--deterministic")
    assert asked == [True] and train_grpo.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert without_times(lines(out / "metrics.jsonl")) == without_times(lines(whole / "metrics.jsonl")[:2])


# -------------------------------------------------------------------------------------------------- dynamic sampling


def flat_and_spread(monkeypatch, hits: list[list[float]]) -> list[list]:
    """Scripted groups in place of rollouts: the k-th prompt of the stream is answered with the IoUs hits[k mod n], and
    rewarded as the schedule says. Returns what was asked for, (step's slot, prompts) of each call."""
    asked = []

    def scripted(policy, actor, task, prompts, noise, schedule, args, whole):
        places = [int(noise_row[0, 0]) for noise_row in noise]
        asked.append(places)
        iou = torch.tensor([hits[place % len(hits)] for place in places])
        reward = torch.tensor([[schedule.reward(u, u, True) for u in group] for group in iou.tolist()])
        b, g = iou.shape
        return train_grpo.Rollout(
            prompts=prompts, ids=torch.full((b, g, places[0] % 3 + 1), 7), lengths=torch.ones(b, g, dtype=torch.long),
            truncated=torch.zeros(b, g, dtype=torch.bool), texts=[[""] * g] * b, boxes=torch.zeros(b, g, 4), iou=iou,
            valid=torch.ones(b, g, dtype=torch.bool), reasons=[[""] * g] * b, parts={"box": reward}, reward=reward,
            advantage=train_grpo.kernels.group_advantage(reward), logp_old=None, logp_ref=None,
        )  # fmt: skip

    def place(seed, step, slots, indices, group, tokens):  # instead of luck: where in the stream the prompt stood
        return torch.tensor([float(i) for i in indices]).view(-1, 1, 1)

    monkeypatch.setattr(train_grpo, "roll_groups", scripted)
    monkeypatch.setattr(train_grpo, "uniforms", place)
    monkeypatch.setattr(train_grpo.Sampler, "take", lambda self, first, count: list(range(first, first + count)))
    return asked


def scripted_draw(self, step, first, places):
    """In place of Stream.draw: prompts are stand-ins, and the luck of each says where in the stream it stands."""
    prompt = Namespace(scale=(1.0, 1.0), box=(0.0, 0.0, 1.0, 1.0), size=(1, 1))
    return [prompt] * len(places), torch.tensor(places).float().view(-1, 1, 1), []


class Anything(list):
    def __getitem__(self, index):
        return index


FLAT, SPREAD, HIT = [0.1, 0.1], [0.1, 0.9], [0.9, 0.95]


def scripted_stream(drawn: int = 0, **options):
    args = arguments(schedule="medloc", batch_size=4, micro_batch=2, group_size=2, **options)
    task = Namespace(prompt=lambda sample, view: f"prompt {sample}", image_config=None)
    readers = Namespace(read=lambda indices, *_, ahead: ((index, None) for index in indices))
    stream = train_grpo.Stream([0], task, BadRecords(), args, drawn, readers)
    stream.samples = Anything()
    return args, stream


def test_groups_without_spread_are_replaced_by_fresh_prompts(monkeypatch):
    asked = flat_and_spread(monkeypatch, [SPREAD, FLAT, HIT, SPREAD, FLAT, SPREAD, SPREAD])
    args, stream = scripted_stream(dynamic_sampling=3)
    schedule = make_schedule("fixed", ScheduleConfig(), 10)
    tally, seen, used = train_grpo.rollout(None, None, None, None, stream, 0, schedule, args)
    # Four prompts, of which 1 and 2 are flat; two more, of which 4 is flat; one more: 6.
    assert asked == [[0, 1], [2, 3], [4, 5], [6]]
    assert seen.prompts == [f"prompt {i}" for i in range(7)] and stream.drawn == 7
    assert used.prompts == ["prompt 0", "prompt 3", "prompt 5", "prompt 6"] and used.spread.all()
    assert used.ids.shape == (4, 2, 3) and seen.iou.shape == (7, 2)
    metrics = train_grpo.rollout_metrics(tally, 0.5, args)
    assert (metrics["groups"], metrics["dropped"]) == (7, 3) and metrics["zero_spread"] == pytest.approx(3 / 7)
    assert metrics["no_hit"] == pytest.approx(2 / 7)  # the third without spread has hits only
    assert train_grpo.rollout_metrics(tally, None, args)["no_hit"] is None


def test_dynamic_sampling_gives_up_after_k_rounds_and_drops_what_is_flat(monkeypatch):
    asked = flat_and_spread(monkeypatch, [SPREAD, FLAT, FLAT, FLAT, FLAT])
    args, stream = scripted_stream(dynamic_sampling=1)
    tally, seen, used = train_grpo.rollout(
        None, None, None, None, stream, 0, make_schedule("fixed", ScheduleConfig(), 9), args
    )
    assert asked == [[0, 1], [2, 3], [4, 5], [6]] and used.prompts == ["prompt 0", "prompt 5"] and used.spread.all()
    asked = flat_and_spread(monkeypatch, [FLAT])
    args, stream = scripted_stream(dynamic_sampling=2)
    tally, seen, used = train_grpo.rollout(
        None, None, None, None, stream, 0, make_schedule("fixed", ScheduleConfig(), 9), args
    )
    assert len(seen.prompts) == 12 and used.prompts == []
    losses = train_grpo.update(None, None, used, args)  # nothing to learn from: the policy is not even touched
    assert losses["loss"] is None and losses["skipped"] == 0
    args, stream = scripted_stream(dynamic_sampling=0)
    tally, seen, used = train_grpo.rollout(
        None, None, None, None, stream, 0, make_schedule("fixed", ScheduleConfig(), 9), args
    )
    assert used is seen and len(seen.prompts) == 4  # off: flat groups stay in the batch and in its normalisation


def test_a_step_leaves_the_next_rollout_the_memory_that_it_took(records, tmp_path, monkeypatch):
    """With a reference, in one forward pass: neither the prompts' keys and values nor any gradient is held on to."""
    seen, held, rollout = [], [], train_grpo.rollout

    def watched(policy, *rest):
        held.append([p.grad is not None for p in policy.parameters()] + [roll.prefix is not None for roll in seen])
        tally, roll, used = rollout(policy, *rest)
        assert roll.prefix is not None  # else this would say nothing
        seen.append(roll)
        return tally, roll, used

    monkeypatch.setattr(train_grpo, "rollout", watched)
    grpo(tmp_path / "run", records, "--steps", "3", "--micro-batch", "4", "--beta", "0.05", "--schedule", "raw")
    assert len(held) == 3 and not any(any(kept) for kept in held)


def test_the_schedule_sees_every_group_that_was_rolled_out(records, tmp_path, monkeypatch):
    """A whole run with dynamic sampling: tau's trace is that of a schedule without it that is shown the same rollouts.
    Shown the update's groups alone, as in a naive implementation, the hit rate never gets there."""
    flat_and_spread(monkeypatch, [HIT] * 5 + [SPREAD] + [HIT] * 4 + [SPREAD])
    groups, rollout = [], train_grpo.rollout
    monkeypatch.setattr(train_grpo, "rollout", lambda *a: groups.append(rollout(*a)) or groups[-1])
    monkeypatch.setattr(train_grpo, "update", lambda *a: dict.fromkeys(("loss", "grad_norm")) | {"skipped": 0})
    monkeypatch.setattr(train_grpo.Stream, "draw", scripted_draw)
    monkeypatch.setattr(train_grpo, "write_samples", lambda *a: None)
    out = tmp_path / "run"
    grpo(out, records, "--steps", "30", "--window", "12", "--dynamic-sampling", "3", "--group-size", "2")
    trace = [row["tau"] for row in lines(out / "metrics.jsonl")]
    without, naive = (make_schedule("medloc", ScheduleConfig(window=12), 30) for _ in range(2))
    expected = []
    for tally, _, used in groups:
        expected.append(without.tau)
        without.observe(tally.iou.tolist())
        if used.prompts:
            naive.observe(used.iou.tolist())
        assert used.spread.all()
    assert trace == expected and len(set(trace)) >= 3
    assert naive.tau == 0.3


def test_a_step_without_any_spread_is_said_and_changes_nothing(records, tmp_path, monkeypatch):
    flat_and_spread(monkeypatch, [FLAT])
    monkeypatch.setattr(train_grpo.Stream, "draw", scripted_draw)
    monkeypatch.setattr(train_grpo, "write_samples", lambda *a: None)
    output = grpo(tmp_path / "run", records, "--steps", "2", "--dynamic-sampling", "1", "--group-size", "2")
    assert "step 1: none of 8 groups had spread, no update" in output and "step 2: none of 8" in output
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["groups"], row["dropped"], row["loss"]) for row in rows] == [(8, 8, None)] * 2
    ends = [load_policy(folder).parameters() for folder in (evaluation.NANO, tmp_path / "run" / "step-000002")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


DYNAMIC = ("--samples-every", "2", "--save-every", "3", "--dynamic-sampling", "2", "--schedule", "fixed")


def test_dynamic_sampling_is_logged_and_resumes_exactly(records, tmp_path, monkeypatch):
    """Three steps, stop, resume to six: the same as six, though what a step draws depends on all steps before."""
    straight, broken = tmp_path / "a", tmp_path / "b"
    flags = ("--fixed-tau", "0.3", *DYNAMIC)
    observe, seen = train_grpo.Schedule.observe, []
    monkeypatch.setattr(
        train_grpo.Schedule, "observe", lambda self, ious: seen.append(len(ious)) or observe(self, ious)
    )
    grpo(straight, records, "--steps", "6", *flags)
    rows = lines(straight / "metrics.jsonl")
    assert [row["drawn"] for row in rows] == np.cumsum([row["groups"] for row in rows]).tolist()
    assert any(row["groups"] > 4 for row in rows)
    assert seen == [row["groups"] for row in rows]  # the schedule's share
    assert any(row["grad_norm"] for row in rows)  # else the weights below are equal for nothing
    assert all(row["groups"] - row["dropped"] <= 4 for row in rows)
    assert all(row["dropped"] == round(row["zero_spread"] * row["groups"]) for row in rows)
    grpo(broken, records, "--steps", "3", *flags)
    run(train_grpo, "--resume", "--out", str(broken), "--steps", "6")
    assert without_times(lines(broken / "metrics.jsonl")) == without_times(rows)
    ends = [load_policy(out / "step-000006").parameters() for out in (straight, broken)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ------------------------------------------------------------------------------------- adapters, frozen vision, memory


def test_adapters_train_resume_and_save_merged(records, tmp_path):
    straight, broken = tmp_path / "a", tmp_path / "b"
    flags = ("--lora-rank", "4", "--beta", "0.1", "--lr", "1e-3", "--save-every", "2", "--schedule", "raw")
    output = grpo(straight, records, "--steps", "4", *flags)
    assert "M trained)" in output
    rows = lines(straight / "metrics.jsonl")
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0  # the reference is the policy without its adapters
    grpo(broken, records, "--steps", "2", *flags)
    run(train_grpo, "--resume", "--out", str(broken), "--steps", "4")
    assert without_times(lines(broken / "metrics.jsonl")) == without_times(rows)
    start, end = load_policy(evaluation.NANO), load_policy(straight / "step-000004")
    changed = {n for (n, a), b in zip(start.named_parameters(), end.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed and all(name.startswith("model.layers.") and name.endswith("proj.weight") for name in changed)
    result = json.loads((straight / "eval.json").read_text())["final"]
    run(evaluation, "--model", str(straight / "step-000004"), "--data", str(records), "--limit", "4", "--out",
        str(tmp_path / "e"))  # fmt: skip
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["miou"] == pytest.approx(result["miou"], abs=1e-6)


def test_deterministic_sampling_is_used_in_a_run(records, tmp_path):
    """With torch's switch really on: sampling in whole numbers, the same run twice."""
    rows = []
    try:
        for name in "ab":
            grpo(tmp_path / name, records, "--steps", "2", "--deterministic", "--schedule", "raw")
            assert torch.are_deterministic_algorithms_enabled()
            rows.append(without_times(lines(tmp_path / name / "metrics.jsonl")))
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows[0] == rows[1]


def test_checkpointing_changes_no_number_and_a_frozen_tower_stays(whole, records, tmp_path):
    out = tmp_path / "run"
    grpo(out, records, "--steps", "2", *WHOLE, "--checkpointing")
    assert without_times(lines(out / "metrics.jsonl")) == without_times(lines(whole / "metrics.jsonl")[:2])
    out = tmp_path / "frozen"
    grpo(out, records, "--steps", "2", "--freeze-vision", "--schedule", "raw")
    start, end = load_policy(evaluation.NANO), load_policy(out / "step-000002")
    changed = {n for (n, a), b in zip(start.named_parameters(), end.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed and not any(name.startswith("visual.") for name in changed)


def test_max_pixels_is_obeyed_and_stays_with_the_checkpoint(records, tmp_path):
    out = tmp_path / "run"
    grpo(out, records, "--steps", "1", "--max-pixels", "3136")
    task = Task(load_policy(out / "step-000001"), out / "step-000001", "answer")
    assert task.image_config.max_pixels == 3136
    assert task.prompt(load_samples(str(records), 0, "train")[0]).grid == (1, 4, 4)  # 84 x 84 seen at 56 x 56


# ------------------------------------------------------------------------------------------------------- evaluation


def test_metrics_equal_the_definitions():
    ious = [0.0, 0.3, 0.5, 0.55, 0.8, 0.95, 1.0]
    rows = [{"iou": u, "dataset": "ab"[i % 2], "reason": "no box" if u == 0 else ""} for i, u in enumerate(ious)]
    result = metrics(rows)
    accuracy = {t: np.mean([u >= t for u in ious]) for t in (0.3, 0.5, 0.8)}
    assert result["miou"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert result["miou_standard_error"] == pytest.approx(np.std(ious, ddof=1) / math.sqrt(7), abs=1e-6)
    assert [result[f"acc@{t}"] for t in accuracy] == pytest.approx(list(accuracy.values()), abs=1e-6)
    pmap = np.mean([np.mean([u >= t - 1e-9 for u in ious]) for t in np.linspace(0.5, 0.95, 10)])
    assert result["pmap"] == pytest.approx(pmap, abs=1e-6)
    assert result["n"] == 7 and result["parse_failures"] == 1 and result["datasets"]["a"]["n"] == 4


def test_constant_box_is_the_median_of_training_shares():
    train = phantom_samples("xray", 0, 0, 5, size=100)
    result = evaluation.constant_box(train, train)
    boxes = np.array([load(s)[1] for s in train])
    assert result["box_as_shares"] == pytest.approx((np.median(boxes, axis=0) / 100).tolist(), abs=1e-4)
    assert 0 < result["miou"] < 1


def test_predictions_of_another_model_are_scored_in_original_pixels(records, tmp_path):
    truth = [json.loads(line)["bbox"] for line in records.read_text().splitlines()]
    answers = [{"box": truth[0]}, {"text": f"It is here: {truth[1]}"}, {"box": None}, {"text": "I cannot see"}]
    answers += [{"box": box} for box in truth[4:]]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, answers)))
    out = tmp_path / "out"
    run(evaluation, "--predictions", str(file), "--data", str(records), "--train", str(records), "--out", str(out))
    report = json.loads((out / "eval.json").read_text())
    assert report["n"] == 12 and report["parse_failures"] == 2
    assert report["miou"] == pytest.approx(10 / 12, abs=1e-5) and "constant_box" in report
    file.write_text(json.dumps({"bbox": [1, 2, 3, 4]}))
    message = run(evaluation, "--predictions", str(file), "--data", str(records), "--out", str(out), expect=2)
    assert "answers.jsonl:1: needs the field 'box'" in message
    file.write_text(json.dumps({"box": [1, 2, 3, 4]}))
    message = run(evaluation, "--predictions", str(file), "--data", str(records), "--out", str(out), expect=2)
    assert "1 answers for 12 samples" in message


def test_eval_asks_about_one_picture(records, tmp_path):
    image = records.parent / "0.png"
    output = run(evaluation, "--image", str(image), "--query", "the skin lesion", "--out", str(tmp_path))
    assert "box in original pixels" in output and (tmp_path / "overlay.png").exists()


# --------------------------------------------------------------------------------------------------------------- SFT


def test_nano_is_a_whole_checkpoint(tmp_path):
    """What --make-nano writes before training: transformers loads model and tokenizer, and it stays under 6 MB."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    for folder in (evaluation.NANO, tmp_path / "nano"):
        if folder != evaluation.NANO:
            train_sft.write_nano(folder, seed=0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("[12,34,100,120]", "größe\n\tΔ 左", " the  skin lesion"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("[12,34,100,120]")) == 15  # one token a digit
        peer = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        ours = load_policy(folder)
        assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert sum(f.stat().st_size for f in evaluation.NANO.iterdir()) < 6e6


def test_nano_starts_in_the_sparse_regime_and_says_so():
    report = json.loads((evaluation.NANO / "eval.json").read_text())
    assert report["exact"]["miou"] >= 0.65 and report["exact"]["n"] == 600
    assert report["coarse"]["miou"] <= 0.30 and report["coarse"]["acc@0.5"] < 0.05


def test_coarse_boxes_keep_the_place_and_lose_the_size():
    rng = np.random.Generator(np.random.PCG64(0))
    boxes = np.array([train_sft.coarse_box((60, 60, 80, 80), 1000, 1000, rng, 0.22, 0.8, 0.35) for _ in range(4000)])
    sizes = np.log((boxes[:, 2:] - boxes[:, :2]) / 20)
    assert sizes.mean() == pytest.approx(0.8, abs=0.03) and sizes.std() == pytest.approx(0.35, abs=0.03)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - 70
    assert np.abs(centres.mean(0)).max() < 0.5 and centres.std() == pytest.approx(4.4, abs=0.3)
    edge = np.array([train_sft.coarse_box((0, 0, 20, 100), 100, 100, rng, 0.22, 0.8, 0.35) for _ in range(1000)])
    assert edge.min() >= 0 and edge.max() <= 100 and (edge[:, 2:] > edge[:, :2]).all()


def test_sft_learns_and_is_deterministic(records, tmp_path):
    """Twenty steps on twelve pictures: the likelihood of their boxes rises; a second run gives the same bits."""
    flags = ("--data", str(records), "--val", str(records), "--steps", "20", "--batch-size", "6", "--lr", "1e-3")
    flags += ("--warmup", "5")
    runs = []
    for name in ("a", "b"):
        run(train_sft, *flags, "--out", str(tmp_path / name))
        runs.append(lines(tmp_path / name / "metrics.jsonl"))
    assert runs[0][-1]["loss"] < 0.6 * runs[0][0]["loss"]
    assert [row["loss"] for row in runs[0]] == [row["loss"] for row in runs[1]]
    report = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert report["final"]["miou"] > report["start"]["miou"]
