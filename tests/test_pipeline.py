"""What is made ahead of a step, and what once a step: pictures by worker processes, image tokens of a frozen tower."""

import pytest
import torch
from test_train import arguments, grpo, lines, records, without_times  # noqa: F401  records is a fixture

import eval as evaluation
import train_grpo
from data import BadRecords, phantom_samples
from eval import Task
from model import Policy, VisionTower
from scheduler import ScheduleConfig, make_schedule

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
        seen, used = train_grpo.rollout(actor, reference, task, stream, 0, schedule, args)
        before = [p.detach().clone() for p in policy.parameters()]
        train_grpo.update(policy, optimizer, used, args)
    assert any((a != b).any() for a, b in zip(before, policy.parameters(), strict=True))
    logps = [logp for logp in (used.logp_old, used.logp_ref) if logp is not None]
    return len(images), len(seen.prompts), [*logps, *(p.detach() for p in policy.parameters())]


FROZEN = {
    "frozen": dict(freeze_vision=True, schedule="raw", inner_steps=3, beta=0.04),
    "recomputed": dict(freeze_vision=True, schedule="raw", checkpointing=True, beta=0.04),
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
