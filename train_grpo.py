"""GRPO for visual grounding with a reward curriculum: the loop, top to bottom.

    torchrun train_grpo.py --schedule=medloc                          the nano policy on phantoms: minutes on a laptop
    python train_grpo.py --model FOLDER --data train.jsonl --val val.jsonl --out out-run

A step: sample B prompts -> roll out G answers each -> score boxes against the truth -> the schedule turns IoU into
reward and may tighten its threshold for the NEXT step -> advantage over the group -> clipped loss -> AdamW. Two verbs,
rollout() and update(), and one dataclass between them. GRPO: arXiv 2402.03300; the schedule: MedLoc-R1, 2603.28120.

Randomness follows from (seed, step, sample), never from wall clock or state: a resumed run goes on as if never stopped.
Left out here: learned reward models, a critic, top-p sampling (the sampled policy must be the trained one).
"""

import argparse
import copy
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import errors
import kernels
import rewards
from data import PROMPTS, Prompt, Sampler, load_samples
from errors import InputError
from eval import NANO, Task, default_prompt, evaluate, model_folder, overlay, sheet, summary
from loss import BatchTotals, LossStats, completion_mask, grpo_loss
from model import Policy, collate, read_json
from scheduler import CHOICES, SCHEDULES, Schedule, ScheduleConfig, make_schedule

DEFAULTS = dict(
    model="nano",  # runs anywhere, no download
    data="phantoms",
    val=None,  # held-out phantoms for phantoms; for files it must be named
    out="out",
    prompt=None,  # the one the policy was trained with, else think
    schedule="medloc",
    group_size=8,  # G, as in the paper
    inner_steps=1,  # optimiser steps per rollout; 1 is on policy, and needs no pass for the old log-probs
    clip_low=0.2,
    clip_high=0.2,  # .28 is DAPO's clip-higher
    grad_clip=1.0,
    eval_every=0,  # 0: at the start and the end only
    eval_limit=None,
    samples_every=20,
    save_every=100,
    seed=0,
    device="cuda" if torch.cuda.is_available() else "cpu",
    dtype=None,  # of the arithmetic: bfloat16 on CUDA, float32 on a CPU; trained weights are float32 on both
)
RECIPES = {
    "nano": dict(
        steps=200,
        batch_size=16,  # prompts per optimiser step
        micro_batch=16,  # prompts per forward pass
        lr=1e-4,  # mIoU after 100 steps, seed 0: .718; 2e-4 .680, 4e-4 .581
        warmup=5,
        temperature=1.0,
        beta=0.0,  # no KL: the start is meant to be left behind
        max_tokens=24,  # a bare box is 16
        format_weight=0.0,
    ),
    "paper": dict(
        steps=500,
        batch_size=8,
        micro_batch=1,
        lr=1e-6,
        warmup=10,
        temperature=0.9,
        beta=0.04,  # of the code that the paper builds on; one summary says .4
        max_tokens=512,
        format_weight=1.0,
    ),
}
# What a resumed run may change: nothing here decides what is learned. More --steps is a longer run (the learning rate
# is constant after the warm-up); schedules that go by the share of the steps refuse it themselves.
FREE_ON_RESUME = {"resume", "out", "steps", "device", "eval_every", "eval_limit", "samples_every", "save_every"}
PATIENCE = 5  # steps with a non-finite loss or gradient in a row before the run stops


@dataclass
class Rollout:
    """One optimiser step's worth of experience: B prompts, G completions each, T tokens at most. On the policy's device
    where the update needs it, else on the CPU."""

    prompts: list[Prompt]  # B
    ids: Tensor  # (B, G, T)
    lengths: Tensor  # (B, G) tokens up to and including the first EOS
    truncated: Tensor  # (B, G) bool
    texts: list[list[str]]  # B x G
    boxes: Tensor  # (B, G, 4) original pixels, NaN without a box; CPU
    iou: Tensor  # (B, G) CPU
    valid: Tensor  # (B, G) bool, CPU
    reasons: list[list[str]]  # why an answer has no box, "" if it has
    reward: Tensor  # (B, G) CPU
    advantage: Tensor  # (B, G)
    logp_old: Tensor | None  # (B, G, T); None with one inner step, where it equals the policy's own
    logp_ref: Tensor | None  # (B, G, T); None with beta = 0


