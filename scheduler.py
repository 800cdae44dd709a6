"""The reward curriculum of MedLoc-R1 (CVPR 2026, arXiv 2603.28120, its method section), and what it is compared with.

A box earns its reward by an IoU threshold tau that starts lenient and rises when the policy is ready for it:

    reward_i = 1[IoU_i >= tau]      tau <- min(tau + delta(tau), tau_target)      when, over the last N prompt groups,
    hit rate >= P(tau)   and   sigma (std of the groups' hit rates) <= S(tau)   and   margin (mean IoU - tau) >= Delta

Floats and a deque, no torch: lift it out with errors.py. A trainer calls `reward` for each completion and `observe`
once per optimiser step, with the IoUs of ALL groups that were rolled out (also those that dynamic sampling drops) in
global order. The new tau is for the NEXT step: a step is rewarded under one tau and brings at most one raise.

The paper's method is known here from summaries: (s) marks what they say, (?) what we assume. Also assumed:
- A raise drops the oldest half, rounded up, so that even N = 1 has to fill again, and the next decision waits until
  the window holds N. With B groups a step that takes ceil((N/2)/B) steps. What is kept was rewarded under an older tau.
  So with B >= N/2 tau may rise at every step; with B > N only the last N groups of a step count and no group is kept
  from step to step: take a larger --window or --unit=step.
- Kept groups' hits are counted anew under the current tau, or with --stale=old each under its own. The margin is
  always to the current tau. Bounds, like hits, are met within 1e-6: .70 - .60 is 0.09999999999999998 in floats.
- progress and vtriune: the k-th step, counted from 0, has the tau that belongs to the share k/total of the steps.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, pstdev

from errors import InputError, one_line

SLACK = 1e-6  # tau is held to 1e-6: 0.3 + 0.15 is 0.44999999999999996, and no decision may hang on that
MIN_DELTA = 0.02  # linear and cosine steps shrink towards 0 and would never reach the target; so does a rest below this
REFRESH = {"half": 1 / 2, "full": 1.0, "quarter": 1 / 4, "none": 0.0}  # share of the window that a raise drops
VTRIUNE_PHASES = ((0.10, 0.85), (0.25, 0.95), (math.inf, 0.99))  # (until this share of the steps, eps), its own code
PROGRESS_ENDS = {"progress": 0.7, "progress-conservative": 0.6, "progress-moderate": 0.7, "progress-aggressive": 0.8}
WATCHING = ("window", "unit", "stale")  # switches of the window, which every schedule keeps
CHOICES = {
    "unit": ("group", "step"),
    "stale": ("current", "old"),
    "refresh": tuple(REFRESH),
    "delta_schedule": ("piecewise", "linear", "cosine"),
}


@dataclass(frozen=True)
class ScheduleConfig:
    """Every switch of the schedules; the field `tau_start` is the flag --tau-start. Nonsense raises InputError."""

    tau_start: float = 0.30  # (s) lenient enough that a coarse policy hits
    tau_target: float = 0.80  # (s) tau never passes it
    window: int = 30  # (s) N
    unit: str = "group"  # (?) what the window counts: prompt "group"s, or whole optimiser "step"s
    stale: str = "current"  # (?) kept groups are judged by the "current" tau, or by the "old" one that rewarded them
    refresh: str = "half"  # (?) what a raise drops, the oldest first: half | full | quarter | none
    check_reward: bool = True  # (s) hit rate >= P(tau); without it A@.5 on HAM10000 falls from 94.96 to 82.33
    check_stability: bool = True  # (s) sigma <= S(tau); without it 89.72
    check_margin: bool = True  # (s) margin >= min_margin; without it 90.86
    stages: tuple[float, ...] = (0.60, 0.75)  # (?) the second P and S hold from the first of these on, the third ...
    min_hit_rate: tuple[float, ...] = (0.80, 0.75, 0.55)  # P(tau): falls as tau rises (s), values (?)
    max_sigma: tuple[float, ...] = (0.20, 0.35, 0.40)  # S(tau): grows (s), values (?), of group means, ddof 0 (?)
    min_margin: float = 0.10  # (s) Delta; it caps tau: leaving .70 needs a mean IoU of .80
    delta_schedule: str = "piecewise"  # (s) piecewise | linear | cosine
    beta1: float = 0.55  # (?) piecewise: delta .15 below beta1, .10 below beta2, .05 from there on (s)
    beta2: float = 0.70  # (?) public ports have .75, which makes the .05 step dead: .30 .45 .60 .70 .80
    delta0: float = 0.20  # (?) first delta of linear and cosine
    soft_scale: float = 0.08  # ours: s in medloc-soft's sigmoid((u - tau)/s)
    fixed_tau: float = 0.50  # `fixed`: VLM-R1 before 2025-03-24

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in CHOICES:
                _require(value in CHOICES[name], name, f"one of {', '.join(CHOICES[name])}", value)
            elif name == "window":
                _require(isinstance(value, int) and value >= 1, name, "a whole number of at least 1", value)
            else:
                numbers = value if isinstance(value, (tuple, list)) else (value,)
                _require(all(0 <= number <= 1 for number in numbers), name, "from 0 to 1", value)
        for name, count in (("stages", 2), ("min_hit_rate", 3), ("max_sigma", 3)):
            _require(len(getattr(self, name)) == count, name, f"{count} numbers", getattr(self, name))
        _require(self.stages[0] <= self.stages[1], "stages", "in rising order", self.stages)
        _require(self.tau_start <= self.tau_target, "tau_start", f"<= --tau-target {self.tau_target}", self.tau_start)
        _require(self.beta1 <= self.beta2, "beta1", f"<= --beta2 {self.beta2}", self.beta1)
        _require(self.soft_scale > 0, "soft_scale", "above 0", self.soft_scale)


def hit(iou: float, tau: float) -> bool:
    """Whether an IoU counts as a hit, decided here alone: 9/20 in float32 is below the double .45, and yet a hit."""
    return iou >= tau - SLACK


class Window:
    """The last N prompt groups (or optimiser steps): for each its IoUs and the tau that they were rewarded under.

    IoUs rather than rewards, so that a raise can judge the kept groups anew. The statistics are None while the window
    is empty and where there is no tau (raw, giou).
    """

    def __init__(self, size: int = 30, unit: str = "group", stale: str = "current") -> None:
        self.size, self.unit, self.stale = size, unit, stale
        self.entries: deque[tuple[float | None, list[float]]] = deque(maxlen=size)

    def append(self, ious: Sequence[Sequence[float]], tau: float | None) -> None:
        """Add one optimiser step: B >= 1 groups of G >= 1 IoUs in global order. ValueError for anything else."""
        for index, group in enumerate(ious or [[]]):
            # A NaN would hold tau for ever without a word; a GIoU passed by mistake would skew the margin.
            if not group or not all(-SLACK <= iou <= 1 + SLACK for iou in group):
                raise ValueError(f"group {index} must hold IoUs from 0 to 1, got {list(group)}")
        entries = ious if self.unit == "group" else [[iou for group in ious for iou in group]]
        self.entries.extend((tau, list(entry)) for entry in entries)

    def drop_oldest(self, share: float) -> None:
        """Forget the oldest ceil(share N) entries of a full window."""
        for _ in range(math.ceil(share * self.size)):
            self.entries.popleft()

    @property
    def full(self) -> bool:
        """Whether it holds N entries; tau is not decided on before."""
        return len(self.entries) == self.size

    def hit_rate(self, tau: float | None) -> float | None:
        """r_bar = mean_t h_t, where h_t = mean_i 1[IoU_ti >= tau] is the hit rate of group t."""
        hit_rates = self._hit_rates(tau)
        return fmean(hit_rates) if hit_rates else None

    def sigma(self, tau: float | None) -> float | None:
        """sqrt(mean_t (h_t - r_bar)^2), ddof 0. Of single 0/1 rewards it would be .40 at r_bar = .8: never below S."""
        hit_rates = self._hit_rates(tau)
        return pstdev(hit_rates) if hit_rates else None

    def margin(self, tau: float | None) -> float | None:
        """m_bar = mean_t v_t - tau, where v_t = mean_i IoU_ti is the mean IoU of group t."""
        if tau is None or not self.entries:
            return None
        return fmean(fmean(ious) for _, ious in self.entries) - tau

    def _hit_rates(self, tau: float | None) -> list[float]:
        if tau is None:
            return []
        return [fmean(hit(u, tau if self.stale == "current" else old) for u in ious) for old, ious in self.entries]


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
        """Whether tau rises."""
        return self.tau_next != self.tau

    def __str__(self) -> str:
        """One line: `tau .450 stays: margin .083 < .100 (short by .017)`."""
        move = f"-> {_num(self.tau_next)}" if self.tighten else "stays"
        return ("" if self.tau is None else f"tau {_num(self.tau)} {move}: ") + ", ".join(self.reasons)


def medloc_decision(window: Window, tau: float, config: ScheduleConfig) -> Decision:
    """MedLoc-R1's rule: tighten if the window is full and every check that is switched on passes. Changes nothing."""
    hit_rate, sigma, margin = window.hit_rate(tau), window.sigma(tau), window.margin(tau)
    tau_next = tau
    if not window.full:
        reasons = [f"window {len(window.entries)}/{window.size} {window.unit}s"]
    elif not _below(tau, config.tau_target):
        reasons = ["target reached"]
    else:
        stage = sum(not _below(tau, start) for start in config.stages)  # 0, 1 or 2
        checks = (
            (config.check_reward, "hit rate", hit_rate, ">=", config.min_hit_rate[stage]),
            (config.check_stability, "sigma", sigma, "<=", config.max_sigma[stage]),
            (config.check_margin, "margin", margin, ">=", config.min_margin),
        )
        results = [_check(*check) for on, *check in checks if on]
        reasons = [words for passed, words in results if not passed]
        if not reasons:
            tau_next = next_tau(tau, config)
            reasons = [words for _, words in results] or ["all checks are off"]
    return Decision(tau, tau_next, tuple(reasons), hit_rate, sigma, margin)


