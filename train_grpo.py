"""GRPO for medical images with a reward curriculum: the loop, top to bottom.

    torchrun train_grpo.py --schedule=medloc                          the nano policy on phantoms: minutes on a laptop
    python train_grpo.py --model FOLDER --data train.jsonl --val val.jsonl --out out-run

step() is the method on one screen: draw B prompts -> G answers each -> what they are worth (u) -> the schedule turns u
into reward and may tighten its threshold for the NEXT step -> advantage over the group -> clipped loss -> AdamW. GRPO:
arXiv 2402.03300; the schedule: MedLoc-R1, 2603.28120; dynamic sampling: DAPO, 2503.14476. Every flag, its default and
the reason for it: config.py.

Randomness follows from (seed, step, sample), never from wall clock or state: a resumed run goes on as if never stopped.
Left out here: learned reward models, a critic, top-p sampling (the sampled policy must be the trained one).
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import copy
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import config
import lora
import ranks
from data import BadRecords, held_out_phantoms, load_samples
from errors import read_object
from judge import read_judge
from knowledge import Knowledge
from loss import BatchTotals, completion_mask, grpo_loss, mask_overlong
from model import Policy, Prefix, collate
from norms import ASKED, read_alike
from prompts import Processor, default_prompt
from rewards import Schedules, combine, group_advantage, places, read_weights
from rollout import GroupScores, Rollout, Rounds, sample, score, share
from runtime import checkpoint, plan
from runtime.readers import Readers
from runtime.run import Run, begin
from runtime.stream import Stream
from scheduler import Decision
from tasks import TASKS, configure
from weights import NANO, load_policy, model_folder, pinned

GRAD_CLIP = 1.0  # largest gradient norm
MEMORY = (
    "lower --micro-batch, then --max-pixels, --max-tokens or --group-size; --checkpointing trades time for memory, "
    "--lora-rank 64 needs no optimiser state or reference copy of all weights, --beta 0 no reference at all; "
    "--estimate says what would fit"
)


@dataclass(frozen=True)
class GRPO:
    """The settings of the algorithm; their defaults and reasons: config.py."""

    batch_size: int  # B, prompts per step, on all ranks
    group_size: int  # G, completions per prompt
    micro_batch: int  # prompts per forward pass
    inner_steps: int  # optimiser steps per rollout
    dynamic_sampling: int  # rounds of fresh prompts for groups without spread
    max_tokens: int
    temperature: float  # of sampling, and of all log-probs
    weights: dict[str, float]  # of the rewards
    combine: str  # sum | gdpo
    advantage: str  # std | batch | none
    kind: str  # loss.KINDS
    kl: str  # loss.KLS
    overlong: str  # keep | mask
    clip: tuple[float, float]  # low, high
    beta: float  # weight of the KL to the reference
    sharded: bool

    @property
    def one_pass(self) -> bool:
        """May the update go on from the rollout's own prefix? Not with weights that move or move about in between."""
        return self.inner_steps == 1 and not self.dynamic_sampling and not self.sharded


def step(
    number: int, policy: Policy, actor: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
    stream: Stream, schedules: Schedules, grpo: GRPO,
) -> tuple[GroupScores, Rollout, dict, dict[tuple[str, str], Decision]]:  # fmt: skip
    """One step of GRPO, all ranks together -> all ranks' scores, this rank's rollout, losses, schedules' decisions."""
    rounds = Rounds(grpo.batch_size, grpo.dynamic_sampling)  # one; more where pictures broke, or groups had no spread
    with ranks.unsharded(actor):
        while rounds.missing:
            prompts, uniforms = stream.draw(number, rounds.missing)  # this rank's share of B prompts
            # G completions of each on a shared prefix, from which the update goes on if it can
            roll, prefix = sample(policy if grpo.one_pass else None, actor, stream.processor, prompts, uniforms, grpo)
            scores = score(roll, grpo.weights, stream.keys)  # each by its sample's task: u in [0, 1], valid, parts
            everyone = share(scores, stream)  # all ranks', in stream order: one collective
            reward = combine(everyone, schedules, grpo.weights, grpo.combine)  # shape(u, tau), weights, per dataset
            rounds.add(roll, prefix, everyone, reward)
    everyone, roll, prefix = rounds.joined()
    everyone.advantage = group_advantage(everyone.reward, grpo.advantage)  # exactly 0 without spread
    roll.advantage = everyone.advantage[everyone.mine]
    losses = update(policy, reference, optimizer, rounds.useful(roll), prefix, grpo)  # loss.py
    refresh(actor, policy)  # the actor is the policy again
    return everyone, roll, losses, schedules.observe(everyone)  # tau for the NEXT step, one window per task


