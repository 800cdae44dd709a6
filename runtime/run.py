"""A run and its folder --out: begin or go on, metrics.jsonl, samples.jsonl, pictures, evaluations, checkpoints.

    out, start = begin(args, "train_grpo.py", ending)     the folder, locked; the checkpoint to go on from, if any
    run = Run(...); run.open(start)
    for step in run.steps():
        with run.saving(step): ...                        a step that fails or is stopped costs only itself
        run.log(step, ...)                                and evaluates and saves where that is due
    run.finish()

Nothing here decides what is learned. Numbers are global; times, memory, samples and overlays are those of rank 0.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

import errors
import ranks
import tasks
from config import check_digests, describe, restarted, same_threads
from data import BadRecords, first_of_each
from errors import InputError
from eval import evaluate, overlay, sheet
from images import Sample
from model import Policy
from prompts import Processor
from rewards import Schedules
from rollout import GroupScores, Rollout
from runtime import checkpoint, lock
from runtime.diagnose import Watch
from runtime.metrics import (
    LOGS,
    json_line,
    peak_megabytes,
    resident_megabytes,
    rollout_metrics,
    schedule_metrics,
    write_samples,
)
from runtime.state import check_schedules, check_state
from runtime.stream import Stream
from scheduler import Decision
from tasks import TASKS

LINES = "metrics.jsonl", "samples.jsonl"
SAMPLES_EVERY = 20  # steps between lines of samples.jsonl, each with an overlay; the first step has one too
SUMMARY = {  # of each dataset at a run's end: metric -> in words
    "u_mean": "u",
    "reward_mean": "reward",
    "group_std": "its std in a group",
    "zero_spread": "dead groups",
    "advantage_share": "share of |A|",
}
PATIENCE = 5  # steps with a non-finite loss or gradient in a row before the run stops


def begin(args, program: str, ending: ExitStack) -> tuple[Path, Path | None]:
    """Make --out this run's -> (the folder; the newest checkpoint in it, where the run goes on). Nothing is written
    yet, so that a refused run leaves nothing behind."""
    if args.begins:
        ranks.print0(f"--resume: {args.out} holds no run yet, so this begins one")
    out = checkpoint.check_out(args.out, args.resume)
    ranks.on_rank0(lambda: ending.enter_context(lock.held(out)))
    checkpoint.check_out(args.out, args.resume)  # as it is now that nobody else writes to it
    if not args.resume:
        return out, None
    check_digests(out / "config.json", args)
    if words := same_threads(out / "config.json"):
        ranks.print0(words)
    ranks.on_rank0(lambda: checkpoint.tidy(out))
    saved = checkpoint.checkpoints(out)
    ranks.on_rank0(lambda: checkpoint.verify(saved[-1]) if saved else None)
    why = "started again by torchrun" if restarted() else "--resume"
    ranks.print0(
        f"{why}: " + (f"going on from {saved[-1]}" if saved else f"{out} has no checkpoint yet, so from step 0")
    )
    return out, saved[-1] if saved else None


def by_dataset(metrics: Path, steps: int = 20) -> list[str]:
    """Of a run with several (dataset, task) a line for each: how SUMMARY was over the first and the last steps."""
    with open(metrics, encoding="utf-8") as file:  # line by line: of a long run it may not fit into the memory
        first = [json.loads(line) for line in islice(file, steps)]
        last = deque(first, steps)
        last.extend(map(json.loads, deque(file, steps)))
    lines = []
    for key in (name.removeprefix("u_mean/") for name in (last or [{}])[-1] if name.startswith("u_mean/")):
        words = []
        for name, said in SUMMARY.items():
            ends = ([row.get(f"{name}/{key}") for row in part] for part in (first, last))
            known = ([value for value in end if value is not None] for end in ends)
            words.append(f"{said} " + " -> ".join(f"{fmean(values):.3f}" if values else "-" for values in known))
        lines.append(f"{key}: {', '.join(words)} (means of {len(last)} steps)")
    return lines


class Run:
    """What a GRPO run keeps beside the policy: counters, evaluations, files."""

    def __init__(
        self,
        args,
        out: Path,
        policy: Policy,
        actor: Policy,  # is evaluated: what is measured is what would be deployed
        processor: Processor,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        schedules: Schedules,
        val: list[Sample],
        evaluation_batch: int,
        bad: BadRecords,
        ending: ExitStack,
    ):
        self.args, self.out, self.ending = args, out, ending
        self.policy, self.actor, self.processor, self.optimizer = policy, actor, processor, optimizer
        self.stream, self.schedules, self.bad = stream, schedules, bad
        self.val, self.evaluation_batch = first_of_each(val, args.eval_limit), evaluation_batch
        self.done = self.bad_in_a_row = 0
        self.evaluation: dict[str, Any] = {"start": None, "final": None, "history": []}
        self.latest: tuple[int, int] | None = None  # what the newest checkpoint holds: steps, evaluations
        self.watch, self.last = Watch(), None
        self.bar, self.metrics, self.logger = None, None, None

    # ------------------------------------------------------------------------------------------- begin, go on, save

    def resume(self, start: Path) -> None:
        """Fill optimiser, stream and schedules with what a verified checkpoint has."""
        state = checkpoint.load(start, self.policy, self.optimizer)
        check_state(start, state, self.args.batch_size, self.args.inner_steps)
        check_schedules(start, state, self.schedules.of)
        self.done, self.bad_in_a_row, self.evaluation = state["step"], state["bad_in_a_row"], state["evaluation"]
        if self.done > self.args.steps:
            raise InputError(f"--steps {self.args.steps}: {start} has {self.done} already; give more, or a new --out")
        self.stream.drawn = state["drawn"]
        self.bad.sentences |= state["bad"]
        self.schedules.load_state_dict(state["schedule"])
        if norms := self.schedules.norms:
            norms.load_state_dict(state.get("norms"), f"{start}/trainer.json")
        self.latest = self.done, len(self.evaluation["history"])

    def open(self) -> None:
        """Write the first files, once nothing can be refused any more, and say what is going to run."""
        config = describe(self.args)

        def write() -> None:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                for name in LINES:
                    checkpoint.keep_until(self.out / name, self.done, each=name == "metrics.jsonl")
                checkpoint.write_whole(self.out / "config.json", json.dumps(config, indent=2) + "\n")
                if self.args.log:
                    self.logger = LOGS[self.args.log](self.out, config, self.done)
                    self.ending.callback(self.logger.close)
            except OSError as error:
                raise InputError(f"--out {self.out}: cannot be written ({error}); name another folder") from None

        ranks.gather_objects(lambda: None)  # all have found --out as it was
        ranks.on_rank0(write)
        ranks.print0(" ".join(f"{name}={value}" for name, value in vars(self.args).items() if value is not None))
        for line in self.bad.lines():
            ranks.print0(line)
        parameters = list(self.policy.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        ranks.print0(
            f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
            f"{len(self.stream.samples)} training samples, {len(self.val)} to evaluate on"
        )
        path = self.out / "metrics.jsonl" if ranks.rank == 0 else os.devnull
        self.metrics = self.ending.enter_context(open(path, "a", encoding="utf-8"))
        self.ending.enter_context(errors.listening())
        if not self.val:
            ranks.print0("no evaluation: name records with --val")
        elif not self.evaluation["start"]:
            self.evaluation["start"] = self.measure(0)
            self.write_evaluation()
        if "exact_sft" in self.evaluation:
            words = "exact SFT, for comparison (the start was made coarse on purpose)"
            ranks.print0(tasks.summary(words, self.evaluation["exact_sft"]))
        if self.done:
            self.evaluate_if_due(self.done)
            self.save(self.done, self.stream.drawn)

    def save(self, step: int, drawn: int) -> None:
        """The checkpoint of `step` steps, for which `drawn` places of the stream were used up, unless it is there."""
        now = step, len(self.evaluation["history"])
        if self.latest == now:
            return
        state = {
            "schedule": self.schedules.state_dict(),
            "norms": self.schedules.norms and self.schedules.norms.state_dict(),
            "bad_in_a_row": self.bad_in_a_row,
            "drawn": drawn,
            "bad": self.bad.sentences,
            "evaluation": self.evaluation,
        }

        def sync() -> None:  # a checkpoint must find its lines there, after a power cut too
            for file in (self.out / name for name in LINES):
                if file.exists():
                    checkpoint.sync(file)

        def write() -> str:
            keep = self.args.keep
            return str(checkpoint.save(self.out, step, self.policy, self.processor, self.optimizer, state, keep))

        ranks.on_rank0(sync)
        (ranks.gather_objects if self.args.shard else ranks.on_rank0)(write)
        self.latest = now

    # --------------------------------------------------------------------------------------------------- evaluation

    def measure(self, step: int) -> dict:
        """Greedy answers to the evaluation set; the first six as a picture, so that steps can be laid side by side."""
        with ranks.unsharded(self.actor):
            result, rows = evaluate(
                self.actor, self.processor, self.val, self.evaluation_batch, self.args.max_tokens, "evaluation"
            )
        ranks.print0(tasks.summary(f"step {step}", result))

        def draw() -> None:
            tiles = []
            for sample, row in zip(self.val[:6], rows, strict=False):
                caption = f"step {step}: {TASKS[sample.task].unit} {row['u']:.2f}"
                tiles.append(overlay(sample, [row["answer"]], caption, side=180))
            sheet(tiles, 6).save(self.out / f"sheet-{step:06d}.png")

        ranks.on_rank0(draw)
        return result

    def write_evaluation(self) -> None:
        text = json.dumps(self.evaluation, indent=2) + "\n"
        ranks.on_rank0(lambda: checkpoint.write_whole(self.out / "eval.json", text))

    def evaluate_if_due(self, step: int) -> None:
        """After `step` steps. A resumed run makes up for what a stop, or a failure, has kept from being done."""
        last, history, every = step == self.args.steps, self.evaluation["history"], self.args.eval_every
        if not self.val or not (last or every and step % every == 0):
            return
        if not history or history[-1]["step"] != step:
            try:
                history.append({"step": step, **self.measure(step)})
            except Exception:  # a picture that vanished, no memory: the steps are done all the same
                self.save(step, self.stream.drawn)
                raise
        if last:
            self.evaluation["final"] = {k: v for k, v in history[-1].items() if k != "step"}
        self.write_evaluation()

    # -------------------------------------------------------------------------------------------------------- steps

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0."""
        todo, silent = range(self.done, self.args.steps), ranks.rank > 0
        name = " ".join(self.args.schedule)
        self.bar = tqdm(todo, initial=self.done, total=self.args.steps, desc=name, unit="step", disable=silent)
        for step in self.bar:
            self.started = time.perf_counter()
            yield step

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a step: what was learned before it is saved, where it is stopped or its pictures cannot be read."""
        drawn = self.stream.drawn
        try:
            yield
        except ranks.Together as error:
            self.save(step, drawn)
            raise InputError(f"{error}. All up to step {step} is saved: repair it and go on by --resume") from error
        except errors.Stopped:
            self.save(step, drawn)
            raise

    def log(
        self, step: int, everyone: GroupScores, roll: Rollout, losses: dict, decisions: dict[tuple[str, str], Decision]
    ) -> None:
        """A step is done, counted from 0: its row, what is to be said of it, and what is due after it."""
        done, args, leads = step + 1, self.args, ranks.rank == 0
        last, seconds = done == args.steps, time.perf_counter() - self.started
        taus = {key: decision.tau for key, decision in decisions.items()}
        row = {"step": done} | schedule_metrics(decisions) | {"lr": self.optimizer.param_groups[0]["lr"]}
        row |= {"drawn": self.stream.drawn} | rollout_metrics(everyone, taus)
        row["dropped"] = int((~everyone.spread).sum()) if args.dynamic_sampling else 0
        row |= losses | {"seconds": seconds, "seconds_rollout": seconds - losses["seconds_update"]}
        row |= {"seconds_input": self.stream.seconds}  # of seconds_rollout
        row |= {"peak_mb": peak_megabytes(args.device), "resident_mb": resident_megabytes()}
        print(json_line(row), file=self.metrics, flush=True)
        if self.logger:
            self.logger.write(row)
        for key, decision in decisions.items():
            if decision.tighten and not self.schedules.of[key].kind.by_share:  # those rise at every step
                ranks.print0(f"step {done}: {'/'.join(key) + ': ' if len(decisions) > 1 else ''}{decision}")
        if row["dropped"] == row["groups"]:
            ranks.print0(f"step {done}: none of {row['groups']} groups had spread, no update")
        if row.get("unjudged"):
            why = tasks.CaptionTask.judge.why
            ranks.print0(f"step {done}: {row['unjudged']} answers have no verdict of the judge ({why})")
        mine = [taus[prompt.sample.key] for prompt in roll.prompts]
        if leads and (paragraph := self.watch.add(roll, mine, last)):
            ranks.print0(f"step {done}{', rank 0' if ranks.size > 1 else ''}: {paragraph}")
        self.show(row, decisions)

        self.bad_in_a_row = self.bad_in_a_row + 1 if losses["skipped"] else 0
        if self.bad_in_a_row:
            words = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            ranks.print0(f"step {done}: {words}: not finite, step skipped")
        if self.bad_in_a_row >= PATIENCE:
            raise InputError(
                f"{PATIENCE} steps in a row had a non-finite loss or gradient; "
                "start anew with a lower --lr, from --model or a step-... of this run"
            )
        if leads and roll.prompts and (done % SAMPLES_EVERY == 0 or done == 1):
            write_samples(self.out, done, roll, mine)
        self.done, self.last = done, everyone
        self.evaluate_if_due(done)
        if last or done % args.save_every == 0:
            self.save(done, self.stream.drawn)

    def show(self, row: dict, decisions: dict[tuple[str, str], Decision]) -> None:
        """On the bar."""
        taus = sorted({decision.tau for decision in decisions.values() if decision.tau is not None})
        rates = [decision.hit_rate for decision in decisions.values() if decision.hit_rate is not None]
        shown = {"tau": "-".join(f"{tau:.2f}" for tau in (*taus[:1], *taus[1:][-1:])) or "-"}
        shown |= {"u": f"{row['u_mean']:.3f}", "hits": f"{fmean(rates):.2f}" if rates else "-"}
        shown |= {"flat": f"{row['zero_spread']:.2f}", "tok/s": f"{row['tokens'] / row['seconds']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)

    def finish(self) -> None:
        """The last words."""
        if self.last is not None:
            names = tasks.reasons()
            failures = Counter(names[i] for i in self.last.reason.flatten().tolist() if i)
            if failures:
                words = ", ".join(f"{n} x {r}" for r, n in failures.most_common())
                ranks.print0(f"last step, answers that could not be read: {words}")
        ranks.on_rank0(lambda: [ranks.print0(line) for line in by_dataset(self.out / "metrics.jsonl")])
        files = f"eval.json, metrics.jsonl, samples.jsonl, overlay-*.png, step-{self.args.steps:06d}/"
        ranks.print0(f"done: {self.out}/{files}")
