"""config.py: what wins over what, and that flags which cannot be meant end the program by name."""

import json
import math
from argparse import Namespace
from dataclasses import asdict, fields

import pytest

import config
import scheduler
from config import DEFAULTS, RECIPES, parse_arguments
from errors import InputError
from scheduler import ScheduleConfig


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_arguments(list(flags))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_every_default_has_a_flag_and_every_flag_a_default():
    flags = {name for helps in config.GROUPS.values() for name in helps}
    assert flags == DEFAULTS.keys() | RECIPES["nano"].keys() | {f.name for f in fields(ScheduleConfig)}
    assert RECIPES["nano"].keys() == RECIPES["paper"].keys()


def test_the_recipe_follows_the_model_and_explicit_flags_win(tmp_path):
    assert parse_arguments([]).recipe == "nano" and parse_arguments(["--model", str(tmp_path)]).recipe == "paper"
    paper = parse_arguments(["--recipe", "paper"])
    settings = (paper.lr, paper.group_size, paper.temperature, paper.beta, paper.rewards, paper.prompt)
    assert settings == (1e-6, 8, 0.9, 0.04, "box=1,format=1", "think") and paper.warmup > 0
    assert parse_arguments(["--recipe", "paper", "--lr", "3e-6"]).lr == 3e-6
    assert parse_arguments(["--stages", "0.5", "0.7"]).stages == [0.5, 0.7]


def test_a_resumed_run_keeps_its_flags_and_frees_some(tmp_path, capsys):
    saved = {"lr": 0.5, "steps": 7, "recipe": "paper", "model": "nano", "loss": "dapo"}
    (tmp_path / "config.json").write_text(json.dumps({"arguments": saved}))
    resume = ["--resume", "--out", str(tmp_path)]
    args = parse_arguments(resume)
    assert (args.lr, args.steps, args.recipe, args.loss, args.batch_size) == (0.5, 7, "paper", "dapo", 8)
    assert parse_arguments([*resume, "--steps", "9", "--loss", "dapo"]).steps == 9
    assert "--resume goes on with --loss dapo, not grpo: drop --loss" in refused(capsys, *resume, "--loss", "grpo")


