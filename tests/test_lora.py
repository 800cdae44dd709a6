"""lora.py: the adapters against merged weights and plain autograd, on disk and through a stop and a resume."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import PROMPTS, fake_prompt, in_float64, peer_logits, random_completions, save_peer
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import lora
from errors import InputError
from model import Policy, collate
from runtime import checkpoint
from weights import load_policy, save_policy

RANK, ALPHA = 3, 7.0
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, list]:
    """A folder with random weights, and prompts of unequal length for it."""
    folder = tmp_path_factory.mktemp("base")
    peer = save_peer(folder)
    return folder, [fake_prompt(peer, *shape, seed=i) for i, shape in enumerate(PROMPTS)]


def adapted(folder: Path, dtype=torch.float32, seed: int = 0, moved: bool = True) -> Policy:
    """The folder's policy with adapters; `moved`: with random B, as if it had been trained."""
    policy = load_policy(folder, dtype=dtype)
    lora.add(policy, RANK, ALPHA, seed)
    policy.to(dtype)  # in float64 the adapters are to follow, so that nothing is rounded
    policy.compute_dtype = dtype
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.adapters().items():
        if moved and name.endswith(".b"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def logprobs(policy: Policy, prompts: list) -> Tensor:
    ids, lengths = random_completions(len(prompts), 2, 6)
    return policy.logprobs(policy.prefix(collate(prompts)), ids, lengths)


def loss(policy: Policy, prompts: list) -> Tensor:
    logp = logprobs(policy, prompts)
    return (logp * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2), dtype=logp.dtype)).sum()


def adamw(policy: Policy, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def train(policy: Policy, optimizer: torch.optim.Optimizer, prompts: list, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(policy, prompts).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------- what they compute


def test_adapters_hang_on_the_decoder_and_change_nothing_at_first(base):
    folder, prompts = base
    plain, policy = load_policy(folder), adapted(folder, moved=False)
    wanted = {f"model.layers.{i}.{name}" for i in range(3) for name in LINEARS}
    assert policy.adapters().keys() == {f"{name}.adapter.{part}" for name in wanted for part in "ab"}
    with torch.no_grad():
        assert torch.equal(logprobs(policy, prompts), logprobs(plain, prompts))
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == list(policy.adapters())
    for name in wanted:
        out, size = plain.get_parameter(f"{name}.weight").shape
        a, b = (policy.get_parameter(f"{name}.adapter.{part}") for part in "ab")
        assert a.shape == (RANK, size) and b.shape == (out, RANK) and not b.any()
        assert a.abs().max() <= size**-0.5 and a.std() > 0.4 * size**-0.5


def test_adapters_depend_on_their_seed_only(base):
    torch.manual_seed(5)
    a = adapted(base[0], moved=False)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    b, other = adapted(base[0], moved=False), adapted(base[0], seed=1, moved=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all((x != other.adapters()[n]).any() for n, x in a.adapters().items() if n.endswith(".a"))


def test_a_bfloat16_base_keeps_float32_adapters(base):
    policy = load_policy(base[0], dtype=torch.bfloat16)
    policy.compute_dtype = torch.bfloat16
    lora.add(policy, RANK, ALPHA, seed=0)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in policy.parameters())
    before = {name: p.clone() for name, p in policy.adapters().items()}
    train(policy, adamw(policy, lr=1e-6), base[1], 1)
    # The first step of AdamW is lr wherever there is a gradient: in bfloat16 it would be lost beside A.
    moved = [(p - before[name]).abs().max().item() for name, p in policy.adapters().items() if name.endswith(".b")]
    assert min(moved) == pytest.approx(1e-6, rel=0.01) and max(moved) == pytest.approx(1e-6, rel=0.01)


def test_gradients_are_those_of_the_merged_weights(base, tmp_path):
    """In float64, through dL/dW of a policy that holds W + s B A: dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T."""
    folder, prompts = base
    policy = adapted(folder, torch.float64)
    save_policy(policy, tmp_path)
    merged = in_float64(tmp_path)
    theirs = loss(merged, prompts)
    theirs.backward()
    for policy.checkpointing in (False, True):
        policy.zero_grad()
        ours = loss(policy, prompts)
        ours.backward()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        compare_gradients(policy, merged)


def compare_gradients(policy: Policy, merged: Policy) -> None:
    scale = ALPHA / RANK
    for name in (f"model.layers.{i}.{name}" for i in range(3) for name in LINEARS):
        a, b = (policy.get_parameter(f"{name}.adapter.{part}") for part in "ab")
        dw = merged.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(a.grad, scale * b.T @ dw, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b.grad, scale * dw @ a.T, rtol=1e-9, atol=1e-10)
        assert a.grad.abs().max() > 1e-4 and b.grad.abs().max() > 1e-4
    assert all(p.grad is None for name, p in policy.named_parameters() if name not in policy.adapters())


@torch.no_grad()
def test_disabled_is_the_starting_policy_bit_for_bit(base):
    folder, prompts = base
    start, policy = logprobs(load_policy(folder), prompts), adapted(folder)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with torch.enable_grad():
        train(policy, adamw(policy), prompts, 1)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == policy.adapters().keys()  # a step moves the adapters and nothing else
    trained = logprobs(policy, prompts)
    assert (trained - start).abs().max() > 1e-3
    with lora.disabled(policy):
        assert torch.equal(logprobs(policy, prompts), start)
        with lora.disabled(policy):
            assert torch.equal(logprobs(policy, prompts), start)
        assert torch.equal(logprobs(policy, prompts), start)  # leaving the inner one does not switch them on
    assert torch.equal(logprobs(policy, prompts), trained)
    with pytest.raises(KeyboardInterrupt), lora.disabled(policy):
        raise KeyboardInterrupt
    assert torch.equal(logprobs(policy, prompts), trained)


@torch.no_grad()
def test_generation_equals_that_of_the_merged_policy(base, tmp_path):
    """Greedy; in float64, where no two tokens are as good as equal."""
    folder, prompts = base
    policy = adapted(folder, torch.float64)
    save_policy(policy, tmp_path)
    ours, theirs, start = (
        p.generate(p.prefix(collate(prompts)), group_size=2, max_tokens=12)
        for p in (policy, in_float64(tmp_path), in_float64(folder))
    )
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.lengths, theirs.lengths)
    assert ours.ids.shape != start.ids.shape or not torch.equal(ours.ids, start.ids)


# ---------------------------------------------------------------------------------------------------------- on disk


@torch.no_grad()
def test_a_saved_folder_is_merged_and_loads_in_transformers(base, tmp_path):
    """Of trained adapters, in float32: every completion token of prompts of unequal length."""
    folder, prompts = base
    policy = adapted(folder, moved=False)
    with torch.enable_grad():
        train(policy, adamw(policy), prompts, 5)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    save_policy(policy, tmp_path)
    assert before.keys() == dict(policy.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())  # saving leaves it as it is
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    merged, peer = load_policy(tmp_path), Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not merged.adapters() and lora.rank_of(merged.adapters()) == 0
    ours, start = logprobs(policy, prompts), logprobs(load_policy(folder), prompts)
    assert (ours - start).abs().max() > 0.1
    torch.testing.assert_close(logprobs(merged, prompts), ours, rtol=0, atol=1e-5)
    prefix = policy.prefix(collate(prompts))
    for row, b in enumerate(prefix.order.tolist()):
        assert (policy.logits(prefix.hidden[row]) - peer_logits(peer, prompts[b])[-1]).abs().max() < 1e-5


@torch.no_grad()
def test_merging_is_computed_in_float32(base, tmp_path):
    """From a bfloat16 base to float32 or bfloat16: rounded once, at the end."""
    policy = adapted(base[0])
    for linear in lora.decoder_linears(policy):
        linear.weight.data = linear.weight.to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, None):
        save_policy(policy, tmp_path, dtype)
        saved = load_file(tmp_path / "model.safetensors")
        for i, layer in enumerate(policy.model.layers):
            linear = layer.mlp.down_proj
            exact = linear.weight.double() + ALPHA / RANK * linear.adapter.b.double() @ linear.adapter.a.double()
            got = saved[f"model.layers.{i}.mlp.down_proj.weight"]
            assert got.dtype == (dtype or torch.bfloat16)
            one_rounding = (exact.abs() * torch.finfo(got.dtype).eps / 2).clamp(min=1e-7)
            assert ((got.double() - exact).abs() <= 1.01 * one_rounding).all()


