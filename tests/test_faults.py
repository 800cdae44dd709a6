"""Whatever ends a run, --resume goes on exactly: kills at any moment, signals, full disks, restarts by torchrun. And
what is read from a disk runs no code and leads nowhere else."""

# ruff: noqa: F811  fixtures are imported
import ast
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from programs import ROOT, as_main, fork, lines, records, run, tiny_folder, tiny_trained, without_times  # noqa: F401
from test_ranks import torchrun

import config
import errors
import eval as evaluation
import generate
import images
import rollout
import train_grpo
import train_sft
from data import BadRecords, load_jsonl, phantom_samples
from errors import InputError
from images import ImageConfig, Sample
from model import collate
from prepare import vlm_r1
from runtime import checkpoint, lock
from runtime.readers import Readers
from runtime.stream import Stream
from tasks import TASKS

SMALL = "--batch-size 2 --group-size 4 --micro-batch 1 --max-tokens 18 --eval-limit 2 --eval-every 5"
SMALL += " --save-every 2 --workers 0 --schedule medloc:window=4,tau_start=.05 --lr 1e-3 --steps"


def flags(records: Path, out: Path, more: str = "") -> list[str]:
    return ["--data", str(records), "--val", str(records), "--out", str(out), *SMALL.split(), *more.split()]


def start(log: Path, *command) -> subprocess.Popen:
    """A run as a user starts it, in a session of its own as torchrun's are."""
    with open(log, "w") as file:
        said = dict(stdout=file, stderr=file, env=os.environ | {"TRITON_INTERPRET": "0"})
        return subprocess.Popen([sys.executable, *command], start_new_session=True, **said)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def done(out: Path) -> int:
    """Steps that stand in metrics.jsonl."""
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def strike(patch: pytest.MonkeyPatch, where, name: str, n: int) -> list[int]:
    """A signal comes right before its n-th call -> a list that grows by each."""
    calls, called = [], getattr(where, name)

    def struck(*arguments, **named):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(signal.SIGTERM)
        return called(*arguments, **named)

    patch.setattr(where, name, struck)
    return calls


def assert_same_checkpoint(one: Path, other: Path, step: int, evaluated: bool = True) -> None:
    """Byte by byte, but for what the trainer knows of evaluations where one has not been made in the other."""
    manifests = []
    for folder in (one / f"step-{step:06d}", other / f"step-{step:06d}"):
        checkpoint.verify(folder)
        files = json.loads((folder / "manifest.json").read_text())["files"]
        manifests.append({name: stamp for name, stamp in files.items() if evaluated or name != "trainer.json"})
    assert manifests[0] == manifests[1] and {"model.safetensors", "trainer.safetensors"} <= manifests[0].keys()


def assert_same_run(one: Path, other: Path, keep: int | None = None) -> None:
    """The same numbers, and the same last checkpoint byte by byte; nothing lies about that does not belong there."""
    for file in one.glob("*s.jsonl"):  # metrics and samples
        assert without_times(lines(file)) == without_times(lines(other / file.name))
    assert json.loads((one / "eval.json").read_text()) == json.loads((other / "eval.json").read_text())
    assert_same_checkpoint(one, other, done(one))
    assert not list(other.glob(".*")) and (keep is None or len(checkpoint.checkpoints(other)) == keep)


# ------------------------------------------------------------------------------------------------------- inside a save

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}


def killed_save(at: int, save) -> bool:
    """save() in a forked process that ends, as by kill -9, before its at-th call of the file system: True; False if it
    has fewer."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    calls = 0

    def tick(event: str, *_) -> None:
        nonlocal calls
        if event in EVENTS:
            calls += 1
            if calls == at:
                os._exit(9)

    fsync = os.fsync
    os.fsync = lambda opened: (tick("open"), fsync(opened))
    sys.addaudithook(tick)
    try:
        save()
    finally:
        os._exit(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(policy, processor, optimizer) after a step."""
    return tiny_trained(tiny_folder(tmp_path_factory.mktemp("tiny")))


def content(folder: Path) -> tuple[str, str]:
    return (folder / "manifest.json").read_text(), (folder / "trainer.json").read_text()


