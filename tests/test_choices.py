"""tasks/label.py and grade.py: what an answer names and earns, how a policy is measured, what a record must say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import read_records, run

import eval as evaluation
import train_sft
from errors import InputError
from eval import Original, confusion_picture, confusions, metrics, score_rows
from images import Sample
from rewards import Schedules
from rollout import Rollout, score
from tasks import TASKS, configure, summary
from tasks.grade import Grade, Ordinal, quadratic_kappa, read_grade
from tasks.label import Choice, named_in, stated

OPTIONS = ("nevus", "atypical nevus", "melanoma", "malignant", "no lesion", "黑色素瘤")
NAMED = [  # answer -> options that it names
    ("melanoma", [2]),
    ("  **Melanoma**. ", [2]),
    ("The picture shows a MELANOMA, I think.", [2]),
    ('{"label": "Melanoma"}', [2]),
    ('```json\n{"answer": "melanoma", "reason": "no nevus has these colours"}\n```', [2]),
    ('{"label": "nevus", "label": "melanoma"}', [0, 2]),
    ('{"label": ["nevus", "melanoma"]}', [0, 2]),
    ('{"label": null, "note": "melanoma"}', []),
    ('{"diagnosis": "melanoma"}', [2]),  # as a sentence
    ('{"label": "melanoma"', [2]),
    ("<think> nevus or malignant? </think>\n<answer> melanoma </answer>", [2]),
    ("<answer>nevus</answer> no, wait: <answer>melanoma</answer>", [2]),
    ("<think> it is a nevus </think> melanoma", [2]),
    ("ＭＥＬＡＮＯＭＡ", [2]),
    ("atypical  nevus", [1]),  # the longer name, and not both
    ("an atypical nevus, not a nevus", [1, 0]),
    ("nevus, melanoma", [0, 2]),
    ("not melanoma but nevus", [2, 0]),
    ("melanoma; melanoma!", [2]),
    ("答案是黑色素瘤。", [5]),  # a script without blanks
    ("No lesion", [4]),
    ("non-malignant", []),
    ("non\u2010malignant", []),  # typography's hyphens
    ("non\u2011malignant", []),
    ("non\u2013malignant", []),
    ("nevus/melanoma", [0, 2]),
    ("no, melanoma", [2]),
    ("I have no doubt: melanoma", [2]),
    ("melanomas", []),
    ("<think> melanoma, so", []),  # cut off in its thought
    ("<answer></answer> melanoma", []),
    ("", []),
]


@pytest.mark.parametrize("text, indices", NAMED)
def test_exactly_one_option_must_be_named(text, indices):
    assert list(named_in(stated(text), OPTIONS)) == indices
    original = Original(Sample(None, "", None, "d", "label"), Choice("melanoma", OPTIONS))
    scores = TASKS["label"].score([text], [original])
    assert scores.u.tolist() == [float(indices == [2])] and scores.valid.tolist() == [len(indices) == 1]
    assert scores.reasons == ["" if len(indices) == 1 else "several options" if indices else "no option"]
    assert scores.answers == [OPTIONS[indices[0]] if len(indices) == 1 else None]


@pytest.mark.parametrize(
    "text",
    "not melanoma|This is not a melanoma.|no evidence of melanoma|It isn't melanoma|It isn\u2019t a melanoma|"
    "without melanoma|melanoma? No, not melanoma|not a melanoma: a melanoma is ragged|"
    "rules out melanoma|\u4e0d\u662f\u9ed1\u8272\u7d20\u7624".split("|"),
)
def test_an_option_that_is_denied_is_no_answer(text):
    for label in ("melanoma", "nevus", OPTIONS[5]):
        original = Original(Sample(None, "", None, "d", "label"), Choice(label, OPTIONS))
        scores = TASKS["label"].score([text], [original])
        assert (scores.u.tolist(), scores.reasons, scores.answers) == ([0.0], ["denied"], [None])
    for text in ("not 2", "not 2, since 2 is more", "2? not 2"):
        assert read_grade("not mild", ("none", "mild")) == read_grade(text, tuple("012")) == (None, "denied")
    assert read_grade("9" * 5000, tuple("012")) == (None, "out of range")
    assert read_grade(stated("[" * 100_000), tuple("012")) == (None, "no grade")
    assert read_grade("no lesion", ("no lesion", "mild"))[0] == 0  # a name's own word denies nothing


def test_an_answer_that_names_many_options_never_pays():
    """All subsets of two and more, in any order and wording, are worth 0."""
    rng = np.random.default_rng(0)
    original = Original(Sample(None, "", None, "d", "label"), Choice("melanoma", OPTIONS[:5]))
    for _ in range(200):
        some = rng.permutation(5)[: rng.integers(2, 6)]
        text = rng.choice([", ", " or ", "; ", "\n"]).join(OPTIONS[i] for i in some)
        assert TASKS["label"].score([text], [original]).u.item() == 0.0


GRADES = [  # answer -> grade of five, reason
    ("3", 3, ""),
    ("Grade 3.", 3, ""),
    ("3.0", 3, ""),
    ('{"grade": 3}', 3, ""),
    ("<think>0, 1 or 2?</think><answer>3</answer>", 3, ""),
    ("3, grade 3", 3, ""),
    ('{"grade": 3, "confidence": 0.9, "of": 5}', 3, ""),
    ('{"grade": 3.0}', 3, ""),
    ('{"grade": [2, 3]}', None, "several grades"),
    ('{"grade": null}', None, "no grade"),
    ("Grade 3 (90% sure)", None, "several grades"),
    ("a T2 image of grade 3", 3, ""),
    ("2.5", None, "out of range"),
    ("5", None, "out of range"),
    ("-1", None, "out of range"),
    ("3 of 5", None, "several grades"),
    ("2 or 3", None, "several grades"),
    ("1,0", None, "several grades"),
    ("severe", None, "no grade"),
    ("", None, "no grade"),
]


@pytest.mark.parametrize("text, grade, reason", GRADES)
def test_exactly_one_grade_must_be_named(text, grade, reason):
    assert read_grade(stated(text), tuple("01234")) == (grade, reason)


@pytest.mark.parametrize(
    "text, grade",
    [("mild", 1), ("1", 1), ("1 (mild)", 1), ("1, none", None), ("Stage 2", 2), ("stage 2, mild", None), ("3", None)],
)
def test_grades_with_names_go_by_either(text, grade):
    assert read_grade(text, ("none", "mild", "stage 2"))[0] == grade


@pytest.mark.parametrize(
    "names",
    [
        tuple("01234"),
        ("none", "mild", "stage 2"),
        ("grade 1", "grade 2", "grade 3"),  # the number of an answer is an index, the whole name a name
        ("none", "non-proliferative", "proliferative"),
        ("t", "T2", "t 3"),
        ("low", "low to moderate", "moderate"),
        ("0", "mild", "2"),
    ],
)
def test_what_training_teaches_and_what_a_name_says_reads_as_the_grade(names):
    for grade, name in enumerate(names):
        original = Original(Sample(None, "", None, "d", "grade"), Grade(grade, names))
        texts = [TASKS["grade"].answer(original.target, (1, 1), style, "") for style in ("answer", "think", "qwen")]
        scores = TASKS["grade"].score([*texts, name, f"It is {name.upper()}.", f"{grade} {name}"], [original] * 6)
        assert scores.answers == [grade] * 6 and scores.u.tolist() == [1.0] * 6


def test_a_grade_is_worth_what_the_formulas_say():
    """METHODS: 4^-d; a table, 0 or its last figure beyond its end; 1 - d / (K - 1); 1 / (1 + (c d)^2); exact."""
    d = np.arange(5)
    for text, expected in {
        "grade": 4.0**-d,
        "grade:base=2": 2.0**-d,
        "grade:ordinal=table": np.array([1, 0.5, 0.1, 0, 0]),
        "grade:ordinal=table,d1=.25,d3=.05": np.array([1, 0.25, 0.1, 0.05, 0.05]),
        "grade:ordinal=linear": 1 - d / 4,
        "grade:ordinal=cauchy": 1 / (1 + (1.5 * d) ** 2),
        "grade:ordinal=exact": np.array([1, 0, 0, 0, 0]),
    }.items():
        configure([text], {"grade"})
        for truth in (0, 4):
            original = Original(Sample(None, "", None, "d", "grade"), Grade(truth, tuple("01234")))
            u = TASKS["grade"].score([str(abs(truth - i)) for i in range(5)] + ["9"], [original] * 6).u
            np.testing.assert_allclose(u, [*expected, 0], atol=1e-7)
    configure(None, set())
    assert TASKS["grade"].settings == Ordinal()
    for texts, used, words in [
        (["grade:ordinal=log"], {"grade"}, "ordinal must be one of power, table, linear, cauchy, exact"),
        (["grade:d2=.9"], {"grade"}, "d2 must be at most d1"),
        (["label:x=1"], {"label"}, "it has no settings"),
        (["grade", "grade"], {"grade"}, "named twice"),
        (["grade:base=2"], {"box"}, "no record has the task 'grade'; drop it"),
        (["sing"], {"grade"}, "there is no 'sing'; there are box, .*label, grade"),
    ]:
        with pytest.raises(InputError, match=words):
            configure(texts, used)


def rows_of(task: str, pairs: list) -> list[dict]:
    """(target, text) -> rows as an evaluation has them, also those that another rank has sent as JSON."""
    originals = [Original(Sample(None, "", None, "set a", task), target) for target, _ in pairs]
    rows = score_rows(originals, [text for _, text in pairs])
    return json.loads(json.dumps(rows))


def test_metrics_are_scikit_learns_and_numpys():
    learn = pytest.importorskip("sklearn.metrics")
    rng, names = np.random.default_rng(1), ("a", "b", "c", "d")
    truth, told = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    truth[truth == 3] = 0  # a class that never occurs in the truth
    texts = [names[i] if i < 4 else "I do not know" for i in told]
    found = metrics(rows_of("label", [(Choice(names[t], names), text) for t, text in zip(truth, texts, strict=True)]))
    answers = [names[i] if i < 4 else "?" for i in told]
    true = [names[i] for i in truth]
    assert found["accuracy"] == pytest.approx(learn.accuracy_score(true, answers), abs=1e-6)
    with pytest.warns(UserWarning):  # of answers that are no class
        assert found["balanced_accuracy"] == pytest.approx(learn.balanced_accuracy_score(true, answers), abs=1e-6)
    f1 = learn.f1_score(true, answers, labels=names[:3], average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-6)
    assert (found["n"], found["parse_failures"]) == (200, int((told == 4).sum()))
    labels = [*found["confusion"]["labels"], "?"]
    expected = learn.confusion_matrix(true, answers, labels=labels)[:4]
    assert labels == ["a", "b", "c", "d", "?"] and found["confusion"]["rows"] == expected.tolist()

    grades = [(Grade(int(t), tuple("0123")), str(a) if a < 4 else "none") for t, a in zip(truth, told, strict=True)]
    found = metrics(rows_of("grade", grades))
    filled = [a if a < 4 else (3 if t < 2 else 0) for t, a in zip(truth, told, strict=True)]
    kappa = learn.cohen_kappa_score(truth, filled, weights="quadratic", labels=range(4))
    assert found["kappa"] == pytest.approx(kappa, abs=1e-6)
    assert found["mae"] == pytest.approx(np.abs(truth - filled).mean(), abs=1e-6)
    u = np.where(told < 4, 4.0 ** -np.abs(truth - told), 0).mean()
    assert found["u"] == pytest.approx(u, abs=1e-6)
    assert quadratic_kappa([(2, 2), (2, 2)]) == 0.0 and quadratic_kappa([(0, 0), (1, 1)]) == 1.0


def test_metrics_are_what_the_formulas_say():
    """Written anew with numpy, of a confusion with a column for answers that cannot be read; no class is left out."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        k = int(rng.integers(2, 6))
        truth, told = rng.integers(0, k, 30), rng.integers(0, k + 1, 30)  # k: cannot be read
        table = np.zeros((k, k + 1), int)
        np.add.at(table, (truth, told), 1)
        there, hits = table.sum(1) > 0, np.diag(table)
        f1 = 2 * hits / np.maximum(table.sum(1) + table[:, :k].sum(0), 1)
        names = tuple(map(str, range(k)))
        found = metrics(rows_of("grade", [(Grade(int(t), names), str(a)) for t, a in zip(truth, told, strict=True)]))
        assert found["balanced_accuracy"] == pytest.approx((hits[there] / table.sum(1)[there]).mean(), abs=1e-6)
        assert found["macro_f1"] == pytest.approx(f1[there].mean(), abs=1e-6)
        kept = [i for i in range(k) if table[i].sum() + table[:, i].sum()]
        assert found["confusion"]["labels"] == [names[i] for i in kept]
        assert found["confusion"]["rows"] == table[np.ix_(kept, [*kept, k])].tolist()
        filled = np.where(told == k, np.where(2 * truth > k - 1, 0, k - 1), told)
        weight = (np.arange(k)[:, None] - np.arange(k)) ** 2
        seen = np.zeros((k, k))
        np.add.at(seen, (truth, filled), 1 / 30)
        chance = np.outer(seen.sum(1), seen.sum(0))
        kappa = 1 - (weight * seen).sum() / (weight * chance).sum()
        assert found["kappa"] == pytest.approx(kappa, abs=1e-6)
        assert found["mae"] == pytest.approx(np.abs(truth - filled).mean(), abs=1e-6)


