"""What the compiler makes of the kernels, held against budgets; and that the budgets and the reader of it can fail."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).parent.parent
NVIDIA, AMD = ("sm80", "sm90"), ("gfx942",)
LOGPROB = ("log-prob forward", "log-prob forward, entropy", "log-prob backward")
KERNELS = {(kernel, dtype) for kernel in LOGPROB for dtype in ("bf16", "fp16", "fp32")}
KERNELS |= {(kernel, "fp32") for kernel in ("IoU", "GIoU", "advantage, std", "advantage, none")}

# Upper limits on NVIDIA, a little above what triton 3.7.1 makes: registers per thread, instructions per element.
BUDGETS = {
    "log-prob forward": (40, 10),
    "log-prob forward, entropy": (40, 12),
    "log-prob backward": (40, 20),
    "IoU": (40, 160),
    "GIoU": (40, 180),
    "advantage, std": (24, 110),
    "advantage, none": (24, 80),
}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton exists for Linux only")


def child(*command) -> str:
    """Run in a process of its own: this one has the interpreter on, under which nothing is compiled."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[tuple[str, str, str], dict]:
    """(kernel, dtype, target) -> figures, from one run of the benchmark."""
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    output = child("-m", "bench.kernels", "--json", str(file))
    rows = {(row["kernel"], row["dtype"], row["target"]): row for row in json.loads(file.read_text())["compiled"]}
    assert set(rows) == {(*kernel, target) for kernel in KERNELS for target in NVIDIA + AMD}
    assert all(name in output for name in BUDGETS)
    return rows


@pytest.fixture(scope="session")
def bad_rows() -> dict[str, dict]:
    """What is wrong with a kernel -> its figures for sm90."""
    return json.loads(child("tests/bad_kernels.py"))


def broken(kernel: str, row: dict) -> set[str]:
    """The budgets of an NVIDIA kernel that a row does not keep."""
    registers, instructions = BUDGETS[kernel]
    kept = {
        "spills": row["spills"] == 0,
        "fp64": row["fp64"] == 0,
        "registers": row["registers"] <= registers,
        "instructions": row["instructions"] <= instructions,
        "load": row["load"] == 16 or kernel not in LOGPROB + ("IoU", "GIoU"),
        "store": row["store"] == 16 or kernel != "log-prob backward",
        "barriers": row["barriers"] == 0,
        "loop": row["loops"] == ("forward" in kernel),
    }
    return {name for name, good in kept.items() if not good}


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("kernel", "dtype"), sorted(KERNELS))
def test_nvidia_kernels_keep_their_budgets(rows, kernel, dtype, target):
    row = rows[kernel, dtype, target]
    assert not broken(kernel, row), row


@needs_triton
@pytest.mark.parametrize(("kernel", "dtype"), sorted(KERNELS))
def test_amd_kernels_compile_without_spills(rows, kernel, dtype):
    row = rows[kernel, dtype, "gfx942"]
    assert row["spills"] == row["fp64"] == row["barriers"] == 0, row
    assert row["load"] == 16 or kernel not in LOGPROB, row


@needs_triton
def test_amd_programs_have_half_the_warps(rows):
    """A warp of theirs is 64 threads wide; so the tables' choice was seen, and with it the target."""
    for kernel, dtype in KERNELS:
        assert rows[kernel, dtype, "gfx942"]["warps"] == max(1, rows[kernel, dtype, "sm90"]["warps"] // 2)


@needs_triton
@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        ("nothing but the rescaling", {"instructions", "registers"}),
        ("one maximum per program", {"instructions", "barriers"}),
        ("the stride of a column is not known", {"instructions", "registers", "load"}),
        ("rows begin anywhere", {"instructions", "registers", "load"}),
        ("sums in double precision", {"instructions", "registers", "fp64"}),
        ("too few registers", {"instructions", "spills"}),
    ],
)
def test_a_bad_kernel_breaks_a_budget(bad_rows, fault, caught):
    assert broken("log-prob forward", bad_rows[fault]) == caught, bad_rows[fault]


@needs_triton
def test_under_the_interpreter_nothing_is_read():
    script = "from bench import aot; import kernels; aot.launches(lambda: None, 'sm90')"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "the interpreter compiles nothing" in done.stderr


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
	.loc	1 5 0 prologue_end              ; f.py:5:0
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


