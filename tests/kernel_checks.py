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

Outputs are filled with NaN before and stand between guard bands, whoever allocates them.
"""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # the child of rows_may_be_2_to_the_30_apart
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.iou import reference_iou

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [1, 2, 1000, 1037, 4099, 151936]
RELATIVE = {torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}
ABSOLUTE = {torch.float32: 1e-8, torch.bfloat16: 1e-8, torch.float16: 6e-8, torch.float64: 1e-14}
BAND, CANARY = 64, 1234  # elements on either side of an output, and what they hold


# ------------------------------------------------------------------------------------------------------ implementations


@contextmanager
def banded() -> Iterator[None]:
    """Whatever `new_empty` and `empty_like` give inside is full of NaN and has bands around it, which must survive."""
    buffers = []
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def between_bands(like: Tensor, *shape, dtype=None, **options) -> Tensor:
        if options:  # the interpreter's own
            return new_empty(like, *shape, dtype=dtype, **options)
        shape = torch.Size(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else torch.Size(shape)
        dtype = dtype or like.dtype
        buffer = torch.full((BAND + shape.numel() + BAND,), CANARY, dtype=dtype, device=like.device)
        inside = buffer[BAND : BAND + shape.numel()].fill_(NAN if dtype.is_floating_point else -1)
        buffers.append(buffer)
        return inside.view(shape)

    Tensor.new_empty = between_bands
    torch.empty_like = lambda like, **options: between_bands(like, like.shape)
    try:
        yield
    finally:
        Tensor.new_empty, torch.empty_like = new_empty, empty_like
    for buffer in buffers:
        canary = torch.full((), CANARY, dtype=buffer.dtype, device=buffer.device)
        assert (buffer[:BAND] == canary).all() and (buffer[-BAND:] == canary).all(), "an output was written outside"


def placed(x: Tensor, device: str) -> Tensor:
    """x on the device with its own strides, and with whatever lies between its rows."""
    if x.device.type == device or not x.numel():
        return x.to(device)
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((reach,), (1,)).to(device).as_strided(x.shape, x.stride())


@dataclass
class Passes:
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class LogProb:
    """Both passes of one implementation; everything goes in and comes out as CPU tensors."""

    forward: Callable
    backward: Callable
    device: str = "cpu"
    range_checked: bool = True  # what an id outside the vocabulary does: NaN (kernels), or an exception (reference)

    def __call__(
        self, logits: Tensor, tokens: Tensor, grad: Tensor, temperature: float = 1.0, entropy: bool = True,
        out: Tensor | None = None,
    ) -> Passes:  # fmt: skip
        logits, tokens, grad = (placed(x, self.device) for x in (logits, tokens, grad))
        with banded():
            logp, lse, entropies = self.forward(logits, tokens, temperature, entropy)
            gradient = self.backward(grad.to(lse.dtype), logits, tokens, lse, temperature, out)
        return Passes(logp.cpu(), lse.cpu(), entropies.cpu(), gradient.cpu())


@dataclass(frozen=True)
class Boxes:
    iou: Callable
    device: str = "cpu"

    def __call__(self, a: Tensor, b: Tensor, giou: bool = False) -> Tensor:
        with banded():
            return self.iou(placed(a, self.device), placed(b, self.device), giou).cpu()


@dataclass(frozen=True)
class Groups:
    advantage: Callable
    device: str = "cpu"

    def __call__(self, rewards: Tensor, scale: str = "std", eps: float = 1e-4) -> Tensor:
        with banded():
            return self.advantage(placed(rewards, self.device), scale, eps).cpu()


# ------------------------------------------------------------------------------------------------------------ log-probs


def logits_of(rows: int, vocabulary: int, dtype=torch.float32, spread: float = 4.0, seed: int = 0):
    """Random logits (N, V), tokens with the first and last id among them, and incoming gradients (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    tokens[0], tokens[-1] = 0, vocabulary - 1
    return logits, tokens, torch.randn(rows, generator=generator)


def naive(logits: Tensor, tokens: Tensor, grad: Tensor, temperature: float) -> Passes:
    """log_softmax and gather in float64 with autograd."""
    x = logits.detach().double().requires_grad_()
    every = (x / temperature).log_softmax(1)
    logp = every.gather(1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logp, x, grad.double())
    every = every.detach()
    return Passes(logp.detach(), (x.detach() / temperature).logsumexp(1), -(every.exp() * every).sum(1), gradient)


def assert_gradient(got: Tensor, expected: Tensor, tokens: Tensor, grad: Tensor) -> None:
    """Each entry within the tolerance of its own arithmetic (see the top of the file)."""
    allowed = RELATIVE[got.dtype] * expected.abs() + ABSOLUTE[got.dtype]
    cancelled = (1e-14 if got.dtype == torch.float64 else 1e-6) * grad.double().abs()[:, None]
    allowed = allowed.scatter_add(1, tokens[:, None], cancelled)
    assert got.shape == expected.shape and ((got.double() - expected).abs() <= allowed).all()


def assert_forward(got: Passes, expected: Passes) -> None:
    exact = got.logp.dtype == torch.float64
    logp, entropy = (
        (dict(rtol=1e-12, atol=1e-12),) * 2 if exact else (dict(rtol=0, atol=4e-6), dict(rtol=5e-6, atol=5e-6))
    )
    torch.testing.assert_close(got.logp.double(), expected.logp, **logp)
    torch.testing.assert_close(got.lse.double(), expected.lse, **logp)
    if len(got.entropy):
        torch.testing.assert_close(got.entropy.double(), expected.entropy, **entropy)


def assert_passes(got: Passes, logits: Tensor, tokens: Tensor, grad: Tensor, temperature: float = 1.0) -> None:
    expected = naive(logits, tokens, grad, temperature)
    accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert got.logp.dtype == got.lse.dtype == got.entropy.dtype == accumulated and got.gradient.dtype == logits.dtype
    assert_forward(got, expected)
    assert_gradient(got.gradient, expected.gradient, tokens, grad)


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN and 0 is not -0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def both_passes_equal_float64(
    k: LogProb, vocabularies=(1, 2, 1000, 1037, 4099), dtypes=tuple(RELATIVE), temperatures=(1.0, 0.9)
) -> None:
    for vocabulary in vocabularies:
        for dtype in dtypes:
            for temperature in temperatures:
                arguments = logits_of(5 if vocabulary < 10**4 else 3, vocabulary, dtype)
                assert_passes(k(*arguments, temperature), *arguments, temperature)


def the_entropy_costs_no_bit_of_the_log_prob(k: LogProb) -> None:
    arguments = logits_of(4, 1037, torch.bfloat16)
    asked, not_asked = k(*arguments, 0.7), k(*arguments, 0.7, entropy=False)
    assert not_asked.entropy.shape == (0,)
    assert torch.equal(asked.logp, not_asked.logp) and torch.equal(asked.lse, not_asked.lse)


def any_strides_will_do(k: LogProb) -> None:
    """Rows apart, columns apart, all rows the same memory; between them stands NaN. The logits are left alone."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens, grad = logits_of(6, 1037, dtype)
        wide = torch.full((6, 3000), NAN, dtype=dtype)
        wide[:, 7:1044] = logits
        same = logits[:1].expand(6, -1)
        every_other = torch.full((6, 2074), NAN, dtype=dtype)
        every_other[:, ::2] = logits
        for view in (logits, wide[:, 7:1044], every_other[:, ::2], logits.t().contiguous().t(), same):
            before = view.clone()
            assert_passes(k(view, tokens, grad, 0.9), view, tokens, grad, 0.9)
            assert torch.equal(view, before)
        twice = torch.stack((tokens, tokens - 1), 1)  # tokens and gradients may have strides as well
        assert_passes(k(logits, twice[:, 0], torch.stack((grad, grad + 1), 1)[:, 0]), logits, tokens, grad)


def the_gradient_may_replace_the_logits(k: LogProb) -> None:
    """Bit for bit, also where their rows are apart; and rows without gradient become zeros."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens, grad = logits_of(5, 4099, dtype)
        grad[2] = 0
        expected = k(logits, tokens, grad, 0.9).gradient
        _, lse, _ = k.forward(*(placed(x, k.device) for x in (logits, tokens)), 0.9, False)
        for columns in (4099, 5000):
            wide = placed(torch.full((5, columns), 7.0, dtype=dtype), k.device)
            x = wide[:, :4099]
            x.copy_(logits)
            got = k.backward(placed(grad, k.device).to(lse.dtype), x, placed(tokens, k.device), lse, 0.9, x)
            assert got.data_ptr() == x.data_ptr() and torch.equal(bits(x.cpu()), bits(expected))
            assert (wide[:, 4099:] == 7).all()


def the_gradient_may_go_to_rows_of_another_stride(k: LogProb) -> None:
    logits, tokens, grad = logits_of(5, 1037)
    wide = placed(torch.full((5, 2000), 7.0), k.device)
    got = k(logits, tokens, grad, out=wide[:, :1037])
    assert_passes(got, logits, tokens, grad)
    assert (wide[:, 1037:] == 7).all()


def rows_without_gradient_become_zeros_unread(k: LogProb) -> None:
    for vocabulary in (5, 1037, 9000):
        logits, tokens, grad = logits_of(6, vocabulary)
        grad[1] = grad[4] = 0
        grad[2] = -grad[2].abs()
        clean = k(logits, tokens, grad).gradient
        logits[1], logits[4] = NAN, INF
        spoilt = k(logits, tokens, grad).gradient
        assert (spoilt[[1, 4]] == 0).all() and torch.equal(spoilt, clean) and (clean[[0, 2, 3, 5]] != 0).any(1).all()


def minus_infinity_is_a_token_of_probability_zero(k: LogProb) -> None:
    """Anywhere in the row: holes inside a vector, whole tiles, the first ones and the last ones."""
    for vocabulary in (1037, 9000):
        for hole in (slice(100, 900), slice(0, 1000), slice(500, vocabulary), slice(1, None, 2)):
            logits, tokens, grad = logits_of(3, vocabulary)
            tokens[:] = torch.tensor([0, vocabulary - 1, 500])
            logits[:, hole] = -INF
            logits[:, [0, vocabulary - 1]] = 1.0
            got = k(logits, tokens, grad)
            kept = logits[0].isfinite()
            expected = naive(
                logits[:, kept], tokens.clamp(max=0) + torch.tensor([0, int(kept.sum()) - 1, 0]), grad, 1.0
            )
            torch.testing.assert_close(got.lse.double(), expected.lse, rtol=0, atol=4e-6)
            torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=5e-6, atol=5e-6)
            torch.testing.assert_close(got.logp[:2].double(), expected.logp[:2], rtol=0, atol=4e-6)
            assert got.logp[2] == -INF or kept[500]
            assert (got.gradient[:, ~kept][:2] == 0).all() and not got.gradient.isnan().any()
            assert_gradient(
                got.gradient[:2, kept], expected.gradient[:2], torch.tensor([0, int(kept.sum()) - 1]), grad[:2]
            )


