"""What an implementation of a kernel promises, one function each: the reference, the Triton kernels in the interpreter
and on a GPU must keep all of it, and each of the wrong kernels of test_wrong_kernels.py must break some of it.

The yardstick is float64. Tolerances come from the arithmetic:

    log-prob, logsumexp   fp32 sums of numbers up to 40: 4e-6, two roundings of a number of that size
    entropy               the same at its own size, up to 12: 5e-6 and 5e-6 relative
    gradient              fp32: 2e-4 relative and 1e-8 (exp of a rounded exponent); bf16: one rounding, 2^-8 relative;
                          fp16: 2^-10, and its least number, 6e-8; at the chosen token also 1e-6 of the incoming
                          gradient, because 1 - p cancels where p is near 1
    IoU, GIoU             none: equal to the reference bit for bit
    advantage             fp32: 2e-6
"""

import importlib.util
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.iou import reference_iou

INF, NAN = float("inf"), float("nan")
RELATIVE = {torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}
ABSOLUTE = {torch.float32: 1e-8, torch.bfloat16: 1e-8, torch.float16: 6e-8, torch.float64: 1e-14}
BAND, CANARY = 64, 1234  # elements on either side of an output, and what they hold


def placed(x, device: str):
    """A tensor on the device with its own strides, and with whatever lies between its rows; anything else as it is."""
    if not isinstance(x, Tensor) or x.device.type == device or not x.numel():
        return x.to(device) if isinstance(x, Tensor) else x
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((reach,), (1,)).to(device).as_strided(x.shape, x.stride())


