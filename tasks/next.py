"""What comes next? An action out of a closed list, as tasks/label.py reads it. MedGRPO's NAP (arXiv 2512.06581).

    {"frames": [...], "fps": 1.0, "task": "next", "query": "what will the surgeon do next?",
     "options": ["cutting", "tying", "suturing"], "label": "tying"}

u is 1 for exactly one option named, and the true one. The leaderboard takes an answer that names none for the nearest
option by sentence embeddings: accuracy_paper_chrf is its rule with the likeness of characters in their place.
"""

from typing import Any

from tasks.label import LabelTask, plain, read_option, stated
from text import chrf


class NextTask(LabelTask):
    name = "next"

    def metrics(self, rows: list[dict]) -> dict[str, Any]:
        found = super().metrics(rows)
        hits = sum(nearest(row["text"], tuple(row["target"][1])) == row["target"][0] for row in rows)
        return {"accuracy_paper_chrf": round(hits / len(rows), 6)} | found

    def summary(self, m: dict) -> str:
        return f"{super().summary(m)}  by the nearest option {m['accuracy_paper_chrf']:.3f}"


def nearest(text: str, options: tuple[str, ...]) -> str:
    """The option that is named, or else looks most like the answer; the first of several."""
    said = stated(text)
    index, _ = read_option(said, options)
    return options[index] if index is not None else max(options, key=lambda option: chrf(plain(said), plain(option)))
