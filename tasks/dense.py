"""What happens when? Events with captions: text of an answer -> how well times and texts are met. Dense captioning of
MedGRPO (arXiv 2512.06581).

    {"frames": [...], "fps": 1.0, "task": "dvc", "query": "what happens when?",
     "events": [[1.0, 29.0, "the hook dissects ..."], ...]}                    seconds from the first frame

An answer is a line for each event, "1.0-29.0 seconds: text". u = .5 F1 of the matching by time (one to one, mean over a
temporal IoU of .3, .5, .7) + .5 of what the captions of the best matching's pairs are worth, similarity and judge in
halves (tasks/caption.py), summed over the pairs and divided by the larger of both counts. The paper does not reward
this task. Its leaderboard's own F1, by which many may match one, stands beside as f1_paper.
"""

import re
from collections.abc import Sequence
from math import nan
from statistics import fmean
from typing import Any, NamedTuple

from data import Record, check_text
from errors import InputError, short
from judge import Item, worth
from prompts import Prompt
from tasks.boxes import assign, f1
from tasks.caption import MOST, CaptionTask, Likeness, filled, in_style, judged, made, rounded
from tasks.span import SLACK, second
from tasks.task import Scores, Task, answer_text, require
from text import soda, temporal_iou, tokens

EVENT_WORDS = "one event of a clip"
TAUS = (0.3, 0.5, 0.7)  # temporal IoU
EVENT = re.compile(
    r"\W*(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?\s*(?:-|–|to)\s*(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?\s*:\s*(.*\w.*)"
)


class Events(NamedTuple):
    """Of dense captioning."""

    events: tuple[tuple[float, float, str], ...]  # start and end in seconds from the first frame, caption


