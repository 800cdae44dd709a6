"""The reward curriculum: scripted traces with tau worked out by hand, and what must hold for any trace."""

import json
import math
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from rewards import Schedules, read_schedule
from scheduler import SCHEDULES, MedLoc, Schedule, Window, hit, medloc_decision, next_tau
from settings import explained

DEFAULTS = MedLoc()
OFF = {"check_reward": False, "check_stability": False, "check_margin": False}
PERFECT = [[1.0] * 4]  # one group that passes every check at every tau but 1.0's margin, which is never asked


def config(**changes) -> MedLoc:
    return replace(DEFAULTS, **changes)


def make(name: str, like: MedLoc = DEFAULTS, total: int = 100, **more) -> Schedule:
    """A schedule with those of these settings that it has."""
    kind = SCHEDULES[name].Settings
    shared = {f.name: getattr(like, f.name) for f in fields(kind) if hasattr(like, f.name)}
    return Schedule(name, kind(**shared | more), total)


def taus(schedule, steps) -> list[float]:
    """tau after each step."""
    return [schedule.observe(step).tau_next for step in steps]


def window(groups, tau=0.3, **kwargs) -> Window:
    filled = Window(size=len(groups), **kwargs)
    filled.append(groups, tau)
    return filled


# --- hits and the window's statistics


@pytest.mark.parametrize(("num", "den", "tau"), [(9, 20, 0.45), (3, 5, 0.60), (7, 10, 0.70), (9, 20, 0.3 + 0.15)])
def test_hit_at_exactly_tau_in_float32_and_float64(num, den, tau):
    for number in (np.float32, float):
        iou = float(number(num) / number(den))  # float32 9/20 is 0.44999998807907104
        assert hit(iou, tau) and not hit(iou - 2e-6, tau)


@pytest.mark.parametrize("unit", ["group", "step"])
def test_window_refuses_what_is_no_u(unit):
    schedule = make("medloc", config(unit=unit), 10)
    for step in ([[0.5], []], [], [[0.5], [math.nan]], [[0.5], [-0.3]], [[0.5], [1.5]]):
        with pytest.raises(ValueError, match="group [01] must hold u's"):
            schedule.window.append(step, 0.3)
        assert len(schedule.window.entries) == 0


# --- the decision


def test_decision_says_why_it_passes_or_all_that_failed():
    # 7 of 8 everywhere: r_bar .875, sigma 0; means (7 * .6 + .0)/8 = .525 -> margin .225
    decision = medloc_decision(window([[0.6] * 7 + [0.0]] * 30), 0.3, DEFAULTS)
    assert decision.tighten and (decision.tau, decision.tau_next) == (0.3, 0.45)
    assert str(decision) == "tau .300 -> .450: hit rate .875 >= .800, sigma .000 <= .200, margin .225 >= .100"
    line = str(medloc_decision(window([[0.0], [0.8]]), 0.5, DEFAULTS))  # r_bar .5, sigma .5, margin .4 - .5
    failed = (
        "hit rate .500 < .800 (short by .300), sigma .500 > .200 (over by .300), margin -.100 < .100 (short by .200)"
    )
    assert line == "tau .500 stays: " + failed


# At tau .30: P .80, S .20, Delta .10. Each window fails exactly one check.
BLOCKED_BY = {
    # 3 of 4 hits everywhere: r_bar .75 < .80; sigma 0; mean (3 * .9 + .0)/4 = .675, margin .375
    "check_reward": ([[0.9, 0.9, 0.9, 0.0]] * 4, "tau .300 stays: hit rate .750 < .800 (short by .050)"),
    # h = 1, 1, 1, 1/4: r_bar 13/16 = .8125; sigma = sqrt(3 * .1875^2 + .5625^2)/2 = .3248; mean .9 * .8125 = .731
    "check_stability": ([[0.9] * 4] * 3 + [[0.9, 0, 0, 0]], "tau .300 stays: sigma .325 > .200 (over by .125)"),
    # all hits, but only just: mean .35, margin .05
    "check_margin": ([[0.35] * 4] * 4, "tau .300 stays: margin .050 < .100 (short by .050)"),
}