def test_the_confusion_is_a_picture_with_every_count_and_sums_stand_in_the_line():
    pairs = [(Choice("a", ("a", "b")), text) for text in "aaab?"] + [(Choice("b", ("a", "b")), "b")]
    found = metrics(rows_of("label", pairs))
    assert found["confusion"] == {"labels": ["a", "b"], "rows": [[3, 1, 1], [0, 1, 0]]}
    assert list(confusions(found)) == ["set_a-label"]
    picture = confusion_picture(found["confusion"])
    cells = [picture.getpixel((picture.width - 8 - 54 * i - 4, picture.height - 12)) for i in (2, 1, 0)]
    assert cells == [(255, 255, 255), (0, 114, 178), (255, 255, 255)]  # of the last row: nothing, all, nothing
    words = summary("x", found)
    assert "accuracy 0.667 +- 0.211  balanced 0.800  macro-F1 0.708  n 6  cannot be read 1" in words
    grade = metrics(rows_of("grade", [(Grade(2, tuple("01234")), "3")]))
    assert summary("x", grade).endswith("MAE 1.000  kappa 0.000  u 0.250")


def test_the_constant_answer_is_the_majority_and_targets_are_drawn(tmp_path):
    choices = [((9, 9), Choice(label, ("a", "b", "c"))) for label in "bcbab"]
    assert TASKS["label"].constant(choices)((1, 1), None) == "b"
    assert TASKS["grade"].constant([((9, 9), Grade(g, tuple("012"))) for g in (0, 2, 2)])((1, 1), None) == "2"
    for answers, green, red in ((["a"], True, False), (["b"], True, True), ([None], True, False)):
        image = Image.new("RGB", (80, 80), "white")
        TASKS["label"].draw(image, 1.0, Choice("a", ("a", "b")), answers)
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        assert bool((pixels[:, 1] > pixels[:, 0] + 80).any()) == green, answers  # truth and right answers, wrong ones
        assert bool((pixels[:, 0] > pixels[:, 1] + 80).any()) == red, answers


