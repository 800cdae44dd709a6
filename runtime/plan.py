"""The memory of a step from config.json, within 20 % of whole runs on a CPU. Left out: allocators (hence FILL)."""

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import accumulate, combinations
from pathlib import Path

import torch

import ranks
from data import held_out_phantoms
from errors import InputError, read_object
from images import ImageConfig, Sample
from model import HEAD_ROWS, ModelConfig, Policy
from prompts import Processor
from tasks import TASKS
from weights import OURS, read_config

FILL = {"cpu": 0.6, "cuda": 0.9}  # share that a plan fills; malloc's freed pages were seen to cost 1.2 to 1.9 times
GB, CARDS = 2**30, (24, 80)  # of so many GB, an estimate says what would fit
# A block keeps of a token so many hidden sizes and 4 inner ones (saved_tensors_hooks, fp32 and bf16); AT_WORK: on top
KEPT_DECODER, KEPT_VISION, AT_WORK = 10, 12, 0.6


@dataclass(frozen=True)
class Run:  # all that decides how much memory a step takes
    config: ModelConfig
    text: int  # tokens of the longest prompt beside those of its picture
    patches: int  # of the largest picture
    batch: int  # prompts per step
    micro: int  # prompts per pass
    group: int  # G
    tokens: int  # T, of the longest completion
    width: int  # bytes of a number in the arithmetic: 4 for fp32, 2 for bf16
    device: str = "cpu"  # or cuda
    shards: int = 1  # ranks that the weights are spread over
    evaluation: int = 50  # prompts that the evaluation answers at a time, if they fit; 0: there is none
    checkpointing: bool = False
    lora_rank: int = 0
    freeze_vision: bool = False
    reference: bool = False  # beta > 0

    def fits(self, memory: float) -> bool:
        return peak(self) <= FILL[self.device] * memory

    def __str__(self) -> str:
        no = "" if self.checkpointing else "no-"
        return f"--micro-batch {self.micro} --{no}checkpointing, estimated peak {peak(self) / GB:.2f} GB"


@lru_cache
def count(config: ModelConfig) -> dict[str, int]:  # parameters, of a policy that has shapes and no memory
    with torch.device("meta"):
        policy = Policy(config)
    parts = {"all": policy, "vision": policy.visual, "decoder": policy.model.layers, "block": policy.model.layers[0]}
    rank_1 = sum(sum(m.weight.shape) for m in policy.model.layers.modules() if isinstance(m, torch.nn.Linear))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} | {"adapters": rank_1}


