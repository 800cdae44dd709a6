"""The GRPO family as pure functions: ratio, clip, KL, aggregation.

    rho = exp(logp - logp_old)
    token loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta KL
    grpo     mean over the tokens of each sequence, then over the sequences       (DeepSeekMath, arXiv 2402.03300)
    dapo     mean over all tokens of the optimiser batch                          (DAPO, arXiv 2503.14476)
    dr-grpo  sum / (sequences x max_tokens); its advantage has no std             (Dr. GRPO, arXiv 2503.20783)
KL estimators: http://joschu.net/blog/kl-approx.html.

An optimiser batch goes through in micro-batches, on several ranks. backward() on each must ADD UP (over ranks: all-
reduce with SUM, not a mean) to the gradient of the whole batch at once. So nothing here divides by what it happens to
see: the whole batch's counts come in as `BatchTotals`, and every loss is a sum over sequences over a constant.

Left out: advantages (kernels.group_advantage), dual clip, sequence-level ratios (GSPO), an entropy bonus.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

KINDS = ("grpo", "dapo", "dr-grpo")
KLS = ("k3", "k3+")

# Log-ratios are held to +-20 before exp, as in verl: e^20 = 5e8 leaves fp32 room for sums and gradients. Beyond it the
# gradient is 0: a token whose probability changed 5e8-fold since it was sampled has nothing to teach.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class BatchTotals:
    """Counts over the WHOLE optimiser batch: all its micro-batches, all ranks."""

    sequences: int  # all completions, also those masked out whole (as in TRL): masking never reweights the others
    tokens: int  # True entries of all masks, AFTER mask_overlong
    max_tokens: int  # the limit of a completion's length that was sampled with, not the longest one seen


@dataclass
class LossStats:
    """Sums over unmasked tokens, without gradient: add over micro-batches and ranks, then divide by `tokens`."""

    tokens: Tensor  # ()
    kl: Tensor  # () k3 estimate of KL(policy || reference) in nats; 0 without logp_ref
    clip_low: Tensor  # () tokens whose gradient is cut: A < 0 and rho < 1 - clip_low
    clip_high: Tensor  # () tokens whose gradient is cut: A > 0 and rho > 1 + clip_high

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def completion_mask(lengths: Tensor, max_length: int) -> Tensor:
    """lengths (B, G), tokens up to and including the first EOS -> mask (B, G, T) bool with T = max_length.

    By position, never by token id: EOS stays in the loss, also where the padding token is the EOS token.
    """
    return torch.arange(max_length, device=lengths.device) < lengths[..., None]


def mask_overlong(mask: Tensor, truncated: Tensor) -> Tensor:
    """DAPO's overlong filter: mask (B, G, T) without the completions that hit the length limit, truncated (B, G) bool.

    `--overlong mask` calls this and `--overlong keep` does not; their rewards and advantages are computed all the same.
    """
    return mask & ~truncated[..., None]


def grpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    totals: BatchTotals,
    *,
    kind: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: str = "k3",
) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the optimiser batch's loss, to call backward() on, and the sums for the metrics.

    logp, logp_old, logp_ref (B, G, T) log-probs in nats at the sampling temperature; advantage (B, G); mask (B, G, T)
    bool by position. Gradients flow into logp only. With one inner step pass logp.detach() as logp_old: rho is exactly
    1 and the gradient -A * grad logp. What stands at masked positions, NaN included, changes nothing.
    logp_ref=None needs beta = 0. Raises ValueError for an unknown kind or kl, or beta without a reference.
    """
    if kind not in KINDS or kl not in KLS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} and kl one of {', '.join(KLS)}, got {kind!r}, {kl!r}")
    if logp_ref is None and beta != 0:
        raise ValueError(f"beta = {beta} needs logp_ref, the reference policy's log-probs")

    logp = logp.masked_fill(~mask, 0.0)  # before any arithmetic: 0 * NaN would be NaN, in the gradient too
    log_rho = logp - logp_old.detach().masked_fill(~mask, 0.0)
    rho = log_rho.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # (B, G, T)
    a = advantage.detach()[..., None]  # (B, G, 1)
    token_loss = -torch.minimum(rho * a, rho.clamp(1 - clip_low, 1 + clip_high) * a)
    token_kl = torch.zeros_like(logp)
    if logp_ref is not None:
        token_kl = kl_estimate(logp, logp_ref.detach().masked_fill(~mask, 0.0), kl)
        if beta != 0:
            token_loss = token_loss + beta * token_kl

    with torch.no_grad():  # at masked positions rho is 1 and the KL 0: they add to no sum
        stats = LossStats(
            tokens=mask.sum(),
            kl=token_kl.sum(),
            clip_low=((a < 0) & (rho < 1 - clip_low)).sum(),
            clip_high=((a > 0) & (rho > 1 + clip_high)).sum(),
        )
    sums = (token_loss * mask).sum(-1)  # (B, G)
    if kind == "grpo":
        return (sums / mask.sum(-1).clamp(min=1)).sum() / totals.sequences, stats
    if kind == "dapo":
        return sums.sum() / max(totals.tokens, 1), stats  # 0 / 1 when every completion of the batch was masked out
    return sums.sum() / (totals.sequences * totals.max_tokens), stats


def kl_estimate(logp: Tensor, logp_ref: Tensor, kl: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, for tokens sampled from the policy; any one shape.

    k3 = exp(ref - logp) - (ref - logp) - 1 is unbiased and never negative, but its gradient is that of
    KL(reference || policy). k3+ has the value of k3 and the gradient of k2 = (logp - ref)^2 / 2, whose expectation is
    the gradient of the KL meant. k2 needs no clamp and gets none: the pull back to the reference does not stop where
    the policy is furthest from it.
    """
    delta = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    k3 = delta.exp() - delta - 1
    if kl == "k3":
        return k3
    k2 = (logp - logp_ref).square() / 2
    return k3.detach() + (k2 - k2.detach())