def what_is_no_distribution_is_nan_and_alone(k: LogProb) -> None:
    for vocabulary in (2, 1037, 9000):
        logits, tokens, grad = logits_of(5, vocabulary)
        clean = k(logits, tokens, grad)
        logits[1], logits[2, vocabulary - 1], logits[3, 0] = -INF, NAN, INF
        got = k(logits, tokens, grad)
        for spoilt, good in ((got.logp, clean.logp), (got.lse, clean.lse), (got.entropy, clean.entropy)):
            assert torch.equal(spoilt[[0, 4]], good[[0, 4]])
        assert got.logp[1:4].isnan().all() and got.entropy[1:4].isnan().all() and got.lse[2:4].isnan().all()
        assert got.gradient[1:4].isnan().all() and torch.equal(got.gradient[[0, 4]], clean.gradient[[0, 4]])


def the_largest_logits_do_not_overflow(k: LogProb) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4 - 1, -1e4], [-3e38, -3.2e38, -3.4e38]])
    got = k(logits, torch.tensor([0, 1, 0]), torch.ones(3))
    assert got.logp[0] == 0 and got.entropy[0] == 0 and got.logp[2] == 0 and got.entropy[2] == 0
    assert abs(got.logp[1].item() + 1.3132617) < 2e-3
    assert got.gradient.isfinite().all() and (got.gradient[0] == 0).all()


