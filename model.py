"""Qwen2.5-VL in plain PyTorch: vision tower, M-RoPE, grouped-query decoder, shared prefix, generation, log-probs.

Architecture: Qwen2.5-VL (arXiv 2502.13923); tensor names, numerics and files are those of the published checkpoints, so
that transformers and vLLM load what we save. The tests hold it equal to transformers' own implementation.

The PREFIX is the heart. The G completions of a group answer one image and one question, so these are computed once:

    prefix      = policy.prefix(collate(prompts))                     vision tower and prompt, keys and values kept
    completions = policy.generate(prefix, group_size, ...)            decodes B * G rows on top of it, no gradient
    logp        = policy.logprobs(prefix, completions.ids, lengths)   with gradient, which flows on into the prefix

A group costs P + G * R tokens instead of G * (P + R), and one vision pass instead of G. `full_logprobs` is the naive
equivalent that repeats every prompt G times; the tests hold the two equal in values and in every gradient.

Precision: a module computes in the dtype of the activations it is given and casts its weights to it, so one set of fp32
master weights serves a bf16 forward. Norms, rotary angles and log-softmax are fp32 at least.

Left out: video, sliding-window text attention (no published Qwen2.5-VL uses it), dropout, tensor parallelism.
"""

import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import errors
import kernels
import ranks
from errors import InputError, one_line
from generate import Completions, generate

HEAD_ROWS = (
    1024  # rows of the vocabulary head computed at a time: [1024, 151936] in bf16 is 0.3 GB, all rows would be 10
)
SHARD_BYTES = 5 * 10**9  # size of one file of a saved checkpoint, as the hub has it

# What belongs to a checkpoint beside weights and config.json, and is carried on from folder to folder as it is.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json added_tokens.json "
    "chat_template.json chat_template.jinja preprocessor_config.json video_preprocessor_config.json "
    "processor_config.json generation_config.json"
).split()


# ------------------------------------------------------------------------------------------------------- configuration

# Modules are made one by one and sizes are multiplied before any weight is looked at: layers without a bound would take
# hours, and a product beyond 64 bits is no tensor. Far above what there is (the 72B: 80 layers, 152064 tokens).
MOST = dict.fromkeys(("num_hidden_layers", "depth", "patch_size"), 256)
MOST |= dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "in_channels"), 16)
MOST_ELSE = 2**22


def short(value) -> str:
    """A value of a file's for a message: one line of at most 80 characters, whatever its size and depth."""
    return reprlib.repr(value)[:80]


