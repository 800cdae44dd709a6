"""GRPO for visual grounding with a reward curriculum: the loop, top to bottom.

    torchrun train_grpo.py --schedule=medloc                          the nano policy on phantoms: minutes on a laptop
    python train_grpo.py --model FOLDER --data train.jsonl --val val.jsonl --out out-run

A step: draw B prompts -> roll out G answers each -> score boxes against the truth -> the schedule turns IoU into
reward and may tighten its threshold for the NEXT step -> advantage over the group -> clipped loss -> AdamW. Two verbs,
rollout() and update(), and one dataclass between them. GRPO: arXiv 2402.03300; the schedule: MedLoc-R1, 2603.28120;
dynamic sampling: DAPO, 2503.14476. Every flag, its default and the reason for it: config.py.

Randomness follows from (seed, step, sample), never from wall clock or state: a resumed run goes on as if never stopped.
Left out here: learned reward models, a critic, top-p sampling (the sampled policy must be the trained one).
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import copy
import itertools
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import hub
import kernels
import lock
import lora
import plan
import ranks
import rewards
import stop
from config import describe, parse_arguments, restarted, same_threads
from data import BadRecords, Prompt, Sample, Sampler, View, held_out_phantoms, load_samples
from diagnose import Watch
from errors import InputError
from eval import NANO, Task, default_prompt, evaluate, model_folder, overlay, sheet, summary
from logs import open_log
from loss import BatchTotals, completion_mask, grpo_loss, mask_overlong
from model import Policy, Prefix, collate
from pipeline import Readers
from scheduler import WATCHING, ByShareOfSteps, Schedule, ScheduleConfig, hit, make_schedule
from weights import load_policy, read_json

STATE = ("schedule", "bad_in_a_row", "drawn", "bad", "evaluation")  # what a resumed run needs beside the weights
LINES = "metrics.jsonl", "samples.jsonl"
LEFT = -1.0  # in the table of a step that is to be dropped
PATIENCE = 5  # steps with a non-finite loss or gradient in a row before the run stops
MEMORY = (
    "lower --micro-batch, then --max-pixels, --max-tokens or --group-size; --checkpointing trades time for memory, "
    "--lora-rank 64 needs no optimiser state or reference copy of all weights, --beta 0 no reference at all; "
    "--estimate says what would fit"
)


@dataclass
class Rollout:
    """This rank's share of one optimiser step's experience: B prompts, G completions each, T tokens at most. On the
    policy's device where the update needs it, else on the CPU."""

    prompts: list[Prompt]  # B
    ids: Tensor  # (B, G, T)
    lengths: Tensor  # (B, G) tokens up to and including the first EOS
    truncated: Tensor  # (B, G) bool
    texts: list[list[str]]  # B x G
    boxes: Tensor  # (B, G, 4) original pixels, NaN without a box; CPU
    iou: Tensor  # (B, G) CPU
    valid: Tensor  # (B, G) bool, CPU
    reasons: list[list[str]]  # why an answer has no box, "" if it has
    parts: dict[str, Tensor]  # reward's name -> (B, G), unweighted; CPU
    reward: Tensor  # (B, G) their weighted sum; CPU
    advantage: Tensor  # (B, G)
    logp_old: Tensor | None  # (B, G, T); None with one inner step, where it equals the policy's own
    logp_ref: Tensor | None  # (B, G, T); None with beta = 0
    prefix: Prefix | None = None  # of all prompts, with gradient, for the update to go on from; None: it makes its own

    @classmethod
    def empty(cls, group: int) -> "Rollout":
        """No group: what a rank has whose pictures all broke, or which had no place."""
        zeros = torch.zeros(0, group)
        counts, flags, boxes = zeros.long(), zeros.bool(), torch.zeros(0, group, 4)
        return cls(
            [],
            counts[..., None],
            counts,
            flags,
            [],
            boxes,
            zeros,
            flags,
            [],
            {},
            zeros,
            zeros,
            logp_old=None,
            logp_ref=None,
        )

    @property
    def spread(self) -> Tensor:
        """(B,) bool: groups whose answers differ in reward; in the others every advantage is exactly 0."""
        return self.reward.amax(1) > self.reward.amin(1)

    def select(self, rows: Tensor) -> "Rollout":
        """The groups where rows (B,) bool, CPU, is True."""

        def of(value):
            if isinstance(value, dict):
                return {name: of(part) for name, part in value.items()}
            if isinstance(value, list):
                return [item for item, keep in zip(value, rows.tolist(), strict=True) if keep]
            return None if value is None else value[rows.to(value.device)]

        return Rollout(**{f.name: of(getattr(self, f.name)) for f in fields(self)})