@pytest.mark.parametrize("check", BLOCKED_BY)
def test_each_check_alone_blocks_and_can_be_switched_off(check):
    groups, line = BLOCKED_BY[check]
    assert str(medloc_decision(window(groups), 0.3, DEFAULTS)) == line
    assert medloc_decision(window(groups), 0.3, config(**{check: False})).tau_next == 0.45
    assert not medloc_decision(window(groups), 0.3, config(**{**OFF, check: True})).tighten


def test_decision_with_all_checks_off_still_waits_for_the_window():
    w = Window(size=30)
    w.append([[0.0]] * 18, 0.3)
    assert str(medloc_decision(w, 0.3, config(**OFF))) == "tau .300 stays: window 18/30 groups"
    w.append([[0.0]] * 12, 0.3)
    assert str(medloc_decision(w, 0.3, config(**OFF))) == "tau .300 -> .450: all checks are off"
    w = Window(size=3, unit="step")
    w.append([[0.0]], 0.3)
    assert str(medloc_decision(w, 0.3, DEFAULTS)) == "tau .300 stays: window 1/3 steps"


def test_bounds_are_met_exactly_in_spite_of_floats():
    # .70 - .60 = 0.09999999999999998 and the mean of 0.7s rounds too; r_bar = .75 = P in the second stage
    assert medloc_decision(window([[0.7] * 3] * 3), 0.6, DEFAULTS).tighten
    assert medloc_decision(window([[0.95, 0.95, 0.95, 0.5]] * 3), 0.6, DEFAULTS).tighten
    # h = .6 and 1 (G = 5): r_bar .8 = P and sigma .2 = S; in floats pstdev([.6, 1.]) need not be .2
    assert medloc_decision(window([[0.9] * 3 + [0.0] * 2, [0.9] * 5]), 0.3, DEFAULTS).tighten
    assert not medloc_decision(window([[0.699] * 3] * 3), 0.6, DEFAULTS).tighten
    # a tau 1e-9 below a stage is in it, P .75 and .55; r_bar is .75 and .55, at taus below .80 and .75
    for tau, hits, fine in ((0.59, 75, False), (0.6 - 1e-9, 75, True), (0.74, 55, False), (0.75 - 1e-9, 55, True)):
        judged = medloc_decision(window([[1.0] * hits + [0.0] * (100 - hits)]), tau, config(check_margin=False))
        assert judged.tighten == fine


# --- the size of a raise


def test_a_raise_is_held_to_a_millionth_and_takes_a_rest_below_two_hundredths_at_once():
    assert next_tau(0.3, DEFAULTS) == 0.45 != 0.3 + 0.15  # 0.44999999999999996
    # a tau that came out 1e-9 below a boundary is on it: .55 -> .10, .70 -> .05
    assert (next_tau(0.55 - 1e-9, DEFAULTS), next_tau(0.70 - 1e-9, DEFAULTS)) == (0.65, 0.75)
    assert next_tau(0.6, config(tau_target=0.719)) == 0.719  # .70 would leave .019
    assert next_tau(0.6, config(tau_target=0.72)) == 0.70  # .02 is left (0.020000000000000018 in floats)
    assert next_tau(0.79, config(tau_start=0.79)) == 0.8
    for delta in ("piecewise", "linear", "cosine"):  # a start at the target is no division by zero
        settings_ = config(tau_start=0.8, delta=delta, window=1)
        assert next_tau(0.8, settings_) == 0.8 and taus(make("medloc", settings_, 9), [PERFECT] * 2) == [0.8, 0.8]


# --- medloc, step by step


