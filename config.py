"""The command line of train_grpo.py: every flag with its default and the reason for it, and the two recipes.

Explicit flags > the resumed run's > the recipe's > DEFAULTS. A flag that is unknown, or that would change nothing
beside the others, ends the program: in a grid, two runs that differ in a dead flag look like a finding.
"""

import argparse
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch

import errors
import hub
import loss
import ranks
import rewards
import scheduler
from data import check_style, held_out_phantoms, prompt_style
from errors import InputError, named, one_line
from images import PIXEL_LIMIT
from logs import LOGS
from plan import read_memory
from ranks import check_device
from scheduler import ScheduleConfig
from weights import read_json

CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process that torchrun started
DEFAULTS = dict(
    model="nano",  # runs anywhere, no download
    data="phantoms",
    val=None,  # held-out phantoms for phantoms; for files it must be named
    queries=None,  # records are asked for in their own words
    out="out",
    pixel_limit=PIXEL_LIMIT,
    allow_outside=False,  # a file of records is data of others, mostly
    clip=False,  # a box that reaches out of its picture may be in another frame
    max_pixels=None,  # what the checkpoint says; the published ones allow 16,384 tokens an image
    schedule="medloc",
    group_size=8,  # G, as in the paper
    inner_steps=1,  # optimiser steps per rollout; 1 is on policy, and needs no pass for the old log-probs
    loss="grpo",
    clip_low=0.2,
    clip_high=0.2,  # .28 is DAPO's clip-higher
    kl="k3",  # what TRL and VLM-R1 have; k3+ has the right gradient
    overlong="keep",  # an answer that was cut off has no box and learns so; mask is DAPO's
    dynamic_sampling=0,  # off, as in the paper
    grad_clip=1.0,
    lora_rank=0,  # 0: all weights are trained
    lora_alpha=64.0,  # adapters count alpha / rank
    freeze_vision=False,
    shard=False,  # each rank holds all weights: the fastest, where they fit
    micro_batch=None,  # prompts per pass: as many as fit (plan.py)
    checkpointing=None,  # off, if as many prompts fit without: a third more time for a fraction of the memory
    memory=None,  # what the device has to spare
    skip_bad=0,
    eval_every=0,  # 0: at the start and the end only
    eval_limit=None,
    samples_every=20,
    save_every=100,
    keep=None,  # all, since nothing is deleted unasked; 3B with its moments is 45 GB a checkpoint, so think of it there
    log=None,  # metrics.jsonl alone
    workers=min(4, max(CORES - 1, 0)),  # one core stays with the step; four read 100 large pictures a second
    seed=0,
    device="cuda" if torch.cuda.is_available() else "cpu",
    dtype=None,  # of the arithmetic: bfloat16 on CUDA, float32 on a CPU; trained weights are float32 on both
    decode=None,  # graph on CUDA, eager on a CPU
    deterministic=False,  # CPU runs are anyway; on CUDA it costs time
)
RECIPES = {
    "nano": dict(
        prompt=None,  # the one the policy was trained with, as its folder says
        steps=200,
        batch_size=16,  # prompts per optimiser step
        lr=1e-4,  # mIoU after 100 steps, seed 0: .718; 2e-4 .680, 4e-4 .581
        warmup=5,
        temperature=1.0,
        beta=0.0,  # no KL: the start is meant to be left behind
        max_tokens=24,  # a bare box is 16
        rewards="box=1",
    ),
    "paper": dict(  # scheduler.py's marks: (s) of the paper's summaries, (?) ours
        prompt="think",  # (s)
        steps=500,  # (?)
        batch_size=8,  # (?)
        lr=1e-6,  # (s)
        warmup=10,  # (?)
        temperature=0.9,  # (s)
        beta=0.04,  # (?) of the code that the paper builds on; one summary says .4
        max_tokens=512,  # (?)
        rewards="box=1,format=1",  # (?)
    ),
}
CHOICES = scheduler.CHOICES | {
    "dtype": ("float32", "bfloat16"),
    "loss": loss.KINDS,
    "kl": loss.KLS,
    "overlong": ("keep", "mask"),
    "log": tuple(LOGS),
    "decode": ("eager", "graph"),
}
TYPES = dict.fromkeys(("val", "queries", "prompt", "dtype", "log", "decode"), str)  # of flags whose default is None
TYPES |= dict.fromkeys(("eval_limit", "max_pixels", "keep"), int)
TYPES |= {"micro_batch": int, "checkpointing": bool, "memory": str}  # None: plan.py decides
TYPES |= {"max_tokens": int, "out": str, "keep_exact": str}  # None in train_sft.py
# What a resumed run may change: nothing here decides what is learned. More --steps is a longer run (the learning rate
# is constant after the warm-up); schedules that go by the share of the steps refuse it themselves.
FREE_ON_RESUME = {"resume", "out", "steps", "device", "eval_every", "eval_limit", "samples_every", "save_every", "log"}
FREE_ON_RESUME |= {"keep", "workers", "skip_bad", "pixel_limit", "allow_outside", "memory", "checkpointing", "shard"}
FREE_ON_RESUME |= {"decode", "micro_batch"}  # round a little differently, no more
SWITCHES = ("resume", "begins", "estimate", "ranks")  # of this start alone: config.json does not have them

