"""COCO's masks in runs (RLE) -> boxes; format and compression are pycocotools' (cocodataset/cocoapi, maskApi.c).

A mask of (height, width) is read column by column; `counts` are the lengths of its runs, of zeros first, then of ones,
and so on in turn. Nothing is drawn: a box follows from the places where runs of ones begin and end.
"""

from typing import Any

from errors import InputError
from images import Box
from prepare.common import short

MAX_SIDE = 10**6  # pixels


def runs_box(mask: dict[str, Any]) -> tuple[Box, tuple[int, int]]:
    """The box around all ones, half-open, (0, 0, 0, 0) if there are none; and the mask's (width, height)."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or [type(side) is int and 0 < side <= MAX_SIDE for side in size] != [True] * 2:
        raise InputError(f"'size' must be [height, width] of the mask, not {short(size)}")
    height, width = size
    counts = decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise InputError(f"'counts' must be lengths of runs, as integers or as pycocotools' text, not {short(counts)}")
    if sum(counts) != height * width:
        raise InputError(f"'counts' are of {short(sum(counts))} pixels, but 'size' {size} has {height * width}")
    x1, y1, x2, y2, begin = width, height, 0, 0, 0
    for i, length in enumerate(counts):
        if i % 2 and length:
            (left, top), (right, bottom) = divmod(begin, height), divmod(begin + length - 1, height)
            if left != right:  # it goes on in the next column, so through the last row and the first
                top, bottom = 0, height - 1
            x1, y1, x2, y2 = min(x1, left), min(y1, top), max(x2, right + 1), max(y2, bottom + 1)
        begin += length
    return (x1, y1, x2, y2) if x2 else (0, 0, 0, 0), (width, height)


def decompressed(text: str) -> list[int]:
    """Five bits a character, the lowest first, from 0 on; bit 5: more follow; the last one's bit 4 is the sign. From
    the fourth on, numbers are differences to the one before the last."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise InputError(f"'counts' is no text of pycocotools: {short(text)}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise InputError(f"'counts' ends within a number: {short(text)}")
    return counts
