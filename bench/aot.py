"""Compile Triton kernels for GPUs that are not here, and read from the machine code what the compiler made of them.

Two steps. `launches` calls the code that launches a kernel, on tensors of the meta device (a shape and no memory), and
catches the launch before anything is compiled: so types, constants, warps and the "divisible by 16" that Triton's JIT
finds in addresses and strides are those of a real call, and no table of them has to be kept beside the kernels.
`figures` compiles such a launch and reads registers, spills, load widths and the loop. For NVIDIA it asks cuobjdump and
nvdisasm, which Triton's wheel carries beside ptxas; for AMD the assembly is text already.

What cannot be read is an Unreadable, never a zero: a budget held against a wrong zero would pass.

Must run where TRITON_INTERPRET is off: under the interpreter nothing is compiled. Left out: occupancy and time; a loop
of few instructions is no promise of speed.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}  # A100, H100, MI300X


class Unreadable(RuntimeError):
    """The compiler's output does not look as this file expects."""


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel as the JIT specialised it."""

    function: object  # triton's JITFunction
    signature: dict  # argument -> "*bf16", "i32", "constexpr" ...
    constants: dict
    attributes: dict  # argument -> what the JIT found out about its value
    options: dict  # num_warps and the like


@dataclass(frozen=True)
class Figures:
    """What one thread of a compiled kernel does. "Loop": every innermost loop that loads from global memory, the worst
    of them where there are several. A kernel without one counts whole: all branches, and helpers it may never call."""

    warps: int
    registers: int  # per thread
    spills: int  # NVIDIA: instructions that touch local memory; AMD: registers spilled
    shared: int  # bytes per program
    load: int  # bytes of the widest load of the loop
    store: int  # bytes of the widest store; of a loop, if one stores
    fp64: int  # instructions of double precision
    barriers: int  # in the loop; 0 for a kernel without one
    instructions: float  # in the loop, per element
    loops: int  # how many such loops


class _NoDevice:
    """Stands in for Triton's driver: says which GPU to compile for, and has none."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps one cache per device, so targets must not share a name

    def get_current_stream(self, device):
        return 0


@contextmanager
def _pretend(target, hook: Callable):
    """Inside, Triton and torch.version speak of `target`, and the JIT hands every launch to `hook`."""
    import torch
    from triton import knobs
    from triton.runtime import driver

    hip = torch.version.hip
    torch.version.hip = "pretended" if target.backend == "hip" else None
    driver.set_active(_NoDevice(target))
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        torch.version.hip = hip
        knobs.runtime.jit_cache_hook = None
        driver.set_active(None)  # the next use looks for a real one


def gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[name])


def launches(call: Callable[[], object], target: str) -> list[Launch]:
    """The kernel launches that call() makes when the GPU is `target`; nothing is compiled or run."""
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is on: the interpreter compiles nothing")
    caught = []

    def hook(*, fn, compile, **_):
        options = json.loads(compile["specialization_data"])["options"]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        (attributes,) = compile["configs"]
        caught.append(Launch(fn.jit_function, compile["signature"], compile["constants"], attributes, options))
        return True  # "already compiled": the JIT stops here and launches nothing

    with _pretend(gpu_target(target), hook):
        call()
    if not caught:
        raise RuntimeError("this call launched no kernel")
    return caught


