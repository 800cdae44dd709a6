"""Low-rank adapters: a few million trained numbers instead of all weights, and the starting policy at no cost.

LoRA (arXiv 2106.09685, section 4): beside a frozen weight W (out, in) stand two thin matrices, A (rank, in) and
B (out, rank), and the layer computes

    y = x W^T + bias + (alpha / rank) (x A^T) B^T

    lora.add(policy, rank, alpha, seed)                                      B = 0: the policy is what it was
    optimizer = AdamW([p for p in policy.parameters() if p.requires_grad])   A and B of all layers, nothing else
    with torch.no_grad(), lora.disabled(policy): ...                         the reference, without a second copy

They hang on the seven linear layers of every decoder block. The frozen weights may be bfloat16; A and B are float32, as
all that is trained. weights.save_policy writes W + (alpha / rank) B A under W's name; checkpoint.py keeps A and B.

Left out: adapters in the vision tower and the head, dropout in front of A, merging for a rollout (in bfloat16 a merge
cannot be undone, and a merged copy is what LoRA is there to save).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import Linear
from model import Policy

ALPHA = 64.0  # adapters count alpha / rank


class Adapter(nn.Module):
    """What is added to the output of one Linear: x (..., in) -> (..., out), in the dtype of x."""

    def __init__(self, linear: Linear, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        out, size = linear.weight.shape
        # U(-1/sqrt(in), 1/sqrt(in)) as in the authors' code and in peft, so that their learning rates carry over.
        a = (2 * torch.rand(rank, size, generator=generator) - 1) / math.sqrt(size)
        self.a = nn.Parameter(a.to(linear.weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)) * self.scale, self.b.to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The one matrix (out, in) that does the work of weight and adapter, in fp32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + self.scale * self.b.to(wide) @ self.a.to(wide)


def decoder_linears(policy: Policy) -> list[Linear]:
    """q, k, v, o, gate, up and down of every block, in the order of the blocks."""
    return [module for module in policy.model.layers.modules() if isinstance(module, Linear)]


def add(policy: Policy, rank: int, alpha: float, seed: int) -> None:
    """Freeze every weight of the policy and hang a fresh adapter on each Linear of its decoder blocks."""
    generator = torch.Generator().manual_seed(seed)
    policy.requires_grad_(False)
    for linear in decoder_linears(policy):
        linear.adapter = Adapter(linear, rank, alpha / rank, generator)


@contextmanager
def disabled(policy: Policy) -> Iterator[None]:
    """Take the adapters off, and hang them back on the way out, also after an exception.

    Inside, the policy is the frozen one bit for bit, and has no parameter that wants a gradient.
    """
    held = [(linear, linear.adapter) for linear in decoder_linears(policy)]
    try:
        for linear, _ in held:
            linear.adapter = None
        yield
    finally:
        for linear, adapter in held:
            linear.adapter = adapter


def rank_of(tensors: dict[str, Tensor]) -> int:
    """The rank of adapters by their named tensors, as Policy.adapters() gives them; 0 if there are none."""
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".adapter.a")), 0)
