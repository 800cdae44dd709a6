"""The command lines of train_grpo.py, train_sft.py and eval.py: ONE ROW A FLAG, with its default and the reason for it.

Explicit flags > the resumed run's > the recipe's > the rows'. A flag that is unknown, or that would change nothing beside
the others, ends the program: in a grid, two runs that differ in a dead flag look like a finding. What --schedule, --loss
and --rewards say stands beside what it sets: scheduler.py, below, rewards.py.
"""

import argparse
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import errors
import loss
import ranks
import rewards
import scheduler
import settings
import weights
from data import check_text, held_out_phantoms
from errors import InputError, named, one_line, read_object
from prompts import check_style, prompt_style
from ranks import check_device
from settings import Settings, setting

CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each process that torchrun started
CUDA = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Flag:
    default: Any
    help: str
    kind: type = str
    least: float = -math.inf  # both for slips of the keyboard, which would run on without a word until
    most: float = math.inf  # the memory ends: the latter is some orders above what anybody has use for
    choices: tuple[str, ...] = ()
    free: bool = False  # a resumed run may change it: nothing that is free decides what is learned
    count: int | str | None = None  # of values, as argparse's nargs


def whole(default: int | None, help: str, least: int = 1, most: int = 10**9, free: bool = False) -> Flag:
    return Flag(default, help, int, least, most, free=free)


def switch(help: str, free: bool = False, default: bool | None = False) -> Flag:
    return Flag(default, help, bool, free=free)


ANSWERED = "answer, think, qwen, or a text file with {query} in it; none: what the policy was trained with, else think"
MODEL = Flag("nano", "checkpoint folder, nano, or org/name of the Hugging Face Hub")  # runs anywhere, no download
DATA = Flag("phantoms", "JSONL files, or phantoms[:dermoscopy|xray|ultrasound]")
DEVICE = Flag(CUDA, "cpu or cuda; bfloat16 on CUDA, float32 on a CPU, trained weights float32 on both", free=True)
OUTSIDE = switch("records may name pictures outside the folder of their file: absolute paths, and with ..", free=True)
CLIP_BOXES = switch("cut boxes that reach over the picture's edge, and count them")  # they may be in another frame
SKIP_BAD = whole(0, "records that may be unusable; they are left out and listed", 0, free=True)
MAX_PIXELS = whole(None, "largest picture that the policy sees, 784 pixels a token; none: its folder's", most=10**12)
SEED = whole(0, "of data order, phantoms and sampling", 0, 2**63 - 1)
SAVE_EVERY = whole(100, "steps between checkpoints; the last step is always saved", free=True)
# All stay, since nothing is deleted unasked; a 3B with its moments is 45 GB a checkpoint, so think of it there.
KEEP = whole(None, "checkpoints that stay, the newest; the others go once a new one is whole; none: all", free=True)
# One core stays with the step; four processes read 100 large pictures a second.
WORKERS = whole(min(4, max(CORES - 1, 0)), "processes that read pictures ahead; 0: when they are needed", 0, 256, True)

