"""Kernels with one known fault each, compiled for one GPU: what the budgets of test_aot.py are there to catch.

Run as a script, it prints their figures as JSON.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: under the interpreter nothing is compiled
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from bench import aot  # noqa: E402


@triton.jit
def lse_kernel(X, OUT, V, stride, column_stride, SCALAR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """logsumexp of every row with a sum per thread, rescaled at every element; with SCALAR a sum per program, for which
    all threads must meet in every pass of the loop."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([1 if SCALAR else BLOCK], -1e30, ACC)
    total = tl.zeros([1 if SCALAR else BLOCK], ACC)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + column.to(tl.int64) * column_stride, mask=column < V, other=-1e30).to(ACC)
        new = tl.maximum(top, tl.max(x, 0, keep_dims=True) if SCALAR else x)
        e = tl.exp(x - new)
        total = total * tl.exp(top - new) + (tl.sum(e, 0, keep_dims=True) if SCALAR else e)
        top = new
    highest = tl.max(top, 0)
    tl.store(OUT + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), 0)))


def main() -> None:
    x = torch.empty(2048, 151936, dtype=torch.bfloat16, device="meta")
    out = torch.empty(2048, device="meta")
    faults = {  # what is wrong -> arguments of the launch
        "nothing but the rescaling": dict(),
        "one maximum per program": dict(SCALAR=True),
        "the stride of a column is not known": dict(column_stride=3),
        "rows begin anywhere": dict(stride=151937),
        "sums in double precision": dict(ACC=tl.float64),
        "too few registers": dict(maxnreg=24),
    }
    figures = {}
    for fault, changes in faults.items():
        options = dict(V=151936, stride=151936, column_stride=1, SCALAR=False, ACC=tl.float32, BLOCK=4096, num_warps=8)
        arguments = options | changes

        def call(arguments=arguments):
            lse_kernel[(len(x),)](x, out, **arguments)

        (launch,) = aot.launches(call, "sm90")
        figures[fault] = asdict(aot.figures(launch, "sm90", 2))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
