"""Rewards: the text of an answer -> a box -> numbers (IoU, GIoU, valid, format), and their weighted sum.

METHODS sections 3 to 5. Answers are read tolerantly, because a box that stands there but is not found is a reward stuck
at 0 with no word why: ints, floats, exponents, JSON or bare lists, any key, corners as two points, line breaks anywhere.
What cannot be read has a named reason (REASONS). One regular expression finds every list of numbers in one linear pass; it
never needs the text to be JSON, since half of the answers early in training are not.

Frames: an answer is in pixels of the MODEL frame (the resized image), targets are in pixels of the ORIGINAL image, and IoU
is taken in the original.

Left out: the threshold (schedules decide hits), normalisation (kernels.group_advantage), other tasks' rewards.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from errors import InputError

REASONS = {
    "": "a box",
    "no box": "no list of numbers in the answer",
    "incomplete box": "fewer than four numbers, or a bracket that never closes: the answer was cut off or garbled",
    "too many numbers": "a list of more than four numbers",
    "not finite": "NaN, infinity, or a number too large for a float",
    "absurd value": "a coordinate beyond a million pixels",
    "inverted": "x2 < x1 or y2 < y1",
    "degenerate": "zero width or height",
}
MAX_COORDINATE = 1e6  # pixels; whole-slide images stay below it, and products of two stay exact enough in fp32

# A list of numbers, with its brackets and a key such as "x1": before it if there is one. Linear in the text: once the first
# number is there everything after it is optional, so a match never fails late; a number starts and ends at the edge of
# a word (not at the 2 of bbox_2d, not at 10 of 10px), so no digit is the start of a second attempt.
_NUMBER = r"[+-]? (?: [0-9]+ (?: \.[0-9]* )? (?: e[+-]?[0-9]+ )? | \.[0-9]+ (?: e[+-]?[0-9]+ )? | nan | inf(?:inity)? ) (?! \.?\w )"
