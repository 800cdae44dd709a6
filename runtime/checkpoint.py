"""What a run needs to go on exactly: the policy as a Hugging Face folder, and the trainer's state beside it.

    out/step-000100/   model.safetensors (fp32, adapters merged), config.json, tokenizer ...: a Hugging Face folder
                       trainer.safetensors   AdamW's two moments of every trained parameter; adapters, if there are any
                       trainer.json          step, counters, state of the schedule
                       manifest.json         format version; size and CRC-32 of every other file, none left out

There is no random state to save: data order and sampling follow from (seed, step, sample).

A folder called step-... is a whole one: it is written under another name, brought to the disk file by file (fsync), and
renamed. Killed at any moment, in the middle of a save too, a run has the checkpoint before or the new one. The sums are
there for what comes later: a bad disk, a copy that broke off. They are no protection against forgery.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora
import ranks
from errors import MAX_FILE, InputError, cause_of, one_line, read_json
from model import Policy
from prompts import Processor
from runtime import lock
from runtime.state import is_count, require, way_on
from weights import save_policy

FORMAT = 4  # of trainer.json, trainer.safetensors and manifest.json
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
PARTIAL, OLD = ".partial-", ".old-"  # in front of a checkpoint's name: not whole yet, or not any more; just replaced
AT_ONCE = 2**24  # bytes read at a time
MANIFEST = "manifest.json"
ALWAYS = ("config.json", "trainer.json", "trainer.safetensors")  # files of every checkpoint, beside weights
FULL = errno.ENOSPC, errno.EDQUOT
MAX_STATE = 2**32  # bytes of a trainer.json: the window of a schedule may hold millions of numbers


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
    put(partial, file)


def put(partial: Path, file: Path) -> None:
    """Give a file that is written its name, in place of one that has it."""
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
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, partial / MANIFEST, partial):
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
            remove(old)
        else:
            os.replace(old, folder)
    for partial in out.glob(f"{PARTIAL}*"):
        remove(partial)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link without what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_out(name: str, resume: bool) -> Path:
    """--out as a path that a run may write to; nothing is created yet, so that a refused run leaves nothing behind."""
    out = Path(name)
    if not os.path.lexists(out):
        return out
    if not out.is_dir():
        raise InputError(f"--out {out}: is a file, or a link that leads nowhere; name a folder")
    if resume or all(path.name.startswith((PARTIAL, lock.NAME)) for path in out.iterdir()):
        return out
    if (out / "config.json").exists():
        raise InputError(f"--out {out} is not empty: name a new folder, or go on with the run in it by --resume")
    raise InputError(f"--out {out} is not empty, and holds no run to go on with (no config.json): name a new folder")


def stopped(out: Path, program: str) -> str:
    """What to say when a run was asked to stop, and has."""
    saved = checkpoints(out)
    what = f"{saved[-1]} has all that was learned" if saved else "nothing was learned yet"
    return f"stopped as asked: {what}; python {program} --resume --out {out} goes on"


def keep_until(file: Path, step: int, each: bool = False) -> None:
    """Drop the lines of steps after `step`, which a resumed run writes again, and a last one that a kill cut off. each:
    the file should hold one row of every step, in order; training needs none of them, so that rows which are lost are
    only spoken of. It is read line by line: of a long run it may not fit into the memory."""
    kept = []
    if os.path.lexists(file):
        if not os.path.isfile(file):
            raise InputError(f"{file}: is not a file; remove it")
        partial = file.with_name(PARTIAL + file.name)
        with open(file, "rb") as old, open(partial, "wb") as new:
            for number, line in enumerate(iter(lambda: old.readline(MAX_FILE), b""), 1):
                if not line.endswith(b"\n") and len(line) < MAX_FILE:
                    break
                try:
                    if type(found := json.loads(line)["step"]) is not int or found < 1:
                        raise ValueError(found)
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(f"{file}:{number}: is no line of this run's; delete it") from None
                if found <= step:
                    new.write(line)
                    kept.append(found)
        put(partial, file)
    if each and (words := odd_rows(file, kept, step)):
        ranks.print0(f"warning: {words}")


def odd_rows(file: Path, found: list[int], step: int) -> str:
    """What is to be said of rows that should be those of the steps 1 to `step`, a row each."""
    once, said, holes = sorted(set(found)), [], []
    for before, after in zip([0, *once], [*once, step + 1], strict=True):
        if after - before > 1:
            holes.append(str(before + 1) if after - before == 2 else f"{before + 1} to {after - 1}")
    if holes:
        more = f" and {len(holes) - 3} more gaps" if len(holes) > 3 else ""
        said.append(f"no row of steps {', '.join(holes[:3])}{more}, which step-{step:06d} has")
    if len(once) < len(found):
        said.append(f"{len(found) - len(once)} rows of steps that have another one")
    if found != sorted(found):
        said.append("rows out of order")
    if not said:
        return ""
    return f"{file} has {' and '.join(said)}; the run goes on exactly, its curves are wrong there"


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    folders = [folder for folder in out.glob("step-*") if re.fullmatch(r"step-[0-9]{6,}", folder.name)]
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
    remedy, place = way_on(folder), f"{folder}/{MANIFEST}"
    if not os.path.lexists(place):
        raise InputError(f"{folder}: no {MANIFEST}; an older version wrote it, or it is damaged: {remedy}")
    manifest = read_json(place, remedy)
    if not isinstance(manifest, dict) or not isinstance(files := manifest.get("files"), dict):
        raise InputError(f"{place}: cannot be read (it has no object 'files'); {remedy}")
    if type(found := manifest.get("format")) is not int or found != FORMAT:
        found = one_line(str(found))
        raise InputError(f"{place}: format {found} is not {FORMAT}, which this version reads; {remedy}")
    for name, written in files.items():  # all of them before anything is opened: a name may lead anywhere
        if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
            raise InputError(f"{place}: {one_line(name)} is no name of a file beside it; {remedy}")
        if not isinstance(written, dict) or written.keys() != {"bytes", "crc32"} or type(written["bytes"]) is not int:
            raise InputError(f"{place}: {name} has {one_line(str(written))} for its size and sum; {remedy}")
    wanted = [*ALWAYS, *([] if any(map(is_weights, files)) else ["model.safetensors"])]
    if missing := [name for name in wanted if name not in files]:
        raise InputError(f"{place}: does not list {missing[0]}, without which there is no checkpoint; {remedy}")
    try:
        # A name with a dot in front is the file system's or the desktop's, and nobody reads it.
        there = {name for name in os.listdir(folder) if not name.startswith(".")} - {MANIFEST}
        for name in sorted(there - files.keys()):  # it may be read all the same, as a list of shards is
            raise InputError(f"{folder / one_line(name)}: was not written with this checkpoint; move it elsewhere")
        for name, written in files.items():
            check_file(folder / name, written, remedy)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({cause_of(error)}); {remedy}") from None


def is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def check_file(path: Path, written: dict, remedy: str) -> None:
    """InputError unless a file has the size and the sum that the manifest says."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would be read for ever, a link leads to what may change
        raise InputError(f"{path}: is not a file; {remedy}")
    size = {"bytes": found.st_size}
    there = size if found.st_size != written["bytes"] else stamp(path)  # of the wrong size it is not read for minutes
    if there != written:
        said = one_line(str(written))
        raise InputError(f"{path}: is damaged, {there} where {said} was written; {remedy}")


# --------------------------------------------------------------------------------------------------------------- state


def save(
    out: Path,
    step: int,
    policy: Policy,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int | None = None,
) -> Path:
    """Write out/step-<step>/; `state` is what load() gives back, ready for JSON; keep: how many checkpoints stay. Rank
    0 writes; where the policy is sharded all ranks must call it, and all that they do together comes before the first
    byte is written."""
    folder = out / f"step-{step:06d}"
    partial = out / f"{PARTIAL}{folder.name}"
    gone = ranks.rank == 0 and not out.is_dir()
    try:
        _write(partial, step, policy, processor, optimizer, state)
        if gone:  # said only here: of a sharded policy, the other ranks have waited for this one in _write()
            raise FileNotFoundError(errno.ENOENT, f"{out} was removed or renamed under the run")
        if ranks.rank == 0:
            seal(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if gone:  # as it was: a folder that only looks like a run's would be in the way of whoever mends it
            with suppress(OSError):
                out.rmdir()
        raise InputError(f"{folder} cannot be written ({cause_of(error)}); {way_to_write(error)}") from error
    if ranks.rank == 0 and keep:
        prune(out, folder, keep)
    return folder


def way_to_write(error: OSError | SafetensorError) -> str:
    """What to do about a checkpoint that could not be written."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number in its words
    number = getattr(error, "errno", None) or (int(told[1]) if told else None)
    what = "free the disk" if number in FULL else "mend that"
    return f"{what}, then go on by --resume"


def _write(partial: Path, step: int, policy: Policy, processor: Processor, optimizer, state: dict) -> None:
    # The folder holds adapters merged into the weights, from which they cannot be had back.
    tensors = {f"adapter.{name}": p.detach() for name, p in policy.adapters().items()}
    steps = 0
    for name, parameter in policy.named_parameters():
        if held := optimizer.state.get(parameter):  # empty before the first optimiser step
            moments = {f"{key}.{name}": ranks.full_tensor(held[key]).contiguous() for key in MOMENTS}
            steps = int(held["step"])
            if ranks.rank == 0:
                tensors |= {key: moment.cpu() for key, moment in moments.items()}  # gathered ones do not fit elsewhere
    save_policy(policy, partial, torch.float32)  # also where adapters are merged into bfloat16: they may be that small
    if ranks.rank == 0:
        processor.save(partial)
        save_file(tensors, partial / "trainer.safetensors")
        whole = {"step": step, "optimizer_steps": steps, **state}
        (partial / "trainer.json").write_text(json.dumps(whole, indent=1) + "\n")


def load(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the optimiser and return the state that save() was given, with `step`. The folder is verified.

    The policy is loaded already: from this folder; with adapters from the folder the run started from, then lora.add,
    and its adapters are filled here.
    """
    state, tensors = read_state(folder), read_tensors(folder)
    adapters = policy.adapters()
    then = lora.rank_of({name: tensor for name, tensor in tensors.items() if tensor.ndim})
    if then != (now := lora.rank_of(adapters)):
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
            f"{folder}/trainer.safetensors: {one_line(key)} has shape {there.get(key)}, this policy asks for "
            f"{here.get(key)} (None: it is missing); train the same weights of the same model as in the run"
        )
    for key, parameter in wanted.items():
        check_numbers(folder, key, tensors[key], parameter.dtype)
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[f"adapter.{name}"])
    for name, parameter in trained.items():
        device = parameter.device  # for the step too: the fused AdamW wants it there
        moments = {key: ranks.shard_like(tensors[f"{key}.{name}"], parameter) for key in MOMENTS}
        optimizer.state[parameter] = moments | {"step": torch.tensor(float(count), device=device)}
    return state


