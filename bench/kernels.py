"""The kernels as compiled, the bytes they and the plain formulations move, and on a GPU the time they take.

    python -m bench.kernels                     every kernel for A100, H100 and MI300X, compiled here; no GPU needed
    python -m bench.kernels --markdown          the same, one row per kernel, as the README has it
    python -m bench.kernels --targets sm90 --json kernels.json
    python -m bench.kernels --timings               the measured table alone, on a GPU

Sizes: a step of 8 completions of 256 tokens with Qwen2.5-VL's vocabulary, and 16 prompts x 8 answers for the rewards.
Every floor is arithmetic: bytes that must move over a bandwidth that is named. Only the last table is measured, and it
exists only where there is a GPU.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import aot

TOKENS, VOCABULARY = 2048, 151936  # completion tokens of a step, Qwen2.5-VL's vocabulary (padded)
HIDDEN = 2048  # of the 3B model
PROMPTS, GROUP = 16, 8
BOXES = PROMPTS * GROUP
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Bytes per second, assumed: nine tenths of the data sheet (A100 SXM 80 GB 2.039 TB/s, H100 SXM 3.35, MI300X 5.3), which
# is about what a large copy reaches on an H100 and the same rule, no measurement, for the other two.
GPUS = {"sm80": ("A100 SXM 80 GB", 1.84e12), "sm90": ("H100 SXM", 3.0e12), "gfx942": ("MI300X", 4.77e12)}


def eager_bytes(rows: int, vocabulary: int) -> dict[str, int]:
    """Bytes that PyTorch's operators move for log-probs of bf16 logits (rows, vocabulary), forward and backward.

    Counted per logit over the operators that autograd runs (a test compares the list with a profile), every pass over a
    tensor as a pass over memory: h = 2 bytes per logit of a bf16 tensor, f = 4 of an fp32 one. gather and its
    scatter_add_ touch one logit per row, which is nothing. CUDA's log_softmax reads a row three times (maximum, sum,
    result) if it does not fit into shared memory, and its backward reads the gradient twice (aten's SoftMax.cu); what
    the L2 cache saves of that is not deducted.
    """
    h, f = 2, 4
    log_softmax, backward = 3 + 1, 2 + 1 + 1  # passes, reads and writes; backward: gradient twice, result, written
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


@dataclass(frozen=True)
class Case:
    """One kernel with one dtype at the reference size."""

    kernel: str
    dtype: str
    launch: Callable[[], object]  # on tensors of the meta device
    element_bytes: int  # loaded per logit, box pair or reward
    moved: int  # bytes that have to be read and written: every tensor once


def cases() -> list[Case]:
    """Every kernel; the temperature is the paper's .9, because a division by 1 is compiled away."""
    from kernels import advantage, iou, logprob

    empty = partial(torch.empty, device="meta")
    tokens, per_row = empty(TOKENS, dtype=torch.int64), empty(TOKENS)
    found = []
    for name, dtype in DTYPES.items():
        logits, size = empty(TOKENS, VOCABULARY, dtype=dtype), dtype.itemsize
        once = TOKENS * VOCABULARY * size
        forward, backward = partial(logprob.triton_forward, logits, tokens, 0.9), logprob.triton_backward
        found += [  # beside the logits, per row: token 8; log-prob, logsumexp, entropy, gradient 4 each
            Case("log-prob forward", name, partial(forward, False), size, once + 16 * TOKENS),
            Case("log-prob forward, entropy", name, partial(forward, True), size, once + 20 * TOKENS),
            Case("log-prob backward", name, partial(backward, per_row, logits, tokens, per_row, 0.9), size,
                 2 * once + 16 * TOKENS),
        ]  # fmt: skip
    boxes, rewards = empty(BOXES, 4), empty(PROMPTS, GROUP)
    for name, giou in (("IoU", False), ("GIoU", True)):
        found.append(Case(name, "fp32", partial(iou.triton_iou, boxes, boxes, giou), 32, 36 * BOXES))
    for scale in advantage.SCALES:
        launch = partial(advantage.triton_advantage, rewards, scale, 1e-4)
        found.append(Case(f"advantage, {scale}", "fp32", launch, 4, 8 * PROMPTS * GROUP))
    return found


def compiled(targets: list[str]) -> list[dict]:
    """A row per kernel, dtype and target: aot.Figures, bytes moved and the floor in milliseconds."""
    jobs = [(case, target, *aot.launches(case.launch, target)) for case in cases() for target in targets]

    def row(job) -> dict:
        case, target, launch = job
        figures = dataclasses.asdict(aot.figures(launch, target, case.element_bytes))
        floor = 1e3 * case.moved / GPUS[target][1]
        return dict(kernel=case.kernel, dtype=case.dtype, target=target, moved=case.moved, floor_ms=floor, **figures)

    with ThreadPoolExecutor(4) as threads:  # much of the time goes into ptxas and nvdisasm
        return list(threads.map(row, jobs))


# -------------------------------------------------------------------------------------------------------- on a GPU


@dataclass(frozen=True)
class Workload:
    """One operation, done in several ways that give the same numbers."""

    operation: str
    work: float  # bytes that have to be moved, each tensor once; or floating point operations that have to be done
    unit: str  # "GB/s" or "TFLOP/s"
    ways: dict[str, Callable[[], object]]


def workloads(device: str, tokens: int, vocabulary: int, hidden: int, compile: Callable) -> list[Workload]:
    """What is timed: bf16 logits (tokens, vocabulary), hidden states (tokens, hidden), BOXES boxes, PROMPTS groups."""
    import kernels
    from kernels import advantage, iou

    normal, name = partial(torch.randn, device=device), list(eager_bytes(1, 1))
    logits = normal(tokens, vocabulary, dtype=torch.bfloat16).requires_grad_()
    head = normal(vocabulary, hidden, dtype=torch.bfloat16).requires_grad_()
    states = normal(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    ids, grad = torch.randint(vocabulary, (tokens,), device=device), normal(tokens)
    a, b = (normal(BOXES, 4).abs().cumsum(1) for _ in range(2))  # four growing numbers are a box
    rewards = normal(PROMPTS, GROUP)

    def trained(function, *inputs):  # forward and backward
        def run():
            logp = function(*inputs, ids)
            return torch.autograd.grad(logp, inputs, grad.to(logp.dtype))

        return run

    def head_then(function):
        return lambda states, head, ids: function(states @ head.t(), ids)

    plain = {f"eager: {n}": partial(eager, i) for i, n in enumerate(name)}
    plain[f"torch.compile: {name[1]}"] = compile(plain[f"eager: {name[1]}"])
    logprobs = {"ours": kernels.token_logprob} | plain
    linear = {"ours, chunked: linear_logprob": kernels.linear_logprob}
    linear |= {f"head, then {n}": head_then(f) for n, f in logprobs.items()}
    read, flops = 2 * logits.numel(), 2 * logits.numel() * hidden
    found = [
        Workload("log-prob forward", read, "GB/s", {n: partial(f, logits.detach(), ids) for n, f in logprobs.items()}),
        Workload("log-prob forward + backward", 3 * read, "GB/s", {n: trained(f, logits) for n, f in logprobs.items()}),
        Workload("head + log-prob, forward + backward", 3 * flops, "TFLOP/s",
                 {n: trained(f, states, head) for n, f in linear.items()}),
    ]  # fmt: skip
    small = [
        ("IoU", 36 * BOXES, kernels.box_iou, iou.reference_iou, (a, b, False)),
        ("GIoU", 36 * BOXES, kernels.box_iou, iou.reference_iou, (a, b, True)),
        ("advantage", 8 * BOXES, kernels.group_advantage, advantage.reference_advantage, (rewards, "std", 1e-4)),
    ]
    for operation, work, ours, reference, inputs in small:
        by = {"ours": ours, "eager": reference, "torch.compile": compile(reference)}
        found.append(Workload(operation, work, "GB/s", {n: partial(f, *inputs) for n, f in by.items()}))
    return found


def timed(device: str, run: Callable[[], object]) -> float:
    """Median milliseconds of run() on a GPU; on a CPU those of one call, which say nothing about a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median")
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def copy_rate(device: str, size: int) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes: what this machine's memory really gives."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(device, lambda: target.copy_(source)) * 1e3


def measured(device: str, sizes: tuple[int, int, int], compile: Callable) -> Iterator[dict]:
    """Time, rate and peak memory beside the inputs, of every way of every workload, as they come. sizes: tokens,
    vocabulary, hidden."""
    for load in workloads(device, *sizes, compile):
        for way, run in load.ways.items():
            row = dict(operation=load.operation, way=way)
            try:
                peak = 0
                run()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    peak = torch.cuda.max_memory_allocated() - before
                milliseconds = timed(device, run)
            except torch.OutOfMemoryError:
                yield row | dict(failed="out of memory")
                continue
            except (
                Exception
            ) as error:  # one way's fault, such as no compiler for torch.compile: the others can be timed
                yield row | dict(failed=f"{type(error).__name__}: {error}".partition("\n")[0][:100])
                continue
            rate = load.work / milliseconds * (1e-6 if load.unit == "GB/s" else 1e-9)
            yield row | dict(ms=milliseconds, rate=rate, unit=load.unit, peak_gb=peak / 1e9)


def timings(device: str, tiny: bool) -> list[dict]:
    """measured(), each row printed when it is there, beside what a copy reaches."""
    from kernels import interpreted

    compile = partial(torch.compile, dynamic=False, backend="eager" if device == "cpu" else "inductor")
    sizes, size = ((8, 64, 16), 2**20) if tiny else ((TOKENS, VOCABULARY, HIDDEN), 2**31)
    copied, rows = copy_rate(device, size), []
    print(f"a copy of {size / 2**30:.3g} GiB: {copied / 1e9:.1f} GB/s, read and written")
    print("rate: bytes or operations that have to be, over the time; of a copy: a floor's share of the time\n")
    print(measured_table([], copied), flush=True)
    interpret = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    with interpreted() if interpret else nullcontext():
        for row in measured(device, sizes, compile):
            rows.append(row)
            print(measured_table([row], copied).splitlines()[-1], flush=True)
    return rows


# -------------------------------------------------------------------------------------------------------- printing


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, padded so that it can also be read as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = {  # of the table: title, figures, how they are written, which of several targets is the worst
    "registers": ("registers", "{:d}", max),
    "spills": ("spills", "{:d}", max),
    "shared B": ("shared", "{:d}", max),
    "load B": ("load", "{:d}", min),
    "store B": ("store", "{:d}", min),
    "fp64": ("fp64", "{:d}", max),
    "barriers": ("barriers", "{:d}", max),
    "instr/element": ("instructions", "{:.1f}", max),
}


def amount(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e3:.1f} kB"


def duration(ms: float) -> str:
    return f"{ms:.2f} ms" if ms >= 0.01 else f"{1e6 * ms:.1f} ns"


def every_row(rows: list[dict]) -> str:
    def cells(row):
        figures = [form.format(row[key]) for key, form, _ in COLUMNS.values()]
        loop = "" if row["loops"] else " (no loop)"
        return [row["kernel"], row["dtype"], row["target"], *figures[:-1], figures[-1] + loop,
                amount(row["moved"]), duration(row["floor_ms"])]  # fmt: skip

    return markdown(["kernel", "dtype", "target", *COLUMNS, "moved", "floor"], [cells(row) for row in rows])


def row_per_kernel(rows: list[dict], target: str) -> str:
    """Figures of `target`, in brackets the worst of all targets where that is worse."""
    groups = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    table = []
    for (kernel, dtype), group in groups.items():
        (shown,) = (row for row in group if row["target"] == target)
        cells = []
        for key, form, pick in COLUMNS.values():
            here, worst = form.format(shown[key]), form.format(pick(row[key] for row in group))
            cells.append(here if here == worst else f"{here} ({worst})")
        table.append([kernel, dtype, *cells, amount(shown["moved"]), duration(shown["floor_ms"])])
    return markdown(["kernel", "dtype", *COLUMNS, "moved", "floor"], table)


def bytes_table() -> str:
    """Bytes of the log-probs of bf16 logits, forward and backward, and their floors."""
    logits = 2 * TOKENS * VOCABULARY
    ours = {"ours: token_logprob": 3 * logits}  # read, read again, gradient written
    rows = []
    for name, moved in (ours | eager_bytes(TOKENS, VOCABULARY)).items():
        floors = [f"{1e3 * moved / bandwidth:.2f}" for _, bandwidth in GPUS.values()]
        rows.append([name, f"{moved / TOKENS / VOCABULARY:.0f}", amount(moved), *floors])
    floors = [f"{name}, ms" for name, _ in GPUS.values()]
    return markdown(["log-probs, forward + backward", "bytes/logit", "moved", *floors], rows)


def measured_table(rows: list[dict], copied: float) -> str:
    """copied: bytes per second of a copy."""
    table = []
    for row in rows:
        cells = [row.get("failed"), "", "", ""]
        if "ms" in row:
            share = f"{1e9 * row['rate'] / copied:.2f}" if row["unit"] == "GB/s" else "-"
            cells = [f"{row['ms']:.3f}", f"{row['rate']:.1f} {row['unit']}", share, f"{row['peak_gb']:.2f}"]
        table.append([row["operation"], row["way"], *cells])
    return markdown(["operation", "way", "ms", "rate", "of a copy", "peak GB"], table)


def report(rows: list[dict], targets: list[str], one_row_each: bool) -> str:
    """Everything that needs no GPU, as text."""
    shown = "sm90" if "sm90" in targets else targets[0]
    lines = [
        "What the compiler made of the kernels. floor: bytes moved / bandwidth, arithmetic and not a measurement, at",
        "; ".join(f"{target} {name} {rate / 1e12:.2f} TB/s" for target, (name, rate) in GPUS.items())
        + " (nine tenths of the data sheets).",
        f"Logits ({TOKENS}, {VOCABULARY}), boxes ({BOXES}, 4), rewards ({PROMPTS}, {GROUP}). load, store: the widest,",
        "in bytes. They, barriers and instructions are of the loop over a row; a kernel without a loop counts whole,",
        "branches not taken included.",
    ]
    if one_row_each:
        lines.append(f"Figures of {shown}, in brackets the worst of {', '.join(targets)} where that is worse.")
    lines += ["", row_per_kernel(rows, shown) if one_row_each else every_row(rows), ""]
    lines += [
        "Bytes moved by log-probs of bf16 logits, every pass of every operator over a tensor: arithmetic as well."
    ]
    return "\n".join([*lines, "", bytes_table()])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(aot.TARGETS)
    parser.add_argument("--targets", default=every, help="which GPUs to compile for (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="save every figure")
    parser.add_argument("--markdown", action="store_true", help="one row per kernel instead of one per target as well")
    parser.add_argument("--timings", action="store_true", help="only the times, nothing compiled for other GPUs")
    parser.add_argument("--tiny", action="store_true", help="with --timings: sizes that say nothing, on any machine")
    options = parser.parse_args(arguments)
    if options.timings:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not options.tiny:
            parser.error("--timings: there is no GPU that torch can use here")
        if failed := [row for row in timings(device, options.tiny) if "failed" in row]:
            sys.exit(f"error: {len(failed)} of these could not be timed")
        return
    targets = options.targets.split(",")
    if unknown := set(targets) - set(aot.TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(aot.TARGETS)}")
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: under the interpreter nothing is compiled
    try:
        import triton
    except ImportError:
        sys.exit("error: this needs triton, which exists for Linux only")

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(f"GPU: {gpu}" if gpu else "GPU: none here, so no timings are given")
    print(f"torch {torch.__version__}, triton {triton.__version__}\n", flush=True)
    rows = compiled(targets)
    print(report(rows, targets, options.markdown), flush=True)
    times = []
    if gpu:
        print(f"\nMeasured on {gpu}: ", end="")
        times = timings("cuda", tiny=False)
    if options.json:
        saved = dict(gpu=gpu, torch=torch.__version__, triton=triton.__version__, compiled=rows, measured=times)
        with open(options.json, "w") as file:
            json.dump(saved | dict(eager_bytes=eager_bytes(TOKENS, VOCABULARY)), file, indent=1)


if __name__ == "__main__":
    main()
