"""The tasks by their names, and what concerns all of them."""

from collections.abc import Sequence

import torch

import settings
from errors import InputError, one_line
from images import Sample
from judge import Judge
from prompts import Prompt
from tasks.box import BoxTask
from tasks.boxes import BoxesTask
from tasks.caption import CaptionTask
from tasks.dense import DenseTask
from tasks.grade import GradeTask
from tasks.grades import CvsTask, SkillTask
from tasks.label import LabelTask
from tasks.next import NextTask
from tasks.span import SpanTask
from tasks.task import Scores, Task
from tasks.tube import TubeTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        BoxTask(), BoxesTask(), LabelTask(), GradeTask(), NextTask(), SkillTask(), CvsTask(), SpanTask(), TubeTask(),
        CaptionTask(), DenseTask(),
    )
}  # fmt: skip  # enter yours here


def read_settings(texts: Sequence[str]) -> dict[str, settings.Settings]:
    """--tasks grade:ordinal=linear ... -> name -> its settings. InputError names what there is."""
    found = {}
    for text in texts:
        name, chosen = settings.read(text, "--tasks", {name: task.Settings for name, task in TASKS.items()})
        if name in found:
            raise InputError(f"--tasks: {name} is named twice")
        found[name] = chosen
    return found


def configure(
    texts: Sequence[str] | None, used: set[str], judge: Judge | None = None, samples: Sequence[Sample] = ()
) -> None:
    """Set every task as --tasks says, all others as they are by default; judge: of captions; samples: all that were
    read. InputError for what reaches no record."""
    chosen = read_settings(texts or ())
    if idle := chosen.keys() - used:
        raise InputError(f"--tasks {min(idle)}: no record has the task {min(idle)!r}; drop it")
    if judge and not used & judged():
        raise InputError(f"--judge: no record has the task {' or '.join(sorted(judged()))}; drop it")
    CaptionTask.judge = judge
    for name, task in TASKS.items():
        task.settings = chosen.get(name, task.Settings())
        task.begin([sample for sample in samples if sample.task == name])


def judged() -> set[str]:
    """Tasks whose answers are judged."""
    return {name for name, task in TASKS.items() if isinstance(task, CaptionTask)}


def terms() -> set[str]:
    """Names beside rewards.REWARDS that --rewards may weigh: of what u is made of in some task."""
    return {term for task in TASKS.values() for term in task.terms}


def ahead(texts: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Begin what by_task() will have to wait for."""
    names = [prompt.sample.task for prompt in prompts]
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        TASKS[name].ahead([texts[i] for i in rows], [prompts[i] for i in rows])


def reasons() -> list[str]:
    """All reasons why an answer cannot be read, "" first: what ranks tell each other is an index into this."""
    return ["", *sorted({reason for task in TASKS.values() for reason in task.reasons if reason})]


def summary(name: str, metrics: dict) -> str:
    """An evaluation's metrics (eval.metrics, of one task or of several) as a line for the terminal."""
    parts = metrics["tasks"] if "tasks" in metrics else {metrics.get("task", "box"): metrics}
    words = [TASKS[task].summary(part) for task, part in parts.items()]
    if len(words) > 1:
        words = [f"{task}: {line}" for task, line in zip(parts, words, strict=True)]
    return f"{one_line(name)}: {'; '.join(words)}"


def by_task(texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
    """N answers, each scored by its sample's task; a part that a task does not have is 0."""
    names = [prompt.sample.task for prompt in prompts]
    n, found = len(texts), {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        scores = TASKS[name].score([texts[i] for i in rows], [prompts[i] for i in rows])
        if len(rows) == n:
            return scores
        found[name] = rows, scores
    parts = {part: torch.zeros(n) for name in found for part in TASKS[name].parts}
    whole = Scores(torch.zeros(n), torch.zeros(n, dtype=torch.bool), [""] * n, [None] * n, parts)
    for rows, scores in found.values():
        whole.u[rows], whole.valid[rows] = scores.u, scores.valid
        for i, reason, answer in zip(rows, scores.reasons, scores.answers, strict=True):
            whole.reasons[i], whole.answers[i] = reason, answer
        for part, values in scores.parts.items():
            parts[part][rows] = values
    return whole
