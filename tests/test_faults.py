"""Whatever ends a run, --resume goes on exactly: kills at any moment, signals, full disks, restarts by torchrun. And
what is read from a disk runs no code and leads nowhere else."""

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

import checkpoint
import pytest
import stop
from PIL import Image
from safetensors.torch import load_file
from test_lora import adamw, adapted, base, task, train  # noqa: F401  base is a fixture
from test_ranks import torchrun
from test_train import ROOT, lines, records, run, without_times  # noqa: F401  a fixture

import eval as evaluation
import generate
import ranks
import train_grpo
import train_sft
from data import BadRecords, load_jsonl
from errors import InputError
from model import collate
from prepare import coco, vlm_r1
from weights import load_policy

SMALL = "--batch-size 2 --group-size 4 --micro-batch 1 --max-tokens 18 --eval-limit 2 --eval-every 5 --samples-every 2"
SMALL += " --save-every 2 --workers 1 --schedule medloc --window 4 --tau-start .05 --lr 1e-3 --steps"


def flags(records: Path, out: Path, more: str = "") -> list[str]:  # noqa: F811
    return ["--data", str(records), "--val", str(records), "--out", str(out), *SMALL.split(), *more.split()]


def assert_same_checkpoint(one: Path, other: Path, step: int, evaluated: bool = True) -> None:
    """Byte by byte, but for what the trainer knows of evaluations where one has not been made in the other."""
    manifests = []
    for out in (one, other):
        checkpoint.verify(out / f"step-{step:06d}")
        files = json.loads((out / f"step-{step:06d}" / "manifest.json").read_text())["files"]
        manifests.append({name: stamp for name, stamp in files.items() if evaluated or name != "trainer.json"})
    assert manifests[0] == manifests[1] and "trainer.safetensors" in manifests[0]


def assert_same_run(one: Path, other: Path, keep: int | None = None) -> None:
    """The same numbers, and the same last checkpoint byte by byte; nothing lies about that does not belong there."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(lines(one / name)) == without_times(lines(other / name))
    assert json.loads((one / "eval.json").read_text()) == json.loads((other / "eval.json").read_text())
    last = lines(one / "metrics.jsonl")[-1]["step"]
    assert_same_checkpoint(one, other, last)
    assert not list(other.glob(".*")) and (keep is None or len(checkpoint.checkpoints(other)) == keep)


# ------------------------------------------------------------------------------------------------------- inside a save

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}


def killed_save(at: int, save) -> bool:
    """save() in a forked process that ends, as by kill -9, before its at-th call of the file system: True; False if it
    has fewer. Writing is two calls, and the first leaves half of the file."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    calls = 0

    def tick(event: str, *_) -> None:
        nonlocal calls
        if event in EVENTS:
            calls += 1
            if calls == at:
                os._exit(9)

    def by_halves(write):
        def halved(first, second, *rest, **named):  # (path, text) or (tensors, path)
            path, content = (first, second) if isinstance(second, str) else (second, None)
            written = write(first, second, *rest, **named)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            tick("open")
            Path(path).write_bytes(whole)
            return written

        return halved

    fsync = os.fsync
    os.fsync = lambda opened: (tick("open"), fsync(opened))
    Path.write_text = by_halves(Path.write_text)
    checkpoint.save_file = by_halves(checkpoint.save_file)
    sys.modules["weights"].save_file = by_halves(sys.modules["weights"].save_file)
    sys.addaudithook(tick)
    try:
        save()
    finally:
        os._exit(0)


@pytest.fixture(scope="module")
def trained(base):  # noqa: F811
    """(policy, optimizer) after a step."""
    folder, prompts = base
    policy = load_policy(folder)
    optimizer = adamw(policy)
    train(policy, optimizer, prompts[:1], 1)
    return policy, optimizer


def content(folder: Path) -> tuple[str, str]:
    return (folder / "manifest.json").read_text(), (folder / "trainer.json").read_text()


