"""Hugging Face folders and hub names in and out: config.json and safetensors -> a Policy, and back.

    policy = load_policy(folder, device, dtype)
    save_policy(policy, folder, dtype)         what transformers, vLLM and load_policy read

Names of tensors are those of the published checkpoints. Read are safetensors and JSON: no pickle, no code.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import snapshot_download  # comes with transformers, as its own way to the Hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ranks
from errors import InputError, cause_of, one_line, read_object, short
from layers import Linear
from model import ModelConfig, Policy
from vision import VisionConfig

RESTORE = "restore it from where it came"
SHARD_BYTES = 5 * 10**9  # size of one file of a saved checkpoint, as the hub has it

# What belongs to a checkpoint beside weights and config.json, and is carried on from folder to folder as it is.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json added_tokens.json "
    "chat_template.json chat_template.jinja preprocessor_config.json video_preprocessor_config.json "
    "processor_config.json generation_config.json"
).split()


# Modules are made one by one and sizes are multiplied before any weight is looked at: layers without a bound would take
# hours, and a product beyond 64 bits is no tensor. Far above what there is (the 72B: 80 layers, 152064 tokens).
MOST = dict.fromkeys(("num_hidden_layers", "depth", "patch_size"), 256)
MOST |= dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "in_channels"), 16)
MOST_ELSE = 2**22


def check(config: ModelConfig) -> None:
    """ValueError for sizes that no policy can have."""
    vision = config.vision
    for prefix, part in {"": config, "vision_config.": vision}.items():
        for field in fields(part):
            value, most = getattr(part, field.name), MOST.get(field.name, MOST_ELSE)
            least = {"image_token_id": 0, "video_token_id": -1}.get(field.name, 1)
            if field.type in (int, "int") and (type(value) is not int or value < least):
                raise ValueError(f"{prefix}{field.name} is {short(value)}, a whole number above 0 is needed")
            if field.type in (int, "int") and value > most:
                raise ValueError(f"{prefix}{field.name} is {short(value)}, at most {most} is possible here")
    for name, (least, most) in {"rms_norm_eps": (0, 1), "rope_theta": (1, 1e12)}.items():
        value = getattr(config, name)
        if type(value) not in (int, float) or not least < value < most:
            raise ValueError(f"{name} is {short(value)}, a number between {least} and {most:g} is needed")
    heads = (config.hidden_size, config.num_attention_heads), (config.num_attention_heads, config.num_key_value_heads)
    for whole, by in (*heads, (vision.hidden_size, vision.num_heads)):
        if whole % by:
            raise ValueError(f"{whole} cannot be split into {by} heads")
    if vision.hidden_size // vision.num_heads % 4:  # row and column turn pairs of numbers
        raise ValueError(f"vision_config.hidden_size {vision.hidden_size}: a head of it must be a multiple of 4")
    section = config.mrope_section
    whole = isinstance(section, list | tuple) and all(type(n) is int and n >= 0 for n in section)
    if not whole or len(section) != 3 or sum(section) * 2 != config.head_dim:
        raise ValueError(
            f"mrope_section {short(section)} must be 3 whole numbers with the sum {config.head_dim // 2}, half of a "
            f"head's {config.head_dim}"
        )
    for name in ("image_token_id", "video_token_id"):
        if getattr(config, name) >= config.vocab_size:
            raise ValueError(f"{name} {getattr(config, name)} is none of vocab_size {config.vocab_size} tokens")
    if config.image_token_id == config.video_token_id:
        raise ValueError(f"image_token_id and video_token_id are both {config.image_token_id}")
    if vision.out_hidden_size != config.hidden_size:
        raise ValueError(
            f"vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size {config.hidden_size}"
        )
    if vision.in_channels != 3:
        raise ValueError(f"vision_config.in_channels is {vision.in_channels}, pictures have 3")
    unit = vision.patch_size * vision.spatial_merge_size
    if vision.window_size < unit:
        raise ValueError(f"vision_config.window_size {vision.window_size} is less than a token's {unit} pixels")
    blocks = vision.fullatt_block_indexes
    if not isinstance(blocks, list | tuple) or not all(type(i) is int and i >= 0 for i in blocks):
        raise ValueError(f"vision_config.fullatt_block_indexes {short(blocks)} must be a list of whole numbers")


def read_config(raw: dict, source: str = "config.json") -> ModelConfig:
    """Read a config.json: flat as published (rope_scaling mrope) or nested as transformers 5 writes it."""
    source = one_line(source)
    if raw.get("model_type") != "qwen2_5_vl":
        kind = short(raw.get("model_type"))
        raise InputError(f"{source}: model_type is {kind}, only 'qwen2_5_vl' is implemented here.")

    def part(whole: dict, *names: str) -> dict:
        """The first of these that is given."""
        name = next((name for name in names if whole.get(name) is not None), names[0])
        if not isinstance(whole.get(name, {}), dict | None):
            raise InputError(f"{source}: {name} is {short(whole[name])}, an object is needed; is it as published?")
        return whole.get(name) or {}

    text, vision = part(raw, "text_config") or raw, part(raw, "vision_config")
    rope = part(text, "rope_parameters", "rope_scaling")
    if (kind := rope.get("rope_type", rope.get("type", "mrope"))) not in ("mrope", "default"):
        raise InputError(f"{source}: rope type {short(kind)} is not implemented, only Qwen2.5-VL's plain M-RoPE is.")
    for name, whole in {"": text, "vision_config.": vision}.items():
        if whole.get("hidden_act", "silu") != "silu":
            raise InputError(f"{source}: {name}hidden_act is {short(whole['hidden_act'])}, only 'silu' is implemented.")
    tied = [whole["tie_word_embeddings"] for whole in (raw, text) if whole.get("tie_word_embeddings") is not None]
    if not all(type(value) is bool for value in tied):
        raise InputError(f"{source}: tie_word_embeddings is {short(tied[0])}, true or false is needed.")
    theta = next((t for t in (rope.get("rope_theta"), text.get("rope_theta")) if t is not None), 1e6)
    if text.get("use_sliding_window"):
        raise InputError(f"{source}: use_sliding_window is true; sliding-window attention is not implemented.")
    if "quantization_config" in raw:
        raise InputError(f"{source}: has a quantization_config; take the checkpoint that is not quantised.")
    try:
        config = ModelConfig(
            **{key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            **{key: text[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")},
            rope_theta=theta,
            mrope_section=listed(rope.get("mrope_section", (16, 24, 24))),
            tie_word_embeddings=any(tied),
            image_token_id=raw["image_token_id"],
            video_token_id=-1 if raw.get("video_token_id") is None else raw["video_token_id"],
            max_position_embeddings=text.get("max_position_embeddings", 32768),
            vision=VisionConfig(
                **{
                    f.name: listed(vision[f.name])
                    for f in fields(VisionConfig)
                    if f.name in vision or f.default is MISSING
                }
            ),
        )
        check(config)
        return config
    except KeyError as missing:
        raise InputError(f"{source}: field {missing} is missing; is this a Qwen2.5-VL checkpoint?") from None
    except ValueError as error:
        raise InputError(f"{source}: a field has the wrong type ({error}); is it as published?") from None


def listed(value):
    """A list as a tuple, which can be hashed; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def load_policy(folder: str | Path, device: torch.device | str = "cpu", dtype=torch.float32) -> Policy:
    """Load a Hugging Face folder: config.json and model.safetensors, or shards and their index. Refuses others.

    One tensor after the other is copied and converted, and a shard is let go before the next one is opened: host
    memory holds the policy (nothing of it if device is another) and at most one shard.
    """
    folder = Path(folder)
    raw = read_object(folder / "config.json", RESTORE)
    config = read_config(raw, str(folder / "config.json"))
    eos_ids, files = read_eos_ids(folder, raw), checkpoint_files(folder)
    if max(eos_ids) >= config.vocab_size:
        raise InputError(
            f"{one_line(folder)}: eos_token_id {short(max(eos_ids))} is none of {config.vocab_size} tokens."
        )
    for name in COMPANIONS:  # else save_policy, at the end of a run, is the first to meet it
        if os.path.lexists(folder / name) and not os.path.isfile(folder / name):
            raise InputError(f"{one_line(folder / name)}: is not a file; restore it from its checkpoint.")
    with torch.device("meta"):
        policy = Policy(config, eos_ids)
    wanted = dict(policy.named_parameters())
    found = set()
    for path in files:
        file = one_line(path)
        try:
            with safe_open(path, framework="pt") as tensors:
                for key in tensors.keys():
                    name, shown = published_name(key), one_line(key)
                    if name == "lm_head.weight" and policy.config.tie_word_embeddings:
                        continue  # some exporters write the tied head twice
                    if name not in wanted:
                        raise InputError(f"{file}: tensor {shown} is not one of Qwen2.5-VL's; is this another model?")
                    if name in found:
                        raise InputError(f"{file}: tensor {shown} is there a second time; which one is meant?")
                    if (kind := tensors.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                        raise InputError(f"{file}: tensor {shown} is of type {kind}; weights must be floating point.")
                    tensor = tensors.get_tensor(key)  # still in the file: read when it is copied
                    if tensor.shape != wanted[name].shape:
                        shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(wanted[name].shape)}"
                        raise InputError(f"{file}: tensor {shown} has shape {shapes}.")
                    module = policy.get_submodule(name.rpartition(".")[0])
                    weight = nn.Parameter(tensor.to(device, dtype, copy=True))  # no weight hangs on the open file
                    setattr(module, name.rpartition(".")[2], weight)
                    found.add(name)
        except SafetensorError as error:
            why = cause_of(error)
            raise InputError(f"{file}: not a readable safetensors file ({why}); was the download cut off?") from None
    if missing := sorted(wanted.keys() - found):
        raise InputError(f"{one_line(folder)}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    policy.source, policy.raw_config = folder, raw
    return policy


@torch.no_grad()
def published(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors, on the CPU: an adapter is in the weight that it hangs on."""
    linears = {f"{path}.weight": module for path, module in policy.named_modules() if isinstance(module, Linear)}
    for name, parameter in policy.named_parameters():
        if ".adapter." in name:
            continue
        adapter = linears[name].adapter if name in linears else None
        tensor = ranks.full_tensor(parameter if adapter is None else adapter.merged(parameter))
        yield name, tensor.detach().to("cpu", dtype or parameter.dtype).contiguous()


def save_policy(policy: Policy, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a Hugging Face folder that transformers, vLLM and load_policy load: weights, config, and the companions
    of the folder this policy came from (tokenizer, preprocessor, generation config). One shard after the other goes
    through host memory. Rank 0 writes; of a sharded policy all ranks must ask for it."""
    tensors = published(policy, dtype)
    try:
        if ranks.rank == 0:
            _write(policy, Path(folder), dtype, tensors)
    finally:
        for _ in tensors:  # of which the other ranks have parts, also if the disk was full
            pass


def _write(policy: Policy, folder: Path, dtype: torch.dtype | None, tensors: Iterator[tuple[str, Tensor]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, parameter in policy.named_parameters():
        if ".adapter." in name:
            continue
        nbytes = parameter.numel() * (dtype or parameter.dtype).itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {key: file for shard, file in zip(shards, names, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    for shard, file in zip(shards, names, strict=True):
        save_file(dict(islice(tensors, len(shard))), folder / file, metadata={"format": "pt"})
    dtype_name = str(dtype or next(policy.parameters()).dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in policy.raw_config else "dtype"
    # Where it is not said, transformers would take another number than we do.
    clock = {"tokens_per_second": policy.config.vision.tokens_per_second}
    raw = policy.raw_config | {"vision_config": clock | (policy.raw_config.get("vision_config") or {})}
    (folder / "config.json").write_text(json.dumps(raw | {key: dtype_name}, indent=2) + "\n")
    for name in COMPANIONS:
        if policy.source and (policy.source / name).exists() and policy.source.resolve() != folder.resolve():
            shutil.copyfile(policy.source / name, folder / name)


def read_eos_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """EOS ids of the generation config if there is one (Qwen has two: end of turn, end of text), else of the config."""
    file = folder / "generation_config.json"
    generation = read_object(file, RESTORE) if os.path.lexists(file) else {}
    sources = (generation, raw, raw.get("text_config") or {})
    eos = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), None)
    if eos is None:
        raise InputError(f"{one_line(folder)}: neither generation_config.json nor config.json has eos_token_id.")
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{one_line(folder)}: eos_token_id must be a token's id or a list of them, not {short(eos)}.")
    return ids


def published_name(name: str) -> str:
    """A tensor's name in the published files. Some frameworks save the names that transformers has in memory."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, all of which exist."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if os.path.lexists(index):
        where = read_object(index, RESTORE).get("weight_map")
        files = list(where.values()) if isinstance(where, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            raise InputError(
                f"{one_line(index)}: field 'weight_map' must say which file of the folder each tensor is in."
            )
        names = sorted(set(where.values()))
    for name in names:
        if not os.path.isfile(folder / name):  # a pipe or a device would be waited for
            what = "is not a file" if os.path.lexists(folder / name) else "does not exist"
            raise InputError(f"{one_line(folder / name)} {what}; the checkpoint is not whole.")
    return [folder / name for name in names]


# ---------------------------------------------------------------------------------------------------------------
# --model

# org/name is a checkpoint of the Hugging Face Hub, fetched into the Hub client's cache and read from there: the newest
# commit, or without a network the newest that is in the cache; org/name@commit that commit, branch or tag. Nothing is
# ever fetched unless such a name is given, and a folder of that name goes before. What comes is data: weights as
# safetensors, settings as JSON, text, templates (which transformers renders in a sandbox). No pickle, no code. A run
# saves the name with its commit, so that a resumed one has the same weights under it (config.py).

OURS = {name: Path(__file__).parent / "assets" / name for name in ("nano", "nano-tasks", "nano-video")}
NANO, NANO_TASKS, NANO_VIDEO = OURS.values()  # come with this repository
WEIGHTS, SETTINGS = ["*.safetensors"], ["*.json", "*.txt", "*.jinja"]
REASONS = {  # from the special to the general, as the client's errors inherit
    GatedRepoError: "its owners give access on request: ask on its page, then log in by `hf auth login`",
    RevisionNotFoundError: "it has no such commit, branch or tag",
    RepositoryNotFoundError: "the Hub has no such repository, or shows it only after `hf auth login`",
    LocalEntryNotFoundError: "the Hub cannot be reached from here, and the cache does not have it whole",
}


def is_hub_name(model: str) -> bool:
    """Is it org/name or org/name@revision, and not a path? Where there is a folder out, out/step-000100 is one."""
    # A revision becomes a path under the cache: its parts begin as names do, and none is "..".
    named = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?", model, re.ASCII)
    return named is not None and ".." not in model and not Path(named[1]).exists()


def model_folder(model: str, weights: bool = True) -> Path:
    """--model: a checkpoint folder, "nano", "nano-tasks" or "nano-video" for the policies that come with this
    repository, or org/name of the Hub, from which weights come only if they are wanted."""
    if model in OURS:
        return OURS[model]
    if is_hub_name(model):
        return fetch(model, weights)
    if not os.path.lexists(file := Path(model) / "config.json"):
        raise InputError(
            f"{one_line(file)} does not exist; --model wants a folder of a Qwen2.5-VL checkpoint, one of "
            f"{', '.join(OURS)}, or org/name of the Hugging Face Hub"
        )
    return Path(model)


def fetch(model: str, weights: bool = True) -> Path:
    """The folder of org/name[@revision] in the cache, after fetching what it lacks. Its name is the commit."""
    name, _, revision = model.partition("@")
    files = WEIGHTS + SETTINGS if weights else SETTINGS
    try:
        # */*: nothing from subfolders, where repositories keep other formats of the same weights
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises its own errors, its HTTP library's, ValueErrors and OSErrors
        why = next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), cause_of(error))
        raise InputError(
            f"--model {model}: no folder here, and cannot be had from the Hugging Face Hub ({why}); "
            "name a folder with the checkpoint"
        ) from error


def pinned(model: str, folder: Path) -> str:
    """What a run saves as its --model: a name of the Hub with the commit that was fetched, anything else as it is."""
    return f"{model.partition('@')[0]}@{folder.name}" if is_hub_name(model) else model
