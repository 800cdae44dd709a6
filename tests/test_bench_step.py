"""bench/step.py: the programs do the same work, the plain loop's loss and gradients are ours, the figures are right."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as peer

import errors
import rollout
import train_grpo
from bench import step, step_programs
from errors import InputError
from eval import Original
from tasks import TASKS
from weights import save_policy

TINY = step.CASES["tiny"]
ROWS = TINY.prompts * step.GROUP
TRL_KEYS = [f"{what}_{which}" for what in ("ratio", "ratio_cpu", "memory") for which in ("trl", "trl_checkpointing")]
TRL = "MEDLOC_TRL_PYTHON"  # names an interpreter that has TRL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    step.prepare(folder, TINY, steps=1, seed=0, threads=torch.get_num_threads())
    return folder


# ------------------------------------------------------------------------------------------------------ the plain loop


@pytest.fixture
def wide_peer(monkeypatch):
    """transformers' norms and its vision tower's rotation go down to float32; in float64 the rest of it stays there."""

    def rotated(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return tuple(x * cos + peer.rotate_half(x) * sin for x in (q, k))

    def norm(self, x):
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)

    monkeypatch.setattr(peer, "apply_rotary_pos_emb_vision", rotated)
    monkeypatch.setattr(peer.Qwen2_5_VLRMSNorm, "forward", norm)


def published(name: str) -> str:
    """transformers 5 has other names in memory than on disk."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def test_loss_and_gradients_of_the_plain_loop_are_ours_in_float64(folder, wide_peer, tmp_path, monkeypatch):
    """Same rollout; train_grpo's update() against the bench's plain_logprobs and plain_loss, to 1e-8."""
    ours, noise = step_programs.Ours(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for policy in (ours.policy, ours.reference):
            policy.double().compute_dtype = torch.float64
        for p in ours.reference.parameters():  # elsewhere than the policy: the KL has a gradient
            p += 0.02 * torch.randn(p.shape, dtype=p.dtype, generator=noise)
    save_policy(ours.reference, tmp_path)
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    theirs, their_reference = (load(place, dtype=torch.float64).eval() for place in (folder / "model", tmp_path))

    prompts, uniforms = ours.stream.draw(0, TINY.prompts)
    roll, _ = rollout.sample(None, ours.actor, ours.stream.processor, prompts, uniforms, ours.grpo)
    # Its ids may hold an image token, for which whole rows want an image.
    ids = torch.randint(10, 300, roll.ids.shape, generator=noise)
    advantage = torch.randn(roll.lengths.shape, dtype=torch.float64, generator=noise)
    roll = replace(roll, ids=ids, advantage=advantage)
    monkeypatch.setattr(train_grpo, "GRAD_CLIP", 1e9)  # clipping would scale the gradients that are compared
    found = {}
    keep = lambda: found.update({name: p.grad.clone() for name, p in ours.policy.named_parameters()})  # noqa: E731
    monkeypatch.setattr(ours.optimizer, "step", keep)
    metrics = train_grpo.update(ours.policy, ours.reference, ours.optimizer, roll, None, ours.grpo)

    repeated = [prompt for prompt in roll.prompts for _ in range(step.GROUP)]
    assert len({len(prompt.ids) for prompt in repeated}) > 1  # or nothing is padded
    rows = step_programs.plain_rows(repeated, theirs.config.image_token_id)
    with torch.no_grad():
        logp_ref = step_programs.plain_logprobs(their_reference, rows, ids.flatten(0, 1))
    logp = step_programs.plain_logprobs(theirs, rows, ids.flatten(0, 1))
    loss = step_programs.plain_loss(logp, logp_ref, advantage.flatten())
    loss.backward()

    assert (roll.logp_ref.flatten(0, 1) - logp_ref).abs().max() < 1e-8
    assert (logp - logp_ref).abs().max() > 1e-2 and metrics["kl"] > 1e-4
    assert abs(metrics["loss"] - loss.item()) < 1e-8
    gradients = {published(name): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-6, name
        assert (gradient - gradients[name]).abs().max() < 1e-8, name


def test_an_end_that_would_be_drawn_ends_no_answer(folder, monkeypatch):
    """Ours: uniform logits and luck that always picks EOS. Plain: logits that leave nothing but EOS and images."""
    ours, eos = step_programs.Ours(folder), 2
    ours.policy.model.norm.weight.data.zero_()
    picked = (eos + 0.5) / ours.policy.config.vocab_size
    luck = torch.full((TINY.prompts, step.GROUP, TINY.tokens), picked)
    monkeypatch.setattr("runtime.stream.uniforms", lambda *_: luck)
    assert ours.generate()["lengths"] == [TINY.tokens] * ROWS
    ours.policy.eos_ids = (eos,)  # what the checkpoint says, and what would happen then
    assert ours.generate()["lengths"] == [1] * ROWS

    plain = step_programs.Plain(folder)
    config = plain.policy.config
    never = torch.tensor([*plain.policy.generation_config.eos_token_id, config.image_token_id])
    plain.policy.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, never, 1e4))
    ids = plain.sample(step_programs.plain_rows(plain.draw(), config.image_token_id))
    assert ids.shape == (ROWS, TINY.tokens) and not torch.isin(ids, never).any()


