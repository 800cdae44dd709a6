"""--submission of eval.py: answers as MedVidBench's leaderboard takes them (github.com/UII-AI/MedGRPO-Code).

    [{"id": "video&&start&&end&&fps", "qa_type": "tal", "prediction": "1.1-3.0 seconds."}, ...]

Its test set comes without answers: there, and only there, records may lack their truth (Task.unlabelled).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import InputError, one_line
from images import Sample
from tasks import TASKS
from tasks.task import answer_text


@contextmanager
def unlabelled(allowed: bool) -> Iterator[None]:
    """Inside, records may lack their answers, or may not."""
    before = {task: task.unlabelled for task in TASKS.values()}
    try:
        for task in before:
            task.unlabelled = allowed
        yield
    finally:
        for task, value in before.items():
            task.unlabelled = value


def check(file: str, samples: list[Sample]) -> None:
    """InputError, before hours go by, where it could not be written in the end."""
    if not Path(file).parent.is_dir() or Path(file).is_dir():
        raise InputError(f"--submission {one_line(file)}: name a file in a folder that exists")
    for sample in samples:
        for field in ("id", "qa_type"):
            if not isinstance(sample.extra.get(field), str):
                raise InputError(
                    f"{sample.source}: field {field!r} must be MedVidBench's, a text, for --submission; "
                    "python -m prepare.medvidbench writes such records"
                )


def write(file: str, samples: list[Sample], rows: list[dict]) -> None:
    """rows: eval.py's, of the samples. Boxes are in original pixels; an answer that cannot be read stays as it is."""
    entries = []
    for sample, row in zip(samples, rows, strict=True):
        told = answer_text(row["text"]).strip() if row["reason"] else TASKS[sample.task].told(row)
        entries.append({"id": sample.extra["id"], "qa_type": sample.extra["qa_type"], "prediction": told})
    Path(file).write_text(
        json.dumps(entries, indent=2) + "\n", encoding="utf-8"
    )  # ASCII: an id may hold half a character
