"""Log-probabilities of chosen tokens: Triton kernels for both passes, PyTorch reference, and both joined to the head.

The naive formula, with x = logits.float() / temperature:

    logp    = log_softmax(x)[n, tokens[n]] = x[n, tokens[n]] - logsumexp(x[n])
    entropy = -sum_v p[n, v] log p[n, v],  p = softmax(x)
    d logp[n] / d logits[n, v] = ([v == tokens[n]] - p[n, v]) / temperature

Autograd's version of it keeps one or two fp32 copies of all logits, which for V = 151,936 is what runs out of memory.
Here every logit is read once in each pass, only the logsumexp is saved, and the backward pass makes the softmax again.
`linear_forward` and `linear_backward` go one step further: the logits of a chunk of rows are made, used and overwritten
by their gradient; no (N, V) tensor exists at all. That is Liger's chunked cross entropy (arXiv 2410.10989), except that
the head product is computed again in the backward pass, because the forward pass cannot know the incoming gradient.

Left out: second derivatives, and a gradient of the entropy (it is a metric here, not a bonus).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.optional import jit, launch_options, tl, triton

LOG2E = tl.constexpr(math.log2(math.e))  # the hardware's exponential is base 2
LN2 = tl.constexpr(math.log(2))
FLOOR = tl.constexpr(-2000.0)  # of a base-2 exponent: far below the smallest double, yet finite, so 0 * FLOOR is 0

# How the kernels are cut, by the dtype of the logits. Forward: a tile is LANES vectors of VECTOR logits, 16 bytes each,
# one vector and one running maximum per thread. Backward: BLOCK columns per program, two vectors per thread.
# Fixed, not tuned on the machine: no first-step pause, and the compiler's figures in the README are those of every run.
FORWARD = {
    torch.bfloat16: dict(VECTOR=8, LANES=256, num_warps=8),
    torch.float16: dict(VECTOR=8, LANES=256, num_warps=8),
    torch.float32: dict(VECTOR=4, LANES=256, num_warps=8),
    torch.float64: dict(VECTOR=2, LANES=256, num_warps=8),
}
BACKWARD = {
    torch.bfloat16: dict(BLOCK=4096, num_warps=8),
    torch.float16: dict(BLOCK=4096, num_warps=8),
    torch.float32: dict(BLOCK=2048, num_warps=8),
    torch.float64: dict(BLOCK=1024, num_warps=8),
}

# Logits per chunk of the reference: 2 MB in fp32, 3 rows of Qwen's vocabulary or 1,747 rows of a 300-token one.
# Measured on one CPU core: flat from 2^18 to 2^20 for both; smaller loops in Python, larger falls out of the cache.
CHUNK_ELEMENTS = 1 << 19
WEIGHT_ROWS = 16384  # rows of a weight gradient that a mixed-precision product makes at a time: 128 MB at H = 2048


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _absorb(x, top, total, weighted, SCALE: tl.constexpr, ENTROPY: tl.constexpr):
    """One tile x (VECTOR, LANES) into the running state (LANES,) of each thread: the maximum `top`, the sum `total` of
    e = 2^z with z = (x - top) * SCALE, and `weighted`, the sum of e * z. The axis that is reduced lies inside a thread,
    and a thread's sums are rescaled once per vector, not once per logit."""
    new = tl.maximum(top, tl.max(x, 0))
    shift = (top - new) * SCALE
    z = (x - new[None, :]) * SCALE  # subtracting first is exact where it matters and cannot overflow upwards
    e = tl.exp2(z)
    if ENTROPY:  # a logit of -inf has e = 0 and z = -inf: their product would be NaN, hence the floor
        weighted = tl.exp2(shift) * (weighted + total * tl.maximum(shift, FLOOR)) + tl.sum(e * tl.maximum(z, FLOOR), 0)
    return new, total * tl.exp2(shift) + tl.sum(e, 0), weighted