def test_the_decision_reports_what_was_judged_and_tau_is_for_the_next_step():
    schedule = make("medloc", config(window=1), 100)
    decision = schedule.observe([[0.42]])
    assert (decision.tau, decision.tau_next, schedule.tau) == (0.3, 0.45, 0.45)
    assert decision.hit_rate == 1.0 and decision.margin == pytest.approx(0.12)
    assert schedule.reward(0.42, True, {"giou": 0.0}) == 0.0


def test_the_paper_trace_ends_where_the_margin_stops_it():
    # A policy with mean IoU .62: .30 -> .45 (margin .32), .45 -> .60 (.17), then margin .02 < .10: stays.
    schedule = make("medloc", DEFAULTS, 100)
    path = taus(schedule, [[[0.62] * 8] * 16] * 8)  # B = 16: 16 | 30, raise, 15 kept | 30, raise | ...
    assert path == [0.3, 0.45] + [0.6] * 6


CHOICES = dict.fromkeys(OFF, [True, True, False]) | {"unit": ["group", "step"], "stale": ["current", "old"]}
CHOICES |= {"tau_start": [0.1, 0.3, 1 / 3, 0.5], "tau_target": [0.5, 0.67, 0.719, 0.8, 0.95]}
CHOICES |= {"refresh": ["half", "full", "quarter", "none"], "delta": ["piecewise", "linear", "cosine"]}
CHOICES |= {"delta0": [0.1, 0.2], "beta1": [0.45, 0.55], "beta2": [0.7, 0.75], "min_margin": [0, 0.1]}
CHOICES |= {"stages": [DEFAULTS.stages, ((0.0, 0.5, 0.5), (0.4, 0.6, 0.35), (0.5, 0.7, 0.2))]}


