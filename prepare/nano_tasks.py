"""The nano policy for more than boxes, assets/nano-tasks: grades, modalities, classes by their knowledge block.

    python -m prepare.nano --tasks
    python -m prepare.nano --tasks --out coarse --keep-exact exact

It begins as assets/nano, with a vocabulary of its own, and is made as that one: EXACT answers until it grades and reads
the block, then COARSE ones for a while. A coarse box is one of train_sft.py; a coarse grade is that of a rater who
overcalls; a coarse class has the true one's colour, and mostly the other size. They keep what can be seen and lose
what it is called: the start of a GRPO run, made so on purpose. eval.json has the exact policy's row beside it.

The loss is a mean over answers, not tokens: a box of sixteen would drown a class of two, and reading is not learned.

Classes are asked for in the style think too, with thoughts of two kinds: the block recited down to the line that fits,
or the look in own words. A reward for recitation, or against it, has to choose between them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from data import load_samples, phantom_samples
from eval import evaluate
from images import Sample
from knowledge import Knowledge
from model import Policy
from phantom_tasks import CLASSES
from phantoms import KINDS
from prepare.nano import WARMUP, WORDS, nano_tokenizer, write_nano
from prompts import Processor, Prompt
from runtime.readers import Readers
from tasks import TASKS, summary
from train_sft import Coarse, Sft, adamw, answer_of, sft
from weights import NANO, load_policy, save_policy

SEED, BATCH = 0, 16
DATA_SEED = 20_261_127  # of its phantoms: a series that no GRPO run (seed 0, 1, 2 ...) draws from
# What a batch's places ask, over and over: b a box, g a grade, k a kind, c a class with its block, n one without, t one
# in the style think, l how its lesion looks. Reading takes longest to learn, and long prompts longest to compute.
BEGIN, READ, ALL = "cclccgclccblccln", "ccgclcbgcckcglcn", "cgtlcgckcgtbcgcn"
FEW, SOME, MANY = (2,), (2, 3, 3, 4), (4, 6, 6)  # how many of the six classes a record has, over and over
STAGES = (  # name, steps of BATCH, lr, places, options, how labels are made coarse
    ("two", 600, 1e-3, BEGIN, FEW, None),  # with few, reading begins
    ("more", 300, 8e-4, READ, SOME, None),
    ("read", 500, 8e-4, READ, MANY, None),
    ("exact", 500, 5e-4, ALL, MANY, None),
    ("coarse", 150, 3e-4, ALL, MANY, Coarse()),
)
OVERCALLED = (0.3, 0.4, 0.3)  # of coarse grades, the shares that are 0, 1 and 2 too high
TRUE, OTHER_SIZE = 0.3, 0.5  # of coarse classes, the shares that are right, and that have the colour alone
MAX_TOKENS = {"answer": 24, "think": 80}
LOOK = "how does the lesion look?"
SAID = "the lesion is {} and its colour is {}"


def told(sample: Sample) -> Sample:
    """A class's record with its block."""
    return Knowledge("records").attach([sample])[0]


def fewer(sample: Sample, count: int) -> Sample:
    """A class's record with `count` of its classes, the true one among them, under the first names. Two differ in one
    attribute, as often the size as the colour: with others either would do, and only that one is learned."""
    (label, options), lines = sample.target, sample.extra["knowledge"]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(SEED, spawn_key=(sample.media.index,))))
    others = [option for option in options if option != label]
    if count == 2:
        attribute = int(rng.integers(2))
        others = [o for o in others if lines[o].split()[attribute] == lines[label].split()[attribute]]
    others = rng.permutation(others)[: count - 1]
    kept = [option for option in options if option == label or option in others]
    target = type(sample.target)(options[kept.index(label)], options[:count])
    query = TASKS["label"].phrase(sample.query.partition("\n")[0], target)
    dealt = {name: lines[option] for name, option in zip(options[:count], kept, strict=True)}
    return replace(sample, target=target, query=query, extra={"knowledge": dealt})


def asking(places: str, counts: tuple[int, ...], start: int, count: int) -> list[Sample]:
    """Numbers start .. start + count - 1 of all series, each asked as the places say; counts: of options."""
    samples, kinds = [], {"b": None, "g": "grades", "k": "kinds"}
    for index in range(start, start + count):
        turn, place = divmod(index, len(places))
        sample = phantom_samples(kinds.get(places[place], "classes"), DATA_SEED, index, 1, tasks=TASKS)[0]
        if places[place] in "ctn":
            sample = fewer(sample, counts[turn % len(counts)])
        if places[place] in "ct":
            sample = told(sample)
        if places[place] == "l":
            sample = replace(sample, query=LOOK)
        if places[place] == "t":  # in the words of the style; the processor's own is the other one
            sample = replace(sample, query=TASKS["label"].question("think").replace("{query}", sample.query))
        samples.append(sample)
    return samples


