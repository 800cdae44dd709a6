"""--group: one record a picture and phrase, with all its boxes, and records without any (task "boxes")."""

import argparse
import hashlib
from collections.abc import Callable


def part(text: str) -> float:
    """A share that may be all."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def grouped_flags(flag: Callable) -> None:
    what = "a record a picture and phrase, with all its boxes: task boxes"
    flag("--group", dest="grouped", action="store_true", help=what)
    flag("--negatives", type=part, default=0, help="with --group: this share of the pictures without an object")


def chosen(share: float, image: str, query: str, seed: int) -> bool:
    """Whether a picture without an object of a phrase becomes a record: a share of them, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{image}/{query}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def grouped(found: dict, crowded: set[str], split: str, start: dict, args, report, image) -> list[tuple[str, dict]]:
    """(split, record) of one picture. found: phrase -> [(box, split)], empty for what was there and could not be used;
    crowded: phrases of which there is a crowd in one box; split: the picture's; start: what every record begins with.
    A phrase that is in neither has no object here: a record without boxes, of --negatives of such pictures."""
    records = []
    for query in args.phrases:
        if query in crowded:
            report.note("left out, a crowd stands for several objects", f"{image}: {query}")
            continue
        boxes = found.get(query)
        if boxes is None and not chosen(args.negatives, start["image"], query, args.seed):
            continue
        if boxes == []:
            continue  # what is there has been left out, and said: it is no picture without the object
        where = boxes[0][1] if boxes else split
        record = {"task": "boxes", "query": query, "boxes": [list(box) for box, _ in boxes or []]}
        records.append((where, start | record | {"dataset": args.dataset}))
    return records
