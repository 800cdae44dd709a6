"""What a resumed run finds in --out, changed by hand, by a tool, by a bad disk or by somebody who means harm: one
sentence that names file and field. Nothing hangs, and nothing is taken that no run can have written."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from programs import tiny_folder, tiny_trained
from safetensors.torch import load_file, save_file

import flags
import ranks
from config import read_saved
from errors import InputError
from model import Policy
from rewards import Schedules
from runtime import checkpoint, state
from weights import load_policy

RESULT = dict.fromkeys(("miou", "miou_standard_error", "acc@0.5", "acc@0.8", "pmap"), 0.5)
RESULT |= {"n": 4, "parse_failures": 0, "task": "box"}
KEY = ("mine", "box")
DEEP = "[" * 50_000 + "]" * 50_000


def schedules(name: str = "medloc") -> Schedules:
    return Schedules([f"{name}:window=2"], [KEY], 9)


def schedule_state(name: str = "medloc", **changes) -> list[dict]:
    made = schedules(name)
    made.observe({KEY: [[0.2, 0.9]]})
    (saved,) = json.loads(json.dumps(made.state_dict()))
    return [saved | changes]


STATE = {
    "schedule": schedule_state(),
    "bad_in_a_row": 0,
    "drawn": 3,
    "bad": {"train.jsonl:4": "no picture"},
    "evaluation": {"start": RESULT, "final": None, "history": [{"step": 1} | RESULT]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of one step of two prompts."""
    made = tiny_trained(tiny_folder(tmp_path_factory.mktemp("tiny")))
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 1, *made, STATE)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


def sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert text.isprintable() and len(text) < 900 and all(word in text for word in words), text


def reseal(folder: Path, **changes) -> None:
    """A manifest whose sums fit, with these changes to its list."""
    files = {file.name: checkpoint.stamp(file) for file in sorted(folder.iterdir()) if file.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "files": files | changes}))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------ manifest


