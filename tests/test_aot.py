"""What the compiler makes of the kernels, held against budgets; and that the budgets and the reader of it can fail."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import aot

LOGPROB = ("log-prob forward", "log-prob forward, entropy", "log-prob backward")
KERNELS = {(kernel, dtype) for kernel in LOGPROB for dtype in ("bf16", "fp16", "fp32")}
KERNELS |= {(kernel, "fp32") for kernel in ("IoU", "GIoU", "advantage, std", "advantage, none")}

# Upper limits on NVIDIA, a little above what triton 3.7.1 makes: registers per thread, instructions per element.
BUDGETS = {
    "log-prob forward": (40, 10), "log-prob forward, entropy": (40, 12), "log-prob backward": (40, 20),
    "IoU": (40, 160), "GIoU": (40, 180), "advantage, std": (24, 110), "advantage, none": (24, 80),
}  # fmt: skip

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton exists for Linux only")


def child(*command) -> str:
    """Run in a process of its own: this one has the interpreter on, under which nothing is compiled."""
    options = dict(cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def broken(kernel: str, row: dict) -> set[str]:
    """The budgets of an NVIDIA kernel that a row does not keep."""
    registers, instructions = BUDGETS[kernel]
    kept = {
        "spills": row["spills"] == 0,
        "fp64": row["fp64"] == 0,
        "registers": row["registers"] <= registers,
        "instructions": row["instructions"] <= instructions,
        "load": row["load"] == 16 or "advantage" in kernel,
        "store": row["store"] == 16 or kernel != "log-prob backward",
        "barriers": row["barriers"] == 0,
        "loop": row["loops"] == ("forward" in kernel),
    }
    return {name for name, good in kept.items() if not good}


@needs_triton
@pytest.mark.slow
def test_the_kernels_keep_their_budgets(tmp_path):
    output = child("-m", "bench.kernels", "--json", str(tmp_path / "kernels.json"))
    found = json.loads((tmp_path / "kernels.json").read_text())["compiled"]
    rows = {(row["kernel"], row["dtype"], row["target"]): row for row in found}
    assert set(rows) == {(*kernel, target) for kernel in KERNELS for target in aot.TARGETS}
    assert all(name in output for name in BUDGETS)
    for (kernel, dtype, target), row in rows.items():
        if target != "gfx942":
            assert not broken(kernel, row), row
            continue
        assert row["spills"] == row["fp64"] == row["barriers"] == 0 and (row["load"] == 16 or kernel not in LOGPROB), (
            row
        )
        assert row["warps"] == max(1, rows[kernel, dtype, "sm90"]["warps"] // 2)  # a warp of theirs is 64 threads wide


BAD = """
import json, os
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton.language as tl
from bench import aot
from kernels.logprob import logprob_forward_kernel as kernel
logits, tokens, out = (torch.empty(2048, dtype=d, device="meta") for d in (torch.bfloat16, torch.int64, torch.float32))
usual = dict(V=151936, stride=151936, ENTROPY=False, ACC=tl.float32, LOWEST=-3e38, VECTOR=8, LANES=256, num_warps=8)
for changes in (CHANGES):
    call = lambda: kernel[(2048,)](logits, tokens, out, out, out, TEMPERATURE=0.9, **(usual | changes))
    print(json.dumps(vars(aot.figures(*aot.launches(call, "sm90"), "sm90", 2))))
"""
CAUGHT = {  # our forward kernel, launched otherwise -> the budgets that it breaks
    "dict()": set(),
    "dict(VECTOR=2048, LANES=1)": {"barriers", "instructions"},  # one maximum per program
    "dict(VECTOR=1)": {"load", "instructions"},
    "dict(stride=151937)": {"load", "instructions", "registers"},  # rows begin anywhere
    "dict(ACC=tl.float64)": {"fp64", "instructions"},
    "dict(LANES=2048, maxnreg=24)": {"spills"},
}


@needs_triton
@pytest.mark.slow
def test_the_forward_kernel_keeps_its_budgets_and_a_bad_launch_breaks_one():
    rows = map(json.loads, child("-c", BAD.replace("CHANGES", ", ".join(CAUGHT))).splitlines())
    got = {change: broken("log-prob forward", row) for change, row in zip(CAUGHT, rows, strict=True)}
    assert got == CAUGHT


@needs_triton
def test_under_the_interpreter_nothing_is_read(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="the interpreter compiles nothing"):
        aot.launches(lambda: None, "sm90")


# The reader, on text written by hand. Two loops: one copies 16 bytes a pass with a barrier in between, the other adds.

USAGE = " Function f:\n  REG:30 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400\n"
SASS = """
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.128 R12, desc[UR12][R44.64] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/              @!PT STG.E.64 desc[UR12][R2.64], R15 ;
        /*0050*/              @P1  BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   LDG.E.U16 R3, desc[UR12][R2.64] ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""
