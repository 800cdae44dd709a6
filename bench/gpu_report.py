"""One file from a machine with a GPU: versions, the tests that need one, every measurement, in at most eight minutes.

    python -m bench.gpu_report > report.txt
    python -m bench.gpu_report --budget 240             in four minutes: every step gets half of its time
    python -m bench.gpu_report --tiny                   every line of it on a CPU, at sizes that say nothing

Attached to an issue, such a file is what this project learns about GPUs from. Steps stand in the order of what they are
worth. Each is a process of its own with a share of the time, in which what others leave is its too; results are
printed as they come, so that a report that is cut off is still a report. A step that fails, or outlasts its share,
does not stop the others; the last line says which did, and the exit code is then 1. Without a GPU and without --tiny:
one sentence, exit code 2. Names of the machine and its user, and the folders above this one, are cut out of every line.
"""

import argparse
import getpass
import io
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

import errors

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 480  # seconds, the sum of all shares
LEAST = 2  # seconds: with less a step is not begun
LAST = 5  # seconds in which a step's last lines come, once all that it has started is ended
PYTEST = (
    "pytest -m gpu -p no:cacheprovider -rs --continue-on-collection-errors"  # a package that is missing ends no run
)
QUICKSTART = "train_grpo.py --schedule=medloc"


def steps(tiny: bool, folder: Path) -> dict[str, tuple[float, list[str]]]:
    """name -> (seconds of BUDGET, command, run in the checkout). folder: an empty one."""
    size = " --tiny" if tiny else ""
    short = "--steps=2 --eval-limit=8" if tiny else "--steps=60 --eval-limit=200"
    of = {
        "tests that need a GPU": (150, f"-m {PYTEST}"),
        "kernels": (60, f"-m bench.kernels --timings{size}"),
        "decode": (80, f"-m bench.gpu_steps decode{size}"),
        "whole step": (70, f"-m bench.gpu_steps step{size}"),
        "whole step, transformers by hand": (50, f"-m bench.gpu_steps plain{size}"),
        "quickstart": (40, f"{QUICKSTART} {short} --out={folder}/out"),
        "mismatch": (30, f"-m bench.gpu_steps mismatch{size}"),
    }
    return {name: (share, [sys.executable, *command.split()]) for name, (share, command) in of.items()}


def private(folder: Path) -> dict[str, str]:
    """What must not get into the report -> what stands there instead; the longest first, because paths nest."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have a number and no name
        user = ""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>", os.path.expanduser("~"): "~"}
    names = {socket.gethostname(): "<host>", socket.gethostname().split(".")[0]: "<host>", user: "<user>"}
    places[str(folder)] = "<folder>"
    found = {word: mark for word, mark in (places | names).items() if len(word) > 1 and word != "root"}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def clean(line: str, words: dict[str, str]) -> str:
    """The line without its private words; only whole words, so that a host called `gpu` leaves `gpus` alone."""
    for word, mark in words.items():
        line = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", lambda _, mark=mark: mark, line)
    return line


def output_of(*command: str) -> str:
    """What a command says, on one line; "" where it cannot be run."""
    with suppress(OSError):
        return ", ".join(sorted({*subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split()}))
    return ""


def versions() -> str:
    """Python, torch, triton, driver, commit and the GPUs, a line each."""
    driver = "unknown, no nvidia-smi"
    if smi := shutil.which("nvidia-smi"):
        driver = output_of(smi, "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    packages = []
    for name in ("triton", "transformers", "numpy"):
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"{name} not installed")
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    commit = output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    lines = [f"torch {torch.__version__}, {runtime}", ", ".join(packages), f"driver {driver}", f"commit {commit}"]
    lines.append(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    return "\n".join(lines)


def run(command: list[str], words: dict[str, str], limit: float) -> str:
    """Run one step for `limit` seconds at most, print what it prints -> what went wrong, "" if nothing."""
    # On a GPU not unset but 0: the tests turn the interpreter on where nothing is said, and under it no kernel reaches
    # the GPU. Without one (--tiny) the kernels run in it.
    interpret = "0" if torch.cuda.is_available() else "1"
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONUNBUFFERED": "1"}
    # A session of its own: what the step has started (compilers, readers) ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def pass_on() -> None:
        # Of a progress bar, which goes back to the beginning of its line, only what it says last.
        with io.TextIOWrapper(process.stdout, errors="replace", newline="\n") as lines:
            for line in lines:
                print(clean(line.rstrip("\r\n").rpartition("\r")[2], words), flush=True)

    # By a thread, since what the step leaves behind may hold the pipe open when it has long ended itself.
    reader, late = threading.Thread(target=pass_on, daemon=True), False
    reader.start()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join(LAST)
    if late:
        return f"stopped after {limit:.0f} s"
    return f"exit code {process.returncode}" if process.returncode else ""


def report(todo: dict[str, tuple[float, list[str]]], words: dict[str, str], budget: float) -> list[str]:
    """Run the steps in their order, within `budget` seconds -> those that failed, and how."""
    ending, failed, shares = time.monotonic() + budget, [], sum(share for share, _ in todo.values())
    for name, (share, command) in todo.items():
        limit = (ending - time.monotonic()) * share / shares  # what the steps before have left is for all that follow
        shares -= share
        print(f"\n==== {name} ({limit:.0f} s at most)\n", flush=True)
        started = time.monotonic()
        wrong = run(command, words, limit) if limit >= LEAST else "not run, no time was left"
        print(f"\n({wrong or 'done'}, {time.monotonic() - started:.1f} s)", flush=True)
        if wrong:
            failed.append(f"{name} ({wrong})")
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = errors.Parser(
        prog="-m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, on any machine")
    options = parser.parse_args(arguments)
    if not 0 < options.budget < 1e6:
        parser.error("--budget must be a number of seconds above 0")
    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        raise errors.InputError(
            "there is no GPU that torch can use here, and this report is about nothing else; --tiny tries its lines out"
        )
    if options.tiny:
        print("tiny sizes: timings mean nothing" if gpu else "no GPU: timings mean nothing")
    with tempfile.TemporaryDirectory() as place:
        words, todo = private(Path(place)), steps(options.tiny, Path(place))
        print(clean(versions(), words), flush=True)
        failed = report(todo, words, options.budget)
    print(f"\n==== {len(failed)} of {len(todo)} steps failed{': ' if failed else ''}{', '.join(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    errors.run(main)
