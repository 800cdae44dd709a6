"""loss.py against a triple loop in float64, value and gradient; micro-batches; exact KL; clip shares."""

import math

import pytest
import torch

from loss import KINDS, BatchTotals, completion_mask, grpo_loss, kl_estimate, mask_overlong

B, G, T = 4, 3, 6
LENGTHS = torch.tensor([[6, 1, 3], [2, 6, 5], [4, 4, 1], [1, 6, 2]])


def batch(seed: int = 0):
    """Ragged log-probs off policy (ratios from about .4 to 2.5), some sequences masked out whole."""
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, G, T, generator=generator, dtype=torch.float64)
    logp_old = logp + 0.4 * torch.randn(B, G, T, generator=generator, dtype=torch.float64)
    logp_ref = logp + 0.5 * torch.randn(B, G, T, generator=generator, dtype=torch.float64)
    advantage = torch.randn(B, G, generator=generator, dtype=torch.float64)
    truncated = torch.zeros(B, G, dtype=torch.bool)
    truncated[0, 0] = truncated[1, 1] = True
    mask = mask_overlong(completion_mask(LENGTHS, T), truncated)
    return logp, logp_old, logp_ref, advantage, mask


def whole(mask, max_tokens: int = 8) -> BatchTotals:
    return BatchTotals(sequences=mask.shape[0] * mask.shape[1], tokens=int(mask.sum()), max_tokens=max_tokens)


def naive(logp, logp_old, logp_ref, advantage, mask, kind, clip_low, clip_high, beta, kl, max_tokens):
    """The formulas of the docstring, token by token. (loss, d loss / d logp by hand, clipped low, clipped high)"""
    n_seq, n_tok = mask.shape[0] * mask.shape[1], int(mask.sum())
    loss, grad, low, high, kl_sum = 0.0, torch.zeros_like(logp), 0, 0, 0.0
    for b in range(mask.shape[0]):
        for g in range(mask.shape[1]):
            length = int(mask[b, g].sum())
            for t in range(length):
                new, old, a = logp[b, g, t].item(), logp_old[b, g, t].item(), advantage[b, g].item()
                rho = math.exp(new - old)
                clipped = (a > 0 and rho > 1 + clip_high) or (a < 0 and rho < 1 - clip_low)
                value = -min(rho * a, max(1 - clip_low, min(1 + clip_high, rho)) * a)
                slope = 0.0 if clipped else -rho * a
                low, high = low + (clipped and a < 0), high + (clipped and a > 0)
                delta = logp_ref[b, g, t].item() - new
                k3 = math.exp(delta) - delta - 1
                kl_sum += k3
                value += beta * k3
                slope += beta * (1 - math.exp(delta) if kl == "k3" else -delta)
                weight = {"grpo": 1 / (length * n_seq), "dapo": 1 / n_tok, "dr-grpo": 1 / (n_seq * max_tokens)}[kind]
                loss += value * weight
                grad[b, g, t] = slope * weight
    return loss, grad, low, high, kl_sum