def read_state(folder: Path) -> dict:
    """trainer.json, with what load() itself goes by; check_state() looks at the rest."""
    file = folder / "trainer.json"
    state = read_json(file, way_on(folder), MAX_STATE)
    if not isinstance(state, dict):
        raise InputError(f"{file}: is no JSON object; {way_on(folder)}")
    step = int(folder.name.removeprefix("step-"))
    same = is_count(state.get("step")) and state["step"] == step
    require(folder, state, "step", same, f"{step}, as its folder's name has it")
    require(folder, state, "optimizer_steps", is_count(state.get("optimizer_steps")), "a whole number of at least 0")
    return state


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "trainer.safetensors"
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({cause_of(error)}); {way_on(folder)}") from error


def check_numbers(folder: Path, key: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """InputError unless a saved tensor is of this dtype and AdamW can go on from its numbers."""
    place, remedy = f"{folder}/trainer.safetensors: {key}", way_on(folder)
    if tensor.dtype != dtype:
        raise InputError(f"{place} holds {tensor.dtype}, it was saved as {dtype}; {remedy}")
    low, high = (bound.item() for bound in tensor.aminmax())  # a NaN is both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{place} holds numbers that are not finite; {remedy}")
    if key.startswith("exp_avg_sq.") and low < 0:
        raise InputError(f"{place} holds {low:.3g}, a mean of squares is not below 0; {remedy}")
