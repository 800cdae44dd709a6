"""The tests can fail: kernels that are wrong in one place each, made from ours by replacing a piece of their source and
given to the very promises of kernel_checks.py. Every one must break one; `pytest -m slow` asks all 85.

Beside it, what the tolerances of Liger-Kernel's bf16 tests (atol 5e-2, rtol 5e-1) would catch, asked of all outputs for
random inputs and in the same guarded interpreter: that is why ours come from the arithmetic.
"""

from functools import partial
from pathlib import Path

import kernel_checks as checks
import pytest
import torch
from kernel_checks import Advantage, Head, IoU, LogProb, banded, promises
from test_kernels import needs_interpreter

from kernels import advantage, iou, logprob
from kernels.optional import triton

pytestmark = needs_interpreter

# What is wrong: text of ours => text instead. The text occurs once in the file: see `mutated`.
FAULTS = {
    "forward": r"""
no maximum subtracted: z = (x - new[None, :]) * SCALE => z = x * SCALE
sums not rescaled to a new maximum: total * tl.exp2(shift) + tl.sum(e, 0) => total + tl.sum(e, 0)
threads' sums not rescaled to the common maximum: tl.sum(tl.exp2(shift) * total, 0) => tl.sum(total, 0)
times T instead of divided by it: SCALE: tl.constexpr = LOG2E / TEMP => SCALE: tl.constexpr = LOG2E * TEMP
T left out of the chosen logit: ((chosen - highest) * SCALE => ((chosen - highest) * LOG2E
T left out of the logsumexp: highest * INVERSE + log_total => highest + log_total
base 2 taken for base e: - log_total) * LN2) => - log_total * LN2) * LN2)
mask of the tail one too long: mask=whole + column < V => mask=whole + column <= V
mask of the tail one too short: mask=whole + column < V => mask=whole + column < V - 1
no mask in the tail: , mask=whole + column < V, other=float("-inf") =>
nothing said of masked logits: mask=whole + column < V, other=float("-inf") => mask=whole + column < V
masked logits are 0: mask=whole + column < V, other=float("-inf") => mask=whole + column < V, other=0.0
first tile left out: range(0, whole, TILE) => range(TILE, whole, TILE)
last whole tile left out: range(0, whole, TILE) => range(0, whole - TILE, TILE)
vectors overlap: [None, :] * VECTOR + tl.arange(0, VECTOR) => [None, :] + tl.arange(0, VECTOR)
running maximum starts at -inf: tl.full([LANES], LOWEST, ACC) => tl.full([LANES], float("-inf"), ACC)
running maximum starts at 0: tl.full([LANES], LOWEST, ACC) => tl.full([LANES], 0.0, ACC)
maximum that drops the row so far: new = tl.maximum(top, tl.max(x, 0)) => new = tl.max(x, 0)
rows taken to be V apart: LOGITS += row * stride\n    column = tl.arange => LOGITS += row * V\n    column = tl.arange
any id is believed: mask=known, other => mask=token == token, other
negative ids are believed: known = (token >= 0) & (token < V) => known = token < V
id V is believed: known = (token >= 0) & (token < V) => known = (token >= 0) & (token <= V)
entropy with the wrong sign inside: (log_total - weighted / total) => (log_total + weighted / total)
entropy without its floor: e * tl.maximum(z, FLOOR) => e * z
entropy whose weight is not moved to a new maximum: (weighted + total * tl.maximum(shift, FLOOR)) + tl => weighted + tl
entropy whose weight is not moved to the common maximum: (weighted + total * tl.maximum(shift, FLOOR)), 0 => weighted, 0
entropy in bits: (log_total - weighted / total) * LN2 => (log_total - weighted / total)
""",
    "backward": r"""
gradient without 1/T: tl.load(GRAD + row) * INVERSE => tl.load(GRAD + row)
softmax without T: (x * INVERSE - tl => (x - tl
softmax in base 2: tl.load(LSE + row)) * LOG2E) => tl.load(LSE + row)))
gradient with the wrong sign: (hit - p) * grad => (p - hit) * grad
chosen token forgotten: (hit - p) * grad => (0.0 - p) * grad
chosen token one off: column == token, 1.0 => column + 1 == token, 1.0
any id has a gradient: tl.where((token >= 0) & (token < V), grad => tl.where(token == token, grad
gradient not multiplied by the incoming one: (hit - p) * grad => (hit - p)
rows without gradient are read: if grad == 0: => if grad != grad:
rows of negative gradient are left out: if grad == 0: => if grad <= 0:
zeros forgotten: tl.store(OUT + column, tl.zeros([BLOCK], ACC) => tl.store(OUT + 0 * column, tl.zeros([BLOCK], ACC)
column mask one too long: inside = column < V => inside = column <= V
column mask one too short: inside = column < V => inside = column < V - 1
gradient rows taken to be as far apart as the logits': OUT += row * out_stride => OUT += row * stride
every program writes the first columns: tl.program_id(1) * BLOCK + tl => 0 * BLOCK + tl
gradient rounded to fp16 on its way: ((hit - p) * grad).to(OUT => ((hit - p) * grad).to(tl.float16).to(OUT
""",
    "head": r"""
gradient of the weight is that of the last chunk: total.addmm_(a.t(), b) => total.addmm_(a.t(), b, beta=0)
gradient of the weight added up in 16 bits: else 0, dtype=wide) => else 0, dtype=hidden.dtype)
tokens of the first chunk for all: backward(grad[part], x, tokens[part] => backward(grad[part], x, tokens[: len(part)]
logsumexp of the first chunk for all: tokens[part], lse[part] => tokens[part], lse[: len(part)]
gradient of hidden from the logits' chunk: grad_hidden[part] = torch.mm => grad_hidden[: len(part)] = torch.mm
rows without gradient are computed: rows = grad.nonzero()[:, 0] => rows = torch.arange(len(grad))
last part of the vocabulary forgotten: range(0, a.shape[1], WEIGHT_ => range(0, a.shape[1] - WEIGHT_ROWS, WEIGHT_
""",
    "far": r"""
32-bit row offsets, forward: row = tl.program_id(0).to(tl.int64)  # 14 => row = tl.program_id(0)  # 14
32-bit row offsets, backward: row = tl.program_id(0).to(tl.int64)\n    column = => row = tl.program_id(0)\n    column =
""",
    "iou": r"""
division that is an ulp off: tl.math.div_rn(x, y) => x / y
gap counted as overlap: low_b), 0.0) => low_b), -1e30)
union with the overlap counted twice: area_b - inner\n    value = _divide => area_b\n    value = _divide
union summed in another order: area_a + area_b - inner\n    value = _ => area_a + (area_b - inner)\n    value = _
pixels counted inclusively: return width * height => return (width + 1) * (height + 1)
hull from the inner corners: .maximum(high_a, high_b) - tl.minimum(low_a => .minimum(high_a, high_b) - tl.maximum(low_a
GIoU above the IoU where hull and union round apart: _divide(tl.maximum(hull - union, 0.0), => _divide(hull - union,
GIoU over the union: _divide(tl.maximum(hull - union, 0.0), hull) => _divide(tl.maximum(hull - union, 0.0), union)
what is no box is not looked at: tl.where(boxes, value, 0.0) => value
sides not looked at, only areas: (width_a > 0) & (height_a > 0) & (width_b > 0) & (height_b > 0) => area_a > 0
an area of 0 is let in: boxes &= (area_a > 0) & (area_b > 0) => boxes &= (area_a >= 0) & (area_b >= 0)
infinite boxes are let in: (hull < float("inf")) => (hull == hull)
infinite hulls are let in: (hull < float("inf")) => (hull <= float("inf"))
corners mixed up: [0, 2, 1] => [0, 1, 2]
no mask on the boxes: tl.load(A + corner, mask=inside[:, None], other=0.0) => tl.load(A + corner)
mask of the scores one too long: inside = pair < N => inside = pair <= N
every program does the first pairs: tl.program_id(0).to(tl.int64) * BLOCK => 0 * tl.program_id(0).to(tl.int64)
""",
    "advantage": r"""
standard deviation with ddof 0: tl.maximum(G - 1, 1) => G
eps inside the root: (tl.sqrt(variance) + EPS) => tl.sqrt(variance + EPS)
variance for standard deviation: (tl.sqrt(variance) + EPS) => (variance + EPS)
no rule for groups without spread: tl.where(flat, 0.0, advantage) => advantage
spread from the rounded mean: r != first => tl.abs(r - tl.sum(r, 0) / G) > 0
spread by a max, which drops NaN: sum((real & (r != first)).to(tl.int32) => max(tl.where(real, tl.abs(r - first), 0.0)
padding in the spread: (real & (r != first)) => (r != first)
mean over the padding: tl.sum(r, 0) / G, 0.0) => tl.sum(r, 0) / BLOCK, 0.0)
padding in the variance: tl.where(real, r - tl.sum(r, 0) / G, 0.0) => r - tl.sum(r, 0) / G
nothing said of masked rewards: mask=real, other=0.0).to(ACC) => mask=real).to(ACC)
no mask on the rewards: , mask=real, other=0.0).to(ACC) => ).to(ACC)
no mask on the advantages: advantage), mask=real) => advantage))
rows taken to be G apart: REWARDS + row * stride + member => REWARDS + row * G + member
scale none ignored: if STD: => if True:
compared with the first member of the first group: first = tl.load(REWARDS + row * stride) => first = tl.load(REWARDS)
mean of 16 bits: r - tl.sum(r, 0) / G => r - (tl.sum(r, 0) / G).to(tl.float16).to(ACC)
""",
}

