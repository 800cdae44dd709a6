"""Scores -> rewards -> advantage: what each answer earns, and how much better than its group it is.

    reward = combine(scores, schedules, weights)     "task": the schedule's shape of u under its present tau; others
    advantage = group_advantage(reward, "std")       (r - mean) / (std + kernels.EPS); exactly 0 without spread

A reward of your own is a row in REWARDS, and a name in --rewards. Left out: learned reward models, and what an answer
is worth, which its task says (tasks/).
"""

import re
from collections.abc import Callable
from functools import partial
from math import isfinite

import torch
from torch import Tensor

import kernels
import tasks
from errors import InputError
from norms import Key, Norms
from scheduler import SCHEDULES, Decision, Schedule
from settings import Settings, read
from tasks import TASKS, Scores
from text import sentence_bleu, thought, tokens

MAIN = "task"  # in --rewards: the schedule's reward for u


def format_reward(text: str, valid: bool) -> float:
    """1.0 if the whole text is <think>...</think> <answer>...</answer>, each tag once, with a valid answer, else 0.0.

    White space is free around the two blocks and between them.
    """
    parts = re.split(r"(</?(?:think|answer)>)", text)
    if parts[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    before, _thought, between, _answer, after = parts[::2]
    return float(valid and not (before + between + after).strip())


def recite(texts: list[str], scores: Scores, samples: list, n: int = 4, of: str = "knowledge") -> Tensor:
    """BLEU-n of each answer's thought against the sample's knowledge, or its query: VRFT-Aug's recitation reward (arXiv
    2602.10619), whose sign is the weight's. 0 where there is no thought or nothing to recite."""
    known: dict[str, list[str]] = {}
    values = []
    for text, sample in zip(texts, samples, strict=True):
        reference = getattr(sample, of)
        if reference not in known:
            known[reference] = tokens(reference.removeprefix("Knowledge:"))
        values.append(sentence_bleu(tokens(thought(text)), known[reference], n))
    return torch.tensor(values)


# Rewards beside the schedule's: name -> f(texts, scores, samples) -> (N,) tensor, any range. N answers, their
# tasks.Scores and the data.Sample that each answers; a sample's `task`, `dataset` and `extra` can choose what is
# rewarded. Under a negative weight it is a penalty, which an answer that cannot be read does not evade: combine().
REWARDS: dict[str, Callable[[list[str], Scores, list], Tensor]] = {
    "format": lambda texts, scores, samples: torch.tensor(
        [format_reward(text, valid) for text, valid in zip(texts, scores.valid.tolist(), strict=True)]
    ),
    "recite": recite,
    **{f"recite-{n}": partial(recite, n=n) for n in (1, 2, 3)},
    "recite-prompt": partial(recite, of="query"),
    # Words of the thought; thought=0 logs what recitation does to it.
    "thought": lambda texts, scores, samples: torch.tensor([float(len(tokens(thought(text)))) for text in texts]),
}


def read_weights(text: str) -> dict[str, float]:
    """ "task=1,format=0.5" -> name -> weight. InputError for what is not a known reward and a finite number."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name == "box":
            raise InputError(f"'box' is called {MAIN!r} now, since every task has it: {MAIN}={number or 1}")
        if name not in (known := (MAIN, *REWARDS, *sorted(tasks.terms()))):
            raise InputError(f"no reward is called {name!r}; there are {', '.join(known)}")
        if name in weights:
            raise InputError(f"{name!r} is named twice")
        try:
            weights[name] = float(number)
        except ValueError:
            raise InputError(f"{part!r} must be NAME=WEIGHT, such as {MAIN}=1") from None
        if not isfinite(weights[name]):
            raise InputError(f"{part!r} must have a finite weight")
    if not any(weights.values()):
        raise InputError(f"{text!r} gives every reward the weight 0; one must count")
    return weights


def paid_by(task: str, weights: dict[str, float]) -> list[str]:
    """What of --rewards an answer of the task earns: where it names terms that the task's u is made of, these in place
    of the schedule's reward for u."""
    own = [name for name in weights if name in TASKS[task].terms]
    return [name for name in weights if name in own or name in REWARDS or (name == MAIN and not own)]


def places(keys: list[Key], weights: dict[str, float]) -> list[tuple[Key, str]]:
    """Every (dataset, task) with each reward that it is paid by. InputError for a reward that none is paid by, or a
    task that nothing pays."""
    found = [(key, name) for key in keys for name in paid_by(key[1], weights)]
    shown = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
    if idle := [name for name in weights if name not in {name for _, name in found}]:
        raise InputError(f"--rewards {shown}: {idle[0]} pays no record's task; drop it")
    for key in keys:
        if not any(weights[name] for other, name in found if other == key):
            terms = f" or {', '.join(TASKS[key[1]].terms)}" if TASKS[key[1]].terms else ""
            raise InputError(f"--rewards {shown} pays nothing for the task {key[1]!r}; weigh {MAIN}{terms}")
    return found


def other_rewards(weights: dict[str, float], texts: list[str], scores: Scores, samples: list) -> dict[str, Tensor]:
    """name -> (N,) fp32 of the rewards that REWARDS makes, unweighted. InputError where one of them does not give a
    finite number to each answer."""
    parts = {}
    for name in (name for name in weights if name in REWARDS):
        part = torch.as_tensor(REWARDS[name](texts, scores, samples), dtype=torch.float32).cpu()
        if part.shape != (len(texts),) or not part.isfinite().all():
            raise InputError(
                f"reward {name!r} must give {len(texts)} finite numbers, one an answer; "
                f"it gave {tuple(part.shape)}, {int((~part.isfinite()).sum())} of them not finite"
            )
        parts[name] = part
    return parts


def read_schedule(text: str) -> tuple[str, Settings]:
    """ "medloc:window=60" -> (name, settings). InputError names what there is."""
    if old := re.match(r"progress-(conservative|moderate|aggressive)", text):
        end = {"conservative": 0.6, "moderate": 0.7, "aggressive": 0.8}[old[1]]
        raise InputError(f"--schedule: {old[0]} is progress:end={end} now")
    return read(text, "--schedule", {name: kind.Settings for name, kind in SCHEDULES.items()})


def split_schedules(texts: list[str]) -> tuple[str, dict[str, str]]:
    """--schedule medloc label=raw -> (what holds for all tasks, task -> what holds for it)."""
    by_task, general = {}, []
    for text in texts:
        task, sign, spec = text.partition("=")
        if sign and ":" not in task:
            if task in by_task:
                raise InputError(f"--schedule: the task {task!r} is named twice")
            by_task[task] = spec
        else:
            general.append(text)
    if len(general) > 1:
        raise InputError(f"--schedule: {general[0]} and {general[1]}; one is for all tasks, others are TASK=SCHEDULE")
    return (general or ["medloc"])[0], by_task


class Schedules:
    """What makes rewards of what answers are worth: one Schedule, window and tau, for every (dataset, task), and with
    --normalise the norms that bring these to one scale."""

    def __init__(self, texts: list[str], keys: list[tuple[str, str]], total_steps: int, norms: Norms | None = None):
        self.norms = norms
        general, by_task = split_schedules(texts)
        if unknown := by_task.keys() - {task for _, task in keys}:
            raise InputError(f"--schedule {min(unknown)}=...: no record has the task {min(unknown)!r}")
        self.of: dict[tuple[str, str], Schedule] = {}
        for key in keys:
            name, settings = read_schedule(by_task.get(key[1], general))
            if (part := SCHEDULES[name].part) and part not in TASKS[key[1]].parts:
                raise InputError(f"--schedule {name} goes by {part}, which answers of the task {key[1]!r} do not have")
            self.of[key] = Schedule(name, settings, total_steps)

    def observe(self, scores) -> dict[tuple[str, str], Decision]:
        """A step's rollout.GroupScores, once combined; a schedule of which there is none sees that too."""
        if self.norms:
            valid = scores.reason == 0
            self.norms.observe(scores.keys, {name: part.where(valid, 0.0) for name, part in scores.parts.items()})
        groups = scores.by_key()
        return {key: schedule.observe(groups.get(key, [])) for key, schedule in self.of.items()}

    def state_dict(self) -> list[dict]:
        return [{"dataset": key[0], "task": key[1]} | schedule.state_dict() for key, schedule in self.of.items()]

    def load_state_dict(self, states: list[dict]) -> None:
        """runtime/checkpoint.py has seen to it that there is one for each key."""
        for state in states:
            self.of[state["dataset"], state["task"]].load_state_dict(state)


def combine(scores, schedules: Schedules, weights: dict[str, float], how: str = "sum") -> Tensor:
    """rollout.GroupScores of N groups -> (N, G) rewards: the schedule's, under the present tau of each group's
    (dataset, task), and the others, each normalised if there are norms, weighted and added, as far as they are paid for
    its task (paid_by). scores.parts gets the schedule's.

    Under a negative weight an answer that cannot be read counts 1, the most that a reward from 0 to 1 can be, or what
    the most in its group is: no penalty is evaded by breaking the form.
    how: "sum", as VLM-R1; "gdpo" takes each reward's advantage over its group before it is weighted, so that the one
    that spreads most does not rule (GDPO, arXiv 2601.05242; as there with --advantage batch).
    """
    names = list(scores.parts)
    rows = zip(*(part.flatten(1).tolist() for part in scores.parts.values()), strict=True) if names else None
    valid = scores.reason == 0
    main = []
    for n, (key, us) in enumerate(zip(scores.keys, scores.u.tolist(), strict=True)):
        parts = next(rows) if rows else []
        of_answers = [dict(zip(names, values, strict=True)) for values in zip(*parts, strict=True)] or [{}] * len(us)
        schedule = schedules.of[key]
        main.append([schedule.reward(*answer) for answer in zip(us, valid[n].tolist(), of_answers, strict=True)])
    scores.parts[MAIN] = torch.tensor(main).view(scores.u.shape)
    terms = {name: scores.parts[name] for name in weights}
    paid = {key: paid_by(key[1], weights) for key in set(scores.keys)}
    if schedules.norms:
        terms = {name: schedules.norms.apply(name, term, valid, scores.keys) for name, term in terms.items()}
    for name, weight in weights.items():
        if weight < 0:
            terms[name] = terms[name].where(valid, terms[name].amax(1, keepdim=True).clamp(min=1.0))
    for name in terms:
        own = torch.tensor([name in paid[key] for key in scores.keys], dtype=torch.bool)
        terms[name] = terms[name].where(own[:, None], 0.0)
    if how == "gdpo":
        terms = {name: kernels.group_advantage(term, "std") for name, term in terms.items()}
    return sum(weight * terms[name] for name, weight in weights.items())


def group_advantage(reward: Tensor, scale: str) -> Tensor:
    """reward (N, G), of all ranks -> (N, G), the group's mean taken off and divided by: "std", the group's (GRPO);
    "batch", that of all N x G rewards (as TRL's scale_rewards="batch"); "none", nothing (Dr. GRPO). Exactly 0 in a
    group without spread."""
    if scale != "batch":
        return kernels.group_advantage(reward, scale)
    spread = reward.std() if reward.numel() > 1 else torch.zeros(())
    return kernels.group_advantage(reward, "none") / (spread + kernels.EPS)
