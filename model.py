"""Qwen2.5-VL in plain PyTorch: M-RoPE, grouped-query decoder, shared prefix, log-probs.

Architecture: Qwen2.5-VL (arXiv 2502.13923); tensor names, numerics and files are those of the published checkpoints, so
that transformers and vLLM load what we save. The tests hold it equal to transformers' own implementation.

The PREFIX is the heart. The G completions of a group answer one image and one question, so these are computed once:

    prefix      = policy.prefix(collate(prompts))                     vision tower and prompt, keys and values kept
    completions = policy.generate(prefix, group_size, ...)            decodes B * G rows on top of it, no gradient
    logp        = policy.logprobs(prefix, completions.ids, lengths)   with gradient, which flows on into the prefix

A group costs P + G * R tokens instead of G * (P + R), and one vision pass instead of G. The naive equivalent,
which repeats every prompt G times, is tests/full_rows.py; the tests hold the two equal in values and in every gradient.

Precision: a module computes in the dtype of the activations it is given and casts its weights to it, so one set of fp32
master weights serves a bf16 forward. Norms, rotary angles and log-softmax are fp32 at least.

Left out: sliding-window text attention (no published Qwen2.5-VL uses it), dropout, tensor parallelism.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import kernels
from errors import InputError
from generate import Completions, generate
from layers import Linear, RMSNorm, SwiGLU, recomputed, rotary_axes, rotary_frequencies, rotate, scores, turns
from vision import VisionConfig, VisionTower

# Rows of the vocabulary head computed at a time: [1024, 151936] in bf16 is 0.3 GB, all rows would be 10.
HEAD_ROWS = 1024


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int  # rows of the embedding, more than the tokenizer has
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # rotary frequencies turned by the (temporal, row, column) position
    tie_word_embeddings: bool
    image_token_id: int
    max_position_embeddings: int
    vision: VisionConfig
    video_token_id: int = -1  # -1: config.json says none, so there are no clips

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# ------------------------------------------------------------------------------------------------------------- decoder


def spans_of(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring prompts of equal length: (first, last + 1, length)."""
    starts = [i for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
    return [(a, b, lengths[a]) for a, b in zip(starts, starts[1:] + [len(lengths)], strict=True)]


def last_tokens(x: Tensor, spans: list) -> Tensor:
    """x (B, ..., P, D), right-padded -> (B, ..., 1, D) at the last real token of each prompt."""
    return torch.cat([x[a:b, ..., n - 1 : n, :] for a, b, n in spans])


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, S, H) -> q (N, heads, S, D), k and v (N, kv_heads, S, D), rotated."""
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal, aligned at the end: the last query sees every key. q (N, heads, S, D), k, v (N, kv_heads, L, D)."""
        mask = None if q.shape[2] == k.shape[2] else causal_lower_right(q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)  # (N, S, heads * D)

    def prefix(self, x: Tensor, cos: Tensor, sin: Tensor, spans: list | None) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts, right-padded: no real token sees a pad, so plain causal attention is right at every length.
        With spans only the last token of each prompt looks (B, 1, H); keys and values are those of all."""
        if spans is None:
            q, k, v = self.project(x, cos, sin)
            return self.o_proj(self.attend(q, k, v)), k, v
        k, v = rotate(self.split_heads(self.k_proj(x)), cos, sin), self.split_heads(self.v_proj(x))
        q = rotate(
            self.split_heads(self.q_proj(last_tokens(x, spans))), last_tokens(cos, spans), last_tokens(sin, spans)
        )
        outs = [self.attend(q[a:b], k[a:b, :, :n], v[a:b, :, :n]) for a, b, n in spans]
        return self.o_proj(torch.cat(outs)), k, v

    def suffix(self, x: Tensor, cos: Tensor, sin: Tensor, pk: Tensor, pv: Tensor, spans: list) -> Tensor:
        """Completions x (B * G, S, H) over prefixes pk, pv (B, kv_heads, P, D): one call per span of equal prompts."""
        q, k, v = self.project(x, cos, sin)
        group = len(x) // len(pk)
        outs = []
        for first, last, length in spans:  # prompts first..last-1 have `length` real tokens
            rows = slice(first * group, last * group)

            def joined(prefix, suffix, first=first, last=last, length=length, rows=rows):
                shared = prefix[first:last, None, :, :length].expand(
                    -1, group, -1, -1, -1
                )  # a view: G share one prefix
                return torch.cat((shared, suffix[rows].unflatten(0, (-1, group))), dim=3).flatten(0, 1)

            outs.append(self.attend(q[rows], joined(pk, k), joined(pv, v)))
        return self.o_proj(torch.cat(outs))

    def decode(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        pk: Tensor,
        pv: Tensor,
        k: Tensor,
        v: Tensor,
        at: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """One token per row, x (B * G, H). pk, pv (B * kv_heads, P, D): what the G rows of a prompt share; k, v
        (B * kv_heads * G, T, D): their own, written here at place `at` (1,); bias (B * kv_heads, 1, P + places) hides
        places of the prompt and of the first ones of T."""
        p, d = pk.shape[1:]
        b, places = len(pk) // self.kv_heads, bias.shape[-1] - p
        grid = (b, len(x) // b, self.kv_heads, -1, d)  # r query heads share a key head
        q, new_k, new_v = (proj(x).view(grid).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, new_k = rotate(torch.cat((q, new_k), dim=3), cos, sin).split((q.shape[3], 1), dim=3)
        for cache, new in ((k, new_k), (v, new_v)):  # new (B, kv_heads, G, 1, D)
            cache.view(*new.shape[:3], -1, d).index_copy_(3, at, new)
        q = q.reshape(len(pk), -1, d)  # (B * kv_heads, G * r, D)
        own = scores(q.view(len(k), -1, d), k[:, :places]).view(len(pk), -1, places)
        seen = torch.cat((scores(q, pk), own), dim=-1)  # (B * kv_heads, G * r, P + places)
        weights = torch.add(bias, seen, alpha=d**-0.5).softmax(-1).to(x.dtype)
        out = torch.bmm(weights[..., :p], pv).view(len(k), -1, d)
        out = torch.baddbmm(out, weights[..., p:].view(len(k), -1, places), v[:, :places])
        return self.o_proj(out.view(*new_v.shape[:3], -1, d).transpose(1, 2).reshape(len(x), -1))


class Block(nn.Module):
    """One decoder layer. It takes and returns plain tensors, whichever of the three attentions it is asked for."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def prefix(self, x: Tensor, cos: Tensor, sin: Tensor, spans: list | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All prompts x (B, P, H) -> x of the next layer, keys, values. With spans, as the last layer of a prefix: of x
        only each prompt's last token (B, 1, H), since from there on nobody reads the others."""
        attended, k, v = self.self_attn.prefix(self.input_layernorm(x), cos, sin, spans)
        return self.finish(x if spans is None else last_tokens(x, spans), attended), k, v

    def suffix(self, x: Tensor, cos: Tensor, sin: Tensor, pk: Tensor, pv: Tensor, spans: list) -> Tensor:
        return self.finish(x, self.self_attn.suffix(self.input_layernorm(x), cos, sin, pk, pv, spans))

    def decode(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.finish(x, self.self_attn.decode(self.input_layernorm(x), *rest))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# -------------------------------------------------------------------------------------------------------------- policy


@dataclass
class PromptBatch:
    """B prompts, shortest first (then prompts of equal length are neighbours), right-padded to the longest."""

    ids: Tensor  # (B, P)
    positions: Tensor  # (3, B, P) M-RoPE: temporal, row, column
    next_position: Tensor  # (B,) where each completion's text positions go on
    lengths: list[int]  # (B,) real tokens of each, ascending
    patches: Tensor | None  # (N, C * 2 * 14 * 14), fp32; None: all images are in image_tokens
    image_tokens: Tensor | None  # (N / 4, H), of a frozen vision tower that has seen all of them; else None
    grids: tuple[tuple[int, int], ...]  # rows and columns of each image, in patches; a clip is grid[0] images
    order: Tensor  # (B,) the b-th row is prompt order[b] of the caller
    host_ids: Tensor | None = None  # (B, P) ids where they came from, the CPU: counted there, nobody waits for a GPU


def collate(prompts: list, device: torch.device | str = "cpu") -> PromptBatch:
    """Batch data.Prompt objects: ids (P,), positions (3, P), next_position, patches (n, 1176), grid (t, rows, cols),
    image_tokens (n / 4, H) or None. The vision tower sees a clip as t stills: time is the decoder's."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    rows = [prompts[i] for i in order]
    longest = len(rows[-1].ids)
    seen = all(p.image_tokens is not None for p in rows)
    ids = torch.stack([F.pad(p.ids, (0, longest - len(p.ids)), value=int(p.ids[-1])) for p in rows])
    return PromptBatch(
        ids=ids.to(device),
        positions=torch.stack([F.pad(p.positions, (0, longest - len(p.ids))) for p in rows], dim=1).to(device),
        next_position=torch.tensor([p.next_position for p in rows], device=device),
        lengths=[len(p.ids) for p in rows],
        patches=None if seen else torch.cat([p.patches for p in rows]).to(device),
        image_tokens=torch.cat([p.image_tokens for p in rows]) if seen else None,
        grids=tuple((int(p.grid[1]), int(p.grid[2])) for p in rows for _ in range(p.grid[0])),
        order=torch.tensor(order, device=device),
        host_ids=ids,
    )


@dataclass
class Prefix:
    """What a group's completions share. Rows stand in PromptBatch order; `order` leads back to the caller's."""

    keys: list[Tensor]  # per layer (B, kv_heads, P, D)
    values: list[Tensor]
    hidden: Tensor  # (B, H) last hidden state of each prompt: predicts the first token of its completions
    next_position: Tensor  # (B,)
    lengths: list[int]
    order: Tensor  # (B,)


torch.export.register_dataclass(Prefix)  # FSDP looks for the tensors in it, to gather weights before their gradients


class Policy(nn.Module):
    """Qwen2.5-VL. Parameter names are the published tensor names."""

    def __init__(self, config: ModelConfig, eos_ids: tuple[int, ...] = ()):
        super().__init__()
        self.config, self.eos_ids = config, eos_ids
        self.compute_dtype = torch.float32  # of activations; bfloat16 on CUDA
        self.checkpointing = False  # compute each block again in the backward pass instead of keeping what is inside
        self.graph = False  # decode by replaying a CUDA graph
        self.source: Path | None = None  # folder it was loaded from
        self.raw_config: dict = {}  # its config.json as read, carried on when saved
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:  # (V, H)
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def room(self, max_tokens: int) -> int:
        """Tokens that a prompt may have beside a completion. InputError where the model has no position for it."""
        most = self.config.max_position_embeddings
        if most - max_tokens < 1:
            raise InputError(f"--max-tokens {max_tokens}: the model has {most} positions in all; lower it")
        return most - max_tokens

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (3, N, S) -> cos, sin (N, 1, S, D); mrope_section says which axis turns a frequency."""
        axis = rotary_axes(self.config.mrope_section, positions.device)
        frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_theta, positions.device)
        angles = positions.permute(1, 2, 0)[..., axis] * frequencies  # (N, S, D/2)
        return turns(angles[:, None])

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids).to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) normalised hidden states -> (N, V)."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def look(self, batch: PromptBatch) -> Tensor:
        """(N / 4, H) image tokens of all prompts, in the batch's order: what cache_image_tokens() kept, or the vision
        tower's."""
        if batch.image_tokens is not None:
            return batch.image_tokens
        return self.visual(batch.patches.to(self.compute_dtype), batch.grids, self.checkpointing)

    def embed_prompts(self, batch: PromptBatch) -> Tensor:
        """(B, P, H) text and, in its places, image tokens. ValueError unless there are as many of these as places:
        masked_scatter would take the first ones, and the policy would see parts of pictures in wrong places."""
        tokens = self.look(batch)  # images stand in the order of their prompts
        if batch.host_ids is not None and (places := int(self.seen(batch.host_ids).sum())) != len(tokens):
            raise ValueError(
                f"the prompts have places for {places} image tokens, but their pictures make {len(tokens)}"
            )
        return self.embed(batch.ids).masked_scatter(self.seen(batch.ids)[..., None], tokens)

    def seen(self, ids: Tensor) -> Tensor:
        """Where a token of an image or of a clip stands, bool."""
        return (ids == self.config.image_token_id) | (ids == self.config.video_token_id)

    @torch.no_grad()
    def cache_image_tokens(self, prompts: list) -> None:
        """Let a frozen vision tower look once: its tokens stay with the prompts, and prefix() takes them from there.

        For all policies that share the tower's weights and the dtype of the arithmetic, whatever becomes of their
        decoders. Does nothing if the tower is trained. Costs n / 4 * H numbers an image on the device while the prompt
        lives: of a 3B model in bf16 a fifth of what its patches take.
        """
        if any(parameter.requires_grad for parameter in self.visual.parameters()):
            return
        batch = collate(prompts, self.head_weight.device)
        order, merged = batch.order.tolist(), self.config.vision.spatial_merge_size**2
        counts = [math.prod(prompts[place].grid) // merged for place in order]
        for place, tokens in zip(order, self.look(batch).split(counts), strict=True):
            prompts[place].image_tokens = tokens

    def prefix(self, batch: PromptBatch) -> Prefix:
        """Vision tower and prompt, once per prompt. Gradients flow if they are enabled."""
        x = self.embed_prompts(batch)  # (B, P, H)
        cos, sin = self.rotary(batch.positions)
        keys, values = [], []
        for layer in self.model.layers:
            spans = spans_of(batch.lengths) if layer is self.model.layers[-1] else None
            x, k, v = recomputed(layer.prefix, x, cos, sin, spans, when=self.checkpointing)
            keys.append(k)
            values.append(v)
        return Prefix(keys, values, self.model.norm(x[:, 0]), batch.next_position, batch.lengths, batch.order)

    def logprobs(
        self, prefix: Prefix, ids: Tensor, lengths: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of completions under softmax(logits / temperature).

        ids (B, G, T), lengths (B, G), both in the caller's order of prompts -> (B, G, T) fp32, exactly 0 from a
        completion's length on; with `entropy` also the entropy of each row (B, G, T), without gradient.
        Logits exist only for real completion tokens, HEAD_ROWS rows at a time, and are recomputed in the backward pass.
        """
        order = prefix.order.to(ids.device)
        ids, lengths = ids[order], lengths[order]
        b, g, t = ids.shape
        hidden = prefix.hidden[:, None, None].expand(b, g, 1, -1).flatten(0, 1)  # predicts token 0 of all G
        if t > 1:  # token i is predicted by the hidden state of token i - 1: the last token is never an input
            x = self.embed(ids[..., :-1].flatten(0, 1))  # (B * G, T - 1, H)
            steps = torch.arange(t - 1, device=ids.device)
            positions = (prefix.next_position[:, None] + steps).repeat_interleave(g, 0)  # (B * G, T - 1)
            cos, sin = self.rotary(positions.expand(3, -1, -1))
            spans = spans_of(prefix.lengths)
            for layer, k, v in zip(self.model.layers, prefix.keys, prefix.values, strict=True):
                x = recomputed(layer.suffix, x, cos, sin, k, v, spans, when=self.checkpointing)
            hidden = torch.cat((hidden, self.model.norm(x)), dim=1)  # (B * G, T, H)
        real = torch.arange(t, device=ids.device) < lengths.flatten()[:, None]  # by position, never by token id
        flat = kernels.linear_logprob(
            hidden[real], self.head_weight, ids.flatten(0, 1)[real], temperature, HEAD_ROWS, entropy
        )
        back = torch.argsort(order)

        def grid(values: Tensor) -> Tensor:  # scatter the real tokens back and return to the caller's order
            return values.new_zeros(b * g, t).masked_scatter(real, values).view(b, g, t)[back]

        return (grid(flat[0]), grid(flat[1])) if entropy else grid(flat)

    def generate(
        self, prefix: Prefix, group_size: int, max_tokens: int, temperature: float = 0.0, uniforms: Tensor | None = None
    ) -> Completions:
        """Sample `group_size` completions of each prompt, without gradient; temperature 0 is greedy. How: generate.py.

        uniforms (B, G, max_tokens) in [0, 1), in the caller's order of prompts: one number per token, turned into it by
        the inverse of the cumulative distribution. Made from (seed, step, sample), they give the same rollouts on any
        number of ranks. No top-p, no top-k: the sampled policy is the trained one.
        """
        return generate(self, prefix, group_size, max_tokens, temperature, uniforms, self.graph)

    def idle(self) -> Tensor:
        """A scalar to call backward() on that adds nothing to any gradient: the pass that a rank makes which has no
        prompts left, where the others wait for it because the weights are sharded."""
        device, vision = next(self.parameters()).device, self.config.vision
        merged = vision.spatial_merge_size**2
        frozen = not any(parameter.requires_grad for parameter in self.visual.parameters())  # then nobody looks
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        ids = torch.tensor([[self.config.image_token_id, self.eos_ids[0]]], device=device)
        batch = PromptBatch(
            ids=ids,
            positions=torch.zeros(3, 1, 2, dtype=torch.long, device=device),
            next_position=torch.tensor([1], device=device),
            lengths=[2],
            patches=None if frozen else torch.zeros(merged, numbers, device=device),
            image_tokens=torch.zeros(1, vision.out_hidden_size, device=device).to(self.compute_dtype)
            if frozen
            else None,
            grids=((vision.spatial_merge_size,) * 2,),
            order=torch.tensor([0], device=device),
        )
        logp = self.logprobs(self.prefix(batch), ids[:, None], torch.tensor([[2]], device=device))
        return logp.sum() * 0.0

    @torch.no_grad()
    def init_weights(self, seed: int, gain: float = 0.8) -> "Policy":
        """Random weights, N(0, (gain / sqrt(fan in))^2), zero biases: a narrow policy learns several times faster from
        these than from the usual 0.02."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = gain / math.sqrt(parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapters' own tensors by name (lora.py). A saved folder has none: they are in the weights there."""
        return {name: parameter for name, parameter in self.named_parameters() if ".adapter." in name}