TRAINER = {  # title of a group in --help -> its flags
    "what": dict(
        model=MODEL,
        data=DATA,
        val=Flag(None, "records to evaluate on; none: held-out phantoms for phantoms"),
        out=Flag("out", "folder for everything the run writes; must be empty or new", free=True),
        prompt=Flag(None, f"wording of the question: {ANSWERED}"),
        max_pixels=MAX_PIXELS,
        allow_outside=OUTSIDE,
        clip_boxes=CLIP_BOXES,
        skip_bad=SKIP_BAD,
        seed=SEED,
    ),
    "GRPO (formulas: loss.py)": dict(
        recipe=Flag(None, "defaults: nano with --model nano, else paper", choices=("nano", "paper")),
        steps=whole(None, "rollouts", free=True),  # more is a longer run: the rate is constant after the warm-up
        batch_size=whole(None, "B, prompts per rollout, of all ranks together", most=10**5),
        group_size=whole(8, "G, completions per prompt", 2, 10**4),  # as in the paper
        micro_batch=whole(
            None, "prompts per forward pass: less memory, same result; none: as many as fit", most=10**5, free=True
        ),
        inner_steps=whole(1, "optimiser steps per rollout", most=10**3),  # on policy, and no pass for the old log-probs
        loss=Flag("grpo", "grpo, dapo or dr-grpo, what the token losses are averaged over; dapo:kl=k3+,overlong=mask"),
        lr=Flag(None, "learning rate of AdamW", float, 0, 10**4),
        warmup=whole(None, "steps of linear warm-up; constant afterwards", 0),
        temperature=Flag(None, "of sampling, and of all log-probs", float, 0, 10**4),
        max_tokens=whole(None, "longest completion", most=10**6),
        dynamic_sampling=whole(
            0, "K rounds of fresh prompts at most for groups without spread", 0, 10**3
        ),  # as the paper
        beta=Flag(None, "weight of the KL to the starting policy; 0 keeps no copy of it", float, 0, 10**4),
        # The same on both sides, as PPO; .2 .28 is DAPO's clip-higher.
        clip=Flag((0.2, 0.2), "LOW HIGH: ratios from 1 - LOW to 1 + HIGH have a gradient", float, 0, 10**4, count=2),
        advantage=Flag(None, "over the group; none: std, and none for dr-grpo", choices=("std", "none")),
    ),
    "reward": dict(
        rewards=Flag(None, "weights; 0 logs a reward without counting it"),
        schedule=Flag(("medloc",), "how u becomes the reward 'task': NAME[:key=value,...] [TASK=NAME...]", count="+"),
    ),
    "watching": dict(
        eval_every=whole(0, "steps between greedy evaluations; 0: at the start and the end", 0, free=True),
        eval_limit=whole(None, "samples per evaluation", free=True),
        save_every=SAVE_EVERY,
        keep=KEEP,
        log=Flag(None, "also to this package, which must be installed", choices=("wandb", "tensorboard"), free=True),
    ),
    "machine": dict(
        workers=WORKERS,
        device=DEVICE,
        lora_rank=whole(0, "train adapters of this rank (lora.py) and keep one frozen copy of all weights", 0, 10**4),
        freeze_vision=switch("leave the vision tower as it is; it then looks at a picture once a step"),
        shard=switch("spread weights, gradients, AdamW's moments and the reference over the ranks (FSDP2)", free=True),
        memory=Flag(
            None, "of the device, such as 24GB; with --estimate 4x80GB for 4 GPUs; none: what is free", free=True
        ),
        checkpointing=switch(
            "recompute activations in the backward pass; none: if it does not fit without", True, None
        ),
    ),
    "this start": dict(
        resume=switch("go on from the newest checkpoint in --out, or begin if there is no run in it"),
        estimate=switch("print what memory the run would take, and stop"),
        help_schedules=switch("print the schedules with their settings and the reasons for them, and stop"),
    ),
}
RECIPES = {  # of train_grpo.py
    "nano": dict(
        steps=200,
        batch_size=16,
        lr=1e-4,  # mIoU after 100 steps, seed 0: .718; 2e-4 .680, 4e-4 .581
        warmup=5,
        temperature=1.0,
        beta=0.0,  # no KL: the start is meant to be left behind
        max_tokens=24,  # a bare box is 16
        rewards="task=1",
        prompt=None,  # the one the policy was trained with, as its folder says
    ),
    "paper": dict(  # scheduler.py's marks: (s) of the paper's summaries, (?) ours
        steps=500,  # (?)
        batch_size=8,  # (?)
        lr=1e-6,  # (s)
        warmup=10,  # (?)
        temperature=0.9,  # (s)
        beta=0.04,  # (?) of the code that the paper builds on; one summary says .4
        max_tokens=512,  # (?)
        rewards="task=1,format=1",  # (?)
        prompt="think",  # (s)
    ),
}
SFT = {
    "what": dict(
        model=MODEL,
        data=DATA,
        val=Flag(None, "evaluated before and after; none: held-out phantoms for phantoms, else nothing"),
        out=Flag(None, "folder for checkpoints, metrics.jsonl and eval.json; must be empty or new", free=True),
        prompt=Flag(None, ANSWERED),
        max_pixels=MAX_PIXELS,
        allow_outside=OUTSIDE,
        clip_boxes=CLIP_BOXES,
        skip_bad=SKIP_BAD,
        seed=SEED,
    ),
    "training": dict(
        steps=whole(200, "optimiser steps"),  # not free: the cosine ends there
        batch_size=whole(32, "answers per optimiser step", most=10**5),
        micro_batch=whole(32, "answers per forward pass", most=10**5, free=True),
        lr=Flag(5e-4, "learning rate; 1e-5 suits a 3B policy", float, 0, 10**4),
        warmup=whole(50, "steps of linear warm-up"),
        max_tokens=whole(None, "of an answer in evaluations", most=10**6),
        coarse=switch("jittered, inflated boxes"),
        coarse_shift=Flag(0.22, "std of the centre's shift, in box sizes", float, 0, 10),  # exp() of 10 is large
        coarse_scale=Flag(0.8, "mean of the log of the size factor", float, -10, 10),
        coarse_spread=Flag(0.35, "std of the log of the size factor", float, 0, 10),
    ),
    "machine": dict(
        save_every=SAVE_EVERY, keep=KEEP, workers=WORKERS, device=DEVICE, resume=TRAINER["this start"]["resume"]
    ),
}
EVAL = {
    "what": dict(
        model=MODEL,
        data=DATA,
        train=Flag(None, "training data: adds the row of the constant answer"),
        predictions=Flag(None, "score these answers instead of running a model"),
        image=Flag(None, "ask about one picture; prints the answer, writes overlay.png"),
        query=Flag(None, "with --image: what to look for"),
        out=Flag("out-eval", "folder for eval.json, predictions.jsonl, sheet.png"),
        prompt=Flag(None, ANSWERED),
        max_tokens=whole(None, "of an answer; none: 24 for the prompt 'answer', else 512", most=10**6),
        allow_outside=OUTSIDE,
        clip_boxes=CLIP_BOXES,
        limit=whole(None, "evaluate the first N samples"),
        batch_size=whole(50, "answers at a time", most=10**5),
        device=DEVICE,
    )
}
PROGRAMS = {"train_grpo.py": TRAINER, "train_sft.py": SFT, "eval.py": EVAL}
FLAGS = {name: flag for group in TRAINER.values() for name, flag in group.items()}
SWITCHES = (
    "resume",
    "begins",
    "estimate",
    "help_schedules",
    "ranks",
    "dtype",
    "saved_steps",
)  # of this start: not in config.json

