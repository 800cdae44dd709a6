"""One HTML page of a training run, or of several: what was asked for, what happened, what was left out.

    python experiments/report.py out                                 out/report.html
    python experiments/report.py out-medloc out-fixed --out ab.html  both on top of each other (default ./report.html)

One file below 3 MB (report.html is its frame): no script, nothing is fetched, light or dark as the reader's system is.
What is missing or damaged in a run's folder is said on the page, and the rest is shown.
Left out: single answers (samples.jsonl), and following a run while it goes (call it again).
"""

import argparse
import base64
import html
import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules beside it; errors.py is above

import errors  # noqa: E402
import images  # noqa: E402
from errors import InputError, one_line, read_object, read_text  # noqa: E402
from eval import CLASSES, confusion_picture, confusions  # noqa: E402
from experiments import plot  # noqa: E402
from runtime.checkpoint import checkpoints  # noqa: E402
from runtime.run import SUMMARY  # noqa: E402

MOST, ROOM = 3_000_000, 2_000_000  # bytes of a page; of its pictures, before base64 makes four bytes of three
LONGEST, LISTED = 1000, 40  # characters of a text; lines of a list, of which the others are counted


@dataclass
class Picture:
    data: bytes  # PNG
    caption: str
    kind: str = ""  # "curves" are dark where the page is


