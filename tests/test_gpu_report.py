"""bench/gpu_report.py and gpu_steps.py: no step takes the others' time or results, no private name gets in; and every
line that a CPU can run does run, at tiny sizes."""

import getpass
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import errors
from bench import gpu_report, gpu_steps, kernels, scale
from runtime import plan

PRINT_ENVIRONMENT = "import os; print('interpret:', os.environ.get('TRITON_INTERPRET'))"
PRINT_PLACES = "import pathlib, sys; print(pathlib.Path.cwd() / 'x.py', pathlib.Path.home() / 'y', sys.prefix + '/z')"
OUTLASTS = """
import subprocess, sys, time
print('begun')
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])  # holds the pipe open as well
print('child', child.pid)
time.sleep(60)
"""
LEAVES = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print('child', child.pid)
"""


def report(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a whole run."""
    with pytest.raises(SystemExit) as end:
        errors.run(lambda: gpu_report.main(list(arguments)))
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "versions", lambda: "torch 2, GPU 0: Some GPU")


def steps(monkeypatch, **scripts):
    commands = {name: (10, [sys.executable, "-c", script]) for name, script in scripts.items()}
    monkeypatch.setattr(gpu_report, "steps", lambda tiny, folder: commands)


def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, complaint = report(capsys)
    assert (code, output) == (2, "") and complaint.startswith("error: there is no GPU that torch can use here")
    for wrong in ("0", "-5", "nan", "inf"):
        assert report(capsys, "--budget", wrong)[0] == 2


def test_a_step_that_fails_does_not_stop_the_others(a_gpu, monkeypatch, capsys):
    bad, worse = "import sys; sys.exit('it broke')", "import os; os._exit(7)"
    steps(monkeypatch, bad=bad, worse=worse, good=PRINT_ENVIRONMENT, bars="print('0 %\\r50 %\\r100 %')")
    code, output, _ = report(capsys)
    assert code == 1
    words = ("Some GPU", "==== bad", "it broke", "==== worse", "==== good", "interpret: 0", "\n100 %")  # stderr too
    assert [output.index(word) for word in words] == sorted(output.index(word) for word in words)
    assert "50 %" not in output
    assert output.endswith("==== 2 of 4 steps failed: bad (exit code 1), worse (exit code 7)\n")


def test_a_step_that_outlasts_its_share_is_stopped_with_all_it_started(a_gpu, monkeypatch, capsys):
    steps(monkeypatch, quick="print('quick')", long=OUTLASTS, good="print('good')")
    started = time.monotonic()
    code, output, _ = report(capsys, "--budget", "9")
    assert code == 1 and time.monotonic() - started < 12
    assert output.endswith("==== 1 of 3 steps failed: long (stopped after 4 s)\n") and "\ngood\n" in output
    # A third each at first; then half of what is left, which the quick step has left nearly whole; then all of it.
    assert re.findall(r"==== (\w+) \((\d+) s at most", output) == [("quick", "3"), ("long", "4"), ("good", "4")]
    child = Path("/proc") / re.search(r"child (\d+)", output)[1] / "cmdline"
    assert not child.exists() or not child.read_bytes()  # gone, or dead and not yet waited for


def test_a_step_that_has_ended_is_done_whatever_it_leaves_behind(a_gpu, monkeypatch, capsys):
    steps(monkeypatch, leaves=LEAVES, fails=LEAVES + "sys.exit(3)")
    code, output, _ = report(capsys, "--budget", "40")
    assert code == 1 and output.endswith("==== 1 of 2 steps failed: fails (exit code 3)\n")
    assert float(re.search(r"\(done, (\S+) s\)", output)[1]) < 4
    for child in re.findall(r"child (\d+)", output):
        place = Path("/proc") / child / "cmdline"
        assert not place.exists() or not place.read_bytes()


def test_steps_for_which_no_time_is_left_are_named(a_gpu, monkeypatch, capsys):
    steps(monkeypatch, first="print('first')", second="print('second')")
    code, output, _ = report(capsys, "--budget", "2.5")
    assert code == 1 and "first (not run, no time was left)" in output