def join(rolls: list[Rollout]) -> Rollout:
    """Rollouts of one step one behind the other, padded to one T: nothing behind a completion's length is ever read."""

    def of(values: list):
        first = values[0]
        if isinstance(first, dict):
            return {name: of([value[name] for value in values]) for name in first}
        if isinstance(first, list):
            return [item for value in values for item in value]
        if first is None or isinstance(first, Prefix):  # kept only where this was a single forward pass
            return first if len(values) == 1 else None
        widest = max(value.shape[-1] for value in values) if first.ndim == 3 else 0
        return torch.cat([torch.nn.functional.pad(v, (0, widest - v.shape[-1])) if widest else v for v in values])

    return Rollout(**{f.name: of([getattr(roll, f.name) for roll in rolls]) for f in fields(Rollout)})


class Stream:
    """The endless stream of training prompts, of which place p belongs to rank p % size. Its only state is `drawn`: how
    many places of it are used up, on all ranks; what was read ahead is read again by a resumed run. Without readers
    each picture is read when its turn comes."""

    def __init__(self, samples: list[Sample], task: Task, bad: BadRecords, args, drawn: int = 0, readers=None):
        self.samples, self.task, self.bad, self.args, self.drawn = samples, task, bad, args, drawn
        self.sampler = Sampler(len(samples), args.batch_size, args.seed)
        self.readers: Readers = readers or Readers(0)
        self.views = self._read()
        self.failed = 0  # places in a row without a picture
        self.seconds = 0.0  # that draw() has taken: what the step waits for

    def mine(self, places: range) -> range:
        """Those of the places that belong to this rank."""
        return range(places.start + (ranks.rank - places.start) % ranks.size, places.stop, ranks.size)

    def _read(self) -> Iterator[tuple[int, View | InputError]]:
        """(index of the sample, view of its picture) at this rank's places, from the first draw's on."""
        first = self.mine(range(self.drawn, sys.maxsize)).start
        indices = (self.sampler.take(place, 1)[0] for place in itertools.count(first, ranks.size))
        ahead = math.ceil(self.args.batch_size / ranks.size)
        yield from self.readers.read(indices, self.samples, self.task.image_config, ahead=ahead)

    def draw(self, step: int, first: int, places: range) -> tuple[list[Prompt], Tensor, list[tuple[int, str, str]]]:
        """What stands at this rank's next places -> prompts, their luck, and of each place without a picture
        (place, source, sentence). The step began at place `first`."""
        started = time.perf_counter()
        prompts, slots, indices, failures = [], [], [], []
        for place in places:
            index, view = next(self.views)
            try:
                prompts.append(self.task.prompt(self.samples[index], view))
                slots.append(place - first)
                indices.append(index)
            except InputError as error:
                failures.append((place, self.samples[index].source, str(error)))
        luck = uniforms(self.args.seed, step, slots, indices, self.args.group_size, self.args.max_tokens)
        self.seconds += time.perf_counter() - started
        return prompts, luck, failures

    def advance(self, count: int, failures: list[tuple[int, str, str]]) -> None:
        """All ranks are through with the next `count` places, with these failures in all."""
        self.drawn += count
        self.failed = self.failed + count if len(failures) == count else 0
        for _, source, sentence in sorted(failures):
            self.bad.add(source, InputError(sentence))
            if self.failed > len(self.samples):
                raise InputError(f"no picture of --data can be read any more; the last one: {sentence}")
            ranks.say(f"left out: {sentence}")


def uniforms(seed: int, step: int, slots: list[int], indices: list[int], group: int, tokens: int) -> Tensor:
    """(B, G, T) in [0, 1): the luck of each completion token, from (seed, step, place in the batch, sample) alone."""
    luck = np.empty((len(slots), group, tokens), np.float32)
    for row, slot, index in zip(luck, slots, indices, strict=True):
        key = np.random.SeedSequence([seed, step, slot, index])
        np.random.Generator(np.random.PCG64(key)).random(dtype=np.float32, out=row)
    return torch.from_numpy(luck)