def _check(name: str, value: float, sense: str, bound: float) -> tuple[bool, str]:
    """Whether `value sense bound` holds, and the words that say so, or by how much it does not."""
    gap = bound - value if sense == ">=" else value - bound
    if gap <= SLACK:
        return True, f"{name} {_num(value)} {sense} {_num(bound)}"
    opposite, how = ("<", "short") if sense == ">=" else (">", "over")
    return False, f"{name} {_num(value)} {opposite} {_num(bound)} ({how} by {_num(gap)})"


def next_tau(tau: float, config: ScheduleConfig) -> float:
    """tau after one raise: by delta(tau) or at least MIN_DELTA, never past the target and never just short of it."""
    span = max(config.tau_target - config.tau_start, MIN_DELTA)  # one raise crosses a shorter one anyway
    share = (tau - config.tau_start) / span
    if config.delta_schedule == "piecewise":
        delta = 0.15 if _below(tau, config.beta1) else 0.10 if _below(tau, config.beta2) else 0.05
    elif config.delta_schedule == "linear":
        delta = config.delta0 * (1 - share)
    else:
        delta = config.delta0 / 2 * (1 + math.cos(math.pi * share))
    raised = round(tau + max(delta, MIN_DELTA), 6)
    return config.tau_target if _below(config.tau_target - raised, MIN_DELTA) else raised


