"""The flags of train_grpo.py, train_sft.py and eval.py: ONE ROW A FLAG, with its default and the reason for it.

How they are read, resumed and refused: config.py. What --schedule, --loss and --rewards say stands beside what it sets:
scheduler.py, config.py, rewards.py.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

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
    joined: bool = False  # several words are one value, with commas


def whole(default: int | None, help: str, least: int = 1, most: int = 10**9, free: bool = False) -> Flag:
    return Flag(default, help, int, least, most, free=free)


def switch(help: str, free: bool = False, default: bool | None = False) -> Flag:
    return Flag(default, help, bool, free=free)


ANSWERED = "answer, think, qwen, or a text file with {query} in it; none: what the policy was trained with, else think"
MODEL = Flag(
    "nano", "checkpoint folder, nano, nano-tasks, nano-video, or org/name of the Hugging Face Hub"
)  # runs anywhere
FILES = "JSONL files, or phantoms[:dermoscopy|xray|ultrasound|grades|classes|named|kinds|several|captions|clips|tubes]"
DATA = Flag("phantoms", f"{FILES}; FILE=WEIGHT ...: a mixture", joined=True)
DEVICE = Flag(CUDA, "cpu or cuda; bfloat16 on CUDA, float32 on a CPU, trained weights float32 on both", free=True)
OUTSIDE = switch("records may name pictures outside the folder of their file: absolute paths, and with ..", free=True)
CLIP_BOXES = switch("cut boxes that reach over the picture's edge, and count them")  # they may be in another frame
SKIP_BAD = whole(0, "records that may be unusable; they are left out and listed", 0, free=True)
MAX_PIXELS = whole(
    None, "largest picture or frame that the policy sees, 784 pixels a token; none: its folder's", most=10**12
)
SEED = whole(0, "of data order, phantoms and sampling", 0, 2**63 - 1)
KNOWLEDGE = Flag(None, "FILE.json or records[:at=before,used=train,lines=shuffled]: a line on each option")
TASK_SETTINGS = Flag(None, "settings of tasks: grade:ordinal=linear ...; --help-schedules has them", count="+")
JUDGE = Flag(None, "of captions: http://HOST:PORT/v1:model=NAME[,key=ENV_NAME,...], or lexicon:FILE.json (no LLM)")
RECORDS = dict(
    max_pixels=MAX_PIXELS, allow_outside=OUTSIDE, clip_boxes=CLIP_BOXES, skip_bad=SKIP_BAD, seed=SEED,
    knowledge=KNOWLEDGE,
)  # fmt: skip
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
        **RECORDS,
    ),
    "GRPO (formulas: loss.py)": dict(
        recipe=Flag(
            None, "defaults: nano with --model nano, nano-tasks or nano-video, else paper", choices=("nano", "paper")
        ),
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
        advantage=Flag(
            None,
            "over the group, by its std, the batch's or none; unset: std, for dr-grpo none, for gdpo batch",
            choices=("std", "batch", "none"),
        ),
    ),
    "reward": dict(
        rewards=Flag(None, "weights; 0 logs a reward without counting it"),
        combine=Flag("sum", "of several rewards: added, or each taken over its group first", choices=("sum", "gdpo")),
        # MedGRPO's: norms.py. Written by eval.py --write-norms.
        normalise=Flag(None, "FILE.json[:k=3,refresh=N,...]: rewards of every dataset on one scale by its quartiles"),
        schedule=Flag(("medloc",), "how u becomes the reward 'task': NAME[:key=value,...] [TASK=NAME...]", count="+"),
        tasks=TASK_SETTINGS,
        judge=JUDGE,
    ),
    "watching": dict(
        eval_every=whole(0, "steps between greedy evaluations; 0: at the start and the end", 0, free=True),
        eval_limit=whole(None, "samples per evaluation, of each dataset alike", free=True),
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
        help_schedules=switch("print schedules and tasks with their settings and the reasons for them, and stop"),
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
        **RECORDS,
    ),
    "training": dict(
        steps=whole(200, "optimiser steps"),  # not free: the cosine ends there
        batch_size=whole(32, "answers per optimiser step", most=10**5),
        micro_batch=whole(32, "answers per forward pass", most=10**5, free=True),
        lr=Flag(5e-4, "learning rate; 1e-5 suits a 3B policy", float, 0, 10**4),
        warmup=whole(50, "steps of linear warm-up"),
        max_tokens=whole(None, "of an answer in evaluations", most=10**6),
        coarse=switch("jittered, inflated boxes; of captions with slots mostly the first option"),
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
        data=Flag("phantoms", FILES, joined=True),
        train=Flag(None, "training data: adds the row of the constant answer"),
        predictions=Flag(None, "score these answers instead of running a model"),
        image=Flag(None, "ask about one picture; prints the answer, writes overlay.png"),
        query=Flag(None, "with --image: what to look for"),
        out=Flag("out-eval", "folder for eval.json, predictions.jsonl, sheet.png"),
        prompt=Flag(None, ANSWERED),
        max_tokens=whole(None, "of an answer; none: 24 for the prompt 'answer', else 512", most=10**6),
        allow_outside=OUTSIDE,
        clip_boxes=CLIP_BOXES,
        knowledge=KNOWLEDGE,
        tasks=TASK_SETTINGS,
        judge=JUDGE,
        limit=whole(None, "evaluate the first N samples, of each dataset alike"),
        batch_size=whole(50, "answers at a time", most=10**5),
        submission=Flag(
            None, "FILE.json: also the answers as MedVidBench's leaderboard takes them; truths may be missing"
        ),
        write_norms=Flag(None, "FILE.json: the quartiles of each reward by dataset and task, for --normalise"),
        samples=whole(4, "with --write-norms: answers to each prompt; 0: one, greedy", 0, 10**4),
        temperature=Flag(1.0, "with --write-norms: of sampling, as in the training", float, 0, 10**4),
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
GONE |= {"clip": "is --clip-boxes now"}  # train_sft.py's and eval.py's; train_grpo.py's clip is another
GONE |= {"ranks": "is in --memory now: --estimate --memory 4x80GB", "grad_clip": "is GRAD_CLIP in train_grpo.py now"}
GONE |= dict.fromkeys(("dtype", "decode"), "follows --device now: bfloat16 and CUDA graphs on a GPU")
GONE |= {"lora_alpha": "is ALPHA in lora.py now", "pixel_limit": "is PIXEL_LIMIT in images.py now"}
GONE |= {"samples_every": "is SAMPLES_EVERY in runtime/run.py now", "make_nano": "is python -m prepare.nano now"}
GONE |= {"deterministic": "is torch.use_deterministic_algorithms(True) in a script of yours now"}
GONE |= {"keep_exact": "is python -m prepare.nano --keep-exact now"}