@torch.no_grad()
def roll_groups(
    policy: Policy,
    actor: Policy,
    task: Task,
    prompts: list[Prompt],
    noise: Tensor,
    schedule: Schedule,
    args,
    whole: bool,
) -> Rollout:
    """One forward pass's worth of prompts: G answers to each, scored under the schedule's present threshold.

    Where one pass is the whole step, policy and actor have the same weights until it ends: the policy makes the prefix,
    the actor decodes on top of it, and the update goes on from it instead of computing image and question again.
    """
    device = next(actor.parameters()).device
    actor.see(prompts)  # a frozen tower looks once a step: reference and inner steps have the same one
    with torch.set_grad_enabled(whole):
        prefix = (policy if whole else actor).prefix(collate(prompts, device))
    done = actor.generate(prefix, args.group_size, args.max_tokens, args.temperature, noise)
    b, g = done.lengths.shape
    texts = task.texts(done.ids.flatten(0, 1), done.lengths.flatten())
    targets = torch.tensor([p.box for p in prompts]).repeat_interleave(g, 0)
    scores = rewards.score(texts, targets, torch.tensor([p.scale for p in prompts]).repeat_interleave(g, 0))
    weights = rewards.read_weights(args.rewards)
    samples = [p.sample for p in prompts for _ in range(g)]
    parts = rewards.parts_of_reward(weights, texts, scores, samples, schedule)
    reward = rewards.combine(parts, weights).view(b, g)
    return Rollout(
        prompts=prompts,
        ids=done.ids,
        lengths=done.lengths,
        truncated=done.truncated,
        texts=[texts[i * g : (i + 1) * g] for i in range(b)],
        boxes=scores.boxes.view(b, g, 4),
        iou=scores.iou.view(b, g),
        valid=scores.valid.view(b, g),
        reasons=[scores.reasons[i * g : (i + 1) * g] for i in range(b)],
        parts={name: part.view(b, g) for name, part in parts.items()},
        reward=reward,
        advantage=kernels.group_advantage(reward, "none" if args.loss == "dr-grpo" else "std").to(device),
        logp_old=actor.logprobs(prefix, done.ids, done.lengths, args.temperature) if args.inner_steps > 1 else None,
        logp_ref=None,
        prefix=prefix if whole else None,
    )


class Tally:
    """What every rank knows of a step: the numbers of all groups on all ranks, in the order of their places. CPU."""

    def __init__(self, table: Tensor, names: list[str]):
        """table (N, G, 5 + rewards) float64, as columns() makes it."""
        iou, reason, length, truncated, reward, *parts = table.unbind(-1)  # each (N, G)
        self.iou, self.reward = iou.float(), reward.float()
        self.lengths, self.truncated = length.long(), truncated.bool()
        self.reasons = reason.long()  # indices into rewards.REASONS; 0 is a box
        self.parts = {name: part.float() for name, part in zip(names, parts, strict=True)}

    @staticmethod
    def columns(roll: Rollout) -> Tensor:
        numbers = list(rewards.REASONS)
        reasons = torch.tensor([[numbers.index(reason) for reason in group] for group in roll.reasons])
        columns = roll.iou, reasons, roll.lengths.cpu(), roll.truncated.cpu(), roll.reward, *roll.parts.values()
        return torch.stack([column.double() for column in columns], dim=-1)

    @property
    def spread(self) -> Tensor:
        """(N,) bool, as Rollout.spread."""
        return self.reward.amax(1) > self.reward.amin(1)


def roll_places(
    policy: Policy, actor: Policy, task: Task, stream: Stream, step: int, first: int, count: int, schedule, args
) -> tuple[list[Rollout], Tensor]:
    """The next `count` places of the stream, in a step that began at place `first`. Each rank rolls out its own, then
    one collective tells all ranks about all -> (this rank's rollouts, Tally's table of the places that had a picture).
    """
    places = range(stream.drawn, stream.drawn + count)
    mine, names = stream.mine(places), list(rewards.read_weights(args.rewards))
    single = places.start == first and len(mine) <= args.micro_batch
    whole = single and args.inner_steps == 1 and not args.dynamic_sampling and not args.shard
    # Of one size on all ranks; in front of a place's numbers stands 1 once it is rolled out, LEFT on a rank that left.
    table = torch.zeros(math.ceil(count / ranks.size), args.group_size, 6 + len(names), dtype=torch.float64)
    rolls, failures, fault = [], [], None
    try:
        for i in range(0, len(mine), args.micro_batch):
            if stop.asked:
                break
            prompts, luck, failed = stream.draw(step, first, mine[i : i + args.micro_batch])
            failures += failed
            if prompts:
                rolls.append(roll_groups(policy, actor, task, prompts, luck, schedule, args, whole))
        broken = {place for place, *_ in failures}
        good = [i for i, place in enumerate(mine) if place not in broken]
        if good and not stop.asked:
            table[good, :, 0], table[good, :, 1:] = 1.0, torch.cat([Tally.columns(roll) for roll in rolls])
    except InputError as error:  # it must end all ranks, and all of them here
        fault = error
    if stop.asked:
        table[:, 0, 0] = LEFT

    def report() -> list[tuple[int, str, str]]:
        if fault:
            raise fault
        return failures

    # Rank after rank, beginning with the one that the first place belongs to; then row after row: as the places are.
    table = ranks.gather(table)
    if (table[:, 0, 0, 0] == LEFT).any():
        raise stop.Stopped
    table = table.roll(-(places.start % ranks.size), 0).transpose(0, 1).flatten(0, 1)[:count]
    rolled = table[:, 0, 0] == 1
    if not rolled.all():
        failures = [failure for part in ranks.everyone(report) for failure in part]
    stream.advance(count, failures)
    return rolls, table[rolled, :, 1:]


