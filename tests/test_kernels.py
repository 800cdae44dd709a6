"""kernels/ against float64: log-probs and their gradient, entropy, IoU, GIoU, advantages; properties, special values.

Tolerances come from the arithmetic: fp32 gradients rtol 2e-4 and atol 1e-8, bf16 gradients one rounding, 2^-8 relative;
at the chosen token also 1e-6 of the incoming gradient, because 1 - p cancels where p is near 1.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import box_iou, group_advantage, logprob, token_logprob

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [1, 2, 1000, 1037, 4099, 151936]
RELATIVE = {torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float64: 1e-12}


def logits_of(rows: int, vocabulary: int, dtype=torch.float32, spread: float = 4.0, seed: int = 0):
    """Random logits (N, V), tokens with the first and last id among them, and incoming gradients (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    tokens[0], tokens[-1] = 0, vocabulary - 1
    return logits, tokens, torch.randn(rows, generator=generator)


def naive(logits, tokens, grad, temperature):
    """log_softmax and gather in float64 with autograd: (log-probs, gradient of the logits, entropies)."""
    x = logits.detach().double().requires_grad_()
    every = (x / temperature).log_softmax(1)
    logp = every.gather(1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logp, x, grad.double())
    every = every.detach()
    return logp.detach(), gradient, -(every.exp() * every).sum(1)


def assert_gradient(got, expected, tokens, grad):
    """Each entry within the tolerance of its own arithmetic (see the top of the file); shapes and dtypes included."""
    exact = got.dtype == torch.float64
    allowed = RELATIVE[got.dtype] * expected.abs() + (1e-14 if exact else 1e-8)
    cancelled = (1e-14 if exact else 1e-6) * grad.double().abs()[:, None]
    allowed = allowed.scatter_add(1, tokens[:, None], cancelled)
    assert got.shape == expected.shape and ((got.double() - expected).abs() <= allowed).all()


# token_logprob


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logprob_equals_float64(vocabulary, dtype, temperature):
    logits, tokens, grad = logits_of(5, vocabulary, dtype)
    logits.requires_grad_()
    logp, entropy = token_logprob(logits, tokens, temperature, entropy=True)
    expected, gradient, spread = naive(logits, tokens, grad, temperature)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert logp.dtype == entropy.dtype == accumulated and logp.shape == entropy.shape == (5,)
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logp.double(), expected, **(exact if dtype == torch.float64 else dict(rtol=0, atol=4e-6))
    )
    torch.testing.assert_close(
        entropy.double(), spread, **(exact if dtype == torch.float64 else dict(rtol=5e-6, atol=5e-6))
    )
    logp.backward(grad.to(accumulated))
    assert logits.grad.dtype == dtype
    assert_gradient(logits.grad, gradient, tokens, grad)


def test_logprob_passes_gradcheck():
    logits, tokens, _ = logits_of(4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens, 0.7), logits.requires_grad_())


@pytest.mark.parametrize("budget", [1, 7, 8 * 1037, 1 << 20])
def test_the_chunk_size_changes_nothing(budget, monkeypatch):
    logits, tokens, grad = logits_of(23, 1037)
    grad[::3] = 0
    expected, gradient, spread = naive(logits, tokens, grad, 1.0)
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", budget)
    logits.requires_grad_()
    logp, entropy = token_logprob(logits, tokens, entropy=True)
    logp.backward(grad)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(entropy.double(), spread, rtol=5e-6, atol=5e-6)
    assert_gradient(logits.grad, gradient, tokens, grad)


@pytest.mark.parametrize("vocabulary", [1, 1000, 1037])
def test_probabilities_of_all_tokens_sum_to_one(vocabulary):
    logits, _, _ = logits_of(1, vocabulary)
    total = token_logprob(logits.expand(vocabulary, -1), torch.arange(vocabulary)).exp().sum()
    assert total.item() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradient_rows_sum_to_zero(vocabulary):
    logits, tokens, grad = logits_of(3, vocabulary)
    logits.requires_grad_()
    token_logprob(logits, tokens).backward(grad)
    assert logits.grad.double().sum(1).abs().max() < 2e-6


