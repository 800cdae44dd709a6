"""config.py and flags.py: precedence, the recipes, what --resume may change, what is refused and what it became."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import grpo, records, run  # noqa: F401  a fixture

import config
import errors
import scheduler
import train_grpo
from flags import EVAL, FLAGS, GONE, PROGRAMS, RECIPES, SFT

ROOT = Path(__file__).parent.parent


def parse(*flags: str, program: str = "train_grpo.py"):
    return config.parse(program, list(flags))


def refused(capsys, *flags: str, program: str = "train_grpo.py") -> str:
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as end:
        parse(*flags, program=program)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    return said


# ----------------------------------------------------------------------------------------------------------- precedence


def test_there_are_at_most_42_flags_and_help_shows_each_with_its_default(capsys):
    assert len(FLAGS) <= 42
    for program, groups in PROGRAMS.items():
        with pytest.raises(SystemExit) as end:
            parse("--help", program=program)
        text = capsys.readouterr().out
        assert end.value.code == 0
        for flags in groups.values():
            for name in flags:
                assert config.option(name) in text, (program, name)
    assert "(default 0.0001, paper's recipe 1e-06)" in " ".join(text.split()) or program == "eval.py"


def test_given_flags_go_before_the_recipe_and_that_before_the_rows():
    args = parse()
    assert (args.recipe, args.lr, args.steps, args.rewards) == ("nano", 1e-4, 200, "task=1")
    assert (args.group_size, args.clip, args.schedule, args.prompt) == (8, (0.2, 0.2), ["medloc"], None)
    args = parse("--recipe=paper", "--lr=3e-6")
    assert (args.lr, args.steps, args.rewards, args.beta, args.prompt) == (3e-6, 500, "task=1,format=1", 0.04, "think")
    assert parse("--model=somewhere").recipe == "paper" and parse("--model=x", "--recipe=nano").recipe == "nano"
    assert RECIPES["nano"].keys() == RECIPES["paper"].keys() < FLAGS.keys()


def test_the_headline_and_settings_behind_names():
    assert parse("--schedule=medloc").schedule == ["medloc"]
    assert parse("--schedule", "medloc:window=60", "box=raw").schedule == ["medloc:window=60", "box=raw"]
    assert config.read_loss("grpo") == ("grpo", "k3", "keep")
    assert config.read_loss("dapo:kl=k3+,overlong=mask") == ("dapo", "k3+", "mask")
    assert parse("--loss=dr-grpo").advantage == "none" and parse("--loss=dapo").advantage == "std"
    assert parse("--loss=dr-grpo", "--advantage=std").advantage == "std"
    assert parse("--clip", ".1", ".3", "--inner-steps=2").clip == [0.1, 0.3]


def test_help_schedules_lists_all_with_reasons(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help-schedules")
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"{name}\n" in text for name in scheduler.SCHEDULES)
    assert "min_margin=0.1  (s) Delta" in text


def test_ranks_are_those_of_torchrun_or_of_the_memory_to_plan_for(monkeypatch):
    assert parse().ranks == 1
    assert parse("--estimate", "--memory=4x80GB", "--shard").ranks == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse("--shard").ranks == 2


# -------------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "an unknown flag": (["--speed=9"], "unrecognized arguments: --speed=9"),
    "a short form": (["--sched=raw"], "unrecognized arguments: --sched=raw"),
    "an unknown schedule": (["--schedule=fast"], "--schedule: there is no 'fast'; there are medloc, medloc-soft"),
    "two schedules": (["--schedule", "raw", "giou"], "--schedule: raw and giou; one is for all tasks"),
    "an unknown loss": (["--loss=ppo"], "--loss: there is no 'ppo'; there are grpo, dapo, dr-grpo"),
    "an unknown estimator": (["--loss=grpo:kl=k9", "--beta=.1"], "--loss grpo: kl must be one of k3, k3+"),
    "kl without beta": (["--loss=grpo:kl=k3+"], "kl changes nothing beside --beta 0"),
    "clip on policy": (["--clip", ".2", ".3"], "--clip changes nothing beside --inner-steps 1"),
    "a clip of 1": (["--clip", "1", ".3", "--inner-steps=2"], "--clip: LOW must be below 1"),
    "a frozen tower of adapters": (["--lora-rank=4", "--freeze-vision"], "--freeze-vision changes nothing beside"),
    "a schedule without weight": (["--rewards=task=0,format=1", "--schedule=raw"], "--schedule changes nothing beside"),
    "evaluating nothing": (["--data=a.jsonl", "--eval-every=5"], "--eval-every needs --val"),
    "an old reward": (["--rewards=box=1"], "--rewards: 'box' is called 'task' now"),
    "an unknown reward": (["--rewards=luck=1"], "--rewards: no reward is called 'luck'"),
    "one answer a group": (["--group-size=1"], "--group-size must be at least 2"),
    "no rate": (["--lr=0"], "--lr must be above 0"),
    "no number": (["--lr=nan"], "--lr must be a finite number"),
    "too many": (["--steps=10000000000"], "--steps must be at most 1000000000"),
    "NUL": (["--data=a\0b"], "holds a character that no name has"),
    "half a character": (["--out=\udcff"], "holds a character that no name has"),
    "no memory": (["--memory=24"], "--memory wants a number of GB such as 24GB"),
    "many GPUs in a run": (["--memory=4x24GB"], "--memory 4x24GB is for --estimate"),
    "shards of one": (["--shard"], "--shard spreads the weights over several processes, this is one"),
    "no such device": (["--device=tpu"], "--device tpu is not to be had here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_one_sentence(name, capsys):
    flags, words = REFUSED[name]
    assert words in refused(capsys, *flags)


@pytest.mark.parametrize("name", GONE)
def test_a_flag_that_is_gone_says_what_it_became(name, capsys):
    program = "train_sft.py" if name in ("make_nano", "keep_exact") else "train_grpo.py"
    for form in (f"{config.option(name)}=1", config.option(name), f"--no-{name.replace('_', '-')}"):
        said = refused(capsys, form, program=program)
        assert GONE[name].format(name) in said and ("now" in said or "--schedule" in said)
    assert name not in FLAGS


def test_the_flags_of_the_others():
    args = parse("--out=x", "--lr=1e-3", program="train_sft.py")
    assert (args.lr, args.batch_size, args.warmup, args.coarse, args.resume, args.begins) == (
        1e-3,
        32,
        50,
        False,
        False,
        False,
    )
    args = parse("--limit=5", program="eval.py")
    assert (args.out, args.batch_size, args.limit, args.model) == ("out-eval", 50, 5, "nano")
    shared = {name for groups in (SFT, EVAL) for flags in groups.values() for name in flags} & FLAGS.keys()
    assert {"model", "data", "out", "device", "clip_boxes", "allow_outside"} <= shared


def test_the_others_refuse_too(capsys):
    assert "--out is needed" in refused(capsys, program="train_sft.py")
    assert "--warmup must be at least 1" in refused(capsys, "--out=x", "--warmup=0", program="train_sft.py")
    assert "--image and --query go together" in refused(capsys, "--image=a.png", program="eval.py")
    assert "unrecognized arguments: --schedule=raw" in refused(capsys, "--schedule=raw", program="eval.py")


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def begun(tmp_path) -> Path:
    """The config.json of a run."""
    args = parse("--steps=5", "--schedule=fixed:tau=.4", f"--out={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config.describe(args)))
    return tmp_path


def test_resume_takes_the_runs_flags_and_begins_where_there_is_none(begun, tmp_path):
    args = parse("--resume", f"--out={begun}")
    assert (args.resume, args.begins, args.steps, args.schedule) == (True, False, 5, ["fixed:tau=.4"])
    args = parse("--resume", f"--out={tmp_path / 'new'}")
    assert (args.resume, args.begins, args.steps) == (False, True, 200)
    assert "resume" not in json.loads((begun / "config.json").read_text())["arguments"]


def test_what_decides_what_is_learned_cannot_be_changed_on_resume(begun, capsys):
    given = {"lr": "1", "seed": "3", "schedule": "raw", "clip": (".1", ".2"), "advantage": "none", "beta": ".5"}
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        said = refused(capsys, "--resume", f"--out={begun}", config.option(name), *values)
        assert f"--resume goes on with {config.option(name)} " in said and "drop" in said
    free = {"steps": "9", "save_every": "3", "keep": "2", "workers": "0", "micro_batch": "3", "eval_every": "2"}
    for name, value in free.items():
        assert str(getattr(parse("--resume", f"--out={begun}", config.option(name), value), name)) == value
    assert parse("--resume", f"--out={begun}", "--lr=1e-4").lr == 1e-4  # the same is no change


def test_a_schedule_by_share_of_the_steps_keeps_its_length(tmp_path, capsys):
    args = parse("--steps=5", "--schedule=progress", f"--out={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config.describe(args)))
    said = refused(capsys, "--resume", f"--out={tmp_path}", "--steps=6")
    assert "--schedule progress goes by the share of the steps: --steps must stay 5" in said


def test_a_hub_name_stays_at_the_commit_that_the_run_began_with(tmp_path, capsys):
    args = parse("--model=org/name", f"--out={tmp_path}", "--data=a.jsonl")
    args.model = "org/name@0123"
    (tmp_path / "config.json").write_text(json.dumps(config.describe(args)))
    assert parse("--resume", f"--out={tmp_path}", "--model=org/name").model == "org/name@0123"
    assert "--resume goes on with --model" in refused(capsys, "--resume", f"--out={tmp_path}", "--model=org/other")


def test_config_json_says_with_what_it_ran(begun):
    saved = json.loads((begun / "config.json").read_text())
    assert saved["arguments"].keys() == FLAGS.keys() - {"resume", "estimate", "help_schedules"}
    assert {"torch", "transformers", "python"} <= saved["versions"].keys() and saved["threads"] >= 1


def test_a_damaged_config_is_one_sentence(begun):
    (begun / "config.json").write_text('{"arguments": {"steps": "many"}}')
    output = run(train_grpo, "--resume", "--out", str(begun), expect=2)
    assert output.startswith("error: ") and "config.json" in output and output.count("\n") == 1


def test_no_usage_of_forty_lines_stands_before_a_sentence():
    done = subprocess.run(
        [sys.executable, "train_grpo.py", "--nope"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "python train_grpo.py --help lists all" in done.stderr
    )
    assert errors.InputError  # the programs' own