def update(
    policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, roll: Rollout, prefix: Prefix | None,
    grpo: GRPO,
) -> dict:  # fmt: skip
    """Inner steps of GRPO on one rollout, all ranks' shares of it -> metrics. prefix: of all of the rollout's prompts,
    if it is there; its graph serves one backward pass. A step whose loss or gradient is not finite changes nothing, on
    any rank; nor does one that errors.Stopped ends, before the first inner step is taken."""
    if reference is not None:
        with ranks.unsharded(reference):
            roll.logp_ref = reference_logprobs(reference, roll, grpo) if roll.prompts else None
    started = time.perf_counter()
    mask = completion_mask(roll.lengths, roll.ids.shape[2])  # (B, G, T)
    kept = mask_overlong(mask, roll.truncated) if grpo.overlong == "mask" else mask
    passes = math.ceil(len(roll.prompts) / grpo.micro_batch)
    own = roll.lengths.numel(), mask.sum(), kept.sum(), passes
    counts = ranks.gather(torch.tensor([int(n) for n in own]))
    sequences, tokens, masked, _ = counts.sum(0).tolist()
    if not sequences:  # dynamic sampling found no group with spread
        metrics = dict.fromkeys(("loss", "grad_norm", "kl", "clip_low", "clip_high", "entropy"))
        return metrics | {"skipped": 0, "seconds_update": time.perf_counter() - started}
    totals = BatchTotals(sequences, masked, grpo.max_tokens)
    if grpo.sharded:  # all ranks make as many passes as the one that has most to do
        passes = int(counts.amax(0)[3])
    trained = [p for p in policy.parameters() if p.requires_grad]
    rows, norms, skipped = [], [], 0
    for inner in range(grpo.inner_steps):
        optimizer.zero_grad(set_to_none=True)
        sums = backward(policy, roll, prefix, kept, totals, passes, grpo, may_leave=inner == 0)
        *sums, left = ranks.all_sum([*sums, float(errors.asked_to_stop)])
        if left and inner == 0:  # later on the weights are not those of the step's beginning any more
            raise errors.Stopped
        rows.append(sums)
        ranks.sum_gradients(trained)
        norms.append(float(ranks.full_tensor(torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP))))
        if math.isfinite(rows[-1][0]) and math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    optimizer.zero_grad()  # the memory is the next rollout's
    n = max(masked, 1) * grpo.inner_steps  # masked is 0 where every completion was masked out
    loss, kl, clip_low, clip_high, _ = (sum(column) for column in zip(*rows, strict=True))
    return {
        "loss": loss / len(rows),
        "grad_norm": sum(norms) / len(norms),
        "kl": kl / n if grpo.beta > 0 else None,
        "clip_low": clip_low / n,
        "clip_high": clip_high / n,
        "entropy": rows[0][-1] / tokens,
        "skipped": skipped,
        "seconds_update": time.perf_counter() - started,
    }


