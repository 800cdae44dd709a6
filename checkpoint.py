"""What a run needs to go on exactly: the policy as a Hugging Face folder, and the trainer's state beside it.

    out/step-000100/   model.safetensors (fp32 master weights), config.json, tokenizer ...   a Hugging Face folder
                       trainer.safetensors   AdamW's two moments of every parameter
                       trainer.json          format version, step, counters, state of the schedule

There is no random state to save: data order and sampling follow from (seed, step, sample). A checkpoint is written
under a temporary name and renamed when it is whole, so a folder called step-... is a whole one.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import InputError

FORMAT = 1  # of trainer.json and trainer.safetensors


def save(out: Path, step: int, task, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write out/step-<step>/; `state` is what load() gives back, ready for JSON."""
    folder, partial = out / f"step-{step:06d}", out / f".partial-step-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that died while saving
    task.save(partial)
    moments, steps = {}, 0
    for name, parameter in task.policy.named_parameters():
        if held := optimizer.state.get(parameter):  # empty before the first optimiser step
            moments |= {f"{key}.{name}": held[key].contiguous() for key in ("exp_avg", "exp_avg_sq")}
            steps = int(held["step"])
    save_file(moments, partial / "trainer.safetensors")
    whole = {"format": FORMAT, "step": step, "optimizer_steps": steps, **state}
    (partial / "trainer.json").write_text(json.dumps(whole, indent=1) + "\n")
    if folder.exists():  # a resumed run comes past this step again
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def newest(out: Path) -> Path:
    """The checkpoint of the highest step in a run's folder."""
    folders = [f for f in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", f.name) and (f / "trainer.json").exists()]
    if not folders:
        raise InputError(f"--resume: {out} holds no checkpoint step-...; start without --resume, in a new folder")
    return max(folders, key=lambda f: int(f.name.removeprefix("step-")))


def load(folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the optimiser and return the state that save() was given, with `step`. The policy is loaded already."""
    try:
        state = json.loads((folder / "trainer.json").read_text())
        moments = load_file(folder / "trainer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder}: the trainer's state cannot be read ({error}); remove this step to use one before"
        ) from None
    if state.get("format") != FORMAT:
        raise InputError(
            f"{folder}/trainer.json: format {state.get('format')} is not {FORMAT}, which this version reads"
        )
    for name, parameter in policy.named_parameters():
        if not moments:
            break
        optimizer.state[parameter] = {
            key: moments[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")
        } | {"step": torch.tensor(float(state["optimizer_steps"]))}
    return state