SETS = "is a setting of the schedule now: --schedule medloc:"
GONE = dict.fromkeys(
    "tau_start tau_target window unit stale refresh min_margin beta1 beta2 delta0".split(), SETS + "{}="
)
GONE |= dict.fromkeys(("check_reward", "check_stability", "check_margin"), SETS + "{}=off")
GONE |= dict.fromkeys(("stages", "min_hit_rate", "max_sigma"), SETS + "stages=0:.8:.2/.6:.75:.35/.75:.55:.4 (tau:P:S)")
GONE |= {"delta_schedule": SETS + "delta=cosine", "soft_scale": "is --schedule medloc-soft:scale= now"}
GONE |= {"fixed_tau": "is --schedule fixed:tau= now", "kl": "is --loss grpo:kl= now"}
GONE |= {
    "overlong": "is --loss grpo:overlong=mask now",
    "queries": "is a preparing step now: python -m prepare.queries",
}
GONE |= dict.fromkeys(("clip_low", "clip_high"), "is --clip LOW HIGH now, such as --clip .2 .28")
GONE |= {"ranks": "is in --memory now: --estimate --memory 4x80GB", "grad_clip": "is GRAD_CLIP in train_grpo.py now"}
GONE |= dict.fromkeys(("dtype", "decode"), "follows --device now: bfloat16 and CUDA graphs on a GPU")
GONE |= {"lora_alpha": "is ALPHA in lora.py now", "pixel_limit": "is PIXEL_LIMIT in images.py now"}
GONE |= {"samples_every": "is SAMPLES_EVERY in runtime/run.py now", "make_nano": "is python -m prepare.nano now"}
GONE |= {"deterministic": "is torch.use_deterministic_algorithms(True) in a script of yours now"}
GONE |= {"keep_exact": "is python -m prepare.nano --keep-exact now"}