def uniforms(seed: int, step: int, slots: list[int], indices: list[int], group: int, tokens: int) -> Tensor:
    """(B, G, T) in [0, 1): the luck of each completion token, from (seed, step, place in the batch, sample) alone."""
    rows = []
    for slot, index in zip(slots, indices, strict=True):
        key = np.random.SeedSequence([seed, step, slot, index])
        rows.append(np.random.Generator(np.random.PCG64(key)).random((group, tokens), dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def rollout(
    actor: Policy, reference: Policy | None, task: Task, prompts: list[Prompt], noise: Tensor, schedule: Schedule, args
) -> Rollout:
    """Sample G answers to each prompt, and score them under the schedule's present threshold."""
    device = next(actor.parameters()).device
    parts, olds, refs = [], [], []
    for i in range(0, len(prompts), args.micro_batch):
        batch = collate(prompts[i : i + args.micro_batch], device)
        prefix = actor.prefix(batch)
        part = actor.generate(
            prefix, args.group_size, args.max_tokens, args.temperature, noise[i : i + args.micro_batch]
        )
        parts.append(part)
        if args.inner_steps > 1:
            olds.append(actor.logprobs(prefix, part.ids, part.lengths, args.temperature))
        if reference is not None:
            refs.append(reference.logprobs(reference.prefix(batch), part.ids, part.lengths, args.temperature))
    longest = max(part.ids.shape[2] for part in parts)

    def join(tensors: list[Tensor]) -> Tensor:  # pad to one T: nothing behind a completion's length is ever read
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[2])) for t in tensors])

    ids, lengths = join([p.ids for p in parts]), torch.cat([p.lengths for p in parts])
    b, g = lengths.shape
    texts = task.texts(ids.flatten(0, 1), lengths.flatten())
    targets = torch.tensor([p.box for p in prompts]).repeat_interleave(g, 0)
    scores = rewards.score(texts, targets, torch.tensor([p.scale for p in prompts]).repeat_interleave(g, 0))
    rows = zip(scores.iou.tolist(), scores.giou.tolist(), scores.valid.tolist(), strict=True)
    parts_of_reward = {"iou": torch.tensor([schedule.reward(*row) for row in rows]), "format": scores.format}
    reward = rewards.combine(parts_of_reward, {"iou": 1.0, "format": args.format_weight}).view(b, g)
    return Rollout(
        prompts=prompts,
        ids=ids,
        lengths=lengths,
        truncated=torch.cat([p.truncated for p in parts]),
        texts=[texts[i * g : (i + 1) * g] for i in range(b)],
        boxes=scores.boxes.view(b, g, 4),
        iou=scores.iou.view(b, g),
        valid=scores.valid.view(b, g),
        reasons=[scores.reasons[i * g : (i + 1) * g] for i in range(b)],
        reward=reward,
        advantage=kernels.group_advantage(reward).to(device),
        logp_old=join(olds) if olds else None,
        logp_ref=join(refs) if refs else None,
    )


def update(policy: Policy, optimizer: torch.optim.Optimizer, roll: Rollout, args) -> dict:
    """Inner steps of GRPO on one rollout -> metrics. A step whose loss or gradient is not finite changes nothing."""
    device = next(policy.parameters()).device
    totals = BatchTotals(roll.lengths.numel(), int(roll.lengths.sum()), args.max_tokens)
    stats, losses, norms, entropy, skipped = None, [], [], 0.0, 0
    for inner in range(args.inner_steps):
        optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for i in range(0, len(roll.prompts), args.micro_batch):
            rows = slice(i, i + args.micro_batch)
            ids, lengths = roll.ids[rows], roll.lengths[rows]
            prefix = policy.prefix(collate(roll.prompts[rows], device))
            logp, rows_entropy = policy.logprobs(prefix, ids, lengths, args.temperature, entropy=True)
            loss, sums = grpo_loss(
                logp,
                logp.detach() if roll.logp_old is None else roll.logp_old[rows],
                None if roll.logp_ref is None else roll.logp_ref[rows],
                roll.advantage[rows],
                completion_mask(lengths, ids.shape[2]),
                totals,
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                beta=args.beta,
            )
            loss.backward()
            loss_sum += loss.detach()
            stats = sums if stats is None else stats + sums
            if inner == 0:
                entropy += rows_entropy.sum()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
        losses.append(float(loss_sum))
        norms.append(float(norm))
        if math.isfinite(losses[-1]) and math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    return loss_metrics(stats, losses, norms, float(entropy) / totals.tokens) | {"skipped": skipped}


