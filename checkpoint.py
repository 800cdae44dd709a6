"""What a run needs to go on exactly: the policy as a Hugging Face folder, and the trainer's state beside it.

    out/step-000100/   model.safetensors (fp32, adapters merged), config.json, tokenizer ...: a Hugging Face folder
                       trainer.safetensors   AdamW's two moments of every trained parameter; adapters, if there are any
                       trainer.json          step, counters, state of the schedule
                       manifest.json         format version; size and CRC-32 of every other file

There is no random state to save: data order and sampling follow from (seed, step, sample).

A folder called step-... is a whole one: it is written under another name, brought to the disk file by file (fsync), and
renamed. Killed at any moment, in the middle of a save too, a run has the checkpoint before or the new one. The sums are
there for what comes later: a bad disk, a copy that broke off. They are no protection against forgery.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora
import ranks
from errors import InputError
from model import Policy

FORMAT = 3  # of trainer.json, trainer.safetensors and manifest.json
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
PARTIAL, OLD = ".partial-", ".old-"  # in front of a checkpoint's name: not whole yet, or not any more; just replaced
AT_ONCE = 2**24  # bytes read at a time


# --------------------------------------------------------------------------------------------------------------- files


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names that a folder holds."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(file: Path, text: str) -> None:
    """Replace a file's content. A kill leaves the old or the new one, and at most a .partial- file beside it."""
    partial = file.with_name(PARTIAL + file.name)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)


def stamp(file: Path) -> dict:
    """What the manifest says of a file."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(AT_ONCE):
            crc = zlib.crc32(block, crc)
        return {"bytes": opened.tell(), "crc32": f"{crc:08x}"}


def seal(partial: Path, folder: Path) -> None:
    """Give a folder its name, in place of one that has it, once it is on the disk with a list of what it holds."""
    files = sorted(partial.iterdir())
    manifest = {"format": FORMAT, "files": {file.name: stamp(file) for file in files}}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, partial / "manifest.json", partial):
        sync(path)
    old = folder.with_name(OLD + folder.name)
    if folder.exists():  # a folder cannot be replaced by one in a single step: tidy() knows what a kill between means
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def tidy(out: Path) -> None:
    """Put right what a kill inside save() has left. No other process may be saving there."""
    for old in out.glob(f"{OLD}step-*"):
        folder = old.with_name(old.name.removeprefix(OLD))
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)
    for partial in out.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    folders = [folder for folder in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def prune(out: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints before the newest, but for keep - 1 of them."""
    folders = checkpoints(out)
    for folder in folders[: folders.index(newest)][: -keep + 1 or None]:
        partial = folder.with_name(PARTIAL + folder.name)
        os.replace(folder, partial)  # what is half removed must not be called step-...
        shutil.rmtree(partial)


def verify(folder: Path) -> None:
    """InputError if a checkpoint is not what save() wrote; it names the file and the way on."""
    remedy = f"remove {folder} and --resume goes on from the checkpoint before"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found, files = manifest["format"], manifest["files"].items()
    except FileNotFoundError:
        raise InputError(f"{folder}: no manifest.json; an older version wrote it, or it is damaged: {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}/manifest.json: cannot be read ({error}); {remedy}") from None
    if found != FORMAT:
        raise InputError(f"{folder}/manifest.json: format {found} is not {FORMAT}, which this version reads; {remedy}")
    for name, written in files:
        try:
            there = stamp(folder / name)
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror}); {remedy}") from None
        if there != written:
            raise InputError(f"{folder / name}: is damaged, {there} where {written} was written; {remedy}")


# --------------------------------------------------------------------------------------------------------------- state


def save(out: Path, step: int, task, optimizer: torch.optim.Optimizer, state: dict, keep: int | None = None) -> Path:
    """Write out/step-<step>/; `state` is what load() gives back, ready for JSON; keep: how many checkpoints stay. Rank
    0 writes; where the policy is sharded all ranks must call it, and all that they do together comes before the first
    byte is written."""
    folder = out / f"step-{step:06d}"
    partial = out / f"{PARTIAL}{folder.name}"
    try:
        _write(partial, step, task, optimizer, state)
        if ranks.rank == 0:
            seal(partial, folder)
    except (OSError, SafetensorError) as error:  # a full disk, most of the time
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder} cannot be written ({error}); free the disk, then go on by --resume") from error
    if ranks.rank == 0 and keep:
        prune(out, folder, keep)
    return folder


def _write(partial: Path, step: int, task, optimizer: torch.optim.Optimizer, state: dict) -> None:
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
    if ranks.rank == 0:
        save_file(tensors, partial / "trainer.safetensors")
        whole = {"step": step, "optimizer_steps": steps, **state}
        (partial / "trainer.json").write_text(json.dumps(whole, indent=1) + "\n")


def load(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the optimiser and return the state that save() was given, with `step`. The folder is verified.

    The policy is loaded already: from this folder; with adapters from the folder the run started from, then lora.add,
    and its adapters are filled here.
    """
    state, tensors = json.loads((folder / "trainer.json").read_text()), load_file(folder / "trainer.safetensors")
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