@jit
def logprob_forward_kernel(
    LOGITS, TOKENS, LOGP, LSE, ENTROPIES, V, stride,
    TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr, LOWEST: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row. LOGITS (N, V), rows `stride` apart; TOKENS, LOGP, LSE, ENTROPIES (N,); all sums in ACC.

    Every thread keeps a maximum of its own through the whole row, so the loop has no barrier; the threads' maxima meet
    once, at its end. LOWEST, the least finite number, stands in for "nothing seen yet": -inf minus -inf would be NaN.
    """
    SCALE: tl.constexpr = LOG2E / TEMPERATURE
    INVERSE: tl.constexpr = 1.0 / TEMPERATURE  # as in the backward kernel, to the last bit
    TILE: tl.constexpr = VECTOR * LANES
    row = tl.program_id(0).to(tl.int64)  # 14,134 rows of 151,936 logits are more than an int32 can count
    LOGITS += row * stride
    column = tl.arange(0, LANES)[None, :] * VECTOR + tl.arange(0, VECTOR)[:, None]  # (VECTOR, LANES)
    top = tl.full([LANES], LOWEST, ACC)
    total = tl.zeros([LANES], ACC)
    weighted = tl.zeros([LANES], ACC)
    whole = V // TILE * TILE
    for start in range(0, whole, TILE):  # whole tiles need no mask
        x = tl.load(LOGITS + start + column).to(ACC)
        top, total, weighted = _absorb(x, top, total, weighted, SCALE, ENTROPY)
    x = tl.load(LOGITS + whole + column, mask=whole + column < V, other=float("-inf")).to(ACC)
    top, total, weighted = _absorb(x, top, total, weighted, SCALE, ENTROPY)

    highest = tl.max(top, 0)
    shift = (top - highest) * SCALE
    if ENTROPY:
        weighted = tl.sum(tl.exp2(shift) * (weighted + total * tl.maximum(shift, FLOOR)), 0)
    total = tl.sum(tl.exp2(shift) * total, 0)
    token = tl.load(TOKENS + row)
    known = (token >= 0) & (token < V)  # an id outside the vocabulary must not read another row: it is NaN
    chosen = tl.load(LOGITS + token, mask=known, other=float("nan")).to(ACC)
    log_total = tl.log2(total)
    tl.store(LOGP + row, ((chosen - highest) * SCALE - log_total) * LN2)
    tl.store(LSE + row, highest * INVERSE + log_total * LN2)
    if ENTROPY:  # both terms are positive: nothing cancels
        tl.store(ENTROPIES + row, (log_total - weighted / total) * LN2)


@jit
def logprob_backward_kernel(
    GRAD, LOGITS, TOKENS, LSE, OUT, V, stride, out_stride,
    TEMPERATURE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and BLOCK columns: OUT = GRAD / T * ([column == token] - softmax). OUT may be LOGITS."""
    INVERSE: tl.constexpr = 1.0 / TEMPERATURE  # a division for each logit would double the instructions on AMD
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    LOGITS += row * stride
    OUT += row * out_stride
    grad = tl.load(GRAD + row) * INVERSE
    if grad == 0:  # padding, or a group that has nothing to tell: half of the traffic, and no NaN gets through
        tl.store(OUT + column, tl.zeros([BLOCK], ACC).to(OUT.dtype.element_ty), mask=inside)
    else:
        x = tl.load(LOGITS + column, mask=inside, other=float("-inf")).to(ACC)
        p = tl.exp2((x * INVERSE - tl.load(LSE + row)) * LOG2E)
        token = tl.load(TOKENS + row)
        grad = tl.where((token >= 0) & (token < V), grad, float("nan"))  # as its log-prob is
        hit = tl.where(column == token, 1.0, 0.0)
        tl.store(OUT + column, ((hit - p) * grad).to(OUT.dtype.element_ty), mask=inside)


def _acc(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(logits: Tensor) -> Tensor:
    """The kernels want the columns one apart; how far the rows are apart does not matter."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def triton_forward(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), tokens (N,) -> log-probs, logsumexp of logits / T, entropies: (N,), unasked entropies (0,)."""
    logits, tokens = _rows(logits), tokens.contiguous()
    n, v = logits.shape
    acc = accumulator(logits.dtype)
    logp, lse = logits.new_empty(n, dtype=acc), logits.new_empty(n, dtype=acc)
    entropies = logits.new_empty(n if entropy else 0, dtype=acc)
    if n:
        with torch.cuda.device_of(logits):
            logprob_forward_kernel[(n,)](
                logits, tokens, logp, lse, entropies, v, logits.stride(0),
                TEMPERATURE=temperature, ENTROPY=entropy, ACC=_acc(acc), LOWEST=torch.finfo(acc).min,
                **launch_options(FORWARD[logits.dtype]),
            )  # fmt: skip
    return logp, lse, entropies


def triton_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, lse: Tensor, temperature: float, out: Tensor | None = None
) -> Tensor:
    """grad (N,), of the log-probs -> gradient of the logits (N, V), into `out` if given, which may be the logits.
    The columns of `out` are one apart, its rows any distance."""
    out = logits.new_empty(logits.shape) if out is None else out
    logits = _rows(logits)
    n, v = logits.shape
    config = launch_options(BACKWARD[logits.dtype])
    if n:
        with torch.cuda.device_of(logits):
            logprob_backward_kernel[(n, triton.cdiv(v, config["BLOCK"]))](
                grad.contiguous(), logits, tokens.contiguous(), lse, out, v, logits.stride(0), out.stride(0),
                TEMPERATURE=temperature, ACC=_acc(lse.dtype), **config,
            )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------- reference


def _tempered(rows: Tensor, temperature: float) -> Tensor:
    """Rows of logits over the temperature, in fp32 (fp64 stays fp64): a new tensor, so it may be overwritten."""
    x = rows.to(accumulator(rows.dtype), copy=True)
    return x if temperature == 1 else x.div_(temperature)


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))