def backward(
    policy: Policy, roll: Rollout, prefix: Prefix | None, mask: Tensor, totals: BatchTotals, passes: int, grpo: GRPO,
    may_leave: bool,
) -> list[float]:  # fmt: skip
    """Add the gradients of this rank's share of the loss, micro-batch by micro-batch -> its sums of loss, KL, clipped
    tokens (low, high) and entropy. mask (B, G, T): the tokens that count.

    Sharded, a pass is one of all ranks: who has no more to do makes an idle one, and none leaves without the others.
    """
    device = next(policy.parameters()).device
    advantage = roll.advantage.to(device)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for i in range(0, passes * grpo.micro_batch, grpo.micro_batch):
        if may_leave and (any(ranks.all_sum([errors.asked_to_stop])) if grpo.sharded else errors.asked_to_stop):
            break
        if i >= len(roll.prompts):
            policy.idle().backward()
            continue
        rows = slice(i, i + grpo.micro_batch)
        ids, lengths = roll.ids[rows], roll.lengths[rows]
        start = prefix or policy.prefix(collate(roll.prompts[rows], device))
        logp, entropy = policy.logprobs(start, ids, lengths, grpo.temperature, entropy=True)
        loss, stats = grpo_loss(
            logp,
            logp.detach() if roll.logp_old is None else roll.logp_old[rows],
            None if roll.logp_ref is None else roll.logp_ref[rows],
            advantage[rows],
            mask[rows],
            totals,
            kind=grpo.kind,
            clip_low=grpo.clip[0],
            clip_high=grpo.clip[1],
            beta=grpo.beta,
            kl=grpo.kl,
        )
        loss.backward()
        parts = loss.detach(), stats.kl, stats.clip_low, stats.clip_high, entropy.sum()
        sums += torch.stack([part.double() for part in parts])
    return sums.tolist()


@torch.no_grad()
def reference_logprobs(reference: Policy, roll: Rollout, grpo: GRPO) -> Tensor:
    """(B, G, T) under the starting policy: a frozen copy, or with adapters the policy itself without them."""
    logps, device = [], next(reference.parameters()).device
    with lora.disabled(reference):
        for i in range(0, len(roll.prompts), grpo.micro_batch):
            if errors.asked_to_stop and logps:  # update() will drop the step
                break
            rows = slice(i, i + grpo.micro_batch)
            prefix = reference.prefix(collate(roll.prompts[rows], device))
            logps.append(reference.logprobs(prefix, roll.ids[rows], roll.lengths[rows], grpo.temperature))
    return torch.cat(logps)


@torch.no_grad()
def refresh(actor: Policy, policy: Policy) -> None:
    """Give the actor the policy's weights, in its own dtype, where it is a copy."""
    if actor is not policy:
        torch._foreach_copy_(list(actor.parameters()), list(policy.parameters()))


def make_policies(args, base: Path, start: Path) -> tuple[Policy, Policy, Policy | None]:
    """(policy, actor, reference): what is trained, what rolls out, what the KL is to. base is --model's folder, start
    the one that the run goes on from.

    In full training the weights are float32, and what needs no gradient is done by a copy in the arithmetic's dtype,
    refreshed once a step: a cast of all weights per decoded token would cost more. Sharded weights are gathered in that
    dtype, so there they need no copy. With adapters there is one frozen copy of the weights in that dtype for all
    three.
    """
    dtype = getattr(torch, args.dtype)
    device = "cpu" if args.shard else args.device  # whence it is dealt out to the devices, block by block
    policy = load_policy(base if args.lora_rank else start, device, dtype if args.lora_rank else torch.float32)
    policy.source = base  # whose tokenizer goes with every checkpoint; the one that is gone on from may be pruned
    policy.compute_dtype, policy.checkpointing = dtype, args.checkpointing
    policy.graph = args.device.startswith("cuda") and not args.shard  # shards move, a graph replays fixed addresses
    if args.lora_rank:
        lora.add(policy, args.lora_rank, lora.ALPHA, args.seed)
        return policy, policy, policy if args.beta > 0 else None
    policy.visual.requires_grad_(not args.freeze_vision)
    actor = policy if dtype == torch.float32 or args.shard else copy.deepcopy(policy).to(dtype)
    reference = None
    if args.beta > 0:
        reference = load_policy(base, device, dtype).requires_grad_(False)
        reference.compute_dtype = dtype
    for sharded in filter(None, (policy, reference) if args.shard else ()):
        ranks.shard(sharded, args.device, dtype)
    return policy, actor, reference