def loss_metrics(stats: LossStats, losses: list[float], norms: list[float], entropy: float) -> dict:
    n = int(stats.tokens)
    return {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "kl": float(stats.kl) / n,
        "clip_low": float(stats.clip_low) / n,
        "clip_high": float(stats.clip_high) / n,
        "entropy": entropy,
    }


def rollout_metrics(roll: Rollout) -> dict:
    quartiles = roll.iou.flatten().quantile(torch.tensor([0.25, 0.75])).tolist()
    spread = roll.reward.amax(1) > roll.reward.amin(1)  # (B,)
    return {
        "iou_mean": roll.iou.mean().item(),
        "iou_q25": quartiles[0],
        "iou_q75": quartiles[1],
        "reward_mean": roll.reward.mean().item(),
        "zero_spread": 1 - spread.float().mean().item(),
        "parse_failures": 1 - roll.valid.float().mean().item(),
        "truncated": roll.truncated.float().mean().item(),
        "tokens": int(roll.lengths.sum()),
    }


def peak_megabytes(device: str) -> float:
    """Of GPU memory on CUDA, else of the process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, kilobytes on Linux


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


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flags > the resumed run's > the recipe's > DEFAULTS. Unknown or contradictory flags end the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    known = DEFAULTS | RECIPES["nano"] | asdict(ScheduleConfig())

    def flags(title: str, **helps: str) -> None:
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            default = known[name]
            kind = {"val": str, "prompt": str, "dtype": str, "eval_limit": int}.get(name, type(default))
            options: dict = {"help": f"{text} (default {default})"}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif kind is tuple:
                options |= {"type": float, "nargs": len(default)}
            else:
                options["type"] = kind
            choices = CHOICES | {"schedule": SCHEDULES, "prompt": tuple(PROMPTS), "dtype": ("float32", "bfloat16")}
            if name in choices:
                options["choices"] = choices[name]
            group.add_argument("--" + name.replace("_", "-"), **options)

    recipe = "the nano one with --model nano, else the paper's"
    parser.add_argument("--recipe", choices=tuple(RECIPES), help=f"defaults of what follows (default: {recipe})")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    flags(
        "what",
        model="checkpoint folder, or nano",
        data="JSONL files, or phantoms[:dermoscopy|xray|ultrasound]",
        val="records to evaluate on",
        out="folder for everything the run writes; must be empty or new",
        prompt="wording of the question",
        seed="of data order, phantoms and sampling",
    )
    flags(
        "GRPO",
        steps="rollouts",
        group_size="G, completions per prompt",
        batch_size="prompts per rollout",
        micro_batch="prompts per forward pass: less memory, same result",
        inner_steps="optimiser steps per rollout",
        lr="learning rate of AdamW",
        warmup="steps of linear warm-up; constant afterwards",
        grad_clip="largest gradient norm",
        temperature="of sampling, and of all log-probs",
        max_tokens="longest completion",
        beta="weight of the KL to the starting policy; 0 keeps no copy of it",
        clip_low="1 - this is the smallest ratio that still has a gradient, where A < 0",
        clip_high="1 + this is the largest, where A > 0",
        format_weight="of the reward for <think>...</think><answer>...</answer>, beside 1 for the box",
    )
    flags(
        "reward schedule (what each is and where it comes from: scheduler.py)",
        schedule="how IoU becomes reward",
        **SCHEDULE_HELP,
    )
    flags(
        "watching",
        eval_every="steps between greedy evaluations; 0: at the start and the end",
        eval_limit="samples per evaluation",
        samples_every="steps between samples.jsonl lines and overlays; 0: never",
        save_every="steps between checkpoints; the last step is always saved",
    )
    flags("machine", device="cpu or cuda", dtype="of the arithmetic; weights are trained in float32")
    explicit = vars(parser.parse_args(argv))

    saved = {}
    if explicit.get("resume"):
        saved = read_json(Path(explicit.get("out", DEFAULTS["out"])) / "config.json").get("arguments", {})
        for name in sorted(explicit.keys() & saved.keys() - FREE_ON_RESUME):
            given = list(explicit[name]) if isinstance(explicit[name], tuple) else explicit[name]
            if given != saved[name]:
                flag = "--" + name.replace("_", "-")
                parser.error(f"--resume goes on with {flag} {saved[name]}, not {given}: drop {flag} or start a new run")
    model = explicit.get("model", saved.get("model", DEFAULTS["model"]))
    chosen = explicit.get("recipe", saved.get("recipe", "nano" if model == "nano" else "paper"))
    merged = asdict(ScheduleConfig()) | DEFAULTS | RECIPES[chosen] | saved | explicit
    args = argparse.Namespace(**merged | {"recipe": chosen, "resume": bool(explicit.get("resume"))})
    for name in ("steps", "group_size", "batch_size", "micro_batch", "inner_steps", "max_tokens", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "temperature", "grad_clip"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("warmup", "beta", "clip_low", "clip_high", "format_weight", "eval_every", "samples_every", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("this version trains in one process: start torchrun without --nproc-per-node")
    return args


SCHEDULE_HELP = dict(
    tau_start="threshold at the start",
    tau_target="threshold that is never passed",
    window="N, what decisions look back on",
    unit="what the window counts",
    stale="which tau judges groups that a raise left in the window",
    refresh="share of the window that a raise drops",
    check_reward="hit rate >= P(tau)",
    check_stability="sigma <= S(tau)",
    check_margin="margin >= --min-margin",
    stages="tau from which the second and third of the next two hold",
    min_hit_rate="P(tau)",
    max_sigma="S(tau)",
    min_margin="Delta",
    delta_schedule="how far a raise goes",
    beta1="piecewise: .15 below",
    beta2="piecewise: .10 below, .05 above",
    delta0="linear and cosine: the first raise",
    soft_scale="medloc-soft: s of sigmoid((IoU - tau)/s)",
    fixed_tau="fixed: its threshold",
)


def describe(args: argparse.Namespace) -> dict:
    """config.json: what was asked for, and with what it ran."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy", "pillow")}
    return {
        "arguments": {name: value for name, value in vars(args).items() if name != "resume"},
        "versions": {"python": platform.python_version(), **packages},
        "git": git.stdout.strip() or None,
        "threads": torch.get_num_threads(),
    }