NOTES = "    .vgpr_count:     12\n    .vgpr_spill_count: 1\n    .sgpr_spill_count: 2\n"
ASSEMBLY = """
f:                                      ; @f
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[24:27], v24, s[36:39], 0 offen
	v_exp_f32_e32 v1, v2
	s_barrier
	global_store_short_d16_hi v1, v0, s[0:1]
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	v_add_f64 v[0:1], v[0:1], v[2:3]
	s_endpgm
.Lfunc_end0:
"""
NO_LOOP = ("@P1  BRA `(.L_x_0)", "FADD R1, R1, R2")


@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        (("", ""), (8, None), {}),  # two elements of 8 bytes in 4 instructions
        (("", ""), (16, None), dict(instructions=4.0)),
        (NO_LOOP, (8, 2), dict(barriers=0, instructions=6.0, loops=0)),  # the whole program counts
        (("FADD R1, R1, R2", "LDG.E.U16 R1, desc[UR12][R2.64]"), (2, None), dict(load=2, loops=2)),  # the worst loop
        *(
            (("FADD", name), (8, None), dict(fp64=1))
            for name in ("DADD", "DFMA", "DSETP.GT", "F2F.F64.F32", "MUFU.RCP64H")
        ),
    ],
)
def test_sass_is_read_as_it_stands(change, arguments, expected):
    program, registers, spills = aot.read_nvidia(USAGE, SASS.replace(*change))
    assert (registers, spills, len(program.instructions)) == (30, 0, 12)  # the NOP behind the end is no instruction
    usual = dict(load=16, store=8, fp64=0, barriers=1, instructions=2.0, loops=1)
    assert aot.summarise(program, *arguments) == usual | expected


def test_local_memory_is_a_spill_and_amd_assembly_is_read_as_it_stands():
    assert aot.read_nvidia(USAGE, SASS.replace("FADD R1, R1, R2", "STL.64 [R1], R2"))[2] == 1
    program, registers, spills = aot.read_amd(ASSEMBLY + NOTES)
    assert (registers, spills, len(program.instructions)) == (12, 3, 9)
    expected = dict(load=16, store=2, fp64=1, barriers=1, instructions=2.5, loops=1)
    assert aot.summarise(program, 8, None) == expected


@pytest.mark.parametrize(
    ("read", "arguments", "words"),
    [
        (aot.read_nvidia, ("nvdisasm fatal: not a cubin", SASS), "registers of 0 functions"),
        (aot.read_nvidia, (USAGE + USAGE, SASS), "registers of 2 functions"),
        (aot.read_nvidia, (USAGE.replace("STACK:0", "STACK:8"), SASS), "8 bytes of stack"),
        (aot.read_nvidia, (USAGE, "garbage\n" * 9), "0 instructions and no EXIT"),
        (aot.read_nvidia, (USAGE, SASS.replace(".L_x_0:", "")), "labels that are not there: .L_x_0"),
        (aot.read_nvidia, (USAGE, SASS.replace("LDG.E.128", "UTMALDG.2D")), "bulk copy"),
        (aot.read_amd, ("garbage",), "no end of the function"),
        (aot.read_amd, (ASSEMBLY + NOTES + NOTES,), "vgpr_count stands 2 times"),
        (aot.read_amd, ((ASSEMBLY + NOTES).replace("dwordx4 v", "dwordx5 v"),), "how many bytes"),
        (aot.summarise, (aot.read_nvidia(USAGE, SASS)[0], 32, 2), "neither the loads"),  # less than an element a thread
        (aot.summarise, (aot.read_nvidia(USAGE, SASS.replace(*NO_LOOP))[0], 8, None), "neither the loads"),
    ],
)
def test_what_cannot_be_read_is_an_error(read, arguments, words):
    with pytest.raises(aot.Unreadable, match=words):
        read(*arguments)
