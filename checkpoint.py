"""What a run needs to go on exactly: the policy as a Hugging Face folder, and the trainer's state beside it.

    out/step-000100/   model.safetensors (fp32, adapters merged), config.json, tokenizer ...: a Hugging Face folder
                       trainer.safetensors   AdamW's two moments of every trained parameter; adapters, if there are any
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

import lora
import ranks
from errors import InputError
from model import Policy

FORMAT = 2  # of trainer.json and trainer.safetensors
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


def save(out: Path, step: int, task, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write out/step-<step>/; `state` is what load() gives back, ready for JSON. Rank 0 writes; where the policy is
    sharded all ranks must call it, and all that they do together comes before the first byte is written."""
    folder, partial = out / f"step-{step:06d}", out / f".partial-step-{step:06d}"
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that died while saving
    try:
        return _save(folder, partial, step, task, optimizer, state)
    except (OSError, SafetensorError) as error:  # a full disk, most of the time
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder} cannot be written ({error}); free the disk, then go on by --resume") from error


def _save(folder: Path, partial: Path, step: int, task, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    # The folder holds adapters merged into the weights, from which they cannot be had back.
    tensors = {f"adapter.{name}": p.detach() for name, p in task.policy.adapters().items()}
    steps = 0
    for name, parameter in task.policy.named_parameters():
        if held := optimizer.state.get(parameter):  # empty before the first optimiser step
            moments = {f"{key}.{name}": ranks.whole(held[key]).contiguous() for key in MOMENTS}
            steps = int(held["step"])
            if ranks.rank == 0:
                tensors |= {key: moment.cpu() for key, moment in moments.items()}  # gathered ones do not fit elsewhere
    task.save(partial, torch.float32)  # also where adapters are merged into bfloat16 weights: they may be that small
    if ranks.rank > 0:
        return folder
    save_file(tensors, partial / "trainer.safetensors")
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


def load(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, wanted_state: tuple[str, ...] = ()) -> dict:
    """Fill the optimiser and return the state that save() was given, with `step`; it must have the fields wanted.

    The policy is loaded already: from this folder; with adapters from the folder the run started from, then lora.add,
    and its adapters are filled here.
    """
    try:
        state = json.loads((folder / "trainer.json").read_text())
        tensors = load_file(folder / "trainer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder}: the trainer's state cannot be read ({error}); remove this step to use one before"
        ) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(f"{folder}/trainer.json: format {found} is not {FORMAT}, which this version reads")
    if missing := {"step", "optimizer_steps", *wanted_state} - state.keys():
        raise InputError(
            f"{folder}/trainer.json: field {min(missing)!r} is missing; remove this step to use one before"
        )
    adapters = policy.adapters()
    if (then := lora.rank_of(tensors)) != (now := lora.rank_of(adapters)):
        raise InputError(
            f"{folder}: the run has adapters of rank {then}, this policy of rank {now} (0: none); "
            "--lora-rank must be as in the run"
        )

    count = state["optimizer_steps"]  # 0: saved before the first one, when there are no moments
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad and count > 0}
    wanted = {f"adapter.{name}": parameter for name, parameter in adapters.items()}
    wanted |= {f"{key}.{name}": parameter for name, parameter in trained.items() for key in MOMENTS}
    there, here = ({key: tuple(tensor.shape) for key, tensor in some.items()} for some in (tensors, wanted))
    if differing := there.items() ^ here.items():
        key = min(differing)[0]
        raise InputError(
            f"{folder}/trainer.safetensors: {key} has shape {there.get(key)}, this policy asks for {here.get(key)} "
            "(None: it is missing); train the same weights of the same model as in the run"
        )
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[f"adapter.{name}"])
    for name, parameter in trained.items():
        device = parameter.device  # for the step too: the fused AdamW wants it there
        moments = {key: ranks.like(tensors[f"{key}.{name}"], parameter) for key in MOMENTS}
        optimizer.state[parameter] = moments | {"step": torch.tensor(float(count), device=device)}
    return state
