"""experiments/sweep.py: which runs a grid means, that each is run once and to its end, and what is told of them."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

import pytest
from PIL import Image
from programs import lines

import config
from errors import InputError
from experiments import sweep, tables
from experiments.recorded import canonical
from experiments.sweep import Grid, Runner

if sys.version_info < (3, 11):
    pytest.skip("grids are TOML, which Python reads from 3.11 on", allow_module_level=True)

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
drawn = pytest.mark.skipif(find_spec("matplotlib") is None, reason='needs matplotlib: pip install -e ".[plot]"')

# Stands in for train_grpo.py: the same files, and numbers that follow from its flags. It notes when it began and ended,
# saves after step 1, and does not end by itself as long as a file called `wait` is there.
FAKE = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for flag in ("out", "schedule", "model", "data"):
    parser.add_argument("--" + flag)
for flag in ("steps", "seed"):
    parser.add_argument("--" + flag, type=int)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--slow", action=argparse.BooleanOptionalAction)
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
out, here = pathlib.Path(args.out), pathlib.Path(__file__).parent
with open(here / "log", "a") as log:
    print("begin", args.schedule, args.seed, args.resume, time.time(), file=log)
if args.schedule == "broken":
    sys.exit("it broke")
(out / "step-000001").mkdir(parents=True, exist_ok=True)
time.sleep(0.7 if args.schedule == "sft" else 0.15)
while (here / "wait").exists():
    time.sleep(0.02)
base = {"medloc": 0.5, "raw": 0.4, "sft": 0.3}[args.schedule] + 0.01 * args.seed
steps = [dict(step=i, u_mean=base + i / 100, zero_spread=0.25 * i, no_hit=None, tau=None, drawn=16 * i, groups=16,
              seconds=1.0, decision="raw, step 1") for i in range(1, args.steps + 1)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in steps))
(out / "config.json").write_text(json.dumps({"arguments": {"group_size": 8, "batch_size": 16}}))
scores = {"n": 20, "miou": base, "acc@0.5": base, "acc@0.8": base / 2, "pmap": base / 4, "parse_failures": 0}
start = scores | {"miou": 0.2, "pmap": 0.0}
(out / f"step-{args.steps:06d}").mkdir(exist_ok=True)
history = [scores | {"step": args.steps}]
(out / "eval.json").write_text(json.dumps({"start": start, "final": scores, "history": history}))
with open(here / "log", "a") as log:
    print("end", args.schedule, args.seed, args.resume, time.time(), file=log)
"""
GRID = """
about = "two rows"
seeds = [0, 1, 2]
compare = [["medloc", "raw"]]
[starts.coarse]
program = "FAKE"
schedule = "sft"
steps = 2
seed = 9
[flags]
program = "FAKE"
steps = 4
[sets]
xray = {data = "phantoms:xray"}
own = {data = "phantoms:xray", model = "@coarse"}
[rows.medloc]
schedule = "medloc"
[rows.raw]
schedule = "raw"
"""