GROUPS = {  # title -> flag -> help
    "what": dict(
        model="checkpoint folder, nano, or org/name of the Hugging Face Hub",
        data="JSONL files, or phantoms[:dermoscopy|xray|ultrasound]",
        val="records to evaluate on",
        out="folder for everything the run writes; must be empty or new",
        prompt="wording of the question: answer, think, qwen, or a text file with {query} in it",
        queries="JSON file: what the records call it -> the phrase to ask with, or a list to choose from",
        max_pixels="largest picture that the policy sees, 784 pixels a token; larger ones are scaled down",
        pixel_limit="pixels of the largest picture file that is opened: a guard against decompression bombs",
        allow_outside="records may name pictures outside the folder of their file: absolute paths, and with ..",
        clip="cut boxes that reach over the picture's edge, and count them",
        skip_bad="records that may be unusable; they are left out and listed",
        seed="of data order, phantoms and sampling",
    ),
    "GRPO (formulas: loss.py)": dict(
        steps="rollouts",
        group_size="G, completions per prompt",
        batch_size="prompts per rollout",
        micro_batch="prompts per forward pass: less memory, same result; None: as many as fit",
        inner_steps="optimiser steps per rollout",
        loss="what the token losses are averaged over",
        lr="learning rate of AdamW",
        warmup="steps of linear warm-up; constant afterwards",
        grad_clip="largest gradient norm",
        temperature="of sampling, and of all log-probs",
        max_tokens="longest completion",
        overlong="completions without an end: keep them in the loss, or mask them out of it",
        dynamic_sampling="K rounds at most of fresh prompts in place of groups without spread; what is left is dropped",
        beta="weight of the KL to the starting policy; 0 keeps no copy of it",
        kl="its estimator",
        clip_low="1 - this is the smallest ratio that still has a gradient, where A < 0",
        clip_high="1 + this is the largest, where A > 0",
    ),
    "reward schedule (what each is and where it comes from: scheduler.py)": dict(
        rewards="weights; 0 logs a reward without counting it",
        schedule="how IoU becomes the reward 'box'",
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
    ),
    "watching": dict(
        eval_every="steps between greedy evaluations; 0: at the start and the end",
        eval_limit="samples per evaluation",
        samples_every="steps between samples.jsonl lines and overlays; 0: never",
        save_every="steps between checkpoints; the last step is always saved",
        keep="checkpoints that stay, the newest; the others are removed once a new one is whole; None: all",
        log="also to this package, which must be installed",
    ),
    "machine": dict(
        workers="processes that read the next step's pictures during this one; 0: each is read when it is needed",
        device="cpu or cuda",
        dtype="of the arithmetic; weights are trained in float32",
        lora_rank="train adapters of this rank in the decoder (lora.py) and keep one frozen copy of all weights",
        lora_alpha="adapters are scaled by alpha / rank",
        freeze_vision="leave the vision tower as it is; it then looks at a picture once a step",
        shard="spread weights, gradients, AdamW's moments and the reference over the ranks (FSDP2)",
        memory="what the run may take of the device, such as 24GB; None: what it has to spare",
        checkpointing="recompute activations in the backward pass; None: if it does not fit without",
        decode="run each decode step as operators, or replay it as a CUDA graph (generate.py)",
        deterministic="refuse operations that may differ from run to run",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Only flags that were given end up in its namespace: what is missing comes from elsewhere."""
    parser = errors.Parser(
        prog="train_grpo.py",
        description="GRPO for visual grounding with a reward curriculum; what a step does: train_grpo.py",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe = "the nano one with --model nano, else the paper's"
    parser.add_argument("--recipe", choices=tuple(RECIPES), help=f"defaults of what follows (default: {recipe})")
    begins = "go on from the newest checkpoint in --out, or begin if there is no run in it"
    parser.add_argument("--resume", action="store_true", help=begins)
    parser.add_argument("--estimate", action="store_true", help="print what memory the run would take, and stop")
    parser.add_argument("--ranks", type=int, help="with --estimate: GPUs to plan for, where torchrun does not say it")
    known = DEFAULTS | RECIPES["nano"] | asdict(ScheduleConfig())
    for title, helps in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            default = known[name]
            if name in RECIPES["nano"]:
                default = f"{default}, paper's recipe {RECIPES['paper'][name]}"
            options: dict = {"help": f"{text} (default {default})"}
            kind = TYPES.get(name, type(known[name]))
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif kind is tuple:
                options |= {"type": float, "nargs": len(known[name])}
            else:
                options["type"] = prompt_style if name == "prompt" else kind
            choices = CHOICES | {
                "schedule": tuple(scheduler.SCHEDULES)
            }  # now: a fork's own schedule is registered late
            if name in choices:
                options["choices"] = choices[name]
            group.add_argument(flag(name), **options)
    return parser


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The resolved flags. Unknown, impossible and contradictory ones end the program with one sentence, exit code 2."""
    parser = make_parser()
    explicit = vars(parser.parse_args(argv))
    saved, file = {}, Path(explicit.get("out", DEFAULTS["out"])) / "config.json"
    asked = explicit  # what must be as in the run
    if restarted() and "resume" not in explicit and file.is_file():
        asked = resolve(explicit, {})  # all of it: the first start may have failed because another run is in --out
        explicit["resume"] = True
    asked_to, there = bool(explicit.get("resume")), os.path.lexists(file)
    if asked_to and there:
        saved = read_saved(file)
        explicit, asked = pinned(explicit, saved), pinned(asked, saved)
        refuse_changes(parser, asked, saved, FREE_ON_RESUME)
    switches = {
        "estimate": bool(explicit.get("estimate")),
        "resume": asked_to and there,
        "begins": asked_to and not there,
    }
    switches["ranks"] = explicit.get("ranks", int(os.environ.get("WORLD_SIZE", 1)))
    args = argparse.Namespace(**resolve(explicit, saved) | switches)
    for sentence in wrong(args, explicit):
        parser.error(sentence)
    return args


def pinned(flags: dict, saved: dict) -> dict:
    """The flags; where --model is the saved run's name on the Hub, with the commit that the run began with."""
    same = hub.is_name(flags.get("model", "")) and flags["model"] == saved.get("model", "").partition("@")[0]
    return flags | {"model": saved["model"]} if same else flags


def refuse_changes(parser: argparse.ArgumentParser, asked: dict, saved: dict, free: Iterable[str]) -> None:
    """End the program where a flag asks for something else than the run that is resumed, and is not free to."""
    for name in sorted(asked.keys() & saved.keys() - set(free)):
        given = list(asked[name]) if isinstance(asked[name], tuple) else asked[name]
        if given not in (None, saved[name]):
            parser.error(
                f"--resume goes on with {flag(name)} {saved[name]}, not {given}: drop {flag(name)} or start a new run"
            )


def resolve(explicit: dict, saved: dict) -> dict:
    """All flags, from those that were given, the resumed run's, the recipe's and the defaults."""
    model = explicit.get("model", saved.get("model", DEFAULTS["model"]))
    recipe = explicit.get("recipe", saved.get("recipe", "nano" if model == "nano" else "paper"))
    return asdict(ScheduleConfig()) | DEFAULTS | RECIPES[recipe] | saved | explicit | {"recipe": recipe}


def restarted() -> bool:
    """Has torchrun started this process in place of one that failed? Then the command line is that of the beginning."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def same_threads(file: Path) -> str:
    """Have torch use as many threads as the run of a config.json did: sums are split among them, so their last digits
    hang on it. OMP_NUM_THREADS goes before. -> what is to be said about it, "" if they are the same."""
    before, told = read_json(file).get("threads"), os.environ.get("OMP_NUM_THREADS")
    if type(before) is not int or before < 1:
        raise InputError(f"{file}: field 'threads' is {before!r:.80}; restore it, or start a new run")
    if told is None:
        torch.set_num_threads(min(before, os.cpu_count() or 1))
    if (now := torch.get_num_threads()) == before:
        return ""
    why = f"this machine has {os.cpu_count()} cores" if told is None else f"OMP_NUM_THREADS is {told:.20}"
    return f"the run had {before} threads, now it has {now} ({why}): the last digits of sums may differ"


def read_saved(file: Path, known: dict | None = None) -> dict:
    """The arguments of a run's config.json, but for --out: they are of the folder that it lies in. InputError for those
    that no flag could have given. known: the flags of the program with their defaults, by itself train_grpo.py's."""
    remedy = "restore it, or start a new run"
    content = errors.read_json(file, remedy)
    saved = content.get("arguments") if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        raise InputError(f"{file}: field 'arguments' is no object; {remedy}")
    known = known or DEFAULTS | RECIPES["nano"] | asdict(ScheduleConfig()) | {"recipe": "nano"}
    limited = CHOICES | {"schedule": tuple(scheduler.SCHEDULES), "recipe": tuple(RECIPES)}
    for name, value in saved.items():
        if name not in known:
            raise InputError(f"{file}: field {one_line(name)!r} of 'arguments' is no flag of this version; {remedy}")
        if value is None and known[name] is None:
            continue
        fine = is_kind(value, TYPES.get(name, type(known[name])))
        if isinstance(known[name], tuple):
            fine = fine and len(value) == len(known[name]) and all(is_kind(number, float) for number in value)
        if not fine or (name in limited and value not in limited[name]):
            raise InputError(f"{file}: {flag(name)} is {one_line(repr(value))} in it; {remedy}")
    for sentence in out_of_bounds(argparse.Namespace(**saved)):
        raise InputError(f"{file}: {sentence}; {remedy}")
    if saved.get("prompt"):
        with named(f"{file}: --prompt"):
            check_style(saved["prompt"])
    return {name: value for name, value in saved.items() if name != "out"}


def is_kind(value: object, kind: type) -> bool:
    """Whether JSON's value is one that a flag of this kind has. A number with a point may be written without."""
    if kind is float and type(value) is int and abs(value) >= 2**1023:  # too large for one
        return False
    kinds = {float: (float, int), tuple: (list,)}.get(kind, (kind,))
    return isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)


# What a flag of any of the programs must at least and may at most be. The latter is for slips of the keyboard, which
# would run on without a word until the memory ends: each is some orders above what anybody has use for.
LEAST = {
    1: "steps batch_size micro_batch inner_steps max_tokens save_every keep eval_limit limit max_pixels pixel_limit "
    "ranks",
    0: "warmup beta clip_low clip_high eval_every samples_every seed dynamic_sampling skip_bad lora_rank workers "
    "coarse_shift coarse_spread",
    -10: "coarse_scale",
}
MOST = {
    10: "coarse_scale coarse_shift coarse_spread",  # exp() of them is a box's size
    256: "workers",
    10**3: "dynamic_sampling inner_steps",
    10**4: "group_size lora_rank ranks lr temperature beta clip_high grad_clip lora_alpha",
    10**5: "batch_size micro_batch window",
    10**6: "max_tokens",
    10**9: "steps warmup eval_every samples_every save_every keep eval_limit limit skip_bad",
    10**12: "max_pixels pixel_limit",
    2**63 - 1: "seed",
}
# NUL and lone surrogates, which no file's name and no text in UTF-8 can have, and what would steer a terminal.
UNFIT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def out_of_bounds(args: argparse.Namespace) -> Iterator[str]:
    """A sentence for each flag of a program whose value is too small, too large, no finite number or no text."""
    values = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in values.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                yield f"{flag(name)} must be a finite number, not {one}"
            if isinstance(one, str) and UNFIT.search(one):
                yield f"{flag(name)} {one_line(one)} holds a character that no name has: NUL, a control or no UTF-8"
    for least, names in LEAST.items():
        for name in names.split():
            if name in values and values[name] < least:
                yield f"{flag(name)} must be at least {least}"
    for most, names in MOST.items():
        for name in names.split():
            if name in values and values[name] > most:
                yield f"{flag(name)} must be at most {most}"


def wrong(args: argparse.Namespace, explicit: dict) -> Iterator[str]:
    """What cannot be right about the flags, a sentence each; `explicit` holds those that were given."""
    yield from out_of_bounds(args)
    for name in ("lr", "temperature", "grad_clip", "lora_alpha"):
        if not getattr(args, name) > 0:
            yield f"{flag(name)} must be above 0"
    if args.group_size < 2:
        yield "--group-size must be at least 2: an answer alone has no group to be better than, its advantage is 0"
    if args.clip_low >= 1:
        yield "--clip-low must be below 1: ratios are above 0, so nothing would ever be clipped"
    weights = {}
    try:
        weights = rewards.read_weights(args.rewards)
    except InputError as error:
        yield f"--rewards: {error}"
    if not held_out_phantoms(args.data) and not args.val:
        for name in explicit.keys() & {"eval_every", "eval_limit"}:
            yield f"{flag(name)} needs --val: there is nothing to evaluate on"
    # Flags that would change nothing.
    idle = {
        "kl": (args.beta == 0, "--beta 0: there is no KL"),
        "clip_low": (args.inner_steps == 1, "--inner-steps 1: every ratio is exactly 1"),
        "clip_high": (args.inner_steps == 1, "--inner-steps 1: every ratio is exactly 1"),
        "lora_alpha": (args.lora_rank == 0, "--lora-rank 0: there are no adapters"),
        "freeze_vision": (args.lora_rank > 0, "--lora-rank: only the adapters are trained"),
    }
    piecewise = args.delta_schedule == "piecewise"
    idle |= dict.fromkeys(("beta1", "beta2"), (not piecewise, f"--delta-schedule {args.delta_schedule}"))
    idle["delta0"] = (piecewise, "--delta-schedule piecewise")
    idle["min_hit_rate"] = (not args.check_reward, "--no-check-reward")
    idle["max_sigma"] = (not args.check_stability, "--no-check-stability")
    idle["min_margin"] = (not args.check_margin, "--no-check-margin")
    own = scheduler.SCHEDULES[args.schedule].own
    for field in fields(ScheduleConfig):
        if field.name not in (*scheduler.WATCHING, *own):
            idle[field.name] = (True, f"--schedule {args.schedule}")
        elif not weights.get("box"):
            idle[field.name] = (True, f"--rewards {args.rewards}: the box does not count")
    for name, (nothing, why) in idle.items():
        if nothing and name in explicit:
            yield f"{flag(name)} changes nothing beside {why}; drop it"
    if args.decode == "graph" and not args.device.startswith("cuda"):
        yield f"--decode graph records a CUDA graph, --device {args.device} has none: give --decode eager"
    if "ranks" in explicit and not args.estimate:
        yield "--ranks is for --estimate; a run has as many as torchrun starts: torchrun --nproc-per-node=N"
    if args.ranks > 1 and args.device.startswith("cuda:"):
        yield f"--device {args.device} is one GPU for all processes: give --device cuda, and each takes its own"
    if args.shard and args.ranks == 1:
        how = "give --ranks N" if args.estimate else "start it by torchrun --nproc-per-node=N"
        yield f"--shard spreads the weights over several processes, this is one: {how}"
    if args.shard and args.lora_rank:
        yield "--shard is for weights that are trained, --lora-rank freezes them: drop one of the two"
    if args.shard and args.decode == "graph":
        yield "--decode graph replays weights at fixed addresses, --shard moves them: give --decode eager"
    try:
        if not (args.estimate and re.fullmatch(r"cuda(:\d\d?)?", args.device)):  # planning for a GPU needs none
            check_device(ranks.own_device(args.device))
        if args.memory is not None:
            read_memory(args.memory)
    except InputError as error:
        yield str(error)


def describe(args: argparse.Namespace) -> dict:
    """config.json: what was asked for, and with what it ran."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy", "pillow")}
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in SWITCHES},
        "versions": {"python": platform.python_version(), **packages},
        "git": git.stdout.strip() or None,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }
