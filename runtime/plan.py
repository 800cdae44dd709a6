"""What a run needs of the device's memory, before anything is loaded; micro-batch and checkpointing follow from it.

    python train_grpo.py --estimate --model FOLDER --memory 24GB [any other flag]

Arithmetic on the shapes of config.json: nothing is measured, no weight is read. A step's memory is what is always there
(weights and their copies, AdamW's moments) and on top of it the largest of its moments: of the rollout, of the update,
of the evaluation between steps. What a block keeps for its backward pass is counted tensor by tensor, as autograd saves
it in model.py's code: a change there is a change in block_kept() and kept(), and a test that asks autograd says so.
Another test measures the peaks of whole runs.

1 GB is 2^30 bytes, as on the label of a card. Left out: what driver and libraries take, and what an allocator loses
(hence FILL); the groups that --dynamic-sampling draws beyond the batch; the 256 MB by which several ranks add up their
gradients, when the backward pass has let go of more. Of several ranks, these are the bytes of each.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

import lora
import ranks
from data import held_out_phantoms
from data import phantom_samples as phantoms
from errors import InputError, read_object
from images import ImageConfig, PhantomImage, Sample, smart_resize
from model import HEAD_ROWS, ModelConfig, Policy
from prompts import Processor
from tasks import TASKS
from vision import VisionConfig
from weights import read_config

GB = 2**30
# Share of the memory that a plan fills. On a CPU malloc keeps freed pages: 1.2 to 1.9 times what tensors held was seen.
FILL = {"cpu": 0.6, "cuda": 0.9}
CARDS = (24, 80)  # GB, for which an estimate says what would fit
EVALUATION = 50  # prompts that the evaluation answers at a time, if they fit
TEXT_TOKENS = {"answer": 64, "think": 128}  # of template and question, for a folder without a tokenizer
FULL = 4  # bytes of fp32: of trained weights, gradients and moments, and of what norms and the sampler compute in

Parts = dict[str, int]  # what it is -> bytes


@dataclass(frozen=True)
class Run:
    """All that decides how much memory a step takes."""

    config: ModelConfig
    prompt: int  # P, tokens of the longest prompt
    patches: int  # of the largest picture
    batch: int  # prompts per step
    micro: int  # prompts per pass
    group: int  # G
    tokens: int  # T, of the longest completion
    width: int  # bytes of a number in the arithmetic: 4 for fp32, 2 for bf16
    shards: int = 1  # ranks that the weights are spread over
    checkpointing: bool = False
    lora_rank: int = 0
    freeze_vision: bool = False
    reference: bool = False  # beta > 0
    inner_steps: int = 1
    dynamic: bool = False  # --dynamic-sampling
    device: str = "cpu"  # or cuda
    ahead: int = 0  # prompts whose pictures are read ahead
    evaluation: int = EVALUATION  # prompts at a time; 0: there is none

    @property
    def whole(self) -> bool:
        """The rollout makes the prefix with gradient, and the update goes on from it."""
        return self.micro >= self.batch and self.inner_steps == 1 and not self.dynamic and self.shards == 1

    @property
    def rows(self) -> int:
        """Completions per pass."""
        return self.micro * self.group

    @property
    def inputs(self) -> int:
        """Completion tokens per pass that go through the decoder: the last of each is only predicted."""
        return self.rows * (self.tokens - 1)

    @property
    def kv(self) -> int:
        """Numbers that a token leaves in one block's keys and values."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim

    @property
    def joined(self) -> int:
        """Bytes of one block's keys and values of all completions, each behind a copy of its prompt's."""
        return self.width * self.rows * self.kv * (self.prompt + self.tokens - 1)

    @property
    def patch(self) -> int:
        """Numbers of a patch."""
        v = self.config.vision
        return v.in_channels * v.temporal_patch_size * v.patch_size**2


# ---------------------------------------------------------------------------------------------------- what stays there


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, counted on a policy that has shapes and no memory."""

    all: int
    vision: int
    vision_block: int
    merger: int
    decoder: int  # its blocks, without embedding and head
    head: int  # V * H
    loose: int  # all that is in no block
    adapters: int  # of rank 1

    @staticmethod
    @lru_cache
    def of(config: ModelConfig) -> "Weights":
        with torch.device("meta"):
            policy = Policy(config)
        blocks = torch.nn.ModuleList((*policy.visual.blocks, *policy.model.layers))

        def count(module: torch.nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        return Weights(
            all=count(policy),
            vision=count(policy.visual),
            vision_block=count(policy.visual.blocks[0]),
            merger=count(policy.visual.merger),
            decoder=count(policy.model.layers),
            head=policy.head_weight.numel(),
            loose=count(policy) - count(blocks),
            adapters=sum(sum(linear.weight.shape) for linear in lora.decoder_linears(policy)),
        )


def trained(run: Run) -> int:
    """Numbers that the optimiser moves."""
    weights = Weights.of(run.config)
    if run.lora_rank:
        return run.lora_rank * weights.adapters
    return weights.all - (weights.vision if run.freeze_vision else 0)


def always(run: Run) -> Parts:
    """What every moment from the second step on has: train_grpo.make_policies, AdamW, and the batch itself."""
    weights, moved = Weights.of(run.config).all, trained(run)
    if run.lora_rank:
        parts = {"frozen weights": run.width * weights, "adapters": FULL * moved}
    else:
        parts = {"weights": FULL * weights}
        if run.width != FULL and run.shards == 1:
            parts["copy for the rollout"] = run.width * weights
        if run.reference:
            parts["reference"] = run.width * weights
    parts["AdamW's moments"] = 2 * FULL * moved
    return {name: size // run.shards for name, size in parts.items()} | of_batch(run, run.ahead)


def waiting(run: Run, prompts: int) -> Parts:
    """Pictures of prompts wait on the host: with --device cpu that is the memory in question."""
    return {"pictures": FULL * prompts * run.patches * run.patch} if run.device == "cpu" else {}


def of_batch(run: Run, ahead: int = 0) -> Parts:
    """Pictures of a step's prompts and of those read ahead; what a frozen tower made of the former (Policy.see)."""
    parts = waiting(run, run.batch + ahead)
    if run.lora_rank or run.freeze_vision:
        tokens = run.batch * run.patches // run.config.vision.spatial_merge_size**2
        parts["image tokens"] = run.width * tokens * run.config.hidden_size
    return parts


# ------------------------------------------------------------------------------------------------- what autograd keeps


def norm_kept(run: Run, hidden: int) -> int:
    """Bytes per token: input, 1 / rms, output without weight if that is trained, and with."""
    return max(run.width, FULL) * hidden + FULL + run.width * hidden * (1 if run.lora_rank else 2)


def block_kept(
    run: Run, tokens: int, hidden: int, inner: int, heads: int, keys: int, weights: int, copied: bool = True
) -> int:
    """Bytes that one block, of the decoder or the vision tower, keeps for its backward pass beside its parameters.

    keys: bytes that attention keeps as keys and values. weights: bytes of cast weights. copied: the answers of its
    calls are joined to one tensor.
    """
    w = run.width
    attention = (2 + copied) * w * hidden + FULL * heads  # queries, answers, their copy; log-sum-exp
    mlp = 4 * w * inner  # gate, silu(gate), up, their product
    adapters = 7 * w * run.lora_rank  # x A^T of each
    return tokens * (2 * norm_kept(run, hidden) + attention + mlp + adapters) + keys + weights


def casts(run: Run, weights: int) -> int:
    """Bytes: fp32 weights are cast at each call, and autograd keeps the cast. Shards are gathered as casts."""
    return run.width * weights if run.width != FULL and run.shards == 1 else 0


