"""A sweep's results as Markdown: for each set a table, a line a row; the grid's comparisons, seed by seed."""

from pathlib import Path
from statistics import fmean, stdev

from errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {  # column of table.md -> field of results.jsonl, digits
    "A@.5": ("acc@0.5", 3),
    "A@.8": ("acc@0.8", 3),
    "pmAP": ("pmap", 3),
    "mIoU": ("miou", 3),
    "flat groups": ("zero_spread", 2),
    "no hit": ("no_hit", 2),
    "stability": ("stability", 3),
    "last tau": ("tau", 2),
    "images": ("images", 0),
    "rollouts": ("rollouts", 0),
}
LEGEND = (
    "Mean +- standard deviation over seeds. Flat groups: share of groups without spread in reward, over all steps; "
    "no hit: of groups in which no answer reaches tau; with a reward of 0 or 1 the other flat groups have hits only. "
    "Stability: standard deviation of the mean IoU of a step's answers, over the second half of the steps. "
    "Images: drawn for training. Rollouts: answers sampled."
)
SAME_START = 5e-4  # of mIoU: another machine trains the same start to other last digits
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # Student's t, df 1 to 11


def check_footing(results: list[dict]) -> None:
    """InputError unless all runs of a set began from one policy and were judged on as many pictures; where a grid's
    rows bring starts of their own, on as many pictures."""
    seen = {}

    def start(row: dict) -> float:
        return row.get("start_miou", 0.0)

    for row in results:
        first = seen.setdefault(row["set"], row)
        if row["n"] != first["n"] or abs(start(row) - start(first)) > SAME_START:
            raise InputError(
                f"set {row['set']!r}: {row['row']} began with mIoU {start(row)} on {row['n']} pictures, but "
                f"{first['row']} with {start(first)} on {first['n']}: rows of a set must share start and evaluation"
            )


def mean_std(rows: list[dict], field: str, digits: int) -> str:
    """Of a field over rows: "0.746 +- 0.012"; of a single one and of counts the mean alone; "-" where none has it."""
    values = [row[field] for row in rows if row.get(field) is not None]
    if not values:
        return "-"
    mean = f"{fmean(values):,.{digits}f}"
    return mean if len(values) < 2 or digits == 0 else f"{mean} +- {stdev(values):.{digits}f}"


def paired(results: list[dict], row: str, other: str, one: str, measure: str = "pmap") -> list[float]:
    """A measure, pmAP by default, of row minus other, of each seed of the set that both have."""
    of = {(r["row"], r["seed"]): r.get("measures", r)[measure] for r in results if r["set"] == one}
    return [of[row, seed] - of[other, seed] for name, seed in of if name == row and (other, seed) in of]


def interval(values: list[float]) -> str:
    """Mean and Student's 95 % interval of it."""
    df = len(values) - 1
    if df == 0:
        return f"{fmean(values):+.3f}"
    t = T975[df - 1] if df <= len(T975) else 1.96 + 2.45 / df  # to .02
    half = t * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):+.3f} [{fmean(values) - half:+.3f}, {fmean(values) + half:+.3f}]"