def test_sass_is_read_as_it_stands():
    program, registers, spills = aot.read_nvidia(USAGE, SASS)
    assert (registers, spills, len(program.instructions)) == (30, 0, 12)  # the NOP behind the end is no instruction
    expected = dict(load=16, store=8, fp64=0, barriers=1, instructions=2.0, loops=1)
    assert aot.summarise(program, 8, None) == expected  # two elements of 8 bytes in 4 instructions
    assert aot.summarise(program, 16, None) == expected | dict(instructions=4.0)


def test_without_a_loop_the_whole_program_counts():
    program, _, _ = aot.read_nvidia(USAGE, SASS.replace("@P1  BRA `(.L_x_0)", "FADD R1, R1, R2"))
    expected = dict(load=16, store=8, fp64=0, barriers=0, instructions=6.0, loops=0)
    assert aot.summarise(program, 8, 2) == expected


def test_the_worst_loop_counts():
    slow = SASS.replace("FADD R1, R1, R2", "LDG.E.U16 R1, desc[UR12][R2.64]")  # 2 bytes in 2 instructions
    program, _, _ = aot.read_nvidia(USAGE, slow)
    expected = dict(load=2, store=8, fp64=0, barriers=1, instructions=2.0, loops=2)
    assert aot.summarise(program, 2, None) == expected


@pytest.mark.parametrize("name", ["DADD", "DSETP.GT.AND", "F2F.F64.F32", "MUFU.RCP64H", "DFMA"])
def test_double_precision_is_found(name):
    program, _, _ = aot.read_nvidia(USAGE, SASS.replace("FADD", name))
    assert aot.summarise(program, 8, None)["fp64"] == 1


def test_local_memory_is_a_spill():
    program, _, spills = aot.read_nvidia(USAGE, SASS.replace("FADD R1, R1, R2", "STL.64 [R1], R2"))
    assert spills == 1


def test_amd_assembly_is_read_as_it_stands():
    program, registers, spills = aot.read_amd(ASSEMBLY + NOTES)
    assert (registers, spills, len(program.instructions)) == (12, 3, 9)
    expected = dict(load=16, store=2, fp64=1, barriers=1, instructions=2.5, loops=1)
    assert aot.summarise(program, 8, None) == expected


@pytest.mark.parametrize(
    ("usage", "code", "words"),
    [
        ("", SASS, "registers of 0 functions"),
        ("nvdisasm fatal: not a cubin", SASS, "registers of 0 functions"),
        (USAGE.replace("REG:30", "REG:?"), SASS, "registers of 0 functions"),
        (USAGE + USAGE, SASS, "registers of 2 functions"),
        (USAGE.replace("STACK:0", "STACK:8"), SASS, "8 bytes of stack"),
        (USAGE, "", "0 instructions and no EXIT"),
        (USAGE, "garbage\n" * 9, "0 instructions and no EXIT"),
        (USAGE, SASS.replace("EXIT", "RET"), "no EXIT"),
        (USAGE, SASS.replace(".L_x_0:", ""), "labels that are not there: .L_x_0"),
        (USAGE, SASS.replace("LDG.E.128", "UTMALDG.2D"), "bulk copy"),
    ],
)
def test_nvidia_output_that_cannot_be_read_is_an_error(usage, code, words):
    with pytest.raises(aot.Unreadable, match=words):
        aot.read_nvidia(usage, code)


@pytest.mark.parametrize(
    ("assembly", "words"),
    [
        ("", "no end of the function"),
        ("garbage", "no end of the function"),
        (ASSEMBLY, "vgpr_count stands 0 times"),
        (ASSEMBLY + NOTES + NOTES, "vgpr_count stands 2 times"),
        (".Lfunc_end0:" + NOTES, "0 instructions and no s_endpgm"),
        ((ASSEMBLY + NOTES).replace("dwordx4 v", "dwordx5 v"), "how many bytes"),
        ((ASSEMBLY + NOTES).replace(".LBB0_1: ", "; "), "labels that are not there: .LBB0_1"),
    ],
)
def test_amd_output_that_cannot_be_read_is_an_error(assembly, words):
    with pytest.raises(aot.Unreadable, match=words):
        aot.read_amd(assembly)


@pytest.mark.parametrize(("bytes_each", "elements"), [(32, 2), (8, None)])
def test_a_thread_that_handles_no_element_is_an_error(bytes_each, elements):
    """Less loaded in the loop than one element; no loop and no BLOCK."""
    text = SASS if bytes_each == 32 else SASS.replace("@P1  BRA `(.L_x_0)", "FADD R1, R1, R2")
    program, _, _ = aot.read_nvidia(USAGE, text)
    with pytest.raises(aot.Unreadable, match="neither the loads"):
        aot.summarise(program, bytes_each, elements)
