"""The nano policy that answers more than boxes, assets/nano-tasks: grades, classes by their knowledge block, modalities.

    python -m prepare.nano --tasks
    python -m prepare.nano --tasks --out coarse --keep-exact exact

It begins as assets/nano, with a vocabulary of its own, and has two stages as that: EXACT answers until it reads the block
and grades, then COARSE ones for a while. A coarse box is one of train_sft.py; a coarse grade is that of a rater who
overcalls; a coarse class is one that shares the true one's colour, or any. Both keep what can be seen and lose what it is
called: the start of a GRPO run, made so on purpose. eval.json has the exact policy's row beside it.

Classes are asked for in the style think too, with one of two kinds of thoughts: the block recited down to the line that
fits, or the look in own words. A reward for recitation, or against it, has to choose between them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import phantom_tasks
from data import load_samples, phantom_samples
from eval import evaluate
from images import Sample
from knowledge import Knowledge
from model import Policy
from phantoms import QUERIES
from prepare.nano import BATCH, WARMUP, nano_tokenizer, write_nano
from prompts import Processor, Prompt
from runtime.readers import Readers
from tasks import TASKS, summary
from train_sft import Coarse, Sft, adamw, answer_of, sft
from weights import NANO, load_policy, save_policy

SEED = 0
DATA_SEED = 20_261_127  # of its phantoms: a series that no GRPO run (seed 0, 1, 2 ...) draws from
# What a batch's places ask, over and over: b a box, g a grade, c a class with its block, n one without, t one in the
# style think, k a kind. Reading takes longest to learn, and long prompts longest to compute.
READ, ALL = "cgcbcgckcgcbcgcn", "cgtbcgtkcgtbcgtn"
STAGES = (  # name, steps of BATCH, lr, places, how labels are made coarse
    ("read", 900, 1e-3, READ, None),
    ("exact", 150, 5e-4, ALL, None),
    ("coarse", 100, 3e-4, ALL, Coarse()),
)
OPTIONS = (2, 2, 3, 4, 6, 6)  # how many of the six classes a record has, over and over: few are how reading begins
OVERCALLED = (0.3, 0.4, 0.3)  # of a coarse grade, the shares that are 0, 1 and 2 too high
TRUE, SAME_COLOUR = 0.3, 0.5  # of a coarse class, the shares that are right, and that have the right colour only
MAX_TOKENS = {"answer": 24, "think": 80}


def written(sample: Sample) -> str:
    """A prompt's words and all answers that a sample may have, for the tokenizer."""
    thoughts = "".join(
        f" the border is {border} and the colour is {colour}" for border, colour in phantom_tasks.CLASSES
    )
    tags = "<think></think>\n<answer></answer>"
    return f"{sample.query}{thoughts}{tags}"


def told(sample: Sample) -> Sample:
    """A class's record with its block."""
    return Knowledge("records").attach([sample])[0]


def fewer(sample: Sample, count: int) -> Sample:
    """A class's record with `count` of its options, the true one among them."""
    label, options = sample.target
    others = [option for option in options if option != label]
    key = np.random.SeedSequence(SEED, spawn_key=(sample.media.index,))
    kept = {label, *(others[i] for i in np.random.Generator(np.random.PCG64(key)).permutation(5)[: count - 1])}
    target = sample.target._replace(options=tuple(option for option in options if option in kept))
    return replace(sample, target=target, query=TASKS["label"].phrase(sample.query.partition("\n")[0], target))