def probabilities_of_all_tokens_sum_to_one(k: LogProb) -> None:
    for vocabulary in (1, 100):
        logits, _, _ = logits_of(1, vocabulary)
        logp = k(logits.expand(vocabulary, -1), torch.arange(vocabulary), torch.zeros(vocabulary)).logp
        assert abs(logp.double().exp().sum().item() - 1) < 2e-6


def gradient_rows_sum_to_zero(k: LogProb) -> None:
    for vocabulary in (1, 2, 1000, 4099):
        arguments = logits_of(3, vocabulary)
        assert k(*arguments).gradient.double().sum(1).abs().max() < 2e-6


def a_shift_of_the_logits_changes_nothing(k: LogProb) -> None:
    logits, tokens, grad = logits_of(4, 1037)
    logits = (logits * 64).round() / 64  # so that adding 512 is exact in fp32
    first, *others = (k(logits + shift, tokens, grad) for shift in (0.0, 512.0, -512.0))
    for other in others:  # logsumexp near 512 is rounded to 2^-15
        for name in ("logp", "entropy", "gradient"):
            torch.testing.assert_close(getattr(first, name), getattr(other, name), rtol=2**-11, atol=2**-14)


def uniform_logits_have_the_largest_entropy(k: LogProb) -> None:
    got = k(torch.zeros(2, 1000), torch.tensor([0, 1]), torch.ones(2))
    assert (got.entropy - math.log(1000)).abs().max() < 1e-5 and (got.logp + math.log(1000)).abs().max() < 4e-6