def rollout(
    policy: Policy,
    actor: Policy,
    reference: Policy | None,
    task: Task,
    stream: Stream,
    step: int,
    schedule: Schedule,
    args,
) -> tuple[Tally, Rollout, Rollout]:
    """Sample G answers to each of B prompts -> (the numbers of all of it; of this rank's share what was rolled out, and
    what the update is to learn from).

    The two differ with dynamic sampling: groups without spread are replaced by fresh prompts, in K rounds at most, and
    what has no spread then is dropped. The schedule has to see all: without the groups that hit throughout, a hit rate
    of .8 may never come. A picture that cannot be decoded makes room for the next, as long as --skip-bad allows.
    """
    rolls, tables, first, useful = [], [], stream.drawn, 0
    with ranks.unsharded(actor):
        for _ in range(1 + args.dynamic_sampling):
            missing = args.batch_size - useful
            while missing:
                mine, table = roll_places(policy, actor, task, stream, step, first, missing, schedule, args)
                rolls += mine
                tables.append(table)
                missing -= len(table)
            tally = Tally(torch.cat(tables), list(rewards.read_weights(args.rewards)))
            useful = int(tally.spread.sum())
            if useful == args.batch_size:
                break
    seen = join(rolls) if rolls else Rollout.empty(args.group_size)
    used = seen.select(seen.spread) if args.dynamic_sampling else seen
    if reference is not None:
        with ranks.unsharded(reference):
            used.logp_ref = reference_logprobs(reference, used, args) if used.prompts else None
    return tally, seen, used


@torch.no_grad()
def reference_logprobs(reference: Policy, roll: Rollout, args) -> Tensor:
    """(B, G, T) under the starting policy: a frozen copy, or with adapters the policy itself without them."""
    logps, device = [], next(reference.parameters()).device
    with lora.disabled(reference):
        for i in range(0, len(roll.prompts), args.micro_batch):
            if stop.asked and logps:  # update() will drop the step
                break
            rows = slice(i, i + args.micro_batch)
            prefix = reference.prefix(collate(roll.prompts[rows], device))
            logps.append(reference.logprobs(prefix, roll.ids[rows], roll.lengths[rows], args.temperature))
    return torch.cat(logps)


def update(policy: Policy, optimizer: torch.optim.Optimizer, roll: Rollout, args) -> dict:
    """Inner steps of GRPO on one rollout, all ranks' shares of it -> metrics. A step whose loss or gradient is not
    finite changes nothing, on any rank; nor does one that stop.Stopped ends, before the first inner step is taken."""
    mask = completion_mask(roll.lengths, roll.ids.shape[2])  # (B, G, T)
    kept = mask_overlong(mask, roll.truncated) if args.overlong == "mask" else mask
    passes = math.ceil(len(roll.prompts) / args.micro_batch)
    own = roll.lengths.numel(), mask.sum(), kept.sum(), passes
    counts = ranks.gather(torch.tensor([int(n) for n in own]))
    sequences, tokens, masked, _ = counts.sum(0).tolist()
    if not sequences:  # dynamic sampling found no group with spread
        return dict.fromkeys(("loss", "grad_norm", "kl", "clip_low", "clip_high", "entropy")) | {"skipped": 0}
    totals = BatchTotals(sequences, masked, args.max_tokens)
    if args.shard:  # all ranks make as many passes as the one that has most to do
        passes = int(counts.amax(0)[3])
    trained = [p for p in policy.parameters() if p.requires_grad]
    prefix, roll.prefix = roll.prefix, None  # its graph serves one backward pass
    rows, norms, skipped = [], [], 0
    for inner in range(args.inner_steps):
        optimizer.zero_grad(set_to_none=True)
        sums = backward(policy, roll, prefix, kept, totals, passes, args, may_leave=inner == 0)
        *sums, left = ranks.total([*sums, float(stop.asked)])
        if left and inner == 0:  # later on the weights are not those of the step's beginning any more
            raise stop.Stopped
        rows.append(sums)
        ranks.sum_gradients(trained)
        norms.append(float(ranks.whole(torch.nn.utils.clip_grad_norm_(trained, args.grad_clip))))
        if math.isfinite(rows[-1][0]) and math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    n = max(masked, 1) * args.inner_steps  # masked is 0 where every completion was masked out
    loss, kl, clip_low, clip_high, _ = (sum(column) for column in zip(*rows, strict=True))
    return {
        "loss": loss / len(rows),
        "grad_norm": sum(norms) / len(norms),
        "kl": kl / n if args.beta > 0 else None,
        "clip_low": clip_low / n,
        "clip_high": clip_high / n,
        "entropy": rows[0][-1] / tokens,
        "skipped": skipped,
    }