def test_the_box_reward_is_that_of_ours():
    chance = random.Random(0)
    for _ in range(300):
        x, y = chance.randint(0, 60), chance.randint(0, 60)
        boxes = [[x + chance.randint(0, 9), y + chance.randint(0, 9), x + chance.randint(20, 40), y + 30] for _ in "ab"]
        text = f"a box: [{','.join(map(str, boxes[0]))}]"
        iou = TASKS["box"].score([text], [Original(None, boxes[1])]).u.item()
        assert step_programs.box_hit(text, boxes[1]) == float(iou >= 0.5)
    assert [step_programs.box_hit(t, [0, 0, 9, 9]) for t in ("", "1 2 3", "[9,9,0,0]", "[0,0,9,9]")] == [0, 0, 0, 1]
    assert [step_programs.letters(t) for t in ("", "ab1?", "12")] == [0, 0.5, 0]


# -------------------------------------------------------------------------------------------------------- same work


def answer(**changes) -> dict:
    done = {"prompts": [[1, 5, 7], [1, 5, 5, 7]], "pictures": [0.5, 1.5], "lengths": [TINY.tokens] * ROWS}
    return done | {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 100.0} | changes


OTHER_WORK = [
    ({"lengths": [TINY.tokens] * (ROWS - 1) + [3]}, "of 3 to 4; its times compare"),
    ({"lengths": [TINY.tokens] * (ROWS - 1)}, "16 completions of 4 tokens were asked for, it made 15"),
    ({"prompts": [[1, 5, 7], [1, 5, 6, 7]]}, "other token ids than ours"),
    ({"prompts": [[1, 5, 5, 7], [1, 5, 7]]}, "other token ids than ours"),
    ({"pictures": [0.5, 1.501]}, "other pixels than ours"),
]


def test_other_work_is_refused():
    same = {"ours": answer(), "plain": answer(pictures=[0.500001, 1.5])}
    step.check_same_work(TINY, same)
    for changes, sentence in OTHER_WORK:
        with pytest.raises(InputError, match=sentence):
            step.check_same_work(TINY, same | {"trl": answer(**changes)})
    short = answer(lengths=[3] * ROWS)  # of all, ours too
    with pytest.raises(InputError, match="^ours: 16 completions"):
        step.check_same_work(TINY, {"ours": short, "plain": short})