def oracle(s: MedLoc, steps) -> list[tuple]:
    """MedLoc's rule once more, with numpy and a list -> (tau, hit rate, sigma, margin, tau for the next step)s."""
    tau, entries, told = s.tau_start, [], []
    for step in steps:
        entries += [(tau, group) for group in (step if s.unit == "group" else [sum(step, [])])]
        entries = entries[-s.window :]
        means = [np.mean(group) for _, group in entries]
        rates = [np.mean(np.array(us) >= (old if s.stale == "old" else tau) - 1e-6) for old, us in entries]
        rate, sigma, margin = np.mean(rates), np.sqrt(np.mean((rates - np.mean(rates)) ** 2)), np.mean(means) - tau
        row = s.stages[sum(tau >= start - 1e-6 for start, _, _ in s.stages) - 1]
        fine = (not s.check_reward or rate >= row[1] - 1e-6) and (not s.check_stability or sigma <= row[2] + 1e-6)
        fine = fine and (not s.check_margin or margin >= s.min_margin - 1e-6)
        after = tau
        if fine and len(entries) == s.window and tau < s.tau_target - 1e-6:
            left = 1 - (tau - s.tau_start) / (s.tau_target - s.tau_start)
            piece = 0.15 if tau < s.beta1 - 1e-6 else 0.10 if tau < s.beta2 - 1e-6 else 0.05
            step_ = {"piecewise": piece, "linear": s.delta0 * left, "cosine": s.delta0 * np.sin(left * np.pi / 2) ** 2}
            after = round(tau + max(step_[s.delta], 0.02), 6)
            after = s.tau_target if after > s.tau_target - 0.02 + 1e-6 else after
            share = {"half": 2, "full": 1, "quarter": 4}.get(s.refresh)
            entries = entries[-(-s.window // share) if share else 0 :]
        told.append((tau, rate, sigma, margin, after))
        tau = after
    return told


def test_random_traces_follow_the_rule_under_all_settings():
    draw, raises = random.Random(0), 0
    for _ in range(600):
        s = config(window=draw.randint(1, 8), **{name: draw.choice(values) for name, values in CHOICES.items()})
        strong = draw.choice([0.3, 0.7, 0.9])  # how often an answer is good: else hardly any trace would raise
        steps = [
            [[draw.choice([0.05 * draw.randint(16, 20), 0.9 + draw.random() / 10]) if draw.random() < strong else
              draw.choice([0.05 * draw.randint(0, 20), draw.random()]) for _ in range(4)]
             for _ in range(draw.randint(1, 9))] for _ in range(25)
        ]  # fmt: skip
        schedule = make("medloc", s)
        for step, expected in zip(steps, oracle(s, steps), strict=True):
            d = schedule.observe(step)
            assert (d.tau, d.hit_rate, d.sigma, d.margin, d.tau_next) == pytest.approx(expected, abs=2e-6), s
            assert d.tau_next == schedule.tau <= s.tau_target and (d.tighten or d.tau_next == d.tau)
            raises += d.tighten
    assert raises > 1000


# --- rewards and the other schedules


@pytest.mark.parametrize(
    ("name", "rewards"),  # at IoU .20, .30, .50, .90 with GIoU = IoU - .1, at step 0 of the default settings
    [
        ("medloc", [0, 1, 1, 1]),
        ("fixed", [0, 0, 1, 1]),
        ("raw", [0.2, 0.3, 0.5, 0.9]),
        ("giou", [0.55, 0.6, 0.7, 0.9]),  # (.1 + 1)/2, (.2 + 1)/2, (.4 + 1)/2, (.8 + 1)/2
        ("vtriune", [0, 0, 0, 0.9]),  # eps .85; u itself, not 1
        ("progress", [0, 1, 1, 1]),
        # x = (u - .3)/.08 = -1.25, 0, 2.5, 7.5 -> 1/(1 + e^-x)
        ("medloc-soft", [1 / (1 + math.exp(1.25)), 0.5, 1 / (1 + math.exp(-2.5)), 1 / (1 + math.exp(-7.5))]),
    ],
)
def test_rewards_by_hand(name, rewards):
    schedule = make(name, DEFAULTS, 100)
    got = [schedule.reward(iou, True, {"giou": iou - 0.1}) for iou in (0.2, 0.3, 0.5, 0.9)]
    assert got == pytest.approx(rewards)
    assert all(type(reward) is float for reward in got)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_parse_failure_earns_nothing(name):
    schedule = make(name, DEFAULTS, 10)
    for iou, giou in ((0.0, -1.0), (0.0, 0.0), (1.0, 1.0), (math.nan, math.nan)):
        assert schedule.reward(iou, False, {"giou": giou}) == 0.0
    assert schedule.reward(1.0, True, {"giou": 1.0}) > 0.9  # so that the zeros above say something


@pytest.mark.parametrize("name", ["medloc", "fixed", "progress"])
def test_rewards_use_the_same_hit(name):
    schedule = make(name, config(tau_start=0.45), **{"tau": 0.45} if name == "fixed" else {})
    assert schedule.reward(float(np.float32(9) / np.float32(20)), True, {"giou": 0.0}) == 1.0
    assert schedule.reward(0.4499, True, {"giou": 0.0}) == 0.0


def test_soft_rewards_do_not_change_what_the_tracker_sees():
    hard, soft = (make(name, config(window=4), 100) for name in ("medloc", "medloc-soft"))
    steps = [[[0.5, 0.31]], [[0.7, 0.29]], [[0.5, 0.5]], [[0.9, 0.8]], [[0.9, 0.9]], [[0.9, 0.9]], [[0.9, 0.9]]]
    assert [hard.observe(step) for step in steps] == [soft.observe(step) for step in steps]
    assert hard.tau > 0.3


def test_a_narrow_sigmoid_does_not_overflow():
    schedule = make("medloc-soft", scale=1e-3)
    assert [schedule.reward(iou, True, {"giou": 0.0}) for iou in (0.0, 0.3, 1.0)] == [0.0, 0.5, 1.0]


def test_vtriune_phases():
    schedule = make("vtriune", DEFAULTS, 20)
    # step k has the share k/20: .85 for k = 0, 1 (< .10), .95 for k = 2, 3, 4 (< .25), .99 from k = 5 on
    used = [schedule.tau] + taus(schedule, [PERFECT] * 25)  # and on past the end
    assert used == [0.85] * 2 + [0.95] * 3 + [0.99] * 21
    for total in (10, 30, 70, 1000):  # shares like 3/30 must not fall short of .10
        schedule = make("vtriune", DEFAULTS, total)
        assert ([schedule.tau] + taus(schedule, [PERFECT] * total)).count(0.85) == total // 10


def test_progress_rises_on_a_line_and_fixed_never_moves():
    for end in (0.6, 0.7, 0.8):
        schedule, step = make("progress", total=4, end=end), (end - 0.3) / 4  # from .3, for any u
        used = [schedule.tau] + taus(schedule, [[[0.0]]] * 4)
        assert used == pytest.approx([0.3 + i * step for i in range(5)], abs=1e-9) and used[-1] == end
    assert taus(make("fixed"), [PERFECT * 30] * 3) == [0.5] * 3 and make("fixed", tau=0.7).tau == 0.7


@pytest.mark.parametrize("name", ["fixed", "vtriune", "progress"])
def test_threshold_schedules_report_the_windows_statistics(name):
    schedule = make(name, config(window=2), 10)
    tau = schedule.tau
    decision = schedule.observe([[0.0], [0.99], [0.1]])  # window: .99 and .1, one hit of two under tau
    assert (decision.tau, decision.hit_rate, decision.sigma) == (tau, 0.5, 0.5)
    assert decision.margin == pytest.approx(0.545 - tau)


@pytest.mark.parametrize("name", ["raw", "giou"])
def test_without_a_threshold_there_are_no_statistics(name):
    schedule = make(name, DEFAULTS, 10)
    decision = schedule.observe(PERFECT)
    assert schedule.tau is decision.tau is decision.hit_rate is decision.sigma is decision.margin is None
    assert not decision.tighten and str(decision) == f"{name}, step 1"


# --- what must hold for any trace

IOUS = st.one_of(st.floats(0, 1), st.sampled_from([0.3, 0.45, 0.6, 0.7, 0.75, 0.8, 0.95, 1.0]))
GROUP = st.lists(IOUS, min_size=2, max_size=4)
STRONG = st.lists(st.floats(0.9, 1), min_size=2, max_size=4)  # else hardly any trace would ever raise
STEPS = st.lists(st.lists(st.one_of(STRONG, GROUP, STRONG), min_size=1, max_size=9), min_size=1, max_size=25)
CONFIGS = st.builds(MedLoc, window=st.integers(1, 7), **{k: st.sampled_from(v) for k, v in CHOICES.items()})


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), CONFIGS, STEPS, st.data())
def test_a_saved_schedule_goes_on_identically(name, settings_, steps, data):
    cut = data.draw(st.integers(0, len(steps)), label="cut")
    whole, first, resumed = (make(name, settings_, len(steps)) for _ in range(3))
    for step in steps[:cut]:
        whole.observe(step)
        first.observe(step)
    resumed.observe(steps[0])  # what a schedule saw before it is loaded must be forgotten
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict()
    for step in steps[cut:]:
        assert resumed.observe(step) == whole.observe(step)
        assert resumed.reward(0.7, True, {"giou": 0.6}) == whole.reward(0.7, True, {"giou": 0.6})
    assert resumed.state_dict() == whole.state_dict()


