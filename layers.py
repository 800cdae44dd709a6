"""The parts that the vision tower and the decoder are both built of: linear layer, norm, SwiGLU, rotation.

Precision: a module computes in the dtype of the activations it is given and casts its weights to it, so one set of fp32
master weights serves a bf16 forward. Norms and rotary angles are fp32 at least.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *inputs, when: bool = True):
    """function(*inputs). Nothing between inputs and outputs is kept for the backward pass, which computes it again
    (gradient checkpointing, arXiv 1604.06174). The random state is not kept either: nothing here draws numbers."""
    if when and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input: fp32 master weights, bf16 arithmetic."""

    def __init__(self, size: int, out: int, bias: bool = True):
        super().__init__(size, out, bias)
        self.adapter: nn.Module | None = None  # lora.py hangs one here

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight.to(x.dtype) * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@lru_cache
def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) inverse wavelengths theta^(-2i/dim), fp32."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


@lru_cache
def rotary_axes(section: tuple[int, int, int], device: torch.device) -> Tensor:
    """(dim / 2,) which of the three positions turns each frequency."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(device)


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """angles (..., D/2) -> what `rotate` takes: cosines, and sines with the sign of each half (..., D)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x (..., D); cos, sin of `turns` broadcast to it, fp32."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q (N, S, D), k (N, L, D) -> q k^T (N, S, L) in fp32 at least, as inside flash attention: scores rounded to
    16 bits would sample from another policy than the one that is trained."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(q, k.mT)
    if not q.is_cuda:
        return torch.bmm(q.float(), k.float().mT)
    return torch.bmm(q, k.mT, out_dtype=torch.float32)