RECORD = {"image": "a.png", "task": "label", "query": "what is it?", "options": ["x", "y z"], "label": "y z"}
GRADED = {"image": "a.png", "task": "grade", "query": "how bad?", "grades": 3, "label": 2}


def test_records_of_labels_and_grades(tmp_path):
    named = GRADED | {"grades": ["none", "mild"], "label": "Mild"}
    turns = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "<answer> x </answer>"}]
    vlm = {"image": "a.png", "conversations": turns, "task": "label", "options": ["x", "y"]}
    samples = read_records(tmp_path, RECORD | {"label": "Y  Z."}, GRADED, named, vlm, RECORD | {"id": 7})
    assert [s.target for s in samples[:4]] == [
        Choice("y z", ("x", "y z")), Grade(2, ("0", "1", "2")), Grade(1, ("none", "mild")), Choice("x", ("x", "y")),
    ]  # fmt: skip
    assert [s.query for s in samples[:4]] == [
        "what is it?\nOptions: x, y z.", "how bad?\nGrades: 0, 1, 2.", "how bad?\nGrades: 0 none, 1 mild.",
        "what is it?\nOptions: x, y.",
    ]  # fmt: skip
    assert samples[4].extra == {"id": 7} and samples[4].key == ("train", "label")
    for label in ("x", "y z"):  # the question is one of the options, not of the answer
        assert read_records(tmp_path, RECORD | {"label": label})[0].query == samples[0].query
    for style, text in {"answer": "y z", "qwen": "y z", "think": "<answer>y z</answer>"}.items():
        answer = TASKS["label"].answer(samples[0].target, (1, 1), style, "")
        assert answer.endswith(text) and TASKS["label"].score([answer], [samples[0]]).u.item() == 1.0
    assert TASKS["grade"].answer(samples[1].target, (1, 1), "answer", "") == "2"


