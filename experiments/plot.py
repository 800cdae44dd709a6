"""The curves of one or several runs: why tau rose or did not, and how the training went, in one picture.

    python experiments/plot.py out                                    out/curves.png
    python experiments/plot.py out-medloc out-fixed --smooth 10       both in each panel: ./curves.png

It reads only metrics.jsonl, as train_grpo.py writes it; a key that is null or missing leaves its points out. A row's
tau is the one its step was rewarded under; a raise stands at the step whose answers led to it.
Left out: evaluations (eval.json), error bars over seeds, and following a run while it goes (call it again).
"""

import argparse
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules beside it; errors.py is above

import errors  # noqa: E402
from errors import InputError  # noqa: E402

# Okabe and Ito's colours, told apart by all kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
GREY = "#666666"
LOOK = {
    "font.size": 8.5,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EEEEEE",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a folder's name is a $
}
LEFT, RIGHT = 0.09, 0.985  # of the panels, as shares of the figure's width
TOP = 1.03  # of axes for shares and IoUs, so that a line at 1 is seen

DECISION = re.compile(r"tau (\S+) (?:-> (\S+)|stays): (.*)")  # scheduler.Decision.__str__
CHECK = re.compile(r"(hit rate|sigma|margin) \S+ (?:>=|<=|<|>) (\S+)")
HELD = {  # how a reason to stay begins -> what its row is called
    "window": "window not full",
    "hit rate": "hit rate too low",
    "sigma": "sigma too high",
    "margin": "margin too small",
    "target": "target reached",
}
RENAMED = {f"iou_{name}": f"u_{name}" for name in ("mean", "q25", "q50", "q75")} | {"reward_box": "reward_task"}
NOTES = 8  # raises whose reasons fit side by side; a schedule that goes by the step raises tau hundreds of times


@dataclass(frozen=True)
class Decision:
    """What metrics.jsonl tells of a scheduler.Decision: numbers as rounded there."""

    step: int
    tau: float
    tau_next: float | None  # None: tau stays
    reasons: list[str]


@dataclass(frozen=True)
class Run:
    """One metrics.jsonl, or of several datasets and tasks what one of them has of it."""

    name: str
    rows: list[dict]

    def series(self, *keys: str) -> tuple[list[int], list[list[float]]]:
        """Steps at which all keys are finite numbers, and a list of values for each key."""
        rows = [row for row in self.rows if all(is_number(row.get(key)) for key in keys)]
        return [row["step"] for row in rows], [[row[key] for row in rows] for key in keys]

    def decisions(self) -> list[Decision]:
        """Of the steps that had a tau."""
        found = []
        for row in self.rows:
            if match := DECISION.fullmatch(str(row.get("decision"))):
                tau, tau_next, reasons = match.groups()
                found.append(Decision(row["step"], float(tau), tau_next and float(tau_next), reasons.split(", ")))
        return found

    def raises(self) -> list[Decision]:
        return [decision for decision in self.decisions() if decision.tau_next is not None]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------- reading


def read_run(out: Path, name: str) -> Run:
    """A run's folder, or its metrics.jsonl. A last line that a kill cut off is left out, and that is printed."""
    file = out / "metrics.jsonl" if out.is_dir() else out
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: name a folder that train_grpo.py wrote (its --out)") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): name a run's folder") from None
    rest = lines.pop()  # behind the last line end: nothing, unless a kill came in between
    rows = [_row(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if rest:
        try:
            rows.append(_row(rest, file))
        except InputError:
            print(f"{file}:{len(lines) + 1}: cut off, left out")
    if not rows:
        raise InputError(f"{file} has no whole line: wait for the end of the run's first step")
    return Run(name, rows)


def _row(line: str, place: object) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error.msg}): delete the line, or repeat the run") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise InputError(f'{place} has no "step": name a metrics.jsonl that train_grpo.py wrote')
    row = {RENAMED.get(key, key): value for key, value in row.items()}
    if all(is_number(row.get(key)) for key in ("tokens", "seconds")) and row["seconds"] > 0:
        row["tokens_per_second"] = row["tokens"] / row["seconds"]  # as in the progress bar
    return row