class Told:
    """What a run's folder tells. InputError if it holds no run at all."""

    def __init__(self, out: Path, name: str, overlays: int):
        self.out, self.notes, self.pictures = out, [], []  # notes: sentences on what is missing, damaged, not shown
        with redirect_stdout(io.StringIO()) as said:  # that a line was cut off
            self.run = self.tried(plot.read_run, out, name) or plot.Run(name, [])
        self.notes += said.getvalue().splitlines()
        self.config = self.tried(read_object, out / "config.json") or {}
        self.evaluation = self.tried(read_object, out / "eval.json") or {}
        if not (self.run.rows or self.evaluation or "arguments" in self.config):  # a checkpoint has a config.json too
            raise InputError(f"{one_line(out)} holds no run: name a folder that train_grpo.py wrote (its --out)")
        for field in ("arguments", "versions"):
            if not isinstance(self.config.setdefault(field, {}), dict):
                self.notes.append(f"{out}/config.json: field {field!r} is not as train_grpo.py writes it")
                self.config[field] = {}
        self.asked = self.config["arguments"]
        self.done = max((row["step"] for row in self.run.rows), default=0)
        self.parts = plot.by_key(self.run) if self.run.rows else []  # one of each dataset and task
        self.read_pictures("sheet", 2)
        self.read_pictures("overlay", overlays)
        self.evaluations, self.evaluated = [], ""
        try:
            start, history, final = (self.evaluation.get(name) for name in ("start", "history", "final"))
            found = [("start", start), *((f"step {one['step']}", one) for one in history or [])]
            found += [] if history else [("final", final)]  # train_sft.py has no history
            self.evaluations = [(when, metrics) for when, metrics in found if metrics]
            self.evaluated = evaluated(self)
            for name, part in confusions(self.evaluations[-1][1]).items() if self.evaluations else ():
                if len(part["labels"]) > CLASSES:
                    self.notes.append(f"confusion of {name}: not drawn, it has {len(part['labels'])} classes")
                    continue
                self.pictures.append(Picture(png(confusion_picture(part)), f"confusion of {name}, newest evaluation"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.notes.append(f"{out}/eval.json is not as train_grpo.py writes it ({type(error).__name__}: {error})")
            self.evaluations = []
        self.notes += left_out(self)

    def tried(self, read, *of):
        try:
            return read(*of)
        except InputError as error:
            self.notes.append(str(error))

    def read_pictures(self, kind: str, most: int) -> None:
        files = sorted(self.out.glob(f"{kind}-*.png"))
        if len(files) > most or not files:
            self.notes.append(f"{kind}-*.png: {f'{most} of {len(files)} are shown here' if files else 'there is none'}")
        for i in range(n := min(most, len(files))):  # the first, the last, and others evenly between
            file = files[i * (len(files) - 1) // max(n - 1, 1)]
            if self.tried(images.open_image, file):  # a kill may have come while it was written
                self.pictures.append(Picture(file.read_bytes(), file.name))


def left_out(told: Told) -> list[str]:
    """What the run itself dropped, skipped or could not read."""
    found, (_, (dropped, groups)) = [], told.run.series("dropped", "groups")
    if skipped := [str(row["step"]) for row in told.run.rows if row.get("skipped")]:
        found.append(f"{len(skipped)} steps were skipped, loss or gradient not finite: {', '.join(skipped[:LISTED])}")
    if sum(dropped):
        found.append(f"{sum(dropped)} of {sum(groups)} groups had no spread and were dropped (--dynamic-sampling)")
    for key, words in (("parse_failures", "could not be read"), ("truncated", "were cut off at --max-tokens")):
        if shares := told.run.series(key)[1][0]:
            found.append(f"{fmean(shares):.2%} of all sampled answers {words}")
    if told.asked.get("clip_boxes"):
        found.append("--clip-boxes: how many boxes were cut was said on the terminal only")
    for saved in checkpoints(told.out)[-1:] * bool(told.asked.get("skip_bad")):
        bad = (told.tried(read_object, saved / "trainer.json") or {}).get("bad", {})
        if not isinstance(bad, dict):
            found.append(f"{saved}/trainer.json: field 'bad' is not as train_grpo.py writes it")
            continue
        found += [f"{len(bad)} records were left out (--skip-bad)", *map(str, bad.values())]
    return found


def text(value: str) -> str:
    """As text of a page. What cannot be printed, or would turn a line around, becomes a replacement character."""
    if len(value) > LONGEST:
        value = f"{value[:LONGEST]} ... ({len(value)} characters)"
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value))


def table(rows: dict[str, dict[str, str]]) -> str:
    """Name -> column -> cell; not all rows need have all columns."""
    head = list(dict.fromkeys(column for row in rows.values() for column in row))
    said = "<tr><td></td>" + "".join(f'<th scope="col">{text(column)}</th>' for column in head) + "</tr>\n"
    for name, row in rows.items():
        cells = "".join(f"<td>{text(row.get(column, '-'))}</td>" for column in head)
        said += f'<tr><th scope="row">{text(name)}</th>{cells}</tr>\n'
    return f'<div class="wide"><table>{said}</table></div>'


def bullets(sentences: list[str]) -> str:
    rest = [f"and {len(sentences) - LISTED} more"] if len(sentences) > LISTED else []
    return f"<ul>{''.join(f'<li>{text(words)}</li>' for words in sentences[:LISTED] + rest)}</ul>"


def figures(pictures: list[Picture]) -> str:
    said = ""
    for one in pictures:
        source, words = base64.b64encode(one.data).decode(), text(one.caption)
        said += f'<figure class="{one.kind}"><img src="data:image/png;base64,{source}" alt="{words}">'
        said += f"<figcaption>{words}</figcaption></figure>\n"
    return said


def state(told: Told) -> str:
    """How far the run came; of one that did not come to its end, what is known of why."""
    asked, out = told.asked.get("steps"), told.out
    if told.done == asked:
        return f"<p>Ran to its end: {asked} steps.</p>"
    words = f"Not at its end: {told.done} of {asked or 'an unknown number of'} steps are in metrics.jsonl. "
    if (lock := out / ".lock").exists():
        words += f"It still runs, or was killed: {lock}, {lock.read_text(errors='replace')[:200].strip()}. "
    log = out.with_name(f"{out.name}.log")  # experiments/sweep.py keeps there what a run prints
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
    words += f'Its last words: "{last[0]}". ' if last else "Why was said on the terminal, and is in none of its files. "
    words += " ".join(f"{saved.name} is there for --resume." for saved in checkpoints(out)[-1:]) or "Nothing was saved."
    return f'<p class="warn">{text(words)}</p>'


def decisions(part: plot.Run) -> str:
    """Each raise of tau with its reasons, why it stayed, and the latest decision."""
    said = {row["step"]: str(row["decision"]) for row in part.rows if row.get("decision")}
    if not said:
        return "<p>There is none in metrics.jsonl.</p>"
    found, raises = part.decisions(), [f"step {raised.step}: {said[raised.step]}" for raised in part.raises()]
    lines = [f"the latest, step {max(said)}: {said[max(said)]}"]
    if found:  # else the words are those of a schedule without tau
        held = [reason for decision in found if decision.tau_next is None for reason in decision.reasons]
        counts = {words: sum(reason.startswith(begin) for reason in held) for begin, words in plot.HELD.items()}
        why = ", ".join(f"{count} x {words}" for words, count in counts.items() if count) or "-"
        lines.append(f"tau rose at {len(raises)} of {len(found)} steps; why it stayed: {why}")
    return bullets(lines + raises)


def trained(told: Told) -> str:
    """A line per dataset and task: SUMMARY's numbers at both ends of the run."""
    rows, n = {}, max(1, min(20, len(told.run.rows) // 2))
    for part in told.parts:
        row = rows[part.name.removeprefix(told.run.name).strip() or "one dataset and task, with all of |A|"] = {}
        for key, words in SUMMARY.items():
            ends = [plot.Run("", some).series(key)[1][0] for some in (part.rows[:n], part.rows[-n:])]
            row |= {words: " → ".join(f"{fmean(end):.3f}" if end else "-" for end in ends)} if any(ends) else {}
    return table(rows) + f"<p>Means of the first and of the last {n} steps.</p>"


def scalars(metrics: dict, of: str = "") -> dict[str, str]:
    """Metric -> its number, with its standard error where it has one; of several tasks "task: metric"."""
    found, end = {}, "_standard_error"
    for name, value in metrics.items():
        if plot.is_number(value) and name != "step" and not name.endswith(end):
            found[of + name] = str(value) if isinstance(value, int) else f"{value:.3f}"
            found[of + name] += f" ± {metrics[name + end]:.3f}" if name + end in metrics else ""
    for task, part in metrics.get("tasks", {}).items():
        found |= scalars(part, f"{task}: ")
    return found


def evaluated(told: Told) -> str:
    """A line per evaluation; then a line per dataset, from the first to the last of them."""
    if not (found := told.evaluations):
        return "<p>There is no evaluation yet.</p>"
    rows = {when: scalars(metrics) for when, metrics in found}
    if exact := told.evaluation.get("exact_sft"):
        rows["exact SFT, to compare"] = scalars(exact)
    (first, start), (last, final) = found[0], found[-1]
    by_dataset = {}
    for name in start["datasets"] | final["datasets"]:
        a, b = (scalars(metrics["datasets"].get(name, {})) for metrics in (start, final))
        by_dataset[name] = {key: f"{a.get(key, '-')} → {b.get(key, '-')}" for key in a | b}
    return f"{table(rows)}<h3>Evaluation by dataset: {text(first)} → {text(last)}</h3>{table(by_dataset)}"


def settings(told: Told) -> dict[str, str]:
    """All of config.json, flat."""
    found = {f"--{name.replace('_', '-')}": value for name, value in told.asked.items()}
    found |= {f"version of {name}": value for name, value in told.config.get("versions", {}).items()}
    found |= {name: value for name, value in told.config.items() if name not in ("arguments", "versions")}
    found |= {name: " ".join(map(str, value)) for name, value in found.items() if isinstance(value, list)}
    return {name: v if isinstance(v, str) else "-" if v is None else json.dumps(v) for name, v in found.items()}


def compared(runs: list[Told]) -> str:
    """A column per run: its newest figures, then the settings in which they differ."""
    rows = {"steps done": {told.run.name: str(told.done) for told in runs}}
    for told in runs:
        for when, metrics in told.evaluations[-1:]:
            for name, value in ({"evaluated": when} | scalars(metrics)).items():
                rows.setdefault(name, {})[told.run.name] = value
    asked = {told.run.name: settings(told) for told in runs}
    for name in dict.fromkeys(name for one in asked.values() for name in one if name != "--out"):
        values = {run: one.get(name, "-") for run, one in asked.items()}
        rows |= {name: values} if len(set(values.values())) > 1 else {}
    return table(rows)


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), format="PNG", optimize=True)
    return buffer.getvalue()


def fit(pictures: list[Picture], room: int) -> None:
    """Scale down those that take more than their share of `room` bytes; what small ones leave goes to the others."""
    for i, one in enumerate(sorted(pictures, key=lambda one: len(one.data))):
        share, said, image = room // (len(pictures) - i), one.caption, Image.open(io.BytesIO(one.data), formats=["PNG"])
        for percent in (100, 75, 50, 35, 25, 15) if len(one.data) > share else ():
            size = [max(1, side * percent // 100) for side in image.size]
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            one.data = png(small.quantize(256, dither=Image.Dither.NONE))
            one.caption = f"{said}, here in 256 colours and at {percent} % of its size, for a page below 3 MB"
            if len(one.data) <= share:
                break
        room -= len(one.data)


def page(runs: list[Told], drawn: list[Picture], no_curves: str) -> str:
    body, title = [], text(f"Report of {', '.join(told.run.name for told in runs)}")
    if len(runs) > 1:
        links = "".join(f'<li><a href="#run-{i}">{text(told.run.name)}</a></li>' for i, told in enumerate(runs))
        body += [f"<ul>{links}</ul><h2>Final figures, and settings that differ</h2>", compared(runs)]
    body += ["<h2>Curves</h2>", figures(drawn) or f'<p class="warn">{text(no_curves)}</p>']
    for i, told in enumerate(runs):
        body += [f'<h2 id="run-{i}">{text(told.run.name)}</h2>', state(told), "<h3>Evaluation</h3>", told.evaluated]
        for part in told.parts:
            body += [f"<h3>What the schedule decided: {text(part.name)}</h3>", decisions(part)]
        body += ["<h3>Training by dataset</h3>", trained(told)] if told.run.series("u_mean")[0] else []
        body += ["<h3>Pictures (green: truth, right labels; red: others)</h3>", figures(told.pictures) or "None."]
        body += ["<h3>Left out, skipped, missing</h3>", bullets(told.notes or ["nothing"])]
        flags = table({name: {"in config.json": value} for name, value in settings(told).items()})
        body.append(f"<details><summary>Flags and versions</summary>{flags}</details>")
    before, _, after = read_text(Path(__file__).with_suffix(".html")).partition("BODY")
    return before.replace("TITLE", title) + "\n".join(body) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="a run's folder (train_grpo.py --out)")
    parser.add_argument("--out", type=Path, help="the page (default: OUT/report.html, of several ./report.html)")
    args = parser.parse_args()
    several, drawn, no_curves = len(args.runs) > 1, [], "No step yet."
    names = plot.run_names(args.runs)
    runs = [Told(out, name, overlays=2 if several else 4) for out, name in zip(args.runs, names, strict=True)]
    parts, most = [part for told in runs for part in told.parts], len(plot.COLOURS)
    try:
        for some in (parts[i : i + most] for i in range(0, len(parts), most)):
            plot.save(plot.figure(some), buffer := io.BytesIO())
            drawn.append(Picture(buffer.getvalue(), f"curves of {', '.join(part.name for part in some)}", "curves"))
    except InputError as error:  # no matplotlib
        no_curves = f"Not drawn: {error}"
    fit(drawn, ROOM // 2)
    fit([picture for told in runs for picture in told.pictures], ROOM - sum(len(picture.data) for picture in drawn))
    written = page(runs, drawn, no_curves).encode(errors="replace")
    if len(written) > MOST:
        raise InputError(f"a page of {len(written)} bytes, above {MOST}: name fewer runs")
    file = args.out or (Path() if several else args.runs[0]) / "report.html"
    file.write_bytes(written)
    print(file)


if __name__ == "__main__":
    errors.run(main)
