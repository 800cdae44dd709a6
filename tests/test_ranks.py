"""Several processes are one trainer: in float64 the same run on any number of ranks, and no rank is ever waited for in
vain. Processes are real ones, started by torchrun or its agent, on gloo."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import ranks_program
from programs import ROOT, as_main, fork, lines, records, without_times  # noqa: F401  a fixture
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from norms import Quartiles, fingerprint, write_norms
from runtime.stream import Sampler
from weights import NANO

SMALL = "--group-size 4 --max-tokens 18 --eval-limit 2 --workers 0 --lr 1e-3"
EASY = "check_stability=off,check_margin=off,stages=0:.3:1/.6:.3:1/.75:.3:1"
CASES = {  # twelve pictures
    "plain": "--steps 2 --batch-size 5 --micro-batch 2 --schedule medloc:window=4,tau_start=.05," + EASY,
    "one pass": "--steps 2 --batch-size 5 --micro-batch 9 --schedule raw --eval-every 2",
    "everything": "--steps 2 --batch-size 5 --micro-batch 2 --schedule medloc:window=8,tau_start=.2 --skip-bad 1"
    " --dynamic-sampling 2 --inner-steps 2 --beta .05 --loss dapo:overlong=mask --freeze-vision --workers 1",
    "an idle rank": "--steps 2 --batch-size 1 --micro-batch 1 --schedule raw --group-size 3 --beta .1",
    "adapters": "--steps 2 --batch-size 3 --micro-batch 2 --schedule raw --lora-rank 3 --beta .1 --checkpointing",
}

SHARDED = ("plain", "everything", "an idle rank")
SHARDED = {f"sharded {name}": f"{CASES[name]} --shard --checkpointing" for name in SHARDED}
QUICK = ("plain", "everything", "sharded everything", "one0 exact 2--shard")  # the others are slow
EXACT = f"--steps 3 --batch-size 3 --micro-batch 1 --schedule medloc:window=6,tau_start=.05,{EASY}"
EXACT += " --dynamic-sampling 1 --inner-steps 2 --beta .05 --save-every 1 --eval-limit 1"
MIDDLE, RAISED = 1, 2  # steps after which EXACT is stopped: in the middle of a window, and right after a raise


def marked(names) -> list:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def wanted(request):
    """Which cases are run: of the quick tests, or, with -m slow, all."""
    every = "slow" in request.config.option.markexpr and "not slow" not in request.config.option.markexpr
    return lambda cases, *more: [case for case in cases if every or case[0] in (*QUICK, *more)]


@pytest.fixture(scope="module")
def data(records) -> list[str]:  # noqa: F811
    """The pictures of programs.py, and a copy of the records in which the second of the stream is cut off."""
    folder = records.parent
    second = Sampler(12, 5, 0).take(1, 1)[0]
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    (folder / "broken.png").write_bytes((folder / rows[second]["image"]).read_bytes()[:1500])
    rows[second]["image"] = "broken.png"
    (folder / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(records), str(folder / "broken.jsonl")]


def flags(case: str, data: list[str]) -> list[str]:
    first = [ranks_program.SINGLE] if case.startswith(EXACT) else []
    return [*first, *SMALL.split(), "--data", data["skip-bad" in case], "--val", data[0], *case.split()]


def torchrun(size: int, *command, expect: int = 0, timeout: float = 240, forks: bool = True) -> str:
    """The output of `size` processes that run a command to its end, one thread each. With `forks` torchrun's agent
    forks them from this one, which saves three imports of torch."""
    words = [f"--nproc-per-node={size}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *map(str, command)]

    def work() -> None:
        os.environ.update({"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"})
        os.chdir(ROOT)
        if not forks:
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
        config, *_ = config_from_args(parse_args(["--start-method=fork", *words]))
        elastic_launch(config, lambda: as_main(*command))()

    with tempfile.TemporaryDirectory() as folder:
        job = fork(log := Path(folder) / "log", work)
        job.join(timeout)
        if hangs := job.exitcode is None:
            os.killpg(job.pid, signal.SIGTERM)  # torchrun, which ends its processes
            job.join()
        output = log.read_text()
    assert not hangs and job.exitcode == expect, output
    return output


Case = tuple[str, list[str]] | tuple[str, list[str], tuple[str, int]]  # name, flags, begun (ranks_program.py)


def run_cases(size: int, cases: list[Case], folder: Path, timeout: float = 400) -> dict[str, Path]:
    """Each case as a run on `size` ranks, one after the other in the same processes -> name -> its folder."""
    outs = {name: folder / name.replace(" ", "-") for name, *_ in cases}
    if size == 1:
        for name, *rest in cases:
            ranks_program.run(outs[name], *rest)
    else:
        (folder / "cases.json").write_text(json.dumps([(str(outs[name]), *rest) for name, *rest in cases]))
        torchrun(size, ROOT / "tests" / "ranks_program.py", folder / "cases.json", timeout=timeout)
    return outs


def resumed(begun: Path, *flags: str, steps: tuple[int, ...] = (MIDDLE, RAISED)) -> list[Case]:
    """The run in this folder, stopped and gone on with: cases named by the folder and the step."""
    words = [ranks_program.SINGLE, "--resume", *flags]
    return [(f"{begun.parent.name} {begun.name} {step}{' '.join(flags)}", words, (str(begun), step)) for step in steps]


@pytest.fixture(scope="module")
def alone(data, wanted, tmp_path_factory) -> dict[str, Path]:
    """CASES, and EXACT: straight, and stopped and resumed."""
    folder = tmp_path_factory.mktemp("one")
    cases = [(name, flags(case, data)) for name, case in (CASES | {"exact": EXACT}).items()]
    return run_cases(1, wanted(cases + resumed(folder / "exact"), "exact"), folder)


@pytest.fixture(scope="module")
def two(data, alone, wanted, tmp_path_factory) -> dict[str, Path]:
    """CASES and SHARDED on two ranks; EXACT, replicated and sharded; and EXACT begun by one rank."""
    folder = tmp_path_factory.mktemp("two")
    cases = CASES | SHARDED | {"exact": EXACT, "shards": EXACT + " --shard"}
    cases = [(name, flags(case, data)) for name, case in cases.items()]
    cases += resumed(folder / "exact") + resumed(folder / "shards", "--shard", steps=(RAISED,))
    cases += resumed(alone["exact"], steps=(RAISED,)) + resumed(alone["exact"], "--shard", steps=(RAISED,))
    return run_cases(2, wanted(cases), folder)


@pytest.fixture(scope="module")
def one_after_two(two, tmp_path_factory) -> dict[str, Path]:
    """EXACT begun by two ranks, replicated and sharded, that one goes on with."""
    cases = resumed(two["exact"], steps=(RAISED,)) + resumed(two["shards"], "--no-shard", steps=(RAISED,))
    return run_cases(1, cases, tmp_path_factory.mktemp("later"))


def traces(out: Path) -> list[list[dict]]:
    """[rank][step]."""
    return json.loads((out / "trace.json").read_text())


def assert_same_run(one: Path, several: Path, size: int) -> None:
    expected, found = (without_times(lines(out / "metrics.jsonl")) for out in (one, several))
    assert [row["tau"] for row in found] == [row["tau"] for row in expected]
    assert [row["decision"] for row in found] == [row["decision"] for row in expected]
    for a, b in zip(expected, found, strict=True):
        assert b == {key: pytest.approx(v, rel=1e-9, abs=1e-9) if isinstance(v, float) else v for key, v in a.items()}
    (single,), ranks_steps = traces(one), traces(several)
    assert len(ranks_steps) == size
    for step, *shares in zip(single, *ranks_steps, strict=True):
        assert sorted(step["rolled"]) == sorted(row for share in shares for row in share["rolled"])
        assert all(share["u"] == step["u"] and share["weights"] == shares[0]["weights"] for share in shares)
    a, b = load_file(one / "wide.safetensors"), load_file(several / "wide.safetensors")
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in a) < 1e-10
    start = load_file(ROOT / "assets" / "nano" / "model.safetensors")
    assert max((a[name] - start.get(name, 0)).abs().max() for name in a) > 1e-4  # and it did move
    assert json.loads((one / "eval.json").read_text()) == json.loads((several / "eval.json").read_text())


@pytest.mark.parametrize("name", marked(CASES))
def test_two_ranks_are_one(name, alone, two):
    assert_same_run(alone[name], two[name], 2)


def test_a_mixture_with_norms_is_the_same_run_on_two_ranks(tmp_path):
    """Which places are whose, quartiles taken anew, the batch's spread, groups that are replaced, each dataset's share
    of |A|, which no rank has by itself."""
    keys = [("phantoms-ultrasound", "box"), ("phantoms-xray", "box")]
    table = {(key, "task"): Quartiles(0.15, 0.2, 0.3, 99) for key in keys}
    write_norms(tmp_path / "n.json", table, {"model": fingerprint(NANO)})
    said = "--data phantoms:xray=1 phantoms:ultrasound=3 --schedule raw --advantage batch --batch-size 5 --steps 3"
    words = [*SMALL.split(), *said.split(), "--dynamic-sampling", "1", "--normalise", f"{tmp_path}/n.json:refresh=2"]
    words += ["--group-size", "8", "--temperature", ".1"]
    outs = []
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        outs += run_cases(size, [("mixture", words)], tmp_path / str(size)).values()
    expected, found = (without_times(lines(out / "metrics.jsonl")) for out in outs)
    for a, b in zip(expected, found, strict=True):
        assert b == {key: pytest.approx(v, rel=1e-9, abs=1e-9) if isinstance(v, float) else v for key, v in a.items()}
    assert expected[-1]["drawn"] > 15 and "advantage_share/phantoms-xray/box" in expected[0]
    one, two = (json.loads((out / "step-000003" / "trainer.json").read_text())["norms"] for out in outs)
    assert one == two and one["steps"] == 1 and [row["n"] for row in one["table"]] != [99, 99]


def test_the_cases_are_what_they_are_meant_to_be(alone, two):
    """tau rises, a picture breaks and a step draws again, groups are replaced, and a rank has nothing to do."""
    rows = {name: lines(out / "metrics.jsonl") for name, out in alone.items()}
    assert len({row["tau"] for row in rows["plain"]}) > 1
    everything = rows["everything"]
    assert everything[-1]["drawn"] > sum(row["groups"] for row in everything) > 10
    assert any(row["dropped"] for row in everything) and all(row["kl"] is not None for row in everything)
    if "an idle rank" in two:  # with -m slow
        assert [[len(step["rolled"]) for step in rank] for rank in traces(two["an idle rank"])] == [[1, 0], [0, 1]]
        assert all(step["shared"] for outs in (alone, two) for rank in traces(outs["one pass"]) for step in rank)
    shares = [(len(step["rolled"]), step["shared"]) for rank in traces(two["plain"]) for step in rank]
    assert shares == [(3, False), (2, True), (2, True), (3, False)]  # two at a time


def test_a_step_is_four_collectives_and_one_of_them_carries_the_groups(alone, two):
    """Numbers of all groups; how much is in the batch; the sums of the metrics; the gradient."""
    for out in (alone["plain"], alone["everything"]):
        assert len({step["collectives"] for step in traces(out)[0]}) == 1  # none in between
    for rank in traces(two["plain"]):
        first, second = (step["collectives"] for step in rank)
        assert second - first == 4
        assert rank[1]["gathered"] == [3 * 4 * 7, 4, 6]  # three places a rank, four answers, seven numbers of each


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_twenty_steps_on_several_ranks_are_those_of_one(size, data, tmp_path):
    cases = [
        (name, flags(CASES[name].replace("--steps 2", "--steps 20 --lr 1e-4"), data))
        for name in ("plain", "everything")
    ]
    both = cases + [(f"sharded {name}", [*words, "--shard"]) for name, words in cases]
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
    one, several = run_cases(1, cases, tmp_path / "one"), run_cases(size, both, tmp_path / "several", timeout=3000)
    for name, out in several.items():
        assert_same_run(one[name.removeprefix("sharded ")], out, size)


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("name", marked(SHARDED))
def test_sharded_weights_are_trained_as_whole_ones(name, alone, two):
    """FSDP2 on two ranks with micro-batches of unequal number, recomputed activations, a sharded reference, a frozen
    tower, several inner steps; against one process without any of that."""
    assert_same_run(alone[name.removeprefix("sharded ")], two[name], 2)


# ------------------------------------------------------------------------------------------------------------- resume


def same_tensors(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


RESUMED = ["one0 exact 1", "one0 exact 2", "two0 exact 1", "two0 exact 2", "two0 shards 2--shard"]


@pytest.mark.parametrize("name", marked(RESUMED))
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, alone, two):
    """On one rank and on two, in the middle of a window and right after a raise, with inner steps and dynamic sampling:
    metrics line by line (times aside), weights and moments bit by bit."""
    outs = alone if name.startswith("one") else two
    straight, again = outs[name.split()[1]], outs[name]
    rows, found = (without_times(lines(out / "metrics.jsonl")) for out in (straight, again))
    assert rows == found and len(rows) == 3
    for file in ("model.safetensors", "trainer.safetensors"):
        assert same_tensors(straight / "step-000003" / file, again / "step-000003" / file)
        assert not same_tensors(straight / "step-000002" / file, again / "step-000003" / file)


def test_the_run_that_is_resumed_is_what_it_is_meant_to_be(alone):
    rows = lines(alone["exact"] / "metrics.jsonl")
    assert "window 4/6 groups" in rows[MIDDLE - 1]["decision"] and rows[RAISED]["tau"] > rows[RAISED - 1]["tau"]
    assert all(row["groups"] > 3 and row["dropped"] and row["grad_norm"] and row["kl"] is not None for row in rows)


OTHERS = ["one0 exact 2", "one0 exact 2--shard", "back: two0 exact 2", "back: two0 shards 2--no-shard"]


@pytest.mark.parametrize("name", marked(OTHERS))
def test_another_number_of_ranks_goes_on_with_the_same_trace(name, alone, two, request):
    """1 -> 2 and 2 -> 1, replicated and sharded: the same rollouts, so tau and all decisions are equal. Weights are so
    to rounding: a checkpoint is float32, as is the arithmetic here."""
    back = name.startswith("back")
    begun, again = (two, request.getfixturevalue("one_after_two")) if back else (alone, two)
    name = name.removeprefix("back: ")
    straight, again = begun[name.split()[1]], again[name]
    rows, found = (without_times(lines(out / "metrics.jsonl")) for out in (straight, again))
    assert rows[:RAISED] == found[:RAISED] and rows != found
    for key, value in rows[RAISED].items():
        assert found[RAISED][key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key
    a, b = (load_file(out / "step-000003" / "model.safetensors") for out in (straight, again))
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4


def test_a_sharded_checkpoint_is_whole(two):
    nano = load_file(ROOT / "assets" / "nano" / "model.safetensors")
    model = load_file(two["sharded everything"] / "step-000002" / "model.safetensors")
    assert {name: t.shape for name, t in model.items()} == {name: t.shape for name, t in nano.items()}


# ------------------------------------------------------------------------------------------------------------- faults

LATE = """
import atexit, sys, torch, ranks
sys.setswitchinterval(100)  # a thread waits so long for an interpreter that is busy
ranks.start("cpu")
atexit.register(torch.distributed.all_reduce_coalesced, [torch.ones(1) for _ in range(1000)])
"""


@pytest.mark.slow
def test_no_rank_aborts_when_its_last_act_was_a_collective(tmp_path):
    """gloo's thread still holds a thousand tensors when the interpreter ends: without ranks.LAST_BREATH it is aborted,
    on two of three tries."""
    (tmp_path / "late.py").write_text(LATE)
    torchrun(2, tmp_path / "late.py", timeout=90, forks=False)


MISHAP = """
import os, sys
sys.path.insert(0, {tests!r})
from ranks_program import errors, ranks, train_grpo