def listed(value):
    """A list as a tuple, which can be hashed; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int  # = hidden size of the decoder
    # What the published 32B leaves out of its config.json, since these are the values of every size:
    depth: int = 32
    num_heads: int = 16
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks where a patch sees its whole image, not a window
    window_size: int = 112  # pixels of the model frame
    patch_size: int = 14
    spatial_merge_size: int = 2  # 2 x 2 patches become one token of the decoder
    temporal_patch_size: int = 2
    in_channels: int = 3


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

    def __post_init__(self):
        vision = self.vision
        for prefix, config in {"": self, "vision_config.": vision}.items():
            for field in fields(config):
                value, most = getattr(config, field.name), MOST.get(field.name, MOST_ELSE)
                if field.type in (int, "int") and (type(value) is not int or value < (field.name != "image_token_id")):
                    raise ValueError(f"{prefix}{field.name} is {short(value)}, a whole number above 0 is needed")
                if field.type in (int, "int") and value > most:
                    raise ValueError(f"{prefix}{field.name} is {short(value)}, at most {most} is possible here")
        for name, (least, most) in {"rms_norm_eps": (0, 1), "rope_theta": (1, 1e12)}.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not least < value < most:
                raise ValueError(f"{name} is {short(value)}, a number between {least} and {most:g} is needed")
        heads = (self.hidden_size, self.num_attention_heads), (self.num_attention_heads, self.num_key_value_heads)
        for whole, part in (*heads, (vision.hidden_size, vision.num_heads)):
            if whole % part:
                raise ValueError(f"{whole} cannot be split into {part} heads")
        if vision.hidden_size // vision.num_heads % 4:  # row and column turn pairs of numbers
            raise ValueError(f"vision_config.hidden_size {vision.hidden_size}: a head of it must be a multiple of 4")
        section = self.mrope_section
        whole = isinstance(section, list | tuple) and all(type(n) is int and n >= 0 for n in section)
        if not whole or len(section) != 3 or sum(section) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {short(section)} must be 3 whole numbers with the sum {self.head_dim // 2}, half of a "
                f"head's {self.head_dim}"
            )
        if self.image_token_id >= self.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is none of vocab_size {self.vocab_size} tokens")
        if vision.out_hidden_size != self.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size {self.hidden_size}"
            )
        if vision.in_channels != 3:
            raise ValueError(f"vision_config.in_channels is {vision.in_channels}, pictures have 3")
        unit = vision.patch_size * vision.spatial_merge_size
        if vision.window_size < unit:
            raise ValueError(f"vision_config.window_size {vision.window_size} is less than a token's {unit} pixels")
        blocks = vision.fullatt_block_indexes
        if not isinstance(blocks, list | tuple) or not all(type(i) is int and i >= 0 for i in blocks):
            raise ValueError(f"vision_config.fullatt_block_indexes {short(blocks)} must be a list of whole numbers")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Read a config.json: flat as published (rope_scaling mrope) or nested as transformers 5 writes it."""
        source = one_line(source)
        if raw.get("model_type") != "qwen2_5_vl":
            kind = short(raw.get("model_type"))
            raise InputError(f"{source}: model_type is {kind}, only 'qwen2_5_vl' is implemented here.")

        def part(whole: dict, *names: str) -> dict:
            """The first of these that is given."""
            name = next((name for name in names if whole.get(name) is not None), names[0])
            if not isinstance(whole.get(name, {}), dict | None):
                raise InputError(f"{source}: {name} is {short(whole[name])}, an object is needed; is it as published?")
            return whole.get(name) or {}

        text, vision = part(raw, "text_config") or raw, part(raw, "vision_config")
        rope = part(text, "rope_parameters", "rope_scaling")
        if (kind := rope.get("rope_type", rope.get("type", "mrope"))) not in ("mrope", "default"):
            raise InputError(
                f"{source}: rope type {short(kind)} is not implemented, only Qwen2.5-VL's plain M-RoPE is."
            )
        for name, whole in {"": text, "vision_config.": vision}.items():
            if whole.get("hidden_act", "silu") != "silu":
                raise InputError(
                    f"{source}: {name}hidden_act is {short(whole['hidden_act'])}, only 'silu' is implemented."
                )
        tied = [whole["tie_word_embeddings"] for whole in (raw, text) if whole.get("tie_word_embeddings") is not None]
        if not all(type(value) is bool for value in tied):
            raise InputError(f"{source}: tie_word_embeddings is {short(tied[0])}, true or false is needed.")
        theta = next((t for t in (rope.get("rope_theta"), text.get("rope_theta")) if t is not None), 1e6)
        if text.get("use_sliding_window"):
            raise InputError(f"{source}: use_sliding_window is true; sliding-window attention is not implemented.")
        if "quantization_config" in raw:
            raise InputError(f"{source}: has a quantization_config; take the checkpoint that is not quantised.")
        try:
            return cls(
                **{key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
                **{key: text[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")},
                rope_theta=theta,
                mrope_section=listed(rope.get("mrope_section", (16, 24, 24))),
                tie_word_embeddings=any(tied),
                image_token_id=raw["image_token_id"],
                max_position_embeddings=text.get("max_position_embeddings", 32768),
                vision=VisionConfig(
                    **{
                        f.name: listed(vision[f.name])
                        for f in fields(VisionConfig)
                        if f.name in vision or f.default is MISSING
                    }
                ),
            )
        except KeyError as missing:
            raise InputError(f"{source}: field {missing} is missing; is this a Qwen2.5-VL checkpoint?") from None
        except ValueError as error:
            raise InputError(f"{source}: a field has the wrong type ({error}); is it as published?") from None


# -------------------------------------------------------------------------------------------------------- small pieces


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


# -------------------------------------------------------------------------------------------------------- vision tower


@dataclass(frozen=True)
class VisionLayout:
    """Where every patch of a batch of images stands, so that attention needs neither masks nor padding.

    Images of equal grid are neighbours, and inside an image windows of equal size are neighbours: each attention is
    then a few plain calls on slices. `order` and `inverse` permute units (2 x 2 patches, one decoder token each).
    """

    order: Tensor  # (M,) our k-th unit is unit order[k] of the images as given
    inverse: Tensor  # (M,) and back
    places: Tensor  # (N, 2) row and column of each patch, in our order
    groups: list[
        tuple[int, int, list[tuple[int, int, int]]]
    ]  # (images, patches each, windows: (offset, count, length))

    @staticmethod
    @lru_cache(maxsize=256)
    def of(grids: tuple[tuple[int, int], ...], window: int, merge: int, device: torch.device) -> "VisionLayout":
        """grids: (rows, columns) of each image, in patches; window: side of a window, in units."""
        first_unit = [0]
        for rows, columns in grids:
            first_unit.append(first_unit[-1] + rows * columns // merge**2)
        order, places, groups = [], [], []
        for grid in dict.fromkeys(grids):  # each distinct grid, in order of appearance
            rows, columns = grid[0] // merge, grid[1] // merge  # in units
            r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            r, c = r.flatten(), c.flatten()
            name = r // window * (columns // window + 1) + c // window  # which window a unit is in
            size = torch.bincount(name)[name]  # and how many units that window holds: fewer at the lower and right edge
            units = torch.argsort(size * (name.max() + 1) + name, stable=True)
            images = [i for i, g in enumerate(grids) if g == grid]
            order += [first_unit[i] + units for i in images]
            inside = torch.stack(torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij"), -1).view(
                -1, 2
            )
            place = (torch.stack((r, c), -1)[units] * merge)[:, None] + inside  # (units, 4, 2)
            places += [place.view(-1, 2)] * len(images)
            windows, offset = [], 0
            for length, units_of_that in zip(*torch.unique(size, return_counts=True), strict=True):
                count = int(units_of_that) // int(length)
                windows.append((offset, count, int(length) * merge**2))
                offset += int(units_of_that) * merge**2
            groups.append((len(images), grid[0] * grid[1], windows))
        order = torch.cat(order)
        inverse = torch.argsort(order)
        return VisionLayout(order.to(device), inverse.to(device), torch.cat(places).to(device), groups)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: list, full: bool) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # each (N, heads, D)
        qkv = torch.stack((rotate(q, cos, sin), rotate(k, cos, sin), v))  # (3, N, heads, D)
        outs, start = [], 0
        for images, patches, windows in groups:
            group = qkv[:, start : start + images * patches].view(3, images, patches, self.heads, -1)
            start += images * patches
            parts = []
            for offset, count, length in [(0, 1, patches)] if full else windows:
                part = group[:, :, offset : offset + count * length].reshape(3, images * count, length, self.heads, -1)
                out = F.scaled_dot_product_attention(*part.transpose(2, 3).unbind(0))  # (images * count, heads, l, D)
                parts.append(out.transpose(1, 2).reshape(images, count * length, -1))
            outs.append(torch.cat(parts, dim=1).flatten(0, 1))
        return self.proj(torch.cat(outs))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.hidden_size, 1e-6), RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: list, full: bool) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, groups, full)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The published weight is that of a Conv3d whose stride is its kernel: on patches that is one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, *kernel))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1).to(patches.dtype))


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.inner = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(Linear(self.inner, self.inner), nn.GELU(), Linear(self.inner, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.inner))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, grids: tuple[tuple[int, int], ...], checkpointing: bool = False) -> Tensor:
        """patches (N, C * 2 * 14 * 14) of all images, unit by unit; grids in patches -> (N / 4, H) tokens."""
        config = self.config
        unit = config.spatial_merge_size**2
        window = config.window_size // config.patch_size // config.spatial_merge_size
        layout = VisionLayout.of(grids, window, config.spatial_merge_size, patches.device)
        head_dim = config.hidden_size // config.num_heads
        angles = layout.places[..., None] * rotary_frequencies(head_dim // 2, 1e4, patches.device)  # (N, 2, D/4)
        cos, sin = turns(angles.flatten(1)[:, None])  # (N, 1, D): frequencies turned by the row, then by the column

        x = self.patch_embed(patches.view(-1, unit, patches.shape[-1])[layout.order].flatten(0, 1))  # (N, hidden)
        for i, block in enumerate(self.blocks):
            full = i in config.fullatt_block_indexes
            x = recomputed(block, x, cos, sin, layout.groups, full, when=checkpointing)
        return self.merger(x)[layout.inverse]


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
    grids: tuple[tuple[int, int], ...]  # rows and columns of each image, in patches
    order: Tensor  # (B,) the b-th row is prompt order[b] of the caller
    host_ids: Tensor | None = None  # (B, P) ids where they came from, the CPU: counted there, nobody waits for a GPU


def collate(prompts: list, device: torch.device | str = "cpu") -> PromptBatch:
    """Batch data.Prompt objects: ids (P,), positions (3, P), next_position, patches (n, 1176), grid (1, rows, cols),
    image_tokens (n / 4, H) or None."""
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
        grids=tuple((int(p.grid[1]), int(p.grid[2])) for p in rows),
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
        self.compute_dtype = torch.float32  # of activations; --dtype sets it
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
        """(N / 4, H) image tokens of all prompts, in the batch's order: what see() kept, or the vision tower's."""
        if batch.image_tokens is not None:
            return batch.image_tokens
        return self.visual(batch.patches.to(self.compute_dtype), batch.grids, self.checkpointing)

    def embed_prompts(self, batch: PromptBatch) -> Tensor:
        """(B, P, H) text and, in its places, image tokens. ValueError unless there are as many of these as places:
        masked_scatter would take the first ones, and the policy would see parts of pictures in wrong places."""
        tokens, image = self.look(batch), self.config.image_token_id  # images stand in the order of their prompts
        if batch.host_ids is not None and (places := int((batch.host_ids == image).sum())) != len(tokens):
            raise ValueError(
                f"the prompts have places for {places} image tokens, but their pictures make {len(tokens)}"
            )
        return self.embed(batch.ids).masked_scatter((batch.ids == image)[..., None], tokens)

    @torch.no_grad()
    def see(self, prompts: list) -> None:
        """Let a frozen vision tower look once: its tokens stay with the prompts, and prefix() takes them from there.

        For all policies that share the tower's weights and the dtype of the arithmetic, whatever becomes of their
        decoders. Does nothing if the tower is trained. Costs n / 4 * H numbers an image on the device while the prompt
        lives: of a 3B model in bf16 a fifth of what its patches take.
        """
        if any(parameter.requires_grad for parameter in self.visual.parameters()):
            return
        batch = collate(prompts, self.head_weight.device)
        counts = [rows * columns // self.config.vision.spatial_merge_size**2 for rows, columns in batch.grids]
        for place, tokens in zip(batch.order.tolist(), self.look(batch).split(counts), strict=True):
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

    def full_logprobs(self, batch: PromptBatch, ids: Tensor, lengths: Tensor, temperature: float = 1.0) -> Tensor:
        """The naive equivalent of logprobs(prefix(batch), ...): one full row per completion, nothing shared."""
        order = batch.order.to(ids.device)
        out = torch.zeros(ids.shape, dtype=torch.promote_types(self.compute_dtype, torch.float32), device=ids.device)
        prompts = self.embed_prompts(batch)
        for row, caller in enumerate(order.tolist()):
            p = batch.lengths[row]
            for member in range(ids.shape[1]):
                n = int(lengths[caller, member])
                tokens = ids[caller, member, :n]
                x = torch.cat((prompts[row, :p], self.embed(tokens)))[None]  # (1, p + n, H)
                text = (batch.next_position[row] + torch.arange(n, device=ids.device)).expand(3, -1)
                cos, sin = self.rotary(torch.cat((batch.positions[:, row, :p], text), dim=1)[:, None])
                for layer in self.model.layers:
                    x, _, _ = recomputed(layer.prefix, x, cos, sin, when=self.checkpointing)
                logits = self.logits(self.model.norm(x[0, p - 1 : p + n - 1]))
                logp = kernels.token_logprob(logits, tokens, temperature)
                out[caller, member, :n] = logp
        return out

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

    # --------------------------------------------------------------------------------------------------------- on disk

    @classmethod
    def from_folder(cls, folder: str | Path, device: torch.device | str = "cpu", dtype=torch.float32) -> "Policy":
        """Load a Hugging Face folder: config.json and model.safetensors, or shards and their index. Refuses others.

        One tensor after the other is copied and converted, and a shard is let go before the next one is opened: host
        memory holds the policy (nothing of it if device is another) and at most one shard.
        """
        folder = Path(folder)
        raw = read_json(folder / "config.json")
        config = ModelConfig.from_dict(raw, str(folder / "config.json"))
        eos_ids, files = read_eos_ids(folder, raw), checkpoint_files(folder)
        if max(eos_ids) >= config.vocab_size:
            raise InputError(
                f"{one_line(folder)}: eos_token_id {short(max(eos_ids))} is none of {config.vocab_size} tokens."
            )
        for name in COMPANIONS:  # else save_folder, at the end of a run, is the first to meet it
            if os.path.lexists(folder / name) and not os.path.isfile(folder / name):
                raise InputError(f"{one_line(folder / name)}: is not a file; restore it from its checkpoint.")
        with torch.device("meta"):
            policy = cls(config, eos_ids)
        wanted = dict(policy.named_parameters())
        found = set()
        for path in files:
            file = one_line(path)
            try:
                with safe_open(path, framework="pt") as tensors:
                    for key in tensors.keys():
                        name, shown = published_name(key), one_line(key)
                        if name == "lm_head.weight" and policy.config.tie_word_embeddings:
                            continue  # some exporters write the tied head twice
                        if name not in wanted:
                            raise InputError(
                                f"{file}: tensor {shown} is not one of Qwen2.5-VL's; is this another model?"
                            )
                        if name in found:
                            raise InputError(f"{file}: tensor {shown} is there a second time; which one is meant?")
                        if (kind := tensors.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                            raise InputError(
                                f"{file}: tensor {shown} is of type {kind}; weights must be floating point."
                            )
                        tensor = tensors.get_tensor(key)  # still in the file: read when it is copied
                        if tensor.shape != wanted[name].shape:
                            shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(wanted[name].shape)}"
                            raise InputError(f"{file}: tensor {shown} has shape {shapes}.")
                        module = policy.get_submodule(name.rpartition(".")[0])
                        weight = nn.Parameter(tensor.to(device, dtype, copy=True))  # no weight hangs on the open file
                        setattr(module, name.rpartition(".")[2], weight)
                        found.add(name)
            except SafetensorError as error:
                why = errors.cause_of(error)
                raise InputError(
                    f"{file}: not a readable safetensors file ({why}); was the download cut off?"
                ) from None
        if missing := sorted(wanted.keys() - found):
            raise InputError(f"{one_line(folder)}: {len(missing)} tensors are missing, the first is {missing[0]}.")
        policy.source, policy.raw_config = folder, raw
        return policy

    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapters' own tensors by name (lora.py). Published checkpoints have none, nor has save_folder's."""
        return {name: parameter for name, parameter in self.named_parameters() if ".adapter." in name}

    @torch.no_grad()
    def published(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Published names and tensors, on the CPU: an adapter is in the weight that it hangs on."""
        linears = {f"{path}.weight": module for path, module in self.named_modules() if isinstance(module, Linear)}
        for name, parameter in self.named_parameters():
            if ".adapter." in name:
                continue
            adapter = linears[name].adapter if name in linears else None
            tensor = ranks.whole(parameter if adapter is None else adapter.merged(parameter))
            yield name, tensor.detach().to("cpu", dtype or parameter.dtype).contiguous()

    def save_folder(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a Hugging Face folder that transformers, vLLM and from_folder load: weights, config, and the companions
        of the folder this policy came from (tokenizer, preprocessor, generation config). One shard after the other goes
        through host memory. Rank 0 writes; of a sharded policy all ranks must ask for it."""
        tensors = self.published(dtype)
        try:
            if ranks.rank == 0:
                self._write_folder(Path(folder), dtype, tensors)
        finally:
            for _ in tensors:  # of which the other ranks have parts, also if the disk was full
                pass

    def _write_folder(self, folder: Path, dtype: torch.dtype | None, tensors: Iterator[tuple[str, Tensor]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[list[str]] = [[]]
        size = total = 0
        for name, parameter in self.named_parameters():
            if ".adapter." in name:
                continue
            nbytes = parameter.numel() * (dtype or parameter.dtype).itemsize
            if shards[-1] and size + nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
            total += nbytes
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            where = {key: file for shard, file in zip(shards, names, strict=True) for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        for shard, file in zip(shards, names, strict=True):
            save_file(dict(islice(tensors, len(shard))), folder / file, metadata={"format": "pt"})
        dtype_name = str(dtype or next(self.parameters()).dtype).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in self.raw_config else "dtype"
        (folder / "config.json").write_text(json.dumps(self.raw_config | {key: dtype_name}, indent=2) + "\n")
        for name in COMPANIONS:
            if self.source and (self.source / name).exists() and self.source.resolve() != folder.resolve():
                shutil.copyfile(self.source / name, folder / name)


def check_device(name: str) -> str:
    """The device if tensors can be made there. InputError else."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are supported")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = f"{str(error).splitlines()[0]:.80}"
        raise InputError(f"--device {name} is not to be had here ({why}); use --device cpu") from None
    return name


def read_json(file: Path) -> dict:
    """A JSON file that holds an object. InputError else."""
    if not os.path.lexists(file):
        raise InputError(
            f"{one_line(file)} does not exist; --model wants a folder of a Qwen2.5-VL checkpoint or 'nano', "
            "or org/name of the Hugging Face Hub."
        )
    value = errors.read_json(file, "restore it from where it came")
    if not isinstance(value, dict):
        raise InputError(f"{one_line(file)}: a JSON object was expected, not {type(value).__name__}.")
    return value


def read_eos_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """EOS ids of the generation config if there is one (Qwen has two: end of turn, end of text), else of the config."""
    file = folder / "generation_config.json"
    generation = read_json(file) if os.path.lexists(file) else {}
    sources = (generation, raw, raw.get("text_config") or {})
    eos = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), None)
    if eos is None:
        raise InputError(f"{one_line(folder)}: neither generation_config.json nor config.json has eos_token_id.")
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{one_line(folder)}: eos_token_id must be a token's id or a list of them, not {short(eos)}.")
    return ids


def published_name(name: str) -> str:
    """A tensor's name in the published files. Some frameworks save the names that transformers has in memory."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, all of which exist."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if os.path.lexists(index):
        where = read_json(index).get("weight_map")
        files = list(where.values()) if isinstance(where, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            raise InputError(
                f"{one_line(index)}: field 'weight_map' must say which file of the folder each tensor is in."
            )
        names = sorted(set(where.values()))
    for name in names:
        if not os.path.isfile(folder / name):  # a pipe or a device would be waited for
            what = "is not a file" if os.path.lexists(folder / name) else "does not exist"
            raise InputError(f"{one_line(folder / name)} {what}; the checkpoint is not whole.")
    return [folder / name for name in names]
