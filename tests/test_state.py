"""What a resumed run finds in --out, changed by hand, by a tool, by a bad disk or by somebody who means harm: one
sentence that names file and field. Nothing hangs, and nothing is taken that no run can have written."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

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


def groups(by_key: dict) -> SimpleNamespace:
    """A step's scores, as far as schedules look at them."""
    return SimpleNamespace(by_key=lambda: by_key)


def schedules(name: str = "medloc") -> Schedules:
    return Schedules([f"{name}:window=2"], [KEY], 9)


def schedule_state(name: str = "medloc", **changes) -> list[dict]:
    made = schedules(name)
    made.observe(groups({KEY: [[0.2, 0.9]]}))
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


# ------------------------------------------------------------------------------------------------------------ manifest


def listing(**entries):
    """The manifest lists these too, or in their places; "gone": no longer."""

    def made(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"] | entries
        edit(folder / "manifest.json", files={name: entry for name, entry in files.items() if entry != "gone"})

    return made


def stamped(**changes):
    return lambda folder: listing(**{"config.json": checkpoint.stamp(folder / "config.json") | changes})(folder)


def replaced(name: str, how):
    """In place of a file stands something else, and the manifest is as it was."""

    def made(folder: Path) -> None:
        (folder / name).rename(folder.parent / "kept")
        how(folder / name)

    return made


def content(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


MANIFESTS = {
    "lists nothing": (lambda folder: edit(folder / "manifest.json", files={}), "does not list config.json"),
    "no weights": (listing(**{"model.safetensors": "gone"}), "does not list model.safetensors"),
    "no moments": (listing(**{"trainer.safetensors": "gone"}), "does not list trainer.safetensors"),
    "no state": (listing(**{"trainer.json": "gone"}), "does not list trainer.json"),
    "somebody's shards": (content("model.safetensors.index.json", b"{}"), "index.json: was not written with"),
    "an escape for a name": (content("a\x1b[31m", b""), r"a\x1b[31m: was not written with"),
    "a device": (listing(**{"/dev/zero": {"bytes": 0, "crc32": "0"}}), "/dev/zero is no name"),
    "a way out": (listing(**{"../../etc/passwd": {}}), "../../etc/passwd is no name"),
    "dots": (listing(**{"..": {}}), ".. is no name"),
    "no name": (listing(**{"": {}}), " is no name"),
    "NUL": (listing(**{"a\0": {}}), r"a\x00 is no name"),
    "a name of a megabyte": (listing(**{"/" * 10**6: {}}), "is no name"),
    "no sum": (listing(**{"config.json": None}), "config.json has None for its size"),
    "half a sum": (listing(**{"config.json": {"bytes": 3}}), "config.json has {'bytes': 3}"),
    "a size with a point": (stamped(bytes=1.5), "config.json has {'bytes': 1.5"),
    "a size that is true": (stamped(bytes=True), "config.json has {'bytes': True"),
    "a size without end": (stamped(bytes=10**4000), "config.json: is damaged"),
    "a sum that is a number": (stamped(crc32=7), "config.json: is damaged"),
    "gone": (replaced("config.json", lambda path: None), "config.json: cannot be read (No such file"),
    "a pipe": (replaced("config.json", os.mkfifo), "config.json: is not a file"),
    "a folder": (replaced("model.safetensors", os.mkdir), "model.safetensors: is not a file"),
    "a link": (replaced("config.json", lambda path: path.symlink_to("../kept")), "config.json: is not a file"),
    "a link to a device": (replaced("config.json", to_zero), "config.json: is not a file"),
    "a manifest that is a pipe": (replaced("manifest.json", os.mkfifo), "manifest.json: is not a file"),
    "a manifest without end": (replaced("manifest.json", to_zero), "manifest.json: is not a file"),
    "too deep": (content("manifest.json", DEEP.encode()), "manifest.json: is not valid JSON"),
    "not UTF-8": (content("manifest.json", b'{"format": "\xff"}'), "manifest.json: cannot be read"),
    "a number": (content("manifest.json", b"3"), "manifest.json: cannot be read"),
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


def test_a_checkpoint_as_it_was_written_is_taken(folder, policy):
    take(folder, policy)
    (folder / ".DS_Store").write_text("a desktop's, which nobody reads")
    reseal(folder)
    take(folder, policy)
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


def result(**changes) -> dict:
    return {"start": RESULT, "final": None, "history": [{"step": 1} | RESULT]} | changes


def refused(folder: Path, policy: Policy, *words: str) -> None:
    reseal(folder)
    with pytest.raises(InputError) as error:
        take(folder, policy)
    sentence(error, *words)


BE = "--resume goes on from the checkpoint be"
STATES = {  # of all kinds of nonsense, what each field could take for its own
    "step": [-1, "2", 2, True, 1.0, 10**400, None],
    "optimizer_steps": ["x", -1, 2, 10**400, math.nan, True],
    "drawn": [-5, 1, 10**30, "3", 3.0, [3]],
    "bad_in_a_row": [-1, 2, None, 0.5],
    "bad": [[1], {"a": 1}, {"a": "\x1b[2J"}, {"a": "\ud800"}, None],
    "evaluation": [None, [], {}, result(start=1), result(start={"miou": 1}), result(exact_sft="good"),
                   result(final=RESULT | {"miou": "high"}), result(history=None), result(history=[RESULT]),
                   result(history=[{"step": 2} | RESULT]), result(history=[{"step": 1} | RESULT] * 2),
                   result(start=RESULT | {"n": 10**400})],
    "schedule": [{}, None, "medloc", schedule_state(step=2), schedule_state() * 2],
}  # fmt: skip


@pytest.mark.parametrize("field", STATES)
def test_a_state_that_no_run_can_have_saved_is_refused_by_field(field, folder, policy):
    saved = json.loads((folder / "trainer.json").read_text())
    for value in STATES[field]:
        (folder / "trainer.json").write_text(json.dumps(saved | {field: value}))
        refused(folder, policy, "step-000001/trainer.json: ", f"field '{field}' must be ", BE)
    del saved[field]
    (folder / "trainer.json").write_text(json.dumps(saved))
    refused(folder, policy, "step-000001/trainer.json: ", f"field '{field}' must be ", "it is missing")


def test_a_state_that_is_no_object_is_refused(folder, policy):
    for text, words in (("[]", "is no JSON object"), (DEEP, "is not valid JSON"), ('{"step": 1', "is not valid JSON")):
        (folder / "trainer.json").write_text(text)
        refused(folder, policy, "step-000001/trainer.json: ", words)


SCHEDULES = {
    "step": [-1, "1", 1.0, True],
    "dataset": ["another"],
    "task": [None],
    "tau": [None, "0.3", 7.0, math.nan, True, 10**400],
    "window": [None, {}, [1], [[0.3]], [[0.3, []]], [[0.3, [1.5]]], [[0.3, [math.nan]]], [[0.3, ["1"]]],
               [[None, [0.5]]], [[0.3, 0.5]], [[0.3, [0.5]]] * 3, "ab"],
}  # fmt: skip


@pytest.mark.parametrize("field", SCHEDULES)
def test_a_schedule_that_no_run_can_have_saved_is_refused(field, folder, policy):
    without = schedule_state()
    del without[0][field]
    for schedule in [without, *(schedule_state(**{field: value}) for value in SCHEDULES[field])]:
        edit(folder / "trainer.json", schedule=schedule)
        refused(folder, policy, "step-000001/trainer.json: field ", BE)


def test_a_schedule_without_a_threshold_has_none_in_its_state(folder):
    found = {"schedule": schedule_state("raw")}
    state.check_schedules(folder, found, schedules("raw").of)
    found["schedule"][0]["tau"] = 0.5
    with pytest.raises(InputError, match="field 'tau' must be null, it is 0.5"):
        state.check_schedules(folder, found, schedules("raw").of)


MOMENT = "exp_avg.model.norm.weight"


SQUARES = MOMENT.replace("avg", "avg_sq")


def moments(how):
    """What is to be made of the tensors: entries that replace theirs."""

    def made(file: Path) -> None:
        tensors = load_file(file)
        save_file(tensors | how(tensors), file)

    return made


def as_kind(dtype: torch.dtype):
    return moments(lambda tensors: {MOMENT: tensors[MOMENT].to(dtype)})


def one_is(value: float, key: str = MOMENT):
    return moments(lambda tensors: {key: tensors[key].index_fill(0, torch.tensor([3]), value)})


TORN = "cannot be read (Error while deserializing"
TENSORS = {
    "whole numbers": (as_kind(torch.int64), f"{MOMENT} holds torch.int64, it was saved as torch.float32"),
    "half": (as_kind(torch.bfloat16), f"{MOMENT} holds torch.bfloat16"),
    "complex": (as_kind(torch.complex64), f"{MOMENT} holds torch.complex64"),
    "NaN": (one_is(math.nan), f"{MOMENT} holds numbers that are not finite"),
    "infinite": (one_is(-math.inf), f"{MOMENT} holds numbers that are not finite"),
    "a square below 0": (one_is(-1.0, SQUARES), f"{SQUARES} holds -1, a mean of squares is not below 0"),
    "another shape": (
        moments(lambda _: {MOMENT: torch.zeros(3)}),
        f"{MOMENT} has shape (3,), this policy asks for (64,)",
    ),
    "no shape": (
        moments(lambda _: {"x.adapter.a": torch.tensor(1.0)}),
        "x.adapter.a has shape (), this policy asks for None",
    ),
    "an escape for a name": (moments(lambda _: {"a\x1b[2J": torch.zeros(1)}), r"a\x1b[2J has shape (1,)"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-9]), TORN),
    "empty": (lambda file: file.write_bytes(b""), TORN),
    "a header without end": (lambda file: file.write_bytes(b"\xff" * 16), TORN),
}


@pytest.mark.parametrize("name", TENSORS)
def test_moments_that_adamw_cannot_have_left_are_refused_by_name(name, folder, policy):
    change, words = TENSORS[name]
    change(folder / "trainer.safetensors")
    refused(folder, policy, "step-000001/trainer.safetensors: ", words)


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


def test_a_saved_flag_that_no_command_line_can_have_given_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"arguments": ROWS_OF_FLAGS}))
    assert read_saved(file, flags.FLAGS)["model"] == "nano"
    for name, value in ARGUMENTS:
        file.write_text(json.dumps({"arguments": ROWS_OF_FLAGS | {name: value}}))
        with pytest.raises(InputError) as error:
            read_saved(file, flags.FLAGS)
        sentence(error, f"{file}: ")
        assert "is no flag" in str(error.value) or "--" + name.replace("_", "-") in str(error.value), (name, value)