@pytest.mark.parametrize("before", [pytest.param("nothing", marks=pytest.mark.slow), "the same step"])
def test_a_kill_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(before, trained, tmp_path):
    """Of a run's first save; and of one that replaces a checkpoint of the same step while an older one goes."""

    def save(step: int, mark: str, keep: int | None = None) -> Path:
        return checkpoint.save(out, step, *trained, {"mark": mark}, keep)

    out = tmp_path / "new"
    out.mkdir()
    expected = {"new": content(save(2, "new"))}
    out = tmp_path / "start"
    out.mkdir()
    if before == "the same step":
        save(1, "older")
        expected["old"] = content(save(2, "old"))
    begin, found, at, killed = out, [], 0, True
    while killed:
        at += 1
        out = shutil.copytree(begin, tmp_path / "out")
        killed = killed_save(at, lambda: save(2, "new", keep=1))
        checkpoint.tidy(out)
        assert not list(out.glob(".*"))
        folders = checkpoint.checkpoints(out)
        for folder in folders:
            checkpoint.verify(folder)
        found += [name for name, what in expected.items() if folders and what == content(folders[-1])] or ["none"]
        assert not folders or found[-1] != "none"
        shutil.rmtree(out)
    first, turn = "old" if len(expected) == 2 else "none", found.index("new")
    assert at > 50 and set(found[:turn]) == {first} and set(found[turn:]) == {"new"}, found


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(trained, tmp_path, monkeypatch):
    """A power cut keeps what fsync was called for: each file after its last change, the folder, then the name's."""
    synced, renamed, fsync, replace = {}, [], os.fsync, os.replace

    def state(path: Path) -> tuple:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else tuple(sorted(os.listdir(path)))

    def note(opened: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        synced[path] = state(path)
        fsync(opened)

    def rename(source: Path, target: Path) -> None:
        assert all(synced.get(path) == state(path) for path in (source, *source.iterdir()))
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    folder = checkpoint.save(tmp_path, 3, *trained, {})
    assert renamed == [folder] and synced[tmp_path] == ("step-000003",)
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() == {file.name for file in folder.iterdir()} - {"manifest.json"}


def test_keep_removes_the_oldest_once_the_new_one_is_whole(trained, tmp_path, monkeypatch):
    def save(step: int, keep: int | None) -> list[int]:
        checkpoint.save(tmp_path, step, *trained, {}, keep)
        return [int(folder.name[5:]) for folder in checkpoint.checkpoints(tmp_path)]

    (tmp_path / "step-best").mkdir()  # somebody's own
    assert [save(step, None) for step in (1, 2, 3, 4)][-1] == [1, 2, 3, 4]
    assert save(5, 3) == [3, 4, 5] and save(6, 9) == [3, 4, 5, 6] and save(1000000, 1) == [1000000]
    assert save(7, 1) == [7, 1000000]  # what comes after it is not its business
    assert (tmp_path / "step-best").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(checkpoint, "save_policy", lambda *_: open("/dev/full", "w").write("x" * 99999))
    with pytest.raises(InputError, match="step-000008 cannot be written .*No space left"):
        save(8, 1)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-000007", "step-1000000"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed in the middle of a text, and before the name changes hands."""

    def end(*_) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "eval.json"
    checkpoint.write_whole(file, "old")
    half = lambda self, text, **_: end(self.write_bytes(text[:7].encode()))  # noqa: E731
    for where, name, what in ((os, "replace", end), (Path, "write_text", half)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, what)
            checkpoint.write_whole(file, "something new")
        assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
        checkpoint.tidy(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


@pytest.fixture(scope="module")
def undisturbed(records, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(train_grpo, *flags(records, out, "10"), "--save-every", "1")
    return out


@pytest.mark.slow  # a kill at any call of a save is a quick one
def test_kills_at_random_moments_change_nothing(records, undisturbed, tmp_path):
    """Before the first step, and in a step or about a save: it ends bit by bit as if it had never been killed."""
    luck, out = random.Random(0), tmp_path / "run"
    seconds = [row["seconds"] for row in lines(undisturbed / "metrics.jsonl")]
    for kill in range(2):
        job = start(tmp_path / "log", ROOT / "train_grpo.py", *flags(records, out, "10 --keep 2"), *["--resume"] * kill)
        wait_for((out / "config.json").exists)
        least = kill * luck.randint(2, 4)
        wait_for(lambda least=least: done(out) >= least)
        time.sleep(luck.uniform(0, 2 * sum(seconds) / len(seconds)))
        job.kill()
        assert job.wait() == -signal.SIGKILL and (out / lock.NAME).exists()
    assert "--resume: going on from" in run(train_grpo, "--resume", "--out", str(out))
    assert_same_run(undisturbed, out, keep=2)


@pytest.mark.slow
def test_twenty_kills_of_four_ranks_change_nothing(records, tmp_path):
    """kill -9 of one rank after the other at random moments, every other one while a checkpoint is being written;
    torchrun ends the rest and starts all of them again, with the command line of the beginning."""
    straight, out, log, luck = tmp_path / "straight", tmp_path / "run", tmp_path / "log", random.Random(0)
    torchrun(4, ROOT / "train_grpo.py", *flags(records, straight, "60 --batch-size 4"), timeout=900, forks=False)
    command = "-m torch.distributed.run --nproc-per-node=4 --standalone --max-restarts=20".split()
    job = start(log, *command, ROOT / "train_grpo.py", *flags(records, out, "60 --batch-size 4"))
    metrics, inside, saving = out / "metrics.jsonl", 0, lambda: list(out.glob(".partial-step-*"))
    wait_for(metrics.exists)
    for kill in range(20):
        begin = metrics.stat().st_size  # a restart takes away the lines that it will write again
        wait_for(lambda begin=begin: job.poll() is not None or metrics.stat().st_size > begin, 300)
        if kill % 2:
            time.sleep(luck.uniform(0, 2))
        else:
            wait_for(lambda: job.poll() is not None or saving(), 300)
            inside += bool(saving())
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert job.poll() is None and len(workers) == 4, (kill, log.read_text()[-3000:])
        os.kill(int(workers[0 if kill % 2 == 0 else luck.randrange(4)]), signal.SIGKILL)
        wait_for(lambda gone=workers: not any(Path(f"/proc/{pid}").exists() for pid in gone), 60)
        wait_for(lambda kill=kill: log.read_text().count("started again by torchrun") > kill, 600)
    assert job.wait(timeout=900) == 0 and inside >= 5, log.read_text()[-3000:]
    assert_same_run(straight, out)


LATER = [n if n == signal.SIGINT else pytest.param(n, marks=pytest.mark.slow) for n in errors.SIGNALS]


@pytest.mark.parametrize("number", LATER, ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_is_quiet_and_the_run_goes_on_exactly(number, records, undisturbed, tmp_path):
    """As Ctrl-C and torchrun send it: also to the processes that read pictures."""
    out, log = tmp_path / "run", tmp_path / "log"
    job = fork(log, lambda: as_main(ROOT / "train_grpo.py", *flags(records, out, "10"), "--workers", "2"))
    wait_for(lambda: done(out) >= 3)
    os.killpg(job.pid, number)
    job.join(timeout=60)
    assert job.exitcode == 0 and "Traceback" not in log.read_text()
    steps = done(out)
    assert f"stopped as asked: {out}/step-{steps:06d} has all that was learned" in log.read_text()
    assert f"python train_grpo.py --resume --out {out} goes on" in log.read_text()
    assert_same_checkpoint(undisturbed, out, steps, evaluated=False)


# ------------------------------------------------------------------------------------------------------------- signals


def test_the_second_signal_ends_the_process_and_an_echo_does_not():
    program = """
import signal, errors, time
before = signal.getsignal(signal.SIGINT)
with errors.listening():
    assert not errors.asked_to_stop
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert errors.asked_to_stop
assert not errors.asked_to_stop and signal.getsignal(signal.SIGINT) is before
with errors.listening():
    signal.raise_signal(signal.SIGINT)
    time.sleep(errors.ECHO + 0.1)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not here")
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGTERM, "still here\n", "")


def test_ctrl_c_in_a_program_that_does_not_listen_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(train_sft, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(train_sft, "--out", str(tmp_path), expect=130) == "stopped by Ctrl-C\n"


FOUR = "4 --batch-size 4 --micro-batch 2 --eval-every 2 --inner-steps 2 --beta .05"
MOMENTS = {  # what is called for the n-th time when the signal comes -> steps that are kept
    "before a micro-batch of a rollout": (Stream, "draw", 2, 1),
    "in a micro-batch of a rollout": (rollout, "collate", 4, 1),
    "in the reference's pass": (train_grpo, "reference_logprobs", 2, 1),
    "in the last micro-batch of an update": (train_grpo, "grpo_loss", 6, 1),
    "when the weights have moved": (train_grpo, "grpo_loss", 7, 2),
    "in the first evaluation": (evaluation, "greedy", 1, 0),
    "in one on the way": (evaluation, "greedy", 2, 2),
    "in the last": (evaluation, "greedy", 3, 4),
    "in a save": (checkpoint, "seal", 1, 2),
    "after the last step": (checkpoint, "seal", 2, 4),
}


@pytest.fixture(scope="module")
def straight(records, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(train_grpo, *flags(records, out, FOUR), "--save-every", "1")
    return out


OFTEN = "a micro-batch of a rollout", "reference", "in the last micro", "moved", "one on the way", "in a save"
OFTEN = [m if any(word in m for word in OFTEN) else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS]


@pytest.mark.parametrize("moment", OFTEN)
def test_a_signal_drops_the_step_and_resume_does_it_again(moment, records, straight, tmp_path, monkeypatch):
    where, name, n, kept = MOMENTS[moment]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        calls = strike(patch, where, name, n)
        output = run(train_grpo, *flags(records, out, FOUR))
    if moment == "after the last step":
        assert "done: " in output
    else:
        step = f"{out}/step-{kept:06d} has all that was learned" if kept else "nothing was learned yet"
        assert f"stopped as asked: {step}; python train_grpo.py --resume --out {out} goes on" in output
        # The weights have moved: the second inner step is finished. Otherwise nothing more is begun.
        assert len(calls) == (8 if moment == "when the weights have moved" else n)
    assert done(out) == kept
    if name != "greedy":
        assert_same_checkpoint(straight, out, kept, evaluated=moment != "when the weights have moved")
    if name == "greedy" or moment == "in the last micro-batch of an update":
        run(train_grpo, "--resume", "--out", str(out))
        assert_same_run(straight, out)


def test_a_rollout_is_left_within_a_few_tokens(trained, monkeypatch):
    policy, processor, _ = trained
    prefix = policy.prefix(collate([processor.prompt(s) for s in phantom_samples(None, 0, 0, 2, size=56)]))
    steps, step = [], generate.Decoding.step

    def counted(self, places):
        steps.append(places)
        monkeypatch.setattr(errors, "asked_to_stop", len(steps) >= at)
        step(self, places)

    monkeypatch.setattr(generate.Decoding, "step", counted)
    for at in (99, 6):
        steps.clear()
        policy.generate(prefix, 2, 60)
        assert at <= len(steps) < at + generate.STOP_EVERY or len(steps) == 59 < at


SEVERAL = "--group-size 2 --max-tokens 12 --eval-limit 2 --workers 0 --schedule raw --lr 1e-3 --beta .1 --save-every 9"
SEVERAL += " --steps 3 --batch-size 3 --micro-batch 1"  # the second step's places: one of rank 0, two of rank 1
RANKS = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from unittest.mock import patch
import pytest, errors, eval, model, ranks, train_grpo
from test_faults import strike

def main():
    ranks.start("cpu")
    with patch.object(ranks, "start", lambda device: None), patch.object(ranks, "end", lambda: None):
        for flags, name, n in json.load(open(sys.argv[1])):
            where = {{"greedy": eval, "generate": model.Policy}}.get(name, train_grpo)
            with pytest.MonkeyPatch.context() as struck, patch.object(sys, "argv", ["train_grpo.py", *flags]):
                calls = strike(struck, where, name, n if ranks.rank == 1 else 0)
                train_grpo.main()
            if n:
                ranks.print0(name + " was called " + str(ranks.gather_objects(lambda: len(calls))))
    ranks.end()

errors.run(main)
"""
STRIKES = {  # what rank 1 calls for the n-th time when it gets the signal -> steps kept, calls of both ranks
    "generate": (3, 1, [4, 3]),  # an evaluation first; then rank 1 does not roll out its second place
    "grpo_loss": (2, 1, [3, 2]),  # nor does it compute the gradients of it
    "greedy": (2, 3, [2, 2]),  # in the last evaluation
}
MODES = [list(STRIKES), ["grpo_loss", "--shard"]]  # the second: where passes are collectives


@pytest.mark.slow
@pytest.mark.parametrize("names", MODES, ids=["whole", "sharded"])
def test_two_ranks_drop_the_step_together_though_one_has_the_signal(names, records, tmp_path):
    command = ["--data", str(records), "--val", str(records), *SEVERAL.split(), *set(names) - STRIKES.keys(), "--out"]
    names, straight = [name for name in names if name in STRIKES], tmp_path / "straight"
    cases = [([*command, str(straight), "--save-every", "1"], "greedy", 0)]
    cases += [([*command, str(tmp_path / name)], name, STRIKES[name][0]) for name in names]
    cases += [(["--resume", "--out", str(tmp_path / "grpo_loss")], "greedy", 0)]
    (tmp_path / "program.py").write_text(RANKS.format(root=str(ROOT)))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    output = torchrun(2, tmp_path / "program.py", tmp_path / "cases.json")
    for name in names:
        out, (_, kept, calls) = tmp_path / name, STRIKES[name]
        assert output.count(f"stopped as asked: {out}/step-{kept:06d} has all that was learned") == 1
        assert f"{name} was called {calls}" in output
        assert_same_checkpoint(straight, out, kept, evaluated=name != "greedy")
    assert_same_run(straight, tmp_path / "grpo_loss")


def test_a_restart_by_torchrun_resumes_by_itself(records, straight, tmp_path, monkeypatch):
    """The command line is that of the beginning, without --resume; --out holds a checkpoint, none yet, or nothing."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = tmp_path / "run"
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("step-00000[134]", "eval.json"))
    output = run(train_grpo, *flags(records, out, FOUR), "--workers", "1")
    assert f"started again by torchrun: going on from {out}/step-000002" in output
    assert_same_run(straight, out)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(straight / "config.json", begun)
    assert f"started again by torchrun: {begun} has no checkpoint" in run(train_grpo, *flags(records, begun, FOUR))
    assert_same_run(straight, begun)
    bare = tmp_path / "bare" / ".partial-config.json"  # killed when it was about to write its first file
    bare.parent.mkdir()
    bare.write_text("{")
    args = config.parse("train_grpo.py", flags(records, bare.parent, FOUR))
    assert not args.resume and checkpoint.check_out(args.out, args.resume) == bare.parent
    another = flags(records, out, FOUR.replace(" --beta .05", ""))  # a run that was refused, as another's is in --out
    assert "--resume goes on with --beta 0.05, not 0.0" in run(train_grpo, *another, expect=2)
    run(train_grpo, "--resume", "--out", str(out))  # a run that was resumed, and then started again


def limit(bytes_: int) -> None:
    """No file grows beyond this: what a full disk does, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    yield
    limit(resource.RLIM_INFINITY)


FULL = {  # bytes that are left in the third of four steps -> what is said
    5_000_000: "step-000004 cannot be written",  # the weights are 9 MB
    10: "error: a file of the run: File too large; mend that or name another place",  # half a line of metrics.jsonl
}


@pytest.mark.parametrize("room", FULL)
def test_a_full_disk_costs_what_came_after_the_save_before(room, records, straight, tmp_path, unlimited, monkeypatch):
    out, update, updates = tmp_path / "run", train_grpo.update, []

    def fill(*arguments):
        updates.append(1)
        if len(updates) == 3:
            limit((out / "metrics.jsonl").stat().st_size + room)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "update", fill)
        output = run(train_grpo, *flags(records, out, FOUR), expect=2)
    assert FULL[room] in output and ("go on by --resume" in output) >= (room > 10)
    assert [path.name for path in out.iterdir() if "step-" in path.name] == ["step-000002"]
    assert (out / "metrics.jsonl").read_text().endswith("\n") == (room > 10)
    limit(resource.RLIM_INFINITY)
    run(train_grpo, "--resume", "--out", str(out))
    assert_same_run(straight, out)


# ------------------------------------------------------------------------------------------------------------ security

RECORD = {"image": "a.png", "query": "the spot", "bbox": [1, 1, 9, 9]}


@pytest.fixture
def inside(tmp_path) -> Path:
    """A folder of records with a picture in it; one beside it, which a link in the folder leads to as well."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for file in (folder / "images" / "a.png", tmp_path / "private.png"):
        Image.new("RGB", (28, 28), "gray").save(file)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    return folder


def test_a_path_that_leads_out_of_the_folder_is_refused_by_every_program_and_all_know_the_flag(inside, tmp_path):
    """A link in the folder is its owner's, wherever it leads."""
    names = ["images/a.png", str(inside / "images" / "a.png"), "../private.png", "images/../../private.png", "link.png"]
    file, bad = inside / "train.jsonl", BadRecords(9)
    file.write_text("".join(json.dumps(RECORD | {"image": name}) + "\n" for name in names))
    assert [sample.media.name for sample in load_jsonl(file, TASKS, bad)] == ["a.png", "link.png"]
    for number, name in zip((2, 3, 4), names[1:4], strict=True):
        sentence = bad.sentences.pop(f"{file}:{number}")
        assert sentence.startswith(f"{file}:{number}: field 'image' {repr(name)[:20]}")
        assert "leads out of" in sentence and "--allow-outside" in sentence
    assert not bad.sentences and len(load_jsonl(file, TASKS, outside=True)) == 5
    file.write_text(json.dumps(RECORD | {"image": "../private.png"}) + "\n")
    small = ["--steps", "1", "--batch-size", "2"]
    for script, more in ((train_grpo, small), (train_sft, small), (evaluation, ["--train", str(file)])):
        command = ["--data", str(file), *more, "--out", str(tmp_path / script.__name__)]
        assert "field 'image' '../private.png' leads out of" in run(script, *command, expect=2)
        run(script, *command, "--allow-outside")
    command = ["--source", str(file), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="leads out of"):
        vlm_r1.main(command)
    vlm_r1.main([*command, "--allow-outside"])


def test_a_picture_beyond_the_pixel_limit_is_a_bad_record(inside, monkeypatch):
    """From its header; and when it has grown since, by the process that reads it."""
    Image.new("RGB", (60, 60), "gray").save(inside / "b.png")
    file = inside / "train.jsonl"
    file.write_text("".join(json.dumps(RECORD | {"image": name}) + "\n" for name in ("images/a.png", "b.png")))
    for pixels in (3599, 1700):  # twice the limit is where Pillow's warning becomes an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        load_jsonl(file, TASKS, bad := BadRecords(1))
        (said,) = bad.sentences.values()
        assert f"{file}:2: field 'image': image " in said and f"has more than {pixels} pixels; " in said
        assert "PIXEL_LIMIT in images.py" in said
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", images.PIXEL_LIMIT)
    Image.new("RGB", (images.PIXEL_LIMIT // 7000 + 1, 7000)).save(inside / "b.png")
    sample = Sample(inside / "b.png", "x", (1.0, 1.0, 9.0, 9.0), "d", source="here")
    for workers in (0, 1):
        with Readers(workers) as readers:
            ((_, answer),) = readers.read([0], [sample], ImageConfig(), ahead=1)
        assert f"has more than {images.PIXEL_LIMIT} pixels" in str(answer)


def test_nothing_in_the_house_can_run_what_it_reads():
    """No unpickling, no eval, no code of a checkpoint's: in any file that a user starts or imports."""
    modules = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "runpy", "imp"}
    calls = {"eval", "exec", "compile", "torch.load", "yaml.load", "np.load", "os.system", "os.popen", "__import__"}
    folders = ("", "prepare/", "kernels/", "experiments/", "tasks/", "runtime/")
    files = [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not {name.partition(".")[0] for name in names} & modules, where
            if isinstance(node, ast.Call):
                call, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert call not in calls, where
                assert call not in ("Image.open", "PIL.Image.open") or "formats" in named, where  # EPS: Ghostscript
                assert named.get("trust_remote_code", "False") == named.get("shell", "False") == "False", where
                assert "weights_only" not in named, where
    said = "from_pretrained(folder, local_files_only=True, trust_remote_code=False)"
    assert said in (ROOT / "prompts.py").read_text()
