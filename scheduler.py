"""The reward curriculum of MedLoc-R1 (CVPR 2026, arXiv 2603.28120, its method section), and what it is compared with.

An answer is worth u in [0, 1] (a box its IoU). It earns by a threshold tau that starts lenient and rises:

    reward_i = 1[u_i >= tau]      tau <- min(tau + delta(tau), tau_target)      when, over the last N prompt groups,
    hit rate >= P(tau)   and   sigma (std of the groups' hit rates) <= S(tau)   and   margin (mean u - tau) >= Delta

Floats and a deque, no torch. `reward` is asked for each completion, `observe` called once a step with the u of ALL
groups that were rolled out, in global order; the new tau is for the NEXT step. The method is known here from summaries:
(s) marks what they say, (?) what we assume. Also assumed: a raise drops the oldest half, rounded up, and the next
decision waits until the window holds N again; kept groups' hits are counted anew under the current tau.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from settings import Settings, setting

SLACK = 1e-6  # tau is held to 1e-6: 0.3 + 0.15 is 0.44999999999999996, and no decision may hang on that
MIN_DELTA = 0.02  # linear and cosine steps shrink towards 0 and would never reach the target; so does a rest below this
REFRESH = {"half": 1 / 2, "full": 1.0, "quarter": 1 / 4, "none": 0.0}  # share of the window that a raise drops
VTRIUNE_PHASES = ((0.10, 0.85), (0.25, 0.95), (math.inf, 0.99))  # (until this share of the steps, eps), its own code


@dataclass(frozen=True)
class Watch(Settings):
    """The window, which every schedule keeps: where tau does not go by it, it only watches."""

    window: int = setting(30, "(s) N, what decisions look back on", low=1, high=10**5)
    unit: str = setting("group", "(?) what it counts: prompt groups, or whole optimiser steps", "group", "step")
    stale: str = setting("current", "(?) kept groups are judged by the current tau, or their old one", "current", "old")


@dataclass(frozen=True)
class MedLoc(Watch):
    RISING = (("tau_start", "tau_target"), ("beta1", "beta2"))
    tau_start: float = setting(0.30, "(s) lenient enough that a coarse policy hits")
    tau_target: float = setting(0.80, "(s) tau never passes it")
    refresh: str = setting("half", "(?) what of the window a raise drops, the oldest first", *REFRESH)
    check_reward: bool = setting(True, "(s) hit rate >= P(tau); without it A@.5 on HAM10000 falls from 94.96 to 82.33")
    check_stability: bool = setting(True, "(s) sigma <= S(tau); without it 89.72")
    check_margin: bool = setting(True, "(s) margin >= min_margin; without it 90.86")
    stages: tuple = setting(
        ((0.0, 0.80, 0.20), (0.60, 0.75, 0.35), (0.75, 0.55, 0.40)),  # of group means, ddof 0 (?)
        "rows tau:P:S, each from its tau on: P falls and S grows with tau (s), values (?)",
    )
    min_margin: float = setting(0.10, "(s) Delta; it caps tau: leaving .70 needs a mean u of .80")
    delta: str = setting("piecewise", "(s) how far a raise goes", "piecewise", "linear", "cosine")
    beta1: float = setting(0.55, "(?) piecewise: delta .15 below beta1, .10 below beta2, .05 from there on (s)")
    beta2: float = setting(0.70, "(?) public ports have .75, which makes the .05 step dead: .30 .45 .60 .70 .80")
    delta0: float = setting(0.20, "(?) first delta of linear and cosine")


@dataclass(frozen=True)
class Soft(MedLoc):
    scale: float = setting(0.08, "ours: s in sigmoid((u - tau)/s), so that near misses differ", low=1e-3)


@dataclass(frozen=True)
class Fixed(Watch):
    tau: float = setting(0.50, "VLM-R1 before 2025-03-24")


@dataclass(frozen=True)
class Line(Watch):
    RISING = (("tau_start", "end"),)
    tau_start: float = setting(0.30, "(?) tau at the first step")
    end: float = setting(0.70, "(?) and at the last: .6 conservative, .7 moderate, .8 aggressive")


def hit(u: float, tau: float) -> bool:
    """Whether u counts as a hit, decided here alone: 9/20 in float32 is below the double .45, and yet a hit."""
    return u >= tau - SLACK


class Window:
    """The last N prompt groups (or optimiser steps): the u of each, and the tau that they were rewarded under."""

    def __init__(self, size: int = 30, unit: str = "group", stale: str = "current") -> None:
        self.size, self.unit, self.stale = size, unit, stale
        self.entries: deque[tuple[float | None, list[float]]] = deque(maxlen=size)

    def append(self, groups: Sequence[Sequence[float]], tau: float | None) -> None:
        """Add one optimiser step: B >= 1 groups of G >= 1 u's in global order. ValueError for anything else."""
        for index, group in enumerate(groups or [[]]):
            # A NaN would hold tau for ever without a word; a GIoU passed by mistake would skew the margin.
            if not group or not all(-SLACK <= u <= 1 + SLACK for u in group):
                raise ValueError(f"group {index} must hold u's from 0 to 1, got {list(group)}")
        entries = groups if self.unit == "group" else [[u for group in groups for u in group]]
        self.entries.extend((tau, list(entry)) for entry in entries)

    def statistics(self, tau: float | None) -> tuple[float | None, float | None, float | None]:
        """(hit rate: mean of the groups' shares of hits; their std, ddof 0; mean u - tau), None without a tau."""
        if tau is None or not self.entries:
            return None, None, None
        rates = [fmean(hit(u, tau if self.stale == "current" else old) for u in us) for old, us in self.entries]
        return fmean(rates), pstdev(rates), fmean(fmean(us) for _, us in self.entries) - tau