def table(grid, results: list[dict]) -> str:
    """Markdown of a sweep.Grid's results: for each set a table with a line per row, then the grid's comparisons."""
    dates, machines = ({row[name] for row in results} for name in ("date", "machine"))
    when, where = " to ".join(sorted({min(dates), max(dates)})), "; ".join(sorted(machines))
    lines = [f"# {grid.file.stem}", "", grid.about.strip(), "", f"`python experiments/sweep.py {shown(grid.file)}`"]
    lines += ["", f"{len(results)} of {len(grid.runs)} runs, {when}; {where}."]
    if grid.measures:
        return "\n".join([*lines, *measures_tables(grid, results)]) + "\n"
    lines += ["", LEGEND, "", "## Final pmAP", "", *markdown_table(["", *grid.sets], overview(grid, results))]
    for one in grid.sets:
        of_set = [row for row in results if row["set"] == one]
        if not of_set:
            continue
        start = f"mIoU {of_set[0]['start_miou']:.3f}, pmAP {of_set[0]['start_pmap']:.3f}"
        lines += ["", f"## {one}", "", f"Start: {start}; {of_set[0]['n']} pictures to evaluate on."]
        cells = []
        for name in grid.rows:
            of_row = [row for row in of_set if row["row"] == name]
            cells.append([name, str(len(of_row)), *(mean_std(of_row, *field) for field in SHOWN.values())])
        lines += ["", *markdown_table(["", "seeds", *SHOWN], [row for row in cells if row[1] != "0"])]
    if grid.compare:
        lines += ["", "## pmAP, seed by seed", "", "Mean difference [its 95 % interval, Student's t]; seeds ahead.", ""]
        cells = []
        for row, other in grid.compare:
            values = [paired(results, row, other, one) for one in grid.sets]
            if len(values) > 1:
                values.append([difference for of_set in values for difference in of_set])
            ahead = [f"{interval(v)}; {sum(x > 0 for x in v)} of {len(v)}" if v else "-" for v in values]
            cells.append([f"{row} - {other}", *ahead])
        lines += markdown_table(["", *grid.sets, "all pairs"][: len(cells[0])], cells)
    return "\n".join(lines) + "\n"


def measures_tables(grid, results: list[dict]) -> list[str]:
    """Of a grid that says what it measures: for each set a line per row, then of each measure the comparisons."""
    judges = "".join(f" Judge: {name}." for name in sorted({row["judge"] for row in results if "judge" in row}))
    lines = ["", f"Mean +- standard deviation over seeds. In brackets: at the start.{judges}"]
    for one in grid.sets:
        cells = []
        for name in grid.rows:
            of_row = [row for row in results if (row["set"], row["row"]) == (one, name)]
            if of_row:
                flat = [row["measures"] | row.get("watch", {}) for row in of_row]
                starts = [row["start"] for row in of_row]
                values = [f"{mean_std(flat, m, 3)} ({fmean(s[m] for s in starts):.3f})" for m in grid.measures]
                cells.append([name, str(len(of_row)), *values, *(mean_std(flat, w, 3) for w in grid.watch)])
        if cells:
            count = next(row["n"] for row in results if row["set"] == one)
            lines += ["", f"## {one}", "", f"{count} pictures to evaluate on.", ""]
            lines += markdown_table(["", "seeds", *grid.measures, *grid.watch], cells)
    if grid.compare:
        lines += ["", "## Seed by seed", "", "Mean difference [its 95 % interval, Student's t]; seeds ahead."]
    for one in grid.sets if grid.compare else ():
        cells = []
        for row, other in grid.compare:
            values = [paired(results, row, other, one, measure) for measure in grid.measures]
            ahead = [f"{interval(v)}; {sum(x > 0 for x in v)} of {len(v)}" if v else "-" for v in values]
            cells.append([f"{row} - {other}", *ahead])
        lines += ["", f"{one}:", "", *markdown_table(["", *grid.measures], cells)]
    return lines


def overview(grid, results: list[dict]) -> list[list[str]]:
    """Each row's final pmAP on each set; where seeds are missing, how many there are."""

    def cell(row: str, one: str) -> str:
        runs = [found for found in results if (found["row"], found["set"]) == (row, one)]
        few = f" ({len(runs)} of {len(grid.seeds)})" if 0 < len(runs) < len(grid.seeds) else ""
        return mean_std(runs, "pmap", 3) + few

    return [[row, *(cell(row, one) for one in grid.sets)] for row in grid.rows]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def shown(file: Path) -> Path:
    """A path as a reader of the repository would write it."""
    return file.relative_to(ROOT) if file.is_relative_to(ROOT) else Path(file.name)