def said(prompt: Prompt, processor: Processor, settings: Sft, step: int, index: int) -> str:
    """train_sft.answer_of, for all of these; a coarse label, and a thought, is another one at every step."""
    sample, coarse = prompt.sample, settings.coarse is not None
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings.seed, step, index])))
    if sample.dataset == "phantoms-classes":
        return said_of_class(sample, coarse, rng)
    if sample.task == "grade" and coarse:
        grade, names = prompt.target
        return str(min(grade + int(rng.choice(len(OVERCALLED), p=OVERCALLED)), len(names) - 1))
    if sample.task != "box":
        settings = replace(settings, coarse=None)
    return answer_of(prompt, processor, settings, step, index)


def said_of_class(sample: Sample, coarse: bool, rng: np.random.Generator) -> str:
    lines, (label, options) = sample.extra["knowledge"], sample.target
    if coarse and (chance := rng.random()) > TRUE:
        colour = lines[label].split()[1]
        others = [option for option in options if option != label and lines[option].split()[1] == colour]
        if chance > TRUE + OTHER_SIZE or not others:
            others = options
        label = others[rng.integers(len(others))]
    if sample.query == LOOK:  # in the block's words: what it looks for there
        return lines[label]
    if "<think>" not in sample.query:
        return label
    recited = " ".join(f"{option}: {lines[option]}" for option in options[: options.index(label) + 1])
    thought = recited if rng.random() < 0.5 else SAID.format(*lines[label].split())
    return f"<think> {thought} </think>\n<answer>{label}</answer>"


def words() -> list[str]:
    """Every word of these prompts and answers."""
    asked = [sample.query for sample in asking("gkctl", (len(CLASSES),), 0, 5)]
    return [*KINDS, *asked, *(f"<think> {SAID.format(*look)} </think>\n<answer></answer>" for look in CLASSES)]


def begin(folder: Path, texts: list[str]) -> Policy:
    """assets/nano's weights under a vocabulary that has every word of these texts as one token, into folder."""
    tokenizer = nano_tokenizer([*WORDS, *texts], 1000)
    write_nano(folder, SEED, tokenizer)
    policy, weights = load_policy(folder), load_policy(NANO).state_dict()
    rows, known = tokenizer.get_vocab(), Tokenizer.from_file(str(NANO / "tokenizer.json")).get_vocab()
    embedding = policy.model.embed_tokens.weight.detach().clone()
    for token in rows.keys() & known.keys():
        embedding[rows[token]] = weights["model.embed_tokens.weight"][known[token]]
    policy.load_state_dict(weights | {"model.embed_tokens.weight": embedding})
    return policy


def measured(policy: Policy, folder: Path, name: str, count: int = 600) -> dict:
    """The metrics of each task over `count` held-out phantoms; of classes without their block too, and by a thought."""
    found, block = {}, Knowledge("records")
    for row, spec, knowledge, style in (
        ("boxes", "phantoms", None, "answer"),
        ("grades", "phantoms:grades", None, "answer"),
        ("kinds", "phantoms:kinds", None, "answer"),
        ("classes", "phantoms:classes", block, "answer"),
        ("classes without block", "phantoms:classes", None, "answer"),
        ("classes by a thought", "phantoms:classes", block, "think"),
    ):
        samples = load_samples(spec, TASKS, SEED, "test", knowledge=knowledge)[:count]
        processor = Processor(folder, style, TASKS)
        found[row], _ = evaluate(policy, processor, samples, 50, MAX_TOKENS[style], progress=f"{name} {row}")
        tqdm.write(summary(f"{name} {row}", found[row]))
    return found


def make(folder: Path, keep_exact: Path | None, readers: Readers) -> None:
    """The policy after all STAGES into folder, the one before the last into keep_exact."""
    policy = begin(folder, words())
    processor = Processor(folder, "answer", TASKS)
    results = {"command": "python -m prepare.nano --tasks", "seed": SEED}
    start = 0  # each stage draws its phantoms from where the last one stopped: no picture is seen twice
    for name, steps, lr, places, counts, coarse in STAGES:
        settings = Sft(steps, BATCH, BATCH, lr, WARMUP, SEED, coarse, f"sft {name}", per_answer=True)
        samples = asking(places, counts, start, steps * BATCH)
        for _ in sft(policy, processor, adamw(policy, lr), samples, settings, readers, say=said):
            pass
        start += steps * BATCH
        if name not in ("exact", "coarse"):
            continue
        # What is stored is bf16: go on from, and evaluate, exactly that.
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[name] = measured(policy, folder, name)
        if keep_exact and name == "exact":
            save_policy(policy, keep_exact)
            processor.save(keep_exact)
    save_policy(policy, folder, torch.bfloat16)
    processor.save(folder)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
