"""Supervised fine-tuning: the baseline that GRPO has to beat, and the maker of the nano policy.

    python train_sft.py --make-nano                                         assets/nano/ from random weights, two stages
    python train_sft.py --data train.jsonl --val val.jsonl --out out-sft     any policy on any records, exact boxes
    python train_sft.py --data train.jsonl --coarse --out out-coarse         jittered, inflated boxes, redrawn each time

The loss is the mean negative log-likelihood of the answer's tokens, EOS included; the prompt is not trained. A COARSE
label keeps where a lesion is and loses how far it reaches: the start that the paper is about, where a threshold of IoU
0.5 pays almost nothing. It is made on purpose; the exact-SFT policy is the row to compare with.

Everything follows from --seed: weights, order of the samples, coarse labels.
"""

import argparse
import json
import math
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import checkpoint
import errors
import hub
from config import DEFAULTS
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
from model import ModelConfig, Policy, check_device, collate
from phantoms import QUERIES
from pipeline import Readers

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
    policy = Policy(ModelConfig.from_dict(config), (eos, pad)).init_weights(seed)
    policy.raw_config = config
    policy.save_folder(folder)


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


def sft(
    task: Task, samples: list, args: argparse.Namespace, steps: int, lr: float, coarse: bool, log, readers: Readers
) -> None:
    """Train task.policy in place: AdamW, linear warm-up, cosine to a twentieth. `log` gets one dict per step."""
    policy, device = task.policy, next(task.policy.parameters()).device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    sampler = Sampler(len(samples), args.batch_size, args.seed)
    indices = (index for step in range(steps) for index in sampler.indices(step))
    views = readers.read(indices, samples, task.image_config, ahead=args.batch_size)
    eos = policy.eos_ids[0]
    for step in (bar := tqdm(range(steps), desc="sft coarse" if coarse else "sft")):
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
        log(
            {"step": step + 1, "loss": loss_sum, "grad_norm": norm, "lr": now, "seconds": time.perf_counter() - started}
        )
        bar.set_postfix_str(f"loss {loss_sum:.3f}")


