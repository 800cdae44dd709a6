"""Masks -> boxes, and boxes of the picture as stored -> boxes of the picture as displayed.

Boxes are (x1, y1, x2, y2) in pixels, half-open (x2 = last column + 1), sizes are (width, height).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import ImageOps

from errors import InputError, one_line
from images import Box, picture

# ------------------------------------------------------------------------------------------------------------- masks


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mask (H, W) bool -> boxes (K, 4) int and pixel counts (K,) of its K parts, in reading order.

    Pixels that touch at an edge or a corner belong together (8-connected). What union-find joins are the runs of each
    row, not pixels: a lesion has a few hundred, so a loop over them is quick enough.
    """
    wide = mask.shape[1] + 1
    padded = np.pad(mask, ((0, 0), (1, 1)))
    edges = np.flatnonzero(padded[:, 1:] != padded[:, :-1])  # of (H, wide): first of a run, behind it, of the next, ...
    begin, behind = edges[::2], edges[1::2]  # (R,) each, R runs in reading order; place = row * wide + column
    row, start, end = begin // wide, begin % wide, behind % wide
    # Run j touches run i of the row above if it ends at or right of i's start and begins at or left of i's end.
    first = np.searchsorted(behind, begin + wide, "left")
    last = np.searchsorted(begin, behind + wide, "right")
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for j in range(low, high):
            a, b = root(i), root(j)
            parent[max(a, b)] = min(a, b)
    _, part = np.unique([root(i) for i in range(len(row))], return_inverse=True)  # (R,) in 0 .. K - 1
    boxes = np.tile([*mask.shape[::-1], 0, 0], (part.max(initial=-1) + 1, 1))
    for column, extreme, values in ((0, np.minimum, start), (1, np.minimum, row), (2, np.maximum, end)):
        extreme.at(boxes[:, column], part, values)
    np.maximum.at(boxes[:, 3], part, row + 1)
    return boxes, np.bincount(part, end - start, len(boxes)).astype(int)


def mask_box(path: Path, threshold: int, choice: str, more: Sequence[Path] = ()) -> tuple[Box | None, int, tuple]:
    """The box of a mask file, None if it is empty; its number of parts; its size. All as displayed.

    choice, of several parts: "largest" (of equal ones the first), "union" for the box around all, "drop" for None.
    more: further masks of the same picture; what is inside of any is inside.
    """
    mask = inside(path, threshold)
    for file in more:
        other = inside(file, threshold)
        if other.shape != mask.shape:
            sizes = " and ".join(f"{m.shape[1]}x{m.shape[0]}" for m in (mask, other))
            raise InputError(f"masks of one picture, {one_line(path)} and {one_line(file)}, are of {sizes}; mend one")
        mask = mask | other
    size, (boxes, areas) = mask.shape[::-1], components(mask)
    if len(areas) == 0:
        return None, 0, size
    box = {
        "largest": boxes[areas.argmax()],
        "union": [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)],
        "drop": boxes[0] if len(areas) == 1 else None,
    }[choice]
    return None if box is None else tuple(map(int, box)), len(areas), size


def inside(path: Path, threshold: int) -> np.ndarray:
    """(H, W) bool of a mask file, as displayed: what is brighter than threshold.

    JPEG masks are not binary: dividing by the largest value and casting to integers keeps 255 alone and loses the edge,
    any value above 0 takes in the ringing around it. A mask whose values all lie below the threshold is refused.
    """
    if not os.path.isfile(path):
        raise InputError(f"the mask {one_line(path)} is not there")
    with picture(path) as mask:
        ImageOps.exif_transpose(mask, in_place=True)
        mask.load()
    gray = np.asarray(mask if mask.mode[0] in "IF" else mask.convert("L"))  # convert() would cut 16 bits off at 255
    bright = gray > threshold
    if gray.any() and not bright.any():
        hint = "--threshold 0 suits masks of 0 and 1, or of class numbers"
        raise InputError(
            f"mask {one_line(path)}: its largest value is {gray.max()}, --threshold is {threshold}; {hint}"
        )
    return bright


# ------------------------------------------------------------------------------------------------------------ frames

# EXIF's orientation -> where the point (x, y) of a picture stored as w x h stands on the display (EXIF 2.3, 4.6.4)
TURNS: dict[int, Callable] = {
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}


def as_displayed(box: Box, orientation: int, stored: tuple[int, int]) -> Box:
    """A box in the picture as stored, whose size that is -> the box as displayed, under orientations 2 to 8."""
    (xa, ya), (xb, yb) = (TURNS[orientation](x, y, *stored) for x, y in (box[:2], box[2:]))
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def drawn_as_stored(stated: tuple | None, size: tuple[int, int], orientation: int, wish: str) -> bool:
    """Whether a box was drawn in the picture as stored, not as displayed. Only the size that goes with it can tell.

    stated: that size, None if there is none; size: as displayed; wish: --frame. InputError if the box is of another
    picture, or if both frames are possible and wish is "auto".
    """
    frames = {"displayed": size, "stored": size[::-1] if orientation > 4 else size}
    possible = [name for name, frame in frames.items() if stated in (None, frame)]
    if not possible:
        raise InputError(
            f"its box is of a picture of {stated[0]}x{stated[1]}, the file is {size[0]}x{size[1]}: it was resized or "
            "turned after it was annotated, or is another one"
        )
    if orientation == 1:  # as nearly all have
        return False
    if wish == "auto" and len(possible) == 2:
        raise InputError(
            f"EXIF turns the picture (orientation {orientation}) and no size tells whether its box was drawn before or "
            "after; try --frame displayed and --frame stored and look at --overlay"
        )
    if wish not in ("auto", *possible):
        raise InputError(f"its box is of a picture of {stated[0]}x{stated[1]}, which it is not as {wish}; --frame auto")
    return "stored" == (possible[0] if wish == "auto" else wish)
