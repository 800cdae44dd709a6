"""IoU and GIoU of aligned boxes: the Triton kernel and the PyTorch reference, equal to the last bit.

The naive formula, for boxes that are boxes (GIoU: Rezatofighi et al., arXiv 1902.09630):

    IoU = |A and B| / |A or B|;    GIoU = IoU - (|hull| - |A or B|) / |hull|,  hull the smallest box around both

Boxes are half-open: [3, 3, 4, 4] is one pixel of area 1, with no "+ 1" anywhere (VLM-R1's scored 0 against itself).
Anything that is not a box (non-finite, inverted, empty) scores 0.

An IoU is compared with thresholds, and 9/20 against .45 is a tie: the GPU's usual division is off by up to 2 ulp, and a
product fused into a sum is rounded once instead of twice, so that IoU(a, b) != IoU(b, a). Hence div_rn and no fusion.
Left out: gradients (this is a reward) and all pairs (a prompt has one box).
"""

import torch
from torch import Tensor

from kernels.optional import jit, launch_options, tl, triton

# By the dtype of the sums. The kernel is about exactness and one launch instead of thirty: its traffic is nothing.
CONFIG = {
    torch.float32: dict(BLOCK=256, num_warps=4, enable_fp_fusion=False),
    torch.float64: dict(BLOCK=256, num_warps=4, enable_fp_fusion=False),
}


@jit
def _halves(x, BLOCK: tl.constexpr):
    """(BLOCK, 4) -> its first and its last two columns, (BLOCK, 2) each."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK, 2, 2]), [0, 2, 1]))


@jit
def _area(size):
    width, height = tl.split(size)
    return width * height


@jit
def _divide(x, y):
    """Rounded to nearest. In fp64 the plain division already is, and div_rn takes fp32 only."""
    if x.dtype == tl.float32:
        return tl.math.div_rn(x, y)
    else:
        return x / y


@jit
def iou_kernel(A, B, OUT, N, GIOU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK pairs per program. A, B (N, 4) contiguous, OUT (N,), all of one dtype, in which everything is computed."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < N
    corner = pair[:, None] * 4 + tl.arange(0, 4)[None, :]  # a box is one 16-byte load
    low_a, high_a = _halves(tl.load(A + corner, mask=inside[:, None], other=0.0), BLOCK)  # (BLOCK, 2) each
    low_b, high_b = _halves(tl.load(B + corner, mask=inside[:, None], other=0.0), BLOCK)
    size_a, size_b = high_a - low_a, high_b - low_b
    area_a, area_b = _area(size_a), _area(size_b)
    inner = _area(tl.maximum(tl.minimum(high_a, high_b) - tl.maximum(low_a, low_b), 0.0))
    hull = _area(tl.maximum(high_a, high_b) - tl.minimum(low_a, low_b))
    union = area_a + area_b - inner
    value = _divide(inner, union)
    if GIOU:
        value = value - _divide(tl.maximum(hull - union, 0.0), hull)
    # As in the reference: NaN fails every comparison, and the hull is infinite if anything is.
    width_a, height_a = tl.split(size_a)
    width_b, height_b = tl.split(size_b)
    boxes = (width_a > 0) & (height_a > 0) & (width_b > 0) & (height_b > 0)
    boxes &= (area_a > 0) & (area_b > 0) & (hull < float("inf"))
    tl.store(OUT + pair, tl.where(boxes, value, 0.0), mask=inside)


def result_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def triton_iou(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    """a, b (N, 4) of any dtype and strides -> (N,)."""
    dtype = result_dtype(a, b)
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    out = a.new_empty(len(a))
    if len(a):
        config = launch_options(CONFIG[dtype])
        with torch.cuda.device_of(a):
            iou_kernel[(triton.cdiv(len(a), config["BLOCK"]),)](a, b, out, len(a), GIOU=giou, **config)
    return out


def reference_iou(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    """triton_iou in PyTorch."""
    dtype = result_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]  # (N, 2)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)  # (N,)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)  # (N,)
    area_a, area_b = size_a.prod(1), size_b.prod(1)
    union = area_a + area_b - inner
    value = inner / union
    if giou:
        value = value - (hull - union).clamp(min=0) / hull  # clamp: GIoU <= IoU also where hull == union rounds apart
    # NaN fails every comparison. Areas are compared as well as sides, since two tiny sides can multiply to 0. The hull
    # is no smaller than either area, so it is infinite if one of them is.
    boxes = ((size_a > 0) & (size_b > 0)).all(1) & (area_a > 0) & (area_b > 0) & (hull < torch.inf)
    return value.where(boxes, 0.0)