@pytest.mark.parametrize(
    "record, words",
    [
        (RECORD | {"label": "w"}, r"field 'label' must be one of the options \['x', 'y z'\], not 'w'"),
        (RECORD | {"label": 1}, "field 'label' must be a non-empty string, not 1"),
        ({k: v for k, v in RECORD.items() if k != "label"}, "field 'label' is missing"),
        ({k: v for k, v in RECORD.items() if k != "options"}, "field 'options' is missing"),
        (RECORD | {"options": ["x"]}, r"field 'options' must be a list of 2 to 1000, not \['x'\]"),
        (RECORD | {"options": "x, y"}, "field 'options' must be a list of 2 to 1000, not 'x, y'"),
        (RECORD | {"options": ["x", "X."]}, r"field 'options' holds 'x' twice \(case and punctuation do not count\)"),
        (RECORD | {"options": ["x", 3]}, r"field 'options\[1\]' must be a non-empty string, not 3"),
        (RECORD | {"options": ["x", "?"]}, r"field 'options\[1\]' '\?' has no letter or digit"),
        (RECORD | {"options": ["x", "y\nz"]}, r"field 'options\[1\]' 'y\\nz' must be one line"),
        (RECORD | {"options": ["y z", "y" * 10_000]}, "field 'query' .*characters"),
        (GRADED | {"label": 3}, "field 'label' must be from 0 to 2, not 3"),
        (GRADED | {"label": True}, "field 'label' must be from 0 to 2, not True"),
        (GRADED | {"label": "bad"}, "field 'label' must be one of the grades 0, 1, 2, not 'bad'"),
        (GRADED | {"grades": 1}, "field 'grades' must be a count from 2 to 1000, or a list of names, not 1"),
        (GRADED | {"grades": ["a", "a"]}, "field 'grades' holds 'a' twice"),
        (GRADED | {"grades": ["1", "2", "3"]}, r"field 'grades\[0\]' is '1', but a number in an answer is an index"),
        (
            GRADED | {"grades": ["0", "2.0", "x"]},
            r"field 'grades\[1\]' is '2.0', but a number in an answer is an index",
        ),
    ],
)
def test_a_record_that_is_wrong_is_one_sentence(record, words, tmp_path):
    with pytest.raises(InputError, match=f"train.jsonl:1: {words}"):
        read_records(tmp_path, record)