def figures(launch: Launch, target: str, element_bytes: int) -> Figures:
    """Compile a launch and read its figures.

    How many elements a thread handles: in a loop, by the bytes it loads there, `element_bytes` each; without one, by
    the kernel's constant BLOCK, the elements of a program.
    """
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=gpu_target(target), options=launch.options)
    if "cubin" in compiled.asm:
        program, registers, spills = read_nvidia(*_disassemble(compiled.asm["cubin"]))
    else:
        program, registers, spills = read_amd(compiled.asm["amdgcn"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    block = launch.constants.get((launch.function.arg_names.index("BLOCK"),)) if "BLOCK" in launch.signature else None
    elements = block and max(1, block // (warps * TARGETS[target][2]))
    return Figures(warps, registers, spills, shared, **summarise(program, element_bytes, elements))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) of a cubin, as cuobjdump and nvdisasm print them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", "-ndf", "-c", file.name]
        usage, code = (subprocess.run(c, check=True, capture_output=True, text=True) for c in commands)
    return usage.stdout + usage.stderr, code.stdout


@dataclass(frozen=True)
class Instruction:
    """One machine instruction, its kind already known."""

    name: str
    load: int = 0  # bytes per thread from global memory
    store: int = 0
    barrier: bool = False
    fp64: bool = False
    jump: str = ""  # the label it jumps to


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the instruction behind it

    def loops(self) -> list[list[Instruction]]:
        """Innermost loops: from a label to the last jump back to it, with no other such stretch inside."""
        ends = {}
        for i, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.jump, i + 1)
            if start <= i:
                ends[start] = i
        spans = list(ends.items())
        inner = [
            (a, b) for a, b in spans if not any((a, b) != other and a <= other[0] and other[1] <= b for other in spans)
        ]
        return [self.instructions[a : b + 1] for a, b in inner]


def summarise(program: Program, element_bytes: int, elements: int | None) -> dict:
    """The part of Figures that is read from the instructions; `elements` per thread, for a program without a loop."""
    whole, loops = program.instructions, program.loops()
    loading = [loop for loop in loops if any(i.load for i in loop)]
    storing = [loop for loop in loops if any(i.store for i in loop)]
    loaded = [sum(i.load for i in loop) / element_bytes for loop in loading] or [elements]
    if not all(loaded) or min(loaded) < 1:
        raise Unreadable(f"a thread handles {loaded} elements: neither the loads of the loop nor BLOCK say how many")
    return dict(
        load=min(max(i.load for i in part) for part in loading or [whole]),
        store=min(max(i.store for i in part) for part in storing or [whole]),
        fp64=sum(i.fp64 for i in whole),
        barriers=max((sum(i.barrier for i in loop) for loop in loading), default=0),
        instructions=max(len(part) / n for part, n in zip(loading or [whole], loaded, strict=True)),
        loops=len(loading),
    )


def read_nvidia(usage: str, code: str) -> tuple[Program, int, int]:
    """(program, registers, spills) from `cuobjdump -res-usage` and `nvdisasm -c`."""
    resources = re.findall(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if len(resources) != 1:
        raise Unreadable(
            f"cuobjdump names the registers of {len(resources)} functions, one was expected: {usage[:200]!r}"
        )
    registers, stack, local = map(int, resources[0])
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            instructions.append(_nvidia_instruction(found[1], found[2]))
    while instructions and instructions[-1].name == "NOP":  # they fill the last cache line
        instructions.pop()
    program = _checked(Program(instructions, labels), "EXIT")
    spills = sum(i.name.startswith(("STL", "LDL")) for i in instructions)
    if (stack or local) and not spills:
        raise Unreadable(f"{stack} bytes of stack and {local} of local memory, but nothing that reads or writes them")
    return program, registers, spills


def _nvidia_instruction(name: str, rest: str) -> Instruction:
    base, *modifiers = name.split(".")
    if base in ("UTMALDG", "UTMASTG", "UBLKCP"):
        raise Unreadable(f"{name}: bytes moved by the bulk copy engine are not counted here")
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}  # without one: 32
    width = next((bits[m] for m in modifiers if m in bits), 32) // 8
    jump = re.search(r"\.L_x_\d+", rest) if base == "BRA" else None
    return Instruction(
        name,
        load=width if base in ("LDG", "LDGSTS", "LD") else 0,
        store=width if base in ("STG", "ST") else 0,
        barrier=base == "BAR",
        fp64=base in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")
        or bool({"F64", "RCP64H", "RSQ64H"} & {*modifiers}),
        jump=jump[0] if jump else "",
    )


def read_amd(assembly: str) -> tuple[Program, int, int]:
    """(program, registers, spills) from the assembly that Triton hands to AMD's assembler."""
    code, end, notes = assembly.partition(".Lfunc_end0:")
    if not end:
        raise Unreadable(f"no end of the function in {assembly[:200]!r}")
    counts = {}
    for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        found = re.findall(rf"\.{key}:\s+(\d+)", notes)
        if len(found) != 1:
            raise Unreadable(f"{key} stands {len(found)} times in the notes, once was expected")
        counts[key] = int(found[0])
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\t([a-z]\w+)(.*)", line):
            instructions.append(_amd_instruction(found[1], found[2]))
    program = _checked(Program(instructions, labels), "s_endpgm")
    return program, counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def _amd_instruction(name: str, rest: str) -> Instruction:
    moved = {"load": 0, "store": 0}
    if found := re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", name):
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}
        sizes |= {"byte": 1, "ubyte": 1, "sbyte": 1}
        size = sizes.get(found[2].removesuffix("_hi").removesuffix("_d16"))
        if size is None:
            raise Unreadable(f"{name}: how many bytes is that?")
        moved[found[1]] = size
    jump = re.search(r"\.LBB\d+_\d+", rest) if name.startswith(("s_cbranch", "s_branch")) else None
    return Instruction(name, **moved, barrier=name == "s_barrier", fp64="_f64" in name, jump=jump[0] if jump else "")


def _checked(program: Program, last: str) -> Program:
    """The program, if it has an end and every jump has its label."""
    if not any(i.name.split(".")[0] == last for i in program.instructions):
        raise Unreadable(f"{len(program.instructions)} instructions and no {last} among them")
    lost = {i.jump for i in program.instructions if i.jump} - set(program.labels)
    if lost:
        raise Unreadable(f"jumps to labels that are not there: {', '.join(sorted(lost))}")
    return program
