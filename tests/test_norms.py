"""norms.py, --advantage batch, --combine gdpo and mixtures: rewards of many datasets on one scale."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import grpo, lines, run, small, without_times  # noqa: F401

import eval as evaluation
import kernels
import ranks
import train_grpo
from data import first_of_each, load_samples, parts_of, phantom_samples
from errors import InputError
from norms import ASKED, LEAST, Normalise, Norms, Quartiles, fingerprint, logistic, read_alike, read_norms, rows_of
from rewards import Schedules, combine, group_advantage
from rollout import GroupScores
from runtime.metrics import key_metrics
from runtime.run import by_dataset
from runtime.stream import Mixture, Sampler, sampler_of
from settings import behind_file
from tasks import TASKS
from weights import NANO

EASY, HARD = ("easy", "box"), ("hard", "box")
TABLE = {
    (EASY, "task"): Quartiles(0.4, 0.6, 0.7, 100),
    (HARD, "task"): Quartiles(0.05, 0.12, 0.2, 100, 0.1),
    (EASY, "format"): Quartiles(1.0, 1.0, 1.0, 100, 0.0, True),
    (HARD, "format"): Quartiles(0.0, 1.0, 1.0, 100, 0.1, True),
}


def norms(said: str = "", table: dict | None = None) -> Norms:
    return Norms(dict(TABLE if table is None else table), behind_file(f"n.json:{said}", "", Normalise)[1], "n.json")


# --------------------------------------------------------------------------------------------------------------- norms


def test_quartiles_are_numpys_in_any_order():
    rng = np.random.default_rng(0)
    for n in (30, 31, 1000):
        x = rng.random(n)
        found = Quartiles.of(rng.permutation(x), 0.25)
        assert (found.p25, found.p50, found.p75) == tuple(np.percentile(x, (25, 50, 75)))
        assert (found.n, found.invalid, found.zero_one) == (n, 0.25, False)
    assert Quartiles.of([0, 1, 1.0, 0.0] * 9).zero_one and not Quartiles.of([0, 1, 0.5] * 10).zero_one


def test_the_map_is_the_formula_in_float64():
    """1 / (1 + exp(-3 (x - p50) / IQR)), the exponent within 30, the IQR at least its floor."""
    x = torch.linspace(-3, 4, 500, dtype=torch.float64)
    for q, k, floor in ((TABLE[EASY, "task"], 3.0, 0.02), (Quartiles(0.1, 0.1, 0.1, 30), 2.0, 0.05)):
        z = np.clip(k * (x.numpy() - q.p50) / max(q.p75 - q.p25, floor), -30, 30)
        np.testing.assert_allclose(logistic(x, q, k, floor), 1 / (1 + np.exp(-z)), rtol=1e-12)
    assert logistic(torch.tensor(0.6), TABLE[EASY, "task"], 3.0, 0.02).item() == pytest.approx(
        0.5
    )  # the median earns one half
    wide = logistic(torch.tensor([1e30, -1e30]), TABLE[EASY, "task"], 3.0, 0.02)
    assert wide.isfinite().all() and wide[0] < 1 and wide[1] > 0


def test_answers_that_cannot_be_read_earn_exactly_0_and_zero_one_rewards_stay():
    values, valid = torch.tensor([[0.6, 0.6], [0.12, 0.4]]), torch.tensor([[True, False], [True, True]])
    found = norms().apply("task", values, valid, [EASY, HARD])
    assert found[0].tolist() == [pytest.approx(0.5), 0.0] and found[1, 0] == pytest.approx(0.5)
    assert 0.99 < found[1, 1] < 1
    assert found.dtype == torch.float32
    found = norms("k=2,min_iqr=.5").apply("task", torch.tensor([[0.7]]), valid[:1, :1], [EASY])
    assert found.item() == pytest.approx(1 / (1 + np.exp(-2 * 0.1 / 0.5)))
    raw = norms().apply("format", torch.tensor([[1.0, 1.0], [0.0, 1.0]]), valid, [EASY, HARD])
    assert raw.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    said = norms().check([(key, term) for key in (EASY, HARD) for term in ("task", "format")])
    assert said == ["not normalised, since it was 0 or 1 throughout: easy/box: format, hard/box: format"]
    with pytest.raises(InputError, match="no quartiles of .* 'recite' for dataset 'easy', task 'box'") as caught:
        norms("", {(("d" * 90, f"{i}"), "task"): TABLE[EASY, "task"] for i in range(999)}).check([(EASY, "recite")])
    assert len(str(caught.value)) < 400


def test_a_refresh_takes_the_quartiles_of_its_own_steps_and_resumes_in_the_middle():
    """Every three steps; too few answers leave a key as it was; what others have said in between does not matter."""
    rng = np.random.default_rng(2)
    steps = [torch.tensor(rng.random((4, 8))) for _ in range(8)]
    keys = [EASY] * 3 + [HARD]  # 24 and 8 answers a step
    whole, frozen = norms("refresh=3"), norms()
    resumed = None
    for i, u in enumerate(steps):
        if i == 4:
            state = json.loads(json.dumps(whole.state_dict()))
            resumed = norms("refresh=3")
            resumed.load_state_dict(state, "t")
        for each in filter(None, (whole, frozen, resumed)):
            each.observe(keys, {"task": u, "format": u.round()})
        if resumed:
            assert resumed.state_dict() == whole.state_dict()
    last = torch.cat([u[:3] for u in steps[3:6]])
    assert whole.table[EASY, "task"] == Quartiles.of(last.flatten().tolist())
    assert whole.table[HARD, "task"] == TABLE[HARD, "task"] and 3 * 8 < LEAST  # 24 answers are too few
    assert whole.table[EASY, "task"].invalid is None  # not known, and not 0
    assert whole.table[EASY, "format"].zero_one and frozen.table == TABLE


def test_a_reward_that_was_0_or_1_for_a_while_is_normalised_once_it_is_neither():
    """A hard dataset begins with nothing but zeros, and a policy may fall back there."""
    table = {(HARD, "task"): Quartiles(0.0, 0.0, 0.0, 100, 0.0, True)}
    made = norms("refresh=1", table)
    for u, zero_one in ((torch.rand(3, 10), False), (torch.zeros(3, 10), True), (torch.rand(3, 10), False)):
        made.observe([HARD] * 3, {"task": u})  # of LEAST answers
        assert made.table[HARD, "task"].zero_one == zero_one


def test_quartiles_count_0_for_what_cannot_be_read():
    """Its u is 0 by itself; the words that it recites are not."""
    made = Schedules(["raw"], [EASY], 10, norms("refresh=9", TABLE | {(EASY, "recite"): Quartiles(0.1, 0.2, 0.3, 99)}))
    step = scores(torch.tensor([[-1.0, 0.5]]), [EASY], recite=torch.tensor([[0.7, 0.4]]))
    combine(step, made, {"task": 1.0, "recite": 1.0})
    step.u = step.u.clamp(min=0)  # what says here that it cannot be read
    made.observe(step)
    assert made.norms.seen[EASY, "recite"] == [0.0, pytest.approx(0.4)]
    assert made.norms.seen[EASY, "task"] == [0.0, 0.5]


def test_other_settings_and_quartiles_too_close_are_said():
    table = {(EASY, "task"): Quartiles(0.4, 0.6, 0.7, 100), (HARD, "task"): Quartiles(0.0, 0.0, 0.01, 100)}
    made = norms("", table)
    made.made_by = {"samples": 4, "temperature": 1.0, "prompt": "answer", "model": "m"}
    run = {"temperature": 0.9, "prompt": "answer", "tasks": []}
    assert made.check([(EASY, "task"), (HARD, "task")], run) == [
        "min_iqr 0.02 stands for p75 - p25, which is smaller: hard/box: task",
        "warning: --normalise n.json is of answers under other settings: temperature 1.0, here 0.9",
    ]
    made.made_by["samples"] = 0  # greedy
    assert made.check([(EASY, "task")], run) == []


def test_a_file_that_is_another_on_one_rank_is_refused_on_all(tmp_path, monkeypatch):
    file = tmp_path / "n.json"
    file.write_text(json.dumps({"made_by": {"model": fingerprint(NANO)}, "table": rows_of(TABLE)}))
    assert read_alike(str(file), NANO).table == TABLE
    monkeypatch.setattr(ranks, "gather_objects", lambda work: [work(), "another"])
    with pytest.raises(InputError, match="n.json: is not the same file on all ranks"):
        read_alike(str(file), NANO)


def test_a_state_of_another_file_or_run_is_refused():
    state = norms("refresh=3").state_dict()
    for changes, words in (
        ({"steps": 3}, "steps must be from 0 to 3"),
        ({"steps": -1}, "steps must be from 0"),
        ({"seen": [["easy", "box", "task"]]}, "seen must be a list of"),
        ({"seen": [["easy", "box", "task", [float("nan")]]]}, "seen must hold finite numbers"),
        ({"seen": [["sea", "box", "task", [1.0]]]}, "seen must hold finite numbers of rows that are in the table"),
        ({"seen": [[["easy"], "box", "task", [1.0]]]}, "seen must be a list of"),
        ({"seen": [["easy", "box", "task", [10**400]]]}, "seen must hold finite numbers"),
        ({"table": state["table"][:1]}, "its table is not of the rows of n.json"),
        ({"table": [state["table"][0] | {"p25": 9.0}]}, "row 1 of 'table': p25, p50 and p75 must be rising"),
    ):
        with pytest.raises(InputError, match=f"t: field 'norms': .*{words}"):
            norms("refresh=3").load_state_dict(state | changes, "t")
    other = [state["table"][0] | {"p25": 0.1}, *state["table"][1:]]
    norms("refresh=3").load_state_dict(state | {"table": other}, "t")
    with pytest.raises(InputError, match="its table is not that of n.json, and without refresh it stays"):
        norms().load_state_dict(state | {"table": other}, "t")
    with pytest.raises(InputError, match="must hold steps, table and seen, not None"):
        norms().load_state_dict(None, "t")


@pytest.mark.parametrize(
    "content, said, words",
    [
        ({"table": []}, "", "field 'table' must be a list of rows"),
        ({"table": [{"p25": 1}]}, "", "row 1 of 'table': must have the fields dataset, task, reward, p25"),
        ({"table": "ROWS", "n": 29}, "", "row 1 of 'table': n must be at least 30 answers, not 29"),
        ({"table": "ROWS", "p75": float("nan")}, "", "p25, p50 and p75 must be rising finite numbers"),
        ({"table": "ROWS", "p75": 10**400}, "", "p25, p50 and p75 must be rising finite numbers"),
        ({"table": "ROWS", "invalid": 2}, "", "row 1 of 'table': invalid must be from 0 to 1"),
        ({"table": "ROWS", "twice": True}, "", "easy/box/task is there twice"),
        ({"table": "ROWS", "made_by": {}}, "", "field 'made_by' must say of which model it is"),
        ({"table": "ROWS"}, "", "its quartiles are those of another policy than --model; .*model=any"),
        ({"table": "ROWS"}, "k=0", "k must be a number from 0.01 to 100"),
        ({"table": "ROWS"}, "slope=1", "'slope=1' is none of its settings; it has k, min_iqr, refresh, model"),
    ],
)
def test_a_file_of_norms_that_is_wrong_is_one_sentence(content, said, words, tmp_path):
    content, rows = {"made_by": {"model": "other"}} | content, rows_of(TABLE)
    rows[0] |= {name: content.pop(name) for name in ("n", "p75", "invalid") if name in content}
    rows += rows[:1] * content.pop("twice", False)
    content["table"] = rows if content["table"] == "ROWS" else content["table"]
    file = tmp_path / "n.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        read_norms(f"{file}:{said}", "this")
    assert "\n" not in str(caught.value)


def test_norms_of_this_model_are_read_and_of_any_if_that_is_said(tmp_path):
    file = tmp_path / "n.json"
    file.write_text(json.dumps({"made_by": {"model": fingerprint(NANO)}, "table": rows_of(TABLE)}))
    assert read_norms(str(file), fingerprint(NANO)).table == TABLE
    found = read_norms(f"{file}:model=any,k=2,refresh=9", "another")
    assert found.table == TABLE and found.settings == Normalise(k=2.0, refresh=9, model="any")


def test_a_policy_is_known_by_its_weights_alone(tmp_path):
    """Those of every shard, whatever else lies in its folder."""

    def known(**files: bytes) -> str:
        for name, content in files.items():
            (tmp_path / f"{name}.safetensors").write_bytes(content)
        return fingerprint(tmp_path)

    first = known(model_1=b"ab", model_2=b"c")
    assert known(optimizer=b"x") == first and known(model_2=b"d") != first != known(model_1=b"a", model_2=b"bc")
    assert known(model_1=b"ab", model_2=b"c") == first


# ------------------------------------------------------------------------------------------------- combine, advantage


def scores(u: torch.Tensor, keys: list, **parts: torch.Tensor) -> GroupScores:
    return GroupScores(
        key=u.long(), u=u, reason=(u < 0).long(), length=u, truncated=u.bool(), parts=dict(parts), found=u, keys=keys
    )


def test_rewards_are_normalised_before_they_are_added_and_u_is_observed_raw():
    u, form = torch.tensor([[0.6, 0.7, 0.4], [0.12, 0.2, 0.5]]), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    made = Schedules(["raw"], [EASY, HARD], 10, norms("refresh=1"))
    step = scores(u, [EASY, HARD], format=form)
    reward = combine(step, made, {"task": 2.0, "format": 0.5})
    sigmoid = torch.tensor([[0.0, 3 * 0.1 / 0.3, -3 * 0.2 / 0.3], [0.0, 3 * 0.08 / 0.15, 3 * 0.38 / 0.15]]).sigmoid()
    torch.testing.assert_close(reward, 2 * sigmoid + 0.5 * form)
    alike = [kernels.group_advantage(term, "std") for term in (sigmoid, form)]
    torch.testing.assert_close(combine(step, made, {"task": 2.0, "format": 0.5}, "gdpo"), 2 * alike[0] + 0.5 * alike[1])
    assert torch.equal(step.parts["task"], u)
    plain = combine(scores(u, [EASY, HARD], format=form), Schedules(["raw"], [EASY, HARD], 10), {"task": 2.0})
    torch.testing.assert_close(plain, 2 * u)
    seen = {}
    made.norms.observe = lambda keys, parts: seen.update(keys=keys, parts=parts)
    made.observe(step)
    assert seen["keys"] == [EASY, HARD] and torch.equal(seen["parts"]["task"], u)


def test_gdpo_takes_every_reward_over_its_group_before_it_is_weighted():
    """In float64, by hand; a reward a hundred times as wide rules the sum and not gdpo."""
    torch.manual_seed(0)
    u, wide = torch.rand(5, 8), torch.rand(5, 8) * 100
    wide[2] = 7.0  # says nothing in this group
    made = Schedules(["raw"], [EASY], 10)
    found = combine(scores(u, [EASY] * 5, format=wide), made, {"task": 1.0, "format": 0.5}, "gdpo")
    expected = sum(
        w * (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)
        for w, x in ((1.0, u.double()), (0.5, wide.double()))
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    added = combine(scores(u, [EASY] * 5, format=wide), made, {"task": 1.0, "format": 0.5})

    def agree(a, b):
        return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]

    rows = torch.tensor([0, 1, 3, 4])
    alone = kernels.group_advantage(u, "std")[rows]
    assert agree(group_advantage(added, "std")[rows], alone) < 0.2 < 0.8 < agree(found[rows], alone)


def test_the_batch_s_spread_is_that_of_all_rewards_and_flat_groups_are_0():
    torch.manual_seed(0)
    reward = torch.rand(6, 8)
    reward[3] = 0.7
    wide = reward.double()
    expected = (wide - wide.mean(1, keepdim=True)) / (wide.std() + 1e-4)
    found = group_advantage(reward, "batch")
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert (found[3] == 0).all() and (group_advantage(torch.full((3, 4), 0.3), "batch") == 0).all()
    assert group_advantage(torch.rand(0, 8), "batch").shape == (0, 8)
    assert group_advantage(torch.ones(1, 1), "batch").item() == 0.0
    order = torch.randperm(6)
    torch.testing.assert_close(group_advantage(reward[order], "batch"), found[order])


# ------------------------------------------------------------------------------------------------------------- metrics


def test_a_step_without_a_dataset_counts_as_none_of_its_share(tmp_path):
    """Else the share of a rare one would be that of the steps that it is in."""
    torch.manual_seed(0)
    rows = []
    for step, keys in enumerate(([EASY, EASY], [EASY, HARD], [HARD, HARD], [EASY, EASY]), 1):
        everyone = scores(torch.rand(2, 4), keys)
        everyone.reward, everyone.advantage = everyone.u, torch.ones(2, 4)
        rows.append({"step": step} | key_metrics(everyone, [EASY, HARD]))
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert [row["advantage_share/hard/box"] for row in rows] == [0.0, 0.5, 1.0, 0.0]
    assert [row["groups/hard/box"] for row in rows] == [0, 1, 2, 0]
    assert rows[0]["u_mean/hard/box"] is None and rows[0]["group_std/hard/box"] is None
    assert key_metrics(everyone, [EASY]) == {}
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = dict(line.split(": ", 1) for line in by_dataset(file))
    assert said["hard/box"].endswith("share of |A| 0.375 -> 0.375 (means of 4 steps)")
    assert (
        "share of |A| 0.000 -> 0.000 (means of 1 steps)" in by_dataset(file, 1)[1]
        and "u - -> -" in by_dataset(file, 1)[1]
    )
    file.write_text("")  # lost, and the run had all of its steps
    assert by_dataset(file) == []


# ------------------------------------------------------------------------------------------------------------- mixture


def test_every_run_of_places_has_its_shares_and_every_dataset_its_permutations():
    datasets = ["a"] * 50 + ["b"] * 7 + ["c"] * 200
    made = Mixture(datasets, {"a": 1.0, "b": 2.0, "c": 1.0}, 16, 3)
    drawn = made.take(0, 4000)
    owners = np.array([datasets[i] for i in drawn])
    for first in range(0, 4000, 16):
        counts = {name: int((owners[first : first + 16] == name).sum()) for name in "abc"}
        assert abs(counts["a"] - 4) <= 2 and abs(counts["b"] - 8) <= 2 and abs(counts["c"] - 4) <= 2
    for name, size in (("a", 50), ("b", 7), ("c", 200)):
        own = [i for i in drawn if datasets[i] == name]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == [i for i, d in enumerate(datasets) if d == name]
        assert own[:size] != own[size : 2 * size] or size > len(own) // 2
    again = Mixture(datasets, {"a": 1.0, "b": 2.0, "c": 1.0}, 16, 3)
    assert again.take(1000, 50) == drawn[1000:1050] and again.take(10, 5) == drawn[10:15]  # from anywhere
    assert [again.take(k, 1)[0] for k in range(1, 400, 2)] == drawn[1:400:2]  # as a rank takes its own
    other = Mixture(datasets, {"a": 1.0, "b": 2.0, "c": 1.0}, 16, 4).take(0, 40)  # of another seed: others' turns too
    assert [datasets[i] for i in other] != owners[:40].tolist()
    twins = Mixture(["a"] * 50 + ["b"] * 50, {"a": 1.0, "b": 1.0}, 16, 3).take(0, 120)
    first, second = ([i % 50 for i in twins if i // 50 == own][:50] for own in (0, 1))
    assert first != second and sorted(first) == sorted(second)  # of one size, and not in one order
    assert Mixture(["a", "b"], {"a": 0.1, "b": 0.2}, 2, 0).bounds[-1] == 1.0


def test_data_says_what_weighs_how_much(tmp_path):
    assert parts_of("a.jsonl=2, phantoms=.5,b.jsonl") == [("a.jsonl", 2.0), ("phantoms", 0.5), ("b.jsonl", None)]
    (tmp_path / "k=3").write_text("")
    assert parts_of(str(tmp_path / "k=3")) == [(str(tmp_path / "k=3"), None)]  # a file of that name
    for text in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=x", "=2", "a.jsonl=nan"):
        with pytest.raises(InputError, match="behind = stands a weight above 0"):
            parts_of(text)
    mixed = load_samples("phantoms:xray=1,phantoms:dermoscopy=3", TASKS, 0, "train")
    made = sampler_of(mixed, 16, 0)
    share = np.mean([mixed[i].dataset == "phantoms-xray" for i in made.take(0, 1000)])
    assert isinstance(made, Mixture) and abs(share - 0.25) < 0.01
    assert type(sampler_of(phantom_samples(None, 0, 0, 9), 4, 0)) is Sampler
    for spec, words in (
        ("phantoms:xray=1,phantoms:dermoscopy", "dataset 'phantoms-dermoscopy' has no weight, others have"),
        ("phantoms:xray=1,phantoms:xray=2", "dataset 'phantoms-xray' has two weights"),
        (
            "phantoms:xray=1,phantoms:xray=1",
            "all records are of dataset 'phantoms-xray', so its weight changes nothing",
        ),
    ):
        with pytest.raises(InputError, match=words):
            sampler_of(load_samples(spec, TASKS, 0, "train"), 4, 0)


def test_a_limit_takes_of_each_dataset_alike():
    mixed = phantom_samples("xray", 0, 0, 5) + phantom_samples("ultrasound", 0, 0, 2)
    chosen = first_of_each(mixed, 4)
    assert chosen == mixed[:2] + mixed[5:] and first_of_each(mixed, None) == mixed
    assert first_of_each(mixed, 6) == mixed[:4] + mixed[5:] and first_of_each(mixed[:5], 3) == mixed[:3]


# ----------------------------------------------------------------------------------------------------------- whole runs


def write_norms(out, *flags: str) -> str:
    return run(evaluation, "--out", str(out / "eval"), "--write-norms", str(out / "n.json"), *flags)


MIXED = "phantoms:xray=1,phantoms:ultrasound=2"


def test_norms_are_those_of_the_sampled_answers(tmp_path):
    """By hand, from the same policy's answers; greedy ones are others; too few answers are refused."""
    said = write_norms(tmp_path, "--data", "phantoms:xray", "--limit", "8", "--samples", "4")
    assert re.search(r"quartiles of phantoms-xray/box/task: 0\.\d+ 0\.\d+ 0\.\d+, n 32, cannot be read \d", said)
    content = json.loads((tmp_path / "n.json").read_text())
    assert content["made_by"]["model"] == fingerprint(NANO)
    made_by = {name: content["made_by"][name] for name in ("samples", *ASKED)}
    assert made_by == dict(samples=4, prompt="answer", temperature=1.0, max_tokens=24, knowledge=None)
    rows = {row["reward"]: row for row in content["table"]}
    assert rows["task"]["n"] == 32 and rows["format"]["zero_one"] and not rows["task"]["zero_one"]
    greedy = [json.loads(line)["u"] for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    write_norms(tmp_path, "--data", "phantoms:xray", "--limit", "30", "--samples", "0")
    row = next(r for r in json.loads((tmp_path / "n.json").read_text())["table"] if r["reward"] == "task")
    us = [json.loads(line)["u"] for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert us[:8] == greedy and [row["p25"], row["p50"], row["p75"]] == pytest.approx(np.percentile(us, (25, 50, 75)))
    out = str(tmp_path / "e2")
    flags = ["--data", "phantoms:xray", "--limit", "2", "--out", out, "--write-norms", str(tmp_path / "few.json")]
    said = run(evaluation, *flags, expect=2)
    assert "phantoms-xray/box has 8 answers, quartiles want 30; give more --data, or more --samples" in said
    assert not (tmp_path / "few.json").exists() and not list((tmp_path / "e2").iterdir())  # before anything is asked
    flags[-1] = str(tmp_path / "gone" / "n.json")
    assert "n.json: name a file in a folder that exists" in run(evaluation, *flags, expect=2)


def test_other_targets_are_other_data():
    (sample,) = phantom_samples("xray", 0, 0, 1)
    hashes = [evaluation.digest([replace(sample, **c)]) for c in ({}, {"target": (1.0, 2.0, 3.0, 4.0)}, {"query": "q"})]
    assert len(set(hashes)) == 3 and evaluation.digest([replace(sample)]) == hashes[0]


def test_a_mixture_with_norms_resumes_bit_by_bit_in_the_middle_of_a_refresh(tmp_path):
    (tmp_path / "n.json").write_text(
        json.dumps({"made_by": {"model": fingerprint(NANO)}, "table": [
            {"dataset": f"phantoms-{kind}", "task": "box", "reward": "task", "p25": 0.15, "p50": 0.2, "p75": 0.3,
             "n": 99, "invalid": 0.0, "zero_one": False} for kind in ("xray", "ultrasound")
        ]})
    )  # fmt: skip
    flags = ["--data", *MIXED.split(","), "--schedule", "raw", "--normalise", f"{tmp_path / 'n.json'}:refresh=3"]
    flags += ["--advantage", "batch", "--batch-size", "6", "--group-size", "4", "--eval-limit", "2", "--lr", "1e-3"]
    for out, steps in (("a", "4"), ("b", "2")):
        run(train_grpo, *flags, "--out", str(tmp_path / out), "--steps", steps)
    said = run(train_grpo, "--resume", "--out", str(tmp_path / "b"), "--steps", "4")
    straight = lines(tmp_path / "a" / "metrics.jsonl")
    assert without_times(lines(tmp_path / "b" / "metrics.jsonl")) == without_times(straight)
    states = [json.loads((tmp_path / o / "step-000004" / "trainer.json").read_text())["norms"] for o in "ab"]
    assert states[0] == states[1] and states[0]["steps"] == 1  # one step since the refresh, and two when it stopped
    counts = {row["dataset"]: row["n"] for row in states[0]["table"]}
    assert (
        44 <= counts["phantoms-ultrasound"] <= 52 and counts["phantoms-xray"] == 99
    )  # 12 +- 1 groups; 20 to 28 answers
    words = [
        line for line in by_dataset(tmp_path / "a" / "metrics.jsonl", 2) if line.startswith("phantoms-xray/box: u ")
    ]
    first, last = (
        np.mean([row["advantage_share/phantoms-xray/box"] for row in part]) for part in (straight[:2], straight[-2:])
    )
    assert f"share of |A| {first:.3f} -> {last:.3f} (means of 2 steps)" in words[0] and "share of |A|" in said
    (tmp_path / "n.json").write_text((tmp_path / "n.json").read_text() + " ")
    words = run(train_grpo, "--resume", "--out", str(tmp_path / "b"), "--steps", "5", expect=2)
    assert "refresh=3 is not the file that the run began with; restore it" in words
    row, ends = straight[-1], [f"phantoms-{kind}/box" for kind in ("xray", "ultrasound")]
    assert sum(row[f"advantage_share/{end}"] for end in ends) == pytest.approx(1)
    counts = [row[f"groups/{end}"] for end in ends]
    assert sum(counts) == 6 and abs(counts[0] - 2) <= 1
    for name in ("u_mean", "reward_mean", "group_std", "zero_spread"):
        assert all(f"{name}/{end}" in row for end in ends)
    parts = sum(count * row[f"u_mean/{end}"] for count, end in zip(counts, ends, strict=True))
    assert row["u_mean"] == pytest.approx(parts / 6)


def test_rewards_that_are_0_or_1_and_other_files_are_refused(tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.png", "query": "it", "bbox": [1, 2, 20, 30]}))
    flags = small(tmp_path / "o", tmp_path / "t.jsonl")
    assert "--normalise is for --schedule raw" in run(train_grpo, *flags, "--normalise", "n.json", expect=2)
    words = run(train_grpo, *flags, "--normalise", "gone.json", "--schedule", "raw", expect=2)
    assert "gone.json: does not exist" in words
    table = {(("other", "box"), "task"): TABLE[EASY, "task"]}  # of another policy, whose weights no estimate reads
    (tmp_path / "n.json").write_text(json.dumps({"made_by": {"model": "any"}, "table": rows_of(table)}))
    for norms, words in (("gone.json", "gone.json: does not exist"), ("n.json", "no quartiles of the reward 'task'")):
        asked = [*flags, "--normalise", str(tmp_path / norms), "--schedule", "raw", "--estimate"]
        assert words in run(train_grpo, *asked, expect=2)
    words = run(train_grpo, *flags, "--combine", "gdpo", expect=2)
    assert "--combine gdpo changes nothing beside --rewards task=1: only one counts" in words
