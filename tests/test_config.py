"""config.py and flags.py: what goes before what, what --resume may change, what is refused, what old flags became."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import pytest

import config
import loss
import scheduler
import settings
from errors import InputError
from flags import FLAGS, GONE, PROGRAMS, RECIPES, SWITCHES

ROOT = Path(__file__).parent.parent
GRPO, SFT, EVAL = PROGRAMS
ROWS = {program: {n: f for group in groups.values() for n, f in group.items()} for program, groups in PROGRAMS.items()}


def parse(*flags: str, program: str = GRPO):
    return config.parse(program, list(flags))


def refused(capsys, *flags: str, program: str = GRPO) -> str:
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as end:
        parse(*flags, program=program)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    assert said.endswith(f" (python {program} --help lists all flags)\n")
    return said


# ---------------------------------------------------------------------------------------------------------- precedence


def test_help_lists_each_flag_with_its_default_and_each_schedule_with_reasons(capsys):
    texts = []
    for program, flag in [*((program, "--help") for program in PROGRAMS), (GRPO, "--help-schedules")]:
        with pytest.raises(SystemExit, match="^0$"):
            parse(flag, program=program)
        texts.append(capsys.readouterr().out)
    for text, rows in zip(texts[:3], ROWS.values(), strict=True):
        assert set(re.findall(r"^  (--[\w-]+)", text, re.M)) == {config.option(name) for name in rows}
    assert "(default 0.0001, paper's recipe 1e-06)" in " ".join(texts[0].split())
    assert "(default 0.0005)" in texts[1] and "(default out-eval)" in texts[2]
    assert all(f"{name}\n" in texts[3] for name in scheduler.SCHEDULES) and "min_margin=0.1  (s) Delta" in texts[3]
    assert "\n--tasks\nbox\nboxes\n  u=iou  " in texts[3] and "\nlabel\ngrade\n  ordinal=power  " in texts[3]


def test_given_flags_go_before_the_recipe_and_that_before_the_rows():
    args = parse()
    assert (args.recipe, args.lr, args.steps, args.rewards) == ("nano", 1e-4, 200, "task=1")
    assert (args.group_size, args.clip, args.schedule, args.prompt) == (8, (0.2, 0.2), ["medloc"], None)
    args = parse("--recipe=paper", "--lr=3e-6")
    assert (args.lr, args.beta, args.temperature, args.rewards) == (3e-6, 0.04, 0.9, "task=1,format=1")
    assert parse("--model=somewhere").recipe == "paper" and parse("--model=x", "--recipe=nano").recipe == "nano"
    assert RECIPES["nano"].keys() == RECIPES["paper"].keys() < FLAGS.keys()
    args = parse("--lr=1e-3", "--out=x", program=SFT)  # the others have defaults of their own
    assert (args.lr, args.batch_size, args.warmup, args.steps, args.coarse) == (1e-3, 32, 50, 200, False)
    args = parse("--limit=5", program=EVAL)
    assert (args.out, args.batch_size, args.limit, args.model) == ("out-eval", 50, 5, "nano")


def test_values_of_several_words_and_settings_behind_names():
    assert parse("--schedule=medloc").schedule == ["medloc"]
    assert parse("--schedule", "medloc:window=60", "box=raw").schedule == ["medloc:window=60", "box=raw"]
    assert config.read_loss("grpo") == ("grpo", "k3", "keep")
    assert config.read_loss("dapo:kl=k3+,overlong=mask") == ("dapo", "k3+", "mask")
    assert parse("--loss=dr-grpo:overlong=mask").advantage == "none" and parse("--loss=dapo").advantage == "std"
    assert parse("--loss=dr-grpo", "--advantage=std").advantage == "std"
    assert parse("--combine=gdpo", "--rewards=task=1,format=1").advantage == "batch"
    parse("--rewards=task=0,format=1", "--normalise=n.json")  # without a word on the schedule, which does not count
    assert parse("--clip", ".1", ".3", "--inner-steps=2").clip == [0.1, 0.3]
    assert parse().checkpointing is None and parse("--no-checkpointing").checkpointing is False


def test_ranks_are_those_of_torchrun_or_of_the_memory_to_plan_for(monkeypatch, capsys):
    assert parse().ranks == 1
    assert parse("--estimate", "--memory=4x80GB", "--shard", "--device=cuda").ranks == 4  # planning for GPUs needs none
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse("--shard").ranks == 2
    assert "--device cuda:0 is one GPU for all processes" in refused(capsys, "--device=cuda:0")
    assert "drop one of the two" in refused(capsys, "--shard", "--lora-rank=4")


# ------------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "an unknown flag": (["--speed=9"], "unrecognized arguments: --speed=9"),
    "a short form": (["--sched=raw"], "unrecognized arguments: --sched=raw"),
    "an unknown schedule": (["--schedule=fast"], "--schedule: there is no 'fast'; there are medloc, medloc-soft"),
    "an unknown one of a task": (["--schedule", "raw", "box=fast"], "--schedule: there is no 'fast'"),
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
    "one answer a group": (["--group-size=1"], "--group-size must be at least 2"),
    "no rate": (["--lr=0"], "--lr must be above 0"),
    "NUL": (["--data=a\0b"], r"--data a\x00b holds a character that no name has"),
    "half a character": (["--out=a\udcff"], r"--out a\udcff holds a character that no name has"),
    "what steers a terminal": (["--val=\x1b[2J"], r"--val \x1b[2J holds a character that no name has"),
    "memory without a unit": (["--memory=24"], "--memory wants a number of GB such as 24GB"),
    "no memory": (["--estimate", "--memory=4x0.0GB"], "--memory wants a number of GB such as 24GB"),
    "no GPU": (["--estimate", "--memory=0x80GB"], "--memory wants a number of GB such as 24GB"),
    "many GPUs in a run": (["--memory=4x24GB"], "--memory 4x24GB is for --estimate"),
    "shards of one": (["--shard"], "--shard spreads the weights over several processes, this is one"),
    "no such device": (["--device=tpu"], "--device tpu is not to be had here"),
    "a device without numbers": (["--device=meta"], "--device meta is not to be had here"),
    "a card that is none": (["--estimate", "--device=cudafoo"], "--device cudafoo is not to be had here"),
    "the card of another world": (["--estimate", f"--device=cuda:{'9' * 30}"], "is not to be had here"),
    "a training without a folder": ([], "--out is needed", SFT),
    "a warm-up of 0": (["--out=x", "--warmup=0"], "--warmup must be at least 1", SFT),
    "another program's flag": (["--schedule=raw"], "unrecognized arguments: --schedule=raw", EVAL),
    "a picture alone": (["--image=a.png"], "--image and --query go together", EVAL),
    "a coarseness of nothing": (
        ["--out=x", "--coarse-scale=.5"],
        "--coarse-scale changes nothing without --coarse",
        SFT,
    ),
    "knowledge for a training that is none": (["--knowledge=records:used=train"], "used=train is for training", EVAL),
    "nothing to recite": (["--rewards=task=1,recite=-.5"], "recite has nothing to recite without --knowledge"),
    "a setting of no task": (["--tasks", "grade:slope=2"], "--tasks grade: 'slope=2' is none of its settings"),
    "normalised hits": (["--normalise=n.json"], "--normalise is for --schedule raw: a reward of medloc is 0 or 1"),
    "the temperature of greedy answers": (
        ["--write-norms=n.json", "--samples=0", "--temperature=.9"],
        "--temperature changes nothing beside --samples 0",
        EVAL,
    ),
    "norms of answers that are there": (["--write-norms=", "--predictions=p"], "--write-norms asks a policy", EVAL),
    "weights of what is evaluated": (["--val=b.jsonl,a.jsonl=2"], "--val a.jsonl=2: a weight is for data to train on"),
    "weights of a data set to evaluate": (["--data=phantoms=.5"], "--data phantoms=0.5: a weight is for data to", EVAL),
    "weights of a constant": (["--train=a.jsonl=2"], "--train a.jsonl=2: a weight is for data to train on", EVAL),
    "a weight that is none": (["--val=a.jsonl=x", "--out=x"], "--val a.jsonl=x: behind = stands a weight above 0", SFT),
    "a query of nothing": (["--image=a.png", "--query="], "--query: ", EVAL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_one_sentence(name, capsys):
    flags, words, *program = REFUSED[name]
    assert words in refused(capsys, *flags, program=(program or [GRPO])[0])


@pytest.mark.parametrize("program", PROGRAMS)
def test_numbers_have_bounds_that_let_in_what_anybody_has_use_for(program, capsys):
    """A slip of the keyboard, such as --steps 10**30, is refused before anything is loaded; so is what is no number."""
    rows = ROWS[program]
    for name, flag in ((name, flag) for name, flag in rows.items() if flag.kind in (int, float)):
        assert math.isfinite(flag.least) and math.isfinite(flag.most)
        option, fill = config.option(name), ["1"] * ((flag.count or 1) - 1) + ["--out=x"]
        slips = {"-1000": f"at least {flag.least}", str(10**30): f"at most {flag.most}"}
        slips |= {"nan": "a finite number, not nan", "inf": "a finite number, not inf"} if flag.kind is float else {}
        for value, words in slips.items():
            assert f"{option} must be {words}" in refused(capsys, option, value, *fill, program=program)
        assert not list(config.out_of_bounds(Namespace(**{name: flag.most}), rows))
    for recipe in RECIPES.values() if program == GRPO else [{}]:
        defaults = {name: flag.default for name, flag in rows.items()} | recipe
        assert not list(config.out_of_bounds(Namespace(**defaults), rows))


OLD = """tau_start tau_target window unit stale refresh check_reward check_stability check_margin stages min_hit_rate
max_sigma min_margin delta_schedule beta1 beta2 delta0 soft_scale fixed_tau kl overlong clip_low clip_high clip ranks
queries grad_clip dtype decode lora_alpha pixel_limit samples_every deterministic make_nano keep_exact""".split()


@pytest.mark.parametrize("name", OLD)
def test_a_flag_that_is_gone_says_what_it_became_and_that_is_there(name, capsys):
    option, words = config.option(name), GONE[name].format(name)
    for form in (f"{option}=1", option, option.replace("--", "--no-", 1)):
        said = refused(capsys, form, program=EVAL if name == "clip" else GRPO)
        assert said.startswith(f"error: {form.partition('=')[0]} {words} (python ")
    assert GONE.keys() == set(OLD)
    assert set(re.findall(r" --[\w-]+", words)) - {" --keep-exact"} <= {f" {config.option(name)}" for name in FLAGS}
    kinds = {name: kind.Settings for name, kind in scheduler.SCHEDULES.items()} | dict.fromkeys(loss.KINDS, config.Loss)
    if found := re.search(r"--(?:schedule|loss) ((\S+):(\w+)=)(\S*)", words):
        default = settings.written(getattr(kinds[found[2]](), found[3]))
        settings.read(found[1] + (found[4] or default), "--", kinds)
    elif found := re.search(r"is ([A-Z_]+) in (\S+\.py) now", words):
        assert f"\n{found[1]} = " in (ROOT / found[2]).read_text()
    elif found := re.search(r"python -m (\w+)\.(\w+)", words):
        assert (ROOT / found[1] / f"{found[2]}.py").is_file()


# -------------------------------------------------------------------------------------------------------------- resume


def begin(folder: Path, *flags: str, program: str = GRPO, **later) -> str:
    """A run's config.json, `later` what the program itself put into it. -> --out"""
    described = config.describe(config.parse(program, [*flags, f"--out={folder}"]))
    described["arguments"] |= later
    (folder / "config.json").write_text(json.dumps(described))
    return f"--out={folder}"