class DenseTask(CaptionTask):
    """Its judge and settings are those of captions; the judge sees matched pairs alone."""

    name = "dvc"
    settings = Likeness()
    reasons = {
        "": "events", "no event": "no line is START-END seconds: text", "inverted": "an end before its start",
        "too long": "more words than --tasks allows", "too many": f"more than {MOST} events",
    }  # fmt: skip
    terms = ("f1", "similarity", "judge")
    parts = (*terms, "unjudged")
    field = None

    def read(self, record: Record) -> Events:
        """ "events": a list of [start, end, caption], in seconds."""
        value, field = record["events"], record.names.get("events", "events")
        require(isinstance(value, list) and 0 < len(value) <= MOST, record, "events", f"a list of 1 to {MOST} events")
        events = []
        for i, event in enumerate(value):
            times = event[:2] if isinstance(event, list) and len(event) == 3 else []
            if [type(t) in (int, float) and 0 <= t < 1e7 for t in times] != [True, True] or times[1] <= times[0]:
                raise InputError(f"field '{field}[{i}]' must be [start, end, caption] in seconds, not {short(event)}")
            if record.seconds is not None and times[1] > record.seconds + SLACK:
                clip = f"the clip of {second(record.seconds)} seconds; mend it or fps"
                raise InputError(f"field '{field}[{i}]' {short(event)} ends behind {clip}")
            events.append((float(times[0]), float(times[1]), check_text(event[2], f"{field}[{i}][2]")))
        return Events(tuple(sorted(events)))

    def answer(self, target: Events, scale: tuple[float, float], style: str, query: str) -> str:
        return in_style("\n".join(f"{s:.1f}-{e:.1f} seconds: {text}" for s, e, text in target[0]), style)

    def references(self, target: Events) -> tuple[str, ...]:
        return tuple(text for _, _, text in target.events)

    def read_answer(self, text: str) -> tuple[list[list] | None, str]:
        """([[start, end, caption], ...], "") or (None, reason). Lines that are no event are passed over."""
        lines = (" ".join(line.split()) for line in answer_text(text).splitlines())  # EVENT is quadratic in blanks
        found = filter(None, map(EVENT.fullmatch, lines))
        events = [[float(m[1]), float(m[2]), m[3]] for m in found]
        if not events or len(events) > MOST:
            return None, "too many" if events else "no event"
        if any(end < start for start, end, _ in events):
            return None, "inverted"
        long = sum(len(tokens(caption)) for _, _, caption in events) > self.settings.words
        return (None, "too long") if long else (events, "")

    def pairs(self, events: list[list], target: Events) -> list[tuple[int, int]]:
        """Of the best matching in time those from a temporal IoU of TAUS[0] on."""
        table = times(events, target.events)
        return [(i, j) for i, j in assign(table) if table[i][j] >= TAUS[0]]

    def items(self, events: list[list] | None, target: Events) -> list[Item]:
        pairs = self.pairs(events, target) if events else ()
        return [Item(EVENT_WORDS, (target.events[j][2],), events[i][2]) for i, j in pairs]

    def ahead(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> None:
        if self.judge:
            said = (self.read_answer(text)[0] for text in texts)
            self.judge.ask([item for s, p in zip(said, prompts, strict=True) for item in self.items(s, p.target)])

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        said = [self.read_answer(text) for text in texts]
        items = [self.items(events, prompt.target) for (events, _), prompt in zip(said, prompts, strict=True)]
        flat = [item for own in items for item in own]
        verdicts = self.judge.verdicts(flat) if self.judge else [None] * len(flat)
        owners = [id(prompt) for own, prompt in zip(items, prompts, strict=True) for _ in own]
        worths, at = filled([worth(verdict) if verdict else nan for verdict in verdicts], owners), 0
        parts = {name: [0.0] * len(texts) for name in self.parts}
        u = []
        for i, ((events, _), own, prompt) in enumerate(zip(said, items, prompts, strict=True)):
            most = max(len(events or ()), len(prompt.target.events))
            parts["f1"][i] = time_f1(events, prompt.target.events) if events else 0.0
            parts["similarity"][i] = sum(self.similarity(item.answer, item.references) for item in own) / most
            parts["judge"][i] = sum(worths[at : at + len(own)]) / most if self.judge else nan
            parts["unjudged"][i] = float(self.judge is not None and None in verdicts[at : at + len(own)])
            at += len(own)
            likeness = [parts["similarity"][i]] + ([parts["judge"][i]] if self.judge else [])
            u.append(0.5 * parts["f1"][i] + 0.5 * fmean(likeness))
        return made(u, said, parts)

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """f1 of the one-to-one matching and soda, unread answers 0; f1_paper, of the mean precision and the mean recall
        where many may match one; judge_score over the matched pairs' answers as captions have it."""
        events = [(row["answer"] or [], row["target"][0]) for row in rows]
        paper = []
        for tau in TAUS:
            tables = [times(found, true) for found, true in events]
            precision = fmean(fmean(max(row) >= tau for row in table) if table else 0.0 for table in tables)
            columns = [list(zip(*table, strict=True)) for table in tables]
            recall = fmean(fmean(max(c) >= tau for c in column) if column else 0.0 for column in columns)
            paper.append(2 * precision * recall / (precision + recall) if precision else 0.0)
        values = {"f1": fmean(row["parts"]["f1"] for row in rows), "f1_paper": fmean(paper)}
        values |= {"soda": fmean(soda(found, true) for found, true in events)}
        values |= {f"pairs_{self.settings.similarity}": fmean(row["parts"]["similarity"] for row in rows)}
        return rounded(values) | judged(self.judge, rows) | Task.metrics(self, rows)


def times(found: Sequence, true: Sequence) -> list[list[float]]:
    """Temporal IoU of each found event (rows) with each true one."""
    return [[temporal_iou(a, b) for b in true] for a in found]


def time_f1(found: Sequence, true: Sequence) -> float:
    table = times(found, true)
    return fmean(f1(table, len(found), len(true), tau) for tau in TAUS)