@dataclass(frozen=True)
class Decision:
    """What a step led to. The statistics are those that were judged: under `tau`, before a raise to `tau_next`."""

    tau: float | None
    tau_next: float | None
    reasons: tuple[str, ...]  # why tau stays: the checks that failed; or why it rises: all checks
    hit_rate: float | None
    sigma: float | None
    margin: float | None

    @property
    def tighten(self) -> bool:
        return self.tau_next != self.tau

    def __str__(self) -> str:
        """One line: `tau .450 stays: margin .083 < .100 (short by .017)`."""
        move = f"-> {number(self.tau_next)}" if self.tighten else "stays"
        return ("" if self.tau is None else f"tau {number(self.tau)} {move}: ") + ", ".join(self.reasons)


def medloc_decision(window: Window, tau: float, s: MedLoc) -> Decision:
    """MedLoc-R1's rule: tighten if the window is full and every check that is switched on passes. Changes nothing."""
    hit_rate, sigma, margin = statistics = window.statistics(tau)
    if len(window.entries) < window.size:
        return Decision(tau, tau, (f"window {len(window.entries)}/{window.size} {window.unit}s",), *statistics)
    if hit(tau, s.tau_target):
        return Decision(tau, tau, ("target reached",), *statistics)
    _, least_hits, most_sigma = [row for row in s.stages if hit(tau, row[0])][-1]
    passed, failed = [], []
    for on, name, value, bound, at_least in (
        (s.check_reward, "hit rate", hit_rate, least_hits, True),
        (s.check_stability, "sigma", sigma, most_sigma, False),
        (s.check_margin, "margin", margin, s.min_margin, True),
    ):
        gap = bound - value if at_least else value - bound
        if on and gap <= SLACK:
            passed.append(f"{name} {number(value)} {'>=' if at_least else '<='} {number(bound)}")
        elif on:
            sign, how = ("<", "short") if at_least else (">", "over")
            failed.append(f"{name} {number(value)} {sign} {number(bound)} ({how} by {number(gap)})")
    tau_next = tau if failed else next_tau(tau, s)
    return Decision(tau, tau_next, tuple(failed or passed or ["all checks are off"]), *statistics)


def next_tau(tau: float, s: MedLoc) -> float:
    """tau after one raise: by delta(tau) or at least MIN_DELTA, never past the target and never just short of it."""
    share = (tau - s.tau_start) / max(s.tau_target - s.tau_start, MIN_DELTA)  # one raise crosses a shorter span anyway
    if s.delta == "piecewise":
        delta = 0.05 if hit(tau, s.beta2) else 0.10 if hit(tau, s.beta1) else 0.15
    else:
        delta = s.delta0 * (1 - share) if s.delta == "linear" else s.delta0 / 2 * (1 + math.cos(math.pi * share))
    raised = round(tau + max(delta, MIN_DELTA), 6)
    return raised if hit(s.tau_target - raised, MIN_DELTA) else s.tau_target


