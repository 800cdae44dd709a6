"""train_grpo.py, train_sft.py, eval.py and checkpoint.py as a user runs them, on the nano policy and small pictures."""

import io
import json
import math
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import errors
import eval as evaluation
import train_grpo
import train_sft
from data import load, phantom_samples
from eval import Task, metrics
from loss import completion_mask
from model import Policy, collate
from scheduler import ScheduleConfig, make_schedule

ROOT = Path(__file__).parent.parent
METRICS = (
    "step tau hit_rate sigma margin iou_mean iou_q25 iou_q75 reward_mean zero_spread parse_failures truncated kl "
    "clip_low clip_high entropy grad_norm loss lr seconds seconds_rollout seconds_update tokens peak_mb"
).split()
TIMES = {"seconds", "seconds_rollout", "seconds_update", "peak_mb"}


def run(script, *flags: str, expect: int = 0) -> str:
    """A script's main() as its __main__ block calls it -> stdout and stderr. In this process, since importing torch
    takes longer than most runs here; `whole` below is the one run in a process of its own."""
    output, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [script.__name__ + ".py", *flags])
        try:
            errors.run(script.main)
        except SystemExit as end:
            code = end.code
    assert code == expect, output.getvalue()
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
    assert all(math.isfinite(row[key]) for row in rows for key in METRICS)
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
    start, end = Policy.from_folder(evaluation.NANO), Policy.from_folder(whole / "step-000006")
    moved = [(a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 1e-5 < max(moved) < 0.1


def test_resume_goes_on_as_if_never_stopped(whole, records, tmp_path):
    """Three steps, stop, resume to six: metrics equal line by line (times aside), weights bit by bit."""
    out = tmp_path / "run"
    grpo(out, records, "--steps", "3", *WHOLE)
    run(train_grpo, "--resume", "--out", str(out), "--steps", "6")
    assert without_times(lines(out / "metrics.jsonl")) == without_times(lines(whole / "metrics.jsonl"))
    assert lines(out / "samples.jsonl")[-1] == lines(whole / "samples.jsonl")[-1]
    for a, b in zip(
        Policy.from_folder(out / "step-000006").parameters(),
        Policy.from_folder(whole / "step-000006").parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_every_option_of_the_loop_runs_together(records, tmp_path):
    """KL to a reference, several inner steps, micro-batches, a format reward, evaluation in between."""
    out = tmp_path / "run"
    grpo(
        out, records, "--steps", "2", "--beta", "0.1", "--inner-steps", "3", "--lr", "1e-3", "--eval-every", "1",
        "--format-weight", "0.5", "--schedule", "medloc-soft", "--clip-high", "0.01", "--clip-low", "0.01",
    )  # fmt: skip
    rows = lines(out / "metrics.jsonl")
    assert rows[1]["kl"] > 0 and rows[0]["clip_low"] + rows[0]["clip_high"] > 0
    assert [h["step"] for h in json.loads((out / "eval.json").read_text())["history"]] == [1, 2]


def test_bfloat16_trains_float32_weights(records, tmp_path):
    """The arithmetic is bfloat16, a step of 1e-6 is not lost in it, and rollouts follow the updated weights."""
    out = tmp_path / "run"
    grpo(out, records, "--steps", "2", "--dtype", "bfloat16", "--lr", "1e-6", "--schedule", "raw")
    start, end = Policy.from_folder(evaluation.NANO), Policy.from_folder(out / "step-000002")
    moved = [(a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert 1e-7 < max(moved) < 1e-5
    assert all(row["kl"] == 0 and row["clip_high"] == 0 for row in lines(out / "metrics.jsonl"))


REFUSALS = {
    "unknown flag": (["--lerning-rate", "1"], "unrecognized arguments: --lerning-rate"),
    "unknown schedule": (["--schedule", "easy"], "invalid choice: 'easy'"),
    "impossible schedule": (["--tau-start", "0.9"], "--tau-start must be <= --tau-target 0.8, got 0.9"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "missing data": (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    "missing model": (["--model", "nowhere"], "nowhere"),
    "resume nothing": (["--resume"], "config.json does not exist"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_sentence_and_exit_code_2(name, records, tmp_path):
    flags, words = REFUSALS[name]
    output = grpo(tmp_path / "run", records, *flags, expect=2)
    assert words in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_used_folder_is_not_overwritten(whole, records):
    assert "is not empty" in grpo(whole, records, "--steps", "6", expect=2)
    assert "--resume goes on with --lr 0.0001" in run(
        train_grpo, "--resume", "--out", str(whole), "--lr", "0.1", expect=2
    )
    assert len(lines(whole / "metrics.jsonl")) == 6


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(Policy.from_folder(evaluation.NANO), evaluation.NANO, "answer")


def arguments(**changes) -> Namespace:
    args = train_grpo.parse_arguments([])
    vars(args).update({"group_size": 4, "micro_batch": 3, "max_tokens": 20} | changes)
    return args


def make_rollout(task: Task, args: Namespace, prompts: list, step: int = 0):
    slots = list(range(len(prompts)))
    noise = train_grpo.uniforms(0, step, slots, slots, args.group_size, args.max_tokens)
    schedule = make_schedule(args.schedule, ScheduleConfig(), 10)
    return train_grpo.rollout(task.policy, None, task, prompts, noise, schedule, args)


def test_micro_batches_do_not_change_the_gradient(task):
    """In float64 the gradient of an optimiser step is the same whole, in halves and prompt by prompt."""
    policy = Policy.from_folder(evaluation.NANO, dtype=torch.float64)
    policy.compute_dtype = torch.float64
    wide = Task(policy, evaluation.NANO, "answer")
    prompts = [wide.prompt(s) for s in phantom_samples(None, 3, 0, 4, size=84)]
    roll = make_rollout(wide, arguments(schedule="raw"), prompts)
    assert (roll.advantage != 0).any()
    gradients = []
    for size in (4, 2, 1):
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        train_grpo.update(policy, optimizer, roll, arguments(micro_batch=size, grad_clip=1e9))
        gradients.append([p.grad.clone() for p in policy.parameters()])
    for other in gradients[1:]:
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(gradients[0], other, strict=True))
    assert max(g.abs().max() for g in gradients[0]) > 1e-6


def test_the_on_policy_gradient_is_the_policy_gradient(task):
    """One inner step, no KL: the gradient of mean over sequences of mean over tokens of -A log p, written plainly."""
    policy = task.policy
    prompts = [task.prompt(s) for s in phantom_samples(None, 3, 0, 2, size=84)]
    args = arguments(schedule="raw", grad_clip=1e9)
    roll = make_rollout(task, args, prompts)
    train_grpo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), roll, args)
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    logp = policy.full_logprobs(collate(prompts), roll.ids, roll.lengths)
    mask = completion_mask(roll.lengths, roll.ids.shape[2])
    (-(roll.advantage[..., None] * logp * mask).sum(-1) / mask.sum(-1)).mean().backward()
    for a, p in zip(ours, policy.parameters(), strict=True):
        assert (a - p.grad).abs().max() < 1e-5
    policy.zero_grad()


def test_a_rollout_is_scored_in_original_pixels(task):
    """A 130-pixel picture is seen at 140: the answer is scaled back before it is compared."""
    sample = phantom_samples("dermoscopy", 3, 7, 1, size=130)[0]
    prompt = task.prompt(sample)
    assert prompt.scale == pytest.approx((130 / 140, 130 / 140))
    roll = make_rollout(task, arguments(), [prompt])
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
    policy = Policy.from_folder(evaluation.NANO)
    own = Task(policy, evaluation.NANO, "answer")
    args = arguments(schedule="raw")
    roll = make_rollout(own, args, [own.prompt(s) for s in phantom_samples(None, 3, 0, 2, size=84)])
    roll.advantage[0, 0] = math.nan
    before = [p.clone() for p in policy.parameters()]
    result = train_grpo.update(policy, torch.optim.AdamW(policy.parameters(), lr=1.0), roll, args)
    assert result["skipped"] == 1 and math.isnan(result["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


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
        ours = Policy.from_folder(folder)
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
