"""Free text about a picture or a clip -> how close it is to a reference. MedGRPO's captions (arXiv 2512.06581).

    {"image": "a.png", "task": "caption", "query": "describe the picture", "references": ["a brown lesion ..."]}
    {"image": ..., "task": "caption", "kind": "rc", "query": "what is in the box?", "references": [...],
     "region": {"bbox": [88, 56, 151, 142]}}                    drawn on the picture before the policy sees it

u = .5 similarity + .5 (judge - 1) / 4; without --judge it is the similarity alone, and every evaluation says so. Both
are parts that --rewards may name, similarity=.5,judge=.5: then --normalise brings each to one scale by quartiles of its
own before they are weighted, as the paper has it. Kinds: vs, the whole; rc, a region, for which a clip's "region" has
the number of its "frame" too. They are one task: where one scale for both is not meant, give each its own "dataset".

Similarity is of characters (chrF) or words (TF-IDF, weighed by the references of the training data, or of what eval.py
evaluates), where the paper has sentence embeddings; of several references the closest counts. Where the judge has no
verdict on an answer, its half is the mean of the group's others: it moves nothing, and is counted (`unjudged`).
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from data import Record, check_text
from errors import InputError, short
from images import Sample
from judge import ASPECTS, Item, Judge, worth
from prompts import Prompt
from settings import Settings, setting
from tasks.box import read_box
from tasks.label import named_in, plain
from tasks.task import ANSWER, TRUTH, Scores, Task, answer_text, require
from text import TfIdf, chrf, cider_d, meteor_exact, rouge_l, sentence_bleu, tokens

KINDS = {"vs": "a picture or a clip as a whole", "rc": "what is seen in the marked region"}
THOUGHT = "I look at what is there and say it."
MOST = 100  # references, events and slots
HALF = 0.5  # of u, what similarity and judge are each


class Caption(NamedTuple):
    """A caption's target."""

    references: tuple[str, ...]
    kind: str
    slots: tuple[tuple[str, ...], ...]  # of a closed grammar: from each, the reference names one


@dataclass(frozen=True)
class Likeness(Settings):
    similarity: str = setting("chrf", "F of characters, or cosine of words by TF-IDF", "chrf", "tfidf")
    words: int = setting(300, "of an answer at most; a longer one cannot be read", low=1, high=10**4)


