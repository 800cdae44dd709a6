"""Prompts -> completions: sampling on the shared prefix, scoring, and what the ranks tell each other about it.

    roll, prefix = sample(...)       this rank's share of B prompts x G completions
    mine = score(roll, weights)      each by its sample's task
    everyone = share(mine, stream)   all ranks', in the order of the stream: one collective

A step may take several rounds of these: for pictures that could not be read, and with dynamic sampling (DAPO, arXiv
2503.14476) for groups without spread. Rounds keeps what has come.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

import errors
import ranks
import rewards
import tasks
from errors import InputError
from model import Policy, Prefix, collate
from prompts import Processor, Prompt

FOUND, LEFT = 1.0, -1.0  # of a place: it has been rolled out; its rank was asked to stop


@dataclass
class Rollout:
    """This rank's share of one optimiser step's experience: B prompts, G completions each, T tokens at most. On the
    policy's device where the update needs it, else on the CPU."""

    prompts: list[Prompt]  # B
    ids: Tensor  # (B, G, T)
    lengths: Tensor  # (B, G) tokens up to and including the first EOS
    truncated: Tensor  # (B, G) bool
    texts: list[list[str]]  # B x G
    logp_old: Tensor | None = None  # (B, G, T); None with one inner step, where it equals the policy's own
    logp_ref: Tensor | None = None  # (B, G, T); None with beta = 0
    # what score() adds
    answers: list[list[Any]] = field(default_factory=list)  # B x G, as tasks.Scores.answers
    reasons: list[list[str]] = field(default_factory=list)  # why an answer cannot be read, "" if it can
    u: Tensor | None = None  # (B, G); CPU, as are the next two
    # what the step adds
    reward: Tensor | None = None  # (B, G)
    advantage: Tensor | None = None  # (B, G)

    @classmethod
    def empty(cls, group: int) -> "Rollout":
        """No group: what a rank has whose pictures all broke, or which had no place."""
        counts = torch.zeros(0, group, dtype=torch.long)
        zeros = torch.zeros(0, group)
        return cls([], counts[..., None], counts, counts.bool(), [], u=zeros, reward=zeros, advantage=zeros)

    @property
    def spread(self) -> Tensor:
        """(B,) bool: groups whose answers differ in reward; in the others every advantage is exactly 0."""
        return self.reward.amax(1) > self.reward.amin(1)

    def select(self, rows: Tensor) -> "Rollout":
        """The groups where rows (B,) bool, CPU, is True."""

        def of(value):
            if isinstance(value, list):
                return [item for item, keep in zip(value, rows.tolist(), strict=True) if keep]
            return None if value is None else value[rows.to(value.device)]

        return Rollout(**{f.name: of(getattr(self, f.name)) for f in fields(self)})


def join(rolls: list[Rollout]) -> Rollout:
    """Rollouts of one step one behind the other, padded to one T: nothing behind a completion's length is ever read."""

    def of(values: list):
        first = values[0]
        if isinstance(first, list):
            return [item for value in values for item in value]
        if first is None:
            return None
        widest = max(value.shape[-1] for value in values) if first.ndim == 3 else 0
        return torch.cat([torch.nn.functional.pad(v, (0, widest - v.shape[-1])) if widest else v for v in values])

    return Rollout(**{f.name: of([getattr(roll, f.name) for roll in rolls]) for f in fields(Rollout)})


@dataclass
class GroupScores:
    """The numbers of N groups that every rank knows, in the order of their places. CPU; each tensor is (N, G)."""

    key: Tensor  # index of the group's (dataset, task) in `keys` of the stream
    u: Tensor
    reason: Tensor  # index into tasks.reasons(): 0 is an answer that could be read
    length: Tensor  # tokens
    truncated: Tensor  # bool
    parts: dict[str, Tensor]  # the tasks' further numbers and the rewards of rewards.REWARDS; combine() adds "task"
    found: Tensor  # FOUND, or why not
    keys: list[tuple[str, str]] = field(default_factory=list)  # N, once gathered: (dataset, task) of each group
    mine: list[int] = field(default_factory=list)  # once gathered: which of them are this rank's
    reward: Tensor | None = None  # once combined
    advantage: Tensor | None = None  # at the step's end
    fault: InputError | None = None  # a reward's, on this rank: share() makes it one on all

    def map(self, function: Callable[[Tensor], Tensor]) -> "GroupScores":
        made = {f.name: function(getattr(self, f.name)) for f in fields(self)[:5]}
        return GroupScores(**made, parts={k: function(v) for k, v in self.parts.items()}, found=function(self.found))

    @classmethod
    def empty(cls, group: int, parts: list[str]) -> "GroupScores":
        none = torch.zeros(0, group)
        return cls(none.long(), none, none.long(), none.long(), none.bool(), dict.fromkeys(parts, none), none)

    @property
    def spread(self) -> Tensor:
        """(N,) bool, as Rollout.spread."""
        return self.reward.amax(1) > self.reward.amin(1)

    def by_key(self) -> dict[tuple[str, str], list[list[float]]]:
        """(dataset, task) -> the u of its groups."""
        groups: dict[tuple[str, str], list[list[float]]] = {}
        for key, us in zip(self.keys, self.u.tolist(), strict=True):
            groups.setdefault(key, []).append(us)
        return groups