def merger_kept(run: Run) -> int:
    """Bytes: around its norm, before and after its GELU, and cast weights."""
    per_patch = (max(run.width, FULL) + 4 * run.width) * run.config.vision.hidden_size
    return run.micro * run.patches * per_patch + casts(run, Weights.of(run.config).merger)


def kept(run: Run) -> tuple[Parts, Parts]:
    """What the forward pass of one micro-batch keeps, by "vision", "prompts" and "completions" -> (all of it; one block
    of each, as checkpointing makes it again in the backward pass: 0 without)."""
    config, weights, w, v = run.config, Weights.of(run.config), run.width, run.config.vision
    size, layers, way = config.hidden_size, config.num_hidden_layers, run.checkpointing
    patches, prompts = run.micro * run.patches, run.micro * run.prompt
    tower = v.hidden_size, v.intermediate_size, v.num_heads
    decoder = size, config.intermediate_size, config.num_attention_heads
    moved = casts(run, (run.lora_rank * weights.adapters if run.lora_rank else weights.decoder) // layers)
    keys = w * prompts * run.kv
    mask = w * (run.tokens - 1) * (run.prompt + run.tokens - 1) if run.device == "cpu" else 0
    # In the last block of a prefix only the last token looks (Block.prefix).
    last = keys + (w * prompts * size if way else prompts * norm_kept(run, size) + moved)
    last_norm = norm_kept(run, size) - w * size  # its output, joined to the prompts', is the head's input
    parts = {  # blocks; bytes that one keeps; that it hands on to the next; that are kept around all of them
        "vision": (
            v.depth,
            block_kept(run, patches, *tower, 2 * w * patches * v.hidden_size, casts(run, weights.vision_block)),
            w * patches * v.hidden_size,
            patches * (angles(v.hidden_size // v.num_heads) + w * run.patch) + merger_kept(run),
        ),
        "prompts": (
            layers - 1,
            block_kept(run, prompts, *decoder, keys, moved, copied=False),
            w * prompts * size + keys,
            prompts * angles(config.head_dim) + last,
        ),
        "completions": (
            layers,
            block_kept(run, run.inputs, *decoder, run.joined + mask, moved),
            w * run.inputs * size,
            run.inputs * (angles(config.head_dim) + last_norm) + run.rows * run.tokens * w * size,
        ),
    }
    if run.lora_rank or run.freeze_vision:
        parts["vision"] = (0, 0, 0, 0)
    held = {name: blocks * (on if way else one) + around for name, (blocks, one, on, around) in parts.items()}
    return held, {name: way * one for name, (_, one, _, _) in parts.items()}


def angles(head_dim: int) -> int:
    """Bytes per token of its cosines and sines."""
    return 2 * FULL * head_dim


# ------------------------------------------------------------------------------------------------------------- moments


def in_hand(run: Run, tokens: int, shape: ModelConfig | VisionConfig) -> int:
    """Bytes that a block works with for the moment, forward or backward: the three tensors of SwiGLU, a few around."""
    return run.width * tokens * (3 * shape.intermediate_size + 4 * shape.hidden_size)


def gathered(run: Run, block: int | None = None) -> Parts:
    """Of sharded weights: all, outside the update (ranks.unsharded; of policy or reference). While an update goes
    through blocks of this size, what is in no block, the block and the next one; and its gradients, as they come and
    in fp32, with those of the block before that are still being added up."""
    weights = Weights.of(run.config)
    if run.shards == 1:
        return {}
    if block is None:
        return {"gathered weights": run.width * weights.all}
    sums = (run.width + 2 * FULL) * block
    return {"gathered weights": run.width * (weights.loose + 2 * block), "gradients to add up": sums}


def answering(run: Run, prompts: int, group: int) -> dict[str, Parts]:
    """prefix() and generate() without gradient, every completion at its full length."""
    patches, tokens, rows = prompts * run.patches, prompts * run.prompt, prompts * group
    keys = run.width * run.kv * run.config.num_hidden_layers  # bytes per token
    return {
        "prompts": gathered(run)
        | {"keys and values": keys * tokens}
        | {"patches": patches * run.patch * (FULL + run.width % FULL)}  # as read, and cast
        | {"one block": max(in_hand(run, patches, run.config.vision), in_hand(run, tokens, run.config))},
        "completions": gathered(run)
        | {"keys and values": 2 * keys * tokens}  # and as decoding wants them
        | {"cache": keys * rows * run.tokens}
        | {"logits": rows * run.config.vocab_size * (run.width + 2 * FULL)},  # as they are, tempered, softmax
    }


def rolling_out(run: Run) -> dict[str, Parts]:
    parts = answering(run, run.micro, run.group)
    if run.reference or run.inner_steps > 1:
        logits = run.width * min(HEAD_ROWS, run.rows * run.tokens) * run.config.vocab_size  # of one chunk
        block = in_hand(run, run.inputs, run.config) + run.joined
        keys = {"keys and values": parts["prompts"]["keys and values"]}
        parts["log-probs"] = gathered(run) | keys | {"one block": max(block, logits)}
    more = of_batch(run)  # of the step before, let go when this one's rollout is done
    if run.whole:
        held, _ = kept(run)
        more |= {"kept of vision": held["vision"], "kept of prompts": held["prompts"]}
    return {f"rollout, {name}": part | more for name, part in parts.items()}


def updating(run: Run) -> dict[str, Parts]:
    """The backward pass goes through head, completions, prompts and pictures, and frees what was kept for each."""
    config, weights = run.config, Weights.of(run.config)
    held, again = kept(run)
    vision, of_prompts, of_completions = ({f"kept of {name}": size} for name, size in held.items())
    gradients = {"gradients": FULL * trained(run) // run.shards}
    before = {} if run.micro >= run.batch else gradients  # of earlier micro-batches
    head = 0 if run.lora_rank else FULL * weights.head
    logits = run.width * min(HEAD_ROWS, run.rows * run.tokens) * config.vocab_size
    # A weight that both prompts and completions use gets its gradient when both parts have come: the first one waits.
    # Of a sharded one, all of it, since the ranks add it up then, but in the dtype in which the weight was gathered.
    wide = FULL if run.shards == 1 else run.width
    waits = wide * (trained(run) if run.lora_rank else weights.decoder)
    others = waits - waits // config.num_hidden_layers  # than those of the block at hand
    keys = {"gradients of keys and values": run.width * run.kv * config.num_hidden_layers * run.micro * run.prompt}
    through = gathered(run, weights.decoder // config.num_hidden_layers)
    completions = through | {"one block": again["completions"] + in_hand(run, run.inputs, config) + run.joined}
    prompts = through | {"one block": again["prompts"] + in_hand(run, run.micro * run.prompt, config)}
    forward = before | vision | of_prompts | {"gradient of the head": head}
    parts = {
        "head": forward | of_completions | through | {"logits": logits + casts(run, head // FULL)},
        "completions": forward | of_completions | completions,
        "completions' end": forward | completions | keys | {"gradients that wait": others},
        "prompts": forward | prompts | keys | {"gradients that wait": waits + head},  # the embedding's, of head's size
    }
    if held["vision"]:
        block = {"one block": again["vision"] + in_hand(run, run.micro * run.patches, config.vision)}
        block |= gathered(run, weights.vision_block)
        parts["pictures"] = gradients | {"kept of vision": held["vision"] - merger_kept(run)} | block
    return {f"update, {name}": part for name, part in parts.items()}


def evaluating(run: Run) -> dict[str, Parts]:
    pictures, answers = waiting(run, run.evaluation), answering(run, run.evaluation, 1)
    return {f"evaluation, {name}": part | pictures for name, part in answers.items()} if run.evaluation else {}


def moments(run: Run) -> dict[str, Parts]:
    """What each moment of a step holds besides always(run)."""
    return rolling_out(run) | updating(run) | evaluating(run)


def peak(run: Run) -> int:
    """Bytes."""
    return total(always(run)) + max(map(total, moments(run).values()))


def total(parts: Parts) -> int:
    return sum(parts.values())


# -------------------------------------------------------------------------------------------------------------- choice


def fits(run: Run, memory: int) -> bool:
    return peak(run) <= FILL[run.device] * memory


def choose(run: Run, memory: int, micro: int | None = None, checkpointing: bool | None = None) -> Run:
    """The run with what was left open (None) decided; if nothing fits, the one that needs least.

    Fewest passes come first: decoding reads every weight once per token, for however few rows. Then no checkpointing.
    """
    room = FILL[run.device] * memory - total(always(run))
    for share in range(run.evaluation, 0, -1):  # how many at a time changes nothing but rounding
        run = replace(run, evaluation=share)
        if max(map(total, evaluating(run).values())) <= room:
            break
    sizes = {math.ceil(run.batch / passes) for passes in range(1, run.batch + 1)} if micro is None else {micro}
    ways = (False, True) if checkpointing is None else (checkpointing,)
    runs = [replace(run, micro=size, checkpointing=way) for size in sorted(sizes, reverse=True) for way in ways]
    return next((each for each in runs if fits(each, memory)), min(runs, key=peak))


def smaller_pictures(run: Run) -> Run:
    v = run.config.vision
    patches = min(run.patches, 401408 // v.patch_size**2)
    return replace(run, patches=patches, prompt=run.prompt - (run.patches - patches) // v.spatial_merge_size**2)


CHANGES = {  # that make a run smaller; what changes the method least comes first
    "--max-pixels 401408": smaller_pictures,
    "--max-tokens 256": lambda run: replace(run, tokens=min(run.tokens, 256)),
    "--freeze-vision": lambda run: replace(run, freeze_vision=True),
    "--beta 0": lambda run: replace(run, reference=False),
    "--lora-rank 64": lambda run: replace(run, lora_rank=run.lora_rank or 64, freeze_vision=False),
}


def remedy(run: Run, memory: int) -> str:
    """Flags with which the run fits, as few as can be; or what it takes with all of them."""

    def changed(flags: list[str]) -> Run:
        made = run
        for name in flags:
            made = CHANGES[name](made)
        return choose(made, memory)

    flags = [name for name in CHANGES if run.shards == 1 or "lora" not in name]  # shards take no adapters
    if not fits(changed(flags), memory):
        least = peak(changed(flags)) / FILL[run.device]
        sentence = f"no flags make it fit: {' '.join(flags)} would take {gigabytes(least)} GB"
        return f"{sentence}; take a smaller model, or more ranks and --shard"
    for name in reversed(CHANGES):
        fewer = [flag for flag in flags if flag != name]
        if fits(changed(fewer), memory):
            flags = fewer
    made = changed(flags)
    return f"{' '.join([*flags, choices(made)])} would fit, peak {gigabytes(peak(made))} GB"


# ------------------------------------------------------------------------------------------------- from flags, to words


def read_memory(text: str) -> int:
    """24GB -> bytes."""
    text = text.rpartition("x")[2]
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?GB", text) or float(text[:-2]) == 0:
        raise InputError(f"--memory wants a number of GB such as 24GB, not {text!r:.40}")
    return int(float(text[:-2]) * GB)


def free_memory(device: str, root: Path = Path("/")) -> int:
    """Bytes that the device has to spare now: of a CPU what the machine and, in a container, its limit leave."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (root / "proc/meminfo").exists():  # Linux
        found = re.search(r"MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text())
        sizes += [int(found[1]) * 1024] if found else []
    return max(min([*sizes, *left_by_groups(root)]), 0)


GROUPS = (  # of version 2 and 1: folder, limit, bytes in use, of which the pages of files that can be dropped
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def left_by_groups(root: Path) -> Iterator[int]:
    """Bytes that each of the process's control groups leaves below its limit: its own and all those around it."""

    def read(file: Path) -> str:
        try:
            return file.read_text()
        except OSError:  # a container has the files of its own group only, and not always all of them
            return ""

    paths = {}  # version -> the process's group
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths[1 if controllers else 0] = path.strip("/")
    for version, (folder, limit, used, dropped) in enumerate(GROUPS):
        group = root / folder / paths.get(version, "")
        for place in (group, *group.parents):
            most, taken = read(place / limit).strip(), read(place / used).strip()
            if most.isdigit() and taken.isdigit():  # "max", or some 2^63 in version 1, is no limit
                cache = re.search(rf"^{dropped} (\d+)$", read(place / "memory.stat"), re.MULTILINE)
                yield int(most) - int(taken) + (int(cache[1]) if cache else 0)
            if place == root / folder:
                break


def share_of_memory(args) -> int:
    """Bytes for this rank: of a GPU, each has its own; the memory of a CPU is shared by all ranks of the machine."""
    memory = free_memory(args.device) if args.memory is None else read_memory(args.memory)
    on_cpu = torch.device(args.device).type == "cpu"
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks)) if on_cpu else memory


def longest_prompt(args, base: Path, samples: list[Sample]) -> tuple[int, int, str]:
    """(tokens, patches of the picture, in words what was looked at). Without samples: the largest picture allowed."""
    known = any((base / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
    images = ImageConfig.from_folder(base, max_pixels=args.max_pixels) if known else ImageConfig()
    images = images if known or args.max_pixels is None else replace(images, max_pixels=args.max_pixels)

    def tokens(size: tuple[int, int]) -> int:
        height, width = smart_resize(size[1], size[0], images.factor, images.min_pixels, images.max_pixels)
        return height * width // images.factor**2

    def usable(values: Iterable, function):  # records that cannot be used are named later, by Task.usable
        for value in values:
            try:
                yield function(value)
            except InputError:
                continue

    def size(sample: Sample) -> tuple[int, int]:
        return (sample.media.size,) * 2 if isinstance(sample.media, PhantomImage) else sample.size

    picture = max(usable({size(sample) for sample in samples}, tokens), default=images.max_pixels // images.factor**2)
    source = "the largest of --data" if samples else f"the largest that --max-pixels {images.max_pixels} lets in"
    text = TEXT_TOKENS.get(args.prompt, max(TEXT_TOKENS.values()))
    if (base / "tokenizer.json").exists():
        processor = Processor(base, args.prompt, TASKS, max_pixels=args.max_pixels)
        by_length = sorted(samples or phantoms(None, 0, 0, 1), key=lambda sample: len(sample.query), reverse=True)
        text = next(usable(by_length, lambda s: processor.check(s) - tokens(size(s))), text)
    words = f"{picture + text} tokens a prompt: {picture} of its picture ({source}), {text} of text"
    return picture + text, picture * images.merge_size**2, words


def read_run(args, base: Path, samples: list[Sample]) -> tuple[Run, str]:
    """The run that the flags describe, and in words what its prompts are taken to be."""
    if args.estimate and args.data == "phantoms" and args.model != "nano":
        samples = []  # no data named yet: nobody means phantoms
    config = read_config(read_object(base / "config.json"), str(base / "config.json"))
    prompt, patches, words = longest_prompt(args, base, samples)
    share = math.ceil(args.batch_size / args.ranks)  # prompts of a step on one rank
    if args.ranks > 1:
        words = f"{'a shard' if args.shard else 'a copy'} of the weights on each of {args.ranks} ranks; {words}"
    evaluated = EVALUATION if args.val or held_out_phantoms(args.data) else 0
    run = Run(
        config=config,
        prompt=prompt,
        patches=patches,
        batch=share,
        micro=share,
        group=args.group_size,
        tokens=args.max_tokens,
        width=getattr(torch, args.dtype).itemsize,
        shards=args.ranks if args.shard else 1,
        lora_rank=args.lora_rank,
        freeze_vision=args.freeze_vision,
        reference=args.beta > 0,
        inner_steps=args.inner_steps,
        dynamic=args.dynamic_sampling > 0,
        device=torch.device(args.device).type,
        ahead=share if args.workers else 0,
        evaluation=min(evaluated, args.eval_limit or EVALUATION),
    )
    return run, words


def settle(args, base: Path, samples: list[Sample]) -> tuple[Run, str]:
    """Set --micro-batch and --checkpointing where they were left open -> (the run, what to print: a line, or with
    --estimate a page). InputError if --memory was given and is too little; if it was not, that is a warning only."""
    asked, words = read_run(args, base, samples)
    if args.memory is None and args.estimate and asked.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--estimate: there is no GPU here to ask; say what it has, such as --memory 24GB")
    memory = min(ranks.gather_objects(lambda: share_of_memory(args)))  # where one rank has less, all make do with less
    given = None if args.micro_batch is None else min(args.micro_batch, asked.batch)
    run = choose(asked, memory, given, args.checkpointing)
    args.micro_batch = run.micro if args.micro_batch is None else args.micro_batch
    args.checkpointing = run.checkpointing
    if args.estimate:
        return run, page(asked, run, memory, words)
    if fits(run, memory):
        return run, f"plan: {choices(run)}, estimated peak {verdict(run, memory)}; {words}"
    sentence = f"estimated peak {verdict(run, memory)} with {choices(run)}; {remedy(asked, memory)} (sums: --estimate)"
    if args.memory is not None:
        raise InputError(f"--memory {args.memory}: {sentence}")
    return run, f"this may run out of memory: {sentence}"


def choices(run: Run) -> str:
    return f"--micro-batch {run.micro} {'--checkpointing' if run.checkpointing else '--no-checkpointing'}"


def gigabytes(size: float) -> str:
    return f"{size / GB:.3f}" if size < GB else f"{size / GB:.3g}"


def verdict(run: Run, memory: int) -> str:
    share = FILL[run.device]
    return f"{gigabytes(peak(run))} GB of {gigabytes(share * memory)} GB ({share:.0%} of {gigabytes(memory)} GB)"


def page(asked: Run, run: Run, memory: int, words: str) -> str:
    """All that an estimate has to say: the run as chosen, and what would fit elsewhere."""

    def line(name: str, parts: Parts) -> str:
        shown = [f"{part} {gigabytes(size)}" for part, size in parts.items() if size >= total(parts) / 50]
        return f"  {name:<26}{gigabytes(total(parts)):>6}  {', '.join(shown)}"

    rest = moments(run)
    highest = max(rest, key=lambda name: total(rest[name]))
    millions = [f"{number / 1e6:,.1f} M" for number in (trained(run), Weights.of(run.config).all)]
    outcome = "it fits" if fits(run, memory) else f"it does not fit; {remedy(asked, memory)}"
    lines = [
        "memory of a step, ESTIMATED: arithmetic of plan.py, nothing was measured; GB = 2^30 bytes",
        f"  {words}; {run.group} x {run.tokens} tokens of completions",
        f"  {' of '.join(millions)} parameters trained; {choices(run)}",
        line("always there", always(run)),
        *(line(name, parts) for name, parts in rest.items()),
        f"  {'peak':<26}{gigabytes(peak(run)):>6}  {highest}",
        f"{verdict(run, memory)}: {outcome}",
    ]
    for card in CARDS:
        made = choose(asked, card * GB)
        fitting = f"{choices(made)} fits, peak {gigabytes(peak(made))} GB"
        lines.append(f"{card} GB: {fitting if fits(made, card * GB) else remedy(asked, card * GB)}")
    return "\n".join(lines)
