"""One file from a machine with a GPU: versions, the tests that need one, every benchmark.

    python -m bench.gpu_report > report.txt

Attached to an issue, such a file is what this project learns about GPUs from. A step that fails does not stop the
others; the last line says which did, and the exit code is then 1. Without a GPU: one sentence, exit code 2. Names of
the machine and its user, and the folders above this one, are cut out of every line.
"""

import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import errors

ROOT = Path(__file__).resolve().parent.parent
STEPS = {  # name -> command, run in the checkout
    "tests that need a GPU": [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"],
    "kernels": [sys.executable, "-m", "bench.kernels"],
}


def private() -> dict[str, str]:
    """What must not get into the report -> what stands there instead; the longest first, because paths nest."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have a number and no name
        user = ""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>", os.path.expanduser("~"): "~"}
    names = {socket.gethostname(): "<host>", socket.gethostname().split(".")[0]: "<host>", user: "<user>"}
    found = {word: mark for word, mark in (places | names).items() if len(word) > 1 and word != "root"}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def clean(line: str, words: dict[str, str]) -> str:
    """The line without its private words; only whole words, so that a host called `gpu` leaves `gpus` alone."""
    for word, mark in words.items():
        line = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", lambda _, mark=mark: mark, line)
    return line


def versions() -> str:
    """Python, torch, triton, driver and the GPUs, a line each."""
    driver = "unknown, no nvidia-smi"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = ", ".join(sorted({*subprocess.run(query, capture_output=True, text=True).stdout.split()})) or "unknown"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    lines = [f"torch {torch.__version__}, {runtime}", f"triton {triton}", f"driver {driver}"]
    lines.append(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    return "\n".join(lines)


def run(command: list[str], words: dict[str, str]) -> int:
    """Run one step, print what it prints, return its exit code."""
    # Not unset but 0: the tests turn the interpreter on where nothing is said, and under it no kernel reaches the GPU.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout:
            print(clean(line, words), end="", flush=True)
    return process.returncode


def main() -> None:
    if not torch.cuda.is_available():
        raise errors.InputError("there is no GPU that torch can use here, and this report is about nothing else")
    words, failed = private(), []
    print(clean(versions(), words), flush=True)
    for name, command in STEPS.items():
        print(f"\n==== {name}\n", flush=True)
        if code := run(command, words):
            failed.append(f"{name} (exit code {code})")
    print(f"\n==== {len(failed)} of {len(STEPS)} steps failed{': ' if failed else ''}{', '.join(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    errors.run(main)
