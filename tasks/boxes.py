"""All objects of one phrase, or none: text of an answer -> boxes -> matched to the truth one to one -> u.

    {"image": "a.png", "task": "boxes", "query": "the platelet", "boxes": [[10, 20, 30, 40], [50, 60, 80, 90]]}
    {"image": "b.png", "task": "boxes", "query": "the platelet", "boxes": []}

u is the sum of IoU over the best matching, divided by the larger of both counts: a box too many costs as much as one
that is missing, and none against none is 1. Answers are read as tolerantly as one box is (tasks/box.py); every list of
four numbers is a box, and "none" or [] says that there is none. The same box twice, more than MOST, or a box beside
"none" cannot be read: a grid of guesses never pays.

The matching is our own (Kuhn and Munkres, by shortest augmenting paths): scipy would be a dependency for these lines.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageDraw

import kernels
from data import Record
from errors import InputError, short
from images import Box
from prompts import Prompt
from settings import Settings, setting
from tasks.box import REASONS as OF_ONE
from tasks.box import THRESHOLDS, BoxTask, check_numbers, find_boxes, read_box, to_model, whole_pixels
from tasks.task import ANSWER, TRUTH, Scores, Task, answer_text

MOST = 100  # boxes of an answer or a record
MATCHED = (255, 200, 40)  # colour of answers with an IoU of at least .5
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}  # COCO's, pixels
NONE = re.compile(r"\W*(?:there (?:is|are) )?(?:none|nothing|no (?:box|boxes|object|objects))\W*", re.IGNORECASE)
EMPTY = re.compile(r"\s*(?:```\w*)?\s*\[\s*\]\s*(?:```)?\s*")
THOUGHT = "I look for everything that the question describes and frame it."


@dataclass(frozen=True)
class Matching(Settings):
    u: str = setting("iou", "sum of IoU / larger count, or F1 of the pairs from tau on", "iou", "f1")
    tau: float = setting(0.5, "of f1: the IoU from which a pair counts", low=0.01)
    surplus: float = setting(0.0, "taken off u for each box that there are more than true ones")


def assign(worth: list[list[float]]) -> list[tuple[int, int]]:
    """The one-to-one pairs (row, column) of the largest sum of worth (R x C, not negative); none of the fewer is alone.

    Kuhn and Munkres with potentials: row after row is given a place along the cheapest chain of changes, O(R^2 C).
    """
    if not worth or not worth[0]:
        return []
    if len(worth) > len(worth[0]):
        return sorted((row, column) for column, row in assign([list(x) for x in zip(*worth, strict=True)]))
    rows, columns, far = len(worth), len(worth[0]), float("inf")
    of_row, of_column, owner = [0.0] * (rows + 1), [0.0] * (columns + 1), [0] * (columns + 1)  # 1-based; 0: nobody
    for new in range(1, rows + 1):
        owner[0], at, before = new, 0, [0] * (columns + 1)
        cost, done = [far] * (columns + 1), [False] * (columns + 1)
        while owner[at]:
            done[at], row, least, nearest = True, owner[at], far, 0
            for j in range(1, columns + 1):
                if not done[j]:
                    slack = -worth[row - 1][j - 1] - of_row[row] - of_column[j]
                    if slack < cost[j]:
                        cost[j], before[j] = slack, at
                    if cost[j] < least:
                        least, nearest = cost[j], j
            for j in range(columns + 1):
                if done[j]:
                    of_row[owner[j]] += least
                    of_column[j] -= least
                else:
                    cost[j] -= least
            at = nearest
        while at:  # along the chain back, everybody moves on
            owner[at] = owner[before[at]]
            at = before[at]
    return sorted((owner[j] - 1, j - 1) for j in range(1, columns + 1) if owner[j])


class BoxesTask(Task):
    name = "boxes"
    Settings = Matching
    settings = Matching()
    reasons = OF_ONE | {
        "": "boxes, or that there is none",
        "the same box twice": "a box that stands there more than once",
        "too many boxes": f"more than {MOST}",
        "none, and boxes": "both that there is none and boxes",
    }
    parts = ("f1",)  # at settings.tau
    unit = "u"
    field = "boxes"
    questions = {
        "answer": "{query}",
        "think": "Please provide the bounding box coordinates of every region this phrase describes: {query}. First "
        "output the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> "
        "tags. Output the final answer in JSON format, or none if there is no such region.",
        "qwen": "Locate all that this phrase describes: {query}. Output the bbox coordinates using JSON format.",
    }

    def read(self, record: Record) -> list[Box]:
        """ "boxes": a list of [x1, y1, x2, y2], original frame, none twice; [] where there is nothing to find."""
        values, field = record["boxes"], record.names.get("boxes", "boxes")
        if not isinstance(values, list) or len(values) > MOST:
            raise InputError(f"field {field!r} must be a list of up to {MOST} boxes, not {short(values)}")
        boxes = []
        for i, value in enumerate(values):
            box, cut = read_box(value, f"{field}[{i}]", record.size, record.clip)
            record.cut = record.cut or cut
            if box in boxes:
                raise InputError(f"field '{field}[{i}]' {short(value)} is there twice; write each object once")
            boxes.append(box)
        return boxes

    def answer(self, target: list[Box], scale: tuple[float, float], style: str, query: str) -> str:
        """In whole pixels of the model frame, from left to right."""
        boxes = [list(box) for box in dict.fromkeys(whole_pixels(to_model(box, scale)) for box in sorted(target))]
        label = {"label": query}
        if style == "think":
            said = json.dumps([{"bbox_2d": box} for box in boxes]) if boxes else "none"
            return f"<think> {THOUGHT} </think>\n<answer>{said}</answer>"
        if style == "qwen":
            lines = ",\n".join("\t" + json.dumps({"bbox_2d": b} | label, ensure_ascii=False) for b in boxes)
            return f"```json\n[\n{lines}\n]\n```" if boxes else "```json\n[]\n```"
        return json.dumps(boxes, separators=(",", ":")) if boxes else "none"

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Scores:
        """All pairs of all answers go through the IoU kernel at once."""
        parsed = [parse_boxes(text) for text in texts]
        answers, pairs = [], []
        for (boxes, _), prompt in zip(parsed, prompts, strict=True):
            scale = prompt.scale * 2
            answers.append(None if boxes is None else [[v * s for v, s in zip(b, scale, strict=True)] for b in boxes])
            pairs += [(one, list(other)) for one in answers[-1] or [] for other in prompt.target]
        flat = torch.tensor(pairs).view(-1, 2, 4)
        ious, at = kernels.box_iou(flat[:, 0].contiguous(), flat[:, 1].contiguous()).tolist(), 0
        us, f1s = [], []
        for boxes, prompt in zip(answers, prompts, strict=True):
            found, truths = len(boxes or []), len(prompt.target)
            table = [ious[at + i * truths : at + (i + 1) * truths] for i in range(found)]
            at += found * truths
            us.append(0.0 if boxes is None else self.u(table, found, truths))
            f1s.append(0.0 if boxes is None else f1(table, found, truths, self.settings.tau))
        return Scores(
            u=torch.tensor(us, dtype=torch.float32),
            valid=torch.tensor([boxes is not None for boxes in answers], dtype=torch.bool),
            reasons=[reason for _, reason in parsed],
            answers=answers,
            parts={"f1": torch.tensor(f1s, dtype=torch.float32)},
        )

    def u(self, table: list[list[float]], found: int, truths: int) -> float:
        """table: IoU of each found box (rows) with each true one."""
        chosen = self.settings
        if found == truths == 0:
            return 1.0
        if chosen.u == "f1":
            value = f1(table, found, truths, chosen.tau)
        else:
            value = sum(table[i][j] for i, j in assign(table)) / max(found, truths)
        return min(max(value - chosen.surplus * max(found - truths, 0), 0.0), 1.0)

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        """F1 of all pictures together: 2 matched / (found + true), at an IoU of .5, of .75, and the mean over .50, .55
        ... .95; recall at .5 of small, medium and large objects (COCO's areas); false_alarms, the share of pictures
        without an object in which one is found."""
        base = super().metrics(rows)
        tables = [ious_of(row["answer"] or [], row["target"]) for row in rows]
        found, true = sum(len(row["answer"] or []) for row in rows), sum(len(row["target"]) for row in rows)

        def whole(tau: float) -> float:
            hits = sum(len(matched(table, tau)) for table in tables)
            return 2 * hits / (found + true) if found + true else 1.0

        by_tau = {tau: whole(tau) for tau in THRESHOLDS}
        values = {"f1@0.5": by_tau[0.5], "f1@0.75": by_tau[0.75], "f1": sum(by_tau.values()) / len(by_tau)}
        for size, (least, most) in SIZES.items():
            hits = count = 0
            for row, table in zip(rows, tables, strict=True):
                inside = [least <= (b[2] - b[0]) * (b[3] - b[1]) < most for b in row["target"]]
                count += sum(inside)
                hits += sum(inside[j] for _, j in matched(table, 0.5))
            values[f"recall_{size}"] = hits / count if count else None
        empty = [row for row in rows if not row["target"]]
        values["false_alarms"] = sum(bool(row["answer"]) for row in empty) / len(empty) if empty else None
        rounded = {name: value if value is None else round(value, 6) for name, value in values.items()}
        return rounded | base | {"negatives": len(empty)}

    def summary(self, m: dict) -> str:
        alarms = "" if m["false_alarms"] is None else f"  false alarms {m['false_alarms']:.3f} of {m['negatives']}"
        scores = f"F1@.5 {m['f1@0.5']:.3f}  F1@.75 {m['f1@0.75']:.3f}  F1 {m['f1']:.3f}  u {m['u']:.3f}"
        return f"{scores}{alarms}  n {m['n']}  cannot be read {m['parse_failures']}"

    def constant(self, train: list[tuple[tuple[int, int], list[Box]]]) -> Callable[[tuple[int, int], Any], str]:
        """The median box, as tasks/box.py's; none, where at least half of the pictures have none."""
        if median(len(boxes) for _, boxes in train) < 1:
            return lambda size, _: "none"
        return BoxTask().constant([(size, box) for size, boxes in train for box in boxes])

    def draw(self, image: Image.Image, scale: float, target: list[Box] | None, answers: list[Any]) -> None:
        """Truth green, answers red, those that match with an IoU of at least .5 yellow."""
        canvas, most = ImageDraw.Draw(image), 10 * image.width
        for boxes in answers:
            hits = {i for i, _ in matched(ious_of(boxes or [], target or []), 0.5)}
            for i, box in enumerate(boxes or []):
                x1, y1, x2, y2 = (max(-most, min(most, v * scale)) for v in box)
                inner = (x1, y1, x2 - 1, y2 - 1) if x2 - 1 > x1 and y2 - 1 > y1 else (x1, y1, x2, y2)
                canvas.rectangle(inner, outline=MATCHED if i in hits else ANSWER)
        for box in target or []:
            canvas.rectangle([v * scale - (i > 1) for i, v in enumerate(box)], outline=TRUTH, width=2)


def parse_boxes(text: str) -> tuple[list[Box] | None, str]:
    """(the boxes of an answer in pixels of the MODEL frame, "") or (None, a key of BoxesTask.reasons). [] is none."""
    answer = answer_text(text)
    found, others = find_boxes(answer)
    if not found and not others:
        return ([], "") if NONE.fullmatch(answer) or EMPTY.fullmatch(answer) else (None, "no box")
    if others:  # a list that is no box may be one that was cut off
        return None, "too many numbers" if max(map(len, others)) > 4 else "incomplete box"
    if re.search(r"\bnone\b|\bnothing\b", answer, re.IGNORECASE):
        return None, "none, and boxes"
    boxes = [tuple(map(float, numbers)) for numbers in found]
    for box in boxes:
        if reason := check_numbers(box):
            return None, reason
    if len(set(boxes)) < len(boxes):
        return None, "the same box twice"
    return (None, "too many boxes") if len(boxes) > MOST else (boxes, "")


def ious_of(found: list, true: list) -> list[list[float]]:
    """IoU of each found box (rows) with each true one."""
    if not found or not true:
        return [[] for _ in found]
    a, b = torch.tensor(found, dtype=torch.float32), torch.tensor(true, dtype=torch.float32)
    pairs = a.repeat_interleave(len(b), 0), b.repeat(len(a), 1)
    return kernels.box_iou(*pairs).view(len(a), len(b)).tolist()


def matched(table: list[list[float]], tau: float) -> list[tuple[int, int]]:
    """As many pairs (found, true) with an IoU of at least tau as there can be, and of these the best."""
    more = min(len(table), len(table[0]) if table else 0) + 1  # than all IoU together: one pair more always wins
    worth = [[more + iou if iou >= tau else 0.0 for iou in row] for row in table]
    return [(i, j) for i, j in assign(worth) if table[i][j] >= tau]


def f1(table: list[list[float]], found: int, truths: int, tau: float) -> float:
    """2 matched / (found + true); 1 where there is none and none is found."""
    return 2 * len(matched(table, tau)) / (found + truths) if found + truths else 1.0