def new(folder: Path) -> Path:
    (folder / "fake.py").write_text(FAKE)
    (folder / "two.toml").write_text(GRID.replace("FAKE", str(folder / "fake.py")))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return new(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """All of the grid has been run, three at a time; to look at."""
    made = new(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        call(patch, made / "two.toml", "--jobs", 3)
    return made


def change(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def call(monkeypatch, *words, expect: int = 0) -> None:
    """sweep.py's main in this process, with the signal's handler put back."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, words)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(InputError) if expect else nullcontext():
            sweep.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def events(folder: Path) -> list[tuple]:
    """(begin or end, schedule, seed, resumed, time), in order of time."""
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return sorted(((w, s, int(seed), r == "True", float(t)) for w, s, seed, r, t in lines), key=lambda e: e[-1])


# ---------------------------------------------------------------------------------------------------------- what is run


def test_a_grid_is_all_rows_on_all_sets_with_all_seeds_and_the_special_goes_before_the_general(tmp_path):
    """A grid takes from its base what it has not itself, and a row may name its sets."""
    (tmp_path / "g.toml").write_text("""
        seeds = [3, 4]
        flags = {steps = 100, lr = 1e-4}
        sets.a = {data = "phantoms:xray"}
        sets.b = {data = "b.jsonl", val = "v.jsonl", lr = 4e-5, sft = {steps = 7}}
        rows.medloc = {check_margin = false, stages = [0.5, 0.6]}
        rows.raw = {lr = 3e-5}
        rows.sft = {program = "train_sft.py", steps = 50}""")
    runs = Grid(tmp_path / "g.toml").runs
    assert list(runs) == [(one, row, seed) for one in "ab" for row in ("medloc", "raw", "sft") for seed in (3, 4)]
    words = {key: shlex.join(run.words()) for key, run in runs.items()}
    first = "train_grpo.py --steps 100 --lr 0.0001 --data phantoms:xray --no-check-margin --stages 0.5 0.6 --seed 3"
    assert words["a", "medloc", 3] == first
    assert words["b", "medloc", 4].startswith("train_grpo.py --steps 100 --lr 4e-05 --data b.jsonl --val v.jsonl ")
    assert "--lr 3e-05" in words["b", "raw", 3] and "4e-05" not in words["b", "raw", 3]
    assert words["a", "sft", 3] == "train_sft.py --data phantoms:xray --steps 50 --seed 3"  # no flag of GRPO's
    assert words["b", "sft", 4] == "train_sft.py --data b.jsonl --val v.jsonl --steps 7 --seed 4"
    (tmp_path / "g.toml").write_text("seeds = [3]\n[flags]\nsteps = 5\n[sets.a]\n[sets.b]\nlr = 1e-3\n[rows.raw]\n")
    (tmp_path / "h.toml").write_text('base = "g.toml"\nseeds = [4, 5]\n[rows.medloc]\n[rows.fixed]\nsets = ["b"]\n')
    runs = Grid(tmp_path / "h.toml").runs
    assert [run.name for run in runs.values() if run.flags["seed"] == 4] == [
        "a/medloc/seed-4", "b/medloc/seed-4", "b/fixed/seed-4"
    ]  # fmt: skip
    assert shlex.join(runs["b", "fixed", 5].words()) == "train_grpo.py --steps 5 --lr 0.001 --seed 5"


WRONG = [
    ("[flagz]\n", "g.toml: 'flagz' is none of base, about, seeds"),
    ('base = "none.toml"', "none.toml: .*No such file"),
    ("base = 3", "3: .*No such file"),
    ("[sets.a.q]\nlr = 1\n[rows.r]\n", "g.toml: sets.a.q is for a row that there is not"),
    ('[sets.a]\n[rows.r]\nsets = "a"\n', "g.toml: rows.r.sets must be a list, got 'a'"),
    ('[sets.a]\n[rows.r]\nsets = ["b"]\n', "g.toml: rows.r names the set 'b', which is none"),
    ("[sets.a]\n[rows.r]\n", "g.toml: a/r/seed-0 has no steps"),
    ("[sets.a]\n[rows]\nr = 3\n", "g.toml: rows.r must be a table of flags, got 3"),
    ("seeds = 3\n[sets.a]\n[rows.r]\n", "g.toml: seeds must be a list, got 3"),
    ("[sets.a]\n", r"g.toml: \[sets\] and \[rows\] must each name at least one"),
    ('[sets.a]\nmodel="@b"\n[rows.r]\n', r"model of a/r/seed-0 is @b, and no \[starts.b\] stands above it"),
    ('compare=[["r", "q"]]\n[sets.a]\nsteps=1\n[rows.r]\n', "compare names 'q', which is no row"),
    ("seeds = [1,\n", "g.toml: Invalid value"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_wrong_grid_is_refused_by_file_and_place(tmp_path, text, words):
    (tmp_path / "g.toml").write_text(text)
    with pytest.raises(InputError, match=words):
        Grid(tmp_path / "g.toml")


def test_a_variable_that_is_not_set_is_said_before_the_first_run(folder, monkeypatch):
    file = folder / "two.toml"
    change(file, 'own = {data = "phantoms:xray"', 'own = {data = "$NO_SUCH/x.jsonl"')
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(InputError, match=r"own/medloc/seed-0 wants \$NO_SUCH/x.jsonl: export NO_SUCH="):
        call(monkeypatch, file)
    assert not (folder / "log").exists()
    call(monkeypatch, file, "--only", "xray", "seed-1", "--jobs", 2)  # the others do not need it
    assert {e[1:3] for e in events(folder)} == {("medloc", 1), ("raw", 1)}
    monkeypatch.setenv("NO_SUCH", "/data")
    assert "/data/x.jsonl" in Grid(file).runs["own", "raw", 0].expanded(folder)
    assert "$NO_SUCH/x.jsonl" in Grid(file).runs["own", "raw", 0].words()  # what results.jsonl tells has no folder


@pytest.mark.parametrize("name", [file.name for file in sorted(EXPERIMENTS.glob("*.toml"))])
def test_the_grids_of_the_repository_ask_only_for_flags_that_exist(name, monkeypatch, tmp_path):
    for folder in ("ISIC", "BCCD", "FRACATLAS"):
        monkeypatch.setenv(folder, str(tmp_path))
    grid = Grid(EXPERIMENTS / name)
    asked = {}  # one of each row's seeds is enough
    for run in grid.runs.values():
        asked.setdefault((run.name.rpartition("/")[0], run.program), run)
    for run in asked.values():
        if run.program == "train_grpo.py":  # variants that were deleted stay in the grids, for their recorded results
            args = config.parse(run.program, run.expanded(tmp_path)[1:])  # what would change nothing ends it too
            assert (args.steps, args.schedule) == (run.flags["steps"], [run.flags.get("schedule", "medloc")])


def test_recorded_recipes_mean_todays_runs():
    old = "train_grpo.py --samples-every 0 --schedule medloc --refresh full --no-check-margin --window 60 --beta 0.4"
    new = "train_grpo.py --beta 0.4 --schedule medloc:window=60,check_margin=off,refresh=full"
    assert canonical(old) == canonical(new) != canonical(new.replace("60", "61"))
    assert canonical(f"train_sft.py --steps 3; {old}") == canonical(f"train_sft.py --steps 3; {new}")
    rates = "a.py --schedule medloc --min-hit-rate 0.5 0.5 0.5"
    assert canonical(rates) == canonical("a.py --schedule medloc:stages=0:0.5:0.2/0.6:0.5:0.35/0.75:0.5:0.4")
    assert canonical("a.py --schedule progress-aggressive") == canonical("a.py --schedule progress:end=0.8")


# -------------------------------------------------------------------------------------------------------------- running


def test_every_run_is_run_once_and_starts_come_first(finished, monkeypatch):
    found = events(finished)
    cells = [(row, seed) for row in ("medloc", "raw") for seed in (0, 1, 2)]
    assert sorted(e[1:3] for e in found if e[0] == "begin") == sorted([("sft", 9), *cells, *cells])
    assert not any(e[3] for e in found)
    made = next(e[-1] for e in found if e[:2] == ("end", "sft"))
    for cell in cells:  # its second run is own's
        assert [e[-1] for e in found if (e[0], *e[1:3]) == ("begin", *cell)][1] > made
    assert max(accumulate(1 if word == "begin" else -1 for word, *_ in found)) <= 3
    assert len(lines(finished / "two" / "results.jsonl")) == 12
    call(monkeypatch, finished / "two.toml", "--jobs", 3)
    assert len(events(finished)) == len(found)  # nothing was run again


def test_a_start_is_waited_for_by_its_own_runs_alone_and_has_its_whole_name(folder, monkeypatch):
    """While a start is made, a free place is taken by a run that needs none. Names that differ behind a dot are two."""
    file = folder / "two.toml"
    call(monkeypatch, file, "--jobs", 2, "--only", "seed-0")
    found = events(folder)
    ended = next(i for i, e in enumerate(found) if e[:2] == ("end", "sft"))
    assert sum(e[0] == "begin" for e in found[:ended]) >= 2
    # Own's two runs are the last that begin: xray's stand before them.
    assert [row["set"] for row in lines(folder / "two" / "results.jsonl")] == ["xray", "xray", "own", "own"]
    text = file.read_text().replace("[starts.coarse]", "[starts.'scale-0.3']").replace("@coarse", "@scale-0.3")
    second = text[text.index("[starts") : text.index("[flags]")].replace("0.3", "0.7")
    file.write_text(text.replace("[flags]", second + "[flags]").replace('xray"}', 'xray", model = "@scale-0.7"}'))
    call(monkeypatch, file, "--jobs", 2, "--only", "medloc", "seed-0", "--out", folder / "dots")
    assert [e[1] for e in events(folder)[len(found) :] if e[0] == "begin"] == ["sft", "sft", "medloc", "medloc"]
    assert {file.name for file in (folder / "dots/runs/starts").glob("*.log")} == {"scale-0.3.log", "scale-0.7.log"}


def test_results_alone_say_what_is_done_and_changed_flags_are_run_anew(folder, monkeypatch, capsys):
    file, results = folder / "two.toml", folder / "two" / "results.jsonl"
    call(monkeypatch, file, "--only", "xray", "medloc")
    count, before = len(events(folder)), lines(results)
    shutil.rmtree(folder / "two" / "runs")  # as in a clone
    call(monkeypatch, file, "--only", "xray", "medloc")
    call(monkeypatch, file, "--jobs", 0)
    assert lines(results) == before and len(events(folder)) == count
    change(file, 'schedule = "medloc"', 'schedule = "medloc"\nslow = true')
    call(monkeypatch, file, "--only", "xray", "medloc")
    assert len(events(folder)) == 2 * count and "3 lines are of runs that two.toml no longer" in capsys.readouterr().err
    assert all("--slow" in row["recipe"] for row in lines(results))
    call(monkeypatch, file, "--only", "xray", "raw", "seed-0")
    before = lines(results)  # lines of a row that the grid no longer asks for stay
    file.write_text(file.read_text().partition("[rows.raw]")[0].replace('compare = [["medloc", "raw"]]', ""))
    call(monkeypatch, file, "--jobs", 0)
    assert lines(results) == before and "| raw |" not in (folder / "two" / "table.md").read_text()


def test_another_start_is_another_run(folder, monkeypatch):
    words = folder / "two.toml", "--only", "own", "medloc", "seed-0"
    call(monkeypatch, *words)
    (row,) = lines(folder / "two" / "results.jsonl")
    first, second = (shlex.split(part) for part in row["recipe"].split(";"))  # as a shell would run it
    assert first[1:] == "--schedule sft --steps 2 --seed 9".split()
    assert second[-4:] == "--schedule medloc --seed 0".split()
    change(folder / "two.toml", "steps = 2\n", "steps = 3\n")
    call(monkeypatch, *words)
    begun = [e[1] for e in events(folder) if e[0] == "begin"]
    assert begun == ["sft", "medloc"] * 2 and (folder / "two/runs/starts/coarse/step-000003").is_dir()


def test_another_grid_reuses_results_of_the_same_flags(folder, monkeypatch):
    call(monkeypatch, folder / "two.toml", "--only", "xray")
    count = len(events(folder))
    text = (folder / "two.toml").read_text().replace("[0, 1, 2]", "[0, 1, 2, 3]")
    (folder / "more.toml").write_text('reuse = ["two/results.jsonl"]\n' + text)
    call(monkeypatch, folder / "more.toml", "--only", "xray")
    assert [e[2] for e in events(folder)[count:] if e[0] == "begin"] == [3, 3]
    assert [row["seed"] for row in lines(folder / "more" / "results.jsonl")] == [3, 3]  # the others stay where they are
    assert "8 of 16 runs" in (folder / "more" / "table.md").read_text()
    (folder / "two" / "results.jsonl").unlink()  # of what is left, the cells say how much it is
    call(monkeypatch, folder / "more.toml", "--jobs", 0)
    assert " (1 of 4) | - |" in (folder / "more" / "table.md").read_text()
    call(monkeypatch, folder / "more.toml", "--only", "xray", "seed-0", "--out", folder / "mine")  # all of it again
    assert [row["seed"] for row in lines(folder / "mine" / "results.jsonl")] == [0, 0]


def test_a_failed_run_is_named_and_the_others_go_on(folder, monkeypatch, capsys):
    file = folder / "two.toml"
    change(file, 'schedule = "medloc"', 'schedule = "broken"')
    call(monkeypatch, file, "--only", "xray", "--jobs", 2, expect=2)
    assert "xray/medloc/seed-0 ended with code 1" in capsys.readouterr().out
    assert "it broke" in (folder / "two" / "runs" / "xray" / "medloc" / "seed-0.log").read_text()
    assert [row["row"] for row in lines(folder / "two" / "results.jsonl")] == ["raw"] * 3
    change(file, 'schedule = "sft"', 'schedule = "broken"')
    call(monkeypatch, file, "--only", "own", "raw", expect=2)  # its start fails: nothing hangs
    assert not any(row["set"] == "own" for row in lines(folder / "two" / "results.jsonl"))


@pytest.mark.parametrize("kind", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_stopped_sweep_leaves_no_process_and_the_next_one_resumes(folder, monkeypatch, kind):
    command = [sys.executable, EXPERIMENTS / "sweep.py", folder / "two.toml", "--jobs", "2", "--only", "xray", "seed-2"]
    (folder / "wait").touch()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = [folder / "two/runs/xray" / row / "seed-2/step-000001" for row in ("medloc", "raw")]
    until = time.time() + 60
    while not all(path.exists() for path in checkpoints) and time.time() < until:
        time.sleep(0.05)
    process.send_signal(getattr(signal, kind))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in said, said
    assert [e[0] for e in events(folder)] == ["begin"] * 2  # and both have been told to end, and have
    (folder / "wait").unlink()
    time.sleep(0.1)
    assert len(events(folder)) == 2
    call(monkeypatch, *command[2:])
    assert sorted(e[1:4] for e in events(folder)[2:] if e[0] == "begin") == [("medloc", 2, True), ("raw", 2, True)]
    assert len(lines(folder / "two" / "results.jsonl")) == 2


def test_two_sweeps_do_not_write_into_one_run(folder):
    grid = Grid(folder / "two.toml")
    run, runner = grid.runs["xray", "raw", 0], Runner(folder / "two")
    (folder / "wait").touch()
    process = runner.begin(run)
    try:
        with pytest.raises(InputError, match="seed-0.log is being written"):
            Runner(folder / "two").begin(run)
    finally:
        (folder / "wait").unlink()
        process.wait()
    assert runner.ended(run)


# -------------------------------------------------------------------------------------------------------------- results


def test_a_line_holds_what_the_run_wrote(finished):
    row = next(r for r in lines(finished / "two/results.jsonl") if (r["set"], r["row"], r["seed"]) == ("own", "raw", 1))
    scores = [row[name] for name in ("n", "miou", "acc@0.5", "acc@0.8", "pmap")]
    assert scores == pytest.approx([20, 0.41, 0.41, 0.205, 0.1025])
    assert (row["start_miou"], row["start_pmap"], row["tau"]) == (0.2, 0.0, None)
    assert row["zero_spread"] == pytest.approx(0.625)  # of .25 .5 .75 1.
    assert "no_hit" not in row  # raw has no tau
    assert row["stability"] == pytest.approx(0.01 / math.sqrt(2))  # of the last two of four, ddof 1
    assert (row["images"], row["rollouts"], row["seconds"]) == (64, 4 * 16 * 8, 4.0)
    assert row["step_iou_mean"] == pytest.approx([0.42, 0.43, 0.44, 0.45])
    assert str(finished) not in json.dumps(row).replace(str(finished / "fake.py"), "")


def test_the_table_has_means_and_deviations_over_the_seeds(finished):
    found, text = lines(finished / "two" / "results.jsonl"), (finished / "two" / "table.md").read_text()
    part = text[text.index("## own") : text.index("## pmAP")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
    rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells}
    for name in ("medloc", "raw"):
        values = [row["miou"] for row in found if (row["set"], row["row"]) == ("own", name)]
        assert rows[name]["mIoU"] == f"{fmean(values):.3f} +- {stdev(values):.3f}"
        assert rows[name]["seeds"] == "3" and rows[name]["last tau"] == "-"
    assert "Start: mIoU 0.200, pmAP 0.000; 20 pictures" in part
    of_set, of_all = (f"+0.025 [+0.025, +0.025]; {n} of {n}" for n in (3, 6))  # by .1/4, with every seed
    assert text.endswith(f"| medloc - raw | {of_set} | {of_set} | {of_all} |\n")


def test_intervals_are_students_over_paired_seeds():
    """(2.920 and 4.303 are t of 90 and 95 % for 2 degrees of freedom; the textbook's sleep data have 9.)"""
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]  # Student (1908): mean 1.58, interval .70 to 2.46
    assert tables.interval(extra) == "+1.580 [+0.700, +2.460]"
    low = re.search(r"\[\+([\d.]+)", tables.interval([0.0, 2.0] * 8))[1]  # t is 2.131 for 15: 1 - 2.131 x 1.033 / 4
    assert float(low) == pytest.approx(0.450, abs=0.005)
    results = [dict(set="s", row=row, seed=seed, pmap=p) for row, seed, p in
               [("a", 0, 0.5), ("b", 0, 0.25), ("a", 1, 0.5), ("a", 2, 0.125), ("b", 2, 0.25)]]  # fmt: skip
    assert tables.paired(results, "a", "b", "s") == [0.25, -0.125]  # seed 1 has no pair


def test_rows_of_a_set_must_begin_from_one_policy():
    rows = [dict(set="s", row="a", n=20, start_miou=0.2), dict(set="s", row="b", n=20, start_miou=0.3)]
    with pytest.raises(InputError, match="set 's': b began with mIoU 0.3 on 20 pictures, but a with 0.2 on 20"):
        tables.check_footing(rows)
    elsewhere = {"row": "b", "start_miou": 0.20002}  # another machine's rounding
    tables.check_footing([rows[0], rows[0] | elsewhere, rows[1] | {"set": "t"}])


def test_a_sweep_refuses_rows_of_different_starts_and_a_run_without_its_end(folder, monkeypatch):
    words = folder / "two.toml", "--only", "xray", "seed-0"
    change(folder / "two.toml", "steps = 4", "steps = 2")
    call(monkeypatch, *words)
    assert {r["stability"] for r in lines(folder / "two/results.jsonl")} == {0.0}  # of two steps there is none
    file = folder / "two/runs/xray/raw/seed-0/eval.json"
    report = json.loads(file.read_text())
    (folder / "two" / "results.jsonl").unlink()
    file.write_text(json.dumps(report | {"start": report["start"] | {"miou": 0.5}}))
    with pytest.raises(InputError, match="rows of a set must share start"):
        call(monkeypatch, *words, "--jobs", 0)
    file.write_text(json.dumps(report | {"final": None}))  # as until the end
    assert not Runner(folder / "two").ended(Grid(folder / "two.toml").runs["xray", "raw", 0])


def test_of_a_schedule_with_tau_the_share_without_a_hit_is_told(finished, tmp_path):
    key, out = ("xray", "raw", 0), shutil.copytree(finished / "two/runs/xray/raw/seed-0", tmp_path / "run")
    steps = zip(lines(out / "metrics.jsonl"), (1, 1, 0.5, 0), strict=True)
    stays, moved = "tau .500 stays: hit rate .1 < .8 (short by .7), sigma .3 > .2 (over by .1)", "tau .500 -> .600: ..."
    decisions = iter(["tau .500 stays: window 16/30 groups", stays, "tau .500 stays: margin .05 < .1", moved])
    rows = [row | {"tau": 0.5, "no_hit": share, "decision": next(decisions)} for row, share in steps]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sweep.result(key, Grid(finished / "two.toml").runs[key], out)
    assert (found["no_hit"], found["step_no_hit"], found["tau"]) == (0.625, [1, 1, 0.5, 0], 0.5)
    assert found["step_held"] == ["window", "hit rate, sigma", "margin", ""]


@drawn
def test_figures_show_every_row_and_stay_small(finished):
    from experiments import figures

    for file in (finished / "two" / "curves.png", finished / "two" / "final.png"):
        assert 0 < file.stat().st_size < 300_000 and min(Image.open(file).size) > 100
    grid, results = Grid(finished / "two.toml"), lines(finished / "two" / "results.jsonl")
    axes = figures.final(results, grid.sets, grid.rows).axes
    dots = {(ax.get_title(loc="left"), tuple(line.get_xdata())) for ax in axes for line in ax.lines[::2]}
    for one in grid.sets:
        for row in grid.rows:
            assert (one, tuple(r["pmap"] for r in results if (r["set"], r["row"]) == (one, row))) in dots
    for result in results:
        result["step_tau"] = [0.3, 0.3, 0.45 if result["seed"] == 0 else 0.6, 0.45]
    axes = figures.curves(results, grid.sets, grid.rows).axes
    assert list(axes[2].lines[0].get_ydata()) == [0.3, 0.3, 0.45, 0.45]
    want = [fmean(r["step_iou_mean"][0] for r in results if (r["set"], r["row"]) == ("xray", row)) for row in grid.rows]
    assert [line.get_ydata()[0] for line in axes[0].lines] == pytest.approx(want)
    for result in results:
        result["step_no_hit"] = [{"xray": 0.25, "own": 1.0}[result["set"]]] * 4
    fixed = [r | {"row": "fixed"} for r in results if r["row"] == "raw"]
    (ax,) = figures.sparsity(results + fixed, grid.sets, ["medloc", "fixed"]).axes
    (line,) = [line for line in ax.lines if line.get_label() == "medloc"]
    assert list(line.get_xdata()) == [0.25, 1.0]


# ----------------------------------------------------------------------------------------------- what the results claim


def recorded(row: str, one: str, *grids: str) -> list[dict]:
    rows = [r for grid in grids or ["main"] for r in lines(EXPERIMENTS / grid / "results.jsonl")]
    found = [r for r in rows if (r["set"], r["row"]) == (one, row)]
    assert len(found) >= 3
    return found


def rerun(tmp_path: Path, result: dict, *more: str) -> None:
    words = Grid(EXPERIMENTS / "main.toml").runs[result["set"], result["row"], result["seed"]].words()
    command = [sys.executable, *words, "--out", str(tmp_path / "out"), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as the cell was recorded
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.mark.slow
def test_the_first_steps_of_a_cell_are_those_that_were_recorded(tmp_path):
    """To the last recorded digit where rounding agrees; elsewhere within the spread of the recorded seeds."""
    cells = recorded("medloc", "xray")
    rerun(tmp_path, cells[0], "--steps", "8", "--eval-every", "0", "--eval-limit", "4")
    ious = [row["u_mean"] for row in lines(tmp_path / "out" / "metrics.jsonl")]
    assert ious[0] == pytest.approx(cells[0]["step_iou_mean"][0], abs=0.005)  # no update yet: the same answers
    spread = stdev(fmean(cell["step_iou_mean"][:8]) for cell in cells)
    assert abs(fmean(ious) - fmean(cells[0]["step_iou_mean"][:8])) < max(2 * spread, 0.01)
    assert ious[-1] > ious[0]


@pytest.mark.slow
def test_a_cell_ends_where_it_was_recorded(tmp_path):
    cells = recorded("medloc", "xray")
    rerun(tmp_path, cells[0])
    final = json.loads((tmp_path / "out" / "eval.json").read_text())["final"]
    values = [cell["pmap"] for cell in cells]
    assert abs(final["pmap"] - cells[0]["pmap"]) < 3 * stdev(values)


@pytest.mark.parametrize("name", [file.stem for file in sorted(EXPERIMENTS.glob("*.toml"))])
def test_committed_tables_are_those_of_the_committed_results(name):
    file = EXPERIMENTS / f"{name}.toml"
    if not (file.with_suffix("") / "results.jsonl").exists():
        pytest.skip(f"{name} has no results yet")
    grid, folder = Grid(file), file.with_suffix("")
    own = sweep.asked_for(grid, sweep.read_lines(folder / "results.jsonl"))
    assert len(own) == len(lines(folder / "results.jsonl"))
    found = sweep.reused(grid) | own
    results = [found[key] for key in grid.runs if key in found]
    tables.check_footing(results)
    assert (folder / "table.md").read_text() == tables.table(grid, results)


def test_the_results_quote_the_tables_word_for_word():
    quoted = re.compile(r"\| .*(0\.\d{3} \+- 0\.\d{3}|\[[+-]\d\.\d{3}, ).*")  # as only the tables write it
    known = {line for file in EXPERIMENTS.glob("*/table.md") for line in file.read_text().splitlines()}
    rows = [line for line in (ROOT / "RESULTS.md").read_text().splitlines() if quoted.fullmatch(line)]
    assert rows and set(rows) <= known, sorted(set(rows) - known)[:2]


def section(title: str) -> dict[str, list[str]]:
    """RESULTS.md's first table under a title: first cell -> the others."""
    text = (ROOT / "RESULTS.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_results_beside_the_papers_are_the_recorded_ones():
    names = {"MedLoc-R1": "medloc", "raw IoU": "raw", "fixed .5 (VLM-R1)": "fixed", "V-Triune": "vtriune"}
    found = section("Beside the paper")
    for name, row in (names | {"SFT": "sft-images"}).items():
        for one, cell in zip(("dermoscopy", "isic2017"), found[name][1:], strict=True):
            runs = recorded(row, one)
            assert cell == " / ".join(f"{100 * fmean(run[f] for run in runs):.1f}" for f in ("acc@0.5", "acc@0.8"))
    found = section("The rule's parts")
    rows = "medloc", "no-reward-check", "no-margin-check", "no-stability-check", "reward-check-only"
    for row in (*rows, *(f"progress-{end}" for end in ("conservative", "moderate", "aggressive"))):
        runs = recorded(row, "dermoscopy", "main", "ablation")
        means = [fmean(run[field] for run in runs) for field in ("acc@0.5", "acc@0.8", "pmap", "tau")]
        assert found[row][1:] == [*(f"{100 * mean:.1f}" for mean in means[:3]), f"{means[3]:.2f}"]


def test_a_grid_may_say_what_it_measures(tmp_path):
    """Metrics of single datasets, means of fields of metrics.jsonl; a line, a table and the comparisons of each."""
    (tmp_path / "own.toml").write_text("""
about = "two datasets"
seeds = [0, 1]
measures = ["far/miou", "accuracy"]
watch = ["share/far"]
compare = [["b", "a"]]
[flags]
steps = 2
[sets.both]
data = ["x=1", "y=2"]
[rows.a]
schedule = "raw"
[rows.b]
schedule = "fixed"
""")
    grid, out = Grid(tmp_path / "own.toml"), tmp_path / "run"
    assert grid.runs["both", "a", 0].words()[-4:] == ["--schedule", "raw", "--seed", "0"]
    assert "--data x=1 y=2" in grid.runs["both", "a", 0].recipe()
    results = []
    for (one, row, seed), run in grid.runs.items():
        value = {"a": 0.5, "b": 0.625}[row] + 0.125 * seed
        final = {"n": 9, "parse_failures": 0, "accuracy": value / 2, "datasets": {"far": {"miou": value}}}
        start = final | {"accuracy": 0.25, "datasets": {"far": {"miou": 0.125}}}
        out.mkdir(exist_ok=True)
        (out / "eval.json").write_text(json.dumps({"start": start, "final": final}))
        (out / "config.json").write_text(json.dumps({"arguments": {}}))
        steps = [
            {"u_mean": 0.5, "share/far": 0.25, "seconds": 1.0},
            {"u_mean": 0.75, "share/far": None, "seconds": 1.0},
        ]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
        results.append(sweep.result((one, row, seed), run, out, grid.measures, grid.watch))
    first = results[0]
    assert first["measures"] == {"far/miou": 0.5, "accuracy": 0.25} and first["watch"] == {"share/far": 0.25}
    assert first["start"] == {"far/miou": 0.125, "accuracy": 0.25} and first["step_u_mean"] == [0.5, 0.75]
    tables.check_footing(results)
    text = tables.table(grid, results)
    assert "| a | 2 | 0.562 +- 0.088 (0.125) | 0.281 +- 0.044 (0.250) | 0.250 +- 0.000 |" in text
    assert "| b - a | +0.125 [+0.125, +0.125]; 2 of 2 | +0.062 [+0.062, +0.062]; 2 of 2 |" in text
    with pytest.raises(InputError, match="rows of a set must share start and evaluation"):
        tables.check_footing([first, first | {"n": 8}])