FAMILIES = {  # what is changed: in which file, how it is called, and what it has to keep
    "forward": (logprob, lambda m: LogProb(m.triton_forward, m.triton_backward), promises(LogProb)),
    "backward": (logprob, lambda m: LogProb(m.triton_forward, m.triton_backward), promises(LogProb)),
    "head": (logprob, lambda m: Head(m, LogProb(m.reference_forward, m.reference_backward)), promises(Head)),
    "far": (logprob, lambda m: m, [checks.rows_may_be_2_to_the_30_apart]),  # nothing else shows it
    "iou": (iou, lambda m: partial(banded, "cpu", m.triton_iou), promises(IoU)),
    "advantage": (advantage, lambda m: partial(banded, "cpu", m.triton_advantage), promises(Advantage)),
}
LIGER = dict(forward=6, backward=8, head=4, far=0, iou=10, advantage=2)  # how many its tolerances catch
FAULTS = {name: dict(line.split(": ", 1) for line in text.strip().split("\n")) for name, text in FAULTS.items()}


def mutated(family: str, fault: str, folder: Path):
    """Our file with one piece replaced, as a module of its own: triton.jit reads its functions from the file."""
    old, new = (piece.strip().replace("\\n", "\n") for piece in FAULTS[family][fault].split("=>"))
    original = Path(FAMILIES[family][0].__file__)
    source = original.read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {original}"
    file = folder / f"{family}_{list(FAULTS[family]).index(fault)}.py"
    file.write_text(source.replace(old, new))
    return checks.load_module(file, file.stem)