def banded(device: str, function: Callable, *arguments):
    """function(*arguments) on the device; CPU tensors go in and come out. Whatever `new_empty` and `empty_like` give it
    is full of NaN and has bands around it, which must survive."""
    buffers = []
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def between_bands(like: Tensor, *shape, dtype=None, **options) -> Tensor:
        if options:  # the interpreter's own
            return new_empty(like, *shape, dtype=dtype, **options)
        shape = torch.Size(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else torch.Size(shape)
        dtype = dtype or like.dtype
        buffer = torch.full((BAND + shape.numel() + BAND,), CANARY, dtype=dtype, device=like.device)
        buffers.append(buffer)
        return buffer[BAND : BAND + shape.numel()].fill_(NAN if dtype.is_floating_point else -1).view(shape)

    arguments = [placed(x, device) for x in arguments]
    Tensor.new_empty, torch.empty_like = between_bands, lambda like, **options: between_bands(like, like.shape)
    try:
        results = function(*arguments)
    finally:
        Tensor.new_empty, torch.empty_like = new_empty, empty_like
    for buffer in buffers:
        bands = torch.cat((buffer[:BAND], buffer[-BAND:]))
        assert torch.equal(bands, torch.full_like(bands, CANARY)), "an output was written outside"
    return results.cpu() if isinstance(results, Tensor) else [x.cpu() for x in results]


Passes = namedtuple("Passes", "logp lse entropy gradient")
HeadPasses = namedtuple("HeadPasses", "logp lse entropy hidden weight")  # the last two are gradients
IoU, Advantage = Callable[[Tensor, Tensor, bool], Tensor], Callable[[Tensor, str, float], Tensor]


@dataclass(frozen=True)
class LogProb:
    """Both passes of one implementation."""

    forward: Callable
    backward: Callable
    device: str = "cpu"
    range_checked: bool = True  # what an id outside the vocabulary does: NaN (kernels), or an exception (reference)

    def __call__(self, logits, tokens, grad, temperature=1.0, entropy=True) -> Passes:
        passed = banded(self.device, self.forward, logits, tokens, temperature, entropy)
        arguments = grad.to(passed[1].dtype), logits, tokens, passed[1], temperature
        return Passes(*passed, banded(self.device, self.backward, *arguments))


@dataclass(frozen=True)
class Head:
    """linear_forward and linear_backward of a module, on top of one of its implementations."""

    module: object
    of: LogProb

    def __call__(self, hidden, weight, tokens, grad, temperature=1.0, chunk=4, wanted=(True, True), unread=()):
        """`unread`: rows whose hidden states become NaN between the passes."""
        arguments = hidden, weight, tokens, temperature, chunk, True, self.of.forward
        _, lse, _ = passed = banded(self.of.device, self.module.linear_forward, *arguments)
        hidden = hidden.index_fill(0, torch.tensor(unread, dtype=torch.long), NAN)
        arguments = grad.to(lse.dtype), hidden, weight, tokens, lse, temperature, chunk, wanted, self.of.backward
        return HeadPasses(*passed, *banded(self.of.device, self.module.linear_backward, *arguments))


# ------------------------------------------------------------------------------------------------------------ log-probs


def logits_of(rows: int, vocabulary: int, dtype=torch.float32, spread: float = 4.0, seed: int = 0):
    """Random logits (N, V), tokens with the first and last id among them, and incoming gradients (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    tokens[0], tokens[-1] = 0, vocabulary - 1
    return logits, tokens, torch.randn(rows, generator=generator)


def naive(logits: Tensor, tokens: Tensor, grad: Tensor, temperature: float = 1.0) -> Passes:
    """log_softmax and gather in float64 with autograd."""
    x = logits.detach().double().requires_grad_()
    every = (x / temperature).log_softmax(1)
    logp = every.gather(1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logp, x, grad.double())
    entropy = torch.special.entr(every.detach().exp()).sum(1)
    return Passes(logp.detach(), (x.detach() / temperature).logsumexp(1), entropy, gradient)


def assert_gradient(got: Tensor, expected: Tensor, tokens: Tensor, grad: Tensor) -> None:
    """Each entry within the tolerance of its own arithmetic (see the top of the file)."""
    allowed = RELATIVE[got.dtype] * expected.abs() + ABSOLUTE[got.dtype]
    cancelled = (1e-14 if got.dtype == torch.float64 else 1e-6) * grad.double().abs()[:, None]
    allowed = allowed.scatter_add(1, tokens[:, None], cancelled)
    assert got.shape == expected.shape and ((got.double() - expected).abs() <= allowed).all()


def assert_forward(got, expected: Passes) -> None:
    exact = got.logp.dtype == torch.float64
    for name, relative, absolute in (("logp", 0, 4e-6), ("lse", 0, 4e-6), ("entropy", 5e-6, 5e-6)):
        tolerances = dict(rtol=1e-12, atol=1e-12) if exact else dict(rtol=relative, atol=absolute)
        assert_close(getattr(got, name).double(), getattr(expected, name), **tolerances)


def assert_passes(got: Passes, logits: Tensor, tokens: Tensor, grad: Tensor, temperature: float = 1.0) -> None:
    expected = naive(logits, tokens, grad, temperature)
    accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [accumulated] * 3 + [logits.dtype]
    assert_forward(got, expected)
    assert_gradient(got.gradient, expected.gradient, tokens, grad)


def both_passes_equal_float64(k: LogProb) -> None:
    """Every dtype, the shapes around a tile and the real one; temperatures where a wrong power cannot hide."""
    cases = [(v, dtype, 0.9, 4.0) for v in (1, 2, 1000, 1037, 4099) for dtype in RELATIVE]
    cases += [(151936, dtype, 0.9, 4.0) for dtype in (torch.float32, torch.bfloat16)]
    for v, dtype, temperature, spread in cases + [(1037, torch.float32, t, 1.0) for t in (0.25, 1.0, 4.0)]:
        arguments = logits_of(1 + v % 5, v, dtype, spread)
        assert_passes(got := k(*arguments, temperature), *arguments, temperature)
        other = k(*arguments, temperature, entropy=False)  # asking for it costs no bit of the log-probs
        assert torch.equal(other.logp, got.logp) and torch.equal(other.lse, got.lse) and other.entropy.shape == (0,)


def any_strides_and_no_rows_will_do(k: LogProb) -> None:
    """Rows apart, columns apart, all rows the same memory; between them stands NaN. The logits are left alone."""
    none = k(torch.zeros(0, 10), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert none.logp.shape == (0,) and none.gradient.shape == (0, 10)
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens, grad = logits_of(6, 1037, dtype)
        wide, every_other = torch.full((6, 3000), NAN, dtype=dtype), torch.full((6, 2074), NAN, dtype=dtype)
        wide[:, 7:1044] = every_other[:, ::2] = logits
        same = logits[:1].expand(6, -1)
        for view in (logits, wide[:, 7:1044], every_other[:, ::2], logits.t().contiguous().t(), same):
            before = view.clone()
            assert_passes(k(view, tokens, grad, 0.9), view, tokens, grad, 0.9)
            assert torch.equal(view, before)
        twice = torch.stack((tokens, tokens - 1), 1)  # tokens and gradients may have strides as well
        assert_passes(k(logits, twice[:, 0], torch.stack((grad, grad + 1), 1)[:, 0]), logits, tokens, grad)


def the_gradient_may_replace_the_logits(k: LogProb) -> None:
    """Bit for bit, also where their rows are apart, and in rows of another stride; without gradient they are zeros."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens, grad = logits_of(5, 4099, dtype)
        grad[2] = 0
        expected = k(logits, tokens, grad, 0.9)
        grad, logits, *rest = (placed(x, k.device) for x in (grad, logits, tokens, expected.lse))
        for columns, in_place in ((4099, True), (5000, True), (5000, False)):
            wide = torch.full((5, columns), 7.0, dtype=dtype, device=k.device)
            out = wide[:, :4099].copy_(logits)
            got = k.backward(grad, out if in_place else logits, *rest, 0.9, out)
            assert got.data_ptr() == out.data_ptr() and torch.equal(out.cpu(), expected.gradient)
            assert (wide[:, 4099:] == 7).all()


def minus_infinity_is_a_token_of_probability_zero(k: LogProb) -> None:
    """Anywhere in the row: holes inside a vector, whole tiles, the first ones and the last ones; also if chosen."""
    for vocabulary in (1037, 9000):
        for hole in (slice(100, 900), slice(0, 1000), slice(500, vocabulary), slice(1, None, 2)):
            logits, tokens, grad = logits_of(3, vocabulary)
            logits[:, hole] = -INF
            logits[:, [0, vocabulary - 1]] = 1.0
            tokens[1] = 501
            got = k(logits, tokens, grad)
            assert_passes(got, logits, tokens, grad)
            assert got.logp[1] == -INF and (got.gradient[::2, hole][logits[::2, hole] == -INF] == 0).all()


def what_is_no_distribution_or_no_token_is_nan_and_alone(k: LogProb) -> None:
    """Unless it has no gradient: then it is not read. An id outside is an exception of the reference."""
    for vocabulary in (2, 1037, 9000):
        logits, tokens, grad = logits_of(11, vocabulary)
        grad[2:4], grad[1] = 0, -grad[1].abs()
        clean = k(logits, tokens, grad)
        logits[2], logits[3], logits[4], logits[5, vocabulary - 1], logits[6, 0] = NAN, INF, -INF, NAN, INF
        for row, wrong in enumerate((vocabulary, -1, 2**40), 7):
            before, tokens[row] = tokens.clone(), wrong
            if not k.range_checked:
                with pytest.raises(RuntimeError):
                    k(logits, tokens, grad)
                tokens = before
        got, good, bad = k(logits, tokens, grad), [0, 1, 10], slice(4, 10 if k.range_checked else 7)
        assert all(torch.equal(x[good], y[good]) for x, y in zip(got, clean, strict=True))
        assert got.logp[bad].isnan().all() and got.gradient[bad].isnan().all() and got.entropy[4:7].isnan().all()
        assert (got.gradient[2:4] == 0).all() and (clean.gradient[good] != 0).any(1).all()


def the_largest_logits_do_not_overflow(k: LogProb) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4 - 1, -1e4], [-3e38, -3.2e38, -3.4e38]])
    got = k(logits, torch.tensor([0, 1, 0]), torch.ones(3))
    assert got.logp[0] == 0 and got.entropy[0] == 0 and got.logp[2] == 0 and got.entropy[2] == 0
    assert abs(got.logp[1] + 1.3132617) < 2e-3 and got.gradient.isfinite().all() and (got.gradient[0] == 0).all()