def open_out(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty: name a new folder, or go on with the run in it by --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(describe(args), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from None
    return out


def keep_until(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a resumed run will write them again."""
    if file.exists():
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    folder = model_folder(args.model)
    args.prompt = args.prompt or default_prompt(folder)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    config = ScheduleConfig(**{f.name: getattr(args, f.name) for f in fields(ScheduleConfig)})
    schedule = make_schedule(args.schedule, config, args.steps)
    samples = load_samples(args.data, args.seed, "train")
    val = load_samples(args.val or args.data, args.seed, "test") if args.val or args.data.startswith("phantoms") else []
    out = open_out(args)

    start_folder = checkpoint.newest(out) if args.resume else folder
    policy = Policy.from_folder(start_folder, args.device)
    policy.compute_dtype = getattr(torch, args.dtype)
    # In bfloat16 a copy of that dtype does all that needs no gradient; a cast per decoded token would cost more.
    actor = policy if policy.compute_dtype == torch.float32 else copy.deepcopy(policy).to(policy.compute_dtype)
    reference = None
    if args.beta > 0:
        reference = Policy.from_folder(folder, args.device, policy.compute_dtype).requires_grad_(False)
        reference.compute_dtype = policy.compute_dtype
    room = policy.config.max_position_embeddings - args.max_tokens
    task = Task(policy, start_folder, args.prompt, max_prompt_tokens=room)
    judge = copy.copy(task)  # evaluates with the actor: what is measured is what would be deployed
    judge.policy = actor
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    sampler = Sampler(len(samples), args.batch_size, args.seed)
    first, bad_in_a_row, evaluation = 0, 0, {"start": None, "final": None, "history": []}
    if args.resume:
        state = checkpoint.load(start_folder, policy, optimizer)
        first, bad_in_a_row, evaluation = state["step"], state["bad_in_a_row"], state["evaluation"]
        schedule.load_state_dict(state["schedule"])
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_until(out / name, first)
    elif folder == NANO and args.data == "phantoms" and not args.val:
        # The nano policy was made coarse on purpose; what plain supervision on exact boxes reaches stands beside.
        evaluation["exact_sft"] = read_json(NANO / "eval.json")["exact"]

    def measure(step: int) -> dict:
        """Greedy answers to the evaluation set; the first six as a picture, so that steps can be laid side by side."""
        result, rows = evaluate(judge, val[: args.eval_limit], 50, args.max_tokens, progress="evaluation")
        tqdm.write(summary(f"step {step}", result))
        tiles = [
            overlay(sample, [row["box"]], f"step {step}: IoU {row['iou']:.2f}", side=180)
            for sample, row in zip(val[:6], rows, strict=False)
        ]
        sheet(tiles, 6).save(out / f"sheet-{step:06d}.png")
        return result

    def write_evaluation() -> None:
        (out / "eval.json").write_text(json.dumps(evaluation, indent=2) + "\n")

    changed = {name: value for name, value in vars(args).items() if value is not None and not hasattr(config, name)}
    tqdm.write(" ".join(f"{name}={value}" for name, value in changed.items()))
    parameters = sum(p.numel() for p in policy.parameters())
    tqdm.write(f"{parameters / 1e6:.1f} M parameters, {len(samples)} training samples, {len(val)} to evaluate on")
    if not val:
        tqdm.write("no evaluation: name records with --val")
    elif first == 0:
        evaluation["start"] = measure(0)
        write_evaluation()
    if "exact_sft" in evaluation:
        tqdm.write(summary("exact SFT, for comparison (the start was made coarse on purpose)", evaluation["exact_sft"]))

    metrics_file = open(out / "metrics.jsonl", "a", encoding="utf-8")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=args.schedule, unit="step")
    for step in bar:
        started = time.perf_counter()
        lr = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = sampler.indices(step)
        prompts = [task.prompt(samples[index]) for index in indices]
        noise = uniforms(args.seed, step, list(range(len(indices))), indices, args.group_size, args.max_tokens)
        tau = schedule.tau
        roll = rollout(actor, reference, task, prompts, noise, schedule, args)
        decision = schedule.observe(roll.iou.tolist())
        rolled = time.perf_counter()
        losses = update(policy, optimizer, roll, args)
        if actor is not policy:
            with torch.no_grad():
                torch._foreach_copy_(list(actor.parameters()), list(policy.parameters()))
        ended = time.perf_counter()

        done = step + 1
        row = {"step": done, "tau": tau, "hit_rate": decision.hit_rate, "sigma": decision.sigma}
        row |= {"margin": decision.margin, "decision": str(decision), "lr": lr} | rollout_metrics(roll) | losses
        row |= {"seconds": ended - started, "seconds_rollout": rolled - started, "seconds_update": ended - rolled}
        row |= {"peak_mb": peak_megabytes(args.device)}
        print(json.dumps(row), file=metrics_file, flush=True)
        if decision.tighten and args.schedule.startswith("medloc"):
            tqdm.write(f"step {done}: {decision}")
        shown = {"tau": "-" if tau is None else f"{tau:.2f}", "iou": f"{row['iou_mean']:.3f}"}
        shown |= {"hits": "-" if decision.hit_rate is None else f"{decision.hit_rate:.2f}"}
        shown |= {"flat": f"{row['zero_spread']:.2f}", "tok/s": f"{row['tokens'] / row['seconds']:.0f}"}
        bar.set_postfix(shown, refresh=False)

        bad_in_a_row = bad_in_a_row + 1 if losses["skipped"] else 0
        if bad_in_a_row:
            tqdm.write(f"step {done}: loss {row['loss']}, gradient norm {row['grad_norm']}: not finite, step skipped")
        if bad_in_a_row == PATIENCE:
            raise InputError(f"{PATIENCE} steps in a row had a non-finite loss or gradient; lower --lr or --grad-clip")
        if args.samples_every and (done % args.samples_every == 0 or done == 1):
            write_samples(out, done, roll, tau)
        last = done == args.steps
        if val and (last or args.eval_every and done % args.eval_every == 0):
            evaluation["history"].append({"step": done, **measure(done)})
            if last:
                evaluation["final"] = {k: v for k, v in evaluation["history"][-1].items() if k != "step"}
            write_evaluation()
        if last or done % args.save_every == 0:
            state = {"schedule": schedule.state_dict(), "bad_in_a_row": bad_in_a_row, "evaluation": evaluation}
            checkpoint.save(out, done, task, optimizer, state)
    metrics_file.close()
    failures = Counter(reason for group in roll.reasons for reason in group if reason) if first < args.steps else {}
    if failures:
        tqdm.write("last step, answers without a box: " + ", ".join(f"{n} x {r}" for r, n in failures.most_common()))
    tqdm.write(f"done: {out}/eval.json, metrics.jsonl, samples.jsonl, overlay-*.png, step-{args.steps:06d}/")


if __name__ == "__main__":
    errors.run(main)
