"""kernels/: what the operations promise, asked of the reference, of the Triton kernels in the interpreter, and, with
`python -m pytest -m gpu`, of the same kernels on a GPU. The promises about numbers are in kernel_checks.py; here each
implementation must keep them, and here is what concerns the operators around it: autograd, compile, dispatch, cost.
"""

import contextlib
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import kernel_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import NAN, Advantage, Head, IoU, LogProb, banded, logits_of
from torch.library import opcheck
from torch.testing import assert_close

import bench.kernels
import kernels
from kernels import advantage, box_iou, group_advantage, iou, linear_logprob, logprob, token_logprob

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and sys.modules["triton"].knobs.runtime.interpret
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton, and its interpreter: TRITON_INTERPRET=1")
EAGER = partial(bench.kernels.eager, 1)  # logits.float().log_softmax().gather()
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
RAW = ["reference", pytest.param("triton", marks=needs_interpreter), GPU]


@pytest.fixture(autouse=True)
def skipped_without_a_gpu(request):
    if request.node.get_closest_marker("gpu") and (not (torch.cuda.is_available() and HAS_TRITON) or INTERPRETED):
        pytest.skip("needs a CUDA device, triton, and the interpreter off: run python -m pytest -m gpu")


def implementation(kind, name: str):
    """The reference, or the kernels in the interpreter or on a GPU, as kernel_checks.py calls them."""
    device, of = "cuda" if name == "cuda" else "cpu", "reference" if name == "reference" else "triton"
    if kind in (IoU, Advantage):
        where = (iou, f"{of}_iou") if kind is IoU else (advantage, f"{of}_advantage")
        return partial(banded, device, getattr(*where))
    passes = getattr(logprob, f"{of}_forward"), getattr(logprob, f"{of}_backward")
    log_prob = LogProb(*passes, device, range_checked=of == "triton")
    return log_prob if kind is LogProb else Head(logprob, log_prob)


KINDS = [(kind, f) for kind in (LogProb, Head, IoU, Advantage) for f in checks.promises(kind)]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize(("kind", "promise"), KINDS, ids=[f.__name__ for _, f in KINDS])
def test_kernel(kind, promise, name):
    promise(implementation(kind, name))


@pytest.fixture(params=RAW[:2])
def operators(request):
    """The public functions on CPU tensors, with either implementation behind them."""
    with kernels.interpreted() if request.param == "triton" else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_interpreter), GPU])
def test_rows_may_be_2_to_the_30_apart(device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    checks.rows_may_be_2_to_the_30_apart(logprob, device)


@pytest.mark.gpu
def test_no_races_on_a_gpu():
    """20 runs on a full device give the same bits, out of place and in place."""
    logits, tokens, grad = (x.cuda() for x in logits_of(600, 151936, torch.bfloat16))
    a, b = (x.cuda() for x in checks.boxes_of(10**6))
    rewards = checks.rewards_of(4096, 8).float().cuda()

    def everything(out=None) -> list:
        passed = logprob.triton_forward(logits, tokens, 0.9, True)
        x = logits if out is None else out
        gradient = logprob.triton_backward(grad, x, tokens, passed[1], 0.9, out)
        return [*passed, gradient, iou.triton_iou(a, b, True), advantage.triton_advantage(rewards, "std", 1e-4)]

    first = everything()
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(everything(logits.clone()), first, strict=True))


def test_gradients_reach_what_needs_them_and_nothing_else(operators):
    hidden, weight, tokens, grad = checks.head_of(6, 12, 301)
    expected = checks.naive(hidden.double() @ weight.double().t(), tokens, grad, 0.9)
    gradients = expected.gradient @ weight.double(), expected.gradient.t() @ hidden.double()
    logits = (hidden @ weight.t()).requires_grad_()
    logp, entropy = token_logprob(logits, tokens, 0.9, entropy=True)
    logp.backward(grad)
    checks.assert_gradient(logits.grad, expected.gradient, tokens, grad)
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True)]
        logp, entropies = linear_logprob(*leaves, tokens, 0.9, 4, entropy=True)
        assert_close((logp, entropies), (expected.logp.float(), entropy), rtol=5e-6, atol=5e-6)
        logp.backward(grad)
        for leaf, gradient, want in zip(leaves, gradients, wanted, strict=True):
            assert leaf.grad is None if not want else ((leaf.grad - gradient).abs() < 4e-6).all()
    assert not linear_logprob(hidden, weight, tokens).requires_grad
    for x in (entropy, entropies, group_advantage(hidden.requires_grad_()), box_iou(hidden[:, :4], hidden[:, 4:8])):
        assert not x.requires_grad