def test_what_trl_was_given_is_read_from_its_rows():
    """Left-padded prompts, right-padded completions, and one picture an answer."""
    case = SimpleNamespace(group=2, tokens=2)
    ids = torch.tensor([[0, 1, 5, 8, 9], [0, 1, 5, 8, 8], [1, 5, 6, 9, 0], [1, 5, 6, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    grid, pixels = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 2], [1, 1, 2]]), torch.tensor([1, 1, 2, 4, 2, 4.0])
    seen = {"input_ids": ids, "attention_mask": mask, "image_grid_thw": grid, "pixel_values": pixels[:, None]}
    expected = dict(prompts=[[1, 5], [1, 5, 6]], pictures=[1.0, 10.0], lengths=[2, 2, 1, 2])
    assert step_programs.trl_work(seen, case) == expected


# ------------------------------------------------------------------------------------------------------------ figures


def found(with_trl: bool) -> dict:
    names = list(step.PROGRAMS) if with_trl else ["ours", "plain"]
    about = dict.fromkeys(names, {"versions": {"torch": "2.13.0"}, "resident_mib": 40.0})
    seconds = {"ours": [1, 2, 9], "plain": [6, 7, 50], "trl": [8, 8, 8], "trl-checkpointing": [9, 11, 10]}
    peaks = {"ours": 100, "plain": 160, "trl": 240, "trl-checkpointing": 190}
    steps = {
        name: [answer(seconds=s, cpu_seconds=s * s, peak_mib=peaks[name] - i) for i, s in enumerate(seconds[name])]
        for name in names
    }
    calls = {"ours": [2, 1, 3], "plain": [8, 5, 4]}
    calls = {name: [{"seconds": s, "cpu_seconds": s + 1} for s in times] for name, times in calls.items()}
    splits = [dict.fromkeys(step_programs.PARTS, 0.25) for _ in range(3)]
    return step.results("tiny", about, steps, calls, splits)


def test_ratios_are_of_medians_and_memory_is_beyond_the_loaded_model():
    figures = found(with_trl=True)
    assert (figures["ratio_plain"], figures["ratio_trl"], figures["ratio_trl_checkpointing"]) == (3.5, 4, 5)  # theirs
    assert (figures["memory_plain"], figures["memory_trl"], figures["memory_trl_checkpointing"]) == (0.5, 0.3, 0.4)
    assert (figures["ratio_cpu_plain"], figures["ratio_cpu_trl"]) == (49 / 4, 16)
    assert (figures["ratio_generate"], figures["ratio_cpu_generate"]) == (0.4, 0.5)  # ours over theirs
    assert figures["prompt_tokens"] == [3, 4]
    ours = figures["programs"]["ours"]
    assert ours["tokens_per_second"] == ROWS * TINY.tokens / 2 and ours["peak_mib"] == 60
    assert figures["split"] == dict.fromkeys(step_programs.PARTS, 0.25)
    table = step.table(figures)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[:6]]
    cells = ["7.00 (6.00 - 50.00)", "3.50", "49.00 (12.25)", "9", "120 (0.50)", "torch 2.13.0"]
    assert rows[3] == ["transformers by hand", *cells]
    assert rows[4][:4] == ["TRL, gradient checkpointing off", "8.00 (8.00 - 8.00)", "4.00", "64.00 (16.00)"]
    assert "vision 0.250 s (12%)" in table and "0.40 of transformers' time, 0.50 of its CPU time" in table
    json.dumps(figures)
    without = found(with_trl=False)
    assert without["ratio_plain"] == 3.5 and without["memory_plain"] == 0.5
    assert [without[key] for key in TRL_KEYS] == [None] * 6
    assert step.table(without).count("not run: --trl-python names no interpreter") == 2


def test_time_goes_to_the_innermost_part():
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    clock = step_programs.Clock(lambda: now[0])
    vision = clock.of("vision", spend)
    prefix = clock.of("prefix", lambda: (spend(2), vision(4), spend(8)))
    fails = clock.of("decode", lambda: (spend(16), 1 / 0))
    clock.start()
    spend(1)
    prefix()
    with pytest.raises(ZeroDivisionError):
        fails()
    spend(32)
    clock.charge()
    assert clock.seconds == {"other": 33, "prefix": 10, "vision": 4, "decode": 16}