class CaptionTask(Task):
    name = "caption"
    unit = "likeness"
    Settings = Likeness
    settings = Likeness()
    reasons = {"": "a caption", "no words": "nothing is said", "too long": "more words than --tasks allows"}
    terms = ("similarity", "judge")
    parts = (*terms, "unjudged", "slots", *(f"judge_{aspect}" for aspect in ASPECTS))
    field = "references"
    judge: Judge | None = None  # --judge, of all captions: tasks.configure
    weights: TfIdf | None = None  # of --tasks caption:similarity=tfidf
    questions = {
        "answer": "{query}",
        "think": "{query} First output the thinking process in <think> </think> tags and then output the final answer "
        "in <answer> </answer> tags.",
        "qwen": "{query}",
    }

    def read(self, record: Record) -> Caption:
        """ "references": texts, of VLM-R1's kind of record one; "kind"?; "region" of an rc; "slots"?: lists of options
        of which every reference names exactly one."""
        value, kind = record["references"], record.get("kind", "vs")
        require(kind in KINDS, record, "kind", f"one of {', '.join(KINDS)}")
        references = texts_of([value] if isinstance(value, str) else value, record, "references")
        if kind == "rc":
            record.mark = read_region(record)
        elif "region" in record.fields:
            raise InputError("field 'region' is for captions of the kind 'rc'; write it, or drop the region")
        slots, told = [], record.get("slots", [])
        require(isinstance(told, list) and len(told) <= MOST, record, "slots", f"a list of at most {MOST} lists")
        for i, options in enumerate(told):
            slots.append(texts_of(options, record, "slots", f"slots[{i}]"))
            for reference in references:
                if len(named_in(reference, slots[-1])) != 1:
                    raise InputError(f"field 'slots[{i}]': {short(reference)} must name one of {short(options)}")
        return Caption(references, kind, tuple(slots))

    def answer(self, target: Caption, scale: tuple[float, float], style: str, query: str) -> str:
        return in_style(target.references[0], style)

    def begin(self, samples: Sequence[Sample]) -> None:
        """Weigh words by how few references have them."""
        chosen = self.settings.similarity == "tfidf"
        self.weights = TfIdf(tokens(" ".join(self.references(s.target))) for s in samples) if chosen else None

    def references(self, target: Caption) -> tuple[str, ...]:
        return target.references

    def similarity(self, answer: str, references: Sequence[str]) -> float:
        if self.weights:
            return max(self.weights.cosine(tokens(answer), tokens(reference)) for reference in references)
        return max(chrf(answer, reference) for reference in references)

    def read_answer(self, text: str) -> tuple[str | None, str]:
        """(caption, "") or (None, reason)."""
        caption = " ".join(answer_text(text).split())
        count = len(tokens(caption))
        if 0 < count <= self.settings.words:
            return caption, ""
        return None, "too long" if count else "no words"

    def ahead(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> None:
        if self.judge:
            said = (self.read_answer(text)[0] for text in texts)
            self.judge.ask([item_of(s, p.target) for s, p in zip(said, prompts, strict=True) if s is not None])

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        said = [self.read_answer(text) for text in texts]
        valid = [i for i, (caption, _) in enumerate(said) if caption is not None]
        items = [item_of(said[i][0], prompts[i].target) for i in valid]
        parts = {name: [nan if name.startswith("judge_") else 0.0] * len(texts) for name in self.parts}
        verdicts = self.judge.verdicts(items) if self.judge else [None] * len(items)
        for i, item, verdict in zip(valid, items, verdicts, strict=True):
            parts["similarity"][i] = self.similarity(item.answer, item.references)
            parts["judge"][i] = worth(verdict) if verdict else nan
            parts["unjudged"][i] = float(self.judge is not None and not verdict)
            for aspect in ASPECTS:
                parts[f"judge_{aspect}"][i] = (verdict or {}).get(aspect, nan)
        for i, prompt in enumerate(prompts):
            right = slots_right(said[i][0] or "", prompt.target)
            parts["slots"][i] = fmean(right) if right else nan
        if self.judge:
            parts["judge"] = filled(parts["judge"], [id(prompt) for prompt in prompts])
            u = [HALF * s + HALF * j for s, j in zip(parts["similarity"], parts["judge"], strict=True)]
        else:
            u, parts["judge"] = parts["similarity"], [nan] * len(texts)
        return made(u, said, parts)

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """u and its parts, an answer that cannot be read 0 in all of them; judge_score and the aspects from 1 to 5, of
        answers with a verdict, 1 where they cannot be read; slots, the share of slots that are right, and all_slots."""
        pairs = [(row["answer"] if row["reason"] == "" else "", row["target"][0]) for row in rows]
        words = [(tokens(answer), [tokens(reference) for reference in references]) for answer, references in pairs]
        values: dict[str, float | None] = {
            self.settings.similarity: fmean(row["parts"]["similarity"] for row in rows),
            "rouge_l": fmean(max(rouge_l(a, r) for r in own) for a, own in words),
            "bleu": fmean(max(sentence_bleu(a, r) for r in own) for a, own in words),
            "meteor_exact": fmean(max(meteor_exact(a, r) for r in own) for a, own in words),
            "cider_d": fmean(cider_d(*zip(*words, strict=True))),
            "words": fmean(len(a) for a, _ in words),
        }
        right = [slots_right(answer, Caption(*row["target"])) for (answer, _), row in zip(pairs, rows, strict=True)]
        if any(right):
            values["slots"] = fmean(fmean(each) for each in right if each)
            values["all_slots"] = fmean(all(each) for each in right if each)
        return rounded(values) | judged(self.judge, rows) | super().metrics(rows)

    def summary(self, m: dict) -> str:
        shown = [f"u {m['u']:.3f} +- {m['u_standard_error']:.3f}"]
        names = {
            "chrf": "chrF",
            "tfidf": "TF-IDF",
            "f1": "F1",
            "soda": "SODA",
            "rouge_l": "ROUGE-L",
            "cider_d": "CIDEr-D",
        }
        names |= {"slots": "slots", "all_slots": "all slots"}
        shown += [f"{words} {m[name]:.3f}" for name, words in names.items() if m.get(name) is not None]
        if m.get("judge_score") is not None:
            shown.append(f"judge {m['judge_score']:.2f} of 5 ({m['judge']})")
        without = f"  without a verdict {m['unjudged']}" if m.get("unjudged") else ""
        return f"{'  '.join(shown)}  n {m['n']}  cannot be read {m['parse_failures']}{without}"

    def constant(self, train: list[tuple[tuple[int, int], Any]]) -> Callable[[tuple[int, int], Any], str]:
        """The most frequent of the training answers, the first of several."""
        text = Counter(self.answer(target, (1.0, 1.0), "answer", "") for _, target in train).most_common(1)[0][0]
        return lambda size, _: text

    def draw(self, image: Image.Image, scale: float, target: Any, answers: list[Any]) -> None:
        truth = [] if target is None else [(self.answer(target, (1.0, 1.0), "answer", ""), TRUTH)]
        said = Counter(answer if isinstance(answer, str) else str(answer) for answer in answers if answer is not None)
        told = [(text if count == 1 else f"{count} x {text}", ANSWER) for text, count in said.most_common()]
        canvas, y = ImageDraw.Draw(image), 2
        for text, colour in truth + told:
            for line in textwrap.wrap(text, max(image.width // 6 - 1, 8)):
                if y > image.height:
                    return
                box = canvas.textbbox((3, y), line)
                canvas.rectangle((box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1), fill=(0, 0, 0))
                canvas.text((3, y), line, fill=colour)
                y += 12


# --------------------------------------------------------------------------------------------------------------- pieces


def texts_of(value: Any, record: Record, field: str, name: str = "") -> tuple[str, ...]:
    """A list of texts that differ when they are compared, each with a word. InputError else."""
    name = name or record.names.get(field, field)
    if not isinstance(value, list) or not 0 < len(value) <= MOST:
        raise InputError(f"field {name!r} must be a list of 1 to {MOST} texts, not {short(value)}")
    texts = tuple(check_text(text, f"{name}[{i}]") for i, text in enumerate(value))
    if len({plain(text) for text in texts}) < len(texts) or not all(map(tokens, texts)):
        raise InputError(f"field {name!r}: each text must have a word, and none may stand there twice: {short(value)}")
    return texts


def read_region(record: Record) -> tuple[int, tuple[float, float, float, float]]:
    """ "region": {"bbox": [x1, y1, x2, y2], "frame": 0} -> (frame, box in the original frame)."""
    value, frames = record["region"], round(record.seconds * record.fields["fps"]) if record.seconds else 1
    require(
        isinstance(value, dict) and {"bbox"} <= value.keys() <= {"bbox", "frame"}, record, "region", "{bbox, frame?}"
    )
    box, cut = read_box(value["bbox"], "region.bbox", record.size, record.clip)
    record.cut = record.cut or cut
    frame = value.get("frame", 0)
    if type(frame) is not int or not 0 <= frame < frames:
        raise InputError(f"field 'region.frame' must be from 0 to {frames - 1}, not {short(frame)}")
    return frame, box


def in_style(text: str, style: str) -> str:
    return f"<think> {THOUGHT} </think>\n<answer>{text}</answer>" if style == "think" else text


def item_of(caption: str, target: Caption) -> Item:
    return Item(KINDS[target.kind], target.references, caption)


def slots_right(caption: str, target: Caption) -> list[bool]:
    """Of each slot whether the caption names, and does not deny, the one option that the reference names."""
    right = []
    for options in map(tuple, target.slots):
        (true,) = named_in(target.references[0], options)
        right.append(named_in(caption, options) == {true: False})
    return right


def filled(values: list[float], groups: list[int]) -> list[float]:
    """With the mean of its group's others where a value is NaN; of all, where the group has none; else 0."""
    there: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if not isnan(value):
            there.setdefault(group, []).append(value)
    whole = fmean(known) if (known := [value for values in there.values() for value in values]) else 0.0
    return [
        (fmean(there[group]) if group in there else whole) if isnan(value) else value
        for value, group in zip(values, groups, strict=True)
    ]


def made(u: list[float], said: list[tuple[Any, str]], parts: dict[str, list[float]]) -> Scores:
    return Scores(
        u=torch.tensor(u, dtype=torch.float32),
        valid=torch.tensor([reason == "" for _, reason in said], dtype=torch.bool),
        reasons=[reason for _, reason in said],
        answers=[answer for answer, _ in said],
        parts={name: torch.tensor(values, dtype=torch.float32) for name, values in parts.items()},
    )


def judged(judge: Judge | None, rows: list[dict]) -> dict[str, Any]:
    """Whose verdicts, and what they were; an answer without one is left out, and counted."""
    if judge is None:
        return {"judge": "none: u is the similarity alone"}
    known = [row for row in rows if not row["parts"]["unjudged"]]
    scores = {"judge_score": [1 + 4 * row["parts"]["judge"] for row in known]}
    unread = sum(row["reason"] != "" for row in known)
    for name in (f"judge_{aspect}" for aspect in ASPECTS):
        told = [row["parts"][name] for row in known if row["parts"].get(name) is not None]
        scores[name] = told + [1.0] * unread if told else []
    found = {name: fmean(values) if values else None for name, values in scores.items()}
    return {"judge": judge.name} | rounded(found) | {"unjudged": len(rows) - len(known)}


def rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is None else round(value, 6) for name, value in values.items()}
