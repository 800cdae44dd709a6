"""loss.py against a triple loop in float64, value and gradient; micro-batches; exact KL; clip shares."""

import math

import pytest
import torch
from torch.testing import assert_close

from loss import KINDS, BatchTotals, completion_mask, grpo_loss, kl_estimate, mask_overlong

B, G, T = 4, 3, 6
LENGTHS = torch.tensor([[6, 1, 3], [2, 6, 5], [4, 4, 1], [1, 6, 2]])


def batch(seed: int = 0):
    """Ragged log-probs off policy (ratios from about .4 to 2.5); sequences that are masked out whole count as such."""
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, G, T, generator=generator, dtype=torch.float64)
    logp_old = logp + 0.4 * torch.randn(B, G, T, generator=generator, dtype=torch.float64)
    logp_ref = logp + 0.5 * torch.randn(B, G, T, generator=generator, dtype=torch.float64)
    advantage = torch.randn(B, G, generator=generator, dtype=torch.float64)
    advantage[2, 1:] = torch.tensor([0.0, -1.0])  # 0: of a group without spread, where nothing is clipped
    truncated = torch.zeros(B, G, dtype=torch.bool)
    truncated[0, 0] = truncated[1, 1] = True
    return logp, logp_old, logp_ref, advantage, mask_overlong(completion_mask(LENGTHS, T), truncated)


def whole(mask, max_tokens: int = 8) -> BatchTotals:
    return BatchTotals(sequences=mask.shape[0] * mask.shape[1], tokens=int(mask.sum()), max_tokens=max_tokens)


def passes(logp, *rest, totals=None, **settings):
    """(loss, gradient of logp, stats)"""
    x = logp.detach().requires_grad_()
    value, stats = grpo_loss(x, *rest, totals or whole(rest[-1]), **settings)
    value.backward()
    return value.detach(), x.grad, stats


def naive(logp, logp_old, logp_ref, advantage, mask, kind, clip_low, clip_high, beta, kl, max_tokens):
    """The formulas of the docstring, token by token. (loss, d loss / d logp by hand, clipped low, clipped high, KL)"""
    n_seq, n_tok = mask.shape[0] * mask.shape[1], int(mask.sum())
    loss, grad, low, high, kl_sum = 0.0, torch.zeros_like(logp), 0, 0, 0.0
    for b, g, t in mask.nonzero().tolist():
        length = int(mask[b, g].sum())
        new, old, a = logp[b, g, t].item(), logp_old[b, g, t].item(), advantage[b, g].item()
        rho = math.exp(new - old)
        clipped = (a > 0 and rho > 1 + clip_high) or (a < 0 and rho < 1 - clip_low)
        low, high = low + (clipped and a < 0), high + (clipped and a > 0)
        delta = logp_ref[b, g, t].item() - new
        k3 = math.exp(delta) - delta - 1
        kl_sum += k3
        value = -min(rho * a, max(1 - clip_low, min(1 + clip_high, rho)) * a) + beta * k3
        slope = (0.0 if clipped else -rho * a) + beta * (1 - math.exp(delta) if kl == "k3" else -delta)
        weight = {"grpo": 1 / (length * n_seq), "dapo": 1 / n_tok, "dr-grpo": 1 / (n_seq * max_tokens)}[kind]
        loss += value * weight
        grad[b, g, t] = slope * weight
    return loss, grad, low, high, kl_sum