def by_key(run: Run) -> list[Run]:
    """A run with a schedule for each dataset and task (tau/ham10000/box) as one of each."""
    keys = [name.partition("/")[2] for name in run.rows[-1] if name.startswith("tau/")]
    parts = [[{name.removesuffix(f"/{key}"): v for name, v in row.items()} for row in run.rows] for key in keys]
    return [Run(f"{run.name} {key}", rows) for key, rows in zip(keys, parts, strict=True)] or [run]


def run_names(outs: list[Path]) -> list[str]:
    """Folder names, with as many of the folders above as tell the runs apart. InputError if a run is named twice."""
    paths = [Path(os.path.abspath(out)) for out in outs]  # "." has no name; a link keeps its own
    paths = [path.parent if path.name == "metrics.jsonl" else path for path in paths]
    names = []
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path} is named twice: name each run once")
        depth = 1
        while sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        names.append(str(Path(*path.parts[-depth:])))
    return names


# ------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Panel:
    title: str
    lines: dict[str, str]  # key in metrics.jsonl -> its name in the legend
    limits: tuple[float | None, float | None] = (0, None)
    smooth: bool = True


def small_panels(runs: list[Run]) -> list[Panel]:
    """Row by row. What decisions were made on is never smoothed: it would cross its bound at another step."""
    keys = {key for run in runs for row in run.rows for key in row if re.fullmatch("reward_[^/]+|group_std", key)}
    rewards = sorted(keys, key=lambda key: (key != "reward_mean", key))  # the whole before its parts
    hits = {"hit_rate": "hit rate", "sigma": "sigma, its spread over groups"}
    bad = {"zero_spread": "groups of equal reward", "parse_failures": "not read", "truncated": "cut off",
           "advantage_share": "of all datasets' |A|"}  # fmt: skip
    return [
        Panel("Over the window: hit rate and sigma", hits, (0, TOP), smooth=False),
        Panel("Over the window: margin", {"margin": "mean u - tau"}, (None, None), smooth=False),
        Panel("u of a step's answers, band: middle half", {"u_mean": "mean", "u_q50": "median"}, (0, TOP)),
        Panel("Reward per answer", {key: key.removeprefix("reward_") for key in rewards}, (None, None)),
        Panel("Shares: groups that teach nothing, bad answers", bad, (0, TOP)),
        Panel("Share of tokens whose ratio was clipped", {"clip_low": "below", "clip_high": "above"}),
        Panel("Entropy", {"entropy": "nats per token"}),
        Panel("KL to the starting policy", {"kl": "nats per token"}),
        Panel("Loss (near 0 by construction if on policy)", {"loss": "loss"}, (None, None)),
        Panel("Gradient norm", {"grad_norm": "before clipping"}),
        Panel("Seconds per step", {"seconds_rollout": "rollout", "seconds_update": "update"}),
        Panel("Speed", {"tokens_per_second": "tokens sampled per second of a step"}),
    ]