def test_a_saved_config_of_another_version_or_kind_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"arguments": {"model": "nano", "tau_start": 0.3}}))
    with pytest.raises(InputError, match="another version wrote it"):
        read_saved(file, flags.FLAGS)
    for text in ("[]", "null", DEEP, '{"arguments": ', '{"arguments": [1]}'):
        file.write_text(text)
        with pytest.raises(InputError) as error:
            read_saved(file, flags.FLAGS)
        sentence(error, f"{file}: ", "restore it, or start a new run")


# -------------------------------------------------------------------------------------------------------------- metrics


def rows(*steps: int) -> bytes:
    return b"".join(b'{"step": %d}\n' % step for step in steps)


ROWS = [  # of a run with a checkpoint of step 20; what is said, and how many rows are kept
    (rows(*range(1, 27)), None, 20),
    (rows(*range(1, 21)) + b'{"step": \xff', None, 20),  # a last line that was cut off
    (rows(*range(1, 15)), "has no row of steps 15 to 20, which step-000020 has; ", 14),
    (b"", "has no row of steps 1 to 20, which", 0),
    (None, "has no row of steps 1 to 20, which", 0),  # no file
    (rows(1, 2, 4, 5, *range(8, 21)), "has no row of steps 3, 6 to 7, which", 17),
    (rows(*range(2, 21, 2)), "has no row of steps 1, 3, 5 and 7 more gaps, which", 10),
    (rows(*range(1, 21), 20, 19), "has 2 rows of steps that have another one and rows out of order; ", 22),
    (rows(2, 1, *range(3, 21)), "has rows out of order; ", 20),
]