@pytest.mark.parametrize("kl", ["k3", "k3+"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_triple_loop(kind, beta, kl):
    logp, logp_old, logp_ref, advantage, mask = batch()
    logp.requires_grad_()
    value, stats = grpo_loss(
        *(logp, logp_old, logp_ref, advantage, mask, whole(mask)),
        **dict(kind=kind, clip_low=0.2, clip_high=0.28, beta=beta, kl=kl),
    )
    value.backward()
    expected, grad, low, high, kl_sum = naive(
        logp.detach(), logp_old, logp_ref, advantage, mask, kind, 0.2, 0.28, beta, kl, 8
    )
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logp.grad, grad, rtol=1e-12, atol=1e-14)
    assert (stats.tokens, stats.clip_low, stats.clip_high) == (mask.sum(), low, high) and low > 0 and high > 0
    assert stats.kl.item() == pytest.approx(kl_sum, rel=1e-12)


@pytest.mark.parametrize("split", [[1, 1, 1, 1], [1, 3], [3, 1], [2, 2]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_micro_batches_never_changes_the_gradient(kind, split):
    tensors = batch(1)
    totals = whole(tensors[-1])
    settings = dict(kind=kind, beta=0.1, kl="k3+")

    def gradient(sizes):
        logp = tensors[0].clone().requires_grad_()
        value, stats = 0.0, None
        for rows in torch.arange(B).split(sizes):
            part, sums = grpo_loss(logp[rows], *(t[rows] for t in tensors[1:]), totals, **settings)
            part.backward()
            value, stats = value + part.item(), sums if stats is None else stats + sums
        return logp.grad, value, stats

    grad, value, stats = gradient(split)
    grad_whole, value_whole, stats_whole = gradient([B])
    torch.testing.assert_close(grad, grad_whole, rtol=0, atol=1e-10)
    assert value == pytest.approx(value_whole, abs=1e-10)
    for name in ("tokens", "kl", "clip_low", "clip_high"):
        torch.testing.assert_close(getattr(stats, name), getattr(stats_whole, name))
    assert stats.tokens == tensors[-1].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_masked_positions_changes_nothing(kind):
    logp, logp_old, logp_ref, advantage, mask = batch(2)

    def gradient(junk):
        x = logp.masked_fill(~mask, junk).requires_grad_()
        old, ref = logp_old.masked_fill(~mask, junk), logp_ref.masked_fill(~mask, -junk)
        value, stats = grpo_loss(x, old, ref, advantage, mask, whole(mask), kind=kind, beta=0.04)
        value.backward()
        return value.detach(), x.grad, stats.kl

    for expected, got in zip(gradient(0.0), gradient(float("nan")), strict=True):
        assert torch.equal(expected, got)
    for expected, got in zip(gradient(0.0), gradient(float("-inf")), strict=True):
        assert torch.equal(expected, got)
    assert (gradient(float("nan"))[1][~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_masked_out_whole_has_loss_and_gradient_zero(kind):
    logp, logp_old, logp_ref, advantage, mask = batch()
    logp.requires_grad_()
    mask = torch.zeros_like(mask)
    value, stats = grpo_loss(logp, logp_old, logp_ref, advantage, mask, whole(mask), kind=kind, beta=0.04)
    value.backward()
    assert value == 0 and (logp.grad == 0).all() and stats.tokens == stats.kl == 0


def test_on_policy_the_ratio_is_exactly_one_and_the_gradient_is_minus_advantage():
    logp, _, _, advantage, mask = batch()
    logp = logp.float().requires_grad_()  # fp32, the training dtype: exactly still
    advantage = advantage.float()
    value, stats = grpo_loss(logp, logp.detach(), None, advantage, mask, whole(mask), kind="dr-grpo")
    value.backward()
    expected = (-advantage[..., None] * mask) / (B * G * 8)
    torch.testing.assert_close(logp.grad, expected, rtol=1e-6, atol=0)
    assert value.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert stats.clip_low == stats.clip_high == stats.kl == 0


def test_gradients_flow_into_the_policy_only():
    logp, logp_old, logp_ref, advantage, mask = batch()
    tensors = [t.requires_grad_() for t in (logp, logp_old, logp_ref, advantage)]
    grpo_loss(*tensors, mask, whole(mask), beta=0.04)[0].backward()
    assert [t.grad is not None for t in tensors] == [True, False, False, False]


def test_clip_shares_count_the_tokens_whose_gradient_is_cut():
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0], dtype=torch.float64)
    logp = ratios.log().repeat(1, 3, 1).requires_grad_()  # (1, 3, 7): three sequences with A = +1, -1, 0
    mask = torch.ones(1, 3, 7, dtype=torch.bool)
    mask[0, :, -1] = False  # the ratio of 3 is masked
    zero = torch.zeros(1, 3, 7, dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    totals = BatchTotals(3, 18, 7)
    value, stats = grpo_loss(logp, zero, None, advantage, mask, totals, kind="dapo", clip_low=0.2, clip_high=0.28)
    value.backward()
    cut = (logp.grad == 0) & mask
    assert cut[0].tolist()[0] == [False] * 5 + [True, False]  # A > 0: only 1.29
    assert cut[0].tolist()[1] == [True, True] + [False] * 5  # A < 0: .5 and .79
    assert (stats.clip_low, stats.clip_high, stats.tokens) == (2, 1, 18)


@pytest.mark.parametrize("distance", [30.0, 1e4, -30.0, -1e4])
@pytest.mark.parametrize("kl", ["k3", "k3+"])
def test_a_huge_log_ratio_stays_finite(distance, kl):
    logp = torch.full((1, 2, 2), -1.0).requires_grad_()
    other = torch.full((1, 2, 2), -1.0 - distance)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    advantage = torch.tensor([[1.0, -1.0]])
    value, stats = grpo_loss(logp, other, other, advantage, mask, BatchTotals(2, 4, 2), beta=0.04, kl=kl)
    value.backward()
    assert value.isfinite() and logp.grad.isfinite().all() and stats.kl.isfinite() and stats.kl > 0


def test_a_masked_out_sequence_still_counts_as_a_sequence():
    logp, logp_old, _, advantage, mask = batch()
    fewer = mask_overlong(mask, torch.tensor([[False, False, True]] * B))
    x = logp.clone().requires_grad_()
    grpo_loss(x, logp_old, None, advantage, fewer, whole(fewer))[0].backward()
    y = logp.clone().requires_grad_()
    grpo_loss(y, logp_old, None, advantage, mask, whole(mask))[0].backward()
    assert torch.equal(x.grad[:, :2], y.grad[:, :2]) and (x.grad[:, 2] == 0).all() and (y.grad[:, 2] != 0).any()


# A vocabulary of five tokens: expectations over all tokens are exact.


def small_vocabulary():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    logp_ref = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, logits.log_softmax(0), logp_ref


@pytest.mark.parametrize("kl", ["k3", "k3+"])
def test_the_expected_estimate_is_the_kl(kl):
    _, logp, logp_ref = small_vocabulary()
    exact = (logp.exp() * (logp - logp_ref)).sum()
    torch.testing.assert_close((logp.exp() * kl_estimate(logp, logp_ref, kl)).sum(), exact, rtol=1e-12, atol=0)
    assert (kl_estimate(logp, logp_ref, kl) > 0).all()


def test_k3_plus_has_the_gradient_of_the_kl_and_k3_that_of_the_reverse():
    logits, logp, logp_ref = small_vocabulary()
    p = logp.exp().detach()  # tokens are sampled: no gradient through the sampling weights

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    forward = gradient((logp.exp() * (logp - logp_ref)).sum())
    reverse = gradient((logp_ref.exp() * (logp_ref - logp)).sum())
    torch.testing.assert_close(
        gradient((p * kl_estimate(logp, logp_ref, "k3+")).sum()), forward, rtol=1e-10, atol=1e-14
    )
    torch.testing.assert_close(gradient((p * kl_estimate(logp, logp_ref, "k3")).sum()), reverse, rtol=1e-10, atol=1e-14)
    k2 = (logp - logp_ref).square() / 2
    assert torch.equal(gradient(kl_estimate(logp, logp_ref, "k3+").sum()), gradient(k2.sum()))
    assert torch.equal(kl_estimate(logp, logp_ref, "k3+"), kl_estimate(logp, logp_ref, "k3"))


def test_k3_plus_still_pulls_where_the_policy_is_furthest_away():
    logp = torch.tensor([-100.0], requires_grad=True)
    kl_estimate(logp, torch.tensor([-1.0]), "k3+").sum().backward()
    assert logp.grad.item() == -99.0


def test_the_mask_is_by_position():
    mask = completion_mask(torch.tensor([[0, 1], [3, 4]]), 4)
    assert mask.tolist() == [[[False] * 4, [True] + [False] * 3], [[True] * 3 + [False], [True] * 4]]
    kept = mask_overlong(mask, torch.tensor([[False, False], [False, True]]))
    assert kept.sum(-1).tolist() == [[0, 1], [3, 0]]


def test_unknown_names_and_a_missing_reference_are_refused():
    logp, logp_old, _, advantage, mask = batch()
    for settings in (dict(kind="ppo"), dict(kl="k1"), dict(beta=0.04)):
        with pytest.raises(ValueError):
            grpo_loss(logp, logp_old, None, advantage, mask, whole(mask), **settings)
