"""Supervised fine-tuning: the baseline that GRPO has to beat, and its start.

    python train_sft.py --data train.jsonl --val val.jsonl --out out-sft     any policy on any records, exact targets
    python train_sft.py --data train.jsonl --coarse --out out-coarse         jittered, inflated boxes, redrawn each time
                                                                             (of several: now and then one less or more)

The loss is the mean negative log-likelihood of the answer's tokens, EOS included; the prompt is not trained. A COARSE
label keeps where a lesion is and loses how far it reaches: the start that the paper is about, where a threshold of IoU
0.5 pays almost nothing. Of captions with slots a coarse one is a habit: mostly the first option. Both are made on
purpose; the exact-SFT policy is the row to compare with. prepare/nano.py makes the nano policy with both stages.

Everything follows from --seed: order of the samples, coarse labels.
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
from data import BadRecords, held_out_phantoms, load_samples
from errors import InputError
from eval import evaluate
from images import Box, Sample
from knowledge import Knowledge
from model import Policy, collate
from prompts import Processor, Prompt, default_prompt
from runtime import checkpoint
from runtime.readers import Readers
from runtime.run import begin
from runtime.state import check_results
from runtime.stream import sampler_of
from tasks import TASKS, summary
from tasks.box import to_model
from tasks.caption import Caption
from tasks.label import named_in
from weights import load_policy, model_folder, pinned

FIRST = 0.6  # of a coarse caption's slots, the share that is the first option


@dataclass(frozen=True)
class Coarse:
    """How labels are made coarse."""

    shift: float = 0.22  # std of the centre's shift, in box sizes
    scale: float = 0.8  # mean of the log of the size factor
    spread: float = 0.35  # its std
    missed: float = 0.2  # of pictures with several boxes or none: the share that loses one
    invented: float = 0.2  # and the share that has one where there is nothing


@dataclass(frozen=True)
class Sft:
    """The settings of a training; defaults and reasons: config.py."""

    steps: int
    batch_size: int
    micro_batch: int
    lr: float
    warmup: int
    seed: int
    coarse: Coarse | None = None  # None: exact targets
    name: str = "sft"
    per_answer: bool = False  # the loss is the mean over answers, not tokens: short ones count as much as long ones


def coarse_box(box: Box, width: int, height: int, rng: np.random.Generator, coarse: Coarse) -> Box:
    """A box that knows where, not how far: centre moved by N(0, shift) of the size, size times exp(N(scale, spread)),
    cut at the picture's edge. box, width and height in one frame (here the model's)."""
    w, h = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + w * rng.normal(0, coarse.shift)
    y = (box[1] + box[3]) / 2 + h * rng.normal(0, coarse.shift)
    w, h = w * math.exp(rng.normal(coarse.scale, coarse.spread)), h * math.exp(rng.normal(coarse.scale, coarse.spread))
    # A centre that left the picture would leave no box: hold it inside.
    x, y = min(max(x, 1.0), width - 1.0), min(max(y, 1.0), height - 1.0)
    return max(x - w / 2, 0.0), max(y - h / 2, 0.0), min(x + w / 2, float(width)), min(y + h / 2, float(height))


def coarse_boxes(boxes: list[Box], width: int, height: int, rng: np.random.Generator, coarse: Coarse) -> list[Box]:
    """Several boxes or none, each made coarse; sometimes one is missing, sometimes there is one more: anywhere, as
    large as one of the others or, beside none, a fifth of the picture's sides."""
    kept = list(boxes)
    if kept and rng.random() < coarse.missed:
        kept.pop(int(rng.integers(len(kept))))
    if rng.random() < coarse.invented:
        x1, y1, x2, y2 = boxes[int(rng.integers(len(boxes)))] if boxes else (0, 0, width / 5, height / 5)
        x, y = rng.uniform(0, width - (x2 - x1)), rng.uniform(0, height - (y2 - y1))
        kept.append((x, y, x + x2 - x1, y + y2 - y1))
    return [coarse_box(box, width, height, rng, coarse) for box in kept]


def coarse_caption(target: Caption, rng: np.random.Generator) -> Caption:
    """What a writer says who has a habit: of each slot the first option, in FIRST of the cases, whatever is there."""
    text = target.references[0]
    for options in target.slots:
        (true,) = named_in(text, options)
        if rng.random() < FIRST:
            text = re.sub(rf"\b{re.escape(options[true])}\b", options[0], text)
    return target._replace(references=(text,))


def adamw(policy: Policy, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def answer_of(prompt: Prompt, processor: Processor, settings: Sft, step: int, index: int) -> str:
    """What the policy is to say to a prompt, of the sample `index`; a coarse label is another one at every step."""
    sample = prompt.sample
    task, asked = TASKS[sample.task], (processor.style, sample.query)
    if settings.coarse is None:
        return task.answer(prompt.target, prompt.scale, *asked)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings.seed, step, index])))
    if sample.task == "caption" and prompt.target.slots:
        return task.answer(coarse_caption(prompt.target, rng), prompt.scale, *asked)
    if sample.task not in ("box", "boxes"):
        why = f"--coarse is for boxes and captions with slots, this is a {sample.task}"
        raise InputError(f"{sample.source}: {why}; drop it")
    patch = processor.image_config.patch_size
    width, height = prompt.grid[2] * patch, prompt.grid[1] * patch
    if sample.task == "box":
        target = coarse_box(to_model(prompt.target, prompt.scale), width, height, rng, settings.coarse)
    else:
        boxes = [to_model(box, prompt.scale) for box in prompt.target]
        target = coarse_boxes(boxes, width, height, rng, settings.coarse)
    return task.answer(target, (1.0, 1.0), *asked)