def rows_may_be_2_to_the_30_apart(module, device: str = "cpu") -> None:
    """Row 2 then starts at logit 2^31, where an int32 offset turns negative. 8 GiB of addresses, of which only the rows
    are ever touched, and in the interpreter the guard lets nothing else be."""
    logits, tokens, grad = (x.to(device) for x in logits_of(5, 4099, torch.bfloat16))
    far = torch.empty(4 * 2**30 + 4099, dtype=torch.bfloat16, device=device).as_strided((5, 4099), (2**30, 1))
    far.copy_(logits)
    passed = module.triton_forward(far, tokens, 0.9, True)
    gradient = module.triton_backward(grad, far, tokens, passed[1], 0.9)
    in_place = module.triton_backward(grad, far, tokens, passed[1], 0.9, far)
    assert_passes(Passes(*(x.cpu() for x in (*passed, gradient))), logits.cpu(), tokens.cpu(), grad.cpu(), 0.9)
    assert torch.equal(in_place, gradient)


# -------------------------------------------------------------------------------------------- log-probs with the head


def head_of(n: int, h: int, v: int, dtype=torch.float32):
    """hidden (N, H), weight (V, H), tokens, incoming gradients. Few and round numbers, so that each logit is a multiple
    of 1/8 below 16: exact in every dtype, and any difference is the operation's own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-1, 2, (n, h), generator=generator).to(dtype)
    weight = (torch.randint(-8, 9, (v, h), generator=generator) / 8).to(dtype)
    return hidden, weight, torch.randint(v, (n,), generator=generator), torch.randn(n, generator=generator)


def the_head_equals_float64_for_every_chunk(k: Head) -> None:
    for n, chunk in ((7, 1), (7, 3), (8, 4), (5, 1000)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
            hidden, weight, tokens, grad = head_of(n, 12, 301, dtype)
            expected = naive(hidden.double() @ weight.double().t(), tokens, grad, 0.9)
            got = k(hidden, weight, tokens, grad, 0.9, chunk)
            assert_forward(got, expected)
            gradients = expected.gradient @ weight.double(), expected.gradient.t() @ hidden.double()
            assert_close((got.hidden.double(), got.weight.double()), gradients, rtol=0, atol=tolerance)


def the_head_rounds_only_where_it_says(k: Head) -> None:
    """16-bit hidden states: the log-probs of exact logits are exact to fp32; the gradient of each logit is rounded
    once, and so is that of the hidden state; that of fp32 weights is not, even if it is added up row by row."""
    for dtype in (torch.bfloat16, torch.float16):
        for weight_dtype in (torch.float32, dtype):
            hidden, weight, tokens, grad = head_of(40, 16, 301, dtype)
            weight = weight.to(weight_dtype)
            logits = hidden.double() @ weight.double().t()
            rows, k.module.WEIGHT_ROWS = k.module.WEIGHT_ROWS, 100  # so that the product is made in four parts
            got = k(hidden, weight, tokens, grad, 0.9, 1)
            k.module.WEIGHT_ROWS = rows
            assert_forward(got, naive(logits, tokens, grad, 0.9))
            assert got.hidden.dtype == dtype and got.weight.dtype == weight_dtype
            arguments = (placed(x, k.of.device) for x in (grad, logits.to(dtype), tokens, got.lse))
            rounded = k.of.backward(*arguments, 0.9).cpu().double()  # (N, V), as inside
            for gradient, a, b in ((got.hidden, rounded, weight), (got.weight, rounded.t(), hidden)):
                exact, allowed = a @ b.double(), 1e-6 * (a.abs() @ b.double().abs())
                if gradient.dtype != torch.float32:
                    allowed += torch.finfo(dtype).eps / 2 * exact.abs() + ABSOLUTE[dtype]
                assert ((gradient.double() - exact).abs() <= allowed).all()


def the_head_takes_any_strides_no_rows_and_reads_none_without_gradient(k: Head) -> None:
    hidden, weight, tokens, grad = head_of(9, 12, 301)
    grad[[0, 4, 5, 8]] = 0
    clean, spoilt = k(hidden, weight, tokens, grad), k(hidden, weight, tokens, grad, unread=(0, 4, 5, 8))
    assert (spoilt.hidden[[0, 4, 5, 8]] == 0).all() and (spoilt.hidden[[1, 2, 3, 6, 7]] != 0).any(1).all()
    assert torch.equal(spoilt.hidden, clean.hidden) and torch.equal(spoilt.weight, clean.weight)
    turned = k(hidden.t().contiguous().t(), weight.t().contiguous().t(), tokens, grad)
    assert_close(tuple(turned), tuple(clean), rtol=0, atol=4e-6)
    none = k(hidden[:0], weight, tokens[:0], grad[:0])
    assert none.logp.shape == (0,) and none.hidden.shape == (0, 12) and none.weight.shape == (301, 12)
    assert (none.weight == 0).all() and (k(hidden, weight, tokens, 0 * grad).weight == 0).all()
    only = [k(hidden, weight, tokens, grad, wanted=wanted) for wanted in ((True, False), (False, True))]
    assert torch.equal(only[0].hidden, clean.hidden) and torch.equal(only[1].weight, clean.weight)
    assert only[0].weight.numel() == only[1].hidden.numel() == 0


# ---------------------------------------------------------------------------------------------------------------- boxes

GOOD = [0.0, 0.0, 4.0, 4.0]
NOT_BOXES = [[bad if i == k else v for i, v in enumerate(GOOD)] for bad in (NAN, INF, -INF) for k in range(4)]
NOT_BOXES += [
    [-INF, -INF, INF, INF], [4, 0, 0, 4], [0, 4, 4, 0],
    [4, 4, 0, 0],  # inverted twice: its area is positive again
    [0, 0, 0, 4], [0, 0, 4, 0], [1, 1, 1, 1],
    [0, 0, 1e-30, 1e-30],  # the area is 0 in fp32
    [-3e38, -3e38, 3e38, 3e38],  # the width is infinite in fp32
]  # fmt: skip


def boxes_of(n: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Pairs that overlap, touch, contain each other or lie apart, with and without whole coordinates."""
    generator = torch.Generator().manual_seed(0)
    corner, size = 30 * torch.rand(2, 2, n, 2, generator=generator, dtype=torch.float64)
    a, b = torch.cat((corner, corner + size + 0.01), 2)
    a[::3], b[::3] = a[::3].round(), b[::3].round()  # every third pair on a grid, some of them empty
    b[::7] = a[::7]
    return a.to(dtype), b.to(dtype)


