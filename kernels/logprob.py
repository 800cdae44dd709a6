"""Log-probabilities of chosen tokens: the PyTorch reference (the Triton kernels, both passes, will stand beside it).

The naive formula, with x = logits.float() / temperature:

    logp    = log_softmax(x)[n, tokens[n]] = x[n, tokens[n]] - logsumexp(x[n])
    entropy = -sum_v p[n, v] log p[n, v],  p = softmax(x)
    d logp[n] / d logits[n, v] = ([v == tokens[n]] - p[n, v]) / temperature

Autograd's version of it keeps one or two fp32 copies of all logits, which for V = 151,936 is what runs out of memory.
Here the rows go through in chunks that stay in the cache, only the logsumexp is saved, and the backward pass makes the
softmax again. Left out: second derivatives, and a gradient of the entropy (it is a metric here, not a bonus).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits per chunk: 4 MB in fp32, 6 rows of Qwen's vocabulary or 3,495 rows of a 300-token one. Measured forward and
# backward on one CPU core: flat from 2^18 to 2^22 for both; smaller loops in Python, larger falls out of the cache.
CHUNK_ELEMENTS = 1 << 20


def reference(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """The arithmetic of kernels.token_logprob in PyTorch: (log-probs, entropies or None)."""
    return _TokenLogprob.apply(logits, tokens, temperature, entropy)


def _tempered(rows: Tensor, temperature: float) -> Tensor:
    """Rows of logits over the temperature, in fp32 (fp64 stays fp64): a new tensor, so it may be overwritten."""
    return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32) / temperature


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))


class _TokenLogprob(torch.autograd.Function):
    """gather - logsumexp over chunks of rows; saves the logsumexp, never a softmax."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, entropy: bool):
        logp = logits.new_empty(len(logits), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        lse = torch.empty_like(logp)
        entropies = torch.empty_like(logp) if entropy else None
        step = _rows_per_chunk(logits)
        for i in range(0, len(logits), step):
            rows = slice(i, i + step)
            x = _tempered(logits[rows], temperature)  # (R, V)
            lse[rows] = x.logsumexp(1)
            logp[rows] = x.gather(1, tokens[rows, None])[:, 0] - lse[rows]
            if entropy:  # entr(0) is 0, where p * log p would be NaN
                entropies[rows] = torch.special.entr(x.sub_(lse[rows, None]).exp_()).sum(1)
        ctx.save_for_backward(logits, tokens, lse)
        ctx.temperature = temperature
        if entropy:
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        logits, tokens, lse = ctx.saved_tensors
        out = torch.zeros_like(logits)
        # Padding and zero-advantage tokens come with gradient 0: their rows stay 0 and their logits are never read.
        for rows in grad.nonzero()[:, 0].split(_rows_per_chunk(logits)):
            g = (grad[rows] / ctx.temperature)[:, None]  # (R, 1)
            p = _tempered(logits[rows], ctx.temperature).sub_(lse[rows, None]).exp_()  # (R, V)
            out[rows] = p.mul_(-g).scatter_add_(1, tokens[rows, None], g).to(out.dtype)
        return out, None, None, None
