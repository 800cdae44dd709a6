"""train_grpo.py, train_sft.py and eval.py as a user runs them, on the nano policy and small pictures; for all tests."""

import io
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import errors
import train_grpo
from data import load_jsonl, phantom_samples
from images import Sample, load
from model import Policy, collate
from prompts import Processor
from tasks import TASKS
from weights import NANO, load_policy, read_config, save_policy

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "seconds_input", "seconds_rollout", "seconds_update", "peak_mb", "resident_mb"}


def run(script, *flags: str, expect: int = 0) -> str:
    """A script's main() as its __main__ block calls it -> stdout and stderr. In this process, since importing torch
    takes longer than most runs here."""
    output, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [script.__name__ + ".py", *flags])
        try:
            errors.run(script.main, train_grpo.MEMORY)
        except SystemExit as end:
            code = end.code
    assert code == expect, output.getvalue()
    assert "Traceback" not in output.getvalue()
    return output.getvalue()


def fork(log: Path, work: Callable[[], None]) -> multiprocessing.Process:
    """work() in a process and a session of its own, which need not import torch again; what it says goes to `log`."""

    def begin() -> None:
        os.setsid()
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        work()

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process


def as_main(script: Path | str, *flags) -> None:
    """A script as its user starts it."""
    sys.argv = [str(word) for word in (script, *flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def write_records(folder: Path, count: int = 12, **more) -> Path:
    """Phantoms as files and a JSONL, 84 x 84 pixels so that a step is quick; two prompts of unequal length."""
    with open(folder / "train.jsonl", "w") as file:
        for i in range(count):
            sample = phantom_samples(None, 5, i, 1, size=84)[0]
            image, box = load(sample)
            image.save(folder / f"{i}.png")
            record = {"image": f"{i}.png", "query": sample.query, "bbox": box, "dataset": "phantoms"} | more
            print(json.dumps(record), file=file)
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


def read_records(folder: Path, *records: dict) -> list[Sample]:
    """train.jsonl of these, whose picture is a.png, 30 x 40, and how it is read."""
    Image.new("RGB", (30, 40)).save(folder / "a.png")
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return load_jsonl(file, TASKS)


def small(out: Path, records: Path) -> list[str]:
    sizes = ["--batch-size", "4", "--group-size", "4", "--micro-batch", "2", "--eval-limit", "4", "--workers", "0"]
    return ["--data", str(records), "--val", str(records), "--out", str(out), *sizes]


def grpo(out: Path, records: Path, *flags: str, expect: int = 0) -> str:
    return run(train_grpo, *small(out, records), *flags, expect=expect)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def sentence(output: str) -> str:
    """The error, which must be one line, and the last."""
    last = output.strip().splitlines()[-1]
    assert last.startswith(("error: ", "train_grpo.py: error: ")), output
    return last


def tiny_folder(folder: Path) -> Path:
    """A policy with random weights, 64 wide, two layers: its checkpoint is a few hundred kilobytes."""
    raw = json.loads((NANO / "config.json").read_text()) | {"hidden_size": 64, "intermediate_size": 64}
    raw |= {"num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw["vision_config"] |= {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    policy = Policy(read_config(raw), (2,)).init_weights(0)
    policy.raw_config, policy.source = raw, NANO
    save_policy(policy, folder)
    return folder


def tiny_trained(folder: Path, steps: int = 1) -> tuple[Policy, Processor, torch.optim.Optimizer]:
    """The policy of tiny_folder(), after some steps of AdamW."""
    policy, processor = load_policy(folder), Processor(folder, "answer", TASKS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        batch = collate([processor.prompt(phantom_samples(None, 0, step, 1, size=56)[0])])
        ids = torch.arange(5, 8).view(1, 1, 3)
        policy.logprobs(policy.prefix(batch), ids, torch.tensor([[3]])).sum().backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy, processor, optimizer