def test_log_probs_pass_gradcheck_and_refuse_a_second_derivative(operators):
    logits, tokens, _ = logits_of(2, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens, 0.7), logits.requires_grad_())
    hidden, weight, ids, _ = checks.head_of(3, 2, 5, torch.float64)
    arguments = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, ids, 0.7, 2), arguments)
    (gradient,) = torch.autograd.grad(token_logprob(logits, tokens).exp().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_the_operators_pass_opcheck(operators):
    for dtype, entropy in ((torch.float32, False), (torch.bfloat16, True)):
        logits, tokens, grad = logits_of(3, 11, dtype)
        opcheck(kernels._token_logprob, (logits.requires_grad_(), tokens, 0.9, entropy))
    lse = logits.detach().float().logsumexp(1)
    opcheck(kernels._token_logprob_backward, (grad, logits.detach(), tokens, lse, 0.9))
    hidden, weight, tokens, grad = checks.head_of(5, 4, 11)
    lse = (hidden @ weight.t()).logsumexp(1)
    for wanted in ((True, True), (False, True)):
        opcheck(kernels._linear_logprob_backward, (grad, hidden, weight, tokens, lse, 0.9, 2, *wanted))
        h, w = (x.clone().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True))
        opcheck(kernels._linear_logprob, (h, w, tokens, 0.9, 2, wanted[0]))
    opcheck(kernels._box_iou, (*checks.boxes_of(5), True))
    opcheck(kernels._group_advantage, (checks.rewards_of(3, 4), "std", 1e-4))


def test_torch_compile_keeps_the_operators_whole(operators):
    """fullgraph: a break is an error. The backend runs what was captured, both passes, without a C++ compiler."""
    hidden, weight, tokens, grad = checks.head_of(6, 12, 301)

    def step(h, w):
        logp, entropy = linear_logprob(h, w, tokens, 0.9, 4, entropy=True)
        scores = box_iou(h[:, :4], h[:, 4:8], giou=True) + group_advantage(entropy.view(2, 3)).flatten()
        return (logp * scores + token_logprob(h @ w.t(), tokens)) * grad

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h, w)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), (h, w))))
    assert_close(*results)


@pytest.mark.parametrize("budget", [1, 7, 8 * 1037])
def test_the_chunk_size_of_the_reference_changes_nothing(budget, monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", budget)
    checks.any_strides_and_no_rows_will_do(implementation(LogProb, "reference"))
    checks.what_is_no_distribution_or_no_token_is_nan_and_alone(implementation(LogProb, "reference"))


LOGITS, HIDDEN, WEIGHT, IDS = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])
REFUSED = {
    token_logprob: [(LOGITS[None], IDS), (LOGITS, IDS[:1]), (LOGITS, IDS, 0.0), (LOGITS, IDS, NAN)],
    linear_logprob: [
        (HIDDEN[0], WEIGHT, IDS), (HIDDEN, WEIGHT[:, :2], IDS), (HIDDEN, WEIGHT, IDS[:1]), (HIDDEN, WEIGHT, IDS, 0.0),
        (HIDDEN, WEIGHT, IDS, 1.0, 0),
    ],
    box_iou: [(torch.zeros(3, 4), wrong) for wrong in (torch.zeros(3), torch.zeros(2, 4), torch.zeros(3, 5))],
    group_advantage: [(torch.zeros(3),), (torch.zeros(2, 0),), (torch.zeros(2, 3), "mad")],
}  # fmt: skip