@pytest.mark.parametrize("before", ["nothing", "the same step"])
def test_a_kill_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(before, trained, tmp_path):
    """Of a run's first save; and of one that replaces a checkpoint of the same step while an older one goes."""
    policy, optimizer = trained

    def save(step: int, mark: str, keep: int | None = None) -> Path:
        return checkpoint.save(out, step, task(policy), optimizer, {"mark": mark}, keep)

    out = tmp_path / "new"
    out.mkdir()
    expected = {"new": content(save(2, "new"))}
    out = tmp_path / "start"
    out.mkdir()
    if before == "the same step":
        save(1, "older")
        expected["old"] = content(save(2, "old"))
    start, found, at = out, [], 1
    while True:
        out = shutil.copytree(start, tmp_path / "out")
        killed = killed_save(at, lambda: save(2, "new", keep=1))
        checkpoint.tidy(out)
        assert not list(out.glob(".*"))
        folders = checkpoint.checkpoints(out)
        for folder in folders:
            checkpoint.verify(folder)
        if folders:
            state = content(folders[-1])
            found.append(next(name for name, what in expected.items() if what == state))
        else:
            found.append("nothing")
        shutil.rmtree(out)
        if not killed:
            break
        at += 1
    first = "nothing" if before == "nothing" else "old"
    turn = found.index("new")
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
    folder = checkpoint.save(tmp_path, 3, task(trained[0]), trained[1], {})
    assert renamed == [folder] and synced[tmp_path] == ("step-000003",)
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() == {file.name for file in folder.iterdir()} - {"manifest.json"}


def test_keep_removes_the_oldest_once_the_new_one_is_whole(trained, tmp_path):
    policy, optimizer = trained

    def save(step: int, keep: int | None) -> list[int]:
        checkpoint.save(tmp_path, step, task(policy), optimizer, {}, keep)
        return [int(folder.name[5:]) for folder in checkpoint.checkpoints(tmp_path)]

    (tmp_path / "step-best").mkdir()  # somebody's own
    assert [save(step, None) for step in (1, 2, 3, 4)][-1] == [1, 2, 3, 4]
    assert save(5, 3) == [3, 4, 5] and save(6, 9) == [3, 4, 5, 6] and save(1000000, 1) == [1000000]
    assert save(7, 1) == [7, 1000000]  # what comes after it is not its business
    assert (tmp_path / "step-best").exists() and not list(tmp_path.glob(".*"))
    broken = lambda folder, dtype: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    broken_task = task(policy)
    broken_task.save = broken
    with pytest.raises(InputError, match="step-000008 cannot be written .*No space left"):
        checkpoint.save(tmp_path, 8, broken_task, optimizer, {}, 1)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-000007", "step-1000000"]


