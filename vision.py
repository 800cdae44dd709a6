"""Qwen2.5-VL's vision tower (arXiv 2502.13923): patches -> image tokens, windowed attention with a few full blocks.

Tensor names, numerics and shapes are those of the published checkpoints; weights.py reads them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import Linear, RMSNorm, SwiGLU, recomputed, rotary_frequencies, rotate, turns


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
    tokens_per_second: int = 2  # positions of M-RoPE; the tower itself knows no time


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
        """patches (N, C * 2 * 14 * 14) of all images, unit by unit; grids in patches -> (N / 4, H) tokens. A clip's are
        images of their own, as in Qwen's: no patch sees another time."""
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
