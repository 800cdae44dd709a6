"""Supervised fine-tuning: the baseline that GRPO has to beat, and the maker of the nano policy.

    python train_sft.py --make-nano                                         assets/nano/ from random weights, two stages
    python train_sft.py --data train.jsonl --val val.jsonl --out out-sft     any policy on any records, exact boxes
    python train_sft.py --data train.jsonl --coarse --out out-coarse         jittered, inflated boxes, redrawn each time

The loss is the mean negative log-likelihood of the answer's tokens, EOS included; the prompt is not trained. A COARSE
label keeps where a lesion is and loses how far it reaches: the start that the paper is about, where a threshold of IoU
0.5 pays almost nothing. It is made on purpose; the exact-SFT policy is the row to compare with.

Everything follows from --seed: weights, order of the samples, coarse labels.
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import checkpoint
import config
import hub
import lock
import stop
from data import (
    CLIP_MEAN,
    CLIP_STD,
    BadRecords,
    Box,
    Sampler,
    answer_text,
    held_out_phantoms,
    load_samples,
    phantom_samples,
    prompt_style,
    to_model,
)
from errors import InputError
from eval import NANO, Task, default_prompt, evaluate, model_folder, summary
from images import PIXEL_LIMIT
from model import Policy, collate
from phantoms import QUERIES
from pipeline import Readers
from ranks import check_device
from weights import load_policy, read_config, save_policy

# The nano policy: a real Qwen2.5-VL of 2.3 M parameters. Two full-attention blocks around a windowed one, 2 key heads
# for 4 query heads, and 5 x 5 image tokens in windows of 4 x 4: every mechanism of the large ones is in it.
NANO_TEXT = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, max_position_embeddings=2048, use_sliding_window=False, hidden_act="silu",
    rope_theta=1e4,  # positions stay below 100; the published 1e6 would leave most frequencies still
    rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
)  # fmt: skip
NANO_VISION = dict(
    model_type="qwen2_5_vl", depth=3, hidden_size=128, intermediate_size=512, num_heads=4, out_hidden_size=128,
    fullatt_block_indexes=[0, 2], window_size=112, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
    in_channels=3, hidden_act="silu",
)  # fmt: skip
NANO_DATA_SEED = 20_260_328  # of its phantoms: a series that no GRPO run (seed 0, 1, 2 ...) draws from
NANO_STAGES = (  # name, steps of 32, lr, coarse
    ("exact", 2000, 1e-3, False),
    ("coarse", 200, 5e-4, True),
)

SPECIALS = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>").split()
# Qwen2.5-VL's template without the system turn: twenty tokens less in every prompt.
NANO_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's way to cut a text before byte pairs are merged; each digit stays alone, so a coordinate is its digits.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def nano_tokenizer() -> Tokenizer:
    """Byte-level byte-pair encoding: all 256 bytes, the special tokens, and the words of the phantoms' prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = ["user\n", "assistant\n", *QUERIES.values()] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def write_nano(folder: Path, seed: int) -> None:
    """A checkpoint folder with random weights: everything but the training."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = nano_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    rows = math.ceil(tokenizer.get_vocab_size() / 64) * 64  # as the published models: more rows than tokens
    config = NANO_TEXT | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "bos_token_id": pad,
        "eos_token_id": eos,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": NANO_VISION,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [eos, pad], "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": NANO_TEMPLATE,
            "model_max_length": NANO_TEXT["max_position_embeddings"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 252 * 252,  # 81 image tokens
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    policy = Policy(read_config(config), (eos, pad)).init_weights(seed)
    policy.raw_config = config
    save_policy(policy, folder)


def coarse_box(box: Box, width: int, height: int, rng: np.random.Generator, shift: float, scale: float, spread: float):
    """A box that knows where, not how far: centre moved by N(0, shift) of the size, size times exp(N(scale, spread)),
    cut at the picture's edge. box, width and height in one frame (here the model's)."""
    w, h = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + w * rng.normal(0, shift)
    y = (box[1] + box[3]) / 2 + h * rng.normal(0, shift)
    w, h = w * math.exp(rng.normal(scale, spread)), h * math.exp(rng.normal(scale, spread))
    # A centre that left the picture would leave no box: hold it inside.
    x, y = min(max(x, 1.0), width - 1.0), min(max(y, 1.0), height - 1.0)
    return max(x - w / 2, 0.0), max(y - h / 2, 0.0), min(x + w / 2, float(width)), min(y + h / 2, float(height))


def adamw(policy: Policy, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def sft(
    task: Task, optimizer, samples: list, args: argparse.Namespace, steps: int, lr: float, coarse: bool,
    readers: Readers, first: int = 0,
) -> Iterator[dict]:  # fmt: skip
    """Train task.policy in place from step `first` on: AdamW, linear warm-up, cosine to a twentieth. -> each step's
    metrics, once it is done. Ends early, its step dropped, where stop.asked."""
    policy, device = task.policy, next(task.policy.parameters()).device
    sampler = Sampler(len(samples), args.batch_size, args.seed)
    indices = (index for step in range(first, steps) for index in sampler.indices(step))
    views = readers.read(indices, samples, task.image_config, ahead=args.batch_size)
    eos = policy.eos_ids[0]
    name = "sft coarse" if coarse else "sft"
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=name)):
        started = time.perf_counter()
        now = lr * min(1.0, (step + 1) / args.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = now
        prompts, answers = [], []
        for index, view in islice(views, args.batch_size):
            prompt = task.prompt(samples[index], view)
            box = to_model(prompt.box, prompt.scale)
            if coarse:
                patch = task.image_config.patch_size
                rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([args.seed, step, index])))
                width, height = prompt.grid[2] * patch, prompt.grid[1] * patch
                box = coarse_box(box, width, height, rng, args.coarse_shift, args.coarse_scale, args.coarse_spread)
            ids = task.tokenizer.encode(answer_text(box, task.style, samples[index].query), add_special_tokens=False)
            prompts.append(prompt)
            answers.append(torch.tensor([*ids, eos]))
        loss_sum, tokens = 0.0, sum(map(len, answers))
        optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(prompts), args.micro_batch):
            if stop.asked:
                return
            batch, part = prompts[i : i + args.micro_batch], answers[i : i + args.micro_batch]
            lengths = torch.tensor([len(a) for a in part], device=device)[:, None]  # (B, 1): groups of one
            ids = torch.stack([F.pad(a, (0, int(lengths.max()) - len(a))) for a in part]).to(device)[:, None]
            logp = policy.logprobs(policy.prefix(collate(batch, device)), ids, lengths)
            loss = -logp.sum() / tokens
            loss.backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise InputError(f"step {step + 1}: loss {loss_sum} or gradient norm {norm} is not finite; lower --lr")
        optimizer.step()
        bar.set_postfix_str(f"loss {loss_sum:.3f}")
        seconds = time.perf_counter() - started
        yield {"step": step + 1, "loss": loss_sum, "grad_norm": norm, "lr": now, "seconds": seconds}


def make_nano(args: argparse.Namespace, readers: Readers) -> None:
    """assets/nano from nothing: exact boxes until it can see, then coarse ones until threshold rewards are sparse."""
    folder = Path(args.out or NANO)
    write_nano(folder, args.seed)
    test = load_samples("phantoms", args.seed, "test")
    task = Task(load_policy(folder), folder, "answer")
    results = {"command": "python train_sft.py --make-nano", "seed": args.seed}
    for name, steps, lr, coarse in NANO_STAGES:
        # The second stage draws its phantoms from where the first one stopped: no picture is seen twice.
        start = 0 if not coarse else NANO_STAGES[0][1] * args.batch_size
        samples = phantom_samples(None, NANO_DATA_SEED, start, steps * args.batch_size)
        for _ in sft(task, adamw(task.policy, lr), samples, args, steps, lr, coarse, readers):
            pass
        # What is stored is bf16: go on from, and evaluate, exactly that.
        for parameter in task.policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[name], _ = evaluate(task, test, 50, 24, progress=name)
        tqdm.write(summary(name, results[name]))
        if args.keep_exact and not coarse:
            task.save(Path(args.keep_exact))
    task.save(folder, torch.bfloat16)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")


DEFAULTS = dict(
    make_nano=False,
    keep_exact=None,
    model="nano",
    data="phantoms",
    val=None,  # held-out phantoms for phantoms, else nothing
    out=None,
    prompt=None,  # the one that the policy was trained with, else think
    queries=None,
    max_pixels=None,  # what its folder says
    skip_bad=0,
    allow_outside=False,
    clip=False,
    pixel_limit=PIXEL_LIMIT,
    steps=200,
    batch_size=32,
    micro_batch=32,
    lr=5e-4,  # suits the nano policy; 1e-5 a 3B one
    warmup=50,
    max_tokens=None,
    coarse=False,
    coarse_shift=0.22,
    coarse_scale=0.8,
    coarse_spread=0.35,
    save_every=config.DEFAULTS["save_every"],
    keep=None,
    workers=config.DEFAULTS["workers"],
    seed=0,
    device=config.DEFAULTS["device"],
)
# Of the flags those that a resumed run may change: none of them decides what is learned. --steps does, by the cosine.
FREE_ON_RESUME = config.FREE_ON_RESUME & DEFAULTS.keys() - {"steps"} | {"resume"}


def make_parser() -> argparse.ArgumentParser:
    """Only flags that were given end up in its namespace."""
    parser = errors.Parser(
        prog="train_sft.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def flag(name: str, text: str = "", kind: type | None = None, **options) -> None:
        default = DEFAULTS[name]
        shown = "" if default in (None, False) else f" (default {default})"
        if default is False:
            options["action"] = "store_true"
        else:
            options["type"] = kind or type(default)
        parser.add_argument(config.flag(name), help=f"{text}{shown}" or None, **options)

    flag("make_nano", "make assets/nano (or --out) from random weights")
    flag("keep_exact", "with --make-nano: also save the exact-SFT policy in this folder", str)
    flag("model", "checkpoint folder, nano, or org/name of the Hugging Face Hub")
    flag("data", "JSONL files, or phantoms[:dermoscopy|xray|ultrasound]")
    flag("val", "evaluated before and after; default: held-out phantoms for phantoms, else nothing", str)
    flag("out", "folder for checkpoints, metrics.jsonl and eval.json; must be empty or new", str)
    resume = "go on from the newest checkpoint in --out, or begin if there is no run in it"
    parser.add_argument("--resume", action="store_true", help=resume)
    prompt = "answer, think, qwen or a text file with {query} in it; default: the one it was trained with, else think"
    flag("prompt", prompt, prompt_style)
    flag("queries", "JSON file: what the records call it -> the phrase to ask with, or several", str)
    flag("max_pixels", "largest picture that the policy sees; default: its folder's", int)
    flag("skip_bad", "records that may be unusable; they are left out, listed")
    flag("allow_outside", "records may name pictures outside the folder of their file")
    flag("clip", "cut boxes that reach over the picture's edge, and count them")
    flag("pixel_limit", "pixels of the largest picture file that is opened")
    flag("steps", "optimiser steps")
    flag("batch_size", "answers per optimiser step")
    flag("micro_batch", "answers per forward pass")
    flag("lr", "learning rate; 1e-5 suits a 3B policy")
    flag("warmup", "steps of linear warm-up")
    flag("max_tokens", "of an answer in evaluations", int)
    flag("coarse", "jittered, inflated boxes")
    flag("coarse_shift", "std of the centre's shift, in box sizes")
    flag("coarse_scale", "mean of the log of the size factor")
    flag("coarse_spread", "std of the log of the size factor")
    flag("save_every", "steps between checkpoints; the last step is always saved")
    flag("keep", "checkpoints that stay, the newest; default: all", int)
    flag("workers", "processes that read pictures ahead")
    flag("seed", "of the order of samples, phantoms and coarse boxes")
    flag("device", "cpu or cuda")
    return parser


def parse_arguments() -> argparse.Namespace:
    """The resolved flags: those that were given, the resumed run's, the defaults."""
    parser, saved = make_parser(), {}
    explicit = vars(parser.parse_args())
    making, out = explicit.get("make_nano"), explicit.get("out")
    asked_to = explicit.pop("resume", False)
    if not making and not out:
        parser.error("--out is needed: the folder for the trained checkpoint")
    if making and asked_to:
        parser.error("--resume changes nothing beside --make-nano, which always begins anew; drop it")
    file = Path(out or NANO) / "config.json"
    there = asked_to and os.path.lexists(file)
    if there:
        saved = config.read_saved(file, DEFAULTS)
        explicit = config.pinned(explicit, saved)
        config.refuse_changes(parser, explicit, saved, FREE_ON_RESUME)
    args = argparse.Namespace(**DEFAULTS | saved | explicit, resume=there, begins=asked_to and not there)
    for sentence in config.out_of_bounds(args):
        parser.error(sentence)
    if args.warmup < 1:
        parser.error("--warmup must be at least 1")
    if not args.lr > 0:
        parser.error("--lr must be above 0 and finite")
    check_device(args.device)
    return args


