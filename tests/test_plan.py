"""plan.py: its sums against what autograd saves and what whole runs take, and that it decides as it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plan
import pytest
import torch
from PIL import Image
from plan import GB, Run
from test_train import arguments, make_rollout, records, run  # noqa: F401  (records is a fixture)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import layers
import lora
import model
import train_grpo
import weights
from config import parse_arguments
from data import load_samples, mrope_positions, phantom_samples
from errors import InputError
from eval import NANO, Task
from model import Policy, collate
from weights import read_config, save_policy

ROOT = Path(__file__).parent.parent
PUBLISHED = {  # hidden, layers, heads, kv heads, inner, vocabulary, tied, inner of the tower -> parameters
    "3B": ((2048, 36, 16, 2, 11008, 151936, True, 3420), 3_754_622_976),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False, 3420), 8_292_166_656),
    "32B": ((5120, 64, 40, 8, 27648, 152064, False, 3456), 33_452_718_336),
}


def config_of(
    size, layers, heads, kv_heads, inner, vocabulary, tied, tower_inner, tower=1280, depth=32, tower_heads=16
):
    quarter = size // heads // 8
    sections = [quarter, (4 * quarter - quarter) // 2, 4 * quarter - quarter - (4 * quarter - quarter) // 2]
    return dict(
        model_type="qwen2_5_vl", vocab_size=vocabulary, hidden_size=size, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-6,
        rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": sections}, tie_word_embeddings=tied,
        image_token_id=5, eos_token_id=2, max_position_embeddings=128000,
        vision_config=dict(
            depth=depth, hidden_size=tower, intermediate_size=tower_inner, num_heads=tower_heads, out_hidden_size=size,
            fullatt_block_indexes=[depth - 1], window_size=112, patch_size=14, spatial_merge_size=2,
        ),
    )  # fmt: skip


def run_of(config: dict, **changes) -> Run:
    values = dict(prompt=110, patches=320, batch=4, micro=2, group=4, tokens=24, width=4, evaluation=2) | changes
    return Run(read_config(config), **values)


LARGE = config_of(*PUBLISHED["3B"][0])
SMALL = config_of(128, 4, 4, 2, 384, 320, True, 160, tower=64, depth=2, tower_heads=4)
ODD = config_of(96, 3, 3, 3, 200, 500, False, 100, tower=96, depth=3, tower_heads=3)

# ------------------------------------------------------------------------------------------------- what autograd keeps


class Question:
    """Of 16 x 20 patches and 30 tokens of text."""

    def __init__(self, image_token: int, side: int):
        self.grid, self.patches, self.image_tokens = (1, 16, 20), torch.randn(320, side), None
        self.ids = torch.cat((torch.full((15,), 7), torch.full((80,), image_token), torch.full((15,), 8)))
        self.positions, self.next_position = mrope_positions(self.ids, [self.grid], image_token, 2)


def saved(policy: Policy, run: Run, monkeypatch) -> dict[str, int]:
    """Bytes of distinct storages, parameters aside, that the three parts of a forward pass leave for its backward."""
    batch = collate([Question(run.config.image_token_id, run.patch) for _ in range(run.micro)])
    ids = torch.randint(6, 300, (run.micro, run.group, run.tokens))
    tensors, checkpoint = {}, layers.checkpoint
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        tensors[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    def noting(function, *inputs, **options):
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                keep(tensor)
        return checkpoint(function, *inputs, **options)

    def so_far() -> int:
        return sum(t.untyped_storage().nbytes() for address, t in tensors.items() if address not in parameters)

    monkeypatch.setattr(layers, "checkpoint", noting)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = policy.visual(batch.patches.to(policy.compute_dtype), batch.grids, policy.checkpointing)
        vision = so_far()  # of a frozen tower: the inputs of checkpoint(), which lets go of what has no graph
        tensors.clear()
        prefix = policy.prefix(batch)
        for tensor in (*prefix.keys, *prefix.values):  # an update holds them as long as the prefix
            keep(tensor)
        both = so_far()
        policy.logprobs(prefix, ids, torch.full(ids.shape[:2], run.tokens), entropy=True)
    return {"vision": vision * tokens.requires_grad, "prompts": both - vision, "completions": so_far() - both}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("trains", ["all", "decoder", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_the_count_is_what_autograd_saves(config, dtype, trains, checkpointing, monkeypatch):
    """Part by part within 2 %; 5 % with adapters, in front of the first of which there is nothing to keep."""
    asked = run_of(
        config, width=dtype.itemsize, checkpointing=checkpointing, freeze_vision=trains == "decoder",
        lora_rank=8 * (trains == "adapters"),
    )  # fmt: skip
    policy = Policy(asked.config, (2,)).init_weights(0)
    policy.compute_dtype, policy.checkpointing = dtype, checkpointing
    policy.visual.requires_grad_(trains == "all")
    if trains == "adapters":
        lora.add(policy.to(dtype), 8, 8.0, 0)
    found, (counted, again) = saved(policy, asked, monkeypatch), plan.kept(asked)
    for part in found:
        assert counted[part] == pytest.approx(found[part], rel=0.05 if trains == "adapters" else 0.02), part
    deeper = replace(asked.config, num_hidden_layers=asked.config.num_hidden_layers + 1)
    plain, plain_deeper = (plan.kept(replace(asked, config=c, checkpointing=False))[0] for c in (asked.config, deeper))
    for part in ("prompts", "completions"):  # what is made again is what one more block would have kept
        assert again[part] == checkpointing * (plain_deeper[part] - plain[part])
    assert checkpointing == any(again.values())


# ---------------------------------------------------------------------------------------------------- updates and runs


class Live(TorchDispatchMode):
    """Peak bytes of the storages that operators make, while they are alive; `known` ones do not count."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known, self.peak, self.now = {t.untyped_storage().data_ptr() for t in known}, 0, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                _, before = self.storages.get(storage._cdata, (None, 0))
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.now += storage.nbytes() - before
        if self.now > self.peak:  # or so it seems: some have died meanwhile
            self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
            self.now = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.now)
        return made


