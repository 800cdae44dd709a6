"""The command lines of train_grpo.py, train_sft.py and eval.py: how flags (flags.py) are read, resumed and refused.

Explicit flags > the resumed run's > the recipe's > the rows'. A flag that is unknown, or that would change nothing
beside the others, ends the program: in a grid, two runs that differ in a dead flag look like a finding.
"""

import argparse
import hashlib
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

import torch

import errors
import loss
import norms
import ranks
import rewards
import scheduler
import settings
import tasks
import weights
from data import check_text, held_out_phantoms, parts_of
from endpoint import Calls
from errors import InputError, named, one_line, read_object
from flags import GONE, PROGRAMS, RECIPES, SWITCHES, Flag
from judge import lexicon_file, split
from knowledge import Knowledge
from prompts import check_style, prompt_style
from ranks import check_device
from settings import Settings, setting


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
        print("--schedule\n" + settings.explained({name: kind.Settings for name, kind in scheduler.SCHEDULES.items()}))
        print("\n--judge\n" + settings.explained({"URL": Calls}))
        print("\n--tasks\n" + settings.explained({name: task.Settings for name, task in tasks.TASKS.items()}))
        parser.exit()
    if program == "train_sft.py" and "out" not in explicit:
        parser.error("--out is needed: the folder for the trained checkpoint")
    saved, state = {}, {}
    if "resume" in flags:
        explicit, saved, state = resumption(parser, explicit, flags)
    args = argparse.Namespace(**defaults(flags, saved | explicit) | saved | explicit | state)
    if program == "train_grpo.py":
        resolve(args, saved)
    for sentence in wrong(args, flags, explicit):
        parser.error(sentence)
    return args


def defaults(flags: dict[str, Flag], given: dict) -> dict:
    """The rows', and where there are recipes the one's that is given, or that suits the model."""
    rows = {name: flag.default for name, flag in flags.items()}
    if "recipe" not in flags:
        return rows
    recipe = given.get("recipe") or ("nano" if given.get("model", rows["model"]) in weights.OURS else "paper")
    return rows | RECIPES[recipe] | {"recipe": recipe}


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
                options |= {"nargs": "+", "action": Joined} if flag.joined else {}
                options |= {"choices": flag.choices} if flag.choices else {}
            group.add_argument(option(name), **options)
    return parser


class Joined(argparse.Action):
    """--data a.jsonl b.jsonl -> "a.jsonl,b.jsonl"."""

    def __call__(self, parser, namespace, values, option=None) -> None:
        setattr(namespace, self.dest, ",".join(values))


def resumption(parser, explicit: dict, flags: dict[str, Flag]) -> tuple[dict, dict, dict]:
    """--resume, or torchrun's second start -> (flags that were given, those of the run in --out, {resume, begins})."""
    file = Path(explicit.get("out", flags["out"].default)) / "config.json"
    asked = explicit  # what must be as in the run
    if restarted() and "resume" not in explicit and file.is_file():
        # The command line is that of the beginning; the first start may have failed because another run is in --out.
        asked = defaults(flags, explicit) | explicit
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
            was = f"--resume goes on with {option(name)} {one_line(str(saved[name]))}, not {one_line(str(given))}"
            parser.error(f"{was}: drop {option(name)} or start a new run")
    return explicit, saved, state


def resolve(args: argparse.Namespace, saved: dict) -> None:
    """What of train_grpo.py's flags follows from others."""
    args.ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.estimate and (found := re.match(r"(\d{1,4})x", args.memory or "")):
        args.ranks = int(found[1])
    args.schedule = list(args.schedule)
    if args.advantage is None:
        usual = "none" if args.loss.startswith("dr-grpo") else "std"
        args.advantage = "batch" if args.combine == "gdpo" else usual
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
    rows = defaults(flags, {})  # None where a run may have been begun without a value
    for name, value in saved.items():
        if name not in flags or name in SWITCHES:
            raise InputError(f"{file}: field {one_line(name)!r} of 'arguments' is no flag of this version; {remedy}")
        flag = flags[name]
        if value is None and rows[name] is None:
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
MEMORY = re.compile(r"([1-9]\d{0,3}x)?(?=[\d.]*[1-9])\d{1,9}(\.\d{1,9})?GB")  # 24GB, 4x80GB, and not nothing


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
        tasks.read_settings(getattr(args, "tasks", None) or ())
        if getattr(args, "judge", None) and not lexicon_file(args.judge):
            split(args.judge)
        shown = Knowledge(args.knowledge).shown if args.knowledge else None
        if shown and "predictions" in flags and shown.used == "train":
            yield "--knowledge: used=train is for training, here nothing is trained; drop it"
        if "coarse" in flags and not args.coarse:
            for name in sorted(name for name in explicit if name.startswith("coarse_")):
                yield f"{option(name)} changes nothing without --coarse; drop it, or give both"
        for name in ("val", "train", "data" if "predictions" in flags else ""):
            for part, weight in parts_of(getattr(args, name, None) or "", option(name)):
                if weight is not None:
                    yield f"{option(name)} {one_line(part)}={weight:g}: a weight is for data to train on; drop it"
        if "predictions" in flags:
            yield from wrong_questions(args, explicit)
        if "schedule" in flags:
            yield from wrong_grpo(args, explicit)
        if not (getattr(args, "estimate", False) and re.fullmatch(r"cuda(:\d\d?)?", args.device)):  # that needs no GPU
            check_device(ranks.own_device(args.device))
    except InputError as error:
        yield str(error)