def test_a_shift_of_the_logits_changes_nothing():
    logits, tokens, grad = logits_of(4, 1037)
    logits = (logits * 64).round() / 64  # so that adding 512 is exact in fp32
    outputs = []
    for shift in (0.0, 512.0, -512.0):
        x = (logits + shift).requires_grad_()
        logp, entropy = token_logprob(x, tokens, entropy=True)
        logp.backward(grad)
        outputs.append((logp.detach(), entropy, x.grad))
    for other in outputs[1:]:  # logsumexp near 512 is rounded to 2^-15
        for a, b in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-11, atol=2**-14)


def test_the_largest_logits_do_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4 - 1, -1e4]], requires_grad=True)
    logp, entropy = token_logprob(logits, torch.tensor([0, 1]), entropy=True)
    logp.sum().backward()
    assert logp[0] == 0 and entropy[0] == 0
    assert logp[1].item() == pytest.approx(-1.3132617, abs=2e-3)
    assert logits.grad.isfinite().all()


def test_logits_of_minus_infinity_are_tokens_of_probability_zero():
    logits, tokens, grad = logits_of(3, 1037)
    logits[:, 100:900] = -INF
    tokens[:] = torch.tensor([5, 1036, 500])  # the last one is an impossible token
    logits.requires_grad_()
    logp, entropy = token_logprob(logits, tokens, entropy=True)
    logp.backward(grad)
    expected, _, _ = naive(logits, tokens, grad, 1.0)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=4e-6)
    assert logp[2] == -INF and logp[:2].isfinite().all() and entropy.isfinite().all()
    assert (logits.grad[:2, 100:900] == 0).all() and not logits.grad.isnan().any()
    kept = torch.cat([logits.detach()[:, :100], logits.detach()[:, 900:]], 1)
    torch.testing.assert_close(entropy, token_logprob(kept, tokens.clamp(max=5), entropy=True)[1])


def test_a_row_of_nothing_but_minus_infinity_is_nan_and_alone():
    logits = torch.tensor([[-INF, -INF], [0.0, 0.0]])
    logp = token_logprob(logits, torch.tensor([0, 1]))
    assert logp[0].isnan() and logp[1].item() == pytest.approx(-0.6931472)


def test_rows_without_incoming_gradient_get_zeros_and_are_not_read():
    logits, tokens, grad = logits_of(6, 1037)
    clean = logits.clone().requires_grad_()
    logits[1], logits[4] = NAN, INF
    grad[1] = grad[4] = 0
    logits.requires_grad_()
    token_logprob(logits, tokens).backward(grad)
    token_logprob(clean, tokens).backward(grad)
    assert (logits.grad[[1, 4]] == 0).all() and (clean.grad[[1, 4]] == 0).all()
    assert torch.equal(logits.grad, clean.grad) and (logits.grad[[0, 2, 3, 5]] != 0).any(1).all()


def test_logits_are_left_alone_and_may_have_any_strides():
    logits, tokens, grad = logits_of(6, 1037)
    before = logits.clone()
    wide = torch.full((6, 3000), NAN)
    wide[:, 7:1044] = logits
    expected, gradient, _ = naive(logits, tokens, grad, 0.9)
    for view in (logits, wide[:, 7:1044], logits.t().contiguous().t()):
        x = view.detach().requires_grad_()
        logp = token_logprob(x, tokens, 0.9)
        logp.backward(grad)
        torch.testing.assert_close(logp.double(), expected, rtol=0, atol=4e-6)
        assert_gradient(x.grad, gradient, tokens, grad)
    assert torch.equal(logits, before)


def test_entropy_carries_no_gradient_and_is_largest_for_uniform_logits():
    logits = torch.zeros(2, 1000, requires_grad=True)
    logp, entropy = token_logprob(logits, torch.tensor([0, 1]), entropy=True)
    assert logp.requires_grad and not entropy.requires_grad
    assert entropy.tolist() == pytest.approx([6.907755] * 2, abs=1e-5)


def test_logprob_of_no_rows_and_without_grad():
    logits = torch.zeros(0, 10, requires_grad=True)
    logp = token_logprob(logits, torch.zeros(0, dtype=torch.long))
    logp.sum().backward()
    assert logp.shape == (0,) and logits.grad.shape == (0, 10)
    with torch.no_grad():
        assert not token_logprob(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).requires_grad


def test_logprob_refuses_wrong_shapes_and_temperatures():
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 1])
    for arguments in [(logits[None], tokens), (logits, tokens[:1]), (logits, tokens, 0.0), (logits, tokens, NAN)]:
        with pytest.raises(ValueError):
            token_logprob(*arguments)


