"""experiments/variants.py: what each schedule that was tried pays, and where its tau goes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import variants
from scheduler import MedLoc, ScheduleConfig

ROOT = Path(__file__).parent.parent
STEP = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]


def make(name: str, **config):
    return ({"medloc": MedLoc} | variants.VARIANTS)[name](name, ScheduleConfig(**config), 10)


@pytest.mark.parametrize(
    "name, q", [("quantile-50", 0.5), ("quantile-75", 0.75), ("quantile-90", 0.9), ("excess-25", 0.25)]
)
def test_tau_is_the_windows_quantile_up_and_down(name, q):
    schedule = make(name, window=2)
    assert schedule.tau == 0.3
    for step in (STEP, [[0.8] * 4, [0.9] * 4], [[0.1] * 4, [0.3] * 4]):
        schedule.observe(step)
        assert schedule.tau == np.quantile(np.array(step), q, method="higher")  # the window holds this step alone


def test_what_an_answer_earns():
    schedule = make("quantile-50", soft_scale=0.1)
    assert schedule.reward(0.3, 0.0, True) == 0.5 and schedule.reward(0.9, 0.0, False) == 0
    assert schedule.reward(0.5, 0.0, True) == pytest.approx(1 / (1 + math.exp(-2)))
    assert [make("quantile-hard").reward(u, u, True) for u in (0.29, 0.3)] == [0, 1]
    assert [make("ramp").reward(u, u, True) for u in (0.4, 0.7, 0.96)] == pytest.approx([0, 0.5, 1])
    assert [make("excess-25").reward(u, u, True) for u in (0.2, 0.4)] == pytest.approx([0, 0.1])
    sharper = make("sharpening", tau_start=0.8, soft_scale=0.1), make("sharpening", tau_start=0.3, soft_scale=0.1)
    high, low = (s.reward(s.tau + 0.1, 0.0, True) for s in sharper)
    assert (high, low) == pytest.approx([1 / (1 + math.exp(-0.1 / 0.04)), 1 / (1 + math.exp(-0.1 / 0.14))])


def test_giou_gives_way_to_iou():
    """An answer of IoU .5 and GIoU .1: .1 at first, .5 once the policy is good, halfway between in the middle."""
    for name, means in (
        ("hull", (0.4, 0.5, 0.6)),
        ("hull-early", (0.3, 0.4, 0.5)),
    ):
        assert make(name).reward(0.5, 0.1, True) == pytest.approx(0.1)
        earned = []
        for mean in means:
            schedule = make(name, window=1)
            schedule.observe([[mean] * 4])
            earned.append(schedule.reward(0.5, 0.1, True))
        assert earned == pytest.approx([0.1, 0.3, 0.5])


def test_giou_gives_way_under_a_sigmoid():
    """At first with GIoU or its term whole, in the end medloc-soft's reward; tau by MedLoc's rule, soft_scale .1."""
    for name, first in (("hull-soft", 1 / (1 + math.exp(2))), ("soft-hull", 1 / (1 + math.exp(-2)) - 0.4)):
        schedule = make(name, window=2, soft_scale=0.1)
        assert schedule.reward(0.5, 0.1, True) == pytest.approx(first)
        schedule.observe([[0.61] * 4] * 2)
        assert schedule.tau == 0.45
        assert schedule.reward(0.5, 0.1, True) == pytest.approx(1 / (1 + math.exp(-0.5)))


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_pays_at_the_ends_of_the_range(name):
    """tau from 1 to 1, and IoUs of 0 and 1: finite numbers, the exact box earning no less."""
    schedule = make(name, tau_start=1.0, tau_target=1.0, window=2)
    for ious in ([[1.0] * 4] * 2, [[0.0] * 4] * 2):
        nothing, exact = schedule.reward(0.0, -1.0, True), schedule.reward(1.0, 1.0, True)
        assert math.isfinite(nothing) and nothing <= exact < math.inf
        schedule.observe(ious)


@pytest.mark.parametrize("name", ["floor", "floor-soft"])
def test_all_hits_in_half_of_the_groups_raise_tau_where_medloc_waits(name):
    step = [[0.9] * 4] * 2 + [[0.1] * 4] * 2  # hit rate .5, sigma .5: none of MedLoc's checks passes
    for schedule, tau in ((make(name, window=4), 0.45), (make("medloc", window=4), 0.3)):
        schedule.observe(step)
        assert schedule.tau == tau
    fewer = make(name, window=4)
    fewer.observe([[0.9] * 4] + [[0.1] * 4] * 3)
    assert fewer.tau == 0.3


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_goes_on_where_it_was_saved(name):
    one, other = make(name, window=2), make(name, window=2)
    one.observe(STEP)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for schedule in (one, other):
        schedule.observe([[0.95] * 4, [0.7] * 4])
    assert other.state_dict() == one.state_dict()


def test_the_program_trains_with_a_variant(tmp_path):
    words = "--schedule quantile-75 --data phantoms:xray --steps 1 --batch-size 2 --workers 0 --eval-limit 2".split()
    command = [sys.executable, ROOT / "experiments" / "variants.py", *words, "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["arguments"]["schedule"] == "quantile-75"
