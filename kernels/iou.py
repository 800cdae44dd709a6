"""IoU and GIoU of aligned boxes: the PyTorch reference (the Triton kernel will stand beside it).

The naive formula, for boxes that are boxes (GIoU: Rezatofighi et al., arXiv 1902.09630):

    IoU = |A and B| / |A or B|;    GIoU = IoU - (|hull| - |A or B|) / |hull|,  hull the smallest box around both

Boxes are half-open: [3, 3, 4, 4] is one pixel of area 1, with no "+ 1" anywhere (VLM-R1's scored 0 against itself).
Anything that is not a box (non-finite, inverted, empty) scores 0.
Left out: gradients (this is a reward) and all pairs (a prompt has one box).
"""

import torch
from torch import Tensor


@torch.no_grad()
def reference(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    """The arithmetic of kernels.box_iou in PyTorch."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
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