def figure(runs: list[Run], smooth: int = 1):
    """The runs' matplotlib Figure, 14 inches wide. InputError without matplotlib, and for more runs than colours.

    Lines are labelled "run: key". If smooth > 1, the mean of the last `smooth` points is drawn over them, labelled
    "run: key, smooth".
    """
    try:  # here, so that all else works without it
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise InputError('matplotlib is not installed: pip install -e ".[plot]"') from None
    if len(runs) > len(COLOURS):
        raise InputError(f"{len(runs)} runs, but only {len(COLOURS)} colours that are easy to tell apart: name fewer")
    with matplotlib.rc_context(LOOK):
        fig = Figure(figsize=(14, 13))
        FigureCanvasAgg(fig)
        top = draw_heading(fig, runs, smooth) - 0.035
        sides = {"left": LEFT, "right": RIGHT}
        wide = fig.add_gridspec(2, 1, height_ratios=(2.6, 1), hspace=0.28, bottom=0.645, top=top, **sides)
        grid = fig.add_gridspec(4, 3, hspace=0.48, wspace=0.18, bottom=0.04, top=0.586, **sides)
        tau = fig.add_subplot(wide[0])
        held = fig.add_subplot(wide[1], sharex=tau)
        small = [fig.add_subplot(cell, sharex=tau) for cell in grid]  # row by row
        steps = [row["step"] for run in runs for row in run.rows]
        tau.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
        tau.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        draw_tau(tau, runs)
        draw_held(held, runs)
        for ax, panel in zip(small, small_panels(runs), strict=True):
            draw_panel(ax, panel, runs, smooth)
        tau.tick_params(labelbottom=False)
        for ax in small[:-3]:
            ax.tick_params(labelbottom=False)
        for ax in small[-3:]:
            ax.set_xlabel("optimiser step", color=GREY)
    return fig


def draw_heading(fig, runs: list[Run], smooth: int) -> float:
    """The runs' names, and what holds for all panels. Returns its lower end as a share of the figure's height."""
    from matplotlib.lines import Line2D

    rows, line = 1, 0.26 / fig.get_figheight()
    if len(runs) == 1:
        fig.text(LEFT, 0.99, runs[0].name, size=14, weight="bold", va="top")
    else:
        columns = max(1, 160 // (max(len(run.name) for run in runs) + 6))
        rows = math.ceil(len(runs) / columns)
        handles = [Line2D([], [], color=colour, lw=2.5) for colour in COLOURS[: len(runs)]]
        legend = fig.legend(
            handles, ["run"] * len(runs), loc="upper left", bbox_to_anchor=(LEFT, 0.99), ncols=columns,
            fontsize=11, handlelength=1.4, labelspacing=0.3, borderpad=0, borderaxespad=0,
        )  # fmt: skip
        for text, run in zip(legend.get_texts(), runs, strict=True):
            text.set_text(run.name)  # a legend would leave out names that begin with _
    words = ["x: optimiser step"]
    if len(runs) == 1 and 0 < len(runs[0].raises()) <= NOTES:
        words.append("vertical lines: raises of tau")
    if smooth > 1:
        words.append(f"strong lines: mean of the last {smooth} points, over the faint measured ones")
    low = 0.99 - rows * line
    fig.text(LEFT, low, "   |   ".join(words), size=9, color=GREY, va="top")
    return low - line


def draw_title(ax, title: str) -> None:
    """Above the line that is left for a legend. Where nothing was drawn it says so."""
    ax.set_title(title, loc="left", size=9.5, weight="bold", pad=17)
    if not ax.collections and not any(len(line.get_xdata()) for line in ax.lines):
        draw_no_data(ax)


def draw_no_data(ax) -> None:
    ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", va="center", color=GREY)


def draw_legend(ax, handles: list) -> None:
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=8, fontsize=8, handlelength=2.2,
        columnspacing=1.4, borderpad=0, borderaxespad=0.35,
    )  # fmt: skip


def draw_tau(ax, runs: list[Run]) -> None:
    """tau in steps with its raises marked; if it is one run, with their reasons."""
    from matplotlib.lines import Line2D

    counts = [len(run.raises()) for run in runs]
    ax.set_ylim(0, TOP)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    for run, colour, count in zip(runs, COLOURS, counts, strict=False):
        steps, (taus,) = run.series("tau")
        marker = "." if len(steps) == 1 else None
        # pre: the value of step k + 1 begins at k, whose answers led to it
        ax.plot(steps, taus, color=colour, lw=1.6, drawstyle="steps-pre", marker=marker, label=f"{run.name}: tau")
        points = [(d.step, d.tau_next) for d in run.raises()]
        x, y = zip(*points, strict=True) if points else ((), ())
        size = 7 if count <= NOTES else 3
        ax.plot(x, y, "^", color=colour, ms=size, mec="white", mew=0.5, zorder=3, label=f"{run.name}: raises")
    title = "tau, the IoU from which a box is a hit"
    if len(runs) == 1 and counts[0] > NOTES:
        title += f" ({counts[0]} raises, too many to write their reasons here: see metrics.jsonl)"
    elif len(runs) == 1 and counts[0]:
        draw_reasons(ax, runs[0])
    draw_title(ax, title)
    if any(counts):
        colour = COLOURS[0] if len(runs) == 1 else GREY
        draw_legend(ax, [Line2D([], [], color=colour, marker="^", ls="", ms=6, label="raise")])