def backward(
    policy: Policy,
    roll: Rollout,
    prefix: Prefix | None,
    mask: Tensor,
    totals: BatchTotals,
    passes: int,
    args,
    may_leave: bool,
) -> list[float]:
    """Add the gradients of this rank's share of the loss, micro-batch by micro-batch -> its sums of loss, KL, clipped
    tokens (low, high) and entropy. mask (B, G, T): the tokens that count; prefix: of all prompts, if it is there.

    Sharded, a pass is one of all ranks: who has no more to do makes an idle one, and none leaves without the others.
    """
    device = next(policy.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for i in range(0, passes * args.micro_batch, args.micro_batch):
        if may_leave and (any(ranks.total([stop.asked])) if args.shard else stop.asked):
            break
        if i >= len(roll.prompts):
            policy.idle().backward()
            continue
        rows = slice(i, i + args.micro_batch)
        logp, entropy = policy.logprobs(
            prefix or policy.prefix(collate(roll.prompts[rows], device)),
            roll.ids[rows],
            roll.lengths[rows],
            args.temperature,
            entropy=True,
        )
        loss, stats = grpo_loss(
            logp,
            logp.detach() if roll.logp_old is None else roll.logp_old[rows],
            None if roll.logp_ref is None else roll.logp_ref[rows],
            roll.advantage[rows],
            mask[rows],
            totals,
            kind=args.loss,
            clip_low=args.clip_low,
            clip_high=args.clip_high,
            beta=args.beta,
            kl=args.kl,
        )
        loss.backward()
        parts = loss.detach(), stats.kl, stats.clip_low, stats.clip_high, entropy.sum()
        sums += torch.stack([part.double() for part in parts])
    return sums.tolist()


def rollout_metrics(tally: Tally, tau: float | None, args) -> dict:
    """Of all that was rolled out, on all ranks. A group without spread has no hit (too hard), or hits only (too easy);
    `dropped` groups did not get into the update."""
    quartiles = tally.iou.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    parts = {f"reward_{name}": part.mean().item() for name, part in tally.parts.items()}
    return parts | {
        "iou_mean": tally.iou.mean().item(),
        "iou_q25": quartiles[0],
        "iou_q50": quartiles[1],
        "iou_q75": quartiles[2],
        "reward_mean": tally.reward.mean().item(),
        "zero_spread": 1 - tally.spread.float().mean().item(),
        "no_hit": None if tau is None else fmean(not hit(best, tau) for best in tally.iou.amax(1).tolist()),
        "parse_failures": 1 - (tally.reasons == 0).float().mean().item(),
        "truncated": tally.truncated.float().mean().item(),
        "tokens": int(tally.lengths.sum()),
        "groups": len(tally.iou),
        "dropped": int((~tally.spread).sum()) if args.dynamic_sampling else 0,
    }


def peak_megabytes(device: str) -> float:
    """Of GPU memory on CUDA, else of the process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, kilobytes on Linux


def resident_megabytes() -> float | None:
    """What the process holds of the host's memory now; known on Linux. Where it grows from step to step, it leaks."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return None
    return pages * resource.getpagesize() / 2**20


def write_samples(out: Path, step: int, roll: Rollout, tau: float | None) -> None:
    """One group in full to samples.jsonl, four groups as a picture overlay-<step>.png."""
    prompt = roll.prompts[0]
    boxes = [[None if math.isnan(b[0]) else [round(v, 2) for v in b] for b in group] for group in roll.boxes.tolist()]
    record = {
        "step": step,
        "source": prompt.sample.source,
        "prompt": prompt.text,
        "target": list(prompt.box),
        "tau": tau,
        "texts": roll.texts[0],
        "boxes": boxes[0],
        "ious": [round(u, 4) for u in roll.iou[0].tolist()],
        "rewards": [round(r, 4) for r in roll.reward[0].tolist()],
        "advantages": [round(a, 4) for a in roll.advantage[0].tolist()],
        "reasons": roll.reasons[0],
    }
    with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)
    threshold = "" if tau is None else f", tau {tau:.2f}"
    tiles = []
    for prompt, group, ious in list(zip(roll.prompts, boxes, roll.iou.tolist(), strict=True))[:4]:
        caption = f"step {step}: IoU {sum(ious) / len(ious):.2f} (best {max(ious):.2f}){threshold}"
        tiles.append(overlay(prompt.sample, group, caption))
    sheet(tiles, 2).save(out / f"overlay-{step:06d}.png")