IMPOSSIBLE = {
    "unknown flag": (["--lerning-rate", "1"], "unrecognized arguments: --lerning-rate"),
    "abbreviated flag": (["--sched", "raw"], "unrecognized arguments: --sched"),
    "unknown schedule": (["--schedule", "easy"], "--schedule: invalid choice: 'easy'"),
    "unknown loss": (["--loss", "ppo"], "--loss: invalid choice: 'ppo'"),
    "not a number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "ranks of a run": (["--ranks", "2"], "--ranks is for --estimate; a run has as many as torchrun starts"),
    "no rank": (["--estimate", "--ranks", "0"], "--ranks must be at least 1"),
    "one shard": (["--estimate", "--shard"], "this is one: give --ranks N"),
    "fewer than no workers": (["--workers", "-1"], "--workers must be at least 0"),
    "negative": (["--dynamic-sampling", "-1"], "--dynamic-sampling must be at least 0"),
    "no temperature": (["--temperature", "0"], "--temperature must be above 0"),
    "nan": (["--lr", "nan"], "--lr must be a finite number, not nan"),
    "infinite": (["--lr", "inf"], "--lr must be a finite number, not inf"),
    "nan that passes no comparison": (["--beta", "nan"], "--beta must be a finite number"),
    "adapters that count nothing": (["--lora-rank", "4", "--lora-alpha", "0"], "--lora-alpha must be above 0"),
    "seed": (["--seed", str(2**63)], f"--seed must be at most {2**63 - 1}"),
    "memory without end": (["--memory", "9" * 400 + "GB"], "--memory wants a number of GB such as 24GB"),
    "a graphics card that is none": (["--estimate", "--device", "cudafoo"], "--device cudafoo is not to be had here"),
    "the card of another world": (["--estimate", "--device", "cuda:" + "9" * 30], "is not to be had here"),
    "NUL": (["--out", "a\0b"], r"--out a\x00b holds a character that no name has"),
    "a name that is no UTF-8": (["--data", "a\udcff"], r"--data a\udcff holds a character that no name has"),
    "a name that steers a terminal": (["--val", "\x1b[2J"], r"--val \x1b[2J holds a character that no name has"),
    "stages that are no number": (["--stages", "nan", "0.5"], "--stages must be a finite number, not nan"),
    "a device without numbers": (["--device", "meta"], "--device meta is not to be had here"),
    "reward named twice": (["--rewards", "box=1,box=2"], "--rewards: 'box' is named twice"),
    "linear's": (["--delta0", "0.1"], "--delta0 changes nothing beside --delta-schedule piecewise"),
    "piecewise's": (
        ["--delta-schedule", "linear", "--beta1", "0.5"],
        "--beta1 changes nothing beside --delta-schedule",
    ),
    "hit rate unchecked": (
        ["--no-check-reward", "--min-hit-rate", "0.9", "0.8", "0.7"],
        "--min-hit-rate changes nothing beside --no-check-reward",
    ),
    "margin unchecked": (
        ["--no-check-margin", "--min-margin", "0.2"],
        "--min-margin changes nothing beside --no-check",
    ),
    "stability unchecked": (
        ["--no-check-stability", "--max-sigma", "0.2", "0.2", "0.2"],
        "--max-sigma changes nothing",
    ),
    "the box does not count": (["--rewards", "format=1", "--tau-start", "0.2"], "--tau-start changes nothing beside"),
    "no group": (["--group-size", "1"], "--group-size must be at least 2"),
    "no clipping": (["--inner-steps", "2", "--clip-low", "1"], "--clip-low must be below 1"),
    "unknown reward": (["--rewards", "box=1,bleu=1"], "--rewards: no reward is called 'bleu'; there are box, format"),
    "half a reward": (["--rewards", "box"], "--rewards: 'box' must be NAME=WEIGHT"),
    "no reward": (["--rewards", "box=0"], "gives every reward the weight 0"),
    "infinite reward": (["--rewards", "box=inf"], "'box=inf' must have a finite weight"),
    "no such device": (["--device", "cuda:99"], "--device cuda:99 is not to be had here"),
    "no device at all": (["--device", "tpuu"], "--device tpuu is not to be had here"),
    "kl without beta": (["--kl", "k3+"], "--kl changes nothing beside --beta 0"),
    "clip on policy": (["--clip-high", "0.28"], "--clip-high changes nothing beside --inner-steps 1"),
    "alpha without adapters": (["--lora-alpha", "32"], "--lora-alpha changes nothing beside --lora-rank 0"),
    "frozen twice": (["--lora-rank", "8", "--freeze-vision"], "--freeze-vision changes nothing beside --lora-rank"),
    "another schedule's": (
        ["--schedule", "raw", "--tau-start", "0.2"],
        "--tau-start changes nothing beside --schedule",
    ),
    "medloc's": (
        ["--schedule", "fixed", "--no-check-margin"],
        "--check-margin changes nothing beside --schedule fixed",
    ),
    "fixed's": (["--fixed-tau", "0.4"], "--fixed-tau changes nothing beside --schedule medloc"),
    "nothing to evaluate": (["--data", "a.jsonl", "--eval-every", "5"], "--eval-every needs --val"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_and_idle_flags_are_refused_by_name(name, capsys):
    flags, words = IMPOSSIBLE[name]
    assert words in refused(capsys, *flags)


@pytest.mark.parametrize("name", sorted({name for names in config.MOST.values() for name in names.split()}))
def test_a_slip_of_the_keyboard_is_refused_before_anything_is_loaded(name, capsys):
    """--window 10**30; for the flags of all programs, of which this one's come by its command line."""
    most = next(most for most, names in config.MOST.items() if name in names.split())
    sentence = f"{config.flag(name)} must be at most {most}"
    for value in (most * 2, 10**30):
        assert sentence in list(config.out_of_bounds(Namespace(**{name: value, "another": None})))
    assert not list(config.out_of_bounds(Namespace(**{name: most})))
    if name in DEFAULTS | RECIPES["nano"] | {"window": 30}:
        assert sentence in refused(capsys, config.flag(name), str(10**30))


def test_bounds_let_in_what_anybody_has_use_for():
    """Each flag with a kind of number has a largest value, or what it is good for says one (tau and its kin: 1)."""
    bounded = {name for names in config.MOST.values() for name in names.split()}
    known = DEFAULTS | RECIPES["nano"]
    numbers = {name for name in known if config.TYPES.get(name, type(known[name])) in (int, float)}
    assert numbers - bounded == {"clip_low"}
    assert not list(config.out_of_bounds(Namespace(**asdict(ScheduleConfig()), **DEFAULTS, **RECIPES["paper"])))
    assert list(config.out_of_bounds(Namespace(lr=math.inf))) == [
        "--lr must be a finite number, not inf",
        "--lr must be at most 10000",
    ]
    assert list(config.out_of_bounds(Namespace(coarse_shift=-0.1))) == ["--coarse-shift must be at least 0"]


@pytest.mark.parametrize("name", sorted(scheduler.SCHEDULES))
def test_a_schedule_owns_just_the_switches_that_change_what_it_does(name):
    """Turn each switch, feed both schedules the same steps: what it does not own changes neither reward nor tau."""
    other = dict(
        tau_start=0.2, tau_target=0.4, refresh="full", check_reward=False, check_stability=False, check_margin=False,
        stages=(0.1, 0.2), min_hit_rate=(0.1,) * 3, max_sigma=(0.0,) * 3, min_margin=0.5, delta_schedule="linear",
        beta1=0.1, beta2=0.9, delta0=0.05, soft_scale=0.3, fixed_tau=0.7,
    )  # fmt: skip
    for switch, value in other.items():
        traces = []
        for settings in ({}, {switch: value}):
            schedule = scheduler.make_schedule(name, ScheduleConfig(window=2, **settings), 30)
            trace = []
            for step in range(30):
                trace.append((schedule.tau, schedule.reward(0.45, 0.4, True)))
                schedule.observe([[0.55 + 0.01 * (step % 3), 0.9 - 0.02 * (step % 5)]] * 2)
            traces.append(trace)
        if switch not in schedule.own:
            assert traces[0] == traces[1], switch


OWNED = {  # schedule -> its switches, and values beside which the traces below must differ
    "medloc": dict(
        tau_start=0.2, tau_target=0.4, refresh="full", check_reward=False, check_margin=False,
        min_hit_rate=(1.0,) * 3, max_sigma=(0.0,) * 3, min_margin=0.5, delta_schedule="linear", beta1=0.1,
    ),
    "medloc-soft": dict(soft_scale=0.3, tau_start=0.2),
    "fixed": dict(fixed_tau=0.7),
    "progress": dict(tau_start=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", OWNED)
def test_the_switches_that_a_schedule_owns_change_what_it_does(name):
    """In one of two stories: now and then a group misses, and the margin decides; half of each group is good, and the
    hit rate does."""
    stories = [[[0.1, 0.9]] + [[0.85, 0.9]] * 3, [[0.85, 0.9]] * 4], [[[0.55, 0.95]] * 4]
    for switch, value in OWNED[name].items():
        traces = []
        for settings in ({}, {switch: value}):
            trace = []
            for story in stories:
                schedule = scheduler.make_schedule(name, ScheduleConfig(window=12, **settings), 30)
                for step in range(30):
                    trace.append((schedule.tau, schedule.reward(0.45, 0.4, True)))
                    schedule.observe(story[min(step % 3, len(story) - 1)])
            traces.append(trace)
        assert switch in schedule.own and traces[0] != traces[1], switch


def test_a_damaged_config_of_a_resumed_run_is_named(tmp_path, capsys):
    resume = ["--resume", "--out", str(tmp_path)]
    for content, words in (
        ({"arguments": []}, "field 'arguments' is no object"),
        ({}, "field 'arguments' is no object"),
        ({"arguments": {"lr": "fast"}}, "--lr is 'fast' in it"),
        ({"arguments": {"steps": 2.5}}, "--steps is 2.5 in it"),
        ({"arguments": {"check_margin": 1}}, "--check-margin is 1 in it"),
        ({"arguments": {"stages": 0.5}}, "--stages is 0.5 in it"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="config.json: ") as error:
            parse_arguments(resume)
        assert words in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"lr": 1, "val": None, "stages": [0.5, 0.6]}}))
    assert parse_arguments(resume).lr == 1


def test_one_gpu_for_several_ranks_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cuda:0 is one GPU for all processes" in refused(capsys, "--device", "cuda:0")


def test_sharding_is_refused_where_it_would_do_nothing(monkeypatch, capsys):
    assert "--shard spreads the weights over several processes, this is one" in refused(capsys, "--shard")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "drop one of the two" in refused(capsys, "--shard", "--lora-rank", "4")
    assert "give --decode eager" in refused(capsys, "--shard", "--decode", "graph", "--device", "cuda")
