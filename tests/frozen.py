"""Six short runs, and whether they still are what they were: for changes that must change no number.

    python tests/frozen.py record FILE      before the change
    python tests/frozen.py compare FILE     after it, on the same machine: bits depend on processor and libraries

Compared are the rows of metrics.jsonl and samples.jsonl (times and memory aside), eval.json, and the bytes of the last
weights. Not a test of the suite: what it compares with is not in the repository.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "seconds_input", "seconds_rollout", "seconds_update", "peak_mb", "resident_mb"}
SMALL = "--data phantoms --group-size 4 --max-tokens 20 --eval-limit 6 --samples-every 2 --workers 1 --window 6"
SMALL += " --tau-start .05 --no-check-stability --no-check-margin"
RUNS = {  # name -> (processes, flags of each start one after the other)
    "nano": (1, ["--steps 6 --batch-size 4"]),
    "everything": (
        1,
        [
            "--steps 4 --batch-size 4 --micro-batch 2 --dynamic-sampling 2 --inner-steps 2 --beta .05 --loss dapo"
            " --kl k3+ --overlong mask --freeze-vision --clip-high .28 --rewards box=1,format=.2 --eval-every 2"
            " --save-every 2 --lr 1e-3 --keep 1"
        ],
    ),
    "adapters": (1, ["--steps 3 --batch-size 3 --micro-batch 2 --lora-rank 3 --beta .1 --checkpointing"]),
    "two ranks": (2, ["--steps 4 --batch-size 5 --micro-batch 2 --beta .05 --eval-every 2"]),
    "sharded": (2, ["--steps 3 --batch-size 3 --micro-batch 1 --beta .05 --inner-steps 2 --shard --checkpointing"]),
    "resumed": (1, ["--steps 3 --batch-size 4 --save-every 2 --lr 1e-3", "--resume --steps 6"]),
}


def digest(out: Path) -> dict:
    rows = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows[name] = [json.loads(line) for line in (out / name).read_text().splitlines()]
        rows[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows[name]]
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


def main() -> None:
    what, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        found = replay(Path(folder))
    if what == "record":
        file.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(file.read_text())
    differing = [
        f"{name}: {part}" for name in RUNS for part in before[name] if before[name][part] != found[name].get(part)
    ]
    print("\n".join(differing) or f"{len(RUNS)} runs are what they were, to the last bit")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
