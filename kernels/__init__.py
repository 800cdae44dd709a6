"""The operations on the hot path of a GRPO step, each in a file of its own: Triton kernel beside PyTorch reference.

This file holds what callers see, and chooses: Triton for tensors on a GPU, the reference for tensors on a CPU. Triton's
interpreter (TRITON_INTERPRET=1) also runs the kernels on a CPU, but a thousand times slower than the reference, and the
tests set that variable for the whole process: so it is used only inside `with kernels.interpreted():`. Without Triton
the reference serves every device.

The operations are torch.library operators, so torch.compile keeps them whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import custom_op

from kernels import advantage, iou, logprob
from kernels.optional import triton

__all__ = ["box_iou", "group_advantage", "interpreted", "linear_logprob", "token_logprob"]

_interpreted = False


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too. Raises RuntimeError if Triton was imported without its interpreter."""
    global _interpreted
    if triton is None or not triton.knobs.runtime.interpret:
        raise RuntimeError("the Triton interpreter is off: set TRITON_INTERPRET=1 before anything imports triton")
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


def _on_triton(x: Tensor) -> bool:
    return triton is not None and (x.is_cuda or _interpreted)


# ------------------------------------------------------------------------------------------------------- log-probs


def token_logprob(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability, in nats, of each row's token under softmax(logits / temperature); differentiable in the logits.

    logits (N, V) of any float dtype and strides, tokens (N,) int64 ids in [0, V) -> log-probs (N,) in fp32 (fp64 for
    fp64 logits). With entropy=True: (log-probs, entropies), the entropy (N,) in nats of the same tempered distribution,
    without gradient.

    The gradient is computed in fp32, comes in the logits' dtype and costs one tensor of the logits' size. Rows whose
    incoming gradient is 0 get exact zeros and are not read. A logit of -inf is a token of probability 0 (log-prob -inf
    if it was the chosen one); a row of nothing but -inf, or with a NaN or +inf in it, is no distribution and gives NaN.
    An id outside [0, V) raises on a CPU; on a GPU, where raising would mean waiting for the device, it gives NaN, in
    the gradient too. Old, reference and policy log-probs all take the sampling temperature.
    Raises ValueError for shapes that do not fit and for a temperature that is not above 0.
    """
    if logits.ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, V) and tokens (N,) wanted, got {tuple(logits.shape)} and {tuple(tokens.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logp, _, entropies = _token_logprob(logits, tokens, temperature, entropy)
    return (logp, entropies) if entropy else logp


def linear_logprob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int = 1024, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logprob(hidden @ weight.T, tokens, temperature, entropy), differentiable in hidden and weight, without ever
    having more than `chunk` rows of logits: they are made again in the backward pass.

    hidden (N, H), weight (V, H), tokens (N,) int64 ids in [0, V) -> log-probs (N,) in fp32 (fp64 for fp64 hidden
    states), with entropy=True also the entropies (N,), without gradient.

    The products are made in the dtype of `hidden`, to which a weight of another dtype is cast for the time of a call.
    For bf16 and fp16 they are summed in fp32 (on CUDA: if torch.backends.cuda.matmul.allow_bf16_reduced_precision_
    reduction is off, as train_grpo.py has it), and rounded once: each logit, each gradient of a logit, each entry of
    the gradient of `hidden`. The gradient of the weight is summed in fp32 and
    comes in the weight's dtype, so that fp32 master weights get all of it. It is skipped if the weight needs none.
    Rows whose incoming gradient is 0 cost nothing in the backward pass.
    Peak memory beside inputs and gradients: one chunk of logits, chunk * V * 2 bytes for bf16; the cast weight, if its
    dtype is another; and for 16-bit weights that are trained the sum of their gradient in fp32.
    Raises ValueError for shapes that do not fit, a temperature that is not above 0 and a chunk below 1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or tokens.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"hidden (N, H), weight (V, H) and tokens (N,) wanted, got {shapes}")
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature must be above 0 and chunk at least 1, got {temperature} and {chunk}")
    logp, _, entropies = _linear_logprob(hidden, weight, tokens, temperature, chunk, entropy)
    return (logp, entropies) if entropy else logp


def _logprob(x: Tensor) -> tuple:
    """Both passes, for logits that are where x is."""
    if _on_triton(x):
        return logprob.triton_forward, logprob.triton_backward
    return logprob.reference_forward, logprob.reference_backward


@custom_op("medloc::token_logprob", mutates_args=())
def _token_logprob(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    forward, _ = _logprob(logits)
    return forward(logits, tokens, temperature, entropy)


@custom_op("medloc::token_logprob_backward", mutates_args=())
def _token_logprob_backward(grad: Tensor, logits: Tensor, tokens: Tensor, lse: Tensor, temperature: float) -> Tensor:
    _, backward = _logprob(logits)
    return backward(grad, logits, tokens, lse, temperature)


@custom_op("medloc::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    forward, _ = _logprob(hidden)
    return logprob.linear_forward(hidden, weight, tokens, temperature, chunk, entropy, forward)


@custom_op("medloc::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, lse: Tensor,
    temperature: float, chunk: int, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, backward = _logprob(hidden)
    wanted = (want_hidden, want_weight)
    return logprob.linear_backward(grad, hidden, weight, tokens, lse, temperature, chunk, wanted, backward)


def _three(x: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logp = x.new_empty(x.shape[0], dtype=logprob.accumulator(x.dtype))
    return logp, torch.empty_like(logp), logp.new_empty(x.shape[0] if entropy else 0)


# What torch.compile needs to know of each operator: the shapes of its results, and the operator that is its derivative.


@_token_logprob.register_fake
def _(logits, tokens, temperature, entropy):
    return _three(logits, entropy)


@_token_logprob_backward.register_fake
def _(grad, logits, tokens, lse, temperature):
    return logits.new_empty(logits.shape)


@_linear_logprob.register_fake
def _(hidden, weight, tokens, temperature, chunk, entropy):
    return _three(hidden, entropy)


@_linear_logprob_backward.register_fake
def _(grad, hidden, weight, tokens, lse, temperature, chunk, want_hidden, want_weight):
    return hidden.new_empty(hidden.shape if want_hidden else 0), weight.new_empty(weight.shape if want_weight else 0)


def _token_context(ctx, inputs, output):
    logits, tokens, ctx.temperature, _ = inputs
    _, lse, entropies = output
    ctx.save_for_backward(logits, tokens, lse)
    ctx.mark_non_differentiable(lse, entropies)


def _token_gradient(ctx, grad, *_):
    return _token_logprob_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None


def _linear_context(ctx, inputs, output):
    hidden, weight, tokens, ctx.temperature, ctx.chunk, _ = inputs
    _, lse, entropies = output
    ctx.save_for_backward(hidden, weight, tokens, lse)
    ctx.mark_non_differentiable(lse, entropies)


def _linear_gradient(ctx, grad, *_):
    wanted = ctx.needs_input_grad[:2]
    gradients = _linear_logprob_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.chunk, *wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None


_token_logprob.register_autograd(_token_gradient, setup_context=_token_context)
_linear_logprob.register_autograd(_linear_gradient, setup_context=_linear_context)


# ------------------------------------------------------------------------------------------------------- boxes


def box_iou(a: Tensor, b: Tensor, giou: bool = False) -> Tensor:
    """IoU, or with giou=True the GIoU (Rezatofighi et al. 2019), of box n of `a` with box n of `b`; no gradient.

    a, b (N, 4) as x1, y1, x2, y2, half-open (one pixel is [x, y, x + 1, y + 1]), both in the SAME frame, any unit
    -> (N,) in fp32 (fp64 if either is fp64): IoU in [0, 1], GIoU in [-1, 1] and never above the IoU.

    A non-finite, inverted or empty box on either side gives 0 for both, so a GIoU of 0 does not say "valid": ask the
    parser. Empty and finite are meant of the area in that precision: in fp32, sides of 1e-30 or 1e19 make no box.
    Raises ValueError for shapes that do not fit.
    """
    if a.ndim != 2 or a.shape[1] != 4 or a.shape != b.shape:
        raise ValueError(f"two tensors of boxes (N, 4) wanted, got {tuple(a.shape)} and {tuple(b.shape)}")
    return _box_iou(a.detach(), b.detach(), giou)


@custom_op("medloc::box_iou", mutates_args=())
def _box_iou(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    return (iou.triton_iou if _on_triton(a) else iou.reference_iou)(a, b, giou)


@_box_iou.register_fake
def _(a, b, giou):
    return a.new_empty(a.shape[0], dtype=iou.result_dtype(a, b))


# ------------------------------------------------------------------------------------------------------- advantages


EPS = 1e-4  # added to a standard deviation, as TRL and VLM-R1 do


def group_advantage(rewards: Tensor, scale: str = "std", eps: float = EPS) -> Tensor:
    """GRPO's advantages: how much better a completion is than its group; no gradient.

    rewards (B, G), one row per prompt, any real dtype -> (B, G) in fp32 (fp64 for fp64):
        scale="std":  (r - mean) / (std + eps), std with ddof 1     (GRPO, DAPO)
        scale="none": r - mean                                      (Dr. GRPO)
    A group without spread (max == min, so every group of G = 1) is EXACTLY 0 for every dtype and eps. A NaN makes its
    group NaN. Raises ValueError for another shape or scale.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards (B, G) with G >= 1 wanted, got {tuple(rewards.shape)}")
    if scale not in advantage.SCALES:
        raise ValueError(f"scale must be one of {', '.join(advantage.SCALES)}, got {scale!r}")
    return _group_advantage(rewards.detach(), scale, eps)


@custom_op("medloc::group_advantage", mutates_args=())
def _group_advantage(rewards: Tensor, scale: str, eps: float) -> Tensor:
    return (advantage.triton_advantage if _on_triton(rewards) else advantage.reference_advantage)(rewards, scale, eps)


@_group_advantage.register_fake
def _(rewards, scale, eps):
    return rewards.new_empty(rewards.shape, dtype=advantage.result_dtype(rewards))