def strike(*arguments, update=train_grpo.update, steps=[]):
    steps.append(1)
    if ranks.rank == 1 and len(steps) == 2:
        {what}
    return update(*arguments)

train_grpo.update = strike
errors.run(train_grpo.main)
"""
MISHAPS = {  # what happens to rank 1 alone -> what is to be read then
    "its input cannot be used": ("raise errors.InputError('the sky falls')", "error: the sky falls"),
    "it is killed": ("os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL) received"),
}


@pytest.mark.parametrize("name", ["its input cannot be used", pytest.param("it is killed", marks=pytest.mark.slow)])
def test_a_rank_that_ends_ends_the_job(name, data, tmp_path):
    what, words = MISHAPS[name]
    (tmp_path / "mishap.py").write_text(MISHAP.format(what=what, tests=str(ROOT / "tests")))
    case = "--steps 3 --batch-size 2 --micro-batch 1 --schedule raw --out"
    command = tmp_path / "mishap.py", *flags(case, data), tmp_path / "run"
    output = torchrun(2, *command, expect=1, timeout=90, forks=name != "it is killed")  # which torchrun itself says
    assert words in output and "in strike" not in output  # no traceback of ours
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("forks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_ends_one_rank_ends_all_at_the_same_point_and_keeps_what_was_learned(forks, data, tmp_path):
    """A picture on one rank, more than --skip-bad allows: found in the first epoch, in a step that is not the first."""
    order = Sampler(12, 2, 0).take(0, 12)
    rows = [json.loads(line) for line in Path(data[0]).read_text().splitlines()]
    for place in (3, 6):  # of rank 1 in the second step, of rank 0 in the third: the first one is allowed
        rows[order[place]]["image"] = "broken.png"
    file = Path(data[0]).parent / "two.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    case = "--steps 6 --batch-size 2 --micro-batch 1 --schedule raw --skip-bad 1"
    arguments = [*SMALL.split(), "--data", file, "--val", data[0], *case.split(), "--out", tmp_path / "run"]
    output = torchrun(2, ROOT / "train_grpo.py", *arguments, expect=1, forks=forks)
    assert output.count("left out: ") == 1 and "this is bad record number 2, --skip-bad allows 1" in output
    assert f"two.jsonl:{order[6] + 1}: " in output and "All up to step 2 is saved" in output
    assert (tmp_path / "run" / "step-000002" / "trainer.json").exists()
    assert [row["drawn"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [2, 5]
