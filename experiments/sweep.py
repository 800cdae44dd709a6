"""A grid of runs: every row on every set with every seed, each `python train_grpo.py` (or train_sft.py), one thread.

    python experiments/sweep.py experiments/main.toml --jobs 2               what is missing is run, what is done is not
    python experiments/sweep.py experiments/main.toml --only xray medloc     of the runs those that have all these words
    python experiments/sweep.py experiments/main.toml --jobs 0               table and plots anew, from results.jsonl
    python experiments/sweep.py experiments/main.toml --out out-main         all of it again, in a folder of your own

A grid is a TOML file; main.toml shows what may stand in it. --out (default: the folder named like the grid) gets
results.jsonl, a line per finished run, and made from that alone table.md and plots (figures.py); the runs themselves
are under runs/ there. Stop it when you like (Ctrl-C): runs save, and the next call goes on with them. A run is done
while results.jsonl has a line with its very flags, and its start's; a line knows nothing of the code that made it. All
rows of a set begin from one policy; that is checked.

Left out: several machines (give each a part by --only), early stopping, a search over values.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds modules beside it; errors.py is above

import errors  # noqa: E402
from errors import InputError  # noqa: E402
from experiments import figures  # noqa: E402
from experiments.recorded import canonical  # noqa: E402
from experiments.tables import check_footing, table  # noqa: E402
from runtime import checkpoint  # noqa: E402

SFT = "train_sft.py"  # has flags of its own, and no rollouts; any other program is taken for train_grpo.py
PARTS = ("base", "about", "seeds", "starts", "flags", "sets", "rows", "compare", "reuse", "measures", "watch")


@dataclass(frozen=True)
class Run:
    """A program and its flags as the grid has them: $NAME stands for the environment variable, @name for the policy
    that the start of that name leaves."""

    name: str  # set/row/seed-0, or starts/name
    program: str
    flags: dict
    start: "Run | None" = None  # what it begins from, if the grid makes that too

    def words(self) -> list[str]:
        """The program and its flags."""
        words = [self.program]
        for flag, value in self.flags.items():
            option = "--" + flag.replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            else:
                words += [option, *map(str, value if isinstance(value, list) else [value])]
        return words

    def recipe(self) -> str:
        """What makes its numbers, from the first start on: two runs with the same are the same run."""
        before = f"{self.start.recipe()}; " if self.start else ""
        return f"{before}{shlex.join(self.words())}"

    def expanded(self, runs: Path) -> list[str]:
        """words() with files for $NAME and @name. InputError for a variable that is not set."""
        words = []
        for word in self.words():
            if word.startswith("@"):
                word = str(runs / self.start.name / f"step-{self.start.flags['steps']:06d}")
            for name in re.findall(r"\$(\w+)", word):
                if name not in os.environ:
                    raise InputError(f"{self.name} wants {word}: export {name}=..., where your files are")
            words.append(os.path.expandvars(word))
        return words


class Grid:
    """A grid file, read. `runs` are its cells by (set, row, seed), row after row of each set."""

    def __init__(self, file: Path):
        self.file, raw = file, read_toml(file)
        known = set(raw.get("rows", {}))
        if "base" in raw:  # a grid beside it, whose parts hold where this one has none
            base = read_toml(file.parent / str(raw["base"]))
            known |= set(base.get("rows", {}))
            raw = base | raw
        if unknown := raw.keys() - set(PARTS):
            raise InputError(f"{file}: {min(unknown)!r} is none of {', '.join(PARTS)}")
        for part in ("starts", "sets", "rows"):
            for name, value in raw.get(part, {}).items():
                if not isinstance(value, dict):
                    raise InputError(f"{file}: {part}.{name} must be a table of flags, got {value!r}")
        if not isinstance(raw.get("seeds", []), list):
            raise InputError(f"{file}: seeds must be a list, got {raw['seeds']!r}")
        self.about, self.seeds, self.compare = raw.get("about", ""), raw.get("seeds", [0]), raw.get("compare", [])
        # What is compared: metrics of an evaluation, DATASET/METRIC for one dataset's (none: those of boxes); and
        # fields of metrics.jsonl, shown as their mean over all steps.
        self.measures, self.watch = raw.get("measures", []), raw.get("watch", [])
        self.reuse = [file.parent / name for name in raw.get("reuse", [])]  # other grids' results.jsonl
        self.sets, self.rows = list(raw.get("sets", {})), list(raw.get("rows", {}))
        self.starts: dict[str, Run] = {}
        for name, flags in raw.get("starts", {}).items():
            self.starts[name] = self._run(f"starts/{name}", {"program": SFT} | flags)
        self.runs: dict[tuple[str, str, int], Run] = {}
        for one, of_set in raw.get("sets", {}).items():
            if unknown := {name for name, value in of_set.items() if isinstance(value, dict)} - known:
                raise InputError(f"{file}: sets.{one}.{min(unknown)} is for a row that there is not")
            for row, of_row in raw.get("rows", {}).items():
                of_row = dict(of_row)
                asked_sets = of_row.pop("sets", self.sets)  # [rows.ROW] may name its sets; else all
                if not isinstance(asked_sets, list):
                    raise InputError(f"{file}: rows.{row}.sets must be a list, got {asked_sets!r}")
                if unknown := set(asked_sets) - set(self.sets):
                    raise InputError(f"{file}: rows.{row} names the set {min(unknown)!r}, which is none")
                if one not in asked_sets:
                    continue
                alone = of_set.get(row, {})  # [sets.ONE.ROW]: flags of this row on this set
                flags = raw.get("flags", {}) | {flag: v for flag, v in of_set.items() if not isinstance(v, dict)}
                if of_row.get("program") == SFT:  # of the shared ones it gets what names the work
                    flags = {flag: flags[flag] for flag in ("data", "val", "model", "workers") if flag in flags}
                for seed in self.seeds:
                    flags = flags | of_row | alone | {"seed": seed}
                    self.runs[one, row, seed] = self._run(f"{one}/{row}/seed-{seed}", flags)
        if not self.runs:
            raise InputError(f"{file}: [sets] and [rows] must each name at least one")
        if unknown := {row for pair in self.compare for row in pair} - set(self.rows):
            raise InputError(f"{file}: compare names {min(unknown)!r}, which is no row")

    def _run(self, name: str, flags: dict) -> Run:
        flags = dict(flags)
        program, model = flags.pop("program", "train_grpo.py"), flags.get("model", "")
        if model.startswith("@") and model[1:] not in self.starts:
            raise InputError(f"{self.file}: model of {name} is {model}, and no [starts.{model[1:]}] stands above it")
        if "steps" not in flags:  # the last checkpoint is named after them
            raise InputError(f"{self.file}: {name} has no steps: name them in its row")
        return Run(name, program, flags, self.starts.get(model[1:]) if model.startswith("@") else None)


def read_toml(file: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise InputError("grids are TOML, which Python reads from 3.11 on") from None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- running


class Runner:
    """Runs what a grid asks for, in `folder`/runs. What a run prints goes to <its folder>.log."""

    def __init__(self, folder: Path):
        self.runs = folder / "runs"

    def out(self, run: Run, ending: str = "") -> Path:
        """Its folder, or the file of that name and ending beside it; a name may have dots of its own."""
        return self.runs / f"{run.name}{ending}"

    def ended(self, run: Run) -> bool:
        """Whether the run's folder holds this very run, to its end."""
        try:
            asked = json.loads(self.out(run, ".json").read_text())
            evaluation = json.loads((self.out(run) / "eval.json").read_text())
        except (OSError, ValueError):
            return False
        trained = self.out(run) / f"step-{run.flags['steps']:06d}"
        return asked == run.recipe() and bool(evaluation.get("final", True)) and trained.is_dir()

    def begin(self, run: Run) -> subprocess.Popen:
        """The run's process: anew, or on with what there is of it."""
        out, words, more = self.out(run), run.expanded(self.runs), []
        asked = self.out(run, ".json")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out(run, ".log"), "a") as log:
            try:  # held as long as a process writes here, so also by a run that outlived the sweep that began it
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{log.name} is being written: end the process that does, or wait for it") from None
            if run.program != SFT and asked.exists() and json.loads(asked.read_text()) == run.recipe():
                more = ["--resume"] if list(out.glob("step-*")) else []
            if not more:
                shutil.rmtree(out, ignore_errors=True)  # of other flags, or without a checkpoint
                checkpoint.write_whole(asked, json.dumps(run.recipe()) + "\n")
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, *words, "--out", str(out), *more]
            # Out of the terminal's reach: of a Ctrl-C it hears by work(), once.
            quiet = {"stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)

    def work(self, runs: list[Run], jobs: int, after_each) -> list[str]:
        """These runs and what they begin from, `jobs` at a time -> a sentence for each that failed."""
        pending = [run for run in with_starts(runs) if not self.ended(run)]
        alive: dict[subprocess.Popen, Run] = {}
        sentences = []
        with tqdm(total=len(pending), unit="run", smoothing=0) as bar:
            try:
                while pending or alive:
                    ready = [run for run in pending if run.start is None or self.ended(run.start)]
                    for run in ready[: jobs - len(alive)]:
                        pending.remove(run)
                        alive[self.begin(run)] = run
                    if not alive:
                        return sentences + [f"{run.name} waits for {run.start.name}, which failed" for run in pending]
                    time.sleep(0.2)
                    for process in [process for process in alive if process.poll() is not None]:
                        run = alive.pop(process)
                        bar.update()
                        if self.ended(run):
                            after_each()
                        else:
                            log = self.out(run, ".log")
                            sentences.append(f"{run.name} ended with code {process.returncode}; its last words: {log}")
                            tqdm.write(sentences[-1])
            finally:  # after Ctrl-C runs save themselves
                for process in alive:
                    process.terminate()
                for process in alive:
                    process.wait()
        return sentences


def with_starts(runs: list[Run]) -> list[Run]:
    """The runs, behind all that they begin from; each once."""
    found: dict[str, Run] = {}
    for run in runs:
        chain = [run]
        while chain[0].start:
            chain.insert(0, chain[0].start)
        found |= {link.name: link for link in chain}
    starts = [run for run in found.values() if run.name.startswith("starts/")]
    return starts + [run for run in found.values() if run not in starts]


# ------------------------------------------------------------------------------------------------------------- results


def measured(evaluation: dict, name: str) -> float:
    """A grid's measure: METRIC, or DATASET/METRIC."""
    dataset, _, metric = name.rpartition("/")
    return (evaluation["datasets"][dataset] if dataset else evaluation)[metric]


def result(key: tuple[str, str, int], run: Run, out: Path, measures: list[str] = (), watch: list[str] = ()) -> dict:
    """A line of results.jsonl, from what a finished run wrote."""
    one, row, seed = key
    evaluation, config = (json.loads((out / name).read_text()) for name in ("eval.json", "config.json"))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    start, final = evaluation["start"], evaluation["final"]
    found = {"set": one, "row": row, "seed": seed}
    if measures:
        found |= {"n": final["n"], "parse_failures": final["parse_failures"]}
        found["measures"] = {name: measured(final, name) for name in measures}
        found["start"] = {name: measured(start, name) for name in measures}
        found |= {"judge": final["judge"]} if "judge" in final else {}
        for name in watch:
            values = [step[name] for step in steps if step.get(name) is not None]
            found.setdefault("watch", {})[name] = round(fmean(values), 6) if values else None
    else:
        found |= {name: final[name] for name in ("n", "miou", "acc@0.5", "acc@0.8", "pmap", "parse_failures")}
        found |= {"start_miou": start["miou"], "start_pmap": start["pmap"]}
    if measures:
        curves = {"u_mean": "step_u_mean"} if run.program != SFT else {}
        found |= {into: [round(step[name], 4) for step in steps] for name, into in curves.items()}
    elif run.program != SFT:
        half = [step["u_mean"] for step in steps[len(steps) // 2 :]]
        found |= {"zero_spread": fmean(step["zero_spread"] for step in steps)}
        found |= {"stability": stdev(half) if len(half) > 1 else 0.0}
        if steps[-1]["tau"] is not None:
            found["no_hit"] = fmean(step["no_hit"] for step in steps)
        found |= {"tau": steps[-1]["tau"], "images": steps[-1]["drawn"]}
        found |= {"rollouts": sum(step["groups"] for step in steps) * config["arguments"]["group_size"]}
        found |= {"history": [[e["step"], e["miou"], e["pmap"]] for e in evaluation["history"]]}
        for name, field in (("iou_mean", "u_mean"), *((n, n) for n in ("zero_spread", "no_hit", "tau"))):
            found["step_" + name] = [step[field] and round(step[field], 4) for step in steps]
        found["step_held"] = [held(step["decision"]) for step in steps]
    else:
        found |= {"images": len(steps) * config["arguments"]["batch_size"], "rollouts": 0}
    found |= {"seconds": round(sum(step["seconds"] for step in steps), 1), "date": str(date.today())}
    found |= {"machine": machine(), "recipe": run.recipe()}
    return found


def held(decision: str) -> str:
    """What kept tau where it is, in the words of scheduler.Decision: "sigma" or "hit rate, margin"; "" if it rose."""
    stays = decision.partition(" stays: ")[2]
    return ", ".join(name for name in ("window", "hit rate", "sigma", "margin", "target") if name in stays)


def machine() -> str:
    """The processor, and the libraries that decide on the last digits."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        name = (re.findall(r"model name\s*: (.*)", info.read_text()) or [name])[0]
    return f"{name}, torch {version('torch')}, Python {platform.python_version()}"


def read_lines(file: Path) -> list[dict]:
    """The lines of a results.jsonl, none where there is no file."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["set"], rows[-1]["row"], rows[-1]["seed"], rows[-1]["recipe"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}:{number}: is no line of a sweep's; delete it") from None
    return rows


def asked_for(grid: Grid, rows: list[dict]) -> dict[tuple[str, str, int], dict]:
    """Those of the lines that belong to the grid's runs as they are now."""
    keyed = {(row["set"], row["row"], row["seed"]): row for row in rows}

    def same(key: tuple[str, str, int], recipe: str) -> bool:  # whatever the flags were called then
        return key in grid.runs and canonical(recipe) == canonical(grid.runs[key].recipe())

    return {key: row for key, row in keyed.items() if same(key, row["recipe"])}


def reused(grid: Grid) -> dict[tuple[str, str, int], dict]:
    """What other grids have found already."""
    return asked_for(grid, [row for file in grid.reuse for row in read_lines(file)])


def collect(grid: Grid, folder: Path, runner: Runner) -> list[dict]:
    """results.jsonl and table.md, with the runs that have ended since -> the grid's lines. One that it asks for no
    more stays until there is a new one of its set, row and seed; what it reuses stays in its own file."""
    file = folder / "results.jsonl"
    lines, found = read_lines(file), reused(grid)
    own = {key: row for key, row in asked_for(grid, lines).items() if key not in found}
    for key, run in grid.runs.items():
        if key not in found | own and runner.ended(run):
            own[key] = result(key, run, runner.out(run), grid.measures, grid.watch)
    found |= own
    old = [row for row in lines if (row["set"], row["row"], row["seed"]) not in found]
    if own or old:
        rows = [own[key] for key in grid.runs if key in own] + old
        checkpoint.write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    results = [found[key] for key in grid.runs if key in found]
    check_footing(results)
    if results:
        checkpoint.write_whole(folder / "table.md", table(grid, results))
    return results


def main() -> None:
    parser = errors.Parser(
        prog="experiments/sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="a TOML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each; 0: table and plots only")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="runs whose set/row/seed-N has all of these"
    )
    parser.add_argument("--out", type=Path, help="folder of results and runs; default: beside the grid, of its name")
    options = parser.parse_args()
    if options.jobs < 0:
        parser.error("--jobs must be at least 0")
    grid = Grid(options.grid.resolve())
    folder = (options.out or grid.file.with_suffix("")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {key: run for key, run in grid.runs.items() if set(options.only) <= set(run.name.split("/"))}
    if not wanted:
        parser.error(f"--only {' '.join(options.only)}: no run of the grid has all of these")
    if options.out:
        grid.reuse = []  # all of it again
    runner, lines = Runner(folder), read_lines(folder / "results.jsonl")
    done = reused(grid) | asked_for(grid, lines)
    if old := len(lines) - len(asked_for(grid, lines)):
        words = f"{old} lines are of runs that {grid.file.name} no longer asks for"
        print(f"{folder / 'results.jsonl'}: {words}", file=sys.stderr)
    todo = [run for key, run in wanted.items() if key not in done]
    failed = []
    if options.jobs and todo:
        for run in with_starts(todo):
            run.expanded(runner.runs)  # a variable that is missing is said now, not in an hour
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed = runner.work(todo, options.jobs, lambda: collect(grid, folder, runner))
    results = collect(grid, folder, runner)
    print(f"{len(results)} of {len(grid.runs)} runs are in {folder}")
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}")
    if results:
        figures.draw(grid, results, folder)


if __name__ == "__main__":
    errors.run(main)