@settings(max_examples=100, deadline=None)
@given(CONFIGS)
def test_a_perfect_policy_always_reaches_the_target(settings_):
    # All hits and no spread; Delta 0, since a margin of .10 forbids even a perfect policy to leave a tau above .90.
    # At least .02 a raise: the longest way, .10 to .95, takes at most 43 raises.
    schedule = make("medloc", replace(settings_, min_margin=0.0), 1)
    assert taus(schedule, [PERFECT] * 43 * settings_.window)[-1] == settings_.tau_target


# --- states, settings, one schedule a key


def test_the_state_is_a_copy():
    schedule, resumed = make("medloc", config(window=4)), make("medloc", config(window=4))
    schedule.observe([[0.9, 0.8]])
    state = schedule.state_dict()
    before = json.dumps(state)
    resumed.load_state_dict(state)
    for trained in (schedule, resumed):
        trained.observe([[0.1, 0.2]] * 3)
        assert json.dumps(state) == before


NONSENSE = {
    "medlock": "there is no 'medlock'; there are medloc, medloc-soft, fixed",
    "medloc:window=0": "medloc: window must be a whole number from 1 to 100000, not 0",
    "medloc:window=2.5": "medloc: window must be a whole number",
    "medloc:window": "medloc: 'window' is none of its settings; it has window, unit, stale, tau_start",
    "medloc:tau=.5": "medloc: 'tau=.5' is none of its settings",
    "medloc:window=3,window=4": "medloc: window is given twice",
    "medloc:tau_start=.9": "medloc: tau_start must be at most tau_target, 0.8, not 0.9",
    "medloc:tau_start=-.1": "tau_start must be a number from 0 to 1",
    "medloc:tau_target=nan": "tau_target must be a number from 0 to 1, not nan",
    "medloc:beta1=.8": "beta1 must be at most beta2, 0.7",
    "medloc:check_margin=maybe": "check_margin must be on or off, not 'maybe'",
    "medloc:unit=batch": "unit must be one of group, step, not 'batch'",
    "medloc:refresh=third": "refresh must be one of half, full, quarter, none",
    "medloc:delta=sine": "delta must be one of piecewise, linear, cosine",
    "medloc:stages=.75:.6": "stages must be 3 rising rows of 3 numbers from 0 to 1, as 0:0.8:0.2/0.6:0.75:0.35",
    "medloc:stages=0:.8:.2/.8:.7:.3/.6:.5:.4": "stages must be 3 rising rows",
    "medloc:stages=.1:.8:.2/.6:.7:.3/.7:.5:.4": "stages must be 3 rising rows",
    "medloc-soft:scale=0": "scale must be a number from 0.001 to 1",
    "fixed:tau=50": "tau must be a number from 0 to 1",
    "raw:tau=.5": "raw: 'tau=.5' is none of its settings; it has window, unit, stale",
    "progress:tau_start=.65,end=.6": "tau_start must be at most end, 0.6",
    "progress-moderate": "progress-moderate is progress:end=0.7 now",
}


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_one_sentence_that_names_the_setting(text):
    with pytest.raises(InputError) as error:
        read_schedule(text)
    words = str(error.value)
    assert words.startswith("--schedule") and NONSENSE[text] in words and words.isprintable() and len(words) < 400