class Schedule:
    """What all schedules share: a subclass says where tau goes and what a box earns, by default 1[u >= tau].

    `tau` is what the next step is rewarded under, None if there is none. Every schedule keeps the window, so that the
    statistics of, say, a fixed threshold can be logged beside MedLoc-R1's. A schedule of your own: subclass, say where
    tau goes or what a box earns, and enter it in SCHEDULES.
    """

    own: tuple[str, ...] = ()  # the fields of ScheduleConfig that it goes by, WATCHING aside

    def __init__(self, name: str, config: ScheduleConfig, total_steps: int) -> None:
        self.name, self.config, self.total_steps = name, config, total_steps
        self.window = Window(config.window, config.unit, config.stale)
        self.step = 0  # optimiser steps observed
        self.tau = self.tau_at(0)

    def tau_at(self, step: int) -> float | None:
        """tau after `step` optimiser steps."""
        return None

    def reward(self, iou: float, giou: float, valid: bool) -> float:
        """What a completion earns: without a box (not valid) always 0; a sigmoid or a GIoU would give it something."""
        return self.box_reward(iou, giou) if valid else 0.0

    def box_reward(self, iou: float, giou: float) -> float:
        return float(hit(iou, self.tau))

    def observe(self, ious: Sequence[Sequence[float]]) -> Decision:
        """Take in one optimiser step, all B groups of G IoUs in global order; tau moves at most once."""
        self.window.append(ious, self.tau)
        self.step += 1
        decision = self.decide()
        self.tau = decision.tau_next
        return decision

    def decide(self) -> Decision:
        """Here tau goes by the number of steps and the window only watches."""
        statistics = self.window.hit_rate(self.tau), self.window.sigma(self.tau), self.window.margin(self.tau)
        return Decision(self.tau, self.tau_at(self.step), (f"{self.name}, step {self.step}",), *statistics)

    def settings(self) -> dict:
        """What a resumed run must share with the saved one, as JSON gives it back (tuples become lists)."""
        return json.loads(json.dumps({"schedule": self.name, **asdict(self.config)}))

    def state_dict(self) -> dict:
        """All that later decisions depend on, ready for JSON."""
        window = [list(entry) for entry in self.window.entries]
        return {"settings": self.settings(), "step": self.step, "tau": self.tau, "window": window}

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where state_dict was taken. InputError, and no change, if schedule or settings differ, or if it
        is none that state_dict() could have given."""
        if not isinstance(state, dict) or not isinstance(settings := state.get("settings"), dict):
            raise InputError("field 'schedule' has no object 'settings'; go on from another checkpoint")
        for name, ours in self.settings().items():
            if (theirs := settings.get(name)) != ours:
                theirs = one_line(str(theirs))
                raise InputError(
                    f"the checkpoint was trained with {_flag(name)} {theirs}, not {ours}: resume with {theirs} "
                    "or start a new run"
                )
        step, tau, window = (state.get(name) for name in ("step", "tau", "window"))

        def is_tau(value: object) -> bool:
            return value is None if self.tau is None else type(value) in (int, float) and 0 <= value <= 1

        def is_entry(entry: object) -> bool:
            return (
                isinstance(entry, list)
                and len(entry) == 2
                and is_tau(entry[0])
                and isinstance(entry[1], list)
                and len(entry[1]) > 0
                and all(type(iou) in (int, float) and -SLACK <= iou <= 1 + SLACK for iou in entry[1])
            )

        rules = {  # what state_dict() gives
            "step": (type(step) is int and 0 <= step < 2**53, "a whole number of at least 0"),
            "tau": (is_tau(tau), "null" if self.tau is None else "from 0 to 1"),
            "window": (
                isinstance(window, list) and len(window) <= self.window.size and all(map(is_entry, window)),
                f"a list of at most {self.window.size} pairs [tau, [IoU, ...]]",
            ),
        }
        for name, (fine, rule) in rules.items():
            if not fine:
                found = one_line(repr(state[name])) if name in state else "missing"
                raise InputError(
                    f"field '{name}' of 'schedule' must be {rule}, it is {found}; go on from another checkpoint"
                )
        self.step, self.tau = step, tau
        self.window.entries.clear()
        self.window.entries.extend((tau, ious) for tau, ious in window)


class MedLoc(Schedule):
    """1[u >= tau]; medloc_decision raises tau."""

    own = tuple(f.name for f in fields(ScheduleConfig) if f.name not in (*WATCHING, "soft_scale", "fixed_tau"))

    def tau_at(self, step: int) -> float:
        return self.config.tau_start  # at step 0; from there on decide() moves it

    def decide(self) -> Decision:
        decision = medloc_decision(self.window, self.tau, self.config)
        if decision.tighten:
            self.window.drop_oldest(REFRESH[self.config.refresh])
        return decision


class MedLocSoft(MedLoc):
    """sigmoid((u - tau)/s), so that near misses differ; the window still counts 1[u >= tau]. Ours, not the paper's."""

    own = (*MedLoc.own, "soft_scale")

    def box_reward(self, iou: float, giou: float) -> float:
        return (1 + math.tanh((iou - self.tau) / self.config.soft_scale / 2)) / 2  # the sigmoid, without overflow


