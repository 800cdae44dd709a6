"""bench/kernels.py where there is no GPU: the bytes it counts are those that run, and what it would time does run."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import kernels as bench

N, V = 4, 10
# Passes over (N, V) of each operator, fp32 in and out: reads + writes. log_softmax as CUDA's kernels do it.
PASSES = {"_log_softmax": 4, "_log_softmax_backward_data": 4, "zero_": 1, "amax": 1, "sum": 1, "sub": 2}
PASSES = {f"aten::{name}": passes for name, passes in (PASSES | dict(exp=2, exp_=2, mul=2, add_=3)).items()}


def operators(formulation: int, dtype: torch.dtype) -> Counter:
    """What autograd runs on whole (N, V) tensors, forward and backward, as the profiler sees it."""
    logits = torch.randn(N, V, dtype=dtype, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        logp = bench.eager(formulation, logits, torch.zeros(N, dtype=torch.long))
        torch.autograd.grad(logp, logits, torch.ones_like(logp))
    names = PASSES | {"aten::copy_": 0}
    return Counter(event.name for event in seen.events() if event.name in names and [N, V] in event.input_shapes)


@pytest.mark.parametrize("formulation", [0, 1, 2])
def test_the_bytes_of_the_plain_formulations_are_those_of_what_autograd_runs(formulation):
    counted = list(bench.eager_bytes(N, V).values())[formulation]
    seen = operators(formulation, torch.bfloat16)
    copies = seen.pop("aten::copy_", 0)
    passes = sum(PASSES[name] * times for name, times in seen.items())
    if formulation == 0:  # the copies are the CPU's way to scatter bf16; CUDA has none
        assert counted == 2 * passes * N * V
    else:  # two casts, each one bf16 and one fp32 pass
        assert copies == 2 and counted == (4 * passes + 2 * (2 + 4)) * N * V


def test_the_bytes_at_the_reference_size():
    counted = [round(n / 1e9, 2) for n in bench.eager_bytes(bench.TOKENS, bench.VOCABULARY).values()]
    assert counted == [5.60, 14.94, 23.65]
    assert "| 1.87 GB " in bench.bytes_table() and "| 0.62 " in bench.bytes_table()


@pytest.mark.slow
def test_every_way_of_every_workload_gives_the_same_numbers():
    torch.manual_seed(0)
    loads = bench.workloads("cpu", 5, 37, 8, compile=lambda f: torch.compile(f, backend="eager"))
    assert [len(load.ways) for load in loads] == [5, 5, 6, 3, 3, 3]
    work = {load.operation: load.work for load in loads}
    assert work["log-prob forward"] == 2 * 5 * 37
    assert work["log-prob forward + backward"] == 3 * 2 * 5 * 37  # read, read, written
    assert work["head + log-prob, forward + backward"] == 3 * 2 * 5 * 37 * 8  # three products
    for load in loads:
        assert load.work > 0 and load.unit in ("GB/s", "TFLOP/s")
        results = {way: run() for way, run in load.ways.items()}
        ours = next(iter(results.values()))
        for way, result in results.items():
            for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, result)), strict=True):
                close = torch.isclose(a.float(), b.float(), rtol=0.05, atol=0.05)  # bf16 throughout, in one of them
                assert close.all(), (load.operation, way)


def test_a_row_per_kernel_shows_the_worst_target_in_brackets():
    row = dict(kernel="k", dtype="bf16", spills=0, shared=0, load=16, store=4, fp64=0, barriers=0, loops=1)
    sm90 = row | dict(target="sm90", registers=30, instructions=8.4, moved=6.2e8, floor_ms=0.21)
    other = row | dict(target="sm80", registers=28, instructions=8.2, load=8, moved=6.2e8, floor_ms=0.34)
    line = bench.row_per_kernel([other, sm90], "sm90").splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["k", "bf16", "30", "0", "0", "16 (8)", "4", "0", "0", "8.4", "0.62 GB", "0.21 ms"]


def test_measured_rows_are_printed_also_those_without_memory_and_amounts_keep_their_digits():
    row = dict(operation="o", way="ours", ms=0.7, rate=2666.4, unit="GB/s", peak_gb=0.62)
    lost = dict(operation="o", way="eager", failed="out of memory")
    table = bench.measured_table([row, lost], copied=2.9e12).splitlines()
    assert "2666.4 GB/s | 0.92 " in table[2] and "0.62" in table[2] and "out of memory" in table[3]
    assert (bench.amount(1.867e9), bench.amount(4608)) == ("1.87 GB", "4.6 kB")
    assert (bench.duration(0.622), bench.duration(1.536e-6)) == ("0.62 ms", "1.5 ns")