def make_nano(args: argparse.Namespace, readers: Readers) -> None:
    """assets/nano from nothing: exact boxes until it can see, then coarse ones until threshold rewards are sparse."""
    folder = Path(args.out or NANO)
    write_nano(folder, args.seed)
    test = load_samples("phantoms", args.seed, "test")
    task = Task(Policy.from_folder(folder), folder, "answer")
    results = {"command": "python train_sft.py --make-nano", "seed": args.seed}
    metrics_log = []
    for name, steps, lr, coarse in NANO_STAGES:
        # The second stage draws its phantoms from where the first one stopped: no picture is seen twice.
        start = 0 if not coarse else NANO_STAGES[0][1] * args.batch_size
        samples = phantom_samples(None, NANO_DATA_SEED, start, steps * args.batch_size)
        sft(task, samples, args, steps, lr, coarse, metrics_log.append, readers)
        # What is stored is bf16: go on from, and evaluate, exactly that.
        for parameter in task.policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[name], _ = evaluate(task, test, 50, 24, progress=name)
        tqdm.write(summary(name, results[name]))
        if args.keep_exact and not coarse:
            task.save(Path(args.keep_exact))
    task.save(folder, torch.bfloat16)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser(
        prog="train_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make-nano", action="store_true", help="make assets/nano (or --out) from random weights")
    parser.add_argument("--keep-exact", help="with --make-nano: also save the exact-SFT policy in this folder")
    parser.add_argument("--model", default="nano", help="checkpoint folder, nano, or org/name of the Hugging Face Hub")
    parser.add_argument("--data", default="phantoms", help="JSONL files, or phantoms[:dermoscopy|xray|ultrasound]")
    parser.add_argument(
        "--val", help="evaluated before and after; default: held-out phantoms for phantoms, else nothing"
    )
    parser.add_argument("--out", help="folder for the trained checkpoint, metrics.jsonl and eval.json")
    parser.add_argument(
        "--prompt",
        type=prompt_style,
        help="answer, think, qwen or a text file with {query} in it; default: the one it was trained with, else think",
    )
    parser.add_argument("--queries", help="JSON file: what the records call it -> the phrase to ask with, or several")
    parser.add_argument("--max-pixels", type=int, help="largest picture that the policy sees; default: its folder's")
    parser.add_argument(
        "--skip-bad", type=int, default=0, help="records that may be unusable; they are left out, listed"
    )
    outside = "records may name pictures outside the folder of their file"
    parser.add_argument("--allow-outside", action="store_true", help=outside)
    limit = "pixels of the largest picture file that is opened"
    parser.add_argument("--pixel-limit", type=int, default=PIXEL_LIMIT, help=limit)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="answers per optimiser step")
    parser.add_argument("--micro-batch", type=int, default=32, help="answers per forward pass")
    parser.add_argument("--lr", type=float, default=5e-4, help="5e-4 suits the nano policy; 1e-5 a 3B one")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--max-tokens", type=int, help="of an answer in evaluations")
    parser.add_argument("--coarse", action="store_true", help="jittered, inflated boxes")
    parser.add_argument("--coarse-shift", type=float, default=0.22, help="std of the centre's shift, in box sizes")
    parser.add_argument("--coarse-scale", type=float, default=0.8, help="mean of the log of the size factor")
    parser.add_argument("--coarse-spread", type=float, default=0.35, help="std of the log of the size factor")
    parser.add_argument("--workers", type=int, default=DEFAULTS["workers"], help="processes that read pictures ahead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "micro_batch", "warmup", "pixel_limit"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    if not (math.isfinite(args.lr) and args.lr > 0):
        parser.error("--lr must be above 0 and finite")
    check_device(args.device)
    if not args.make_nano and not args.out:
        parser.error("--out is needed: the folder for the trained checkpoint")
    return args


def main() -> None:
    args = parse_arguments()
    with Readers(args.workers) as readers:
        make_nano(args, readers) if args.make_nano else train(args, readers)


def train(args: argparse.Namespace, readers: Readers) -> None:
    """Any policy on any records, evaluated before and after."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty; name a new folder or remove it")
    folder = model_folder(args.model)
    args.model = hub.pinned(args.model, folder)
    prompt = args.prompt or default_prompt(folder)
    max_tokens = args.max_tokens or (24 if prompt == "answer" else 512)
    policy = Policy.from_folder(folder, args.device)
    policy.compute_dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    bad = BadRecords(args.skip_bad)
    Image.MAX_IMAGE_PIXELS = args.pixel_limit
    samples = load_samples(args.data, args.seed, "train", bad, args.queries, args.allow_outside)
    held_out = args.val or held_out_phantoms(args.data)
    val = load_samples(held_out, args.seed, "test", bad, args.queries, args.allow_outside) if held_out else []
    task = Task(policy, folder, prompt, policy.config.max_position_embeddings - max_tokens, args.max_pixels)
    samples, val = task.usable(samples, bad), task.usable(val, bad, decode=True)
    for sentence in bad.sentences.values():
        tqdm.write(f"left out: {sentence}")
    os.makedirs(out, exist_ok=True)
    (out / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    results = {}
    if val:
        results["start"], _ = evaluate(task, val, 50, max_tokens, progress="start")
        tqdm.write(summary("start", results["start"]))
    with open(out / "metrics.jsonl", "w") as file:
        sft(
            task,
            samples,
            args,
            args.steps,
            args.lr,
            args.coarse,
            lambda row: print(json.dumps(row), file=file, flush=True),
            readers,
        )
    if val:
        results["final"], _ = evaluate(task, val, 50, max_tokens, progress="final")
        tqdm.write(summary("final", results["final"]))
    checkpoint.write_whole(out / "eval.json", json.dumps(results, indent=2) + "\n")
    trained = out / f"step-{args.steps:06d}"
    partial = out / f"{checkpoint.PARTIAL}{trained.name}"
    task.save(partial)
    checkpoint.seal(partial, trained)
    tqdm.write(f"saved {trained}")


if __name__ == "__main__":
    errors.run(main, "lower --micro-batch")
