"""Completions on top of a shared prefix: what one decode step does, and how it is repeated.

The G rows of a group share the keys and values of their prompt. They are neither copied nor expanded: the queries of
all G rows meet them in one matrix product, so a step reads a prompt once and not G times (Hydragen, arXiv 2402.05099),
and the cache holds P + G * T places per group instead of G * (P + T).

Everything a step reads or writes is allocated once and changed in place, and nothing in it depends on a value on the
host: so on a GPU a step can be recorded as a CUDA graph and replayed (`graph`), which takes the launch of some forty
kernels per layer and token off the host. The graph is recorded once for every WINDOW places of the cache, after one
step that ran plainly, and thrown away with the rollout: there is no state that could go stale.

Rows that have ended go on with the others until all have (their tokens are never read): a decode step costs about the
same for 16 rows as for 8, since it is bound by reading weights, or on a CPU by calling operators.

Left out: top-p, top-k, beams (the sampled policy must be the trained one), continuous batching, speculative decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import errors

STOP_EVERY = 4  # decode steps between two looks at "has every row ended?": each look makes the host wait for the device
WINDOW = 64  # a graph's attention looks at a multiple of so many completion places, written or not: shapes stay so long


@dataclass
class Completions:
    ids: Tensor  # (B, G, T) up to and including the first EOS; after it the first EOS id, which no mask ever lets in
    lengths: Tensor  # (B, G) tokens up to and including the first EOS
    truncated: Tensor  # (B, G) bool: no EOS within the limit


class Decoding:
    """N = B * G rows in the middle of being sampled; rows of a prompt are neighbours. All methods work in place."""

    def __init__(self, policy, prefix, group_size: int, max_tokens: int, temperature: float, uniforms: Tensor | None):
        b, kv_heads, p, d = prefix.keys[0].shape
        n, device = b * group_size, prefix.hidden.device
        self.policy, self.temperature, self.uniforms = policy, temperature, uniforms
        self.prefix = [[x.flatten(0, 1) for x in layer] for layer in zip(prefix.keys, prefix.values, strict=True)]
        room = (b * kv_heads * group_size, max_tokens, d)
        self.own = [(k.new_zeros(room), v.new_zeros(room)) for k, v in self.prefix]
        # Added to the scores: -inf at the padding of shorter prompts, and at completion places until they are written.
        lengths = torch.tensor(prefix.lengths, device=device).repeat_interleave(kv_heads)
        self.bias = torch.full((b * kv_heads, 1, p + max_tokens), -torch.inf, device=device)
        self.bias.masked_fill_(torch.arange(p + max_tokens, device=device) < lengths.view(-1, 1, 1), 0.0)
        # Rows of a prompt stand at the same positions: what turns them at each place (T, B, D).
        positions = prefix.next_position[:, None] + torch.arange(max_tokens, device=device)
        self.turns = [x[:, 0].transpose(0, 1).contiguous() for x in policy.rotary(positions.expand(3, -1, -1))]
        self.eos = torch.tensor(policy.eos_ids, device=device)
        self.ids = torch.full((n, max_tokens), policy.eos_ids[0], dtype=torch.long, device=device)
        self.lengths = torch.zeros(n, dtype=torch.long, device=device)
        self.alive = torch.ones(n, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # place of the token that was drawn last
        self.draw(policy.logits(prefix.hidden).repeat_interleave(group_size, 0))

    def draw(self, logits: Tensor) -> None:
        """logits (N, V) -> each living row's token at place `at`."""
        luck = None if self.uniforms is None else self.uniforms.index_select(1, self.at)[:, 0]
        token = torch.where(self.alive, sample(logits, self.temperature, luck), self.eos[0])
        self.ids.index_copy_(1, self.at, token[:, None])
        self.lengths.add_(self.alive)
        self.alive.logical_and_((token[:, None] != self.eos).all(1))

    def step(self, places: int) -> None:
        """Feed the tokens at place `at` and draw those of the next; attention looks at `places` completion places."""
        policy, p = self.policy, self.bias.shape[-1] - self.ids.shape[1]
        x = policy.embed(self.ids.index_select(1, self.at)[:, 0])  # (N, H)
        cos, sin = (x.index_select(0, self.at)[0, :, None, None, None] for x in self.turns)  # (B, 1, 1, 1, D)
        self.bias.index_fill_(-1, self.at + p, 0.0)
        bias = self.bias[..., : p + places]
        for layer, (pk, pv), (k, v) in zip(policy.model.layers, self.prefix, self.own, strict=True):
            x = layer.decode(x, cos, sin, pk, pv, k, v, self.at, bias)
        self.at.add_(1)
        self.draw(policy.logits(policy.model.norm(x)))


@torch.no_grad()
def generate(
    policy, prefix, group_size: int, max_tokens: int, temperature: float, uniforms: Tensor | None, graph: bool
) -> Completions:
    """What model.Policy.generate promises. graph: record the decode step as a CUDA graph (the prefix is on a GPU)."""
    if temperature > 0 and uniforms is None:
        raise ValueError("sampling at temperature > 0 needs uniforms (B, G, max_tokens)")
    if uniforms is not None:
        uniforms = uniforms.to(prefix.hidden.device)[prefix.order].flatten(0, 1)  # (N, max_tokens)
    window = WINDOW if graph else 1  # places that are not written yet cost time, and only a graph needs them
    with torch.inference_mode():  # on a CPU a tenth faster than no_grad: nothing is noted of the operators at all
        rows = Decoding(policy, prefix, group_size, max_tokens, temperature, uniforms)
        pool = torch.cuda.graph_pool_handle() if graph else None
        for fed in range(max_tokens - 1):
            if (fed + 1) % STOP_EVERY == 0 and (errors.asked_to_stop or not rows.alive.any()):
                break  # asked to stop: what there is will be dropped
            if fed % window == 0:
                step = partial(rows.step, min(fed + window, max_tokens))
            elif fed % window == 1 and graph:
                step = recorded(step, pool)
            step()
    longest = int(rows.lengths.max())
    back, shape = torch.argsort(prefix.order), (len(prefix.hidden), group_size)
    ids, lengths, alive = (x.unflatten(0, shape)[back] for x in (rows.ids[:, :longest], rows.lengths, rows.alive))
    return Completions(ids, lengths, alive)


def recorded(step: Callable[[], None], pool) -> Callable[[], None]:
    """step, which has run before, as a CUDA graph. Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def sample(logits: Tensor, temperature: float, uniforms: Tensor | None) -> Tensor:
    """logits (N, V), uniforms (N,) in [0, 1) -> tokens (N,). Greedy at temperature 0, else the inverse of the CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)  # (N, V)
    if torch.are_deterministic_algorithms_enabled():
        # Whole numbers of 2^-52 have the same sums in whatever order a GPU adds them up; floats do not.
        cdf = (p * 2.0**52).long().cumsum(-1).double()
    else:
        cdf = p.cumsum(-1)
    total = cdf[:, -1:]  # 1, or 2^52, up to rounding
    # Strictly below the total, and the first entry strictly above: a token of probability 0 is never drawn.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Of NaN logits the entry is V: any token will do, since the step's loss is NaN too and will be skipped.
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
