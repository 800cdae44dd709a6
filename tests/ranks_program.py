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

import errors  # noqa: E402
import ranks  # noqa: E402
import train_grpo  # noqa: E402
from runtime import checkpoint  # noqa: E402

SINGLE = "in float32"  # in front of flags: as they are


def wide_policies(args, base, start, make=train_grpo.make_policies):
    """In float64, where a difference of 1e-10 is a mistake and not rounding: weights, arithmetic and gradients."""
    shard, args.shard, args.dtype = args.shard, False, "float64"
    policy, _, reference = make(args, base, start)
    policy.double()
    args.shard = shard
    for sharded in filter(None, (policy, reference) if shard else ()):
        ranks.shard(sharded, args.device, train_grpo.torch.float64)
    return policy, policy, reference


def stopped(folder: Path, step: int, out: Path) -> None:
    """As if the run in `folder` had been killed on its way from `step` to its end."""
    shutil.copytree(folder, out)
    for later in out.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def run(out: Path, flags: list[str], begun: tuple[Path, int] | None = None) -> None:
    if begun:
        ranks.on_rank0(lambda: stopped(Path(begun[0]), begun[1], out))
    single, flags = flags[:1] == [SINGLE], [flag for flag in flags if flag != SINGLE]
    steps, sizes, prefixes = [], [], []
    step, update, gather, save = train_grpo.step, train_grpo.update, ranks.gather, checkpoint.save

    def traced_update(*arguments):
        prefixes.append(arguments[4])
        return update(*arguments)

    def traced_step(number, policy, *rest):
        sizes.clear()
        everyone, roll, losses, decisions = step(number, policy, *rest)
        gathered = list(sizes)
        lengths = roll.lengths.tolist()
        ids = [
            [row[:n] for row, n in zip(*group, strict=True)] for group in zip(roll.ids.tolist(), lengths, strict=True)
        ]
        mine = [list(row) for row in zip([p.sample.source for p in roll.prompts], roll.texts, ids, strict=True)]
        traced = {"rolled": mine, "u": everyone.u.tolist(), "shared": prefixes.pop() is not None}
        traced |= {"collectives": ranks.collectives, "gathered": gathered}
        steps.append(traced | {"weights": sum(ranks.full_tensor(p.detach()).sum().item() for p in policy.parameters())})
        return everyone, roll, losses, decisions

    def traced_save(folder, number, policy, *rest):
        tensors = {name: ranks.full_tensor(p.detach()).clone() for name, p in policy.named_parameters()}
        if ranks.rank == 0:
            save_file(tensors, out / "wide.safetensors")
        return save(folder, number, policy, *rest)

    with (
        patch.object(train_grpo, "make_policies", train_grpo.make_policies if single else wide_policies),
        patch.object(train_grpo, "step", traced_step),
        patch.object(train_grpo, "update", traced_update),
        patch.object(checkpoint, "save", traced_save),
        patch.object(ranks, "gather", lambda rows: sizes.append(rows.numel()) or gather(rows)),
        patch.object(ranks, "start", lambda device: None),  # once for all cases
        patch.object(ranks, "end", lambda: None),
        patch.object(sys, "argv", ["train_grpo.py", *flags, "--out", str(out)]),
    ):
        train_grpo.main()
    traces = ranks.gather_objects(lambda: steps)
    ranks.on_rank0(lambda: (out / "trace.json").write_text(json.dumps(traces)) and None)


def main() -> None:
    ranks.start("cpu")
    for out, *rest in json.loads(Path(sys.argv[1]).read_text()):
        run(Path(out), *rest)
    ranks.end()


if __name__ == "__main__":
    errors.run(main)
