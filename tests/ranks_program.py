"""What test_ranks.py runs on one process and on several: train_grpo.main() in float64, and what it did as JSON.

    torchrun --nproc-per-node=2 tests/ranks_program.py CASES.json

CASES: [[out, flags, begun], ...]; begun is null, or [folder, step] of a run of which out is to be a copy, stopped after
that step. Beside what a run writes, out/trace.json has for every step what was rolled out, the
collectives and the sizes of what was gathered; out/wide.safetensors the weights in float64, where a checkpoint has
float32.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402

import errors  # noqa: E402
import ranks  # noqa: E402
import train_grpo  # noqa: E402


def wide_policies(args, base, start, make=train_grpo.make_policies):
    """In float64, where a difference of 1e-10 is a mistake and not rounding: weights, arithmetic and gradients. With
    --dtype as it says."""
    if "--dtype" in sys.argv:
        return make(args, base, start)
    args.dtype = "float64"
    policy, _, reference = make(args, base, start)
    policy.double()
    return policy, policy, reference


def stopped(folder: Path, step: int, out: Path) -> None:
    """As if the run in `folder` had been killed on its way from `step` to its end."""
    shutil.copytree(folder, out)
    for later in out.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def run(out: Path, flags: list[str], begun: tuple[Path, int] | None = None) -> None:
    if begun:
        ranks.first(lambda: stopped(Path(begun[0]), begun[1], out))
    steps, sizes = [], []
    rollout, update, gather, save = train_grpo.rollout, train_grpo.update, ranks.gather, checkpoint.save

    def traced_rollout(*arguments):
        tally, seen, used = rollout(*arguments)
        lengths = seen.lengths.tolist()
        ids = [
            [row[:n] for row, n in zip(*group, strict=True)] for group in zip(seen.ids.tolist(), lengths, strict=True)
        ]
        mine = [list(row) for row in zip([p.sample.source for p in seen.prompts], seen.texts, ids, strict=True)]
        steps.append({"rolled": mine, "iou": tally.iou.tolist(), "shared": seen.prefix is not None})
        return tally, seen, used

    def traced_update(policy, *rest):
        metrics = update(policy, *rest)
        total = sum(ranks.whole(p.detach()).sum().item() for p in policy.parameters())
        steps[-1] |= {"collectives": ranks.collectives, "gathered": list(sizes), "weights": total}
        sizes.clear()
        return metrics

    def traced_save(folder, step, task, *rest):
        tensors = {name: ranks.whole(p.detach()).clone() for name, p in task.policy.named_parameters()}
        if ranks.rank == 0:
            save_file(tensors, out / "wide.safetensors")
        return save(folder, step, task, *rest)

    with (
        patch.object(train_grpo, "make_policies", wide_policies),
        patch.object(train_grpo, "rollout", traced_rollout),
        patch.object(train_grpo, "update", traced_update),
        patch.object(checkpoint, "save", traced_save),
        patch.object(ranks, "gather", lambda rows: sizes.append(rows.numel()) or gather(rows)),
        patch.object(ranks, "start", lambda device: None),  # once for all cases
        patch.object(ranks, "end", lambda: None),
        patch.object(sys, "argv", ["train_grpo.py", *flags, "--out", str(out)]),
    ):
        train_grpo.main()
    traces = ranks.everyone(lambda: steps)
    ranks.first(lambda: (out / "trace.json").write_text(json.dumps(traces)) and None)


def main() -> None:
    ranks.start("cpu")
    for out, *rest in json.loads(Path(sys.argv[1]).read_text()):
        run(Path(out), *rest)
    ranks.end()


if __name__ == "__main__":
    errors.run(main)
