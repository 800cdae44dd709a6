"""The three operations on the hot path of a GRPO step, each with a PyTorch reference in a file of its own.

This file is the dispatch: it checks the arguments and calls an implementation. Today that is the reference, everywhere;
a Triton kernel goes beside its reference, and one line here then chooses it on CUDA or under the interpreter.
"""

from torch import Tensor

from kernels import advantage, iou, logprob

__all__ = ["box_iou", "group_advantage", "token_logprob"]


def token_logprob(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability, in nats, of each row's token under softmax(logits / temperature); differentiable in the logits.

    logits (N, V) of any float dtype and strides, tokens (N,) int64 ids in [0, V) -> log-probs (N,) in fp32 (fp64 for
    fp64 logits). With entropy=True: (log-probs, entropies), the entropy (N,) in nats of the same tempered distribution,
    without gradient.

    The gradient is computed in fp32, comes in the logits' dtype and costs one tensor of the logits' size. Rows whose
    incoming gradient is 0 get exact zeros and are not read. A logit of -inf is a token of probability 0 (log-prob -inf
    if it was the chosen one); a row of nothing but -inf is no distribution and gives NaN. Old, reference and policy
    log-probs all take the sampling temperature.
    Raises ValueError for shapes that do not fit and for a temperature that is not above 0.
    """
    if logits.ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, V) and tokens (N,) wanted, got {tuple(logits.shape)} and {tuple(tokens.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logp, entropies = logprob.reference(logits, tokens, temperature, entropy)
    return (logp, entropies) if entropy else logp


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
    return iou.reference(a, b, giou)


def group_advantage(rewards: Tensor, scale: str = "std", eps: float = 1e-4) -> Tensor:
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
    return advantage.reference(rewards, scale, eps)