def test_settings_are_read_behind_the_name():
    name, found = read_schedule("medloc:window=60,refresh=full,check_stability=off,stages=0:.9:.1/.5:.8:.2/.7:.6:.3")
    stages = ((0.0, 0.9, 0.1), (0.5, 0.8, 0.2), (0.7, 0.6, 0.3))
    assert (name, found) == ("medloc", MedLoc(window=60, refresh="full", check_stability=False, stages=stages))
    assert read_schedule("raw") == ("raw", SCHEDULES["raw"].Settings())
    text = explained({name: kind.Settings for name, kind in SCHEDULES.items()})
    assert "  window=30  (s) N, what decisions look back on" in text and "  check_margin=on  (s)" in text
    assert "  stages=0:0.8:0.2/0.6:0.75:0.35/0.75:0.55:0.4  rows" in text and "[half, full, quarter, none]" in text


def groups(by_key: dict) -> SimpleNamespace:
    """A step's scores, as far as schedules look at them."""
    return SimpleNamespace(by_key=lambda: by_key)


KEYS = [("ham", "box"), ("isic", "box"), ("isic", "label")]


def test_every_dataset_and_task_has_a_window_and_a_tau_of_its_own():
    made = Schedules(["medloc:window=2", "label=raw"], KEYS, 10)
    assert [made.of[key].name for key in KEYS] == ["medloc", "medloc", "raw"]
    good, poor = [[0.9, 0.9]] * 2, [[0.1, 0.1]] * 2
    decisions = made.observe(groups({KEYS[0]: good, KEYS[1]: poor, KEYS[2]: good}))
    assert [made.of[key].tau for key in KEYS] == [0.45, 0.3, None]
    assert decisions[KEYS[0]].tau == 0.3 and decisions[KEYS[0]].tighten and not decisions[KEYS[1]].tighten
    decisions = made.observe(groups({KEYS[1]: good}))  # of the others the step had no group
    assert [made.of[key].tau for key in KEYS] == [0.45, 0.45, None]
    assert str(decisions[KEYS[0]]) == "tau .450 stays: no group in this step" and made.of[KEYS[0]].step == 2
    again = Schedules(["medloc:window=2", "label=raw"], KEYS, 10)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.state_dict() == made.state_dict()
    assert made.observe(groups({KEYS[0]: good * 2})) == again.observe(groups({KEYS[0]: good * 2}))