def algorithm(args) -> GRPO:
    kind, kl, overlong = config.read_loss(args.loss)
    same = (
        "batch_size group_size micro_batch inner_steps dynamic_sampling max_tokens temperature combine advantage beta"
    ).split()
    return GRPO(
        **{name: getattr(args, name) for name in same},
        weights=read_weights(args.rewards), kind=kind, kl=kl, overlong=overlong,
        clip=tuple(args.clip), sharded=args.shard,
    )  # fmt: skip


def train(args, ending: ExitStack) -> None:
    """A run, from the flags to the last checkpoint. What is to be closed, also after an error, goes to `ending`."""
    # Where cuBLAS splits a sum of bf16 products, the parts are added in fp32 too.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    out, start = (None, None) if args.estimate else begin(args, "train_grpo.py", ending)
    base = model_folder(args.model, weights=not args.estimate)
    args.model, args.prompt = pinned(args.model, base), args.prompt or default_prompt(base)
    args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"

    bad = BadRecords(args.skip_bad)
    knowledge = Knowledge(args.knowledge) if args.knowledge else None
    given = args.allow_outside, args.clip_boxes, knowledge
    samples = load_samples(args.data, TASKS, args.seed, "train", bad, *given)
    held_out = args.val or held_out_phantoms(args.data)
    val = load_samples(held_out, TASKS, args.seed, "test", bad, *given) if held_out else []
    if knowledge:
        knowledge.complete()
    judge = read_judge(args.judge, out) if args.judge and not args.estimate else None
    configure(args.tasks, {sample.task for sample in samples + val}, judge, samples)
    paid, norms = places(sorted({sample.key for sample in samples}), read_weights(args.rewards)), None
    if args.normalise:
        norms = read_alike(args.normalise, None if args.estimate else base)
        asked = {"tasks": sorted(args.tasks or ())} | {name: getattr(args, name) for name in ASKED}
        if not args.estimate:
            asked["judge"] = judge.name if judge else None
        for words in norms.check(paid, asked):
            ranks.print0(words)
    planned, words = plan.settle(args, base, samples + val)
    ranks.print0(words)
    if args.estimate:
        return

    policy, actor, reference = make_policies(args, base, start or base)
    processor = Processor(base, args.prompt, TASKS, policy.room(args.max_tokens), args.max_pixels)
    samples, val = processor.usable(samples, bad), processor.usable(val, bad, decode=True)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    readers = ending.enter_context(Readers(args.workers))
    sizes = args.batch_size, args.group_size, args.max_tokens
    stream = Stream(samples, processor, bad, *sizes, args.seed, readers)
    grpo = algorithm(args)
    schedules = Schedules(args.schedule, stream.keys, args.steps, norms)
    run = Run(args, out, policy, actor, processor, optimizer, stream, schedules, val, planned.evaluation, bad, ending)
    if start:
        run.resume(start)
    elif base == NANO and args.data == "phantoms" and not args.val:
        # The nano policy was made coarse on purpose; what plain supervision on exact boxes reaches stands beside.
        run.evaluation["exact_sft"] = read_object(NANO / "eval.json")["exact"]
    run.open()
    for number in run.steps():
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (number + 1) / max(args.warmup, 1))
        with run.saving(number):
            done = step(number, policy, actor, reference, optimizer, stream, schedules, grpo)
        run.log(number, *done)
    run.finish()


def main() -> None:
    args = config.parse("train_grpo.py")
    ranks.start(args.device)
    with ExitStack() as ending:
        try:
            train(args, ending)
        except errors.Stopped:
            ranks.print0(checkpoint.stopped(Path(args.out), "train_grpo.py"))
    ranks.end()


if __name__ == "__main__":
    errors.run(main, MEMORY)