@pytest.mark.parametrize("cut", [0, 7, None])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(cut, tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    checkpoint.write_whole(file, "old")
    with monkeypatch.context() as patch:
        if cut is None:  # killed before the name changes hands
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:

            def torn(self, text, **_):
                self.write_bytes(text.encode()[:cut])
                raise KeyboardInterrupt

            patch.setattr(Path, "write_text", torn)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write_whole(file, "something new")
    assert file.read_text() == "old"
    checkpoint.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


# --------------------------------------------------------------------------------------------------------------- kills


class Killable:
    """faults_program.py, waiting for runs to make."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        self.program = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "faults_program.py"], env=environment, **pipes
        )
        assert self.program.stdout.readline() == "ready\n"

    def start(self, *flags: str, program: str = "train_grpo") -> int:
        self.log.write_text("")
        print(json.dumps([str(self.log), program, *flags]), file=self.program.stdin, flush=True)
        return int(self.program.stdout.readline())

    def end(self, expect: int) -> str:
        code, output = int(self.program.stdout.readline()), self.log.read_text()
        assert code == expect, output
        assert "Traceback" not in output
        return output

    def close(self) -> None:
        self.program.stdin.close()
        self.program.wait(timeout=60)


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    program = Killable(tmp_path_factory.mktemp("killable"))
    yield program
    program.close()


@pytest.fixture(scope="module")
def undisturbed(records, tmp_path_factory, killable) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    killable.start(*flags(records, out, "16"), "--save-every", "1")
    killable.end(0)
    return out


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_five_kills_at_random_moments_change_nothing(records, undisturbed, killable, tmp_path):  # noqa: F811
    """Before the first step, in a step, about a save: the run ends bit by bit as if it had never been killed."""
    luck, out = random.Random(0), tmp_path / "run"
    metrics = out / "metrics.jsonl"
    seconds = [row["seconds"] for row in lines(undisturbed / "metrics.jsonl")]
    for kill in range(5):
        again = ["--resume"] if (out / "config.json").exists() else []
        pid = killable.start(*flags(records, out, "16 --keep 2"), *again)
        wait_for((out / "config.json").exists)
        if kill:
            begin = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
            more = luck.randint(1, 4)
            wait_for(lambda begin=begin, more=more: len(metrics.read_bytes().splitlines()) >= begin + more)
        time.sleep(luck.uniform(0, 2 * sum(seconds) / len(seconds)))
        os.kill(pid, signal.SIGKILL)
        killable.end(-signal.SIGKILL)
    killable.start("--resume", "--out", str(out))
    assert "--resume: going on from" in killable.end(0)
    assert_same_run(undisturbed, out, keep=2)


@pytest.mark.slow
def test_twenty_kills_of_four_ranks_change_nothing(records, tmp_path):  # noqa: F811
    """kill -9 of one rank after the other at random moments, every other one while a checkpoint is being written;
    torchrun ends the rest and starts all of them again, with the command line of the beginning."""
    case = [*flags(records, Path("OUT"), "60"), "--batch-size", "4"]
    straight, out, luck = tmp_path / "straight", tmp_path / "run", random.Random(0)
    torchrun(4, ROOT / "train_grpo.py", *[straight if word == "OUT" else word for word in case], timeout=900)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone", "--max-restarts=20"]
    command += [ROOT / "train_grpo.py", *[out if word == "OUT" else word for word in case]]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    metrics, inside = out / "metrics.jsonl", 0

    def saving() -> list[Path]:
        return list(out.glob(".partial-step-*"))

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
        assert job.poll() is None and len(workers) == 4, (kill, (tmp_path / "log").read_text()[-3000:])
        os.kill(int(workers[0 if kill % 2 == 0 else luck.randrange(4)]), signal.SIGKILL)
        wait_for(lambda gone=workers: not any(Path(f"/proc/{pid}").exists() for pid in gone), 60)
        wait_for(lambda: (tmp_path / "log").read_text().count("started again by torchrun") > kill, 600)  # noqa: B023
    assert job.wait(timeout=900) == 0, (tmp_path / "log").read_text()[-3000:]
    assert inside >= 5
    assert_same_run(straight, out)


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_is_quiet_and_the_run_goes_on_exactly(
    number,
    records,  # noqa: F811
    undisturbed,
    killable,
    tmp_path,
):
    """As Ctrl-C and torchrun send it: also to the processes that read pictures."""
    out = tmp_path / "run"
    pid = killable.start(*flags(records, out, "16"), "--workers", "2")
    wait_for((out / "metrics.jsonl").exists)
    wait_for(lambda: len(lines(out / "metrics.jsonl")) >= 3)
    os.killpg(pid, number)
    output = killable.end(0)
    done = len(lines(out / "metrics.jsonl"))
    assert f"stopped as asked: {out}/step-{done:06d} has all that was learned" in output
    assert f"python train_grpo.py --resume --out {out} goes on" in output
    assert_same_checkpoint(undisturbed, out, done, evaluated=False)


# ------------------------------------------------------------------------------------------------------------- signals


def test_the_second_signal_ends_the_process_and_an_echo_does_not():
    program = """
import signal, stop, time
before = signal.getsignal(signal.SIGINT)
with stop.listening():
    assert not stop.asked
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.asked
assert not stop.asked and signal.getsignal(signal.SIGINT) is before
with stop.listening():
    signal.raise_signal(signal.SIGINT)
    time.sleep(stop.ECHO + 0.1)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not here")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "still here\n", "")


def test_ctrl_c_in_a_program_that_does_not_listen_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(train_sft, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(train_sft, "--out", str(tmp_path), expect=130) == "stopped by Ctrl-C\n"


FOUR = "4 --batch-size 4 --micro-batch 2 --eval-every 2 --inner-steps 2 --beta .05"
MOMENTS = {  # what is called for the n-th time when the signal comes -> steps that are kept
    "before a micro-batch of a rollout": (train_grpo.Stream, "draw", 3, 1),
    "in a micro-batch of a rollout": (train_grpo, "roll_groups", 4, 1),
    "in the reference's pass": (train_grpo, "reference_logprobs", 2, 1),
    "in the first micro-batch of an update": (train_grpo, "grpo_loss", 5, 1),
    "in the last micro-batch of an update": (train_grpo, "grpo_loss", 6, 1),
    "when the weights have moved": (train_grpo, "grpo_loss", 7, 2),
    "in the first evaluation": (evaluation.Task, "answer", 1, 0),
    "in one on the way": (evaluation.Task, "answer", 2, 2),
    "in the last": (evaluation.Task, "answer", 3, 4),
    "in a save": (checkpoint, "seal", 1, 2),
    "after the last step": (checkpoint, "seal", 2, 4),
}


@pytest.fixture(scope="module")
def straight(records, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("straight") / "run"
    run(train_grpo, *flags(records, out, FOUR), "--save-every", "1")
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_drops_the_step_and_resume_does_it_again(moment, records, straight, tmp_path, monkeypatch):  # noqa: F811
    where, name, n, kept = MOMENTS[moment]
    out, called, calls = tmp_path / "run", getattr(where, name), []

    def strike(*arguments, **named):
        calls.append(time.monotonic())
        if len(calls) == n:
            signal.raise_signal(signal.SIGTERM)
        return called(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, strike)
        output = run(train_grpo, *flags(records, out, FOUR))
    if moment == "after the last step":
        assert "done: " in output
    else:
        step = f"{out}/step-{kept:06d} has all that was learned" if kept else "nothing was learned yet"
        assert f"stopped as asked: {step}; python train_grpo.py --resume --out {out} goes on" in output
        # The weights have moved: the second inner step is finished. Otherwise nothing more is begun.
        assert len(calls) == (8 if moment == "when the weights have moved" else n)
    assert len(lines(out / "metrics.jsonl")) == kept
    if name != "answer":
        assert_same_checkpoint(straight, out, kept, evaluated=moment != "when the weights have moved")
    if name == "answer" or moment == "in the last micro-batch of an update":
        run(train_grpo, "--resume", "--out", str(out))
        assert_same_run(straight, out)


def test_a_rollout_is_left_within_a_few_tokens(trained, base, monkeypatch):  # noqa: F811
    policy, prefix = trained[0], trained[0].prefix(collate(base[1]))
    steps, step = [], generate.Decoding.step

    def counted(self, places):
        steps.append(places)
        monkeypatch.setattr(stop, "asked", len(steps) >= at)
        step(self, places)

    monkeypatch.setattr(generate.Decoding, "step", counted)
    for at in (99, 6):
        steps.clear()
        policy.generate(prefix, 2, 60)
        assert at <= len(steps) < at + generate.STOP_EVERY or len(steps) == 59 < at


# --------------------------------------------------------------------------------------------------------------- ranks

SEVERAL = "--group-size 2 --max-tokens 12 --eval-limit 2 --workers 0 --schedule raw --lr 1e-3 --beta .1 --save-every 9"
SEVERAL += " --steps 3 --batch-size 3 --micro-batch 1"  # the second step's places: one of rank 0, two of rank 1
RANKS = """
import json, signal, sys
sys.path.insert(0, {root!r})
from unittest.mock import patch
import errors, eval, ranks, train_grpo

def run(flags, where, name, n):
    calls, called = [], getattr(where, name)

    def strike(*arguments, **named):
        calls.append(1)
        if ranks.rank == 1 and len(calls) == n:
            signal.raise_signal(signal.SIGTERM)
        return called(*arguments, **named)

    with patch.object(where, name, strike), patch.object(sys, "argv", ["train_grpo.py", *flags]):
        train_grpo.main()
    if n:
        ranks.say(name + " was called " + str(ranks.everyone(lambda: len(calls))))

def main():
    ranks.start("cpu")
    with patch.object(ranks, "start", lambda device: None), patch.object(ranks, "end", lambda: None):
        for flags, name, n in json.load(open(sys.argv[1])):
            run(flags, eval.Task if name == "answer" else train_grpo, name, n)
    ranks.end()

errors.run(main)
"""
STRIKES = {  # what rank 1 calls for the n-th time when it gets the signal -> steps kept, calls of both ranks
    "roll_groups": (2, 1, [3, 2]),  # rank 1 does not roll out its second place
    "grpo_loss": (2, 1, [3, 2]),  # nor does it compute the gradients of it
    "answer": (2, 3, [2, 2]),  # in the last evaluation
}
SHARDED = ("grpo_loss",)  # where passes are collectives; the others are the same code


def test_two_ranks_drop_the_step_together_though_one_has_the_signal(records, tmp_path):  # noqa: F811
    cases, ends = [], []
    for mode, names in (("", STRIKES), ("sharded ", SHARDED)):
        command = ["--data", str(records), "--val", str(records), *SEVERAL.split(), *["--shard"] * bool(mode)]
        cases += [([*command, "--save-every", "1", "--out", str(tmp_path / f"{mode}straight")], "answer", 0)]
        for name in names:
            ends.append((name, tmp_path / f"{mode}straight", tmp_path / f"{mode}{name}"))
            cases += [([*command, "--out", str(ends[-1][2])], name, STRIKES[name][0])]
        cases += [(["--resume", "--out", str(tmp_path / f"{mode}grpo_loss")], "answer", 0)]
    (tmp_path / "program.py").write_text(RANKS.format(root=str(ROOT)))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    output = torchrun(2, tmp_path / "program.py", tmp_path / "cases.json")
    for name, straight, out in ends:
        _, kept, calls = STRIKES[name]
        assert output.count(f"stopped as asked: {out}/step-{kept:06d} has all that was learned") == 1
        assert f"{name} was called {calls}" in output
        assert_same_checkpoint(straight, out, kept, evaluated=name != "answer")
        if name == "grpo_loss":
            assert_same_run(straight, out)


# ------------------------------------------------------------------------------------------------------ torchrun again


def test_a_restart_by_torchrun_resumes_by_itself(records, straight, tmp_path, monkeypatch):  # noqa: F811
    """The command line is that of the beginning, without --resume; --out holds a checkpoint, none yet, or nothing."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = tmp_path / "run"
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("step-00000[134]", "eval.json"))
    output = run(train_grpo, *flags(records, out, FOUR))
    assert f"started again by torchrun: going on from {out}/step-000002" in output
    assert_same_run(straight, out)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(straight / "config.json", begun)
    assert f"started again by torchrun: {begun} has no checkpoint" in run(train_grpo, *flags(records, begun, FOUR))
    assert_same_run(straight, begun)
    config = tmp_path / "bare" / ".partial-config.json"  # killed when it was about to write its first file
    config.parent.mkdir()
    config.write_text("{")
    args = train_grpo.parse_arguments(flags(records, config.parent, FOUR))
    assert not args.resume and checkpoint.check_out(args.out, args.resume) == config.parent
    error = run(train_grpo, *flags(records, out, FOUR), "--seed", "9", expect=2)
    assert "--resume goes on with --seed 0, not 9" in error
    another = flags(records, out, FOUR.replace(" --beta .05", ""))  # a run that was refused, as another's is in --out
    assert "--resume goes on with --beta 0.05, not 0.0" in run(train_grpo, *another, expect=2)
    run(train_grpo, "--resume", "--out", str(out))  # a run that was resumed, and then started again


def test_ranks_that_are_started_again_do_not_meet_the_addresses_of_those_before(monkeypatch):
    """torchrun's store is one for all; by what gloo finds there of ranks that are gone, it would wait for ever."""
    kept, stores = ranks.dist.HashStore(), []
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **__: iter([(kept, 0, 2)]))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, store, **_: stores.append(store))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        ranks.start("cpu")
    stores[0].set("address", "1")
    assert stores[0].check(["address"]) and not stores[1].check(["address"])


# --------------------------------------------------------------------------------------------------------------- disks


def limit(bytes_: int) -> None:
    """No file grows beyond this: what a full disk does, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    yield
    limit(resource.RLIM_INFINITY)


def test_a_disk_that_fills_in_a_save_costs_what_came_after_the_save_before(
    records,  # noqa: F811
    straight,
    tmp_path,
    unlimited,
    monkeypatch,
):
    out = tmp_path / "run"
    seal, seals = checkpoint.seal, []

    def fill(*arguments):
        seals.append(seal(*arguments))
        limit(5_000_000)  # the weights are 9 MB

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", fill)
        output = run(train_grpo, *flags(records, out, FOUR), expect=2)
    assert len(seals) == 1 and "step-000004 cannot be written" in output and "go on by --resume" in output
    assert [path.name for path in out.iterdir() if "step-" in path.name] == ["step-000002"]
    limit(resource.RLIM_INFINITY)
    run(train_grpo, "--resume", "--out", str(out))
    assert_same_run(straight, out)


def test_a_disk_that_fills_in_a_line_of_metrics_is_a_sentence_and_costs_the_line(
    records,  # noqa: F811
    straight,
    tmp_path,
    unlimited,
    monkeypatch,
):
    out, update, updates = tmp_path / "run", train_grpo.update, []

    def fill(*arguments):
        updates.append(1)
        if len(updates) == 3:
            limit((out / "metrics.jsonl").stat().st_size + 10)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "update", fill)
        output = run(train_grpo, *flags(records, out, FOUR), expect=2)
    assert "error: a file of the run: File too large; mend that or name another place" in output
    assert not (out / "metrics.jsonl").read_text().endswith("\n")
    limit(resource.RLIM_INFINITY)
    run(train_grpo, "--resume", "--out", str(out))
    assert_same_run(straight, out)


def test_a_folder_that_cannot_be_written_to_is_named_also_on_the_way(records, tmp_path, monkeypatch):  # noqa: F811
    """Root may write anywhere, so that a file in the place of a folder stands for it."""
    out, update = tmp_path / "run", train_grpo.update
    blocked = lambda *a: (out / ".partial-step-000002").write_text("") or update(*a)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "update", blocked)
        output = run(train_grpo, *flags(records, out, FOUR), expect=2)
    assert f"{out}/step-000002 cannot be written" in output


def test_a_picture_that_vanishes_on_the_way_is_named_and_costs_no_step(records, straight, tmp_path, monkeypatch):  # noqa: F811
    folder = shutil.copytree(records.parent, tmp_path / "records")
    victim = train_grpo.Sampler(12, 4, 0).take(9, 1)[0]  # in the third step
    val = folder / "val.jsonl"
    val.write_text("".join(records.read_text().splitlines(keepends=True)[:1]) * 2)
    command = flags(folder / "train.jsonl", tmp_path / "run", FOUR + f" --workers 0 --val {val}")
    assert victim != 0
    update, hidden = train_grpo.update, folder / "hidden"

    def vanish(*arguments):
        if (folder / f"{victim}.png").exists():
            (folder / f"{victim}.png").rename(hidden)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "update", vanish)
        output = run(train_grpo, *command, expect=2)
    assert (
        f"train.jsonl:{victim + 1}: " in output and "All up to step 2 is saved: repair it and go on by --res" in output
    )
    hidden.rename(folder / f"{victim}.png")
    run(train_grpo, "--resume", "--out", str(tmp_path / "run"))
    rows = [[row["iou_mean"] for row in lines(out / "metrics.jsonl")] for out in (straight, tmp_path / "run")]
    assert rows[0] == rows[1]


def test_the_sft_checkpoint_is_sealed_too(records, tmp_path):  # noqa: F811
    run(train_sft, "--data", str(records), "--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "sft"))
    checkpoint.verify(tmp_path / "sft" / "step-000001")
    assert load_file(tmp_path / "sft" / "step-000001" / "model.safetensors")


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


def test_a_path_that_leads_out_of_the_folder_is_a_bad_record(inside):
    names = ["images/a.png", str(inside / "images" / "a.png"), "../private.png", "images/../../private.png", "link.png"]
    file, bad = inside / "train.jsonl", BadRecords(9)
    file.write_text("".join(json.dumps(RECORD | {"image": name}) + "\n" for name in names))
    assert [sample.image.name for sample in load_jsonl(file, bad)] == ["a.png", "link.png"]
    assert list(bad.sentences) == [f"{file}:{number}" for number in (2, 3, 4)]
    for number, name in zip((2, 3, 4), names[1:4], strict=True):
        sentence = bad.sentences[f"{file}:{number}"]
        assert sentence.startswith(f"{file}:{number}: field 'image' {repr(name)[:20]}")
        assert "leads out of" in sentence and "--allow-outside" in sentence
    assert len(load_jsonl(file, outside=True)) == 5


def test_every_program_refuses_it_and_knows_the_flag(inside, tmp_path):
    file = inside / "train.jsonl"
    file.write_text(json.dumps(RECORD | {"image": "../private.png"}) + "\n")
    small = ["--steps", "1", "--batch-size", "2"]
    for script, more in ((train_grpo, small), (train_sft, small), (evaluation, ["--train", str(file)])):
        command = ["--data", str(file), *more, "--out", str(tmp_path / script.__name__)]
        assert "field 'image' '../private.png' leads out of" in run(script, *command, expect=2)
        run(script, *command, "--allow-outside")
    annotations = {
        "images": [{"id": 1, "file_name": "../private.png"}],
        "annotations": [{"image_id": 1, "bbox": [1, 1, 8, 8], "category_id": 1}],
        "categories": [{"id": 1, "name": "spot"}],
    }
    (inside / "a.coco.json").write_text(json.dumps(annotations))
    for script, source in ((vlm_r1, file), (coco, inside / "a.coco.json")):
        command = ["--source", str(source), "--out", str(tmp_path / "out")]
        with pytest.raises(InputError, match="leads out of"):
            script.main(command)
        script.main([*command, "--allow-outside", "--overwrite"])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_beyond_the_pixel_limit_is_a_bad_record(workers, inside, tmp_path):
    """From its header; and when it has grown since, by the process that reads it."""
    Image.new("RGB", (60, 60), "gray").save(inside / "b.png")
    file = inside / "train.jsonl"
    file.write_text("".join(json.dumps(RECORD | {"image": name}) + "\n" for name in ("images/a.png", "b.png")))
    command = ["--data", str(file), "--steps", "1", "--batch-size", "2", "--workers", workers]
    for pixels in ("3599", "1700"):  # twice the limit is where Pillow's warning becomes an error
        output = run(train_grpo, *command, "--out", str(tmp_path / "a"), "--pixel-limit", pixels, expect=2)
        assert f"{file}:2: field 'image': image " in output and f"has more than {pixels} pixels; " in output
        assert "--pixel-limit (--skip-bad N" in output and "Warning" not in output
    run(train_grpo, *command, "--out", str(tmp_path / "a"), "--pixel-limit", "3600")
    Image.new("RGB", (200, 200), "gray").save(inside / "b.png")
    sample = evaluation.Sample(inside / "b.png", "x", (1.0, 1.0, 9.0, 9.0), "d", source="here")
    Image.MAX_IMAGE_PIXELS = 3600
    with train_grpo.Readers(int(workers)) as readers:
        config = evaluation.ImageConfig()
        ((_, answer),) = readers.read([0], [sample], config, ahead=1)
    assert "has more than 3600 pixels" in str(answer)


def test_nothing_in_the_house_can_run_what_it_reads():
    """No unpickling, no eval, no code of a checkpoint's: in any file that a user starts or imports."""
    modules = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "runpy", "imp"}
    calls = {"eval", "exec", "compile", "torch.load", "yaml.load", "np.load", "os.system", "os.popen", "__import__"}
    files = [*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("experiments/*.py")]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not {name.partition(".")[0] for name in names} & modules, (file, names)
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{file}:{node.lineno}"
                if ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):  # for EPS, Pillow starts Ghostscript
                    assert "formats" in [word.arg for word in node.keywords], f"{file}:{node.lineno}"
                named = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert named.get("trust_remote_code", "False") == "False", f"{file}:{node.lineno}"
                assert named.get("shell", "False") == "False" and "weights_only" not in named, f"{file}:{node.lineno}"
    assert "from_pretrained(folder, local_files_only=True, trust_remote_code=False)" in (ROOT / "data.py").read_text()