def test_no_name_and_no_folder_gets_into_the_report(a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(socket, "gethostname", lambda: "ward7")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    names = "print('ward7 ward71 forward7 alice@ward7 /tmp/torchinductor_alice/k.py')"
    steps(monkeypatch, here=PRINT_PLACES, names=names)
    code, output, _ = report(capsys)
    assert code == 0
    assert output.endswith("==== 0 of 2 steps failed\n")
    assert "./x.py" in output and "<python>/z" in output
    assert str(Path.home() / "y") not in output and str(gpu_report.ROOT) not in output and sys.prefix not in output
    assert "<host> ward71 forward7 <user>@<host> /tmp/torchinductor_<user>/k.py" in output


def test_what_the_report_runs_and_says_and_that_the_issue_template_asks_for_it():
    words = gpu_report.versions()
    assert torch.__version__ in words and "triton" in words and "driver" in words and "Python 3" in words
    assert re.search(r"commit [0-9a-f]{7,}", words)
    todo = gpu_report.steps(False, Path("x"))
    assert sum(share for share, _ in todo.values()) == gpu_report.BUDGET <= 8 * 60
    assert list(todo)[:2] == ["tests that need a GPU", "kernels"]
    assert not any("--tiny" in command for _, command in todo.values())
    template = (gpu_report.ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu_report.md").read_text()
    assert "python -m bench.gpu_report > report.txt" in template and template.startswith("---\nname: ")


@pytest.mark.parametrize("what", list(gpu_steps.WHAT))
def test_every_step_runs_at_a_tiny_size(what, capsys):
    gpu_steps.main([what, "--tiny"])
    output = capsys.readouterr().out
    found = {
        "decode": r"\| 2 x 2 +\| \S+ +\| eager",
        "step": r"a step: \S+ s, \d+ new tokens/s(.|\n)*its split: vision .*%\), prefix .*decode .*backward",
        "plain": r"a step: \S+ s, \d+ new tokens/s",
        "mismatch": r"random weights \| trainer bf16 \| fp32 +\| \d.\d\de-",
    }
    assert re.search(found[what], output), output


def test_the_kernels_are_timed_at_a_tiny_size_and_a_way_that_fails_is_a_row(monkeypatch, capsys):
    def broken(function, **options):
        def run(*inputs):
            raise RuntimeError("no compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SystemExit, match="error: 6 of these could not be timed"):
        kernels.main(["--timings", "--tiny"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 25 and sum("RuntimeError: no compiler |" in row for row in rows) == 6


def test_the_floor_of_a_decode_step_counts_each_weight_and_each_prompt_once():
    config, case = scale.published("3B"), scale.square(8, 8, 1174, 128)
    # The 3B decoder without its tower: 3,085,938,688 weights, of them norms and biases some 0.3 million.
    assert gpu_steps.floor_bytes(config, case) == pytest.approx(2 * 3.0859e9 + 8 * 36864 * (1174 + 8 * 64), rel=1e-3)


def test_the_whole_step_is_planned_with_as_few_concessions_as_fit(monkeypatch):
    monkeypatch.setattr(gpu_steps, "DEVICE", "cuda")
    sizes = gpu_steps.sizes_of(False)
    assert list(gpu_steps.ways(sizes, 139 * plan.GB))[0].startswith("all weights trained")
    assert list(gpu_steps.ways(sizes, 78 * plan.GB))[0] == "vision tower frozen, beta .04"
    (last,) = gpu_steps.ways(sizes, 10 * plan.GB).values()  # it will fail, and say so
    assert not last.reference and not last.fits(10 * plan.GB)


def test_the_step_by_hand_trains_what_ours_would(monkeypatch, capsys):
    sizes, counts, adamw = gpu_steps.sizes_of(True), [], torch.optim.AdamW
    runs = gpu_steps.ways(sizes, 10 * plan.GB)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, **said: counts.append(sum(x.numel() for x in p)) or adamw(p, **said)
    )
    monkeypatch.setattr(gpu_steps, "STEPS", 2)
    for words, run in list(runs.items())[::2]:  # all trained, with a reference; neither
        monkeypatch.setattr(gpu_steps, "ways", lambda *_, words=words, run=run: {words: run})
        gpu_steps.plain(sizes)
        assert capsys.readouterr().out.startswith(words)
    n = plan.count(sizes.config)
    assert counts == [n["all"], n["all"] - n["vision"]]


@pytest.mark.parametrize("flags", [["--beta", "0"], ["--freeze-vision"], ["--freeze-vision", "--beta", "0"]])
def test_a_step_is_counted_as_it_runs_the_second_one_too(flags):
    """A frozen tower looks in every step, as at a trainer's prompts, which are new each time."""
    sizes = gpu_steps.sizes_of(True)
    frozen, reference = "--freeze-vision" in flags, "--beta" not in flags
    run = plan.Run(sizes.config, 1, 1, 2, 2, 2, 4, 4, freeze_vision=frozen, reference=reference)
    step, found = scale.trainer_step(sizes.case, *flags), []
    for _ in range(2):
        with scale.counted() as counter:
            step()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] == pytest.approx(gpu_steps.flops_of(sizes, run), rel=0.1)  # not of the pixels


def test_a_plan_that_was_wrong_is_said_and_the_next_way_is_tried(monkeypatch, capsys):
    tried = []

    def measure(sizes, run):
        tried.append(run)
        if run.reference:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_steps, "measure_step", measure)
    gpu_steps.whole_step(gpu_steps.sizes_of(True))
    assert [(run.reference, run.freeze_vision) for run in tried] == [(True, False), (True, True), (False, True)]
    assert capsys.readouterr().out.count("OUT OF MEMORY: the plan had said") == 2
    monkeypatch.setattr(gpu_steps, "measure_step", lambda sizes, run: measure(sizes, tried[0]))
    with pytest.raises(SystemExit):
        gpu_steps.whole_step(gpu_steps.sizes_of(True))


@pytest.mark.slow  # 40 seconds
def test_the_whole_report_at_tiny_sizes_ends_within_two_minutes():
    command = [sys.executable, "-m", "bench.gpu_report", "--tiny", "--budget", "120"]
    done = subprocess.run(command, cwd=gpu_report.ROOT, capture_output=True, text=True, timeout=130)
    assert done.returncode == 0, done.stdout + done.stderr
    first = "tiny sizes: timings mean nothing" if torch.cuda.is_available() else "no GPU: timings mean nothing"
    assert done.stdout.startswith(first) and done.stdout.endswith("==== 0 of 7 steps failed\n")