@torch.no_grad()
def sample(
    policy: Policy | None,
    actor: Policy,
    processor: Processor,
    prompts: list[Prompt],
    uniforms: Tensor,
    grpo: Any,
) -> tuple[Rollout, Prefix | None]:
    """G completions of each prompt by the actor; uniforms (B, G, T) in [0, 1). grpo: its temperature, prompts per pass
    (micro_batch), and with several inner_steps the actor's log-probs are kept.

    policy: given where one pass may be the whole step. Policy and actor have the same weights until it ends: the policy
    makes the prefix, the actor decodes on top of it, and the update goes on from it (it is returned, with its graph)
    instead of computing image and question again.
    """
    if not prompts:
        return Rollout.empty(uniforms.shape[1]), None
    device, rolls, micro_batch = next(actor.parameters()).device, [], grpo.micro_batch
    whole = policy is not None and len(prompts) <= micro_batch
    for i in range(0, len(prompts), micro_batch):
        if errors.asked_to_stop and rolls:  # share() will drop the step
            break
        some = prompts[i : i + micro_batch]
        actor.cache_image_tokens(some)  # a frozen tower looks once a step: reference and inner steps have the same one
        with torch.set_grad_enabled(whole):
            prefix = (policy if whole else actor).prefix(collate(some, device))
        _, group, tokens = uniforms.shape
        done = actor.generate(prefix, group, tokens, grpo.temperature, uniforms[i : i + micro_batch])
        texts = processor.texts(done.ids.flatten(0, 1), done.lengths.flatten())
        tasks.ahead(texts, [prompt for prompt in some for _ in range(group)])  # a judge reads while the others answer
        rolls.append(
            Rollout(
                prompts=some,
                ids=done.ids,
                lengths=done.lengths,
                truncated=done.truncated,
                texts=[texts[j : j + group] for j in range(0, len(texts), group)],
                logp_old=actor.logprobs(prefix, done.ids, done.lengths, grpo.temperature)
                if grpo.inner_steps > 1
                else None,
            )
        )
    return join(rolls), prefix if whole else None


def score(roll: Rollout, weights: dict[str, float], keys: list[tuple[str, str]]) -> GroupScores:
    """What this rank's answers are worth, each by its sample's task; the rollout gets answers, reasons and u. keys: of
    all training samples."""
    b, g = roll.lengths.shape
    prompts = [prompt for prompt in roll.prompts for _ in range(g)]
    texts = [text for group in roll.texts for text in group]
    scores = tasks.by_task(texts, prompts)
    names = tasks.reasons()
    parts = {name: scores.parts.get(name, torch.zeros(b * g)) for name in part_names(keys)}
    try:
        parts |= rewards.other_rewards(weights, texts, scores, [prompt.sample for prompt in prompts])
    except InputError as error:
        others = [name for name in weights if name != rewards.MAIN]
        return replace(GroupScores.empty(g, [*parts, *others]), fault=error)
    roll.u = scores.u.view(b, g)
    roll.answers = [scores.answers[i * g : (i + 1) * g] for i in range(b)]
    roll.reasons = [scores.reasons[i * g : (i + 1) * g] for i in range(b)]
    return GroupScores(
        key=torch.tensor([keys.index(prompt.sample.key) for prompt in prompts], dtype=torch.long).view(b, g),
        u=roll.u,
        reason=torch.tensor([names.index(reason) for reason in scores.reasons], dtype=torch.long).view(b, g),
        length=roll.lengths.cpu(),
        truncated=roll.truncated.cpu(),
        parts={name: part.view(b, g) for name, part in parts.items()},
        found=torch.full((b, g), FOUND),
    )


def part_names(keys: list[tuple[str, str]]) -> list[str]:
    """Those that the tasks in use have, the same on every rank."""
    return sorted({part for _, task in keys for part in tasks.TASKS[task].parts})