def test_the_split_is_of_a_whole_step_and_leaves_nothing_behind(folder, monkeypatch):
    ours, parts, of = step_programs.Ours(folder), Counter(), step_programs.Clock.of

    def counted(clock, part, function):
        def noted(*inputs, **options):
            parts[part] += 1
            return function(*inputs, **options)

        return of(clock, part, noted)

    monkeypatch.setattr(step_programs.Clock, "of", counted)
    before = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    split = ours.split()
    assert parts == dict(vision=2, prefix=1, decode=1, reference=2, forward=1, backward=1, optimiser=4)
    assert tuple(split) == step_programs.PARTS and min(split.values()) > 0 and ours.steps == 1
    assert (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_) == before
    assert not {"prefix", "logprobs", "generate"} & vars(ours.policy).keys()


# ------------------------------------------------------------------------------------------------------- whole runs


def run_bench(tmp_path, *flags: str) -> tuple[dict, str]:
    file = tmp_path / "step.json"
    command = [sys.executable, "-m", "bench.step", "--case", "tiny", "--steps", "1", "--json", str(file), *flags]
    done = subprocess.run(command, cwd=step.ROOT, capture_output=True, text=True, check=True)
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    figures, printed = run_bench(tmp_path)
    for name in ("ours", "plain"):
        row = figures["programs"][name]
        assert len(row["seconds"]) == 1 and row["tokens_per_second"] > 0
        assert 1 < row["peak_mib"] < row["resident_mib"]  # net: a tiny case needs less than the process itself
        assert row["versions"].keys() == {"torch", "transformers"}
    (plain,), (ours,) = (figures["programs"][name]["seconds"] for name in ("plain", "ours"))
    assert figures["ratio_plain"] == plain / ours
    for row in figures["programs"].values():  # one thread
        assert all(0 < cpu < 1.2 * wall for cpu, wall in zip(row["cpu_seconds"], row["seconds"], strict=True))
    assert figures["ratio_trl"] is None and figures["threads"] == 1 and figures["date"] and figures["cpu"]
    assert figures["prompt_tokens"][0] < figures["prompt_tokens"][1]
    assert "round 1 of 1: ours" in printed and "not run: --trl-python" in printed


@pytest.mark.skipif(TRL not in os.environ, reason=f"{TRL} names no interpreter that has TRL (bench/README.md)")
def test_a_whole_run_with_trl(tmp_path):
    """That prompts, pictures and lengths are ours is the run's own condition."""
    figures, _ = run_bench(tmp_path, "--trl-python", os.environ[TRL])
    assert figures["programs"]["trl"]["versions"].keys() == {"torch", "transformers", "trl"}
    assert min(figures[key] for key in TRL_KEYS) > 0


def test_a_program_that_dies_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="'plain' ended in the middle of the run; its last words: it said nothing"):
        step.Program("plain", tmp_path, 1, "/bin/false").hear()
    program = step.Program("plain", tmp_path, 1, "/bin/false")
    program.process.wait()
    with pytest.raises(InputError, match="it said nothing"):  # also where the command finds nobody
        program.ask("step")
    program.close()
    with pytest.raises(InputError, match="its last words: .*case.json"):  # an empty folder: nothing to read
        step.Program("plain", tmp_path, 1, sys.executable).hear()


BAD_FLAGS = [
    ("--case D", "invalid choice"),
    ("--case A --steps 0", "--steps and --threads must be at least 1"),
    ("--case A --trl-python /nowhere/python", "makes one in three lines"),
    ("--case A --json /nowhere/step.json", "/nowhere/step.json: No such file or directory"),
]


@pytest.mark.parametrize("flags, sentence", BAD_FLAGS)
def test_flags_that_cannot_be(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        errors.run(step.main)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
