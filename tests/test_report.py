"""experiments/report.py: one page that fetches nothing, says what the files of a run say, and escapes all of it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import errors
from experiments import report
from scheduler import Decision

VOID = {"meta", "img"}  # elements without an end
NASTY = '<script>alert("1")</script><img src="http://x/y.png" onerror=\'z\'>&amp;\u202e\x00'
STEPS = 6


class Page(HTMLParser):
    """A page taken apart; the parser raises where an element is not closed in its turn, or would fetch or run."""

    def __init__(self, file: Path):
        super().__init__()
        self.bytes = file.read_bytes()
        self.open, self.images, self.words, self.tables, self.links = [], [], [], [], []
        self.feed(self.bytes.decode())
        self.close()
        assert self.open == []
        style = re.search(r"<style>(.*?)</style>", self.bytes.decode(), re.DOTALL)[1]
        assert "prefers-color-scheme: dark" in style and not re.search(r"url\(|@import|@font-face|expression", style)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("srcset", "style", "action", "background"), name
            assert name != "href" or value.startswith("#")
            assert name != "src" or value.startswith("data:image/png;base64,")
        given = dict(attributes)
        if tag == "img":
            self.images.append((given["alt"], base64.b64decode(given["src"].partition(",")[2], validate=True)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)

    def row(self, name: str) -> dict[str, str]:
        """Column -> cell, of the one row of that name."""
        ((head, cells),) = [(t[0], row) for t in self.tables for row in t[1:] if row[0] == name]
        assert len(head) == len(cells)
        return dict(zip(head[1:], cells[1:], strict=True))


def rows(steps: int = STEPS, keys: tuple[str, ...] = ("",)) -> list[dict]:
    """u rises by .1 a step from .1 on; under a key's name it is that, halved for each further key."""
    made = []
    for step in range(1, steps + 1):
        tau, tau_next = (0.3, 0.45) if step == 3 else (0.45, 0.45) if step > 3 else (0.3, 0.3)
        reasons = ("hit rate .821 >= .800",) if step == 3 else ("margin .050 < .100 (short by .050)",)
        row = {"step": step, "u_mean": step / 10, "parse_failures": 0.25, "truncated": 0.0}
        row |= {"dropped": 1, "groups": 4, "skipped": int(step == 2)}
        for i, key in enumerate(keys):
            own = {"tau": tau, "decision": str(Decision(tau, tau_next, reasons, 0.5, 0.1, 0.05))}
            own |= {"u_mean": step / 10 / 2**i, "advantage_share": 0.75 - i / 2} if key else {}
            row |= {name + key: value for name, value in own.items()}
        made.append(row)
    return made


def metrics(u: float, dataset: str, **more) -> dict:
    one = {"task": "label", "accuracy": u, "accuracy_standard_error": 0.0125, "n": 64, "parse_failures": 3} | more
    return one | {"datasets": {dataset: one}}


def noise(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), os.urandom(3 * width * height))