class Fixed(Schedule):
    """1[u >= tau], one tau for ever."""

    own = ("fixed_tau",)

    def tau_at(self, step: int) -> float:
        return self.config.fixed_tau


class Raw(Schedule):
    """u itself (VLM-R1 since 2025-03-24)."""

    def box_reward(self, iou: float, giou: float) -> float:
        return iou


class GIoU(Schedule):
    """(GIoU + 1)/2: boxes that miss differ too."""

    def box_reward(self, iou: float, giou: float) -> float:
        return (giou + 1) / 2


class ByShareOfSteps(Schedule):
    """tau depends on step / total_steps, so that a run of another length is another schedule."""

    def settings(self) -> dict:
        return {**super().settings(), "steps": self.total_steps}


class VTriune(ByShareOfSteps):
    """u if u >= eps else 0, NOT binary; eps (here tau) jumps at 10 % and 25 % of the steps."""

    def tau_at(self, step: int) -> float:
        return next(eps for end, eps in VTRIUNE_PHASES if step / self.total_steps < end)

    def box_reward(self, iou: float, giou: float) -> float:
        return iou if hit(iou, self.tau) else 0.0


class Progress(ByShareOfSteps):
    """1[u >= tau], tau rising on a line from tau_start to the preset's end (?), whatever the policy can do."""

    own = ("tau_start",)

    def tau_at(self, step: int) -> float:
        start, end = self.config.tau_start, PROGRESS_ENDS[self.name]
        return round(start + (end - start) * min(step / self.total_steps, 1), 6)


SCHEDULES = {"medloc": MedLoc, "medloc-soft": MedLocSoft, "fixed": Fixed, "raw": Raw, "giou": GIoU, "vtriune": VTriune}
SCHEDULES |= dict.fromkeys(PROGRESS_ENDS, Progress)


def make_schedule(name: str, config: ScheduleConfig, total_steps: int) -> Schedule:
    """The schedule `name` for a run of total_steps optimiser steps. InputError names the flag that makes no sense."""
    _require(name in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", name)
    _require(total_steps >= 1, "steps", "at least 1", total_steps)
    end = PROGRESS_ENDS.get(name, 1)
    _require(config.tau_start <= end, "tau_start", f"<= {end} for --schedule {name}", config.tau_start)
    return SCHEDULES[name](name, config, total_steps)


def _below(value: float, bound: float) -> bool:
    return value < bound - SLACK


def _num(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)  # .450, -.050, 1.000


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise InputError(f"{_flag(name)} must be {rule}, got {value}")