# box_iou

INTEGERS = st.integers(-(10**6), 10**6)
SIDE = st.integers(1, 10**6)
WHOLE_BOX = st.tuples(INTEGERS, INTEGERS, SIDE, SIDE).map(lambda t: [t[0], t[1], t[0] + t[2], t[1] + t[3]])
ANY_BOX = st.lists(st.floats(width=32), min_size=4, max_size=4)


def pair(a, b, giou=False, dtype=torch.float32) -> float:
    return box_iou(torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype), giou).item()


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        ([3, 3, 4, 4], [3, 3, 4, 4], 1, 1),  # one pixel against itself
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
        ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4, 1 / 4),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0, 0),  # they touch
        ([0, 0, 1, 1], [9, 0, 10, 1], 0, -0.8),
        ([-4, -4, -2, -2], [-4, -4, -2, -3], 1 / 2, 1 / 2),
        ([0, 0, 9, 5], [0, 0, 20, 5], 9 / 20, 9 / 20),  # a tie with a threshold of .45
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_by_hand(a, b, iou, giou, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert pair(a, b, dtype=dtype) == pytest.approx(iou, abs=tolerance)
    assert pair(a, b, giou=True, dtype=dtype) == pytest.approx(giou, abs=tolerance)


def test_iou_is_correctly_rounded_where_the_areas_are_exact():
    a, b = torch.tensor([[0.0, 0, 9, 5]]), torch.tensor([[0.0, 0, 20, 5]])
    assert box_iou(a, b).item() == torch.tensor(9 / 20, dtype=torch.float32).item()


@given(WHOLE_BOX, WHOLE_BOX)
@settings(max_examples=200, deadline=None)
def test_iou_equals_exact_arithmetic(a, b):
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = inner / union - (hull - union) / hull
    assert pair(a, b) == pytest.approx(inner / union, abs=1e-6)
    assert pair(a, b, giou=True) == pytest.approx(giou, abs=1e-6)
    assert pair(a, b, dtype=torch.float64) == pytest.approx(inner / union, abs=1e-12)
    assert pair(a, b, giou=True, dtype=torch.float64) == pytest.approx(giou, abs=1e-12)


@given(ANY_BOX, ANY_BOX)
@settings(max_examples=300, deadline=None)
def test_iou_is_always_in_range_and_symmetric(a, b):
    iou, giou = pair(a, b), pair(a, b, giou=True)
    assert 0 <= iou <= 1 and -1 <= giou <= iou
    assert pair(b, a) == iou and pair(b, a, giou=True) == giou


@given(WHOLE_BOX, WHOLE_BOX, st.integers(-1000, 1000), st.integers(-1000, 1000))
@settings(max_examples=100, deadline=None)
def test_iou_does_not_change_under_translation(a, b, dx, dy):
    def moved(box):
        return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]

    for giou in (False, True):
        assert pair(moved(a), moved(b), giou) == pair(a, b, giou)  # whole numbers below 2^24: exactly


def test_giou_never_exceeds_iou_where_hull_and_union_round_apart():
    inner, outer = [0.9, 0.0, 1.2, 0.7], [0.9, -0.1, 1.2, 0.8]  # the hull is the outer box, and so is the union
    assert pair(inner, outer, giou=True) == pair(inner, outer)


GOOD = [0.0, 0.0, 4.0, 4.0]
NOT_BOXES = [
    *([NAN if i == k else v for i, v in enumerate(GOOD)] for k in range(4)),
    *([INF if i == k else v for i, v in enumerate(GOOD)] for k in range(4)),
    *([-INF if i == k else v for i, v in enumerate(GOOD)] for k in range(4)),
    [-INF, -INF, INF, INF],
    [4.0, 0.0, 0.0, 4.0],
    [0.0, 4.0, 4.0, 0.0],
    [4.0, 4.0, 0.0, 0.0],  # inverted twice: its area is positive again
    [0.0, 0.0, 0.0, 4.0],
    [0.0, 0.0, 4.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 0.0, 1e-30, 1e-30],  # the area is 0 in fp32
    [-3e38, -3e38, 3e38, 3e38],  # the width is infinite in fp32
]


@pytest.mark.parametrize("box", NOT_BOXES)
@pytest.mark.parametrize("giou", [False, True])
def test_what_is_no_box_scores_zero(box, giou):
    assert pair(box, GOOD, giou) == pair(GOOD, box, giou) == pair(box, box, giou) == 0