PROCESSOR = SimpleNamespace(save=lambda folder: None)  # what checkpoint.save wants of one, without a tokenizer


def test_what_does_not_fit_the_run_is_refused(base, tmp_path):
    folder, prompts = base
    plain, policy = load_policy(folder), adapted(folder, moved=False)
    for p in (plain, policy):
        optimizer = adamw(p)
        train(p, optimizer, prompts[:1], 1)
        checkpoint.save(tmp_path, 1 if p is plain else 2, p, PROCESSOR, optimizer, {})
    without, having = tmp_path / "step-000001", tmp_path / "step-000002"

    def refuses(step: Path, policy: Policy, *words: str) -> None:
        optimizer = adamw(policy)
        with pytest.raises(InputError) as error:
            checkpoint.load(step, policy, optimizer)
        assert all(word in str(error.value) for word in (str(step), *words))
        assert not optimizer.state

    rank = "--lora-rank must be as in the run"
    refuses(having, load_policy(folder), "adapters of rank 3, this policy of rank 0", rank)
    refuses(without, adapted(folder), "adapters of rank 0, this policy of rank 3", rank)
    wide = load_policy(folder)
    lora.add(wide, 4, ALPHA, 0)
    refuses(having, wide, "adapters of rank 3, this policy of rank 4", rank)

    narrow = load_policy(folder)
    narrow.visual.requires_grad_(False)
    refuses(without, narrow, "exp_avg.visual.blocks.0.attn.proj.bias has shape (32,), this policy asks for None")
    for key in ("exp_avg_sq.model.norm.weight", "exp_avg.model.norm.weight"):
        tensors = load_file(without / "trainer.safetensors")
        del tensors[key]
        save_file(tensors, without / "trainer.safetensors")
        refuses(without, load_policy(folder), f"{key} has shape None, this policy asks for (64,)")
    tensors = load_file(having / "trainer.safetensors")
    name = "adapter.model.layers.1.mlp.up_proj.adapter.b"
    save_file(tensors | {name: torch.zeros(1, RANK)}, having / "trainer.safetensors")
    refuses(having, adapted(folder), f"{name} has shape (1, 3), this policy asks for (96, 3)")
