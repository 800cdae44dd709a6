"""One whole optimiser step of GRPO, ours against TRL and against transformers by hand, interleaved in one run.

    python -m bench.step --case A                                           ours and transformers by hand
    python -m bench.step --case A --trl-python .venv/trl/bin/python         and TRL: bench/README.md makes its venv
    python -m bench.step --case C --steps 5 --json step-c.json

    A    8 prompts x 8 answers, 140 x 140 px (about 62 prompt tokens), 32 new tokens
    B    2 prompts x 8 answers, 448 x 448 px (about 293 prompt tokens), 32 new tokens
    C    2 prompts x 8 answers, 448 x 448 px, 128 new tokens
    tiny 2 prompts x 8 answers, 56 x 56 px, 4 new tokens: for the tests, its figures mean nothing

A step: pictures from disk, rollout, scoring, reference, update. The policy has random weights (hidden 128, 4 + 4
layers, fp32). Every program (step_programs.py) is a process of its own and does a step when its turn comes, so that
whatever else the machine does hits all alike; the first round is not counted. Ratios are of medians, theirs over ours,
by the clock and by processor time: on a machine that is busy with other work the second is the one to trust. Memory is
the highest resident size in a step beyond what is resident once the models are loaded. A run in which a program was
given another prompt or picture, or in which an answer ended early, is refused.

Left out: GPUs; TRL with vLLM, which needs one.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import errors
from bench import step_programs
from bench.kernels import markdown
from data import phantom_samples
from errors import InputError, read_object
from images import load
from model import Policy
from prompts import Processor
from runtime.stream import Sampler
from tasks import TASKS
from weights import NANO, read_config, save_policy

ROOT = Path(__file__).resolve().parent.parent
GROUP = 8


@dataclass(frozen=True)
class Case:
    prompts: int
    side: int  # pixels, a multiple of 28: nobody resizes
    tokens: int  # of every completion


CASES = {"A": Case(8, 140, 32), "B": Case(2, 448, 32), "C": Case(2, 448, 128), "tiny": Case(2, 56, 4)}
QUERIES = {  # of unequal length, as queries are
    "dermoscopy": "the skin lesion, darker than the skin near it",
    "xray": "the bone fragment, broken off from its shaft",
    "ultrasound": "the nodule, darker than the gland by it",
}
PROGRAMS = {  # name -> what it is called in the table
    "ours": "this trainer",
    "plain": "transformers by hand",
    "trl": "TRL, gradient checkpointing off",
    "trl-checkpointing": "TRL, gradient checkpointing on (its default)",
}
CLOCKS = {"seconds": "", "cpu_seconds": "_cpu"}  # what a program measures -> how its ratios are marked
NO_TRL = "not run: --trl-python names no interpreter"


def prepare(folder: Path, case: Case, steps: int, seed: int, threads: int) -> None:
    """Everything that all programs read: model/, images, records.jsonl, case.json."""
    raw = read_object(NANO / "config.json")
    raw["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [0, 3]}
    policy = Policy(read_config(raw)).init_weights(seed)
    policy.source, policy.raw_config = NANO, raw
    save_policy(policy, folder / "model")
    Processor(NANO, "answer", TASKS, max_pixels=case.side**2).save(folder / "model")

    samples, lines = phantom_samples(None, seed, 0, (1 + steps) * case.prompts, case.side), []
    for i, sample in enumerate(samples):
        picture, box = load(sample)
        picture.save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "query": QUERIES[sample.media.kind], "bbox": box}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    order = Sampler(len(samples), case.prompts, seed).take(0, len(samples))  # TRL is given the pictures in our order
    sizes = asdict(case) | {"group": GROUP, "steps": 1 + steps, "seed": seed, "threads": threads, "order": order}
    (folder / "case.json").write_text(json.dumps(sizes))


class Program:
    """A program's process: it loads its models, is heard once, then works while `ask` waits and sleeps otherwise."""

    def __init__(self, name: str, folder: Path, threads: int, python: str):
        self.name, self.errors = name, open(folder / f"{name}.log", "w+")
        file = ["-I", step_programs.__file__] if name.startswith("trl") else ["-m", "bench.step_programs"]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [python, *file, name, str(folder)], cwd=ROOT, env=os.environ | quiet | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def ask(self, command: str) -> dict:
        with suppress(BrokenPipeError):  # it has ended: hear() says so
            print(command, file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(f"the program {self.name!r} ended in the middle of the run; its last words: {last:.300}")
        return json.loads(line)

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # no more commands: it ends by itself, unless something is wrong
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.errors.close()


def check_lengths(case: Case, name: str, answer: dict) -> None:
    lengths = answer["lengths"]
    if lengths != [case.tokens] * (case.prompts * GROUP):
        raise InputError(
            f"{name}: {case.prompts * GROUP} completions of {case.tokens} tokens were asked for, it made "
            f"{len(lengths)} of {min(lengths)} to {max(lengths)}; its times compare with nothing"
        )


def check_same_work(case: Case, answers: dict[str, dict]) -> None:
    """InputError unless all programs of a round did the same: ours is what the others are held to."""
    ours = answers["ours"]
    for name, answer in answers.items():
        check_lengths(case, name, answer)
        if answer["prompts"] != ours["prompts"]:
            raise InputError(f"{name}: its prompts have other token ids than ours; its times compare with nothing")
        pairs = zip(answer["pictures"], ours["pictures"], strict=True)
        if any(abs(theirs - there) > 1e-4 * there for theirs, there in pairs):
            raise InputError(f"{name}: its pictures have other pixels than ours; its times compare with nothing")


def interleaved(case: Case, programs: dict[str, Program], steps: int) -> dict[str, list[dict]]:
    """A round that is not counted, then `steps` rounds in which every program does one step."""
    rounds = []
    for n in range(1 + steps):
        answers = {name: program.ask("step") for name, program in programs.items()}
        check_same_work(case, answers)
        times = "  ".join(f"{name} {answer['seconds']:.2f} s" for name, answer in answers.items())
        print(f"{f'round {n} of {steps}' if n else 'not counted'}: {times}", flush=True)
        rounds.append(answers)
    return {name: [answers[name] for answers in rounds[1:]] for name in programs}


def generate_calls(case: Case, programs: dict[str, Program], steps: int) -> dict[str, list[dict]]:
    """Whole generate calls, ours and transformers', in turns after one that is not counted."""
    calls = {"ours": [], "plain": []}
    for n in range(1 + steps):
        for name, answers in calls.items():
            answer = programs[name].ask("generate")
            check_lengths(case, name, answer)
            answers += [answer] if n else []
    return calls


def median(answers: list[dict], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def results(name: str, about: dict, steps: dict, calls: dict, splits: list[dict]) -> dict:
    """The JSON: what each program said about itself, its steps, and what follows from them."""
    case, rows = CASES[name], {}
    for program, answers in steps.items():
        peak = max(answer["peak_mib"] for answer in answers) - about[program]["resident_mib"]
        rows[program] = about[program] | {
            **{key: [answer[key] for answer in answers] for key in CLOCKS},
            **{f"median_{key}": median(answers, key) for key in CLOCKS},
            "tokens_per_second": case.prompts * GROUP * case.tokens / median(answers, "seconds"), "peak_mib": peak,
        }  # fmt: skip
    ours, ratios = rows["ours"], {}
    for program in list(PROGRAMS)[1:]:
        row, of = rows.get(program), program.replace("-", "_")
        for key, clock in CLOCKS.items():  # above 1: ours is faster
            ratios[f"ratio{clock}_{of}"] = row and row[f"median_{key}"] / ours[f"median_{key}"]
        ratios[f"memory_{of}"] = row and ours["peak_mib"] / row["peak_mib"]  # below 1: ours needs less
    for key, clock in CLOCKS.items():  # below 1: ours is faster
        ratios[f"ratio{clock}_generate"] = median(calls["ours"], key) / median(calls["plain"], key)
    prompt_tokens = [len(ids) for answer in steps["ours"] for ids in answer["prompts"]]
    return {
        "case": name, **asdict(case), "group": GROUP, "prompt_tokens": [min(prompt_tokens), max(prompt_tokens)],
        "steps": len(steps["ours"]), "beta": step_programs.BETA, **ratios, "programs": rows,
        "split": {part: median(splits, part) for part in step_programs.PARTS},
        "generate": {who: {key: [c[key] for c in answers] for key in CLOCKS} for who, answers in calls.items()},
    }  # fmt: skip


def table(found: dict) -> str:
    """The programs of results(), a row each; and what a step of ours is spent on."""
    lines, ours = [], found["programs"]["ours"]
    for name, title in PROGRAMS.items():
        row = found["programs"].get(name)
        if row is None:
            lines.append([title, NO_TRL, *[""] * 5])
            continue
        ratio, cpu = (f"{row[key] / ours[key]:.2f}" for key in ("median_seconds", "median_cpu_seconds"))
        seconds = f"{row['median_seconds']:.2f} ({min(row['seconds']):.2f} - {max(row['seconds']):.2f})"
        peak = f"{row['peak_mib']:.0f} ({ours['peak_mib'] / row['peak_mib']:.2f})"
        versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        cpu = f"{row['median_cpu_seconds']:.2f} ({cpu})"
        lines.append([title, seconds, ratio, cpu, f"{row['tokens_per_second']:.0f}", peak, versions])
    header = ["program", "s/step (range)", "/ ours", "CPU s (/ ours)", "tokens/s", "peak MiB (ours /)", "versions"]
    total = sum(found["split"].values())
    split = [f"{part} {seconds:.3f} s ({seconds / total:.0%})" for part, seconds in found["split"].items()]
    generate = f"{found['ratio_generate']:.2f} of transformers' time, {found['ratio_cpu_generate']:.2f} of its CPU time"
    return "\n".join([
        markdown(header, lines),
        "",
        f"processor time of a step of ours: {', '.join(split)}",
        f"a whole generate call (vision, prefill, decode): {generate}",
    ])  # fmt: skip


def machine(threads: int) -> dict:
    text = Path("/proc/cpuinfo").read_text()
    names = {line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")}
    cpu = ", ".join(sorted(names)) or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "date": date.today().isoformat()}


def compare(name: str, steps: int, seed: int, threads: int, trl_python: str | None) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder, programs = Path(place), {}
        prepare(folder, CASES[name], steps, seed, threads)
        try:
            for program in PROGRAMS:
                python = trl_python if program.startswith("trl") else sys.executable
                if python:
                    programs[program] = Program(program, folder, threads, python)
            about = {program: programs[program].hear() for program in programs}
            done = interleaved(CASES[name], programs, steps)
            calls = generate_calls(CASES[name], programs, steps)
            splits = [programs["ours"].ask("split") for _ in range(steps)]
        finally:
            for program in programs.values():
                program.close()
    return machine(threads) | results(name, about, done, calls, splits)


def main() -> None:
    parser = errors.Parser(prog="-m bench.step", description="one optimiser step, ours against TRL and transformers")
    parser.add_argument("--case", choices=tuple(CASES), required=True, help="sizes; see the top of bench/step.py")
    parser.add_argument("--steps", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="save every figure")
    parser.add_argument("--trl-python", metavar="PATH", help="interpreter of an environment with TRL; without: no TRL")
    parser.add_argument("--threads", type=int, default=1, help="of every program (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and sampling (default %(default)s)")
    options = parser.parse_args()
    if min(options.steps, options.threads) < 1 or options.seed < 0:
        parser.error("--steps and --threads must be at least 1, --seed at least 0")
    if sys.platform != "linux":
        parser.error("this reads peak memory from /proc, which only Linux has")
    if options.trl_python and not os.access(options.trl_python, os.X_OK):
        parser.error(f"--trl-python {options.trl_python} is not a program; bench/README.md makes one in three lines")
    trl_python = options.trl_python and os.path.abspath(options.trl_python)
    file = open(options.json, "w") if options.json else None  # now: not after minutes of work
    found = compare(options.case, options.steps, options.seed, options.threads, trl_python)
    about = f"case {found['case']}: {found['prompts']} prompts x {GROUP}, {found['side']} px, "
    about += f"{' - '.join(map(str, found['prompt_tokens']))} prompt tokens, {found['tokens']} new tokens"
    about += f"; {found['cpu']}, {found['threads']} of {found['cores']} cores, {found['date']}"
    print(f"\n{about}\n\n{table(found)}")
    if file:
        with file:
            print(json.dumps(found, indent=1), file=file)


if __name__ == "__main__":
    errors.run(main)