def test_rows_that_are_lost_are_spoken_of(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    for content, words, count in ROWS:
        for each in (False, True):  # samples.jsonl has no row of most steps
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            checkpoint.keep_until(file, 20, each=each)
            said = capsys.readouterr().out
            assert f"warning: {file} {words}" in said and said.count("\n") == 1 if each and words else said == ""
            assert [path.name for path in tmp_path.iterdir()] == (["metrics.jsonl"] if content is not None else [])
            kept = [json.loads(line)["step"] for line in file.read_text().splitlines()] if content else []
            assert all(step <= 20 for step in kept) and len(kept) == count


LINES = [  # no UTF-8, too deep, zeros as after a power cut, no object, no step, no whole one, not above 0, too long
    b'{"step": 2, "decision": "\xff"}\n', b"[" * 50_000 + b"\n", b"\0" * 40 + b"\n", b"[2]\n", b"{}\n", b"\n",
    b'{"step": 2.0}\n', b'{"step": true}\n', b'{"step": "2"}\n', b'{"step": NaN}\n', b'{"step": 0}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n",
]  # fmt: skip


def test_a_line_that_is_none_of_the_run_is_named(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    for line in LINES:
        file.write_bytes(rows(1) + line + rows(3))
        with pytest.raises(InputError, match="metrics.jsonl:2: is no line of this run's; delete it"):
            checkpoint.keep_until(file, 20, each=True)
        assert file.read_bytes() == rows(1) + line + rows(3)
    monkeypatch.setattr(checkpoint, "MAX_FILE", 100)  # a line without end is not read whole
    file.write_bytes(rows(1) + b"[" * 1000)
    with pytest.raises(InputError, match="metrics.jsonl:2: is no line of this run's"):
        checkpoint.keep_until(file, 20)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, to_zero, lambda path: path.symlink_to("not-there")])
def test_what_is_no_file_is_not_read(make, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl: is not a file; remove it"):
        checkpoint.keep_until(tmp_path / "metrics.jsonl", 20)


# --------------------------------------------------------------------------------------------------------------- saving

FREE, MEND = "free the disk, then go on by --resume", "mend that, then go on by --resume"
FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), FREE),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), FREE),
    (checkpoint.SafetensorError("I/O error: No space left (os error 28)"), FREE),
    (PermissionError(errno.EACCES, "Permission denied"), MEND),
    (checkpoint.SafetensorError("I/O error: Input/output error (os error 5)"), MEND),
    (checkpoint.SafetensorError("it is as it is\nand so on"), MEND),
]


@pytest.mark.parametrize(("failure", "way"), FAILURES)
def test_a_save_that_fails_says_of_what(failure, way, tmp_path, monkeypatch):
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