def test_iou_keeps_rows_apart_and_dtypes_known():
    a = torch.tensor([GOOD, [NAN] * 4, GOOD])
    assert box_iou(a, torch.tensor([GOOD] * 3)).tolist() == [1, 0, 1]
    assert box_iou(a.bfloat16(), a.bfloat16()).dtype == torch.float32
    assert box_iou(a.double(), a).dtype == box_iou(a, a.double()).dtype == torch.float64
    whole = torch.tensor([[0, 0, 2, 2]])
    assert box_iou(whole, whole).tolist() == [1] and box_iou(whole, whole).dtype == torch.float32
    assert box_iou(torch.zeros(0, 4), torch.zeros(0, 4), giou=True).shape == (0,)
    for wrong in (torch.zeros(3), torch.zeros(2, 4), torch.zeros(3, 5)):
        with pytest.raises(ValueError):
            box_iou(a, wrong)


# group_advantage


def rewards_of(b: int = 16, g: int = 8, seed: int = 0):
    return torch.rand(b, g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_advantage_equals_the_formula(eps, dtype):
    rewards = rewards_of().to(dtype)
    exact = rewards.double()
    centred = exact - exact.mean(1, keepdim=True)
    tolerance = dict(rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)
    expected = centred / (exact.std(1, keepdim=True) + eps)  # Tensor.std: ddof 1
    torch.testing.assert_close(group_advantage(rewards, "std", eps).double(), expected, **tolerance)
    torch.testing.assert_close(group_advantage(rewards, "none", eps).double(), centred, **tolerance)
    assert group_advantage(rewards).dtype == dtype


def test_advantage_by_hand_with_the_default_eps():
    advantage = group_advantage(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    expected = 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(advantage, expected * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_sum_to_zero_and_ignore_a_shift(scale):
    rewards = rewards_of().float()
    advantage = group_advantage(rewards, scale)
    assert advantage.sum(1).abs().max() < 4e-6
    torch.testing.assert_close(group_advantage(rewards + 3, scale), advantage, rtol=0, atol=1e-5)


def test_advantages_ignore_the_scale_at_eps_zero():
    rewards = rewards_of().float()
    advantage = group_advantage(rewards, eps=0)
    for factor in (1e-3, 7.0, 1e3):
        torch.testing.assert_close(group_advantage(factor * rewards, eps=0), advantage, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_without_spread_has_advantage_exactly_zero(scale, eps, dtype):
    for value in (0.7, 0.1, 1.0, 0.0, 1 / 3):
        for size in (1, 3, 7, 8, 64):
            rewards = torch.full((2, size), value, dtype=dtype)
            assert (group_advantage(rewards, scale, eps) == 0).all()


def test_the_mean_of_equal_rewards_does_round():
    """The reason for the rule: without it this group would have advantages of order one at eps 0."""
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.mean(1, keepdim=True)).abs().max() > 0


def test_a_group_of_one_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert group_advantage(torch.tensor([[0.3], [1.0]])).tolist() == [[0], [0]]


def test_groups_do_not_touch_each_other():
    rewards = torch.tensor([[0.0, 1.0] + [0.0] * 5, [0.1] * 7, [1.0] + [0.0] * 6])
    advantage = group_advantage(rewards)
    assert (advantage[1] == 0).all()
    for row in range(3):
        assert torch.equal(advantage[row], group_advantage(rewards[row : row + 1])[0])
    rewards[2, 3] = NAN
    spoilt = group_advantage(rewards)
    assert torch.equal(spoilt[:2], advantage[:2]) and spoilt[2].isnan().all()


def test_advantage_of_hits_and_misses_of_any_dtype():
    hits = torch.tensor([[True, False, False, False]])
    for rewards in (hits, hits.int(), hits.bfloat16()):
        assert torch.equal(group_advantage(rewards), group_advantage(hits.float()))
        assert group_advantage(rewards).dtype == torch.float32
    assert not group_advantage(hits.float().requires_grad_()).requires_grad


def test_advantage_refuses_wrong_shapes_and_scales():
    for arguments in [(torch.zeros(3),), (torch.zeros(2, 0),), (torch.zeros(2, 3), "mad")]:
        with pytest.raises(ValueError):
            group_advantage(*arguments)