def asking(places: str, start: int, count: int) -> list[Sample]:
    """Numbers start .. start + count - 1 of all series, each asked as the places say."""
    samples, kinds = [], {"b": None, "g": "grades", "k": "kinds"}
    for index in range(start, start + count):
        place = places[index % len(places)]
        sample = phantom_samples(kinds.get(place, "classes"), DATA_SEED, index, 1, tasks=TASKS)[0]
        if place in "ctn":
            sample = fewer(sample, OPTIONS[index // len(places) % len(OPTIONS)])
        if place in "ct":
            sample = told(sample)
        if place == "t":  # in the words of the style; the processor's own style is the other one
            sample = replace(sample, query=TASKS["label"].question("think").replace("{query}", sample.query))
        samples.append(sample)
    return samples


def said(prompt: Prompt, processor: Processor, settings: Sft, step: int, index: int) -> str:
    """train_sft.answer_of for all of these tasks; a coarse label and a thought are another one at every step."""
    sample = prompt.sample
    if sample.task == "box" or "knowledge" not in sample.extra:
        if sample.task == "grade" and settings.coarse:
            over = int(stream(settings, step, index).choice(len(OVERCALLED), p=OVERCALLED))
            return str(min(prompt.target.grade + over, len(prompt.target.options) - 1))
        return answer_of(
            prompt, processor, replace(settings, coarse=settings.coarse if sample.task == "box" else None), step, index
        )
    rng, lines = stream(settings, step, index), sample.extra["knowledge"]
    label, options = prompt.target
    if settings.coarse and (chance := rng.random()) > TRUE:
        colour = lines[label].split()[1]
        alike = [option for option in options if lines[option].split()[1] == colour]
        others = alike if chance < TRUE + SAME_COLOUR else options
        label = others[rng.integers(len(others))]
    if "<think>" not in sample.query:
        return label
    if rng.random() < 0.5:
        thought = " ".join(f"{option}: {lines[option]}" for option in options[: options.index(label) + 1])
    else:
        border, colour = lines[label].split()
        thought = f"the border is {border} and the colour is {colour}"
    return f"<think> {thought} </think>\n<answer>{label}</answer>"


def stream(settings: Sft, step: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings.seed, step, index])))


def begin(folder: Path) -> Policy:
    """assets/nano's weights under a vocabulary that has every word of these tasks as one token, into folder."""
    asked = asking(ALL, 0, len(OPTIONS) * len(ALL))
    write_nano(folder, SEED, nano_tokenizer(["user\n", "assistant\n", *QUERIES.values(), *map(written, asked)], 1000))
    policy, nano = load_policy(folder), load_policy(NANO)
    rows, known = (Tokenizer.from_file(str(f / "tokenizer.json")).get_vocab() for f in (folder, NANO))
    weights = nano.state_dict()
    embedding = policy.model.embed_tokens.weight.detach().clone()
    for token, row in known.items():
        if token in rows:
            embedding[rows[token]] = weights["model.embed_tokens.weight"][row]
    policy.load_state_dict(weights | {"model.embed_tokens.weight": embedding})
    return policy


def measured(policy: Policy, folder: Path, name: str, count: int = 600) -> dict:
    """The metrics of each task over `count` held-out phantoms; of classes with and without their block, and by a thought."""
    found, knowledge = {}, Knowledge("records")
    for row, spec, block, style in (
        ("boxes", "phantoms", None, "answer"), ("grades", "phantoms:grades", None, "answer"),
        ("kinds", "phantoms:kinds", None, "answer"), ("classes", "phantoms:classes", knowledge, "answer"),
        ("classes, no block", "phantoms:classes", None, "answer"),
        ("classes, think", "phantoms:classes", knowledge, "think"),
    ):  # fmt: skip
        samples = load_samples(spec, TASKS, SEED, "test", knowledge=block)[:count]
        processor = Processor(folder, style, TASKS)
        found[row], _ = evaluate(policy, processor, samples, 50, MAX_TOKENS[style], progress=f"{name} {row}")
        tqdm.write(summary(f"{name} {row}", found[row]))
    return found


def make(folder: Path, keep_exact: Path | None, readers: Readers) -> None:
    """The policy after all STAGES into folder, the one after the first into keep_exact."""
    policy = begin(folder)
    processor = Processor(folder, "answer", TASKS)
    results = {"command": "python -m prepare.nano --tasks", "seed": SEED}
    start = 0
    for name, steps, lr, coarse in STAGES:
        settings = Sft(steps, BATCH, BATCH, lr, WARMUP, SEED, coarse, f"sft {name}")
        for _ in sft(policy, processor, adamw(policy, lr), asking(start, steps * BATCH), settings, readers, say=said):
            pass
        start += steps * BATCH
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[name] = measured(policy, folder, name)
        if keep_exact and coarse is None:
            save_policy(policy, keep_exact)
            processor.save(keep_exact)
    save_policy(policy, folder, torch.bfloat16)
    processor.save(folder)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
