"""The numbers of a step: a row of metrics.jsonl, a line of samples.jsonl with its picture, Weights & Biases,
TensorBoard.

metrics.jsonl holds everything, and experiments/plot.py draws it; neither package is needed. u is what an answer is
worth (of a box its IoU).
"""

import json
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from errors import InputError
from eval import overlay, rounded, sheet
from rewards import MAIN, REWARDS
from rollout import GroupScores, Rollout
from scheduler import Decision, hit
from tasks import TASKS, CaptionTask


def schedule_metrics(decisions: dict[tuple[str, str], Decision]) -> dict:
    """tau (under which the step was rewarded), the window's statistics, the decision; with several (dataset, task)
    each name once a key: tau/ham10000/box."""
    row = {}
    for key, decision in decisions.items():
        end = "/" + "/".join(key) if len(decisions) > 1 else ""
        for name in ("tau", "hit_rate", "sigma", "margin"):
            row[name + end] = getattr(decision, name)
        row["decision" + end] = str(decision)
    return row


def rollout_metrics(everyone: GroupScores, taus: dict[tuple[str, str], float | None]) -> dict:
    """Of all that was rolled out, on all ranks. A group without spread has no hit (too hard), or hits only (too
    easy)."""
    quartiles = everyone.u.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    best = [(u, taus[key]) for u, key in zip(everyone.u.amax(1).tolist(), everyone.keys, strict=True)]
    missed = [not hit(u, tau) for u, tau in best if tau is not None]
    named = {name: f"reward_{name}" if name in (MAIN, *REWARDS) else f"{name}_mean" for name in everyone.parts}
    parts = {named[name]: own_part(everyone, name).nanmean().item() for name in everyone.parts}
    return (
        parts
        | judge_metrics(everyone)
        | {
            "u_mean": everyone.u.mean().item(),
            "u_q25": quartiles[0],
            "u_q50": quartiles[1],
            "u_q75": quartiles[2],
            "reward_mean": everyone.reward.mean().item(),
            "zero_spread": 1 - everyone.spread.float().mean().item(),
            "no_hit": fmean(missed) if missed else None,
            "parse_failures": 1 - (everyone.reason == 0).float().mean().item(),
            "truncated": everyone.truncated.float().mean().item(),
            "tokens": int(everyone.length.sum()),
            "groups": len(everyone.u),
        }
        | key_metrics(everyone, list(taus))
    )


def own_part(everyone: GroupScores, name: str) -> Tensor:
    """(n, G) of a part, of the groups whose task has it."""
    having = {task for _, task in everyone.keys if name in TASKS[task].parts}
    own = [not having or task in having for _, task in everyone.keys]
    return everyone.parts[name][torch.tensor(own, dtype=torch.bool)]


def judge_metrics(everyone: GroupScores) -> dict:
    """Whose verdicts the captions' are, and of how many answers there is none."""
    if CaptionTask.judge is None or "unjudged" not in everyone.parts:
        return {}
    return {"judge": CaptionTask.judge.name, "unjudged": int(own_part(everyone, "unjudged").sum())}


def key_metrics(everyone: GroupScores, keys: list[tuple[str, str]]) -> dict:
    """With several (dataset, task): what each has of the step, u_mean/ham10000/box and so on. advantage_share: of the
    sum of |A|, so of what moves the policy. One that the step has no group of has 0 of it: left out, a mean over steps
    would be one over those that it is in."""
    row: dict = {}
    if len(keys) < 2:
        return row
    total = everyone.advantage.abs().sum().item()
    for key in keys:
        own, end = torch.tensor([other == key for other in everyone.keys]), "/" + "/".join(key)
        reward, some = everyone.reward[own], bool(own.any())
        row |= {
            "u_mean" + end: everyone.u[own].mean().item() if some else None,
            "reward_mean" + end: reward.mean().item() if some else None,
            "group_std" + end: reward.std(1).mean().item() if some else None,
            "zero_spread" + end: 1 - everyone.spread[own].float().mean().item() if some else None,
            "advantage_share" + end: everyone.advantage[own].abs().sum().item() / total if total else None,
            "groups" + end: len(reward),
        }
    return row


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


def json_line(row: dict) -> str:
    """One line of strict JSON: a number that is not finite becomes null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def write_samples(out: Path, step: int, roll: Rollout, taus: list[float | None]) -> None:
    """One group in full to samples.jsonl, four groups as a picture overlay-<step>.png."""
    prompt = roll.prompts[0]
    record = {
        "step": step,
        "source": prompt.sample.source,
        "prompt": prompt.text,
        "target": prompt.target,
        "tau": taus[0],
        "texts": roll.texts[0],
        "answers": rounded(roll.answers[0], 2),
        "u": rounded(roll.u[0].tolist(), 4),
        "rewards": rounded(roll.reward[0].tolist(), 4),
        "advantages": rounded(roll.advantage[0].tolist(), 4),
        "reasons": roll.reasons[0],
    }
    with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)
    tiles = []
    for prompt, group, us, tau in list(zip(roll.prompts, roll.answers, roll.u.tolist(), taus, strict=True))[:4]:
        threshold = "" if tau is None else f", tau {tau:.2f}"
        caption = f"step {step}: {TASKS[prompt.sample.task].unit} {fmean(us):.2f} (best {max(us):.2f}){threshold}"
        tiles.append(overlay(prompt.sample, group, caption))
    sheet(tiles, 2).save(out / f"overlay-{step:06d}.png")


class Wandb:
    """wandb.ai; a resumed run is a new one in the same group. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out: Path, config: dict, first: int):
        with opened("wandb"):
            import wandb

            group, name = out.name, f"{out.name}-{first}"
            self.run = wandb.init(project="medloc-grpo", group=group, name=name, dir=out, config=config)

    def write(self, row: dict) -> None:
        self.run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out/tensorboard: tensorboard --logdir out."""

    def __init__(self, out: Path, config: dict, first: int):
        with opened("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=first + 1)

    def write(self, row: dict) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


LOGS = {"wandb": Wandb, "tensorboard": TensorBoard}  # metrics.jsonl holds everything all the same


def numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}


@contextmanager
def opened(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(f"--log {name}: the package is not installed (pip install {name}), or drop --log") from error
    except Exception as error:  # wandb without a login raises its own kinds
        raise InputError(f"--log {name}: cannot be opened ({error!s:.200}); drop --log, or mend that") from error