def test_resume_takes_the_runs_flags_and_begins_where_there_is_none(tmp_path):
    out = begin(tmp_path, "--steps=5", "--schedule=fixed:tau=.4", "--recipe=paper")
    args = parse("--resume", out)
    assert (args.resume, args.begins, args.steps, args.schedule) == (True, False, 5, ["fixed:tau=.4"])
    assert (args.recipe, args.lr, args.beta) == ("paper", 1e-6, 0.04)
    args = parse("--resume", f"--out={tmp_path / 'new'}")
    assert (args.resume, args.begins, args.steps) == (False, True, 200)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["arguments"].keys() == FLAGS.keys() - set(SWITCHES)
    assert {"torch", "transformers", "python"} <= saved["versions"].keys() and saved["threads"] >= 1


def test_what_decides_what_is_learned_cannot_be_changed_on_resume(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("Where is\n{query}?")
    resume = ["--resume", begin(tmp_path, prompt="answer")]
    given = {"lr": "1", "seed": "3", "schedule": "raw", "loss": "dapo", "advantage": "none", "beta": ".5"}
    for name, value in (given | {"prompt": str(tmp_path / "q.txt")}).items():
        said = refused(capsys, *resume, config.option(name), value)
        assert f"--resume goes on with {config.option(name)} " in said and f"drop {config.option(name)} or" in said
    free = {"steps": "9", "save_every": "3", "keep": "2", "workers": "0", "micro_batch": "3", "eval_every": "2"}
    for name, value in free.items():
        assert str(getattr(parse(*resume, config.option(name), value), name)) == value
    assert parse(*resume, "--lr=1e-4", "--schedule=medloc").lr == 1e-4  # no change
    said = refused(capsys, "--resume", begin(tmp_path, "--steps=5", "--schedule=progress"), "--steps=6")
    assert "--schedule progress goes by the share of the steps: --steps must stay 5" in said
    resume = ["--resume", begin(tmp_path, program=SFT)]  # whose cosine ends with the steps
    assert "--resume goes on with --steps 200, not 9" in refused(capsys, *resume, "--steps=9", program=SFT)
    assert parse(*resume, "--keep=2", program=SFT).resume


def test_a_hub_name_stays_at_the_commit_that_the_run_began_with(tmp_path, capsys):
    out = begin(tmp_path, "--model=org/name", "--data=a.jsonl", model="org/name@0123")
    assert parse("--resume", out, "--model=org/name").model == "org/name@0123"
    assert "--resume goes on with --model" in refused(capsys, "--resume", out, "--model=org/other")


NONE = {
    GRPO: "micro_batch eval_limit log memory checkpointing advantage knowledge tasks normalise judge",
    SFT: "max_tokens knowledge",
}  # what may have no value


@pytest.mark.parametrize("program", NONE)
def test_a_saved_value_or_switch_that_no_command_line_can_have_given_is_refused(program, tmp_path):
    """Of other damage: test_state.py. Whatever --out says, the file's folder counts."""
    none = f"val max_pixels prompt keep out {NONE[program]}".split()
    for name in sorted(ROWS[program].keys() - set(none)):
        out = begin(tmp_path, program=program, **{name: True if name in SWITCHES else None})
        with pytest.raises(InputError, match=f"config.json: .*{name.replace('_', '.')}.*; restore it, or start a new"):
            config.parse(program, ["--resume", out])
    assert config.parse(program, ["--resume", begin(tmp_path, program=program, prompt="think")]).prompt == "think"
