"""A task of one's own in one file: which kind of picture is it? Records say {"image", "query", "task": "kind", "kind":
"xray"}; python tests/toy_task.py takes train_grpo.py's flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import errors  # noqa: E402
import train_grpo  # noqa: E402
from phantoms import KINDS  # noqa: E402
from tasks import TASKS  # noqa: E402
from tasks.task import Scores, Task, require  # noqa: E402


class Kind(Task):
    name = "kind"
    reasons = {"": "a kind", "no kind": "none of the kinds is named"}
    questions = {"answer": "{query}", "think": "{query} Think first.", "qwen": "{query}"}

    def read(self, record):
        require(record["kind"] in KINDS, record, "kind", f"one of {', '.join(KINDS)}")
        return record["kind"]

    def answer(self, target, scale, style, query):
        return target

    def score(self, texts, prompts):
        answers = [next((kind for kind in KINDS if kind[0] in text.lower()), None) for text in texts]
        u = torch.tensor([float(a == p.target) for a, p in zip(answers, prompts, strict=True)])
        valid = torch.tensor([a is not None for a in answers])
        return Scores(u, valid, ["" if a else "no kind" for a in answers], answers)


TASKS["kind"] = Kind()
if __name__ == "__main__":
    errors.run(train_grpo.main, train_grpo.MEMORY)