@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), (0.04, "k3"), (0.04, "k3+")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_loop_over_tokens(kind, beta, kl):
    *tensors, mask = batch()
    expected, grad, low, high, kl_sum = naive(*tensors, mask, kind, 0.2, 0.28, beta, kl, 8)
    tensors = [t.requires_grad_() for t in tensors]
    settings = dict(kind=kind, clip_low=0.2, clip_high=0.28, beta=beta, kl=kl)
    value, stats = grpo_loss(*tensors, mask, whole(mask), **settings)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert_close(tensors[0].grad, grad, rtol=1e-12, atol=1e-14)
    assert all(t.grad is None for t in tensors[1:])  # gradients flow into the policy only
    assert (stats.tokens, stats.clip_low, stats.clip_high) == (mask.sum(), low, high) and low > 0 and high > 0
    assert stats.kl.item() == pytest.approx(kl_sum, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_micro_batches_never_changes_the_gradient(kind):
    tensors = batch(1)

    def parts(sizes):
        rows = torch.arange(B).split(sizes)
        totals, settings = whole(tensors[-1]), dict(kind=kind, beta=0.1, kl="k3+")
        found = [passes(*(t[r] for t in tensors), totals=totals, **settings) for r in rows]
        values, gradients, stats = zip(*found, strict=True)
        return sum(values), torch.cat(gradients), *vars(sum(stats[1:], stats[0])).values()

    for sizes in ([1, 1, 1, 1], [1, 3], [3, 1], [2, 2]):
        assert_close(parts(sizes), parts([B]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_masked_positions_changes_nothing(kind):
    logp, logp_old, logp_ref, advantage, mask = batch(2)

    def with_junk(junk):
        tensors = (x.masked_fill(~mask, y) for x, y in ((logp, junk), (logp_old, junk), (logp_ref, -junk)))
        value, grad, stats = passes(*tensors, advantage, mask, kind=kind, beta=0.04)
        assert (grad[~mask] == 0).all()
        return value, grad, stats.kl

    for junk in (float("nan"), float("-inf")):
        assert all(torch.equal(x, y) for x, y in zip(with_junk(0.0), with_junk(junk), strict=True))
    value, grad, stats = passes(*batch()[:4], torch.zeros_like(mask), kind=kind, beta=0.04)  # masked out whole
    assert value == 0 and (grad == 0).all() and stats.tokens == stats.kl == 0


def test_on_policy_the_ratio_is_exactly_one_and_the_gradient_is_minus_advantage():
    logp, _, _, advantage, mask = batch()
    logp, advantage = logp.float(), advantage.float()  # the training dtype: exactly still
    value, grad, stats = passes(logp, logp, None, advantage, mask, kind="dr-grpo")
    expected = (-advantage[..., None] * mask) / (B * G * 8)
    assert_close(grad, expected, rtol=1e-6, atol=0)
    assert value.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert stats.clip_low == stats.clip_high == stats.kl == 0


@pytest.mark.parametrize("kl", ["k3", "k3+"])
def test_a_huge_log_ratio_stays_finite(kl):
    for distance in (30.0, 1e4, -30.0, -1e4):
        logp, other = torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), -1.0 - distance)
        mask, advantage = torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([[1.0, -1.0]])
        value, grad, stats = passes(logp, other, other, advantage, mask, beta=0.04, kl=kl)
        assert value.isfinite() and grad.isfinite().all() and stats.kl.isfinite() and stats.kl > 0


def test_the_expected_estimate_is_the_kl_and_k3_plus_has_its_gradient():
    """A vocabulary of five tokens: expectations over all of them are exact. k3 has the gradient of the reverse KL."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    logp, logp_ref = logits.log_softmax(0), torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    p = logp.exp().detach()  # tokens are sampled: no gradient through the sampling weights

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    exact, reverse = (logp.exp() * (logp - logp_ref)).sum(), (logp_ref.exp() * (logp_ref - logp)).sum()
    for kl, slope in (("k3", reverse), ("k3+", exact)):
        estimate = kl_estimate(logp, logp_ref, kl)
        assert (estimate > 0).all()
        assert_close((p * estimate).sum(), exact, rtol=1e-12, atol=0)
        assert_close(gradient((p * estimate).sum()), gradient(slope), rtol=1e-10, atol=1e-14)
    assert torch.equal(estimate, kl_estimate(logp, logp_ref, "k3"))
    far = torch.tensor([-100.0], requires_grad=True)  # where the policy is furthest away it still pulls
    kl_estimate(far, torch.tensor([-1.0]), "k3+").sum().backward()
    assert far.grad.item() == -99.0


def test_the_mask_is_by_position():
    mask = completion_mask(torch.tensor([[0, 1], [3, 4]]), 4)
    assert mask.tolist() == [[[False] * 4, [True] + [False] * 3], [[True] * 3 + [False], [True] * 4]]
    kept = mask_overlong(mask, torch.tensor([[False, False], [False, True]]))
    assert kept.sum(-1).tolist() == [[0, 1], [3, 0]]


@pytest.mark.parametrize("settings", [dict(kind="ppo"), dict(kl="k1"), dict(beta=0.04)])
def test_unknown_names_and_a_missing_reference_are_refused(settings):
    logp, logp_old, _, advantage, mask = batch()
    with pytest.raises(ValueError):
        grpo_loss(logp, logp_old, None, advantage, mask, whole(mask), **settings)
