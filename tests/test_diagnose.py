"""runtime/diagnose.py: when it speaks, what it says, that it finds answers in another frame. What the loggers get."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kernels
from errors import InputError
from images import Sample
from rollout import Rollout
from runtime.diagnose import BLOCK, Watch
from runtime.metrics import LOGS
from tasks.box import OTHER_FRAMES

SIZE, SCALE = (400, 200), (400 / 140, 200 / 140)  # original width and height; original pixels per model pixel
TARGET = (100.0, 50.0, 180.0, 120.0)
NEAR, APART = [110.0, 60.0, 260.0, 190.0], [300.0, 150.0, 310.0, 160.0]  # IoU .2 or so with the target; 0


def rollout(texts: list[list[str]], boxes: list, reasons: list[list[str]], rewards=None, truncated=0.0) -> Rollout:
    """What Watch reads of one; boxes (B, G) of [x1, y1, x2, y2] in original pixels or None."""
    b, g = len(boxes), len(boxes[0])
    flat = torch.tensor([box or [0.0] * 4 for group in boxes for box in group])
    u = kernels.box_iou(flat, torch.tensor(TARGET).expand(b * g, 4)).view(b, g)
    sample = Sample(None, "it", TARGET, "d")
    prompt = SimpleNamespace(sample=sample, scale=SCALE, target=TARGET, size=SIZE)
    cut = torch.full((b, g), truncated) > 0.5
    reward = torch.zeros(b, g) if rewards is None else torch.tensor(rewards)
    return Rollout([prompt] * b, None, None, cut, texts, answers=boxes, reasons=reasons, u=u, reward=reward)


def said(roll, tau=0.5, steps=BLOCK, watch=None) -> list[str | None]:
    watch = watch or Watch()
    return [watch.add(roll, [tau] * len(roll.prompts)) for _ in range(steps)]


MISS = rollout([["[1,2]", "[3,4]"], ["[5,6]", "[7,8]"]], [[NEAR, NEAR], [NEAR, None]], [["", ""], ["", "no box"]])
HIT = rollout([["a", "b"]], [[list(TARGET), NEAR]], [["", ""]], rewards=[[1.0, 0.0]])


def test_it_speaks_after_twenty_steps_without_a_hit_and_once():
    paragraphs = said(MISS, steps=3 * BLOCK)
    assert [i for i, words in enumerate(paragraphs) if words] == [BLOCK - 1]
    words = paragraphs[BLOCK - 1]
    assert "\n" not in words and words.startswith("Why is my reward zero? In the last 20 steps 0 of 80 answers reached")
    assert "reached IoU 0.50; 100% of the groups have no spread" in words
    assert "25% of the answers cannot be read (20 x no box) and 0% are cut off at --max-tokens" in words
    u = MISS.u[0, 0].item()
    assert f"quartiles {u:.2f} {u:.2f} {u:.2f}, best {u:.2f}" in words
    assert "Three answers: '[1,2]', '[5,6]', '[3,4]'." in words
    assert f"--schedule=medloc:tau_start={u - 0.05:.2f}" in words and "medloc-soft" in words
    assert "--dynamic-sampling" in words and "would be" not in words  # nor are they taken for another frame's


def test_a_hit_keeps_it_silent_and_a_later_drought_is_said():
    watch = Watch()
    assert said(HIT, watch=watch) == [None] * BLOCK
    assert said(MISS, watch=watch)[-1] and not said(MISS, watch=watch)[-1]
    assert said(HIT, watch=watch) == [None] * BLOCK
    assert said(MISS, watch=watch)[-1]  # it was over, and came again
    watch = Watch()  # one hit in twenty steps is a hit
    spread = rollout([["a", "b"]], [[NEAR, NEAR]], [["", ""]], rewards=[[0.3, 0.2]])
    assert [watch.add(roll, [0.5]) for roll in [HIT] + [spread] * (BLOCK - 1)] == [None] * BLOCK
    assert said(spread)[-1]


def test_a_hit_without_tau_is_an_overlap():
    assert not said(rollout([["a", "b"]], [[NEAR, APART]], [["", ""]], rewards=[[0.3, 0.0]]), tau=None)[-1]
    words = said(rollout([["a", "b"]], [[APART] * 2], [["", ""]], rewards=[[0.3, 0.0]]), tau=None)[-1]
    assert "0 of 40 answers reached IoU above 0" in words and "train_sft.py first" in words
    assert "tau_start" not in words


def test_more_than_half_that_cannot_be_read_is_said_though_others_hit():
    boxes, reasons = [[list(TARGET), None, None]], [["", "no box", "incomplete box"]]
    words = said(rollout([["x", "y" * 500, "z"]], boxes, reasons, rewards=[[1.0, 0.0, 0.0]]))[-1]
    assert "20 of 60 answers reached" in words and "67% of the answers cannot be read" in words
    assert "20 x no box, 20 x incomplete box" in words and "another --prompt" in words and "--max-tokens," not in words
    assert len(words) < 1500
    cut = rollout([["x", "y", "z"]], boxes, reasons, rewards=[[1.0, 0.0, 0.0]], truncated=1.0)
    assert "a larger --max-tokens" in said(cut)[-1]
    half = rollout([["x", "y"]], [[list(TARGET), None]], [["", "no box"]], rewards=[[1.0, 0.0]])
    assert not said(half)[-1]


def test_hits_without_spread_are_said():
    words = said(rollout([["x", "y"]], [[list(TARGET)] * 2], [["", ""]], rewards=[[1.0, 1.0]]))[-1]
    assert "40 of 40 answers reached" in words and "100% of the groups have no spread" in words
    assert "--temperature" in words and "tau_start" not in words


def test_a_run_shorter_than_a_block_is_looked_at_in_its_last_step():
    watch = Watch()
    assert [bool(watch.add(MISS, [0.5, 0.5], last=i == 2)) for i in range(3)] == [False, False, True]
    watch = Watch()
    said(HIT, watch=watch)
    assert not watch.add(MISS, [0.5, 0.5], last=True)  # a stump of a block at the end of a long run says little
    assert Watch().add(Rollout.empty(2), [], last=True) is None  # a rank that had nothing


WRITTEN = {  # a perfect answer, written in each frame
    "pixels of the ORIGINAL image": TARGET,
    "thousandths of the image's width and height": (250.0, 250.0, 450.0, 600.0),
    "shares of the image's width and height, 0 to 1": (0.25, 0.25, 0.45, 0.6),
}


@pytest.mark.parametrize("frame", OTHER_FRAMES)
def test_answers_in_another_frame_are_recognised(frame):
    read_as_model = [v * s for v, s in zip(WRITTEN[frame], SCALE * 2, strict=True)]  # what score() makes of it
    words = said(rollout([["a", "b"]], [[read_as_model] * 2], [["", ""]]))[-1]
    assert f"read as {frame} their mean IoU would be 1.00" in words


# --------------------------------------------------------------------------------------------------------------- logs

ROW = {"step": 3, "loss": 0.5, "tau": None, "decision": "tau .300 stays", "tokens": 7}


def test_wandb_gets_the_numbers_of_a_step(tmp_path, monkeypatch):
    calls, fake = [], ModuleType("wandb")
    record = SimpleNamespace(log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("end"))
    fake.init = lambda **settings: calls.append(settings) or record
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = LOGS["wandb"](tmp_path / "run", {"arguments": {"lr": 1}}, 2)
    log.write(ROW)
    log.close()
    assert calls[0]["config"] == {"arguments": {"lr": 1}} and calls[0]["group"] == "run"
    assert calls[1:] == [({"loss": 0.5, "tokens": 7}, 3), "end"]


def test_tensorboard_gets_the_numbers_of_a_step(tmp_path, monkeypatch):
    calls, fake = [], ModuleType("torch.utils.tensorboard")
    writer = SimpleNamespace(add_scalar=lambda *row: calls.append(row), close=lambda: calls.append("end"))
    fake.SummaryWriter = lambda folder, purge_step: calls.append((folder, purge_step)) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = LOGS["tensorboard"](tmp_path, {}, 2)
    log.write(ROW)
    log.close()
    assert calls == [(tmp_path / "tensorboard", 3), ("loss", 0.5, 3), ("tokens", 7, 3), "end"]


@pytest.mark.parametrize("name", LOGS)
def test_a_package_that_is_absent_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=f"--log {name}: the package is not installed \\(pip install {name}\\)"):
        LOGS[name](tmp_path, {}, 0)
