"""Group-relative advantages: the Triton kernel, one program per group, and the PyTorch reference.

The naive formula, per group (DeepSeekMath, arXiv 2402.03300; ddof 1 as in TRL and VLM-R1):

    (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)

which is wrong in one place: the fp32 mean of eight 0.7s is not 0.7, and with a small eps the rounding error over itself
becomes an advantage of order one for a group that has nothing to tell. A group whose max equals its min is 0 exactly.
"""

import torch
from torch import Tensor

from kernels.optional import jit, launch_options, tl, triton

SCALES = ("std", "none")

# By the dtype of the sums; a group is padded to the next power of two. Worth one launch instead of ten, no traffic.
CONFIG = {torch.float32: dict(num_warps=1), torch.float64: dict(num_warps=1)}


@jit
def advantage_kernel(
    REWARDS, OUT, G, stride, EPS: tl.constexpr, STD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per group. REWARDS (B, G) of any dtype, rows `stride` apart; OUT (B, G) contiguous, in ACC."""
    row = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, BLOCK)
    real = member < G
    r = tl.load(REWARDS + row * stride + member, mask=real, other=0.0).to(ACC)
    # "max == min" as "all equal the first": NaN equals nothing, while a GPU's max would step over it.
    first = tl.load(REWARDS + row * stride).to(ACC)
    flat = tl.sum((real & (r != first)).to(tl.int32), 0) == 0
    advantage = tl.where(real, r - tl.sum(r, 0) / G, 0.0)
    if STD:
        variance = tl.sum(advantage * advantage, 0) / tl.maximum(G - 1, 1)
        advantage = advantage / (tl.sqrt(variance) + EPS)
    tl.store(OUT + row * G + member, tl.where(flat, 0.0, advantage), mask=real)


def result_dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def triton_advantage(rewards: Tensor, scale: str, eps: float) -> Tensor:
    """rewards (B, G) -> (B, G)."""
    b, g = rewards.shape
    rewards = rewards if rewards.stride(1) == 1 or g == 1 else rewards.contiguous()
    dtype = result_dtype(rewards)
    out = rewards.new_empty(b, g, dtype=dtype)
    if b:
        with torch.cuda.device_of(rewards):
            advantage_kernel[(b,)](
                rewards, out, g, rewards.stride(0),
                EPS=eps, STD=scale == "std", ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                BLOCK=triton.next_power_of_2(g), **launch_options(CONFIG[dtype]),
            )  # fmt: skip
    return out


def reference_advantage(rewards: Tensor, scale: str, eps: float) -> Tensor:
    """triton_advantage in PyTorch."""
    r = rewards.to(result_dtype(rewards))
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # (B, 1); with a NaN: not flat
    advantage = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":  # written out, because Tensor.std warns and gives NaN for G = 1
        variance = advantage.square().sum(1, keepdim=True) / max(r.shape[1] - 1, 1)  # (B, 1)
        advantage = advantage / (variance.sqrt() + eps)
    return advantage.masked_fill(flat, 0.0)