# ----------------------------------------------------------------------------------------------------------------- run


def json_line(row: dict) -> str:
    """One line of strict JSON: a number that is not finite becomes null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def make_policies(args, base: Path, start: Path) -> tuple[Policy, Policy, Policy | None]:
    """(policy, actor, reference): what is trained, what rolls out, what the KL is to. base is --model's folder, start
    the one that the run goes on from.

    In full training the weights are float32, and what needs no gradient is done by a copy in the arithmetic's dtype,
    refreshed once a step: a cast of all weights per decoded token would cost more. Sharded weights are gathered in that
    dtype, so there they need no copy. With adapters there is one frozen
    copy of the weights in that dtype for all three.
    """
    dtype = getattr(torch, args.dtype)
    device = "cpu" if args.shard else args.device  # whence it is dealt out to the devices, block by block
    policy = load_policy(base if args.lora_rank else start, device, dtype if args.lora_rank else torch.float32)
    policy.source = base  # whose tokenizer goes with every checkpoint; the one that is gone on from may be pruned
    policy.compute_dtype, policy.checkpointing = dtype, args.checkpointing
    policy.graph = args.decode == "graph"
    if args.lora_rank:
        lora.add(policy, args.lora_rank, args.lora_alpha, args.seed)
        return policy, policy, policy if args.beta > 0 else None
    policy.visual.requires_grad_(not args.freeze_vision)
    actor = policy if dtype == torch.float32 or args.shard else copy.deepcopy(policy).to(dtype)
    reference = None
    if args.beta > 0:
        reference = load_policy(base, device, dtype).requires_grad_(False)
        reference.compute_dtype = dtype
    return policy, actor, reference


def main() -> None:
    args = parse_arguments()
    ranks.start(args.device)
    with ExitStack() as ending:
        try:
            train(args, ending)
        except stop.Stopped:
            ranks.say(checkpoint.stopped(Path(args.out), "train_grpo.py"))
    ranks.end()


def train(args, ending: ExitStack) -> None:
    """A run, from the flags to the last checkpoint. What is to be closed, also after an error, goes to `ending`."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Where cuBLAS splits a sum of bf16 products, the parts are added in fp32 too.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if args.begins:
        ranks.say(f"--resume: {args.out} holds no run yet, so this begins one")
    free = args.resume or args.estimate
    out = checkpoint.check_out(args.out, free)
    if not args.estimate:
        ranks.first(lambda: ending.enter_context(lock.held(out)))
        checkpoint.check_out(args.out, free)  # as it is now that nobody else writes to it
    if args.resume and (words := same_threads(out / "config.json")):
        ranks.say(words)
    base = model_folder(args.model, weights=not args.estimate)
    args.model = hub.pinned(args.model, base)
    args.prompt = args.prompt or default_prompt(base)
    on_gpu = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.decode = args.decode or ("graph" if on_gpu and not args.shard else "eager")
    schedule_config = ScheduleConfig(**{f.name: getattr(args, f.name) for f in fields(ScheduleConfig)})
    schedule = make_schedule(args.schedule, schedule_config, args.steps)
    if args.resume and not args.estimate:
        ranks.first(lambda: checkpoint.tidy(out))
    saved = checkpoint.checkpoints(out) if args.resume else []
    start = saved[-1] if saved else base

    bad = BadRecords(args.skip_bad)
    Image.MAX_IMAGE_PIXELS = args.pixel_limit
    given = bad, args.queries, args.allow_outside, args.clip
    samples = load_samples(args.data, args.seed, "train", *given)
    held_out = args.val or held_out_phantoms(args.data)
    val = load_samples(held_out, args.seed, "test", *given) if held_out else []
    planned, words = plan.settle(args, base, samples + val)
    ranks.say(words)
    if args.estimate:
        return
    if args.resume:
        ranks.first(lambda: checkpoint.verify(start) if saved else None)
        why = "started again by torchrun" if restarted() else "--resume"
        ranks.say(f"{why}: " + (f"going on from {start}" if saved else f"{out} has no checkpoint yet, so from step 0"))
    policy, actor, reference = make_policies(args, base, start)
    if args.shard:
        for sharded in filter(None, (policy, reference)):
            ranks.shard(sharded, args.device, policy.compute_dtype)
    room = policy.config.max_position_embeddings - args.max_tokens
    if room < 1:
        raise InputError(
            f"--max-tokens {args.max_tokens}: the model has {room + args.max_tokens} positions in all; lower it"
        )
    task = Task(policy, base, args.prompt, room, args.max_pixels)
    samples, val = task.usable(samples, bad), task.usable(val, bad, decode=True)
    judge = copy.copy(task)  # evaluates with the actor: what is measured is what would be deployed
    judge.policy = actor
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    stream = Stream(samples, task, bad, args, readers=ending.enter_context(Readers(args.workers)))
    first, bad_in_a_row, evaluation = 0, 0, {"start": None, "final": None, "history": []}
    latest = None  # what the newest checkpoint holds: steps, evaluations
    if saved:
        state = checkpoint.load(start, policy, optimizer)
        checkpoint.check_state(start, state, args.batch_size, args.inner_steps)
        first, bad_in_a_row, evaluation = state["step"], state["bad_in_a_row"], state["evaluation"]
        if first > args.steps:
            raise InputError(f"--steps {args.steps}: {start} has {first} already; give more, or a new --out")
        stream.drawn = state["drawn"]
        bad.sentences |= state["bad"]
        with errors.named(f"{start}/trainer.json"):
            schedule.load_state_dict(state.get("schedule"))
        latest = first, len(evaluation["history"])
    elif base == NANO and args.data == "phantoms" and not args.val:
        # The nano policy was made coarse on purpose; what plain supervision on exact boxes reaches stands beside.
        evaluation["exact_sft"] = read_json(NANO / "eval.json")["exact"]
    config = describe(args)
    log = None

    def open_out() -> None:
        nonlocal log
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name in LINES:
                checkpoint.keep_until(out / name, first, each=name == "metrics.jsonl")
            checkpoint.write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
            if args.log:
                log = open_log(args.log, out, config, first)
                ending.callback(log.close)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error}); name another folder") from None

    ranks.everyone(lambda: None)  # all have found --out as it was
    ranks.first(open_out)

    def measure(step: int) -> dict:
        """Greedy answers to the evaluation set; the first six as a picture, so that steps can be laid side by side."""
        with ranks.unsharded(actor):
            result, rows = evaluate(
                judge, val[: args.eval_limit], planned.evaluation, args.max_tokens, progress="evaluation"
            )
        ranks.say(summary(f"step {step}", result))

        def draw() -> None:
            tiles = [
                overlay(sample, [row["box"]], f"step {step}: IoU {row['iou']:.2f}", side=180)
                for sample, row in zip(val[:6], rows, strict=False)
            ]
            sheet(tiles, 6).save(out / f"sheet-{step:06d}.png")

        ranks.first(draw)
        return result

    def write_evaluation() -> None:
        ranks.first(lambda: checkpoint.write_whole(out / "eval.json", json.dumps(evaluation, indent=2) + "\n"))

    def save(step: int, drawn: int) -> None:
        nonlocal latest
        if latest == (step, len(evaluation["history"])):
            return
        values = schedule.state_dict(), bad_in_a_row, drawn, bad.sentences, evaluation
        state = dict(zip(STATE, values, strict=True))

        def sync() -> None:  # a checkpoint must find its lines there, after a power cut too
            for file in (out / name for name in LINES):
                if file.exists():
                    checkpoint.sync(file)

        def write() -> str:
            return str(checkpoint.save(out, step, task, optimizer, state, args.keep))

        ranks.first(sync)
        (ranks.everyone if args.shard else ranks.first)(write)
        latest = step, len(evaluation["history"])

    def evaluate_if_due(step: int) -> None:
        """After `step` steps. A resumed run makes up for what a stop, or a failure, has kept from being done."""
        last, history = step == args.steps, evaluation["history"]
        if not val or not (last or args.eval_every and step % args.eval_every == 0):
            return
        if not history or history[-1]["step"] != step:
            try:
                history.append({"step": step, **measure(step)})
            except Exception:  # a picture that vanished, no memory: the steps are done all the same
                save(step, stream.drawn)
                raise
        if last:
            evaluation["final"] = {k: v for k, v in history[-1].items() if k != "step"}
        write_evaluation()

    idle = {f.name for f in fields(ScheduleConfig)} - {*WATCHING, *schedule.own}
    asked = {name: value for name, value in vars(args).items() if value is not None and name not in idle}
    ranks.say(" ".join(f"{name}={value}" for name, value in asked.items()))
    for line in bad.lines():
        ranks.say(line)
    parameters, of_them = (sum(p.numel() for p in some) / 1e6 for some in (policy.parameters(), trained))
    ranks.say(
        f"{parameters:.1f} M parameters ({of_them:.1f} M trained), {len(samples)} training samples, "
        f"{len(val)} to evaluate on"
    )
    leads = ranks.rank == 0  # numbers are global, but times, memory, samples and overlays are those of rank 0
    metrics = out / "metrics.jsonl" if leads else os.devnull
    metrics_file = ending.enter_context(open(metrics, "a", encoding="utf-8"))
    ending.enter_context(stop.listening())
    if not val:
        ranks.say("no evaluation: name records with --val")
    elif not evaluation["start"]:
        evaluation["start"] = measure(0)
        write_evaluation()
    if "exact_sft" in evaluation:
        ranks.say(summary("exact SFT, for comparison (the start was made coarse on purpose)", evaluation["exact_sft"]))

    if first:
        evaluate_if_due(first)
        save(first, stream.drawn)

    watch = Watch()
    todo = range(first, args.steps)
    bar = tqdm(todo, initial=first, total=args.steps, desc=args.schedule, unit="step", disable=not leads)
    for step in bar:
        started, drawn, stream.seconds = time.perf_counter(), stream.drawn, 0.0
        lr = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tau = schedule.tau
        try:
            try:
                tally, seen, used = rollout(policy, actor, reference, task, stream, step, schedule, args)
            except ranks.Lost:
                raise
            except InputError as error:  # a picture that cannot be decoded, found on the way: keep what was learned
                save(step, drawn)
                raise InputError(f"{error}. All up to step {step} is saved: repair it and go on by --resume") from error
            rolled = time.perf_counter()
            losses = update(policy, optimizer, used, args)
        except stop.Stopped:
            save(step, drawn)
            raise
        decision = schedule.observe(tally.iou.tolist())  # from here on the step is a whole one
        optimizer.zero_grad()  # the memory is the next rollout's
        if actor is not policy:
            with torch.no_grad():
                torch._foreach_copy_(list(actor.parameters()), list(policy.parameters()))
        ended = time.perf_counter()

        done = step + 1
        last = done == args.steps
        row = {"step": done, "tau": tau, "hit_rate": decision.hit_rate, "sigma": decision.sigma}
        row |= {"margin": decision.margin, "decision": str(decision), "lr": lr, "drawn": stream.drawn}
        row |= rollout_metrics(tally, tau, args) | losses
        row |= {"seconds": ended - started, "seconds_rollout": rolled - started, "seconds_update": ended - rolled}
        row |= {"seconds_input": stream.seconds}  # of seconds_rollout
        row |= {"peak_mb": peak_megabytes(args.device), "resident_mb": resident_megabytes()}
        print(json_line(row), file=metrics_file, flush=True)
        if log:
            log.write(row)
        if decision.tighten and not isinstance(schedule, ByShareOfSteps):  # those rise at every step
            ranks.say(f"step {done}: {decision}")
        if row["dropped"] == row["groups"]:
            ranks.say(f"step {done}: none of {row['groups']} groups had spread, no update")
        if leads and (paragraph := watch.add(seen, tau, last)):
            ranks.say(f"step {done}{', rank 0' if ranks.size > 1 else ''}: {paragraph}")
        shown = {"tau": "-" if tau is None else f"{tau:.2f}", "iou": f"{row['iou_mean']:.3f}"}
        shown |= {"hits": "-" if decision.hit_rate is None else f"{decision.hit_rate:.2f}"}
        shown |= {"flat": f"{row['zero_spread']:.2f}", "tok/s": f"{row['tokens'] / row['seconds']:.0f}"}
        bar.set_postfix(shown, refresh=False)

        bad_in_a_row = bad_in_a_row + 1 if losses["skipped"] else 0
        if bad_in_a_row:
            ranks.say(f"step {done}: loss {row['loss']}, gradient norm {row['grad_norm']}: not finite, step skipped")
        if bad_in_a_row >= PATIENCE:
            raise InputError(
                f"{PATIENCE} steps in a row had a non-finite loss or gradient; "
                "start anew with a lower --lr or --grad-clip, from --model or a step-... of this run"
            )
        if leads and seen.prompts and args.samples_every and (done % args.samples_every == 0 or done == 1):
            write_samples(out, done, seen, tau)
        evaluate_if_due(done)
        if last or done % args.save_every == 0:
            save(done, stream.drawn)
    names = list(rewards.REASONS)
    failures = Counter(names[i] for i in tally.reasons.flatten().tolist() if i) if first < args.steps else {}
    if failures:
        ranks.say("last step, answers without a box: " + ", ".join(f"{n} x {r}" for r, n in failures.most_common()))
    ranks.say(f"done: {out}/eval.json, metrics.jsonl, samples.jsonl, overlay-*.png, step-{args.steps:06d}/")


if __name__ == "__main__":
    errors.run(main, MEMORY)
