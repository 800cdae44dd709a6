"""logs.py: what each package is told, shown with stand-ins; TensorBoard's own where it is installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import logs
import pytest

from errors import InputError

ROW = {"step": 3, "loss": 0.5, "tau": None, "decision": "tau .300 stays", "tokens": 7}


def test_wandb_gets_the_numbers_of_a_step(tmp_path, monkeypatch):
    calls = []
    fake = ModuleType("wandb")
    record = SimpleNamespace(log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("end"))
    fake.init = lambda **settings: calls.append(settings) or record
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = logs.open_log("wandb", tmp_path / "run", {"arguments": {"lr": 1}}, 2)
    log.write(ROW)
    log.close()
    assert calls[0]["config"] == {"arguments": {"lr": 1}} and calls[0]["group"] == "run"
    assert calls[1:] == [({"loss": 0.5, "tokens": 7}, 3), "end"]


def test_tensorboard_gets_the_numbers_of_a_step(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("end")

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = logs.open_log("tensorboard", tmp_path, {}, 2)
    log.write(ROW)
    log.close()
    assert calls == [(tmp_path / "tensorboard", 3), ("loss", 0.5, 3), ("tokens", 7, 3), "end"]


def test_tensorboard_itself_writes_what_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logs.open_log("tensorboard", tmp_path, {}, 0)
    log.write(ROW)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


@pytest.mark.parametrize("name", logs.LOGS)
def test_a_package_that_is_absent_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=f"--log {name}: the package is not installed \\(pip install {name}\\)"):
        logs.open_log(name, tmp_path, json.loads("{}"), 0)
