"""One run a folder, however the one before it ended; and what a run does when its terminal, its torchrun or the number
of its threads is not what it was."""

# ruff: noqa: F811  fixtures are imported
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import ROOT, grpo, lines, records, run  # noqa: F401
from test_faults import assert_same_run, done, start, strike, wait_for

import config
import errors
import train_grpo
import train_sft
from errors import InputError
from runtime import lock

HOLD = """
import pathlib, sys, time, runtime.lock
with runtime.lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_has_one_run_and_kill_9_frees_it(holder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=rf"another run writes to it \(process {holder.pid} on ") as refused:
        with lock.held(out):
            pass
    assert str(refused.value).count("\n") == 0 and (out / lock.NAME).exists()
    holder.kill()
    holder.wait()
    with lock.held(out):
        assert f"process {os.getpid()} on " in (out / lock.NAME).read_text()
    assert not (out / lock.NAME).exists()


def test_a_second_run_is_refused_before_it_reads_anything(holder, tmp_path):
    """--data that does not exist would be its sentence otherwise; and it leaves nothing behind."""
    for script in (train_grpo, train_sft):
        for more in ([], ["--resume"]):
            words = run(script, "--data", "nowhere.jsonl", "--out", str(tmp_path / "run"), *more, expect=2)
            assert f"another run writes to it (process {holder.pid}" in words and "nowhere" not in words
            assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.NAME]


def test_the_lock_is_of_the_process_not_of_the_name(tmp_path, monkeypatch):
    """A lock file that is taken away between opening and locking it is another run's end: the lock is taken anew."""
    flock, removed = lock.fcntl.flock, []

    def late(file, how):
        flock(file, how)
        if not removed:
            removed.append(True)
            (tmp_path / lock.NAME).unlink()

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.held(tmp_path):
        assert removed and (tmp_path / lock.NAME).exists()
        with pytest.raises(InputError, match="another run"), lock.held(tmp_path):
            pass


def test_a_run_whose_folder_was_taken_away_leaves_the_next_ones_lock_alone(tmp_path):
    out = tmp_path / "run"
    with lock.held(out):
        (out / lock.NAME).unlink()
        out.rmdir()
        with lock.held(out):
            pass
        out.mkdir()
        (out / lock.NAME).write_text("of another run")
    assert (out / lock.NAME).read_text() == "of another run"


