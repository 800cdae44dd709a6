"""diagnose.py: when it speaks, what it says, and that it finds answers in another frame."""

import math
from types import SimpleNamespace

import pytest
import torch
from diagnose import BLOCK, OTHER_FRAMES, Watch

import kernels

SIZE, SCALE = (400, 200), (400 / 140, 200 / 140)  # original width and height; original pixels per model pixel
TARGET = (100.0, 50.0, 180.0, 120.0)


def rollout(texts: list[list[str]], boxes: list, reasons: list[list[str]], rewards=None, truncated=0.0):
    """What Watch reads of a Rollout; boxes (B, G) of (x1, y1, x2, y2) in original pixels or None."""
    nothing = (math.nan,) * 4
    boxes = torch.tensor([[box or nothing for box in group] for group in boxes])
    b, g = boxes.shape[:2]
    iou = kernels.box_iou(boxes.view(-1, 4), torch.tensor(TARGET).expand(b * g, 4)).view(b, g)
    rewards = torch.zeros(b, g) if rewards is None else torch.tensor(rewards)
    prompt = SimpleNamespace(scale=SCALE, box=TARGET, size=SIZE)
    return SimpleNamespace(
        prompts=[prompt] * b, texts=texts, boxes=boxes, iou=iou, valid=~boxes.isnan().any(2), reasons=reasons,
        truncated=torch.full((b, g), truncated) > 0.5, spread=rewards.amax(1) > rewards.amin(1),
    )  # fmt: skip


def said(roll, tau=0.5, steps=BLOCK, watch=None) -> list[str | None]:
    watch = watch or Watch()
    return [watch.add(roll, tau) for _ in range(steps)]


NEAR = (110.0, 60.0, 260.0, 190.0)  # IoU .2 or so with the target
MISS = rollout([["[1,2]", "[3,4]"], ["[5,6]", "[7,8]"]], [[NEAR, NEAR], [NEAR, None]], [["", ""], ["", "no box"]])


def test_it_speaks_after_twenty_steps_without_a_hit_and_once():
    paragraphs = said(MISS, steps=3 * BLOCK)
    assert [i for i, words in enumerate(paragraphs) if words] == [BLOCK - 1]
    words = paragraphs[BLOCK - 1]
    assert "\n" not in words and words.startswith(
        "Why is my reward zero? In the last 20 steps 0 of 80 answers reached an"
    )
    assert "IoU of 0.50; 100% of the groups have no spread" in words
    assert "25% of the answers have no box that can be read (20 x no box) and 0% are cut off at --max-tokens" in words
    u = MISS.iou[0, 0].item()
    assert f"quartiles {u:.2f} {u:.2f} {u:.2f}, best {u:.2f}" in words
    assert "Three answers: '[1,2]', '[5,6]', '[3,4]'." in words
    assert f"--tau-start={u - 0.05:.2f}" in words and "medloc-soft" in words and "--dynamic-sampling" in words


def test_a_hit_keeps_it_silent_and_a_later_drought_is_said():
    hit = rollout([["a", "b"]], [[TARGET, NEAR]], [["", ""]], rewards=[[1.0, 0.0]])
    watch = Watch()
    assert said(hit, watch=watch) == [None] * BLOCK
    assert said(MISS, watch=watch)[-1] and not said(MISS, watch=watch)[-1]
    assert said(hit, watch=watch) == [None] * BLOCK
    assert said(MISS, watch=watch)[-1]  # it was over, and came again


def test_one_hit_in_twenty_steps_is_a_hit():
    watch = Watch()
    hit = rollout([["a", "b"]], [[TARGET, NEAR]], [["", ""]], rewards=[[1.0, 0.0]])
    spread = rollout([["a", "b"]], [[NEAR, NEAR]], [["", ""]], rewards=[[0.3, 0.2]])
    assert [watch.add(roll, 0.5) for roll in [hit] + [spread] * (BLOCK - 1)] == [None] * BLOCK
    assert said(spread)[-1]


def test_a_hit_without_tau_is_an_overlap():
    spread = rollout([["a", "b"]], [[NEAR, (300.0, 150.0, 310.0, 160.0)]], [["", ""]], rewards=[[0.3, 0.0]])
    apart = rollout([["a", "b"]], [[(300.0, 150.0, 310.0, 160.0)] * 2], [["", ""]], rewards=[[0.3, 0.0]])
    assert not said(spread, tau=None)[-1]
    words = said(apart, tau=None)[-1]
    assert "0 of 40 answers reached an IoU above 0" in words and "train_sft.py first" in words
    assert "--tau-start" not in words


def test_more_than_half_without_a_box_is_said_though_others_hit():
    boxes, reasons = [[TARGET, None, None]], [["", "no box", "incomplete box"]]
    words = said(rollout([["x", "y" * 500, "z"]], boxes, reasons, rewards=[[1.0, 0.0, 0.0]]))[-1]
    assert "20 of 60 answers reached" in words and "67% of the answers have no box" in words
    assert (
        "20 x no box, 20 x incomplete box" in words
        and "another --prompt" in words
        and "--max-tokens, since" not in words
    )
    assert len(words) < 1500
    cut = rollout([["x", "y", "z"]], boxes, reasons, rewards=[[1.0, 0.0, 0.0]], truncated=1.0)
    assert "a larger --max-tokens" in said(cut)[-1]
    half = rollout([["x", "y"]], [[TARGET, None]], [["", "no box"]], rewards=[[1.0, 0.0]])
    assert not said(half)[-1]


def test_hits_without_spread_are_said():
    flat = rollout([["x", "y"]], [[TARGET, TARGET]], [["", ""]], rewards=[[1.0, 1.0]])
    words = said(flat)[-1]
    assert "40 of 40 answers reached" in words and "100% of the groups have no spread" in words
    assert "--temperature" in words and "--tau-start" not in words


def test_a_run_shorter_than_a_block_is_looked_at_in_its_last_step():
    watch = Watch()
    assert [bool(watch.add(MISS, 0.5, last=i == 2)) for i in range(3)] == [False, False, True]
    watch = Watch()
    hit = rollout([["a", "b"]], [[TARGET, NEAR]], [["", ""]], rewards=[[1.0, 0.0]])
    said(hit, watch=watch)
    assert not watch.add(MISS, 0.5, last=True)  # a stump of a block at the end of a long run says little


WRITTEN = {  # a perfect answer, written in each frame
    "pixels of the ORIGINAL image": TARGET,
    "thousandths of the image's width and height": (250.0, 250.0, 450.0, 600.0),
    "shares of the image's width and height, 0 to 1": (0.25, 0.25, 0.45, 0.6),
}


@pytest.mark.parametrize("frame", OTHER_FRAMES)
def test_answers_in_another_frame_are_recognised(frame):
    read_as_model = tuple(v * s for v, s in zip(WRITTEN[frame], SCALE * 2, strict=True))  # what score() makes of it
    words = said(rollout([["a", "b"]], [[read_as_model] * 2], [["", ""]]))[-1]
    assert f"read as {frame} their mean IoU would be 1.00" in words


def test_answers_in_the_right_frame_are_not_taken_for_another():
    assert "would be" not in said(MISS)[-1]