def listing(change):
    """A change of the manifest's list of files."""

    def made(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        change(files)
        edit(folder / "manifest.json", files=files)

    return made


def replaced(name: str, how):
    """In place of a file stands something else, and the manifest is as it was."""

    def made(folder: Path) -> None:
        (folder / name).rename(folder.parent / "kept")
        how(folder / name, folder.parent / "kept")

    return made


def text(content: str | bytes):
    return lambda folder: (folder / "manifest.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def more(name: str, content: str = "{}"):
    return lambda folder: (folder / name).write_text(content)


MANIFESTS = {
    "lists nothing": (listing(dict.clear), "does not list config.json"),
    "no weights": (listing(lambda files: files.pop("model.safetensors")), "does not list model.safetensors"),
    "no moments": (listing(lambda files: files.pop("trainer.safetensors")), "does not list trainer.safetensors"),
    "no state": (listing(lambda files: files.pop("trainer.json")), "does not list trainer.json"),
    "a file that is not in it": (more("chat_template.json"), "chat_template.json: was not written with"),
    "a list of shards of somebody's": (more("model.safetensors.index.json"), "index.json: was not written with"),
    "an escape for a name": (more("a\x1b[31m"), r"a\x1b[31m: was not written with"),
    "a device": (
        listing(lambda files: files.update({"/dev/zero": {"bytes": 0, "crc32": "0"}})),
        "/dev/zero is no name",
    ),
    "a way out": (listing(lambda files: files.update({"../../etc/passwd": {}})), "../../etc/passwd is no name"),
    "dots": (listing(lambda files: files.update({"..": {}})), ".. is no name"),
    "no name": (listing(lambda files: files.update({"": {}})), " is no name"),
    "NUL": (listing(lambda files: files.update({"a\0": {}})), r"a\x00 is no name"),
    "a terminal's title": (listing(lambda files: files.update({"\x1b]0;x\a": {}})), r"\x1b]0;x\x07 is no name"),
    "a name of a megabyte": (listing(lambda files: files.update({"/" * 10**6: {}})), "is no name"),
    "no sum": (listing(lambda files: files.update({"config.json": None})), "config.json has None for its size"),
    "half a sum": (listing(lambda files: files.update({"config.json": {"bytes": 3}})), "config.json has {'bytes': 3}"),
    "a size with a point": (
        listing(lambda files: files["config.json"].update(bytes=1.5)),
        "config.json has {'bytes': 1.5",
    ),
    "a size that is true": (
        listing(lambda files: files["config.json"].update(bytes=True)),
        "config.json has {'bytes': True",
    ),
    "a size below 0": (listing(lambda files: files["config.json"].update(bytes=-1)), "config.json: is damaged"),
    "a size without end": (
        listing(lambda files: files["config.json"].update(bytes=10**4000)),
        "config.json: is damaged",
    ),
    "a sum that is a number": (listing(lambda files: files["config.json"].update(crc32=7)), "config.json: is damaged"),
    "a file that is gone": (
        replaced("config.json", lambda path, kept: None),
        "config.json: cannot be read (No such file",
    ),
    "a pipe": (replaced("config.json", lambda path, kept: os.mkfifo(path)), "config.json: is not a file"),
    "a folder": (replaced("model.safetensors", lambda path, kept: path.mkdir()), "model.safetensors: is not a file"),
    "a link out": (replaced("config.json", lambda path, kept: path.symlink_to(kept)), "config.json: is not a file"),
    "a link to a device": (
        replaced("config.json", lambda path, kept: path.symlink_to("/dev/zero")),
        "config.json: is not a file",
    ),
    "a manifest that is a pipe": (
        replaced("manifest.json", lambda path, kept: os.mkfifo(path)),
        "manifest.json: is not a file",
    ),
    "a manifest without end": (
        replaced("manifest.json", lambda path, kept: path.symlink_to("/dev/zero")),
        "manifest.json: is not a file",
    ),
    "too deep": (text(DEEP), "manifest.json: is not valid JSON"),
    "not UTF-8": (text(b'{"format": "\xff"}'), "manifest.json: cannot be read"),
    "a number": (text("3"), "manifest.json: cannot be read"),
    "a format that is true": (lambda folder: edit(folder / "manifest.json", format=True), "format True is not 4"),
    "a format that draws": (lambda folder: edit(folder / "manifest.json", format="\x1b[2J" * 999), r"\x1b[2J is not 4"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(name, folder):
    change, words = MANIFESTS[name]
    change(folder)
    with pytest.raises(InputError) as error:
        checkpoint.verify(folder)
    sentence(error, words, "step-000001")


def test_a_checkpoint_as_it_was_written_is_taken(folder):
    checkpoint.verify(folder)
    (folder / ".DS_Store").write_text("a desktop's, which nobody reads")
    reseal(folder)
    checkpoint.verify(folder)
    (folder.parent / "step-٠٠٠٠٠٢").mkdir()  # digits, but not ours
    assert checkpoint.checkpoints(folder.parent) == [folder]


def test_tidying_removes_what_is_odd_and_follows_no_link(folder):
    out, kept = folder.parent, folder.parent / "kept"
    kept.mkdir()
    (kept / "a").write_text("somebody's")
    (out / ".partial-step-000002").symlink_to(kept)
    (out / ".old-step-000001").write_text("no folder")
    os.mkfifo(out / ".partial-eval.json")
    checkpoint.tidy(out)
    assert sorted(path.name for path in out.iterdir()) == ["kept", "step-000001"] and (kept / "a").exists()


# --------------------------------------------------------------------------------------------------------------- state


@pytest.fixture(scope="module")
def policy(saved) -> Policy:
    return load_policy(saved)


def take(folder: Path, policy: Policy) -> None:
    """As a run does, with --batch-size 2 and --inner-steps 1."""
    made, optimizer = schedules(), torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)
    checkpoint.verify(folder)
    try:
        found = checkpoint.load(folder, policy, optimizer)
    except InputError:
        assert not optimizer.state
        raise
    state.check_state(folder, found, 2, 1)
    state.check_schedules(folder, found, made.of)
    made.load_state_dict(found["schedule"])


def result(**changes) -> dict:
    return {"start": RESULT, "final": None, "history": [{"step": 1} | RESULT]} | changes


STATES = [
    ("step", -1), ("step", "2"), ("step", 2), ("step", True), ("step", 1.0), ("step", 10**400), ("step", None),
    ("optimizer_steps", "x"), ("optimizer_steps", -1), ("optimizer_steps", 2), ("optimizer_steps", 10**400),
    ("optimizer_steps", math.nan), ("optimizer_steps", True),
    ("drawn", -5), ("drawn", 1), ("drawn", 10**30), ("drawn", "3"), ("drawn", 3.0), ("drawn", [3]),
    ("bad_in_a_row", -1), ("bad_in_a_row", 2), ("bad_in_a_row", None), ("bad_in_a_row", 0.5),
    ("bad", [1]), ("bad", {"a": 1}), ("bad", {"a": "\x1b[2J"}), ("bad", {"a": "\ud800"}), ("bad", None),
    ("evaluation", None), ("evaluation", []), ("evaluation", {}), ("evaluation", result(start=1)),
    ("evaluation", result(start={"miou": 1})), ("evaluation", result(final=RESULT | {"miou": "high"})),
    ("evaluation", result(history=None)), ("evaluation", result(history=[RESULT])),
    ("evaluation", result(history=[{"step": 2} | RESULT])), ("evaluation", result(history=[{"step": 1} | RESULT] * 2)),
    ("evaluation", result(exact_sft="good")), ("evaluation", result(start=RESULT | {"n": 10**400})),
    ("schedule", {}), ("schedule", None), ("schedule", "medloc"), ("schedule", schedule_state(step=2)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), STATES, ids=lambda value: f"{value!r:.40}")
def test_a_state_that_no_run_can_have_saved_is_refused_by_field(field, value, folder, policy):
    edit(folder / "trainer.json", **{field: value})
    reseal(folder)
    with pytest.raises(InputError) as error:
        take(folder, policy)
    sentence(
        error, "step-000001/trainer.json: ", f"field '{field}' must be ", "--resume goes on from the checkpoint be"
    )


@pytest.mark.parametrize("field", ["step", "optimizer_steps", *STATE])
def test_a_state_without_a_field_is_refused_by_its_name(field, folder, policy):
    state = json.loads((folder / "trainer.json").read_text())
    del state[field]
    (folder / "trainer.json").write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(InputError) as error:
        take(folder, policy)
    sentence(error, "step-000001/trainer.json: ", f"field '{field}' must be ", "it is missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "is no JSON object"), ("7", "is no JSON object"), (DEEP, "is not valid JSON"), ('{"step": 1', "not valid")],
    ids=["list", "number", "deep", "cut off"],
)
def test_a_state_that_is_no_object_is_refused(content, words, folder, policy):
    (folder / "trainer.json").write_text(content)
    reseal(folder)
    with pytest.raises(InputError) as error:
        take(folder, policy)
    sentence(error, "step-000001/trainer.json: ", words)


def test_a_state_as_it_was_saved_is_taken(folder, policy):
    take(folder, policy)
    reseal(folder)
    take(folder, policy)


SCHEDULES = [
    ("step", -1), ("step", "1"), ("step", 1.0), ("step", True), ("dataset", "another"), ("task", None),
    ("tau", None), ("tau", "0.3"), ("tau", 7.0), ("tau", math.nan), ("tau", True), ("tau", 10**400), ("window", None),
    ("window", {}), ("window", [1]), ("window", [[0.3]]), ("window", [[0.3, []]]), ("window", [[0.3, [1.5]]]),
    ("window", [[0.3, [math.nan]]]), ("window", [[0.3, ["1"]]]), ("window", [[None, [0.5]]]),
    ("window", [[0.3, 0.5]]), ("window", [[0.3, [0.5]]] * 3), ("window", "ab"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SCHEDULES, ids=lambda value: f"{value!r:.40}")
def test_a_schedule_that_no_run_can_have_saved_is_refused(field, value, folder, policy):
    changed = schedule_state(**{field: value})
    without = [{name: value for name, value in changed[0].items() if name != field}]
    for schedule in (changed, without, changed * 2):
        edit(folder / "trainer.json", schedule=schedule)
        reseal(folder)
        with pytest.raises(InputError) as error:
            take(folder, policy)
        sentence(error, "step-000001/trainer.json: field ", "--resume goes on from the checkpoint be")


def test_a_schedule_without_a_threshold_has_none_in_its_state(folder):
    found = {"schedule": schedule_state("raw")}
    state.check_schedules(folder, found, schedules("raw").of)
    found["schedule"][0]["tau"] = 0.5
    with pytest.raises(InputError, match="field 'tau' must be null, it is 0.5"):
        state.check_schedules(folder, found, schedules("raw").of)


MOMENT = "exp_avg.model.norm.weight"


def moments(**changes):
    """Another tensor in place of one: what is to be made of it."""

    def made(file: Path) -> None:
        tensors = load_file(file)
        for how in changes.values():
            how(tensors)
        save_file(tensors, file)

    return made


def as_kind(dtype: torch.dtype):
    return moments(how=lambda tensors: tensors.update({MOMENT: tensors[MOMENT].to(dtype)}))


def one_is(value: float, key: str = MOMENT):
    def made(tensors: dict) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key][3] = value

    return moments(how=made)


SQUARES = MOMENT.replace("avg", "avg_sq")
TENSORS = {
    "whole numbers": (as_kind(torch.int64), f"{MOMENT} holds torch.int64, it was saved as torch.float32"),
    "double": (as_kind(torch.float64), f"{MOMENT} holds torch.float64"),
    "half": (as_kind(torch.bfloat16), f"{MOMENT} holds torch.bfloat16"),
    "complex": (as_kind(torch.complex64), f"{MOMENT} holds torch.complex64"),
    "truth": (as_kind(torch.bool), f"{MOMENT} holds torch.bool"),
    "NaN": (one_is(math.nan), f"{MOMENT} holds numbers that are not finite"),
    "infinite": (one_is(-math.inf), f"{MOMENT} holds numbers that are not finite"),
    "a square below 0": (one_is(-1.0, SQUARES), f"{SQUARES} holds -1, a mean of squares is not below 0"),
    "another shape": (
        moments(how=lambda tensors: tensors.update({MOMENT: torch.zeros(3)})),
        f"{MOMENT} has shape (3,), this policy asks for (64,)",
    ),
    "no shape": (
        moments(how=lambda tensors: tensors.update({"x.adapter.a": torch.tensor(1.0)})),
        "x.adapter.a has shape (), this policy asks for None",
    ),
    "an escape for a name": (
        moments(how=lambda tensors: tensors.update({"a\x1b[2J": torch.zeros(1)})),
        r"a\x1b[2J has shape (1,)",
    ),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "cannot be read (Error while deserializing"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read (Error while deserializing"),
    "a header without end": (lambda file: file.write_bytes(b"\xff" * 16), "cannot be read (Error while deserializing"),
    "another kind of file": (lambda file: file.write_text("{}" * 99), "cannot be read (Error while deserializing"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_moments_that_adamw_cannot_have_left_are_refused_by_name(name, folder, policy):
    change, words = TENSORS[name]
    change(folder / "trainer.safetensors")
    reseal(folder)
    with pytest.raises(InputError) as error:
        take(folder, policy)
    sentence(error, "step-000001/trainer.safetensors: ", words)


# ---------------------------------------------------------------------------------------------------------- saved flags

ARGUMENTS = [
    ("recipe", "zzz"), ("schedule", "medloc"), ("schedule", []), ("schedule", [1]), ("log", "zzz"), ("clip", [0.2]),
    ("clip", [0.2, True]), ("clip", {}), ("clip", [0.5, 10**400]), ("lr", True), ("lr", "1"), ("lr", math.nan),
    ("lr", 10**400), ("steps", 10**30), ("group_size", 10**30), ("seed", 2**63), ("seed", -1), ("batch_size", 10**30),
    ("max_tokens", 10**30), ("lora_rank", 10**30), ("workers", 10**30), ("steps", 1e3), ("shard", 1),
    ("checkpointing", "yes"), ("memory", 24), ("model", "a\0b"), ("data", "\ud800"), ("val", ["a"]),
    ("device", "cpu\x1b]0;x\a"), ("advantage", "mean"), ("prompt", "no placeholder"), ("prompt", 3), ("zzz", 1),
    ("\x1b[2J", 1),
]  # fmt: skip
ROWS_OF_FLAGS = {name: flag.default for name, flag in flags.FLAGS.items() if name not in flags.SWITCHES}
ROWS_OF_FLAGS |= flags.RECIPES["nano"] | {"recipe": "nano", "schedule": ["medloc"], "clip": [0.2, 0.2]}


@pytest.mark.parametrize(("name", "value"), ARGUMENTS, ids=lambda value: f"{value!r:.40}")
def test_a_saved_flag_that_no_command_line_can_have_given_is_refused(name, value, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"arguments": ROWS_OF_FLAGS}))
    assert read_saved(file, flags.FLAGS)["model"] == "nano"
    file.write_text(json.dumps({"arguments": ROWS_OF_FLAGS | {name: value}}))
    with pytest.raises(InputError) as error:
        read_saved(file, flags.FLAGS)
    sentence(error, f"{file}: ")
    assert "is no flag" in str(error.value) or "--" + name.replace("_", "-") in str(error.value)


def test_a_config_of_another_version_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"arguments": {"model": "nano", "tau_start": 0.3}}))
    with pytest.raises(InputError, match="another version wrote it"):
        read_saved(file, flags.FLAGS)


@pytest.mark.parametrize("content", ["[]", "7", "null", DEEP, '{"arguments": ', '{"arguments": [1]}'], ids=range(6))
def test_a_saved_config_of_another_kind_is_refused(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        read_saved(file, flags.FLAGS)
    sentence(error, f"{file}: ", "restore it, or start a new run")


# -------------------------------------------------------------------------------------------------------------- metrics


def rows(*steps: int) -> bytes:
    return b"".join(b'{"step": %d}\n' % step for step in steps)


ROWS = {  # of a run with a checkpoint of step 20
    "whole": (rows(*range(1, 21)), None),
    "and more": (rows(*range(1, 27)), None),
    "a last line that was cut off": (rows(*range(1, 21)) + b'{"step": \xff', None),
    "too few": (rows(*range(1, 15)), "has no row of steps 15 to 20, which step-000020 has; "),
    "none": (b"", "has no row of steps 1 to 20, which"),
    "no file": (None, "has no row of steps 1 to 20, which"),
    "holes": (rows(1, 2, 4, 5, *range(8, 21)), "has no row of steps 3, 6 to 7, which"),
    "many holes": (rows(*range(2, 21, 2)), "has no row of steps 1, 3, 5 and 7 more gaps, which"),
    "twice": (rows(*range(1, 21), 20, 19), "has 2 rows of steps that have another one and rows out of order; "),
    "out of order": (rows(2, 1, *range(3, 21)), "has rows out of order; "),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_lost_are_spoken_of(name, tmp_path, capsys):
    content, words = ROWS[name]
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_bytes(content)
    checkpoint.keep_until(file, 20)  # samples.jsonl has no row of most steps
    assert capsys.readouterr().out == ""
    if content is not None:
        file.write_bytes(content)
    checkpoint.keep_until(file, 20, each=True)
    said = capsys.readouterr().out
    assert words is None and said == "" or f"warning: {file} {words}" in said and said.count("\n") == 1
    if content is not None:
        kept = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert all(step <= 20 for step in kept) and len(kept) == sum(
            f'"step": {n}}}'.encode() in content for n in set(kept)
        ) + (2 if name == "twice" else 0)
    assert [path.name for path in tmp_path.iterdir()] == (["metrics.jsonl"] if content is not None else [])


LINES = {
    "not UTF-8": b'{"step": 2, "decision": "\xff"}\n',
    "too deep": b"[" * 50_000 + b"\n",
    "zeros, as after a power cut": b"\0" * 40 + b"\n",
    "a list": b"[2]\n",
    "no step": b"{}\n",
    "a step with a point": b'{"step": 2.0}\n',
    "a step that is true": b'{"step": true}\n',
    "step 0": b'{"step": 0}\n',
    "a step of a text": b'{"step": "2"}\n',
    "NaN": b'{"step": NaN}\n',
    "an empty line": b"\n",
    "a number of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_none_of_the_run_is_named(name, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(rows(1) + LINES[name] + rows(3))
    with pytest.raises(InputError, match="metrics.jsonl:2: is no line of this run's; delete it"):
        checkpoint.keep_until(file, 20, each=True)
    assert file.read_bytes() == rows(1) + LINES[name] + rows(3)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    file = tmp_path / "metrics.jsonl"
    made = {"pipe": os.mkfifo, "folder": os.mkdir}
    made.get(kind, lambda path: path.symlink_to("/dev/zero" if kind == "device" else "not-there"))(file)
    with pytest.raises(InputError, match="metrics.jsonl: is not a file; remove it"):
        checkpoint.keep_until(file, 20)


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_FILE", 100)
    (tmp_path / "metrics.jsonl").write_bytes(rows(1) + b"[" * 1000)
    with pytest.raises(InputError, match="metrics.jsonl:2: is no line of this run's"):
        checkpoint.keep_until(tmp_path / "metrics.jsonl", 20)


# --------------------------------------------------------------------------------------------------------------- saving

FREE, MEND = "free the disk, then go on by --resume", "mend that, then go on by --resume"
FAILURES = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), FREE),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), FREE),
    "full, says safetensors": (checkpoint.SafetensorError("I/O error: No space left (os error 28)"), FREE),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), MEND),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied"), MEND),
    "read only": (OSError(errno.EROFS, "Read-only file system"), MEND),
    "broken": (OSError(errno.EIO, "Input/output error"), MEND),
    "broken, says safetensors": (checkpoint.SafetensorError("I/O error: Input/output error (os error 5)"), MEND),
    "no number": (checkpoint.SafetensorError("it is as it is\nand so on"), MEND),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_save_that_fails_says_of_what(name, tmp_path, monkeypatch):
    failure, way = FAILURES[name]

    def fail(*_) -> None:
        raise failure

    monkeypatch.setattr(checkpoint, "_write", fail)
    with pytest.raises(InputError) as error:
        checkpoint.save(tmp_path, 7, None, None, None, {})
    sentence(error, "step-000007 cannot be written (", way)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_is_gone_under_the_run_is_not_made_again(rank, saved, tmp_path, monkeypatch):
    """Of a sharded policy, the other ranks have done their part all the same."""
    monkeypatch.setattr(ranks, "rank", rank)
    made, called, write = tiny_trained(saved, 0), [], checkpoint.save_policy
    monkeypatch.setattr(checkpoint, "save_policy", lambda *arguments: called.append(1) or write(*arguments))
    if rank:
        checkpoint.save(tmp_path / "out", 1, *made, {})
    else:
        with pytest.raises(InputError) as error:
            checkpoint.save(tmp_path / "out", 1, *made, {})
        sentence(error, "out was removed or renamed under the run); mend that, then go on by --resume")
    assert called and not list(tmp_path.iterdir())