def draw_reasons(ax, run: Run) -> None:
    """The reasons of each raise below tau's axis, beside its line. Raises close together push each other's aside."""
    ax.set_ylim(-0.47, TOP)
    ax.spines["bottom"].set_position(("data", 0))
    ax.spines["left"].set_bounds(0, 1)
    ax.grid(False, axis="x")
    first, last = ax.get_xlim()
    width, raises = (last - first) / NOTES, run.raises()
    places = []
    for raised in raises:
        places.append(max(raised.step, places[-1] + width if places else first))
    for i in range(len(places)):  # and from the right end back
        places[i] = min(places[i], last - width * (len(places) - i))
    for raised, x in zip(raises, places, strict=True):
        ax.plot([raised.step, raised.step, x, x], [raised.tau_next, -0.03, -0.11, -0.45], color=GREY, lw=0.6, label="_")
        head = f"step {raised.step}: {raised.tau:.3f} -> {raised.tau_next:.3f}"
        ax.text(x + 0.04 * width, -0.09, "\n".join([head, *raised.reasons]), size=8, va="top", linespacing=1.3)


def draw_held(ax, runs: list[Run]) -> None:
    """Why tau stayed, step by step: a row for each reason, in it a bar for each run."""
    height = 0.64 / len(runs)
    for i, run in enumerate(runs):
        for place, reason in enumerate(HELD):
            stays = [d for d in run.decisions() if d.tau_next is None]
            bars = [(d.step - 0.5, 1) for d in stays if any(words.startswith(reason) for words in d.reasons)]
            if bars:
                low = place - 0.32 + i * height
                look = {"color": COLOURS[i], "lw": 0, "antialiased": False}  # or seams show between the steps
                ax.broken_barh(bars, (low, height), label=f"{run.name}: {reason}", **look)
    ax.set_yticks(range(len(HELD)), HELD.values(), color="black")
    ax.set_yticks([place + 0.5 for place in range(len(HELD))], minor=True)
    ax.set_ylim(len(HELD) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.grid(True, axis="y", which="minor")
    ax.tick_params(axis="y", which="both", length=0)
    ax.set_title("Why tau stayed: what did not hold at each step", loc="left", size=9.5, weight="bold")
    if not ax.collections:
        draw_no_data(ax)


def draw_panel(ax, panel: Panel, runs: list[Run], smooth: int) -> None:
    """One colour per run and one style per line; of a single run one colour per line as well."""
    from matplotlib.lines import Line2D

    single, keys = len(runs) == 1, {}  # keys: name in the legend -> its line
    for i, run in enumerate(runs):
        steps, (low, high) = run.series("u_q25", "u_q75")
        if "u_mean" in panel.lines and steps:
            ax.fill_between(steps, low, high, color=COLOURS[i], alpha=0.15, lw=0, label=f"{run.name}: quartiles")
        for j, (key, name) in enumerate(panel.lines.items()):
            steps, (values,) = run.series(key)
            look = {"color": COLOURS[j % len(COLOURS) if single else i], "ls": STYLES[j % len(STYLES)]}
            look["marker"] = "." if len(steps) == 1 else None
            averaged = smooth > 1 and panel.smooth
            ax.plot(steps, values, label=f"{run.name}: {key}", **look | ({"alpha": 0.3, "lw": 0.7} if averaged else {}))
            if averaged:
                ax.plot(steps, moving_average(values, smooth), label=f"{run.name}: {key}, smooth", **look)
            if steps:
                keys[name] = Line2D([], [], label=name, **look | ({} if single else {"color": GREY}))
    ax.set_ylim(*panel.limits)
    ax.yaxis.set_major_formatter("{x:g}")  # no factor above the axis, where the legend is
    draw_title(ax, panel.title)
    if single:
        draw_decisions(ax, panel, runs[0], keys)
    if keys:
        draw_legend(ax, list(keys.values()))


def draw_decisions(ax, panel: Panel, run: Run, keys: dict) -> None:
    """Where tau rose, and what decisions held the panel's lines against, as far as their words tell."""
    from matplotlib.lines import Line2D

    decisions, bounds = run.decisions(), {}
    for decision in decisions:  # a bound depends on tau alone, so that one naming tells it for all steps of that tau
        for reason in decision.reasons:
            for check, bound in CHECK.findall(reason):
                bounds[check.replace(" ", "_"), decision.tau] = float(bound)
    for key, colour in zip(panel.lines, COLOURS, strict=False):
        known = [(d.step, bounds[key, d.tau]) for d in decisions if (key, d.tau) in bounds]
        if known:
            steps, values = zip(*known, strict=True)
            look = {"lw": 0.9, "ls": (0, (1, 2))}
            ax.plot(steps, values, color=colour, drawstyle="steps-pre", label=f"{run.name}: {key}, bound", **look)
            keys["bound"] = Line2D([], [], color=GREY, label="bound", **look)
    if "u_mean" in panel.lines and run.series("tau")[0]:
        steps, (taus,) = run.series("tau")
        look = {"color": GREY, "lw": 0.9}
        ax.plot(steps, taus, drawstyle="steps-pre", label=f"{run.name}: tau", **look)
        keys["tau"] = Line2D([], [], label="tau", **look)
    if len(run.raises()) <= NOTES:
        for raised in run.raises():
            ax.axvline(raised.step, color=GREY, lw=0.6, alpha=0.6, zorder=0.9, label="_")


def moving_average(values: list[float], n: int) -> list[float]:
    """Of the last n values, like the schedule's window; of fewer at the start."""
    return [fmean(values[max(0, i + 1 - n) : i + 1]) for i in range(len(values))]


# -------------------------------------------------------------------------------------------------------- command line


def save(fig, file: Path | io.BytesIO) -> None:
    """A PNG of 1400 pixels' width, in the lines' colours and their shades: a third of the size in full colour."""
    shades = [grey for grey in range(0, 256, 0x11) for _ in range(3)]  # #000, #111 ... #FFF
    for colour in COLOURS:
        channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        shades += [c + (255 - c) * k // 7 for k in range(8) for c in channels]  # k: from the colour to white
    palette = Image.new("P", (1, 1))
    palette.putpalette(shades)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    # A palette counted from the picture would lose the colour of a line that is short or thin.
    picture = Image.open(buffer, formats=("PNG",)).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    try:
        picture.save(file, format="PNG", optimize=True)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): name another by --save") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", type=Path, help="a run's folder (train_grpo.py --out) or its metrics.jsonl")
    parser.add_argument("--save", type=Path, help="the PNG (default: OUT/curves.png, with several runs ./curves.png)")
    parser.add_argument("--smooth", type=int, default=1, help="steps to average over (default 1: none)")
    args = parser.parse_args()
    if args.smooth < 1:
        parser.error("--smooth must be at least 1")
    read = [read_run(out, name) for out, name in zip(args.out, run_names(args.out), strict=True)]
    runs = [part for run in read for part in by_key(run)]
    home = Path() if len(runs) > 1 else args.out[0] if args.out[0].is_dir() else args.out[0].parent
    file = args.save or home / "curves.png"
    save(figure(runs, args.smooth), file)
    print(file)


if __name__ == "__main__":
    errors.run(main)
