"""Six short runs, and whether they still are what they were: for changes that must change no number.

    python tests/frozen.py record FILE      before the change
    python tests/frozen.py compare FILE     after it, on the same machine: bits depend on processor and libraries

Compared are the rows of metrics.jsonl and samples.jsonl (times and memory aside), eval.json, and the bytes of the last
weights. Not a test of the suite: what it compares with is not in the repository. Fields that had other names before are
in RENAMED; fields that only one of the two has are not compared, but said.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "seconds_input", "seconds_rollout", "seconds_update", "peak_mb", "resident_mb"}
SMALL = "--data phantoms --group-size 4 --max-tokens 20 --eval-limit 6 --workers 1 --schedule "
SMALL += "medloc:window=6,tau_start=.05,check_stability=off,check_margin=off"
RUNS = {  # name -> (processes, flags of each start one after the other)
    "nano": (1, ["--steps 6 --batch-size 4"]),
    "everything": (
        1,
        [
            "--steps 4 --batch-size 4 --micro-batch 2 --dynamic-sampling 2 --inner-steps 2 --beta .05"
            " --loss dapo:kl=k3+,overlong=mask --freeze-vision --clip .2 .28 --rewards task=1,format=.2 --eval-every 2"
            " --save-every 2 --lr 1e-3 --keep 1"
        ],
    ),
    "adapters": (1, ["--steps 3 --batch-size 3 --micro-batch 2 --lora-rank 3 --beta .1 --checkpointing"]),
    "two ranks": (2, ["--steps 4 --batch-size 5 --micro-batch 2 --beta .05 --eval-every 2"]),
    "sharded": (2, ["--steps 3 --batch-size 3 --micro-batch 1 --beta .05 --inner-steps 2 --shard --checkpointing"]),
    "resumed": (1, ["--steps 3 --batch-size 4 --save-every 2 --lr 1e-3", "--resume --steps 6"]),
}
RENAMED = {
    "iou_mean": "u_mean",
    "iou_q25": "u_q25",
    "iou_q50": "u_q50",
    "iou_q75": "u_q75",
    "reward_box": "reward_task",
}
RENAMED |= {"ious": "u", "boxes": "answers"}


def digest(out: Path) -> dict:
    rows = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows[name] = [json.loads(line) for line in (out / name).read_text().splitlines()]
    last = max(out.glob("step-*")) / "model.safetensors"
    weights = hashlib.sha256(last.read_bytes()).hexdigest()
    return rows | {"eval.json": json.loads((out / "eval.json").read_text()), str(last.relative_to(out)): weights}


def replay(folder: Path) -> dict:
    found = {}
    for name, (processes, starts) in RUNS.items():
        out = folder / name.replace(" ", "-")
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        for flags in starts:
            small = [] if "--resume" in flags else SMALL.split()
            program = [sys.executable, *(torchrun if processes > 1 else []), "train_grpo.py"]
            command = [*program, *small, *flags.split(), "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {' '.join(command)}\n{done.stdout}{done.stderr}")
        found[name] = digest(out)
    return found


def differences(before, after, place: str = "") -> list[str]:
    """What differs between two values of JSON, and where; rows of samples.jsonl that only one has are none."""
    if isinstance(before, dict) and isinstance(after, dict):
        before = {RENAMED.get(key, key): value for key, value in before.items()}
        shared = [key for key in before if key in after and key not in TIMES]
        alone = sorted((before.keys() ^ after.keys()) - TIMES)
        said = [f"{place}: not in both: {', '.join(alone)}"] if alone else []
        return said + [line for key in shared for line in differences(before[key], after[key], f"{place}/{key}")]
    if isinstance(before, list) and isinstance(after, list) and place.endswith("samples.jsonl"):
        steps = {row["step"]: row for row in after}
        return [d for row in before if row["step"] in steps for d in differences(row, steps[row["step"]], place)]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    return [] if before == after else [f"{place}: {before!r:.60} was, {after!r:.60} is"]


def main() -> None:
    what, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        found = replay(Path(folder))
    if what == "record":
        file.write_text(json.dumps(found, indent=1))
        return
    lines = differences(json.loads(file.read_text()), found)
    named = [line for line in lines if "not in both" in line]
    print("\n".join(lines))
    if len(lines) == len(named):
        print(f"{len(RUNS)} runs are what they were, to the last bit")
    sys.exit(len(lines) > len(named))


if __name__ == "__main__":
    main()