def wrong_questions(args: argparse.Namespace, explicit: dict) -> Iterator[str]:
    for name in ("samples", "temperature"):
        if name in explicit and args.write_norms is None:
            yield f"{option(name)} changes nothing without --write-norms; drop it"
    if args.samples == 0 and "temperature" in explicit:
        yield "--temperature changes nothing beside --samples 0: greedy answers have none; drop it"
    if args.write_norms is not None and (args.predictions or args.image):
        yield "--write-norms asks a policy about --data: drop --predictions and --image"
    if args.write_norms is not None and args.submission is not None:
        yield "--write-norms wants answers that are known, under --submission some may be missing: drop one of the two"
    for name, beside, why in (
        ("knowledge", "image", "it asks for a box, which has no options"),
        ("knowledge", "predictions", "the answers are there already"),
        ("submission", "image", "that is one question, of no benchmark"),
        ("tasks", "image", "a box has no settings"),
        ("judge", "image", "a box is not judged"),
    ):
        if getattr(args, name) and getattr(args, beside):
            yield f"{option(name)} changes nothing beside {option(beside)}: {why}; drop it"
    if (args.image is None) != (args.query is None):
        yield "--image and --query go together"
    if args.query is not None:
        with named("--query"):
            args.query = check_text(args.query, "query")


def wrong_grpo(args: argparse.Namespace, explicit: dict) -> Iterator[str]:
    counting, (_, kl, _) = {}, read_loss(args.loss)
    try:
        counting = rewards.read_weights(args.rewards)
    except InputError as error:
        yield f"--rewards: {error}"
    general, by_task = rewards.split_schedules(args.schedule)
    for text in (general, *by_task.values()):
        name, _ = rewards.read_schedule(text)
        if args.saved_steps not in (None, args.steps) and scheduler.SCHEDULES[name].by_share:
            yield f"--schedule {name} goes by the share of the steps: --steps must stay {args.saved_steps}"
        if args.normalise and name != "raw" and counting.get(rewards.MAIN):
            yield f"--normalise is for --schedule raw: a reward of {name} is 0 or 1, or on a scale of its own already"
    if args.normalise:
        settings.behind_file(args.normalise, "--normalise", norms.Normalise)
    if args.combine == "gdpo" and sum(weight != 0 for weight in counting.values()) < 2:
        yield f"--combine gdpo changes nothing beside --rewards {args.rewards}: only one counts; drop it"
    if "judge" in counting and not args.judge:
        yield f"--rewards {args.rewards}: judge wants --judge, an endpoint or a lexicon"
    if not args.knowledge:
        for name in counting:
            if name.startswith("recite") and name != "recite-prompt":
                yield f"--rewards {args.rewards}: {name} has nothing to recite without --knowledge"
    if not held_out_phantoms(args.data) and not args.val:
        for name in sorted(explicit.keys() & {"eval_every", "eval_limit"}):
            yield f"{option(name)} needs --val: there is nothing to evaluate on"
    if args.clip[0] >= 1:
        yield "--clip: LOW must be below 1: ratios are above 0, so nothing would ever be clipped"
    idle = {  # flags that would change nothing
        "clip": (args.inner_steps == 1, "--inner-steps 1: every ratio is exactly 1"),
        "freeze_vision": (args.lora_rank > 0, "--lora-rank: only the adapters are trained"),
        "schedule": (not counting.get(rewards.MAIN), f"--rewards {args.rewards}: the schedule's reward does not count"),
    }
    for name, (nothing, why) in idle.items():
        if nothing and name in explicit:
            yield f"{option(name)} changes nothing beside {why}; drop it"
    if kl != "k3" and args.beta == 0:
        yield f"--loss {args.loss}: kl changes nothing beside --beta 0, there is no KL; drop it"
    if args.memory is not None and not MEMORY.fullmatch(args.memory):
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


def digests(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> sha256 of the file that decides what is learned beside the data."""
    files = {name: (getattr(args, name, None) or "").partition(":")[0] for name in ("knowledge", "normalise")}
    files["judge"] = lexicon_file(getattr(args, "judge", None))
    return {n: hashlib.sha256(Path(f).read_bytes()).hexdigest() for n, f in files.items() if f and os.path.isfile(f)}


def check_digests(file: Path, args: argparse.Namespace) -> None:
    """InputError if such a file is not any more as it was when the run of this config.json began."""
    before = read_object(file).get("sha256", {})
    for name, now in digests(args).items():
        if not isinstance(before, dict) or before.get(name) != now:
            was = "is not the file that the run began with; restore it, or start a new run"
            raise InputError(f"{option(name)} {one_line(getattr(args, name))} {was}")


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
        "sha256": digests(args),
    }