@dataclass(frozen=True)
class Kind:
    """shape(schedule, u, further numbers) -> reward; start(settings) -> tau; rule(schedule) -> Decision."""

    shape: Callable
    start: Callable
    rule: Callable
    Settings: type[Watch]
    part: str = ""  # of an answer's numbers, that shape needs
    by_share: bool = False  # tau goes by the share of the steps: a run of another length is another schedule


class Schedule:
    """`reward` under the present tau (None: there is none), `observe` one step, `state_dict` to go on exactly."""

    def __init__(self, name: str, settings: Watch, total_steps: int) -> None:
        self.name, self.kind, self.settings, self.total_steps = name, SCHEDULES[name], settings, total_steps
        self.window = Window(settings.window, settings.unit, settings.stale)
        self.step = 0  # optimiser steps observed
        self.tau = self.kind.start(settings)

    def reward(self, u: float, valid: bool, parts: dict[str, float] | None = None) -> float:
        """What an answer earns: one that cannot be read always 0; a sigmoid or a GIoU would give it something."""
        return self.kind.shape(self, u, parts or {}) if valid else 0.0

    def observe(self, groups: Sequence[Sequence[float]]) -> Decision:
        """Take in one optimiser step: its groups of u, in global order; tau moves at most once."""
        self.step += 1
        if groups:
            self.window.append(groups, self.tau)
        still = Decision(self.tau, self.tau, ("no group in this step",), *self.window.statistics(self.tau))
        decision = self.kind.rule(self) if groups or self.kind.by_share else still
        self.tau = decision.tau_next
        return decision

    def state_dict(self) -> dict:
        """All that later decisions depend on, ready for JSON; settings are the command line's."""
        return {"step": self.step, "tau": self.tau, "window": [list(entry) for entry in self.window.entries]}

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where state_dict was taken (runtime/checkpoint.py checks that it was)."""
        self.step, self.tau = state["step"], state["tau"]
        self.window.entries = deque(((tau, us) for tau, us in state["window"]), self.window.size)


def hits(s: Schedule, u: float, parts: dict) -> float:
    return float(hit(u, s.tau))


def medloc(schedule: Schedule) -> Decision:
    decision = medloc_decision(schedule.window, schedule.tau, schedule.settings)
    for _ in range(math.ceil(REFRESH[schedule.settings.refresh] * schedule.window.size) if decision.tighten else 0):
        schedule.window.entries.popleft()
    return decision


def by_step(shape: Callable, tau_at: Callable, Settings: type[Watch], **more) -> Kind:
    """tau_at(settings, share of the steps); the window only watches."""

    def rule(schedule: Schedule) -> Decision:
        tau = tau_at(schedule.settings, schedule.step / schedule.total_steps)
        statistics = schedule.window.statistics(schedule.tau)
        return Decision(schedule.tau, tau, (f"{schedule.name}, step {schedule.step}",), *statistics)

    return Kind(shape, lambda s: tau_at(s, 0.0), rule, Settings, **more)


SCHEDULES = {  # a schedule of your own is a row
    "medloc": Kind(hits, lambda s: s.tau_start, medloc, MedLoc),
    "medloc-soft": Kind(  # the sigmoid, without overflow
        lambda s, u, parts: (1 + math.tanh((u - s.tau) / s.settings.scale / 2)) / 2, lambda s: s.tau_start, medloc, Soft
    ),
    "fixed": by_step(hits, lambda s, share: s.tau, Fixed),
    "raw": by_step(lambda s, u, parts: u, lambda s, share: None, Watch),  # VLM-R1 since 2025-03-24
    "giou": by_step(lambda s, u, parts: (parts["giou"] + 1) / 2, lambda s, share: None, Watch, part="giou"),
    "vtriune": by_step(  # u if u >= eps else 0, NOT binary
        lambda s, u, parts: u if hit(u, s.tau) else 0.0,
        lambda s, share: next(eps for end, eps in VTRIUNE_PHASES if share < end),
        Watch,
        by_share=True,
    ),
    "progress": by_step(hits, lambda s, x: round(s.tau_start + (s.end - s.tau_start) * x, 6), Line, by_share=True),
}


def number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)  # .450, -.050, 1.000
