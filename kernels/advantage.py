"""Group-relative advantages: the PyTorch reference (the Triton kernel, one program per group, will stand beside it).

The naive formula, per group (DeepSeekMath, arXiv 2402.03300; ddof 1 as in TRL and VLM-R1):

    (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)

which is wrong in one place: the fp32 mean of eight 0.7s is not 0.7, and with a small eps the rounding error over itself
becomes an advantage of order one for a group that has nothing to tell. A group whose max equals its min is 0 exactly.
"""

import torch
from torch import Tensor

SCALES = ("std", "none")


@torch.no_grad()
def reference(rewards: Tensor, scale: str, eps: float) -> Tensor:
    """The arithmetic of kernels.group_advantage in PyTorch."""
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # (B, 1), before any rounding; NaN: not flat
    r = rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    advantage = r - r.mean(1, keepdim=True)  # (B, G)
    if scale == "std":  # written out, because Tensor.std warns and gives NaN for G = 1
        variance = advantage.square().sum(1, keepdim=True) / max(r.shape[1] - 1, 1)  # (B, 1)
        advantage = advantage / (variance.sqrt() + eps)
    return advantage.masked_fill(flat, 0.0)