def reference_forward(
    logits: Tensor, tokens: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """triton_forward in PyTorch, over chunks of rows that stay in the cache.

    Written out, because torch.log_softmax adds up 151,936 fp32 numbers on a CPU with an error of 3e-5, this with 3e-6.
    """
    logp = logits.new_empty(len(logits), dtype=accumulator(logits.dtype))
    lse, entropies = torch.empty_like(logp), logp.new_empty(len(logp) if entropy else 0)
    step = _rows_per_chunk(logits)
    for i in range(0, len(logits), step):
        rows = slice(i, i + step)
        x = _tempered(logits[rows], temperature)  # (R, V)
        top = x.amax(1, keepdim=True)  # (R, 1)
        chosen = x.gather(1, tokens[rows, None]) - top
        z = x.sub_(top)
        e = z.exp() if entropy else z.exp_()
        total = e.sum(1, keepdim=True)
        logp[rows] = (chosen - total.log())[:, 0]
        lse[rows] = (top + total.log())[:, 0]
        if entropy:  # a logit of -inf has e = 0 and z = -inf: their product would be NaN, hence the floor
            entropies[rows] = (total.log() - e.mul_(z.clamp_(min=-2000)).sum(1, keepdim=True) / total)[:, 0]
    return logp, lse, entropies


def reference_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, lse: Tensor, temperature: float, out: Tensor | None = None
) -> Tensor:
    """triton_backward in PyTorch. Rows whose gradient is 0 (padding, zero advantage) become 0 and are never read."""
    out = logits.new_empty(logits.shape) if out is None else out
    busy = grad.nonzero()[:, 0]
    if len(busy) < len(grad):
        out[grad == 0] = 0
    for rows in busy.split(_rows_per_chunk(logits)) if len(busy) else ():
        if len(busy) == len(grad):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)  # a view, where an index would copy
        g = (grad[rows] / temperature)[:, None]  # (R, 1)
        p = _tempered(logits[rows], temperature).sub_(lse[rows, None]).exp_()  # (R, V)
        out[rows] = p.mul_(-g).scatter_add_(1, tokens[rows, None], g).to(out.dtype)
    return out


# --------------------------------------------------------------------------------------------- with the head in one go


def linear_forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk: int, entropy: bool, forward: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` (one of the two above) of the logits hidden @ weight.T, of which `chunk` rows exist at a time.

    hidden (N, H), weight (V, H), tokens (N,) -> log-probs, logsumexp, entropies: (N,) each; unasked entropies (0,).
    """
    weight = weight.to(hidden.dtype)  # for this call only
    logits = hidden.new_empty(min(chunk, len(hidden)), len(weight))  # one buffer for all chunks
    logp = hidden.new_empty(len(hidden), dtype=accumulator(hidden.dtype))
    lse, entropies = torch.empty_like(logp), logp.new_empty(len(logp) if entropy else 0)
    for i in range(0, len(hidden), chunk):
        rows = slice(i, i + chunk)
        x = torch.mm(hidden[rows], weight.t(), out=logits[: len(hidden[rows])])  # (R, V)
        logp[rows], lse[rows], entropies[rows] = forward(x, tokens[rows], temperature, entropy)
    return logp, lse, entropies


def linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, lse: Tensor,
    temperature: float, chunk: int, wanted: tuple[bool, bool], backward: Callable,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and of weight, those that are `wanted`, the other one as an empty tensor.

    Rows without incoming gradient are left out of all three products: on a CUDA device that costs one look at `grad`.
    A weight gradient is summed in fp32 (fp64 for fp64), whatever the products are made of, and rounded at the end.
    """
    compute = weight.to(hidden.dtype)  # for this call only
    rows = grad.nonzero()[:, 0]
    logits = hidden.new_empty(min(chunk, len(rows)), len(weight))
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else hidden.new_empty(0)
    wide = accumulator(torch.promote_types(weight.dtype, hidden.dtype))
    grad_weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=wide)
    for part in rows.split(chunk) if len(rows) and any(wanted) else ():
        h = hidden[part]  # (R, H)
        x = torch.mm(h, compute.t(), out=logits[: len(part)])  # (R, V)
        backward(grad[part], x, tokens[part], lse[part], temperature, out=x)  # x is its gradient from here on
        if wanted[0]:
            grad_hidden[part] = torch.mm(x, compute, out=torch.empty_like(h))  # out: as above, whatever autocast says
        if wanted[1]:
            _add_product(grad_weight, x, h)
    return grad_hidden, grad_weight.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, H) += a.T @ b with a (R, V), b (R, H) in the same or a narrower dtype, unrounded before it is added."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
        return
    for i in range(0, a.shape[1], WEIGHT_ROWS):  # in parts: no second (V, H) tensor
        place = slice(i, i + WEIGHT_ROWS)
        if a.is_cuda and not torch.version.hip:
            total[place] += torch.mm(a[:, place].t(), b, out_dtype=torch.float32)
        else:
            total[place].addmm_(a[:, place].t().to(total.dtype), b.to(total.dtype))