@pytest.mark.parametrize("function", REFUSED)
def test_wrong_shapes_and_settings_are_refused(function):
    for arguments in REFUSED[function]:
        with pytest.raises(ValueError):
            function(*arguments)


def test_groups_of_one_and_the_default_eps(operators):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert group_advantage(torch.tensor([[0.3], [1.0]])).tolist() == [[0], [0]]
    expected = torch.tensor([[-1.0, 1.0]]) * 0.5 / (0.5**0.5 + 1e-4)
    assert_close(group_advantage(torch.tensor([[0.0, 1.0]])), expected, rtol=0, atol=2e-7)


@needs_interpreter
def test_cpu_tensors_go_to_the_reference_unless_the_interpreter_is_asked_for(monkeypatch):
    called = []
    for module, name in ((logprob, "forward"), (logprob, "backward"), (iou, "iou"), (advantage, "advantage")):
        function = getattr(module, f"triton_{name}")
        monkeypatch.setattr(module, f"triton_{name}", lambda *a, f=function, n=name: called.append(n) or f(*a))

    def use_all():
        token_logprob(LOGITS.clone().requires_grad_(), IDS).sum().backward()
        box_iou(*checks.boxes_of(3))
        group_advantage(checks.rewards_of())
        linear_logprob(HIDDEN, WEIGHT, IDS)

    use_all()
    assert not called
    with kernels.interpreted():
        use_all()
    assert called == ["forward", "backward", "iou", "advantage", "forward"]
    use_all()
    assert len(called) == 5
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), kernels.interpreted():
        pass


def test_a_machine_without_triton_has_the_references():
    code = """
import sys
sys.modules["triton"] = None  # every import of it fails
import torch, kernels
logits = torch.zeros(2, 4, requires_grad=True)
kernels.token_logprob(logits, torch.tensor([0, 1])).sum().backward()
kernels.linear_logprob(torch.zeros(2, 3), torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1])).sum().backward()
assert logits.grad[0].tolist() == [0.75, -0.25, -0.25, -0.25]
assert kernels.box_iou(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[0, 0, 1, 2]])).item() == 0.5
assert kernels.group_advantage(torch.ones(1, 4)).tolist() == [[0] * 4]
kernels.interpreted().__enter__()
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "RuntimeError: the Triton interpreter is off: set TRITON_INTERPRET=1" in child.stderr, child.stderr


def peak_bytes(function, device: str = "cpu") -> int:
    """The most that is allocated at a time while `function` runs, by PyTorch's own account, above what was before: so
    `function` must not free what it did not allocate."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(events)))