def test_a_file_system_without_locks_is_said_and_others_are_refused(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock.held(tmp_path / "run"):
        assert "no locks here (No locks available), so see to it" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), lock.held(tmp_path / "file" / "run"):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    for script in (train_grpo, train_sft):
        words = run(script, "--data", "nowhere.jsonl", "--out", str(tmp_path / "a" / "b"), expect=2)
        assert "error: nowhere.jsonl: cannot be read" in words and not (tmp_path / "a").exists()


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["anew", "resume"])
def test_a_folder_that_is_none_or_not_a_runs_is_named(tmp_path, more):
    for name in ("file", "theses/thesis"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    none = "is a file, or a link that leads nowhere"
    words = {"file": none, "link": none, "theses": "holds no run to go on with", "file/below": "cannot be written"}
    for name, said in words.items():
        assert said in run(train_grpo, "--out", str(tmp_path / name), *more, expect=2)


def test_one_command_line_begins_a_run_and_goes_on_with_it(records, tmp_path):
    out, line = tmp_path / "run", ["--steps", "3", "--save-every", "1", "--resume"]
    assert "holds no run yet, so this begins one" in grpo(out, records, *line)
    assert "going on from" in grpo(out, records, *line)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert "--resume goes on with --lr 0.0001, not 0.1" in grpo(out, records, *line, "--lr", "0.1", expect=2)


def test_no_test_sets_the_number_of_threads_that_the_environment_has():
    """But for those that measure memory, of which each thread has some, and the cells recorded with one thread."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    known = {"conftest.py", "test_lock.py", "test_hub.py", "measured_peak.py", "test_plan.py", "test_sweep.py"}
    words = "set_num_threads", '"OMP_NUM_THREADS":'
    found = {f.name for f in Path(__file__).parent.glob("*.py") if any(word in f.read_text() for word in words)}
    assert found <= known


THREADS = [  # of the beginning, OMP_NUM_THREADS, cores -> now, what is said
    (3, None, 8, 3, ""),
    (64, None, 2, 2, "the run had 64 threads, now it has 2 (this machine has 2 cores)"),
    (2, "1", 8, 1, "the run had 2 threads, now it has 1 (OMP_NUM_THREADS is 1)"),
    (1, "1", 8, 1, ""),
]


@pytest.mark.parametrize("before, told, cores, threads, words", THREADS)
def test_a_resumed_run_has_the_threads_of_its_beginning(tmp_path, monkeypatch, before, told, cores, threads, words):
    file, here = tmp_path / "config.json", torch.get_num_threads()
    file.write_text(json.dumps({"threads": before}))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        torch.set_num_threads(int(told))  # as torch does when it is imported
    try:
        said = config.same_threads(file)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(here)
    assert said.startswith(words) and bool(said) == bool(words)


def test_a_number_of_threads_that_no_run_has_is_refused(tmp_path):
    for threads in (None, 0, -1, "2", 2.0, True, [1]):
        (tmp_path / "config.json").write_text(json.dumps({"threads": threads}))
        with pytest.raises(InputError, match="config.json: field 'threads'"):
            config.same_threads(tmp_path / "config.json")


class Gone(io.StringIO):
    """A pipe without a reader, or a terminal that was closed."""

    def __init__(self, number: int, descriptor: int):
        super().__init__()
        self.number, self.descriptor = number, descriptor

    def write(self, text=""):
        raise OSError(self.number, os.strerror(self.number))

    flush = write

    def fileno(self):
        return self.descriptor


def test_a_reader_who_leaves_does_not_end_the_run():
    for number in (errno.EPIPE, errno.EIO):
        read, write = os.pipe()
        terminal = errors.Terminal(Gone(number, write))
        os.close(read)
        terminal.write("a line")
        terminal.flush()
        assert os.write(write, b"nowhere") == 7  # /dev/null by now
        os.close(write)
    with pytest.raises(OSError, match="No space"):
        errors.Terminal(Gone(errno.ENOSPC, 0)).write("a log on a full disk is no reader who left")


def test_head_gets_its_line_and_the_program_its_end(tmp_path):
    code = "import sys, errors; errors.run(lambda: [print('line', flush=True) for _ in range(9000)] and sys.exit(7))"
    shell = f'{sys.executable} -c "{code}" 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}'
    ran = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "line\n7\n" and ran.stderr == ""


def test_a_closed_terminal_is_a_request_to_stop_but_not_under_nohup():
    heard = []
    before = signal.signal(signal.SIGHUP, lambda *_: heard.append(True))
    try:
        with errors.listening():
            signal.raise_signal(signal.SIGHUP)
            assert errors.asked_to_stop
        signal.raise_signal(signal.SIGHUP)
        assert heard == [True]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with errors.listening():
            signal.raise_signal(signal.SIGHUP)
            assert not errors.asked_to_stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_ends_an_import_ends_it_in_one_line(tmp_path):
    """Ctrl-C in the seconds that importing torch takes, and memory that is not there."""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for error, words in (("KeyboardInterrupt", "stopped by Ctrl-C\n"), ("MemoryError", "error: not enough memory")):
        (tmp_path / "torch.py").write_text(f"raise {error}")  # found before the real one
        for script in ("train_grpo.py", "train_sft.py", "eval.py"):
            ran = subprocess.run([sys.executable, ROOT / script], env=environment, capture_output=True, text=True)
            assert ran.returncode and ran.stderr.startswith(words) and ran.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path):
    """kill -9 of the parent that torchrun is: its processes hear SIGTERM, at which a run saves and ends."""
    rank = "import ranks, time; ranks.start('cpu'); print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1"}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    began = time.monotonic()
    assert process.stdout.read() == b"" and time.monotonic() - began < 20  # the pipe ends with the last who holds it
    process.stdout.close()


# ------------------------------------------------------------------------------------------------------------------ sft


def sft_flags(records: Path, out: Path, *more: str) -> list[str]:
    small = "--batch-size 4 --micro-batch 2 --warmup 3 --max-tokens 18 --workers 0 --steps 12 --save-every 2 --coarse"
    return ["--data", str(records), "--val", str(records), "--out", str(out), *small.split(), *more]


def assert_same_sft(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    assert [row["step"] for row in lines(other / "metrics.jsonl")] == list(range(1, 13))


@pytest.fixture(scope="module")
def sft(records, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    run(train_sft, *sft_flags(records, out))
    return out


@pytest.mark.slow
def test_sft_killed_three_times_ends_as_undisturbed(records, sft, tmp_path):
    """In processes of their own, by kill -9: before the first checkpoint, between two, within a save."""
    out, log = tmp_path / "run", tmp_path / "log"
    line = [ROOT / "train_sft.py", *sft_flags(records, out, "--resume", "--workers", "1")]
    moments = [
        lambda: done(out) >= 1,
        lambda: (out / "step-000004").exists() and done(out) >= 5,
        lambda: list(out.glob(".partial-step-0000*")) and (out / "step-000008").exists(),
    ]
    for moment in moments:
        job = start(log, *line)
        wait_for(lambda job=job, moment=moment: moment() or job.poll() is not None)
        job.kill()
        assert job.wait() == -signal.SIGKILL, log.read_text()
        assert (out / lock.NAME).exists() and not (out / "step-000012").exists()
    assert start(log, *line).wait() == 0 and "--resume: going on from" in log.read_text()
    assert_same_sft(sft, out)


STRIKES = {  # what is called for the n-th time when the signal comes -> steps that are kept
    "in a step": ("answer_of", 30, 7),
    "in the first evaluation": ("evaluate", 1, None),
    "in the last": ("evaluate", 2, 12),
    "after the last step": ("answer_of", 48, 11),
}


@pytest.mark.parametrize("moment", STRIKES)
def test_sft_that_is_asked_to_stop_loses_nothing(records, sft, tmp_path, monkeypatch, moment):
    name, at, saved = STRIKES[moment]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        strike(patch, train_sft, name, at)
        words = run(train_sft, *sft_flags(records, out, "--workers", "1"))
    what = f"{out}/step-{saved:06d} has all that was learned" if saved else "nothing was learned yet"
    assert f"stopped as asked: {what}; python train_sft.py --resume --out {out} goes on" in words
    run(train_sft, "--resume", "--out", str(out))
    assert_same_sft(sft, out)


def test_sft_that_breaks_off_goes_on_from_its_last_checkpoint(records, sft, tmp_path, monkeypatch):
    """As after kill -9, with a row behind it that is written again."""
    out, answer = tmp_path / "run", train_sft.answer_of
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_sft, "answer_of", lambda *a: answer(*a) if a[3] < 5 else 1 / 0)
        run(train_sft, *sft_flags(records, out))
    assert done(out) == 5 and not (out / "step-000005").exists()
    run(train_sft, "--resume", "--out", str(out))
    assert_same_sft(sft, out)


def test_sft_resumes_with_its_own_flags_alone(records, sft):
    for flag, value in (("--lr", "1e-3"), ("--steps", "13"), ("--coarse-scale", "0.9"), ("--seed", "1")):
        assert f"--resume goes on with {flag} " in run(train_sft, "--resume", "--out", str(sft), flag, value, expect=2)
    assert "is not empty: name a new folder, or go on" in run(train_sft, *sft_flags(records, sft), expect=2)
    run(train_sft, *sft_flags(records, sft, "--resume", "--keep", "9"))  # done already: nothing changes
    assert len(lines(sft / "metrics.jsonl")) == 12