def the_temperature_divides(k: LogProb) -> None:
    """Far from 1, where a wrong power of it cannot hide."""
    for temperature in (0.25, 4.0):
        arguments = logits_of(4, 1037, torch.float32, spread=1.0)
        assert_passes(k(*arguments, temperature), *arguments, temperature)


def an_id_outside_the_vocabulary_is_nan_or_refused(k: LogProb) -> None:
    logits, _, grad = logits_of(3, 1037)
    for wrong in (1037, -1, 2**40):
        tokens = torch.tensor([5, wrong, 7])
        if k.range_checked:
            got = k(logits, tokens, grad)
            assert got.logp[1].isnan() and got.logp[[0, 2]].isfinite().all()
            assert got.gradient[1].isnan().all() and got.gradient[[0, 2]].isfinite().all()
        else:
            try:
                k(logits, tokens, grad)
            except (IndexError, RuntimeError):
                continue
            raise AssertionError("not refused")


def no_rows_are_no_trouble(k: LogProb) -> None:
    got = k(torch.zeros(0, 10), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert got.logp.shape == (0,) and got.gradient.shape == (0, 10)


LOGPROB = [  # the quick ones first, for the sake of the wrong kernels
    no_rows_are_no_trouble, uniform_logits_have_the_largest_entropy, the_largest_logits_do_not_overflow,
    the_temperature_divides, the_entropy_costs_no_bit_of_the_log_prob, an_id_outside_the_vocabulary_is_nan_or_refused,
    the_gradient_may_go_to_rows_of_another_stride, gradient_rows_sum_to_zero, a_shift_of_the_logits_changes_nothing,
    probabilities_of_all_tokens_sum_to_one, the_gradient_may_replace_the_logits,
    rows_without_gradient_become_zeros_unread, minus_infinity_is_a_token_of_probability_zero,
    what_is_no_distribution_is_nan_and_alone, any_strides_will_do, both_passes_equal_float64,
]  # fmt: skip


def rows_may_be_2_to_the_30_apart(module: Path) -> None:
    """Row 2 then starts at logit 2^31, where an int32 offset turns negative. 8 GiB of addresses, of which only the rows
    are ever touched; in a process of its own, so that a wrong kernel takes down no other test."""
    child = subprocess.run([sys.executable, __file__, str(module)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-600:]


def far_rows_are_right(module, device: str = "cpu") -> None:
    vocabulary = 4099
    logits, tokens, grad = logits_of(5, vocabulary, torch.bfloat16)
    far = torch.empty(4 * 2**30 + vocabulary, dtype=torch.bfloat16, device=device)
    far = far.as_strided((5, vocabulary), (2**30, 1))
    far.copy_(logits)
    tokens, grad = tokens.to(device), grad.to(device)
    logp, lse, entropy = module.triton_forward(far, tokens, 0.9, True)
    gradient = module.triton_backward(grad, far, tokens, lse, 0.9)
    in_place = module.triton_backward(grad, far, tokens, lse, 0.9, far)
    got = Passes(logp.cpu(), lse.cpu(), entropy.cpu(), gradient.cpu())
    assert_passes(got, logits, tokens.cpu(), grad.cpu(), 0.9)
    assert torch.equal(bits(in_place.cpu()), bits(got.gradient))


# -------------------------------------------------------------------------------------------- log-probs with the head


@dataclass
class HeadPasses:
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    hidden: Tensor  # gradients
    weight: Tensor


@dataclass(frozen=True)
class Head:
    """linear_forward and linear_backward of a module, on top of one of its implementations."""

    module: object
    forward: Callable
    backward: Callable
    device: str = "cpu"

    def __call__(
        self, hidden: Tensor, weight: Tensor, tokens: Tensor, grad: Tensor, temperature: float = 1.0, chunk: int = 4,
        wanted: tuple[bool, bool] = (True, True), unread: tuple[int, ...] = (),
    ) -> HeadPasses:  # fmt: skip
        """`unread`: rows whose hidden states become NaN between the passes."""
        hidden, weight, tokens, grad = (placed(x, self.device) for x in (hidden, weight, tokens, grad))
        with banded():
            passed = self.module.linear_forward(hidden, weight, tokens, temperature, chunk, True, self.forward)
            lse = passed[1]
            if unread:
                hidden = hidden.index_fill(0, torch.tensor(unread, device=hidden.device), NAN)
            gradients = self.module.linear_backward(
                grad.to(lse.dtype), hidden, weight, tokens, lse, temperature, chunk, wanted, self.backward
            )
        return HeadPasses(*(x.cpu() for x in (*passed, *gradients)))


def head_of(n: int, h: int, v: int, dtype=torch.float32, seed: int = 0):
    """hidden (N, H), weight (V, H), tokens, incoming gradients. Few and round numbers, so that each logit is a multiple
    of 1/8 below 16: exact in every dtype, and any difference is the operation's own."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (n, h), generator=generator).to(dtype)
    weight = (torch.randint(-8, 9, (v, h), generator=generator) / 8).to(dtype)
    tokens = torch.randint(v, (n,), generator=generator)
    return hidden, weight, tokens, torch.randn(n, generator=generator)


def the_head_equals_float64_for_every_chunk(k: Head) -> None:
    for n, chunk in ((7, 1), (7, 3), (8, 4), (5, 1000)):
        for dtype in (torch.float64, torch.float32):
            hidden, weight, tokens, grad = head_of(n, 12, 301, dtype)
            expected = naive(hidden.double() @ weight.double().t(), tokens, grad, 0.9)
            got = k(hidden, weight, tokens, grad, 0.9, chunk)
            assert_forward(got, expected)
            tolerance = dict(rtol=0, atol=1e-12 if dtype == torch.float64 else 4e-6)
            torch.testing.assert_close(got.hidden.double(), expected.gradient @ weight.double(), **tolerance)
            torch.testing.assert_close(got.weight.double(), expected.gradient.t() @ hidden.double(), **tolerance)


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
            arguments = (placed(x, k.device) for x in (grad, logits.to(dtype), tokens, got.lse))
            rounded = k.backward(*arguments, 0.9).cpu().double()  # (N, V), as inside
            for gradient, a, b in ((got.hidden, rounded, weight), (got.weight, rounded.t(), hidden)):
                exact, allowed = a @ b.double(), 1e-6 * (a.abs() @ b.double().abs())
                if gradient.dtype != torch.float32:
                    allowed += torch.finfo(dtype).eps / 2 * exact.abs() + ABSOLUTE[dtype]
                assert ((gradient.double() - exact).abs() <= allowed).all()


def the_head_reads_no_row_without_gradient(k: Head) -> None:
    hidden, weight, tokens, grad = head_of(9, 12, 301)
    grad[[0, 4, 5, 8]] = 0
    clean, spoilt = k(hidden, weight, tokens, grad), k(hidden, weight, tokens, grad, unread=(0, 4, 5, 8))
    assert (spoilt.hidden[[0, 4, 5, 8]] == 0).all() and (spoilt.hidden[[1, 2, 3, 6, 7]] != 0).any(1).all()
    assert torch.equal(spoilt.hidden, clean.hidden) and torch.equal(spoilt.weight, clean.weight)


def the_head_makes_only_the_gradients_that_are_wanted(k: Head) -> None:
    arguments = head_of(6, 12, 301)
    both, hidden, weight = k(*arguments), k(*arguments, wanted=(True, False)), k(*arguments, wanted=(False, True))
    assert torch.equal(hidden.hidden, both.hidden) and torch.equal(weight.weight, both.weight)
    assert hidden.weight.numel() == weight.hidden.numel() == 0


def the_head_takes_any_strides_and_no_rows(k: Head) -> None:
    hidden, weight, tokens, grad = head_of(6, 12, 301)
    got = k(hidden.t().contiguous().t(), weight.t().contiguous().t(), tokens, grad)
    expected = k(hidden, weight, tokens, grad)
    for name in ("logp", "hidden", "weight"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=4e-6)
    none = k(hidden[:0], weight, tokens[:0], grad[:0])
    assert none.logp.shape == (0,) and none.hidden.shape == (0, 12) and none.weight.shape == (301, 12)
    assert (none.weight == 0).all() and (k(hidden, weight, tokens, 0 * grad).weight == 0).all()


HEAD = [
    the_head_equals_float64_for_every_chunk, the_head_rounds_only_where_it_says, the_head_reads_no_row_without_gradient,
    the_head_makes_only_the_gradients_that_are_wanted, the_head_takes_any_strides_and_no_rows,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- boxes

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
BY_HAND = [  # a, b, IoU, GIoU
    ([3, 3, 4, 4], [3, 3, 4, 4], 1, 1),  # one pixel against itself
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4, 1 / 4),
    ([0, 0, 2, 2], [2, 0, 4, 2], 0, 0),  # they touch
    ([0, 0, 1, 1], [9, 0, 10, 1], 0, -0.8),
    ([-4, -4, -2, -2], [-4, -4, -2, -3], 1 / 2, 1 / 2),
    ([0, 0, 9, 5], [0, 0, 20, 5], 9 / 20, 9 / 20),  # a tie with a threshold of .45
]


def boxes_of(n: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs that overlap, touch, contain each other or lie apart, with and without whole coordinates."""
    generator = torch.Generator().manual_seed(seed)

    def some() -> Tensor:
        corner = 30 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
        size = 0.01 + 30 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
        return torch.cat((corner, corner + size), 1)

    a, b = some(), some()
    a[::3], b[::3] = a[::3].round(), b[::3].round()  # every third pair on a grid, some of them empty
    b[::7] = a[::7]
    return a.to(dtype), b.to(dtype)


def iou_by_hand(k: Boxes) -> None:
    a, b, iou, giou = (torch.tensor(column, dtype=torch.float64) for column in zip(*BY_HAND, strict=True))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        got = k(a.to(dtype), b.to(dtype)), k(a.to(dtype), b.to(dtype), giou=True)
        assert got[0].dtype == got[1].dtype == dtype
        assert (got[0].double() - iou).abs().max() < tolerance and (got[1].double() - giou).abs().max() < tolerance


def iou_equals_float64_rounded_once_where_areas_are_exact(k: Boxes) -> None:
    """Whole coordinates: areas are exact in fp32 and only the division rounds, so a tie with a threshold stays one."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 40, (2, 1500, 2), generator=generator)
    a, b = torch.cat((corner, corner + torch.randint(1, 40, corner.shape, generator=generator)), 2)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    exact = (inner.double() / union.double()).float()  # double rounding is harmless: both are below 2^24
    assert torch.equal(k(a.float(), b.float()), exact)
    assert torch.equal(k(a, b), exact)  # whole numbers as they are


def iou_equals_the_reference_bit_for_bit(k: Boxes) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for n in (1, 255, 257, 700):
            a, b = boxes_of(n, dtype)
            for giou in (False, True):
                assert torch.equal(bits(k(a, b, giou)), bits(reference_iou(a, b, giou)))


def iou_is_in_range_symmetric_and_the_same_after_a_translation(k: Boxes) -> None:
    a, b = boxes_of(700)
    iou, giou = k(a, b), k(a, b, giou=True)
    assert (iou >= 0).all() and (iou <= 1).all() and (giou >= -1).all() and (giou <= iou).all()
    assert torch.equal(k(b, a), iou) and torch.equal(k(b, a, giou=True), giou)
    a, b = a.round(), b.round()
    for shift in (torch.tensor([512.0, -64, 512, -64]), torch.full((4,), -1000.0)):  # whole numbers: exactly
        assert torch.equal(k(a + shift, b + shift), k(a, b)) and torch.equal(
            k(a + shift, b + shift, True), k(a, b, True)
        )
    assert (k(a[::7], b[::7])[k(a[::7], a[::7]) > 0] == 1).all()


def giou_never_exceeds_iou_where_hull_and_union_round_apart(k: Boxes) -> None:
    inner, outer = torch.tensor([[0.9, 0.0, 1.2, 0.7]]), torch.tensor([[0.9, -0.1, 1.2, 0.8]])
    assert torch.equal(k(inner, outer, giou=True), k(inner, outer))  # the hull is the outer box, and so is the union


def what_is_no_box_scores_zero_and_is_alone(k: Boxes) -> None:
    wrong, good = torch.tensor(NOT_BOXES), torch.tensor([GOOD] * len(NOT_BOXES))
    for giou in (False, True):
        for a, b in ((wrong, good), (good, wrong), (wrong, wrong), (wrong, good + 100), (good - 100, wrong)):
            assert (k(a, b, giou) == 0).all()
        mixed = torch.stack((good, wrong), 1).flatten(0, 1)
        assert torch.equal(k(mixed, good.repeat_interleave(2, 0), giou), torch.tensor([1.0, 0.0]).repeat(len(wrong)))


def boxes_may_have_any_strides_and_dtypes(k: Boxes) -> None:
    a, b = boxes_of(300)
    expected = k(a, b)
    wide = torch.full((300, 9), NAN)
    wide[:, 2:6] = a
    assert torch.equal(k(wide[:, 2:6], b.t().contiguous().t()), expected)
    assert k(a.bfloat16(), a.bfloat16()).dtype == torch.float32
    assert k(a.double(), b).dtype == k(a, b.double()).dtype == torch.float64
    assert k(a[:0], b[:0], giou=True).shape == (0,)


BOXES = [
    iou_by_hand, iou_equals_float64_rounded_once_where_areas_are_exact, iou_equals_the_reference_bit_for_bit,
    iou_is_in_range_symmetric_and_the_same_after_a_translation,
    giou_never_exceeds_iou_where_hull_and_union_round_apart, what_is_no_box_scores_zero_and_is_alone,
    boxes_may_have_any_strides_and_dtypes,
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- advantages


def rewards_of(b: int = 16, g: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(b, g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def advantages_equal_the_formula(k: Groups) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for g in (2, 3, 7, 8, 100):
            for eps in (1e-4, 0.0, 0.5):
                rewards = rewards_of(5, g).to(dtype)
                exact = rewards.double()
                centred = exact - exact.mean(1, keepdim=True)
                expected = centred / (exact.std(1, keepdim=True) + eps)  # Tensor.std: ddof 1
                assert k(rewards, "std", eps).dtype == dtype
                torch.testing.assert_close(k(rewards, "std", eps).double(), expected, rtol=0, atol=tolerance)
                torch.testing.assert_close(k(rewards, "none", eps).double(), centred, rtol=0, atol=tolerance)


def advantages_by_hand_with_the_default_eps(k: Groups) -> None:
    expected = 0.5 / (0.5**0.5 + 1e-4)
    signs = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(k(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), expected * signs, rtol=0, atol=2e-7)


def advantages_sum_to_zero_and_ignore_a_shift(k: Groups) -> None:
    rewards = rewards_of().float()
    for scale in ("std", "none"):
        advantage = k(rewards, scale)
        assert advantage.sum(1).abs().max() < 4e-6
        torch.testing.assert_close(k(rewards + 3, scale), advantage, rtol=0, atol=1e-5)


def advantages_ignore_the_scale_at_eps_zero(k: Groups) -> None:
    rewards = rewards_of().float()
    advantage = k(rewards, eps=0.0)
    for factor in (1e-3, 7.0, 1e3):
        torch.testing.assert_close(k(factor * rewards, eps=0.0), advantage, rtol=0, atol=2e-5)


def a_group_without_spread_is_exactly_zero(k: Groups) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = torch.tensor([0.7, 0.1, 1.0, 0.0, 1 / 3, -2.5, INF], dtype=dtype)
        for size in (1, 7, 8, 64):
            rewards = values[:, None].repeat(1, size)
            for scale, eps in (("std", 1e-4), ("std", 0.0), ("none", 0.0)):
                assert (k(rewards, scale, eps) == 0).all()


def groups_do_not_touch_each_other(k: Groups) -> None:
    """Not even through what lies between them in memory, and not through a NaN, which spoils its own group only."""
    rewards = torch.tensor([[0.0, 1.0] + [0.0] * 5, [0.1] * 7, [1.0] + [0.0] * 6, [1.0] * 7])
    for scale in ("std", "none"):
        advantage = k(rewards, scale)
        assert (advantage[[1, 3]] == 0).all()
        for row in range(4):
            assert torch.equal(advantage[row], k(rewards[row : row + 1], scale)[0])
        wide = torch.full((4, 20), NAN)
        wide[:, 5:12] = rewards
        for view in (wide[:, 5:12], rewards.t().contiguous().t()):
            assert torch.equal(k(view, scale), advantage)
        for member in (0, 3, 6):
            spoilt = rewards.clone()
            spoilt[2:, member] = NAN
            assert torch.equal(k(spoilt, scale)[:2], advantage[:2]) and k(spoilt, scale)[2:].isnan().all()


def advantages_of_hits_and_misses_of_any_dtype(k: Groups) -> None:
    hits = torch.tensor([[True, False, False, False], [True, True, True, True]])
    for rewards in (hits, hits.int(), hits.long(), hits.bfloat16(), hits.half()):
        assert torch.equal(k(rewards), k(hits.float())) and k(rewards).dtype == torch.float32
    assert k(torch.zeros(0, 4)).shape == (0, 4)


GROUPS = [
    advantages_by_hand_with_the_default_eps, advantages_of_hits_and_misses_of_any_dtype, groups_do_not_touch_each_other,
    advantages_sum_to_zero_and_ignore_a_shift, advantages_ignore_the_scale_at_eps_zero, advantages_equal_the_formula,
    a_group_without_spread_is_exactly_zero,
]  # fmt: skip


def load_module(file: Path, name: str = "loaded_kernels"):
    """Import a file by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    from interpreter_guard import install

    install()
    far_rows_are_right(load_module(Path(sys.argv[1])))
