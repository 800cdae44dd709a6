"""bench/gpu_report.py: silent without a GPU, goes on after a failure, keeps names of people and machines to itself."""

import getpass
import socket
import sys
from pathlib import Path

import pytest
import torch

import errors
from bench import gpu_report

PRINT_ENVIRONMENT = "import os; print('interpret:', os.environ.get('TRITON_INTERPRET'))"
PRINT_PLACES = "import pathlib, sys; print(pathlib.Path.cwd() / 'x.py', pathlib.Path.home() / 'y', sys.prefix + '/z')"


def report(capsys) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a whole run."""
    with pytest.raises(SystemExit) as end:
        errors.run(gpu_report.main)
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "versions", lambda: "torch 2, GPU 0: Some GPU")


def steps(monkeypatch, **scripts):
    commands = {name: [sys.executable, "-c", script] for name, script in scripts.items()}
    monkeypatch.setattr(gpu_report, "STEPS", commands)


def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, complaint = report(capsys)
    assert (code, output) == (2, "")
    assert complaint == "error: there is no GPU that torch can use here, and this report is about nothing else\n"


def test_a_step_that_fails_does_not_stop_the_others(a_gpu, monkeypatch, capsys):
    bad, worse = "import sys; sys.exit('it broke')", "import os; os._exit(7)"
    steps(monkeypatch, bad=bad, worse=worse, good=PRINT_ENVIRONMENT)
    code, output, _ = report(capsys)
    assert code == 1
    words = ("Some GPU", "==== bad", "it broke", "==== worse", "==== good", "interpret: 0")  # standard error too
    assert [output.index(word) for word in words] == sorted(output.index(word) for word in words)
    assert output.endswith("==== 2 of 3 steps failed: bad (exit code 1), worse (exit code 7)\n")


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
    commands = [" ".join(command[1:]) for command in gpu_report.STEPS.values()]
    assert commands[0].startswith("-m pytest -m gpu") and "-m bench.kernels" in commands
    template = (gpu_report.ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu_report.md").read_text()
    assert "python -m bench.gpu_report > report.txt" in template and template.startswith("---\nname: ")