@dataclass(frozen=True)
class Loss(Settings):
    """What stands behind a name of loss.KINDS."""

    kl: str = setting("k3", "estimator: k3 is TRL's and VLM-R1's, k3+ has the right gradient", *loss.KLS)
    overlong: str = setting("keep", "answers that were cut off: a lesson, or masked out (DAPO's)", "keep", "mask")


def read_loss(text: str) -> tuple[str, str, str]:
    """ "dapo:kl=k3+" -> (kind, kl, overlong)."""
    kind, found = settings.read(text, "--loss", dict.fromkeys(loss.KINDS, Loss))
    return kind, found.kl, found.overlong


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------------------- reading


def parse(program: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The resolved flags. Unknown, impossible and contradictory ones end the program with one sentence, exit code 2."""
    parser, flags = make_parser(program), {n: f for group in PROGRAMS[program].values() for n, f in group.items()}
    for word in sys.argv[1:] if argv is None else argv:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if word.startswith("--") and name in GONE and name not in flags:
            parser.error(f"{word.partition('=')[0]} {GONE[name].format(name)}")
    explicit = vars(parser.parse_args(argv))
    if explicit.pop("help_schedules", False):
        print(settings.explained({name: kind.Settings for name, kind in scheduler.SCHEDULES.items()}))
        parser.exit()
    if program == "train_sft.py" and "out" not in explicit:
        parser.error("--out is needed: the folder for the trained checkpoint")
    known = {name: flag.default for name, flag in flags.items()}
    saved, state = {}, {}
    if "resume" in flags:
        explicit, saved, state = resumption(parser, explicit, flags)
    if program == "train_grpo.py":
        model = explicit.get("model", saved.get("model", known["model"]))
        recipe = explicit.get("recipe", saved.get("recipe")) or ("nano" if model == "nano" else "paper")
        known |= RECIPES[recipe] | {"recipe": recipe}
    args = argparse.Namespace(**known | saved | explicit | state)
    if program == "train_grpo.py":
        resolve(args, saved)
    for sentence in wrong(args, flags, explicit):
        parser.error(sentence)
    return args


def make_parser(program: str) -> argparse.ArgumentParser:
    """Only flags that were given end up in its namespace: what is missing comes from elsewhere."""
    parser = errors.Parser(prog=program, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for title, flags in PROGRAMS[program].items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            default = flag.default
            if program == "train_grpo.py" and name in RECIPES["nano"]:
                default = f"{RECIPES['nano'][name]}, paper's recipe {RECIPES['paper'][name]}"
            options: dict = {"help": f"{flag.help} (default {default})".replace("%", "%%")}
            if flag.kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = prompt_style if name == "prompt" else flag.kind
                options |= {"nargs": flag.count} if flag.count else {}
                options |= {"choices": flag.choices} if flag.choices else {}
            group.add_argument(option(name), **options)
    return parser


def resumption(parser, explicit: dict, flags: dict[str, Flag]) -> tuple[dict, dict, dict]:
    """--resume, or torchrun's second start -> (flags that were given, those of the run in --out, {resume, begins})."""
    file = Path(explicit.get("out", flags["out"].default)) / "config.json"
    asked = explicit  # what must be as in the run
    if restarted() and "resume" not in explicit and file.is_file():
        # The command line is that of the beginning; the first start may have failed because another run is in --out.
        asked = {name: flag.default for name, flag in flags.items()} | explicit
        explicit = explicit | {"resume": True}
    wanted, there = bool(explicit.get("resume")), os.path.lexists(file)
    state = {"resume": wanted and there, "begins": wanted and not there}
    if not state["resume"]:
        return explicit, {}, state
    saved = read_saved(file, flags)
    same = weights.is_hub_name(explicit.get("model", "")) and explicit["model"] == saved["model"].partition("@")[0]
    pin = {"model": saved["model"]} if same else {}  # with the commit that the run began with
    explicit, asked = explicit | pin, asked | pin
    for name in sorted(asked.keys() & saved.keys()):
        given = list(asked[name]) if isinstance(asked[name], tuple) else asked[name]
        if not flags[name].free and given not in (None, saved[name]):
            was = f"--resume goes on with {option(name)} {saved[name]}, not {given}"
            parser.error(f"{was}: drop {option(name)} or start a new run")
    return explicit, saved, state


def resolve(args: argparse.Namespace, saved: dict) -> None:
    """What of train_grpo.py's flags follows from others."""
    args.ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.estimate and (found := re.match(r"(\d{1,4})x", args.memory or "")):
        args.ranks = int(found[1])
    args.schedule = list(args.schedule)
    if args.advantage is None:
        args.advantage = "none" if args.loss.startswith("dr-grpo") else "std"
    args.saved_steps = saved.get("steps")


def restarted() -> bool:
    """Has torchrun started this process in place of one that failed? Then the command line is that of the beginning."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def same_threads(file: Path) -> str:
    """Have torch use as many threads as the run of a config.json did: sums are split among them, so their last digits
    hang on it. OMP_NUM_THREADS goes before. -> what is to be said about it, "" if they are the same."""
    before, told = read_object(file).get("threads"), os.environ.get("OMP_NUM_THREADS")
    if type(before) is not int or before < 1:
        raise InputError(f"{file}: field 'threads' is {before!r:.80}; restore it, or start a new run")
    if told is None:
        torch.set_num_threads(min(before, os.cpu_count() or 1))
    if (now := torch.get_num_threads()) == before:
        return ""
    why = f"this machine has {os.cpu_count()} cores" if told is None else f"OMP_NUM_THREADS is {told:.20}"
    return f"the run had {before} threads, now it has {now} ({why}): the last digits of sums may differ"


def read_saved(file: Path, flags: dict[str, Flag]) -> dict:
    """The arguments of a run's config.json, but for --out: they are of the folder that it lies in. InputError for those
    that no flag could have given."""
    remedy = "restore it, or start a new run"
    saved = read_object(file, remedy).get("arguments")
    if not isinstance(saved, dict):
        raise InputError(f"{file}: field 'arguments' is no object; {remedy}")
    if missing := [name for name in flags if name not in saved and name not in SWITCHES]:
        raise InputError(f"{file}: field 'arguments' has no {missing[0]}, so another version wrote it; {remedy}")
    for name, value in saved.items():
        if name not in flags:
            raise InputError(f"{file}: field {one_line(name)!r} of 'arguments' is no flag of this version; {remedy}")
        flag = flags[name]
        if value is None and (flag.default is None or name in RECIPES["nano"]):
            continue
        values = value if flag.count and isinstance(value, list) else [value]
        counted = isinstance(value, list) == bool(flag.count) and flag.count in (None, "+", len(values)) and values
        if not counted or not all(is_kind(one, flag.kind) and one in (flag.choices or [one]) for one in values):
            raise InputError(f"{file}: {option(name)} is {one_line(repr(value))} in it; {remedy}")
    for sentence in out_of_bounds(argparse.Namespace(**saved), flags):
        raise InputError(f"{file}: {sentence}; {remedy}")
    with named(file):
        if saved.get("prompt"):
            with named("--prompt"):
                check_style(saved["prompt"])
    return {name: value for name, value in saved.items() if name != "out"}


def is_kind(value: object, kind: type) -> bool:
    """Whether JSON's value is one that a flag of this kind has. A number with a point may be written without."""
    if kind is float and type(value) is int and abs(value) >= 2**1023:  # too large for one
        return False
    return type(value) in ((float, int) if kind is float else (kind,))


# ------------------------------------------------------------------------------------------------------------ refusing

# NUL and lone surrogates, which no file's name and no text in UTF-8 can have, and what would steer a terminal.
UNFIT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def out_of_bounds(args: argparse.Namespace, flags: dict[str, Flag]) -> Iterator[str]:
    """A sentence for each flag whose value is too small, too large, no finite number or no text."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                yield f"{option(name)} must be a finite number, not {one}"
            if isinstance(one, str) and UNFIT.search(one):
                yield f"{option(name)} {one_line(one)} holds a character that no name has: NUL, a control or no UTF-8"
            if name in flags and flags[name].kind in (int, float) and one is not None:
                if one < flags[name].least:
                    yield f"{option(name)} must be at least {flags[name].least}"
                if one > flags[name].most:
                    yield f"{option(name)} must be at most {flags[name].most}"


def wrong(args: argparse.Namespace, flags: dict[str, Flag], explicit: dict) -> Iterator[str]:
    """What cannot be right about the flags, a sentence each; `explicit` holds those that were given."""
    yield from out_of_bounds(args, flags)
    for name in ("lr", "temperature"):
        if name in flags and not getattr(args, name) > 0:
            yield f"{option(name)} must be above 0"
    try:
        if "predictions" in flags:
            yield from wrong_questions(args)
        if "schedule" in flags:
            yield from wrong_grpo(args, explicit)
        if not (getattr(args, "estimate", False) and re.fullmatch(r"cuda(:\d\d?)?", args.device)):  # that needs no GPU
            check_device(ranks.own_device(args.device))
    except InputError as error:
        yield str(error)


def wrong_questions(args: argparse.Namespace) -> Iterator[str]:
    if (args.image is None) != (args.query is None):
        yield "--image and --query go together"
    if args.query is not None:
        with named("--query"):
            args.query = check_text(args.query, "query")


def wrong_grpo(args: argparse.Namespace, explicit: dict) -> Iterator[str]:
    weights, (_, kl, _) = {}, read_loss(args.loss)
    try:
        weights = rewards.read_weights(args.rewards)
    except InputError as error:
        yield f"--rewards: {error}"
    general, by_task = rewards.split_schedules(args.schedule)
    for text in (general, *by_task.values()):
        name, _ = rewards.read_schedule(text)
        if args.saved_steps not in (None, args.steps) and scheduler.SCHEDULES[name].by_share:
            yield f"--schedule {name} goes by the share of the steps: --steps must stay {args.saved_steps}"
    if not held_out_phantoms(args.data) and not args.val:
        for name in sorted(explicit.keys() & {"eval_every", "eval_limit"}):
            yield f"{option(name)} needs --val: there is nothing to evaluate on"
    if args.clip[0] >= 1:
        yield "--clip: LOW must be below 1: ratios are above 0, so nothing would ever be clipped"
    idle = {  # flags that would change nothing
        "clip": (args.inner_steps == 1, "--inner-steps 1: every ratio is exactly 1"),
        "freeze_vision": (args.lora_rank > 0, "--lora-rank: only the adapters are trained"),
        "schedule": (not weights.get(rewards.MAIN), f"--rewards {args.rewards}: the schedule's reward does not count"),
    }
    for name, (nothing, why) in idle.items():
        if nothing and name in explicit:
            yield f"{option(name)} changes nothing beside {why}; drop it"
    if kl != "k3" and args.beta == 0:
        yield f"--loss {args.loss}: kl changes nothing beside --beta 0, there is no KL; drop it"
    if args.memory is not None and not re.fullmatch(r"(\d{1,4}x)?\d{1,9}(\.\d{1,9})?GB", args.memory):
        yield f"--memory wants a number of GB such as 24GB, not {args.memory!r:.40}"
    elif args.memory and "x" in args.memory and not args.estimate:
        yield f"--memory {args.memory} is for --estimate; a run has as many GPUs as torchrun starts processes"
    if args.ranks > 1 and args.device.startswith("cuda:"):
        yield f"--device {args.device} is one GPU for all processes: give --device cuda, and each takes its own"
    if args.shard and args.ranks == 1:
        how = "give --memory 4x80GB" if args.estimate else "start it by torchrun --nproc-per-node=N"
        yield f"--shard spreads the weights over several processes, this is one: {how}"
    if args.shard and args.lora_rank:
        yield "--shard is for weights that are trained, --lora-rank freezes them: drop one of the two"


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