def broken_promise(family: str, module) -> str | None:
    """The first promise that is not kept. An access outside the tensors counts; any other exception is an error in the
    change itself, which would then prove nothing."""
    _, implementation, kept = FAMILIES[family]
    for promise in kept:
        try:
            promise(implementation(module))
        except Exception as error:
            if not isinstance(error, AssertionError) and "not inside any tensor of the launch" not in str(error):
                raise
            return promise.__name__
    return None


def loosely_equal(family: str, module) -> bool:
    """All outputs for random inputs in bf16 within Liger's bf16 tolerances of the float64 formula."""
    k = FAMILIES["forward" if family == "far" else family][1](module)
    if family in ("forward", "backward", "far"):
        arguments = checks.logits_of(4, 4099, torch.bfloat16, spread=1.0)
        pairs = list(zip(k(*arguments, 0.9), checks.naive(*arguments, 0.9), strict=True))
        del pairs[1]  # the logsumexp, which the operator keeps to itself
    elif family == "head":
        hidden, weight, tokens, grad = checks.head_of(8, 12, 301, torch.bfloat16)
        expected = checks.naive(hidden.double() @ weight.double().t(), tokens, grad, 0.9)
        got = k(hidden, weight.float(), tokens, grad, 0.9, 3)
        pairs = [(got.logp, expected.logp), (got.hidden, expected.gradient @ weight.double())]
        pairs += [(got.weight, expected.gradient.t() @ hidden.double())]
    elif family == "iou":
        a, b = checks.boxes_of(1000, torch.bfloat16)
        pairs = [(k(a, b, giou), iou.reference_iou(a.double(), b.double(), giou)) for giou in (False, True)]
    else:
        r, reference = checks.rewards_of(16, 8).bfloat16(), advantage.reference_advantage
        pairs = [(k(r, scale, 1e-4), reference(r.double(), scale, 1e-4)) for scale in advantage.SCALES]
    return all(torch.allclose(got.double(), expected.double(), rtol=5e-1, atol=5e-2) for got, expected in pairs)


@pytest.mark.parametrize("family", FAULTS)
@pytest.mark.parametrize("first", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["one", "all"])
def test_wrong_kernels_are_caught(family, first, tmp_path):
    missed, loosely = [], 0
    for fault in list(FAULTS[family])[:first]:
        module = mutated(family, fault, tmp_path)
        missed += [fault] if broken_promise(family, module) is None else []
        try:
            loosely += not loosely_equal(family, module)
        except triton.runtime.errors.InterpreterError:
            loosely += 1  # outside the tensors: the guard's catch, whatever the tolerance
    assert not missed and (first or loosely == LIGER[family])


def test_there_are_85_of_them_and_the_right_ones_are_close_by_any_tolerance():
    """That the right ones keep every promise is what test_kernels.py is about."""
    assert sum(map(len, FAULTS.values())) == 85 and sum(LIGER.values()) == 30
    assert all(loosely_equal(family, original) for family, (original, *_) in FAMILIES.items())