def test_u_of_both_tasks_is_what_schedules_go_by():
    """A threshold between two grades' u makes a hit of the exact one, or of neighbours too; and medloc's rises."""
    key = ("d", "grade")
    schedule = Schedules(["fixed:tau=.2"], [key], 10).of[key]
    u = torch.tensor([4.0**-d for d in range(3)]).tolist()
    assert [schedule.reward(x, True) for x in u] == [1.0, 1.0, 0.0]
    medloc = "medloc:window=4,tau_start=.2,check_stability=off,check_margin=off"
    medloc = Schedules([medloc], [key, ("d", "label")], 100)
    before = {k: schedule.tau for k, schedule in medloc.of.items()}
    for _ in range(8):  # every answer to a grade is one off, every label wrong: each goes by its own
        medloc.observe(SimpleNamespace(by_key=lambda: {key: [[0.25] * 4] * 4, ("d", "label"): [[0.0] * 4] * 4}))
    assert medloc.of[key].tau > before[key] and medloc.of["d", "label"].tau == before["d", "label"]


def test_a_rank_that_has_labels_alone_has_the_parts_of_all_tasks_as_0():
    """Ranks tell each other the same columns, whatever each has rolled out."""
    choice, (b, g) = Choice("melanoma", OPTIONS), (1, 2)
    roll = Rollout.empty(g)
    roll.prompts, roll.texts = [Original(Sample(None, "", choice, "d", "label"), choice)], [["melanoma", "nevus"]]
    roll.lengths, roll.truncated = torch.ones(b, g).long(), torch.zeros(b, g).bool()
    found = score(roll, {"task": 1.0}, [("d", "box"), ("d", "label")])
    assert found.parts.keys() == {*TASKS["box"].parts} and found.key.tolist() == [[1, 1]]
    assert all(part.tolist() == [[0, 0]] for part in found.parts.values()) and found.u.tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_answers_of_another_model_are_measured_beside_the_majority(tmp_path):
    records = [GRADED | {"label": label} for label in (0, 1, 1, 1)] + [RECORD] * 2
    read_records(tmp_path, *records)
    data, told, out = tmp_path / "train.jsonl", tmp_path / "told.jsonl", tmp_path / "out"
    told.write_text("\n".join(json.dumps({"text": text}) for text in ("0", "2", "1", "?", "y z", "x")))
    flags = ["--predictions", str(told), "--data", str(data), "--out", str(out)]
    words = run(evaluation, *flags, "--train", str(data), "--tasks", "grade:ordinal=linear")
    assert "1 x no grade" in words
    found = json.loads((out / "eval.json").read_text())
    grade, label = found["tasks"]["grade"], found["tasks"]["label"]
    assert (grade["u"], grade["accuracy"], grade["mae"], label["accuracy"]) == (0.625, 0.5, 0.5, 0.5)
    assert found["constant"]["tasks"]["grade"]["accuracy"] == 0.75
    assert {file.name for file in out.glob("confusion-*")} == {"confusion-train-grade.png", "confusion-train-label.png"}
    words = run(evaluation, *flags, "--knowledge", "records", expect=2)
    assert "--knowledge changes nothing beside --predictions" in words
    for flag, value in {"knowledge": "records", "tasks": "grade"}.items():
        asked = ["--image", str(tmp_path / "a.png"), "--query", "it", f"--{flag}", value]
        assert f"--{flag} changes nothing beside --image" in run(evaluation, *asked, expect=2)