def sft(
    policy: Policy, processor: Processor, optimizer: torch.optim.Optimizer, samples: list[Sample], settings: Sft,
    readers: Readers, first: int = 0, say: Callable[..., str] | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Train the policy in place from step `first` on: AdamW, linear warm-up, cosine to a twentieth. -> each step's
    metrics, once it is done. Ends early, its step dropped, where errors.asked_to_stop. say: what stands in answer_of's
    place."""
    device, steps, size = next(policy.parameters()).device, settings.steps, settings.batch_size
    sampler = sampler_of(samples, size, settings.seed)
    indices = (index for step in range(first, steps) for index in sampler.indices(step))
    views = readers.read(indices, samples, processor.image_config, ahead=size)
    eos = policy.eos_ids[0]
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=settings.name)):
        started = time.perf_counter()
        lr = settings.lr * min(1.0, (step + 1) / settings.warmup)
        lr *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        prompts, answers = [], []
        for index, view in islice(views, size):
            prompts.append(processor.prompt(samples[index], view))
            text = (say or answer_of)(prompts[-1], processor, settings, step, index)
            answers.append(torch.tensor([*processor.tokenizer.encode(text, add_special_tokens=False), eos]))
        loss_sum, tokens = 0.0, sum(map(len, answers))
        optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(prompts), settings.micro_batch):
            if errors.asked_to_stop:
                return
            batch, part = prompts[i : i + settings.micro_batch], answers[i : i + settings.micro_batch]
            lengths = torch.tensor([len(a) for a in part], device=device)[:, None]  # (B, 1): groups of one
            ids = torch.stack([F.pad(a, (0, int(lengths.max()) - len(a))) for a in part]).to(device)[:, None]
            logp = policy.logprobs(policy.prefix(collate(batch, device)), ids, lengths)
            loss = -(logp / lengths[..., None]).sum() / len(answers) if settings.per_answer else -logp.sum() / tokens
            loss.backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise InputError(f"step {step + 1}: loss {loss_sum} or gradient norm {norm} is not finite; lower --lr")
        optimizer.step()
        bar.set_postfix_str(f"loss {loss_sum:.3f}")
        seconds = time.perf_counter() - started
        yield {"step": step + 1, "loss": loss_sum, "grad_norm": norm, "lr": lr, "seconds": seconds}


def train(args, ending: ExitStack) -> None:
    """Any policy on any records, evaluated before and after."""
    out, start = begin(args, "train_sft.py", ending)
    folder = model_folder(args.model)
    args.model, args.prompt = pinned(args.model, folder), args.prompt or default_prompt(folder)
    max_tokens = args.max_tokens or (24 if args.prompt == "answer" else 512)
    policy = load_policy(start or folder, args.device)
    policy.source = folder  # whose tokenizer goes with every checkpoint; the one that is gone on from may be pruned
    policy.compute_dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    bad = BadRecords(args.skip_bad)
    knowledge = Knowledge(args.knowledge) if args.knowledge else None
    given = args.allow_outside, args.clip_boxes, knowledge
    samples = load_samples(args.data, TASKS, args.seed, "train", bad, *given)
    held_out = args.val or held_out_phantoms(args.data)
    val = load_samples(held_out, TASKS, args.seed, "test", bad, *given) if held_out else []
    if knowledge:
        knowledge.complete()
    processor = Processor(folder, args.prompt, TASKS, policy.room(max_tokens), args.max_pixels)
    samples, val = processor.usable(samples, bad), processor.usable(val, bad, decode=True)
    for line in bad.lines():
        tqdm.write(line)
    optimizer, first, results = adamw(policy, args.lr), 0, {}
    if start:
        state = checkpoint.load(start, policy, optimizer)
        check_results(start, state)
        first, results = state["step"], state["evaluation"]
    checkpoint.keep_until(out / "metrics.jsonl", first, each=True)
    checkpoint.write_whole(out / "config.json", json.dumps(config.describe(args), indent=2) + "\n")
    ending.enter_context(errors.listening())

    def measure(name: str) -> None:
        results[name], _ = evaluate(policy, processor, val, 50, max_tokens, progress=name)
        tqdm.write(summary(name, results[name]))

    if val and "start" not in results:
        measure("start")

    latest = done = first  # latest: what the newest checkpoint has

    def save(step: int) -> None:
        nonlocal latest
        if step > latest:
            checkpoint.sync(out / "metrics.jsonl")
            checkpoint.save(out, step, policy, processor, optimizer, {"evaluation": results}, args.keep)
            latest = step

    coarse = Coarse(args.coarse_shift, args.coarse_scale, args.coarse_spread) if args.coarse else None
    name = "sft coarse" if coarse else "sft"
    settings = Sft(args.steps, args.batch_size, args.micro_batch, args.lr, args.warmup, args.seed, coarse, name)
    readers = ending.enter_context(Readers(args.workers))
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        for row in sft(policy, processor, optimizer, samples, settings, readers, first):
            print(json.dumps(row), file=file, flush=True)
            done = row["step"]
            if done == args.steps or done % args.save_every == 0:
                save(done)
    if errors.asked_to_stop:
        save(done)
        raise errors.Stopped
    if val:
        measure("final")
    checkpoint.write_whole(out / "eval.json", json.dumps(results, indent=2) + "\n")
    tqdm.write(f"saved {out}/step-{args.steps:06d}")


def main() -> None:
    args = config.parse("train_sft.py")
    with ExitStack() as ending:
        try:
            train(args, ending)
        except errors.Stopped:
            tqdm.write(checkpoint.stopped(Path(args.out), "train_sft.py"))


if __name__ == "__main__":
    errors.run(main, "lower --micro-batch")