@pytest.mark.parametrize("device,frozen", [("cpu", False), ("cpu", True), pytest.param("cuda", False, marks=GPU.marks)])
def test_the_head_never_has_all_logits(device, frozen, monkeypatch):
    """fp32 master weights under bf16 arithmetic. Beside the gradients, and the weights cast for the call, it needs less
    than half of bf16 logits of all rows, of which autograd keeps several. A weight gradient would hide a whole tensor
    of them, hence the frozen head."""
    n, h, v, chunk = (256, 512, 2048, 8) if device == "cpu" else (4096, 2048, 151936, 1024)
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", v)  # the reference works on one row at a time
    hidden = torch.randn(n, h, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = (torch.randn(v, h, device=device) / h**0.5).requires_grad_(not frozen)
    tokens = torch.randint(v, (n,), device=device)
    linear_logprob(hidden[:1].detach(), weight[:8].detach(), tokens[:1] * 0)  # cuBLAS takes its workspace once
    needed = 2 * v * h + 2 * n * h + (0 if frozen else 4 * v * h)  # the cast, the gradients
    got = peak_bytes(lambda: linear_logprob(hidden, weight, tokens, 0.9, chunk).sum().backward(), device)
    assert needed < got < needed + 2 * n * v / 2


def ways(rows: int) -> list:
    """Forward and backward of bf16 logits (rows, real vocabulary): ours, and float().log_softmax().gather()."""
    logits, tokens, grad = logits_of(rows, 151936, torch.bfloat16)
    runs = [lambda f=f: f(logits.detach().requires_grad_(), tokens).backward(grad) for f in (token_logprob, EAGER)]
    runs[0]()  # the first call of an operator imports half of torch
    return runs


def test_the_reference_takes_two_fifths_of_the_memory_of_eager_log_softmax():
    ours, eager = map(peak_bytes, ways(64))
    assert 2 * 64 * 151936 <= ours <= 0.4 * eager, (ours, eager)  # nearly all of it the gradient itself


@pytest.mark.slow
def test_the_reference_takes_half_the_time_of_eager_log_softmax():
    """Processor time of one thread, in turns, and the median: a busy machine slows both."""
    runs, marks = ways(256) * 7, [time.process_time()]
    for run in runs:
        run()
        marks.append(time.process_time())
    ratios = [(b - a) / (c - b) for a, b, c in zip(marks[::2], marks[1::2], marks[2::2], strict=False)]
    assert len(ratios) == 7 and statistics.median(ratios) <= 0.5, ratios


BOX = st.lists(st.floats(width=32), min_size=4, max_size=4)


@given(st.lists(st.tuples(BOX, BOX), min_size=20, max_size=30))
@settings(max_examples=25, deadline=None)
def test_iou_of_whatever_numbers_is_in_range_symmetric_and_the_kernels(pairs):
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    both = box_iou(a, b), box_iou(a, b, giou=True)
    assert ((both[0] >= 0) & (both[0] <= 1) & (both[1] >= -1) & (both[1] <= both[0])).all()
    for giou in (False, True):
        assert torch.equal(box_iou(b, a, giou), both[giou])
        assert not INTERPRETED or torch.equal(iou.triton_iou(a, b, giou), both[giou])


SMALL_KERNEL = """
@triton.jit
def {}(X, Y, OUT, n, BLOCK: tl.constexpr = 4):
    i = tl.arange(0, BLOCK)
    tl.store(OUT + i, {})
"""
SMALL_KERNELS = {
    "largest": "0 * i + tl.max(tl.load(X + i), 0)",
    "larger": "tl.maximum(tl.load(X + i), tl.load(Y + i))",
    "without_other": "tl.load(X + i, mask=i < 2)",
    "divided": "tl.load(X + i) / tl.load(Y + i)",
    "rounded": "tl.load(X + i).to(tl.bfloat16)",
    "doubled": "tl.load(X + i) + tl.load(X + i)",
    "in_order": "4 * tl.load(OUT + i) + tl.program_id(0)",
}


@needs_interpreter
def test_the_guard_sees_what_the_interpreter_does_not(tmp_path):
    """Each line of the table in interpreter_guard.py, with a kernel that does just that."""
    code = "import triton, triton.language as tl\n" + "".join(SMALL_KERNEL.format(*x) for x in SMALL_KERNELS.items())
    (tmp_path / "small_kernels.py").write_text(code)
    small = checks.load_module(tmp_path / "small_kernels.py")
    x, out, half = torch.tensor([1.0, 3.0, NAN, 7.0]), torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)

    def run(name: str, a, b=x, out=out, programs=1) -> list:
        getattr(small, name)[(programs,)](a, b, out, 4)
        return out.tolist()

    assert run("in_order", x, programs=3) == [(2 * 4 + 1) * 4 + 0] * 4
    assert run("largest", x) == [7] * 4
    assert run("larger", x, torch.tensor([2.0, 2.0, 2.0, NAN])) == [2, 3, 2, 7]
    assert str(run("without_other", x[:2])) == "[1.0, 3.0, nan, nan]"
    assert 9 / 20 - 1e-6 < run("divided", torch.full((4,), 9.0), torch.full((4,), 20.0))[0] != torch.tensor(0.45).item()
    assert run("rounded", torch.tensor([1 + 2**-8 + 2**-9] * 4), out=half) == [1 + 2**-7] * 4
    wrong = ("doubled", (x.bfloat16(), x, half), "TypeError"), ("larger", (x[:2].clone(), x), "IndexError")
    for name, arguments, error in (*wrong, ("larger", (x, x, out[:3]), "IndexError")):
        with pytest.raises(Exception, match=error):
            run(name, *arguments)