def share(mine: GroupScores, stream) -> GroupScores:
    """What every rank has made of the places that the stream has just drawn, in their order. One collective.

    mine: of those of this rank's places that had a picture. A fault of the stream's or of a reward's on one rank ends
    all of them, here. Raises errors.Stopped where any was asked to stop: the step is dropped on all. Pictures that
    could not be read are counted, and said (stream.advance).
    """
    rows, fault = ceil(len(stream.places) / ranks.size), mine.fault or stream.fault
    if errors.asked_to_stop or fault:
        mine = GroupScores.empty(mine.u.shape[1], list(mine.parts))

    def spread_out(values: Tensor) -> Tensor:  # a row for every place: 0 where there is no picture
        full = values.new_zeros(rows, *values.shape[1:])
        if len(values):
            full[stream.good] = values
        return full

    mine = mine.map(spread_out)
    if errors.asked_to_stop:
        mine.found[:] = LEFT
    table = ranks.gather_fields(mine)
    if (table.found == LEFT).any():
        raise errors.Stopped
    # Rank after rank, beginning with the one that the first place belongs to; then row after row: as the places are.
    start, count = stream.places.start % ranks.size, len(stream.places)
    everyone = table.map(lambda values: values.roll(-start, 0).transpose(0, 1).flatten(0, 1)[:count])
    rolled = everyone.found[:, 0] == FOUND

    def report() -> list:
        if fault:
            raise fault
        return stream.failures

    try:
        reports = [] if rolled.all() else ranks.gather_objects(report)
        stream.advance(count, [failure for part in reports for failure in part])
    except ranks.Lost:
        raise
    except InputError as error:
        raise ranks.Together(str(error)) from error
    places = [place for place, there in zip(stream.places, rolled.tolist(), strict=True) if there]
    everyone = everyone.map(lambda values: values[rolled])
    everyone.keys = [stream.keys[i] for i in everyone.key[:, 0].tolist()]
    everyone.mine = [i for i, place in enumerate(places) if place % ranks.size == ranks.rank]
    try:
        check_judged(everyone)
    except InputError as error:
        raise ranks.Together(str(error)) from error
    return everyone


def check_judged(everyone: GroupScores) -> None:
    """InputError where too many of a round's answers have no verdict of the judge."""
    judge = tasks.CaptionTask.judge
    if judge and "unjudged" in everyone.parts:
        own = torch.tensor([task in tasks.judged() for _, task in everyone.keys], dtype=torch.bool)
        asked = (everyone.reason[own] == 0).sum()
        judge.check(int(everyone.parts["unjudged"][own].sum()), int(asked))


class Rounds:
    """The rounds of one step: how many groups are still wanted, and what has come.

    With dynamic sampling, groups without spread are replaced by fresh prompts, in K rounds at most, and what has no
    spread then is dropped from the update. The schedules have to see all: without the groups that hit throughout, a hit
    rate of .8 may never come.
    """

    def __init__(self, batch_size: int, dynamic_sampling: int):
        self.batch_size, self.dynamic_sampling = batch_size, dynamic_sampling
        self.rolls: list[Rollout] = []
        self.scores: list[GroupScores] = []
        self.prefixes: list[Prefix | None] = []
        self.round, self.missing = 0, batch_size

    def add(self, roll: Rollout, prefix: Prefix | None, everyone: GroupScores, reward: Tensor) -> None:
        """reward (N, G), of everyone's groups."""
        everyone.reward, roll.reward = reward, reward[everyone.mine]
        self.rolls.append(roll)
        self.scores.append(everyone)
        self.prefixes.append(prefix)
        self.missing -= len(reward)
        if not self.missing and self.round < self.dynamic_sampling:
            self.round += 1
            self.missing = self.batch_size - int(sum(scores.spread.sum() for scores in self.scores))

    def useful(self, roll: Rollout) -> Rollout:
        """What of it the update learns from."""
        return roll.select(roll.spread) if self.dynamic_sampling else roll

    def joined(self) -> tuple[GroupScores, Rollout, Prefix | None]:
        """All ranks' scores; this rank's rollout; the prefix, where it is of all of it."""
        rolls = [roll for roll in self.rolls if roll.prompts] or self.rolls[:1]
        prefix = self.prefixes[0] if len(self.rolls) == 1 else None
        first, *others = self.scores
        begins = [sum(len(scores.u) for scores in self.scores[:i]) for i in range(len(self.scores))]
        everyone = GroupScores(
            **{f.name: torch.cat([getattr(s, f.name) for s in self.scores]) for f in fields(first)[:5]},
            parts={name: torch.cat([s.parts[name] for s in self.scores]) for name in first.parts},
            found=torch.cat([s.found for s in self.scores]),
            keys=[key for s in self.scores for key in s.keys],
            mine=[begin + i for begin, s in zip(begins, self.scores, strict=True) for i in s.mine],
            reward=torch.cat([s.reward for s in self.scores]),
        )
        return everyone, join(rolls), prefix