def main() -> None:
    args = parse_arguments()
    with ExitStack() as ending:
        readers = ending.enter_context(Readers(args.workers))
        if args.make_nano:
            make_nano(args, readers)
            return
        try:
            train(args, readers, ending)
        except stop.Stopped:
            tqdm.write(checkpoint.stopped(Path(args.out), "train_sft.py"))


def train(args: argparse.Namespace, readers: Readers, ending: ExitStack) -> None:
    """Any policy on any records, evaluated before and after."""
    if args.begins:
        tqdm.write(f"--resume: {args.out} holds no run yet, so this begins one")
    out = checkpoint.check_out(args.out, args.resume)
    ending.enter_context(lock.held(out))
    checkpoint.check_out(args.out, args.resume)  # as it is now that nobody else writes to it
    saved = []
    if args.resume:
        if words := config.same_threads(out / "config.json"):
            tqdm.write(words)
        checkpoint.tidy(out)
        saved = checkpoint.checkpoints(out)
    folder = model_folder(args.model)
    args.model = hub.pinned(args.model, folder)
    args.prompt = args.prompt or default_prompt(folder)
    max_tokens = args.max_tokens or (24 if args.prompt == "answer" else 512)
    if saved:
        checkpoint.verify(saved[-1])
    if args.resume:
        tqdm.write(
            "--resume: " + (f"going on from {saved[-1]}" if saved else f"{out} has no checkpoint yet, so from step 0")
        )
    policy = load_policy(saved[-1] if saved else folder, args.device)
    policy.source = folder  # whose tokenizer goes with every checkpoint; the one that is gone on from may be pruned
    policy.compute_dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    bad = BadRecords(args.skip_bad)
    Image.MAX_IMAGE_PIXELS = args.pixel_limit
    given = (bad, args.queries, args.allow_outside, args.clip)
    samples = load_samples(args.data, args.seed, "train", *given)
    held_out = args.val or held_out_phantoms(args.data)
    val = load_samples(held_out, args.seed, "test", *given) if held_out else []
    task = Task(policy, folder, args.prompt, policy.config.max_position_embeddings - max_tokens, args.max_pixels)
    samples, val = task.usable(samples, bad), task.usable(val, bad, decode=True)
    for line in bad.lines():
        tqdm.write(line)
    optimizer, first, results = adamw(policy, args.lr), 0, {}
    if saved:
        state = checkpoint.load(saved[-1], policy, optimizer)
        checkpoint.check_results(saved[-1], state)
        first, results = state["step"], state["evaluation"]
    checkpoint.keep_until(out / "metrics.jsonl", first, each=True)
    checkpoint.write_whole(out / "config.json", json.dumps(config.describe(args), indent=2) + "\n")
    ending.enter_context(stop.listening())
    if val and "start" not in results:
        results["start"], _ = evaluate(task, val, 50, max_tokens, progress="start")
        tqdm.write(summary("start", results["start"]))

    latest = done = first  # latest: what the newest checkpoint has

    def save(step: int) -> None:
        nonlocal latest
        if step > latest:
            checkpoint.sync(out / "metrics.jsonl")
            checkpoint.save(out, step, task, optimizer, {"evaluation": results}, args.keep)
            latest = step

    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        for row in sft(task, optimizer, samples, args, args.steps, args.lr, args.coarse, readers, first):
            print(json.dumps(row), file=file, flush=True)
            done = row["step"]
            if done == args.steps or done % args.save_every == 0:
                save(done)
    if stop.asked:
        save(done)
        raise stop.Stopped
    if val:
        results["final"], _ = evaluate(task, val, 50, max_tokens, progress="final")
        tqdm.write(summary("final", results["final"]))
    checkpoint.write_whole(out / "eval.json", json.dumps(results, indent=2) + "\n")
    tqdm.write(f"saved {out}/step-{args.steps:06d}")


if __name__ == "__main__":
    errors.run(main, "lower --micro-batch")