def test_a_schedule_by_share_of_the_steps_goes_on_where_a_dataset_rests():
    made = Schedules(["progress:end=.5"], KEYS[:1], 4)
    assert [made.observe(groups({}))[KEYS[0]].tau_next for _ in range(4)] == pytest.approx([0.35, 0.4, 0.45, 0.5])


def test_schedules_that_fit_no_task_are_refused():
    for texts, words in (
        (["medloc", "raw"], "medloc and raw; one is for all tasks, others are TASK=SCHEDULE"),
        (["label=raw", "span=raw"], "no record has the task 'span'"),
        (["label=nope"], "there is no 'nope'"),
        (["label=raw", "label=raw"], "the task 'label' is named twice"),
    ):
        with pytest.raises(InputError, match=words):
            Schedules(texts, KEYS, 10)


def test_scheduler_needs_no_torch_or_numpy():
    code = "import sys, scheduler; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


# --- experiments/variants.py


@pytest.fixture(scope="module")
def variants():
    before = dict(SCHEDULES)
    from experiments import variants as module

    yield module
    for name in SCHEDULES.keys() - before.keys():
        del SCHEDULES[name]


def test_giou_gives_way_to_iou(variants):
    """An answer of IoU .5 and GIoU .1: .1 at first, .5 once the policy is good, halfway between in the middle."""
    earned = []
    for mean in (0.4, 0.5, 0.6):
        schedule = make("hull", config(window=1))
        schedule.observe([[mean] * 4])
        earned.append(schedule.reward(0.5, True, {"giou": 0.1}))
    assert earned == pytest.approx([0.1, 0.3, 0.5])
    soft = make("hull-soft", config(window=2), scale=0.1)
    assert soft.reward(0.5, True, {"giou": 0.1}) == pytest.approx(1 / (1 + math.exp(2)))
    soft.observe([[0.61] * 4] * 2)
    assert soft.tau == 0.45 and soft.reward(0.5, True, {"giou": 0.1}) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_tau_is_the_windows_median_up_and_down(variants):
    schedule = make("quantile-50", config(window=2))
    for step in ([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], [[0.8] * 4, [0.9] * 4], [[0.1] * 4, [0.3] * 4]):
        schedule.observe(step)
        assert schedule.tau == np.quantile(np.array(step), 0.5, method="higher")  # the window holds this step alone


@pytest.mark.slow
def test_the_program_trains_with_a_variant(tmp_path):
    words = "--schedule hull-soft --data phantoms:xray --steps 1 --batch-size 2 --workers 0 --eval-limit 2".split()
    root = Path(__file__).parent.parent
    command = [sys.executable, root / "experiments" / "variants.py", *words, "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["arguments"]["schedule"] == ["hull-soft"]
