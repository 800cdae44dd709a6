"""The kernels as compiled, the bytes they and the plain formulations move, and on a GPU the time they take.

    python -m bench.kernels                     every kernel for A100, H100 and MI300X, compiled here; no GPU needed
    python -m bench.kernels --markdown          the same, one row per kernel, as the README has it
    python -m bench.kernels --targets sm90 --json kernels.json

Sizes: a step of 8 completions of 256 tokens with Qwen2.5-VL's vocabulary, and 16 prompts x 8 answers for the rewards.
Every floor is arithmetic: bytes that must move over a bandwidth that is named. Only the last table is measured, and it
exists only where there is a GPU.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import aot

TOKENS, VOCABULARY = 2048, 151936  # completion tokens of a step, Qwen2.5-VL's vocabulary (padded)
PROMPTS, GROUP = 16, 8
BOXES = PROMPTS * GROUP
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Bytes per second that a large copy reaches. H100 SXM: 3.0 TB/s of the 3.35 in its data sheet is what such copies are
# reported to measure; for the other two nine tenths of the data sheet as well (A100 SXM 80 GB: 2.039 TB/s; MI300X: 5.3
# TB/s), which is the same rule and no measurement.
GPUS = {"sm80": ("A100 SXM 80 GB", 1.84e12), "sm90": ("H100 SXM", 3.0e12), "gfx942": ("MI300X", 4.77e12)}


def eager_bytes(rows: int, vocabulary: int) -> dict[str, int]:
    """Bytes that PyTorch's operators move for log-probs of bf16 logits (rows, vocabulary), forward and backward.

    Counted per logit over the operators that autograd runs (a test compares the list with a profile), every pass over a
    tensor as a pass over memory: a bf16 tensor costs h = 2 bytes per logit read or written, an fp32 one f = 4. gather and
    its scatter_add_ touch one logit per row, which is nothing.
    CUDA's log_softmax reads a row three times (maximum, sum, result) if it does not fit into shared memory, and its
    backward reads the gradient twice (SoftMax.cu); what the L2 cache saves of that is not deducted.
    """
    h, f = 2, 4
    log_softmax, backward = 3 + 1, 2 + 1 + 1  # passes: reads + writes; backward reads grad twice and the result once
    zeros = 1  # the gradient that gather's backward fills
    cast = h + f
    # logsumexp: amax 1, x - max 2, exp_ 2, sum 1; its backward: x - lse 2, exp 2, times grad 2
    logsumexp, logsumexp_backward, accumulate = 1 + 2 + 2 + 1, 2 + 2 + 2, 3
    per_logit = {
        "logits.log_softmax().gather(), in bf16": (log_softmax + zeros + backward) * h,
        "logits.float().log_softmax().gather()": cast + (log_softmax + zeros + backward) * f + cast,
        "x = logits.float(); x.gather() - x.logsumexp()": (
            cast + (logsumexp + logsumexp_backward + zeros + accumulate) * f + cast
        ),
    }
    return {name: each * rows * vocabulary for name, each in per_logit.items()}


def eager(formulation: int, logits: Tensor, tokens: Tensor) -> Tensor:
    """The formulations of eager_bytes, in its order: logits (N, V), tokens (N,) -> log-probs (N,)."""
    if formulation == 0:
        return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    x = logits.float()
    if formulation == 1:
        return x.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    return x.gather(1, tokens[:, None])[:, 0] - x.logsumexp(1)