def moments(run: Run) -> dict[str, dict[str, float]]:
    """Bytes of what is always there, from the second step on, and of what each moment of a step holds besides."""
    c, v, n, w, micro = run.config, run.config.vision, count(run.config), run.width, run.micro
    full, split, remade, layers = not run.lora_rank, run.shards > 1, run.checkpointing, c.num_hidden_layers
    learns = full and not run.freeze_vision  # the tower
    trained = run.lora_rank * n["adapters"] or n["all"] - run.freeze_vision * n["vision"]
    cast = (full and w < 4 and not split) * w  # fp32 weights: copied for the rollout, else at each call
    always = {"weights": 4 * n["all"] if full else w * n["all"] + 4 * trained, "AdamW's moments": 8 * trained}
    always |= {"copy for the rollout": cast * n["all"], "reference": (full and run.reference) * w * n["all"]}
    patches = 4 * run.batch * run.patches * v.in_channels * v.temporal_patch_size * v.patch_size**2
    found = {"always there": {name: size // run.shards for name, size in always.items()} | {"patches": patches}}
    decoder = w * (KEPT_DECODER * c.hidden_size + 4 * c.intermediate_size)  # bytes of a token in a block
    tower = w * (KEPT_VISION * v.hidden_size + 4 * v.intermediate_size)
    kv, prompt = 2 * w * c.num_key_value_heads * c.head_dim, run.text + run.patches // v.spatial_merge_size**2
    for name, prompts, group in (("rollout", micro, run.group), ("evaluation", run.evaluation, 1)):
        answers, weights = group * run.tokens, split * w * n["all"]
        most = max(group * c.vocab_size * (w + 8), AT_WORK * max(run.patches * tower, max(prompt, answers) * decoder))
        found[name] = {"gathered weights": weights, "keys and values": kv * layers * prompts * (2 * prompt + answers)}
        found[name]["logits or one block"] = prompts * most
    seen, read, written = micro * run.patches * learns, micro * prompt, micro * run.group * run.tokens
    on, up = (w * c.hidden_size, w * v.hidden_size) if remade else (decoder, tower)  # kept is what a block hands on
    held = {"kept of vision": v.depth * seen * up, "kept of prompts": (layers - 1) * read * on}
    held |= {"kept of completions": layers * written * on, "casts of weights": (not remade) * 2 * cast * n["decoder"]}
    held["keys and values"] = kv * layers * (read + (not remade) * (run.group * read + written))
    held["gradients"] = (micro < run.batch) * 4 * trained // run.shards  # of earlier passes
    # Of shards: what is in no block, this and the next one; its gradients, as they come and in fp32.
    held["gathered weights"] = split * (w * (n["all"] - n["vision"] - n["decoder"]) + (3 * w + 8) * n["block"])
    block = (AT_WORK + remade) * max(read * decoder, written * decoder, seen * tower)
    found["update, forward"] = held | {"logits or one block": max(w * min(HEAD_ROWS, written) * c.vocab_size, block)}
    # Gradients wait until completions and prompts have theirs; of shards, all of them, as wide as they were gathered.
    come = {"kept of completions": 0, "gradients that come": (w if split else 4) * trained, "one block": block}
    return found | {"update, backward": held | come}


def peak(run: Run) -> float:  # bytes
    always, *rest = (sum(parts.values()) for parts in moments(run).values())
    return always + max(rest)


def choose(run: Run, memory: int, micro: int | None = None, checkpointing: bool | None = None) -> Run:
    """None is open: fewest passes (each reads all weights), then no checkpointing. If nothing fits, the smallest."""
    sizes = {math.ceil(run.batch / passes) for passes in range(1, run.batch + 1)} if micro is None else {micro}
    ways = (False, True) if checkpointing is None else (checkpointing,)
    runs = [replace(run, micro=size, checkpointing=way) for size in sorted(sizes, reverse=True) for way in ways]
    runs = [each for r in runs for each in (r, replace(r, evaluation=min(r.evaluation, r.micro)))]
    return next((each for each in runs if each.fits(memory)), min(runs, key=peak))


def remedy(run: Run, memory: int) -> str:
    """The fewest flags with which the run fits; or what it takes with all of them."""
    changes = {  # what changes the method least comes first
        "--max-pixels 401408": lambda r: replace(r, patches=min(r.patches, 401408 // r.config.vision.patch_size**2)),
        "--max-tokens 256": lambda r: replace(r, tokens=min(r.tokens, 256)),
        "--freeze-vision": lambda r: replace(r, freeze_vision=True),
        "--beta 0": lambda r: replace(r, reference=False),
        "--lora-rank 64": lambda r: replace(r, lora_rank=r.lora_rank or 64, freeze_vision=False),
    }
    flags = [flag for flag in changes if run.shards == 1 or "lora" not in flag]  # shards take no adapters
    for some in (some for number in range(len(flags) + 1) for some in combinations(flags, number)):
        made = choose(reduce(lambda made, flag: changes[flag](made), some, run), memory)
        if made.fits(memory):
            return f"{' '.join([*some, str(made)])} would fit"
    return f"no flags make it fit ({' '.join(flags)} {made}); take a smaller model, or more ranks and --shard"


def read_memory(text: str) -> tuple[int, int | None]:  # 24GB -> (bytes, None); 4x80GB -> (bytes of each, 4)
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,9}(?:\.\d{1,9})?)GB", text)
    if not found or not float(found[2]):
        raise InputError(f"--memory wants a number of GB such as 24GB, or with --estimate 4x80GB, not {text!r:.40}")
    return int(float(found[2]) * GB), found[1] and int(found[1])


def free_memory(device: str, root: Path = Path("/")) -> int:
    """Bytes that the device has to spare now: of a CPU what the machine and its control groups' limits leave."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]

    def find(pattern: str, file: str) -> list[str]:  # a container has not all of its groups' files
        return re.findall(f"^{pattern}", (root / file).read_text(), re.M) if os.access(root / file, os.R_OK) else []

    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    sizes += [1024 * int(size) for size in find(r"MemAvailable: *(\d+) kB", "proc/meminfo")]
    for folder, controllers in (("sys/fs/cgroup", ""), ("sys/fs/cgroup/memory", "(?:[^:]*,)?memory(?:,[^:]*)?")):
        own = "".join(find(rf"\d+:{controllers}:/*(.*)$", "proc/self/cgroup"))
        for place in accumulate([folder, *own.split("/")], "{}/{}".format):  # the process's group and all around it
            dropped = max(map(int, find(r"(?:total_)?inactive_file (\d+)$", f"{place}/memory.stat")), default=0)
            for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):  # version 2, version 1
                for most in find(r"\d+$", f"{place}/memory.{limit}"):  # "max", or some 2^63, is no limit
                    sizes += [int(most) - int(taken) + dropped for taken in find(r"\d+$", f"{place}/memory.{used}")]
    return max(min(sizes), 0)


def longest_prompt(base: Path, samples: list[Sample], style: str, max_pixels: int | None) -> tuple[int, int, str]:
    """(tokens of text, patches of the picture, in words what was looked at); of no samples, the largest possible."""
    known, most = any(base.glob("*processor_config.json")), {"max_pixels": max_pixels} if max_pixels else {}
    images = ImageConfig.from_folder(base, **most) if known else ImageConfig(**most)
    processor = Processor(base, style, TASKS, None, max_pixels) if (base / "tokenizer.json").exists() else None
    text, pictures = 0, []
    for sample in sorted(samples, key=lambda sample: -len(sample.query)):
        with suppress(InputError):  # records that cannot be used are named later
            pictures.append(images.tokens(sample.displayed, sample.frames))
            text = text or (processor and processor.check(sample) - pictures[-1])
    text, tokens = text or 128, max(pictures, default=images.max_pixels // images.factor**2)  # 128: not known yet
    source = "the largest of --data" if pictures else f"the largest that --max-pixels {images.max_pixels} lets in"
    return text, tokens * images.merge_size**2, f"{tokens + text} tokens a prompt, {tokens} of its picture ({source})"


def settle(args, base: Path, samples: list[Sample]) -> tuple[Run, str]:
    """Set --micro-batch and --checkpointing where they were left open -> (the run, what to print: a line, or with
    --estimate a page). InputError if --memory was given and is too little; if it was not, that is a warning only."""
    device, given = torch.device(args.device).type, args.memory and read_memory(args.memory)[0]
    if not given and args.estimate and device == "cuda" and not torch.cuda.is_available():
        raise InputError("--estimate: there is no GPU here to ask; say what it has, such as --memory 24GB")
    named = not args.estimate or args.data != "phantoms" or args.model in OURS  # else nobody means phantoms
    text, patches, words = longest_prompt(base, samples if named else [], args.prompt, args.max_pixels)
    config = read_config(read_object(base / "config.json"), str(base / "config.json"))
    share, width = math.ceil(args.batch_size / args.ranks), getattr(torch, args.dtype).itemsize
    asked = Run(config, text, patches, share, share, args.group_size, args.max_tokens, width, device)
    evaluated = min(Run.evaluation, args.eval_limit or Run.evaluation) * bool(args.val or held_out_phantoms(args.data))
    asked = replace(asked, shards=args.ranks if args.shard else 1, evaluation=evaluated, lora_rank=args.lora_rank)
    asked = replace(asked, freeze_vision=args.freeze_vision, reference=args.beta > 0)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks)) if device == "cpu" else 1  # a CPU is all ranks'
    memory = min(ranks.gather_objects(lambda: (given or free_memory(args.device)) // sharing))
    run = choose(asked, memory, args.micro_batch and min(args.micro_batch, share), args.checkpointing)
    args.micro_batch, args.checkpointing = args.micro_batch or run.micro, run.checkpointing
    words = f"{run} of {FILL[device] * memory / GB:.2f} ({FILL[device]:.0%} of {memory / GB:.2f} GB); {words}"
    advice = "it fits" if run.fits(memory) else f"it does not fit: {remedy(asked, memory)}"
    if args.estimate:
        lines = [f"ESTIMATED memory of a step in GB = 2^30 bytes on each of {args.ranks} ranks, not measured", words]
        for name, parts in moments(run).items():
            shown = [f"{part} {size / GB:.2f}" for part, size in parts.items() if 50 * size > sum(parts.values())]
            lines.append(f"  {name:<18}{sum(parts.values()) / GB:7.2f}  {', '.join(shown)}")
        return run, "\n".join([*lines, advice, *(f"{card} GB: {remedy(asked, card * GB)}" for card in CARDS)])
    if given and not run.fits(memory):
        raise InputError(f"--memory {args.memory}: {words}; {advice}")
    return run, f"plan: {words}" if run.fits(memory) else f"this may run out of memory: {words}; {advice}"