UPDATES = {  # side of the pictures, group, tokens; then what differs from a run of two micro-batches of one prompt
    "gradients wait for the prompts": (84, 2, 8, {}),
    "one micro-batch": (84, 2, 8, {"micro": 2}),
    "pictures": (252, 2, 8, {"micro": 2, "checkpointing": True}),
    "completions": (84, 8, 32, {"checkpointing": True, "freeze_vision": True}),
    "adapters": (84, 8, 32, {"lora_rank": 8}),
    "bfloat16": (84, 8, 32, {"width": 2}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_the_peak_of_an_update_is_what_its_tensors_take(name, monkeypatch):
    """A step of two prompts, every tensor watched, within 15 %."""
    side, group, tokens, changes = UPDATES[name]
    config = config_of(256, 4, 4, 2, 768, 320, True, 384, tower=128, depth=3, tower_heads=4)
    asked = run_of(config, **dict(batch=2, micro=1, group=group, evaluation=0) | changes)
    policy = Policy(asked.config, (0,)).init_weights(0)
    policy.compute_dtype = {4: torch.float32, 2: torch.bfloat16}[asked.width]
    policy.checkpointing = asked.checkpointing
    policy.visual.requires_grad_(not asked.freeze_vision)
    if asked.lora_rank:
        lora.add(policy, asked.lora_rank, 8.0, 0)
    args = arguments(group_size=group, max_tokens=tokens, micro_batch=asked.micro)
    task, samples = Task(policy, NANO, "answer"), phantom_samples("dermoscopy", 3, 0, 2, size=side)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)

    def unseen(*sizes):  # a subclass of Tensor that cannot be made under a mode
        with _disable_current_modes():
            return causal_lower_right(*sizes)

    monkeypatch.setattr(model, "causal_lower_right", unseen)
    with Live(list(policy.parameters())) as live:
        roll = make_rollout(task, args, samples)  # which keeps the prefix for the update, or takes less
        roll.advantage.fill_(1.0)
        train_grpo.update(policy, optimizer, roll, args)
    assert roll.ids.shape == (2, group, tokens)
    asked = replace(asked, prompt=len(roll.prompts[0].ids), patches=len(roll.prompts[0].patches), tokens=tokens)
    sums = {moment: plan.total(parts) for moment, parts in plan.updating(asked).items()}
    assert max(sums.values()) == pytest.approx(live.peak, rel=0.15), sums


def folder_with(folder: Path, config: dict, weights: bool = True) -> Path:
    """A checkpoint of random weights, with the nano policy's tokenizer and special tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(NANO / name, folder / name)
    policy = Policy(read_config(config), (2,)).init_weights(0)
    policy.raw_config = config
    save_policy(policy, folder, torch.bfloat16)
    return folder


def pictures(folder: Path, side: int, count: int = 4) -> Path:
    with open(folder / "train.jsonl", "w") as file:
        for i in range(count):
            Image.new("RGB", (side, side), (i, 80, 200)).save(folder / f"{i}.png")
            print(json.dumps({"image": f"{i}.png", "query": "the skin lesion", "bbox": [9, 9, 50, 60]}), file=file)
    return folder / "train.jsonl"


TOWER = dict(tower=256, depth=3, tower_heads=4)
WHOLE = {  # three sizes in three situations: (config, side of the pictures, flags)
    "7 M, pictures of 448, KL": (
        config_of(256, 4, 4, 2, 768, 320, True, 768, **TOWER),
        448,
        "--batch-size 2 --micro-batch 1 --max-tokens 48 --beta 0.04 --no-checkpointing",
    ),
    "10 M, checkpointing, long answers": (
        config_of(384, 4, 6, 2, 1024, 320, True, 512, **TOWER),
        280,
        "--batch-size 2 --micro-batch 2 --max-tokens 96 --beta 0 --checkpointing",
    ),
    "17 M, frozen tower, large vocabulary": (
        config_of(512, 4, 8, 2, 1024, 4000, False, 768, **TOWER),
        140,
        "--batch-size 4 --micro-batch 2 --max-tokens 32 --beta 0 --checkpointing --freeze-vision",
    ),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "size, name", [*((1, name) for name in WHOLE), pytest.param(2, list(WHOLE)[0], marks=pytest.mark.slow)]
)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(size, name, tmp_path):
    """On one rank, and of the first of two that share the weights."""
    config, side, flags = WHOLE[name]
    for part in ("model", "data"):
        (tmp_path / part).mkdir()
    data = pictures(tmp_path / "data", side)
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone"]
    command = [sys.executable, *(torchrun if size > 1 else [])]
    command += [str(ROOT / "tests" / "measured_peak.py"), str(tmp_path), "--recipe", "nano"]
    command += ["--model", str(folder_with(tmp_path / "model", config)), "--data", str(data), "--val", str(data)]
    command += ["--max-pixels", "200704", *flags.split(), *["--shard"][: size - 1]]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    always = sum(seen["always"].values())
    measured, estimated = seen["measured"], seen["estimated"]
    print(f"\n{name}, {size} ranks: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB", end=" ")
    print(f"({estimated / measured:.2f}), of them {always / 1e6:.0f} always there")
    assert measured > 1.2 * always  # there is something to estimate
    assert abs(estimated / measured - 1) < 0.2


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_planned_from_config_json_alone(name, tmp_path, capsys):
    """No weights, no tokenizer, no data, no GPU, and no memory: 32 B parameters of fp32 would be 134 GB."""
    shape, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(*shape)))
    assert plan.Weights.of(read_config(config_of(*shape))).all == parameters
    out = tmp_path / "out"
    flags = ["--model", str(tmp_path), "--out", str(out), "--device", "cuda", "--max-pixels", "401408"]
    text = run(train_grpo, "--estimate", *flags, "--memory", "24GB")
    assert "ESTIMATED" in text and f"{parameters / 1e6:,.1f} M parameters trained" in text
    assert "640 tokens a prompt: 512 of its picture (the largest that --max-pixels 401408 lets in), 128 of text" in text
    assert not out.exists()
    always = re.search(r"always there +([\d.]+)", text)[1]  # fp32 weights and two moments, bf16 copy and reference
    assert always == plan.gigabytes(16 * parameters)
    assert "it does not fit" in text
    if name == "32B":
        assert text.count("no flags make it fit") == 3  # --memory, a 24 GB and an 80 GB card
    else:
        assert "24 GB: " in text and "--lora-rank 64" in text.split("24 GB: ")[-1]


@pytest.mark.parametrize("script, card", [("medloc_3b_1x24.sh", 24), ("medloc_3b_1x80.sh", 80)])
def test_the_headers_in_runs_say_what_the_planner_says(script, card, tmp_path):
    """Both for the command itself and for the one that the header names."""
    text = (ROOT / "runs" / script).read_text()
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    header, _, command = text.partition("set -euo pipefail")
    header = header.replace("\\\n#", " ")
    named = re.search(r"python train_grpo.py (--estimate .*)", header)[1]
    own = [
        flag for flag in re.findall(r" (--[a-z-]+(?:=\S+)?)", command) if not re.match("--(model|data|val|out)", flag)
    ]
    own += ["--estimate", "--device=cuda", f"--memory={card}GB", "--model=FOLDER"]
    for flags in (named.split(), own):
        told = run(train_grpo, *(flag.replace("FOLDER", str(tmp_path)) for flag in flags))
        always, peak = (re.search(rf"  {name} +([\d.]+) ", told)[1] for name in ("always there", "peak"))
        assert f"{always} GB are always there, the peak is {peak} GB" in header
        assert "it fits" in told and "--micro-batch 8 --checkpointing\n" in told
        assert f"{card} GB: --micro-batch 8 --checkpointing fits" in told


MORE = ("micro", "group", "tokens", "prompt", "patches")


@pytest.mark.parametrize(
    "changes", [{}, {"checkpointing": True}, {"lora_rank": 8, "width": 2}, {"freeze_vision": True}, {"shards": 4}]
)
@pytest.mark.parametrize("name", MORE)
def test_more_of_anything_takes_more(name, changes):
    """In every moment at least as much, in some moment more, and never less at the peak."""
    before = None
    for value in (64, 65, 80, 128, 1000):
        now = run_of(LARGE, batch=5000, reference=True, **{"width": 4} | changes | {name: value})
        sums = {moment: plan.total(parts) for moment, parts in plan.moments(now).items()}
        if before:
            assert all(sums[moment] >= size for moment, size in before[0].items())
            assert sum(sums.values()) > sum(before[0].values()) and plan.peak(now) >= before[1]
        before = sums, plan.peak(now)


def test_less_training_and_checkpointing_take_less():
    full = run_of(LARGE, width=2, device="cuda", reference=True, tokens=512, prompt=640, patches=2048, group=8)
    ladder = [full, replace(full, reference=False), replace(full, freeze_vision=True, reference=False)]
    ladder += [replace(full, freeze_vision=True, reference=False, checkpointing=True)]
    ladder += [replace(full, lora_rank=64, checkpointing=True)]
    assert sorted(map(plan.peak, ladder), reverse=True) == list(map(plan.peak, ladder))
    # With one micro-batch no gradient is there while activations are.
    gradients = plan.moments(full)["update, completions"]["gradients"]
    assert gradients == 4 * PUBLISHED["3B"][1]
    assert "gradients" not in plan.moments(replace(full, micro=full.batch))["update, completions"]


# ------------------------------------------------------------------------------------------------------------- choices


def test_the_choice_is_the_first_that_fits():
    """Against all of them: fewest passes, then no checkpointing; the least of all where none fits."""
    asked = run_of(LARGE, batch=6, micro=6, tokens=256, width=2, device="cuda", lora_rank=64, evaluation=0)
    sizes = [6, 3, 2, 1]  # 4 prompts a pass would be two passes as well
    order = [replace(asked, micro=size, checkpointing=way) for size in sizes for way in (False, True)]
    peaks = [plan.peak(each) / plan.FILL["cuda"] for each in order]
    assert len(set(peaks)) == len(peaks)
    for memory in sorted(peaks) + [min(peaks) - 1]:
        fitting = [each for each, size in zip(order, peaks, strict=True) if size <= memory + 1]
        expected = fitting[0] if fitting else min(order, key=plan.peak)
        assert plan.choose(asked, memory + 1) == expected
    assert plan.choose(asked, 0, micro=3) == min((each for each in order if each.micro == 3), key=plan.peak)
    assert plan.choose(asked, 10**15, checkpointing=True) == order[1]


def test_an_evaluation_that_does_not_fit_answers_fewer_at_a_time():
    asked = run_of(LARGE, width=2, device="cuda", lora_rank=64, prompt=4200, patches=16384, evaluation=50)
    chosen = plan.choose(asked, 24 * GB)
    assert 1 < chosen.evaluation < 50 and plan.fits(chosen, 24 * GB)
    assert not plan.fits(replace(chosen, evaluation=chosen.evaluation + 1), 24 * GB)
    assert plan.choose(asked, 80 * GB).evaluation == 50
    assert plan.choose(replace(asked, evaluation=0), GB).evaluation == 0


def estimate(folder: Path, *flags: str) -> str:
    return run(train_grpo, "--estimate", "--device", "cuda", "--model", str(folder), *flags)


@pytest.mark.parametrize("card, pixels", [(18, 401408), (24, 12845056), (60, 401408), (80, 401408), (80, 12845056)])
def test_the_remedy_fits_and_is_no_larger_than_it_must_be(card, pixels, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    asked = ["--max-pixels", str(pixels), "--memory", f"{card}GB", "--micro-batch", "2", "--no-checkpointing"]
    flags = re.search(r"it does not fit; (.*) would fit, peak", estimate(tmp_path, *asked))[1].split()
    assert "it fits" in estimate(tmp_path, *asked, *flags)
    settings, choices = flags[: flags.index("--micro-batch")], flags[flags.index("--micro-batch") :]
    for i, flag in enumerate(settings):  # without any one of them it does not fit
        if flag.startswith("--"):
            rest = settings[:i] + settings[i + 1 + (flag != "--freeze-vision") :]
            assert "it does not fit" in estimate(tmp_path, *asked[:4], *rest), flag
    assert settings or choices != asked[4:]


def small(out: Path, data: Path, *flags: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--batch-size", "4", "--group-size", "4", "--steps", "1", *flags]


def test_a_run_plans_by_what_is_free_and_saves_what_it_chose(records, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    class Noting(Policy):
        def prefix(self, batch):
            seen.append((len(batch.lengths), self.checkpointing))
            return super().prefix(batch)

    monkeypatch.setattr(weights, "Policy", Noting)
    monkeypatch.setattr(plan, "free_memory", lambda device: GB // 5)
    text = run(train_grpo, *small(tmp_path / "a", records))
    assert "plan: --micro-batch 4 --no-checkpointing, estimated peak 0." in text and set(seen) == {(4, False)}
    saved_flags = json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]
    assert (saved_flags["micro_batch"], saved_flags["checkpointing"], saved_flags["memory"]) == (4, False, None)
    seen.clear()
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)  # then a resumed run stays as it was, and says so
    text = run(train_grpo, "--resume", "--out", str(tmp_path / "a"), "--steps", "2")
    assert "this may run out of memory: estimated peak 0." in text and set(seen) == {(4, False)}
    seen.clear()
    text = run(train_grpo, "--resume", "--out", str(tmp_path / "a"), "--steps", "3", "--micro-batch", "3")
    assert {size for size, _ in seen} == {3, 1}
    seen.clear()
    text = run(train_grpo, *small(tmp_path / "b", records))
    assert "this may run out of memory" in text and "no flags make it fit" in text
    assert {way for _, way in seen} == {True}


def test_given_memory_is_held_and_what_is_too_little_is_refused(records, tmp_path):  # noqa: F811
    text = run(train_grpo, *small(tmp_path / "a", records, "--memory", "0.08GB"))
    chosen = json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]
    assert f"plan: --micro-batch {chosen['micro_batch']} " in text and "(60% of 0.080 GB)" in text
    assert chosen["memory"] == "0.08GB" and (chosen["micro_batch"] < 4 or chosen["checkpointing"])
    flags = ("--memory", "0.08GB", "--micro-batch", "4", "--no-checkpointing")
    text = run(train_grpo, *small(tmp_path / "b", records, *flags), expect=2)
    assert text.startswith("error: --memory 0.08GB: estimated peak 0.") and text.count("\n") == 1
    assert "would fit, peak 0.0" in text and not (tmp_path / "b").exists()


def test_the_quickstart_is_the_same_on_every_machine_that_has_a_gigabyte():
    for memory in (GB, 10**15):
        args = parse_arguments([])
        args.prompt, args.dtype, args.memory = "answer", "float32", f"{memory // GB}GB"
        chosen, words = plan.settle(args, NANO, load_samples("phantoms", 0, "train"))
        assert (args.micro_batch, args.checkpointing, chosen.evaluation) == (16, False, 50)
    assert "38 tokens a prompt: 25 of its picture (the largest of --data), 13 of text" in words


# --------------------------------------------------------------------------------------------------------------- ranks


def test_shards_are_a_part_of_everything_and_all_weights_for_a_rollout(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    parameters, found, asked = PUBLISHED["3B"][1], [], ("--memory=80GB", "--max-pixels=401408", "--checkpointing")
    for size in (2, 4, 8):
        text = estimate(tmp_path, *asked, "--shard", f"--ranks={size}")
        assert f"a shard of the weights on each of {size} ranks" in text and "copy for the rollout" not in text
        always = re.search(r"always there +([\d.]+)", text)[1]  # fp32 weights and two moments, bf16 reference
        assert always == plan.gigabytes(14 * parameters / size)
        assert f"gathered weights {plan.gigabytes(2 * parameters)}" in re.search("rollout, completions.*", text)[0]
        found.append(float(re.search(r"  peak +([\d.]+)", text)[1]))
    assert found == sorted(found, reverse=True)
    copies = estimate(tmp_path, *asked, "--ranks=8")
    assert "a copy of the weights on each of 8 ranks" in copies
    assert float(re.search(r"  peak +([\d.]+)", copies)[1]) > found[0]


def test_no_shard_is_told_to_take_adapters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    text = estimate(tmp_path, "--memory=24GB", "--shard", "--ranks=2")
    assert "no flags make it fit" in text and "more ranks" in text and "lora" not in text


def test_ranks_make_do_with_the_least_memory_of_all(monkeypatch):
    """And on a CPU, all of one machine share what it has."""
    samples = load_samples("phantoms", 0, "train")

    def settled(here: int, elsewhere: int) -> tuple:
        monkeypatch.setattr(plan, "free_memory", lambda device: here)
        monkeypatch.setattr(plan.ranks, "everyone", lambda work: [work(), elsewhere])
        args = parse_arguments([])
        args.prompt, args.dtype = "answer", "float32"
        _, words = plan.settle(args, NANO, samples)
        return args.micro_batch, args.checkpointing, words.split(";")[0]

    least = settled(GB // 8, GB // 8)
    assert settled(GB, GB)[:2] == (16, False) != least[:2]
    assert settled(GB, GB // 8) == settled(GB // 8, GB) == least
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert settled(GB // 2, GB) == least


def test_no_gradient_is_left_when_a_rollout_begins(records, tmp_path, monkeypatch):  # noqa: F811
    rollout, seen = train_grpo.rollout, []

    def noting(policy, *rest):
        seen.append(any(p.grad is not None for p in policy.parameters()))
        return rollout(policy, *rest)

    monkeypatch.setattr(train_grpo, "rollout", noting)
    run(train_grpo, *small(tmp_path / "a", records, "--steps", "2", "--schedule", "raw"))
    assert seen == [False, False]


# ------------------------------------------------------------------------------------------------------ what it reads


def test_the_longest_prompt_is_the_datas(records, tmp_path):  # noqa: F811
    """Exact where the largest picture has the longest question, else as if it had; unusable records do not count."""
    args = parse_arguments(["--data", str(records)])
    args.prompt = "answer"
    task, samples = Task(None, NANO, "answer"), load_samples(str(records), 0, "train")
    prompts = [task.prompt(sample) for sample in samples]
    longest, patches = max(len(p.ids) for p in prompts), max(len(p.patches) for p in prompts)
    assert plan.longest_prompt(args, NANO, samples)[:2] == (longest, patches)
    large, sliver = replace(samples[0], size=(250, 250), query="?"), replace(samples[1], size=(30, 9000))
    special = replace(samples[2], query="<|image_pad|>" * 100)
    some = [*samples, large, sliver, special]
    assert plan.longest_prompt(args, NANO, some)[:2] == (longest - patches // 4 + 81, 18 * 18)
    args.max_pixels = 140 * 140
    assert plan.longest_prompt(args, NANO, some)[:2] == (longest - patches // 4 + 25, 100)
    assert "(the largest that --max-pixels 19600 lets in)" in plan.longest_prompt(args, NANO, [])[2]


@pytest.mark.parametrize("text", ["24", "24 GB", "24gb", "0GB", "-1GB", "nanGB", "1e3GB", "GB", ""])
def test_memory_that_is_none_is_refused(text, capsys):
    with pytest.raises(InputError, match="--memory wants a number of GB such as 24GB, not"):
        plan.read_memory(text)
    with pytest.raises(SystemExit) as end:
        parse_arguments([f"--memory={text}"])
    assert end.value.code == 2 and "--memory wants a number of GB" in capsys.readouterr().err
    assert plan.read_memory("24GB") == 24 * GB and plan.read_memory("0.5GB") == GB // 2


def test_what_is_free_minds_the_limit_of_a_container(tmp_path):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert plan.free_memory("cpu", tmp_path) == whole  # neither of the files is there
    assert 0 < plan.free_memory("cpu") <= whole
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    assert plan.free_memory("cpu", tmp_path) == 700 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    for limit, free in (("max", 700 * 1024), ("5000", 4000), ("900", 0)):
        (group / "memory.max").write_text(limit + "\n")
        assert plan.free_memory("cpu", tmp_path) == free


def group(folder: Path, limit: str, used: str | None, cached: str = "", version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, used, cached), strict=True):
        if text is not None:
            (folder / name).write_text(text + "\n")


V1, OWN, NONE = "5:cpu,cpuacct:/\n4:memory:/job/task\n0::/\n", "0::/job/task\n", "9223372036854771712"
NESTED = {  # /proc/self/cgroup; folder below sys/fs/cgroup -> limit, use, memory.stat; version; what is left
    "version 1, its own": (V1, {"memory/job/task": ("900", "100")}, 1, 800),
    "version 1, around it": (V1, {"memory/job/task": (NONE, "10"), "memory/job": ("500", "100")}, 1, 400),
    "version 1, of a container": (V1, {"memory": ("700", "100")}, 1, 600),
    "version 1, without a limit": (V1, {"memory/job/task": (NONE, "10"), "memory": (NONE, "10")}, 1, None),
    "version 1, cache": (V1, {"memory/job": ("500", "400", "inactive_file 7\ntotal_inactive_file 300")}, 1, 400),
    "version 1, of several controllers": ("7:cpu,memory:/a\n", {"memory/a": ("50", "20")}, 1, 30),
    "version 1, another's": (V1, {"memory/job/other": ("5", "4")}, 1, None),
    "version 2, its own": (OWN, {"job/task": ("900", "100"), "job": ("max", "100")}, 2, 800),
    "version 2, around it": (OWN, {"job/task": ("900", "100"), "job": ("300", "120"), "": ("max", "9")}, 2, 180),
    "version 2, of a container": ("0::/../../job\n", {"": ("300", "120")}, 2, 180),
    "version 2, cache": (OWN, {"job": ("500", "400", "file 350\ninactive_file 300\n")}, 2, 400),
    "version 2, full": (OWN, {"job": ("500", "600")}, 2, 0),
    "version 2, use not told": (OWN, {"job": ("500", None)}, 2, None),
    "version 2, odd": (OWN, {"job": ("5e2", "0"), "": ("", "")}, 2, None),
}


@pytest.mark.parametrize("name", NESTED)
def test_what_is_free_minds_every_group_around_the_process(name, tmp_path):
    own, groups, version, left = NESTED[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(own)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable:   700 kB\n")
    for folder, values in groups.items():
        group(tmp_path / "sys" / "fs" / "cgroup" / folder, *values, version=version)
    assert plan.free_memory("cpu", tmp_path) == (700 * 1024 if left is None else left)


def test_a_gpu_that_is_not_here_needs_a_number(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    if torch.cuda.is_available():
        pytest.skip("there is one")
    text = run(train_grpo, "--estimate", "--device", "cuda", "--model", str(tmp_path), expect=2)
    assert "there is no GPU here to ask; say what it has, such as --memory 24GB" in text
    assert "--device cuda is not to be had" in run(train_grpo, "--device", "cuda", expect=2)