def iou_by_hand(k: IoU) -> None:
    a = [[3, 3, 4, 4], [0, 0, 2, 2], [0, 0, 1, 1], [-4, -4, -2, -2], [0, 0, 9, 5]]  # the first: one pixel
    b = [[3, 3, 4, 4], [1, 1, 3, 3], [9, 0, 10, 1], [-4, -4, -2, -3], [0, 0, 20, 5]]  # the last: a hit at .45, exactly
    exact = torch.tensor([[1, 1 / 7, 0, 0.5, 0.45], [1, 1 / 7 - 2 / 9, -0.8, 0.5, 0.45]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        got = torch.stack([k(*(torch.tensor(x, dtype=dtype) for x in (a, b)), giou) for giou in (False, True)])
        assert_close(got, exact.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
        assert torch.equal(got[0], exact[0].to(dtype))
    inner, outer = torch.tensor([[0.9, 0.0, 1.2, 0.7]]), torch.tensor([[0.9, -0.1, 1.2, 0.8]])
    assert k(inner, outer, True) == k(inner, outer, False)  # not above it, though the hull and the union round apart


def iou_equals_float64_rounded_once_where_areas_are_exact(k: IoU) -> None:
    """Whole coordinates: areas are exact in fp32 and only the division rounds, so a tie with a threshold stays one."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 40, (2, 1500, 2), generator=generator)
    a, b = torch.cat((corner, corner + torch.randint(1, 40, corner.shape, generator=generator)), 2)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1).double()
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    exact = inner.double() / union.double()  # double rounding is harmless: both are below 2^24
    assert torch.equal(k(a.float(), b.float(), False), exact.float())
    assert torch.equal(k(a, b, False), exact.float())  # whole numbers as they are
    for x, y, tolerance in ((a.float(), b.float(), 2e-7), (a.double(), b.double(), 1e-15)):
        assert (k(x, y, True).double() - (exact - (hull - union) / hull)).abs().max() < tolerance


def iou_equals_the_reference_bit_for_bit_whatever_strides_and_dtypes(k: IoU) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for n in (0, 1, 255, 257, 700):
            a, b = boxes_of(n, dtype)
            wide = torch.full((n, 9), NAN, dtype=dtype)
            wide[:, 2:6] = a
            for giou in (False, True):
                expected = reference_iou(a, b, giou)
                assert torch.equal(k(a, b, giou), expected)
                assert torch.equal(k(wide[:, 2:6], b.t().contiguous().t(), giou), expected)
    assert k(a, a, False).dtype == torch.float32  # of bf16
    assert k(a.double(), b, False).dtype == k(a, b.double(), False).dtype == torch.float64


def what_is_no_box_scores_zero_and_is_alone(k: IoU) -> None:
    wrong, good = torch.tensor(NOT_BOXES), torch.tensor([GOOD] * len(NOT_BOXES))
    for giou in (False, True):
        for a, b in ((wrong, good), (good, wrong), (wrong, wrong), (wrong, good + 100), (good - 100, wrong)):
            assert (k(a, b, giou) == 0).all()
        mixed = torch.stack((good, wrong), 1).flatten(0, 1)
        assert torch.equal(k(mixed, good.repeat_interleave(2, 0), giou), torch.tensor([1.0, 0.0]).repeat(len(wrong)))


# ----------------------------------------------------------------------------------------------------------- advantages


def rewards_of(b: int = 16, g: int = 8) -> Tensor:
    return torch.rand(b, g, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def advantages_equal_the_formula(k: Advantage) -> None:
    """And so they sum to 0 and ignore a shift and, at eps 0, a scale."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for g, eps, factor, shift in [*((g, 1e-4, 1, 0) for g in (2, 3, 7, 8, 100)), (8, 0, 1e3, 0), (8, 0.5, 1, 3)]:
            rewards = (factor * rewards_of(5, g) + shift).to(dtype)
            centred = rewards.double() - rewards.double().mean(1, keepdim=True)
            std, none = k(rewards, "std", eps), k(rewards, "none", eps)
            assert std.dtype == none.dtype == dtype
            expected = centred / (rewards.double().std(1, keepdim=True) + eps)  # Tensor.std: ddof 1
            assert_close(std.double(), expected, rtol=0, atol=tolerance)
            assert_close(none.double(), centred, rtol=0, atol=factor * tolerance)


def a_group_without_spread_is_exactly_zero(k: Advantage) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = torch.tensor([0.7, 0.1, 1.0, 0.0, 1 / 3, -2.5, INF], dtype=dtype)
        for size in (1, 7, 8, 64):
            for scale, eps in (("std", 1e-4), ("std", 0.0), ("none", 0.0)):
                assert (k(values[:, None].repeat(1, size), scale, eps) == 0).all()


def groups_do_not_touch_each_other_whatever_their_dtype(k: Advantage) -> None:
    """Not even through what lies between them in memory, and not through a NaN, which spoils its own group only."""
    hits = torch.tensor([[True, False, False, False], [True, True, True, True]])
    for dtype in (torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float16):
        assert torch.equal(k(hits.to(dtype), "std", 1e-4), k(hits.float(), "std", 1e-4))
    assert k(torch.zeros(0, 4), "std", 1e-4).shape == (0, 4)
    rewards = torch.tensor([[0.0, 1.0] + [0.0] * 5, [0.1] * 7, [1.0] + [0.0] * 6, [1.0] * 7])
    for scale in ("std", "none"):
        expected = k(rewards, scale, 1e-4)
        assert (expected[[1, 3]] == 0).all()
        assert torch.equal(expected, torch.cat([k(row[None], scale, 1e-4) for row in rewards]))
        wide = torch.full((4, 20), NAN)
        wide[:, 5:12] = rewards
        for view in (wide[:, 5:12], rewards.t().contiguous().t()):
            assert torch.equal(k(view, scale, 1e-4), expected)
        for member, bad in ((0, NAN), (3, NAN), (6, NAN), (0, INF), (6, INF)):
            spoilt = rewards.clone()
            spoilt[2:, member] = bad
            got = k(spoilt, scale, 1e-4)
            assert torch.equal(got[:2], expected[:2]) and not got[2:].isfinite().any()
            assert bad == INF or got[2:].isnan().all()


def load_module(file: Path, name: str = "loaded_kernels"):
    """Import a file by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promises(of) -> list[Callable]:
    """Every function above whose argument is such an implementation."""
    return [f for f in globals().values() if getattr(f, "__annotations__", {}).get("k") == of]