def test_a_confusion_of_very_many_classes_is_not_drawn(tmp_path):
    names = [f"class {i}" for i in range(evaluation.CLASSES + 1)]
    read_records(tmp_path, *(RECORD | {"options": names, "label": name} for name in names))
    told = tmp_path / "told.jsonl"
    told.write_text("\n".join(json.dumps({"text": name}) for name in names))
    flags = ["--predictions", str(told), "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    assert f"no confusion-train-label.png: {len(names)} classes" in run(evaluation, *flags)
    assert not list((tmp_path / "out").glob("confusion-*"))


def test_supervised_training_on_boxes_labels_and_grades(tmp_path):
    box = {"image": "a.png", "query": "it", "bbox": [1, 2, 20, 30]}
    read_records(tmp_path, RECORD, GRADED, box)
    flags = ["--data", str(tmp_path / "train.jsonl"), "--val", str(tmp_path / "train.jsonl"), "--steps", "1"]
    words = run(train_sft, *flags, "--batch-size", "3", "--workers", "0", "--out", str(tmp_path / "a"))
    assert all(f"{task}: " in words for task in ("box", "label", "grade"))
    words = run(train_sft, *flags, "--coarse", "--workers", "0", "--out", str(tmp_path / "b"), expect=2)
    assert "--coarse is for boxes" in words