def make(out: Path, dataset: str = "d", flags: dict | None = None, made: list[dict] | None = None) -> Path:
    """A finished run of STEPS steps."""
    out.mkdir(parents=True)
    asked = {"steps": STEPS, "group_size": 8, "lr": 1e-4, "out": str(out), "schedule": ["medloc", "label=raw"]}
    config = {"arguments": asked | (flags or {}), "versions": {"torch": "2.0"}, "git": "abc", "sha256": {}}
    confusion = {"labels": ["a", "b"], "rows": [[5, 1, 0], [0, 7, 2]]}
    last = metrics(0.625, dataset, confusion=confusion)
    evaluation = {"start": metrics(0.25, dataset), "final": last, "history": [{"step": STEPS} | last]}
    (out / "config.json").write_text(json.dumps(config))
    (out / "eval.json").write_text(json.dumps(evaluation))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made or rows()))
    for name in ("sheet-000000", "sheet-000006", "overlay-000001"):
        Image.new("RGB", (40, 30), (12, 200, 99)).save(out / f"{name}.png")
    return out


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    try:
        errors.run(report.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def page(monkeypatch):
    """Runs -> their page, without curves: matplotlib takes seconds."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def made(*runs: Path) -> Page:
        file = runs[0] / "page.html"
        assert command(monkeypatch, *runs, "--out", file) == 0
        return Page(file)

    return made


def test_a_page_says_what_the_files_say(tmp_path, page):
    made = page(make(tmp_path / "run"))
    assert "Ran to its end: 6 steps." in made.text
    assert 'Not drawn: matplotlib is not installed: pip install -e ".[plot]"' in made.text
    assert made.row("start") == {"accuracy": "0.250 ± 0.013", "n": "64", "parse_failures": "3"}
    assert made.row("step 6")["accuracy"] == "0.625 ± 0.013"
    assert [name for name, *_ in made.tables[0]] == ["", "start", "step 6"]  # the final one is the history's last
    assert made.row("d")["accuracy"] == "0.250 ± 0.013 → 0.625 ± 0.013"
    assert made.row("one dataset and task, with all of |A|")["u"] == "0.200 → 0.500"  # means of 3 steps each
    for words in (
        "step 3: tau .300 -> .450: hit rate .821 >= .800",
        "tau rose at 1 of 6 steps; why it stayed: 5 x margin too small",
        "the latest, step 6: tau .450 stays: margin .050 < .100 (short by .050)",
        "1 steps were skipped, loss or gradient not finite: 2",
        "6 of 24 groups had no spread and were dropped",
        "25.00% of all sampled answers could not be read",
    ):
        assert words in made.text
    assert made.row("--schedule") == {"in config.json": "medloc label=raw"}
    assert made.row("version of torch") == {"in config.json": "2.0"} and made.row("git")["in config.json"] == "abc"
    *files, confusion = made.images
    assert [alt for alt, _ in files] == ["sheet-000000.png", "sheet-000006.png", "overlay-000001.png"]
    assert all(data == (tmp_path / "run" / alt).read_bytes() for alt, data in files)  # small enough: as they are
    assert confusion[0].startswith("confusion of d-label") and Image.open(io.BytesIO(confusion[1])).width > 100


def test_each_dataset_has_its_line_with_its_share(tmp_path, page):
    made = page(make(tmp_path / "run", made=rows(keys=("/a/box", "/b/label"))))
    assert made.row("a/box") == {"u": "0.200 → 0.500", "share of |A|": "0.750 → 0.750"}
    assert made.row("b/label") == {"u": "0.100 → 0.250", "share of |A|": "0.250 → 0.250"}
    assert "What the schedule decided: run a/box" in made.text and "What the schedule decided: run b/label" in made.text


def test_a_supervised_run_has_no_history_and_no_schedule(tmp_path, page):
    out = make(tmp_path / "run", made=[{"step": step, "loss": 1.0} for step in range(1, STEPS + 1)])
    evaluation = json.loads((out / "eval.json").read_text())
    (out / "eval.json").write_text(json.dumps({"start": evaluation["start"], "final": evaluation["final"]}))
    made = page(out)
    assert made.row("final")["accuracy"] == "0.625 ± 0.013" and "There is none in metrics.jsonl." in made.text
    assert "Training by dataset" not in made.text


def test_all_that_comes_from_data_is_escaped(tmp_path, page):
    odd = rows()
    odd[-1]["decision"] = f"raw, {NASTY}"
    out = make(tmp_path / "a<b>&\"'c", NASTY, {"prompt": NASTY, "skip_bad": 9, "data": "x" * 5000}, odd)
    (out / "step-000006").mkdir()
    (out / "step-000006" / "trainer.json").write_text(json.dumps({"bad": {"a:1": f"a:1: {NASTY}"}}))
    made = page(out)  # which has read it without a script, an attribute of it, or an unclosed element
    shown = NASTY.translate({0x202E: 0xFFFD, 0: 0xFFFD})
    assert made.row("--prompt") == {"in config.json": shown} and made.row(shown)["n"] == "64 → 64"
    assert f"raw, {shown}" in made.text and f"a:1: {shown}" in made.text and "1 records were left out" in made.text
    assert made.row("--data")["in config.json"] == "x" * 1000 + " ... (5000 characters)"
    assert "Report of a<b>&\"'c" in made.text


def test_a_page_is_below_3_mb_and_says_what_that_took(tmp_path, page):
    out = make(tmp_path / "run")
    noise(500, 450).save(
        out / "overlay-000002.png"
    )  # nothing compresses its 675 kB, and four are above the page's 2 MB
    for i in range(3, 30):
        shutil.copy(out / "overlay-000002.png", out / f"overlay-{i:06d}.png")
    made = page(out)
    assert 2_000_000 < len(made.bytes) < report.MOST
    assert "overlay-*.png: 4 of 29 are shown here" in made.text
    shown = {alt.partition(",")[0]: (alt, data) for alt, data in made.images if alt.startswith("overlay")}
    assert list(shown) == [f"overlay-{i:06d}.png" for i in (1, 10, 19, 29)]
    marked = [alt for alt, data in shown.values() if data != (out / alt.partition(",")[0]).read_bytes()]
    assert marked == ["overlay-000010.png, here in 256 colours and at 100 % of its size, for a page below 3 MB"]


def test_pictures_that_do_not_fit_are_scaled_until_they_do():
    pictures = [report.Picture(report.png(noise(20 * k, 10 * k)), "p") for k in (8, 1, 6, 4, 2)]
    small = pictures[1].data
    report.fit(pictures, 20_000)
    assert sum(len(one.data) for one in pictures) <= 20_000 and pictures[1].data == small
    assert [one.caption == "p" for one in pictures] == [False, True, False, False, True]
    for one, k in zip(pictures, (8, 1, 6, 4, 2), strict=True):
        percent = int((re.search(r"(\d+) %", one.caption) or [0, 100])[1])
        assert Image.open(io.BytesIO(one.data)).size == (20 * k * percent // 100, 10 * k * percent // 100)


def strip(out: Path, *names: str) -> None:
    for name in names:
        (out / name).unlink()


FIRST = json.dumps(rows()[0]) + "\n"
BROKEN = {  # file, what it holds instead (None: it is gone), what the page says, whether the run counts as finished
    "metrics gone": ("metrics.jsonl", None, "metrics.jsonl does not exist: name a folder", False),
    "no step": ("metrics.jsonl", "", "has no whole line: wait for the end of the run's first step", False),
    "cut off": ("metrics.jsonl", FIRST + '{"st', "metrics.jsonl:2: cut off, left out", False),
    "stopped": ("metrics.jsonl", FIRST, "Not at its end: 1 of 6 steps are in metrics.jsonl", False),
    "config gone": ("config.json", None, "Not at its end: 6 of an unknown number of steps", False),
    "flags odd": ("config.json", '{"arguments": [1]}', "field 'arguments' is not as train_grpo.py writes it", False),
    "versions odd": ("config.json", '{"arguments": {}, "versions": 1}', "field 'versions' is not as", False),
    "eval gone": ("eval.json", None, "There is no evaluation yet.", True),
    "eval cut off": ("eval.json", '{"start": ', "eval.json: is not valid JSON", True),
    "eval odd": ("eval.json", '{"start": [1]}', "eval.json is not as train_grpo.py writes it (", True),
    "no overlay": ("overlay-000001.png", None, "overlay-*.png: there is none", True),
    "half an overlay": ("overlay-000001.png", "\x89PNG", "overlay-000001.png cannot be read (", True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_shown_for_what_it_is(tmp_path, page, name):
    file, content, words, finished = BROKEN[name]
    out = make(tmp_path / "run")
    (out / file).unlink() if content is None else (out / file).write_text(content, encoding="latin-1")
    made = page(out)
    assert words in made.text
    assert ("Ran to its end" in made.text) == finished
    assert ("0.625 ± 0.013" in made.text) == ("eval" not in name)  # the rest is there all the same


def test_a_run_that_stopped_has_its_sentence_and_its_checkpoint(tmp_path, page):
    out = make(tmp_path / "run-.5", made=rows(2))
    (tmp_path / "run-.5.log").write_text("medloc:  10%\rmedloc:  33%\nerror: disk <full>; free it\n")
    (out / "step-000002").mkdir()
    (out / ".lock").write_text("process 7 on x\n")
    made = page(out)
    said = (
        f"Not at its end: 2 of 6 steps are in metrics.jsonl. It still runs, or was killed: {out}/.lock, process 7 on x"
    )
    said += '. Its last words: "error: disk <full>; free it". step-000002 is there for --resume.'
    assert said in made.text


@pytest.mark.skipif(find_spec("matplotlib") is None, reason='needs matplotlib: pip install -e ".[plot]"')
def test_two_runs_share_curves_and_a_table_of_what_differs(tmp_path, monkeypatch, capsys):
    a = make(tmp_path / "a" / "run")
    b = make(tmp_path / "b" / "run", flags={"lr": 2e-4, "beta": 0.1}, made=rows(4))
    for part in (evaluation := json.loads((b / "eval.json").read_text()))["history"]:
        part["accuracy"] = 0.75
    (b / "eval.json").write_text(json.dumps(evaluation))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, a, b) == 0 and capsys.readouterr().out == "report.html\n"
    made = Page(tmp_path / "report.html")
    head, *lines = made.tables[0]
    assert head == ["", "a/run", "b/run"]
    figures = [["steps done", "6", "4"], ["evaluated", "step 6", "step 6"]]
    figures += [["accuracy", "0.625 ± 0.013", "0.750 ± 0.013"], ["n", "64", "64"], ["parse_failures", "3", "3"]]
    assert lines == [*figures, ["--lr", "0.0001", "0.0002"], ["--beta", "-", "0.1"]]
    assert made.images[0][0] == "curves of a/run, b/run"
    assert Image.open(io.BytesIO(made.images[0][1])).size == (1400, 1300)
    assert [alt for alt, _ in made.images].count("sheet-000006.png") == 2


def test_what_is_no_run_ends_it_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "empty").mkdir()
    run, checkpoint = make(tmp_path / "run"), tmp_path / "step-000006"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    for arguments, words in (
        ([tmp_path / "empty"], "empty holds no run: name a folder"),
        ([tmp_path / "nowhere"], "nowhere holds no run: name a folder"),
        ([checkpoint], "step-000006 holds no run: name a folder"),
        ([run, run], "is named twice"),
        ([run, "--out", tmp_path / "no" / "page.html"], "page.html: No such file or directory"),
    ):
        assert command(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert command(monkeypatch, run) == 0 and (run / "report.html").is_file()


@pytest.mark.skipif(find_spec("PyQt6") is None, reason="needs a browser: pip install PyQt6-WebEngine")
def test_a_browser_shows_its_pictures(tmp_path, page):
    page(run := make(tmp_path / "run"))
    shot = tmp_path / "shot.png"
    subprocess.run(
        [sys.executable, Path(__file__).with_name("browser.py"), run / "page.html", shot], check=True, timeout=120
    )
    colours = {colour for _, colour in Image.open(shot).convert("RGB").getcolors(2**20)}
    assert (12, 200, 99) in colours  # the overlay's: the page's own policy lets data: pictures in
