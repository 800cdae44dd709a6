"""The figures of a grid (sweep.py), from the lines of its results.jsonl.

curves.png: of each set the mean IoU of a step's answers, tau and the share of groups without spread, step by step.
final.png: of each set the rows' final pmAP, a dot per seed. sparsity.png, where the sets are starts of one set: pmAP
against the share of groups that have no hit at the start.
"""

from pathlib import Path
from statistics import fmean

from PIL import Image

from errors import InputError
from experiments.plot import COLOURS, GREY, LOOK, STYLES, moving_average

SMOOTH = 5  # steps: one step's 16 pictures are a few hundredths off


def draw(grid, results: list[dict], folder: Path) -> None:
    """Write the figures that the results allow. InputError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InputError('matplotlib is not installed: pip install -e ".[plot]"') from None
    sets = [one for one in grid.sets if any(row["set"] == one for row in results)]
    rows = [name for name in grid.rows if any(row["row"] == name for row in results)]
    with matplotlib.rc_context(LOOK):
        if any("step_tau" in row for row in results):
            save(curves(results, sets, rows), folder / "curves.png")
        save(final(results, sets, rows, grid.measures), folder / "final.png")
        if grid.file.stem == "sparsity":
            save(sparsity(results, sets, rows), folder / "sparsity.png")


def save(figure, file: Path) -> None:
    """As a picture of few colours: a third of the bytes."""
    figure.canvas.draw()
    image = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba()))
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def panels(width: float, height: float, rows: int, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row", sharex="col")


def look(rows: list[str], row: str) -> dict:
    """Colour first, then style: seven of one, four of the other."""
    place = rows.index(row)
    return {"color": COLOURS[place % len(COLOURS)], "ls": STYLES[place // len(COLOURS) % len(STYLES)]}


def mean_curve(runs: list[dict], field: str) -> list[float]:
    return [fmean(values) for values in zip(*(run[field] for run in runs), strict=True)]


def curves(results: list[dict], sets: list[str], rows: list[str]):
    """Three panels per set. tau is that of the first seed: a mean of steps is no step."""
    figure, axes = panels(1.2 + 3.2 * len(sets), 8.5, 3, len(sets))
    handles = {}
    for column, one in zip(axes.T, sets, strict=True):
        for row in rows:
            runs = [r for r in results if (r["set"], r["row"]) == (one, row) and "step_tau" in r]
            if not runs:
                continue
            for ax, field in ((column[0], "step_iou_mean"), (column[2], "step_zero_spread")):
                values = moving_average(mean_curve(runs, field), SMOOTH)
                (handles[row],) = ax.plot(range(1, len(values) + 1), values, **look(rows, row))
            if (taus := runs[0]["step_tau"])[0] is not None:
                column[1].plot(range(1, len(taus) + 1), taus, drawstyle="steps-pre", **look(rows, row))
        column[0].set_title(one, loc="left", weight="bold")
        column[2].set_xlabel("optimiser step", color=GREY)
        column[1].set_ylim(0, 1.03)
        column[2].set_ylim(0, 1.03)
    axes[0, 0].set_ylabel(f"IoU of a step's answers,\nmean of seeds and of {SMOOTH} steps")
    axes[1, 0].set_ylabel("tau, first seed")
    axes[2, 0].set_ylabel("share of flat groups,\nmean likewise")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7))
    return figure


def final(results: list[dict], sets: list[str], rows: list[str], measures: list[str] = ()):
    """Rows from top to bottom, a panel per set and measure (pmAP, if the grid names none); a bar at the mean."""
    shown = [(one, measure) for one in sets for measure in measures or ["pmap"]]
    figure, axes = panels(1.6 + 2.6 * len(shown), 0.9 + 0.27 * len(rows), 1, len(shown))
    for ax, (one, measure) in zip(axes[0], shown, strict=True):
        for place, row in enumerate(rows):
            values = [r.get("measures", r)[measure] for r in results if (r["set"], r["row"]) == (one, row)]
            if values:
                ax.plot(values, [place] * len(values), "o", color=COLOURS[0], ms=4.5, alpha=0.7, mew=0)
                ax.plot([fmean(values)] * 2, [place - 0.35, place + 0.35], color="black", lw=1.2)
        ax.set_title(one, loc="left", weight="bold")
        ax.set_xlabel("final pmAP" if measure == "pmap" else measure, color=GREY)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def sparsity(results: list[dict], sets: list[str], rows: list[str]):
    """x: share of the first step's groups in which no answer reaches fixed's tau, mean of the seeds."""
    figure, axes = panels(6.4, 4.2, 1, 1)
    ax = axes[0, 0]
    share = {}
    for one in sets:
        firsts = [r["step_no_hit"][0] for r in results if (r["set"], r["row"]) == (one, "fixed")]
        if firsts:
            share[one] = fmean(firsts)
    for row in rows:
        points = []
        for one in share:
            values = [r["pmap"] for r in results if (r["set"], r["row"]) == (one, row)]
            points += [(share[one], fmean(values))] if values else []
            ax.plot([share[one]] * len(values), values, "o", ms=3.5, mew=0, alpha=0.6, color=look(rows, row)["color"])
        if points:
            ax.plot(*zip(*sorted(points), strict=True), label=row, **look(rows, row))
    ax.set_xlabel("share of the first step's groups in which no answer reaches IoU .5")
    ax.set_ylabel("final pmAP")
    ax.legend(loc="lower left")
    return figure
