"""The nano policy for clips, assets/nano-video: when is the lesion lit?

    python -m prepare.nano --video
    python -m prepare.nano --video --out coarse --keep-exact exact

It begins as assets/nano, whose vision tower it keeps as it is: the decoder learns time. A clip's frames do not say how
fast they are, so one clip is as many examples as there are rates: the tower looks at CLIPS of them once, and each time
that one comes up its rate is drawn anew, and with it M-RoPE's time row and the seconds of the answer.

First EXACT answers, then for a while COARSE ones: spans that keep when something is lit and lose how long, as
train_sft.py's boxes do. So a GRPO run has something to learn; eval.json has the exact policy's row beside it, and both
policies' on clips that are told a wrong rate.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import load_samples, phantom_samples
from eval import evaluate
from images import Sample
from model import Policy, collate
from phantom_clips import QUERIES, RATES, blind
from prepare.nano import WARMUP
from prepare.nano_tasks import begin
from prompts import KINDS, Processor, Prompt, mrope_positions
from runtime.readers import Readers
from tasks import TASKS, summary
from tasks.span import Span
from train_sft import Coarse
from weights import save_policy

SEED, BATCH, MAX_TOKENS = 0, 32, 24
DATA_SEED = 20_261_128  # of its phantoms: a series that no GRPO run (seed 0, 1, 2 ...) draws from
CLIPS = 1000
STAGES = (("exact", 450, 1.5e-3, None), ("coarse", 60, 5e-4, Coarse()))  # name, steps of BATCH, lr, labels


@torch.no_grad()
def seen(policy: Policy, processor: Processor, samples: list[Sample], readers: Readers) -> list[Prompt]:
    """Their prompts, at whose clips the frozen tower has looked."""
    prompts, views = [], readers.read(range(len(samples)), samples, processor.image_config, ahead=BATCH)
    for index, view in tqdm(views, total=len(samples), desc="looking"):
        prompt = processor.prompt(samples[index], view)
        policy.cache_image_tokens([prompt])
        prompts.append(replace(prompt, patches=None))
    return prompts


def at_rate(prompt: Prompt, fps: float, processor: Processor) -> Prompt:
    """The same clip told another rate: other positions, other seconds."""
    pad, ratio = processor.tokenizer.convert_tokens_to_ids(KINDS["video"]), prompt.sample.media.fps / fps
    merge, slots = processor.image_config.merge_size, processor.image_config.temporal_patch_size
    tick = slots / fps * processor.tokens_per_second
    positions, then = mrope_positions(prompt.ids, [prompt.grid], (pad,), merge, [tick])
    segments = tuple((start * ratio, end * ratio) for start, end in prompt.target.segments)
    return replace(
        prompt, positions=positions, next_position=then, target=Span(segments, prompt.target.seconds * ratio)
    )


def coarse_span(target: Span, rng: np.random.Generator, coarse: Coarse) -> Span:
    """A span that knows when, not how long: as train_sft.coarse_box in one dimension, cut at the clip's ends."""
    ((start, end),) = target.segments
    middle = (start + end) / 2 + (end - start) * rng.normal(0, coarse.shift)
    length = (end - start) * math.exp(rng.normal(coarse.scale, coarse.spread))
    middle = min(max(middle, 0.5), target.seconds - 0.5)
    start, end = max(middle - length / 2, 0.0), min(middle + length / 2, target.seconds)
    if round(start) == round(end):
        start, end = math.floor(start), math.ceil(end)
    return Span(((float(round(start)), float(round(end))),), target.seconds)  # whole ones, as all that is true here


def learn(policy: Policy, processor: Processor, prompts: list[Prompt], stage: tuple, first: int) -> None:
    """One of STAGES; first: the number of its first step, which draws its clips, rates and coarse labels."""
    name, steps, lr, coarse = stage
    trained, eos = [p for p in policy.parameters() if p.requires_grad], policy.eos_ids[0]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in (bar := tqdm(range(steps), desc=f"sft {name}")):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, first + step])))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        chosen = rng.choice(len(prompts), BATCH, replace=False)
        some = [at_rate(prompts[i], float(rng.choice(RATES)), processor) for i in chosen]
        spans = [coarse_span(prompt.target, rng, coarse) if coarse else prompt.target for prompt in some]
        texts = [TASKS["span"].answer(span, (1.0, 1.0), "answer", "") for span in spans]
        answers = [torch.tensor([*processor.tokenizer.encode(text, add_special_tokens=False), eos]) for text in texts]
        lengths = torch.tensor([len(answer) for answer in answers])[:, None]
        ids = torch.stack([F.pad(answer, (0, int(lengths.max()) - len(answer))) for answer in answers])[:, None]
        loss = -policy.logprobs(policy.prefix(collate(some)), ids, lengths).sum() / lengths.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def measured(policy: Policy, processor: Processor, name: str, count: int = 200) -> dict:
    """The metrics over `count` held-out clips; and over the same ones, told that they run at the next rate."""
    test, found = load_samples("phantoms:clips", TASKS, SEED, "test")[:count], {}
    following = dict(zip(RATES, (*RATES[1:], RATES[0]), strict=True))
    wrong = [replace(s, media=replace(s.media, fps=following[s.media.fps])) for s in test]
    for row, samples in (("clips", test), ("clips told a wrong rate", wrong)):
        found[row], _ = evaluate(policy, processor, samples, 50, MAX_TOKENS, progress=f"{name} {row}")
        tqdm.write(summary(f"{name} {row}", found[row]))
    return found


def make(folder: Path, keep_exact: Path | None, readers: Readers) -> None:
    """The policy after both STAGES into folder, the one after the first into keep_exact."""
    policy = begin(folder, list(QUERIES.values()))
    policy.visual.requires_grad_(False)
    processor = Processor(folder, "answer", TASKS)
    results = {
        "command": "python -m prepare.nano --video",
        "seed": SEED,
        "who knows no rate": round(blind(SEED, 2000), 3),
    }
    prompts = seen(policy, processor, phantom_samples("clips", DATA_SEED, 0, CLIPS, tasks=TASKS), readers)
    first = 0
    for stage in STAGES:
        learn(policy, processor, prompts, stage, first)
        first += stage[1]
        # What is stored is bf16: go on from, and evaluate, exactly that.
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[stage[0]] = measured(policy, processor, stage[0])
        if keep_exact and stage[0] == "exact":
            save_policy(policy, keep_exact)
            processor.save(keep_exact)
    save_policy(policy, folder, torch.bfloat16)
    processor.save(folder)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
