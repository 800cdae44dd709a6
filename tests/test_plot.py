"""experiments/plot.py: what it draws, read back from the axes and held against the file; its words on bad input."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from PIL import Image

import errors
from errors import InputError
from experiments import plot
from scheduler import Decision, MedLoc, Schedule

SCRIPT = Path(plot.__file__)
drawn = pytest.mark.skipif(find_spec("matplotlib") is None, reason='needs matplotlib: pip install -e ".[plot]"')

KEYS = (  # every key that a panel draws as it stands
    "tau hit_rate sigma margin u_mean u_q50 reward_mean reward_iou reward_format group_std zero_spread parse_failures "
    "truncated advantage_share clip_low clip_high entropy kl loss grad_norm seconds_rollout seconds_update"
).split()
RAISED = "hit rate .821 >= .800", "sigma .185 <= .200", "margin .173 >= .100"
REASONS = {  # step -> tau, the next tau, reasons; what no step here says is that the window waits
    1: (0.3, 0.3, ("window 16/30 groups",)),
    2: (0.3, 0.3, ("hit rate .500 < .800 (short by .300)", "margin .050 < .100 (short by .050)")),
    3: (0.3, 0.45, RAISED),
    4: (0.45, 0.45, ("sigma .229 > .200 (over by .029)",)),
    5: (0.45, 0.6, ("hit rate .841 >= .800", "sigma .150 <= .200", "margin .150 >= .100")),
    6: (0.6, 0.6, ("margin .090 < .100 (short by .010)",)),
}


def rows() -> list[dict]:
    """Six steps; no two numbers of a row are the same, so that a line of a wrong key is seen."""
    made = []
    for step, (tau, tau_next, reasons) in REASONS.items():
        row = {key: (step * 31 + i * 7) % 97 / 97 for i, key in enumerate(KEYS)}
        row |= {"step": step, "tau": tau, "u_q25": row["u_mean"] - 0.1, "u_q75": row["u_mean"] + 0.2}
        row["margin"] -= 0.5  # the only one that is often negative
        row |= {"tokens": 1000 + step, "seconds": 0.5 * step}
        row["decision"] = str(Decision(tau, tau_next, reasons, row["hit_rate"], row["sigma"], row["margin"]))
        made.append(row)
    return made


def write(folder: Path, content: list[dict] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def figure(*folders: Path, smooth: int = 1):
    names = plot.run_names(list(folders))
    return plot.figure([plot.read_run(folder, name) for folder, name in zip(folders, names, strict=True)], smooth)


def axes(fig, title: str):
    return next(ax for ax in fig.axes if ax.get_title(loc="left").startswith(title))


def lines(fig) -> dict[str, list[tuple[float, float]]]:
    """label -> points of all lines; tau, which stands in two panels, must be the same in both."""
    found: dict = {}
    for ax in fig.axes:
        for line in ax.lines:
            points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert line.get_label() == "_" or found.setdefault(line.get_label(), points) == points
    return found


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def steps_held(fig, run: str) -> dict[str, list[float]]:
    """reason -> the steps under its bars."""
    bars = {c.get_label(): [p.get_extents() for p in c.get_paths()] for c in axes(fig, "Why tau stayed").collections}
    for box in sum(bars.values(), []):
        assert box.width == pytest.approx(1)
    return {
        label.removeprefix(f"{run}: "): [(box.x0 + box.x1) / 2 for box in boxes]
        for label, boxes in bars.items()
        if label.startswith(f"{run}: ")
    }


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    try:
        errors.run(plot.main)
    except SystemExit as end:
        return end.code
    return 0


# --- one run


@drawn
def test_the_numbers_drawn_are_those_of_the_file(tmp_path):
    made = rows()
    fig = figure(write(tmp_path / "run", made))
    found = lines(fig)
    for key in KEYS:
        assert found[f"run: {key}"] == [(row["step"], row[key]) for row in made], key
    assert found["run: tokens_per_second"] == [(row["step"], row["tokens"] / row["seconds"]) for row in made]
    (band,) = axes(fig, "u of").collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert corners >= {(row["step"], row[key]) for row in made for key in ("u_q25", "u_q75")}
    assert not any("no data" in texts(ax) for ax in fig.axes)
    for ax in fig.axes:  # all of it is in sight, and one step stands at one place in all panels
        assert ax.get_xlim() == fig.axes[0].get_xlim() == (0.5, 6.5)
        low, high = ax.get_ylim()
        drawn_here = [y for line in ax.lines if line.get_label() != "_" for y in line.get_ydata()]
        assert all(low <= y <= high for y in drawn_here), ax.get_title(loc="left")


@drawn
def test_raises_and_what_held_tau_stand_where_they_fell_with_their_reasons(tmp_path):
    fig = figure(write(tmp_path / "run", rows()))
    found, tau = lines(fig), axes(fig, "tau")
    assert found["run: raises"] == [(3, 0.45), (5, 0.6)]
    said = [["step 3: 0.300 -> 0.450", *RAISED], ["step 5: 0.450 -> 0.600", *REASONS[5][2]]]
    assert [words.splitlines() for words in texts(tau)] == said
    for ax in fig.axes[2:]:
        assert [list(line.get_xdata()) for line in ax.lines if line.get_label() == "_"] == [[3, 3], [5, 5]]
    # the line jumps at the raise's step, not one later: "pre" gives 3..4 the value of step 4
    assert next(line for line in tau.lines if line.get_label() == "run: tau").get_drawstyle() == "steps-pre"
    assert steps_held(fig, "run") == {"window": [1], "hit rate": [2], "sigma": [4], "margin": [2, 6]}
    # stage by tau: named at steps 2 and 3, so known for all steps of tau .3; nothing names a hit rate at tau .6
    assert found["run: hit_rate, bound"] == [(step, 0.8) for step in range(1, 6)]
    assert found["run: margin, bound"] == [(step, 0.1) for step in range(1, 7)]


@drawn
def test_the_words_of_the_real_schedule_are_understood(tmp_path):
    schedule = Schedule("medloc", MedLoc(window=2, tau_target=0.6), 6)
    made = []
    for step, iou in enumerate((1.0, 0.2, 1.0, 1.0, 1.0, 1.0), 1):
        tau, decision = schedule.tau, schedule.observe([[iou] * 4])
        made.append({"step": step, "tau": tau, "decision": str(decision)})
    fig = figure(write(tmp_path / "run", made))
    assert steps_held(fig, "run").items() >= {"window": [1], "hit rate": [2, 3], "sigma": [2, 3], "target": [6]}.items()
    assert lines(fig)["run: raises"] == [(4, 0.45), (5, 0.6)]


def test_recorded_names_are_todays_and_each_schedule_has_its_own_curves(tmp_path):
    old = plot.read_run(
        write(tmp_path / "old", [{"step": 1, "iou_mean": 0.5, "iou_q50": 0.4, "reward_box": 0.1}]), "old"
    )
    assert old.rows == [{"step": 1, "u_mean": 0.5, "u_q50": 0.4, "reward_task": 0.1}]
    row = {"step": 1, "tau/ham/box": 0.3, "tau/isic/box": 0.45, "margin/ham/box": 0.1, "loss": 0.2}
    runs = plot.by_key(plot.read_run(write(tmp_path / "two", [row]), "two"))
    assert [run.name for run in runs] == ["two ham/box", "two isic/box"]
    assert [(run.rows[0]["tau"], run.rows[0]["loss"]) for run in runs] == [(0.3, 0.2), (0.45, 0.2)]
    assert runs[0].rows[0]["margin"] == 0.1 and "margin" not in runs[1].rows[0]
    row |= {"reward_mean": 0.6, "reward_mean/ham/box": 0.7, "reward_mean/isic/box": 0.5}
    runs = plot.by_key(plot.read_run(write(tmp_path / "mixed", [row]), "mixed"))
    assert [run.rows[0]["reward_mean"] for run in runs] == [0.7, 0.5]
    assert all("/" not in key for panel in plot.small_panels(runs) for key in panel.lines)  # each has its own alone


@drawn
def test_reasons_of_raises_in_a_row_do_not_overlap_and_raises_without_room_for_them_are_marked(tmp_path):
    made = [
        {"step": s, "tau": s / 20, "decision": str(Decision(s / 20, s / 20 + 0.05, RAISED, 1, 0, 1))}
        for s in range(1, 13)
    ]
    late = [{"step": s, "tau": 0.45} for s in range(9, 200)]
    for placed in (made[:8] + late, [{"step": 0}] + [row | {"step": row["step"] + 1} for row in made[:8]]):
        fig = figure(write(tmp_path / "run", placed))
        boxes = [text.get_window_extent() for text in axes(fig, "tau").texts]
        assert len(boxes) == 8 and boxes[0].x0 >= 0 and boxes[-1].x1 <= fig.bbox.x1
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
        title = 20  # pixels
        assert all(box.y0 > axes(fig, "Why").get_window_extent().y1 + title for box in boxes)
    fig = figure(write(tmp_path / "run", made))
    assert [x for x, _ in lines(fig)["run: raises"]] == list(range(1, 13))
    assert texts(axes(fig, "tau")) == [] and "12 raises" in axes(fig, "tau").get_title(loc="left")


@drawn
def test_null_nan_and_missing_points_are_left_out_and_empty_panels_say_so(tmp_path):
    made = rows()
    made[1]["loss"], made[2]["loss"] = None, math.nan  # older versions wrote NaN
    del made[3]["entropy"]
    for row in made:  # --schedule raw
        row |= {"tau": None, "hit_rate": None, "sigma": None, "margin": None, "decision": f"raw, step {row['step']}"}
        del row["kl"], row["seconds"], row["u_q50"]
    fig = figure(write(tmp_path / "run", made))
    found = lines(fig)
    assert [x for x, _ in found["run: loss"]] == [1, 4, 5, 6]
    assert [x for x, _ in found["run: entropy"]] == [1, 2, 3, 5, 6]
    empty = [ax.get_title(loc="left").split(",")[0] for ax in fig.axes if "no data" in texts(ax)]
    assert [title.split(":")[0].split(" (")[0] for title in empty] == [
        "tau", "Why tau stayed", "Over the window", "Over the window", "KL to the starting policy", "Speed"
    ]  # fmt: skip


@drawn
def test_smoothing_is_drawn_over_the_raw_line_but_not_over_what_decides(tmp_path):
    made = rows()
    found = lines(figure(write(tmp_path / "run", made), smooth=3))
    assert found["run: loss"] == [(row["step"], row["loss"]) for row in made]
    losses = [row["loss"] for row in made]
    means = [losses[0], sum(losses[:2]) / 2] + [sum(losses[i - 2 : i + 1]) / 3 for i in range(2, 6)]
    assert [y for _, y in found["run: loss, smooth"]] == pytest.approx(means)
    smoothed = {label.split(": ")[1].removesuffix(", smooth") for label in found if label.endswith(", smooth")}
    assert smoothed == {*KEYS, "tokens_per_second"} - {"tau", "hit_rate", "sigma", "margin"}
    assert not any(label.endswith("smooth") for label in lines(figure(tmp_path / "run")))


# --- several runs


@drawn
def test_several_runs_have_a_colour_each_and_one_legend(tmp_path):
    late = [row | {"step": row["step"] + 2, "loss": row["loss"] + 1} for row in rows()]
    fig = figure(write(tmp_path / "_first$2$", rows()), write(tmp_path / "second", late))
    found = lines(fig)
    assert found["_first$2$: raises"] == [(3, 0.45), (5, 0.6)] and found["second: raises"] == [(5, 0.45), (7, 0.6)]
    assert found["second: loss"] == [(row["step"], row["loss"]) for row in late]
    assert steps_held(fig, "second") == {"window": [3], "hit rate": [4], "sigma": [6], "margin": [4, 8]}
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_first$2$", "second"]
    colours = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colours)) == 2
    named = {"_first$2$": colours[0], "second": colours[1]}
    everything = [line for ax in fig.axes for line in ax.lines if ": " in line.get_label()]
    assert len(everything) > 2 * len(KEYS)
    for line in everything:
        assert line.get_color() == named[line.get_label().split(": ")[0]]
    clipped = axes(fig, "Share of tokens").lines
    assert len({line.get_linestyle() for line in clipped}) == 2  # two lines of each run: told apart by style
    assert texts(axes(fig, "tau")) == []  # the reasons of two runs would be in each other's way


def test_names_are_made_unique_by_more_of_the_path(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in ("a/run", "b/run", "other"))
    assert plot.run_names([a, b, c]) == ["a/run", "b/run", "other"]
    assert plot.run_names([a / "metrics.jsonl", c]) == ["run", "other"]
    c.mkdir()
    monkeypatch.chdir(c)
    assert plot.run_names([Path(), Path("../a/run")]) == ["other", "run"]
    with pytest.raises(InputError, match="named twice"):
        plot.run_names([a, a / "metrics.jsonl"])


# --- the command


@drawn
def test_it_runs_from_anywhere_and_leaves_a_cut_off_line_out(tmp_path):
    made = rows()
    text = "".join(json.dumps(row) + "\n" for row in made)
    run = write(tmp_path / "run", text[: -len(json.dumps(made[-1])) // 2])
    done = subprocess.run([sys.executable, SCRIPT, "run"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run/metrics.jsonl:6: cut off, left out\nrun/curves.png\n"
    assert [row["step"] for row in plot.read_run(run, "run").rows] == [1, 2, 3, 4, 5]
    assert len(plot.read_run(write(tmp_path / "whole", text[:-1]), "whole").rows) == 6  # it lacks only its end
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width == 1400
        colours = [colour for _, colour in picture.convert("RGB").getcolors(1000)]
    white = (255, 255, 255)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), white} <= set(colours)  # not lost


@drawn
def test_a_picture_of_nothing_but_noise_is_below_300_kb(tmp_path, monkeypatch, capsys):
    random = Random(0).random
    runs = []
    for i in range(3):
        noise = [{"step": step} | {key: random() for key in KEYS} for step in range(1, 401)]
        runs.append(write(tmp_path / f"noise{i}", noise))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *runs, "--smooth", "20") == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert 50_000 < (tmp_path / "curves.png").stat().st_size < 300_000


BAD = [
    (None, "metrics.jsonl does not exist: name a folder"),
    ("", "metrics.jsonl has no whole line"),
    ('{"step": 1, "lo', "metrics.jsonl has no whole line"),
    ('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', "metrics.jsonl:2 is not JSON"),
    ('{"step": 1}\n{"step": 2, "lo\n', "metrics.jsonl:2 is not JSON"),  # it has an end: not cut off by a kill
    ('{"step": 1}\n{"loss": 2}\n', 'metrics.jsonl:2 has no "step"'),
    ("[1]\n", 'metrics.jsonl:1 has no "step"'),
]


def test_bad_files_and_arguments_end_it_with_one_sentence(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def refused(words: str, *arguments: object, usage: bool = False) -> None:
        assert command(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1] and (said.startswith("error: ") and said.count("\n") == 1 or usage), said

    run.mkdir()
    for content, words in BAD:
        if content is not None:
            write(run, content)
        refused(words, run)
        assert not (run / "curves.png").exists()
    write(run, rows())
    refused("nowhere does not exist", tmp_path / "nowhere")
    refused("--smooth must be at least 1", run, "--smooth", "0", usage=True)
    refused("cannot be read", run / "metrics.jsonl" / "more")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused('matplotlib is not installed: pip install -e ".[plot]"', run)


@drawn
def test_too_many_runs_and_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    runs = [write(tmp_path / f"run{i}", rows()[:1]) for i in range(8)]
    assert command(monkeypatch, *runs) == 2
    assert "8 runs, but only 7 colours" in capsys.readouterr().err
    from matplotlib.figure import Figure

    monkeypatch.setattr(plot, "figure", lambda *_: Figure())  # quicker to draw
    assert command(monkeypatch, runs[0] / "metrics.jsonl", "--save", tmp_path / "missing" / "a.png") == 2
    assert "a.png cannot be written (No such file or directory)" in capsys.readouterr().err
    assert command(monkeypatch, runs[0] / "metrics.jsonl") == 0
    assert capsys.readouterr().out == f"{runs[0] / 'curves.png'}\n"
