"""Captions, dense captions, several grades in one answer, next actions: grammar, reward, metrics by the formula and by
the leaderboard's rule; how a caption's two terms are paid beside other tasks."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_norms import norms, scores

import phantom_tasks
import tasks
from data import BadRecords, load_jsonl, load_samples
from errors import InputError
from eval import metrics, score_rows
from images import load, load_frames, mark
from judge import ASPECTS, Judge, Lexicon
from norms import Quartiles
from rewards import Schedules, combine, paid_by, places, read_weights
from tasks import TASKS, by_task, configure
from tasks.caption import Caption, filled
from tasks.dense import Events
from tasks.grades import Grades
from tasks.label import Choice
from text import TfIdf, chrf, tokens
from train_sft import FIRST, coarse_caption


@pytest.fixture(autouse=True)
def as_before():
    yield
    configure(None, set())


class Said(Judge):
    """Gives what it is told to, by answer."""

    name = "told"

    def __init__(self, verdicts: dict):
        self.said, self.asked = verdicts, []

    def verdicts(self, items):
        self.asked += items
        return [self.said.get(item.answer) for item in items]


def level(n: float) -> dict:
    return dict.fromkeys(ASPECTS, n)


def prompt(target, task: str = "caption", dataset: str = "d"):
    sample = SimpleNamespace(task=task, dataset=dataset, source="s", target=target, key=(dataset, task))
    return SimpleNamespace(target=target, sample=sample, scale=(1.0, 1.0))


ROUND = Caption(("a small round lesion",), "vs", (("small", "large"), ("round", "lobed")))


def records(folder, *lines) -> str:
    Image.new("RGB", (120, 60), (90, 90, 90)).save(folder / "a.png")
    own = {"image": "a.png", "query": "what is there?"}
    (folder / "r.jsonl").write_text("".join(json.dumps(own | line) + "\n" for line in lines))
    return str(folder / "r.jsonl")


# ------------------------------------------------------------------------------------------------------------ captions


def test_u_is_half_likeness_half_judge_and_what_the_judge_left_out_moves_nothing():
    first, second = prompt(ROUND), prompt(ROUND._replace(references=("a large lobed lesion", "a big lobed one")))
    texts = ["a small round lesion", "<think>hm</think> a\nlarge  lesion", "no verdict", "...", "large", "one"]
    judge = Said({texts[0]: level(5), "a large lesion": level(2) | {"context": 4.0}, "one": level(3)})
    configure(None, {"caption"}, judge)
    found = TASKS["caption"].score(texts, [first] * 4 + [second] * 2)
    assert found.answers == [texts[0], "a large lesion", "no verdict", None, "large", "one"]
    assert (
        found.reasons == ["", "", "", "no words", "", ""] and found.valid.tolist() == [True] * 3 + [False] + [True] * 2
    )
    likeness = [chrf(a, ROUND[0][0]) for a in found.answers[:3]] + [0.0]
    likeness += [max(chrf(a, r) for r in second.target[0]) for a in found.answers[4:]]
    worths = [1.0, 0.35, (1.0 + 0.35 + 0.0) / 3, 0.0, 0.5, 0.5]  # its group's mean
    np.testing.assert_allclose(found.parts["similarity"], likeness, atol=1e-6)
    np.testing.assert_allclose(found.parts["judge"], worths, atol=1e-6)
    expected = [0.5 * s + 0.5 * j for s, j in zip(likeness, worths, strict=True)]
    np.testing.assert_allclose(found.u, expected, atol=1e-6)
    assert found.parts["unjudged"].tolist() == [0, 0, 1, 0, 1, 0] and len(judge.asked) == 5
    assert found.parts["slots"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    assert found.parts["judge_context"][1] == 4 and found.parts["judge_context"][2].isnan()
    configure(None, {"caption"})
    alone = TASKS["caption"].score(texts, [first] * 4 + [second] * 2)
    assert torch.equal(alone.u, found.parts["similarity"]) and alone.parts["judge"].isnan().all()


def test_what_is_missing_is_filled_from_the_group_then_from_all():
    nan = float("nan")
    assert filled([1.0, nan, 0.5, nan, nan], [1, 1, 2, 2, 3]) == [1.0, 1.0, 0.5, 0.5, 0.75]
    assert filled([nan, nan], [1, 2]) == [0.0, 0.0] and filled([], []) == []


def test_settings_of_likeness_reach_answers_and_words():
    samples = [prompt(Caption((f"lesion {word}",), "vs", ())).sample for word in ("round", "round", "lobed")]
    configure(["caption:similarity=tfidf,words=3"], {"caption"}, None, samples)
    found = TASKS["caption"].score(["lesion lobed", "one two three four"], [prompt(ROUND)] * 2)
    corpus = TfIdf([["lesion", "round"]] * 2 + [["lesion", "lobed"]])
    assert found.u[0].item() == pytest.approx(corpus.cosine(["lesion", "lobed"], tokens(ROUND[0][0])))
    assert found.reasons == ["", "too long"]


def test_rows_have_every_score_and_name_their_judge(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"aspects": {"action": ["small", "large"], "anatomy": ["lesion"]}}))
    configure(None, {"caption"}, Lexicon(str(tmp_path / "l.json")))
    prompts = [prompt(ROUND), prompt(ROUND._replace(references=("a large lobed lesion",))), prompt(ROUND)]
    found = metrics(score_rows(prompts, ["a small round lesion", "a large round lesion, not lobed", ""]))
    assert found["judge"].endswith("counts shared terms, no LLM and not clinical")
    assert found["judge_score"] == pytest.approx((5 + 5 + 1) / 3, abs=1e-5) and found["unjudged"] == 0
    assert (
        found["judge_action"] == pytest.approx(11 / 3, abs=1e-5) and found["judge_context"] is None
    )  # of the unread one
    assert found["slots"] == pytest.approx((1 + 0.5 + 0) / 3, abs=1e-5) and found["all_slots"] == pytest.approx(
        1 / 3, abs=1e-5
    )
    assert found["parse_failures"] == 1 and found["n"] == 3 and 0 < found["cider_d"] < 10
    assert found["rouge_l"] == pytest.approx((1 + 2 * 3 / 10 + 0) / 3, abs=1e-5)
    assert "no LLM and not clinical" in tasks.summary("x", found)
    for text in ("a small lesion", ""):
        assert "judge" in json.dumps(metrics(score_rows(prompts[:1], [text])))
    TASKS["caption"].judge.terms = {}
    with pytest.raises(InputError, match="2 of 2 answers have no verdict .the lexicon has no term of the reference"):
        metrics(score_rows(prompts, ["a small round lesion", "a large round lesion, not lobed", ""]))


def test_an_event_behind_its_clip_is_refused(tmp_path):
    for name in "ab":
        Image.new("RGB", (120, 90)).save(tmp_path / f"{name}.png")
    dense = {"frames": ["a.png", "b.png"], "fps": 1.0, "task": "dvc", "query": "what?", "events": [[0, 2.5, "cuts"]]}
    (tmp_path / "dense.jsonl").write_text(json.dumps(dense))
    with pytest.raises(InputError, match=r"'events\[0\]' \[0, 2.5, 'cuts'\] ends behind the clip of 2.0 seconds"):
        load_jsonl(tmp_path / "dense.jsonl", TASKS)


@pytest.mark.parametrize("text", ["1-2:" + " " * 20_000, "1" + "\t" * 20_000 + "x", "1-2 " + "\u3000" * 20_000])
def test_events_are_read_in_linear_time(text):
    started = time.process_time()
    assert TASKS["dvc"].read_answer(text) == (None, "no event")
    assert time.process_time() - started < 2


def test_a_region_is_drawn_green_before_anyone_looks(tmp_path):
    file = records(
        tmp_path, {"task": "caption", "kind": "rc", "references": ["dark"], "region": {"bbox": [20, 10, 50, 40]}}
    )
    (sample,) = load_jsonl(file, TASKS)
    pixels = np.asarray(load(sample)[0])
    green = (pixels == (0, 255, 0)).all(-1)
    ys, xs = np.nonzero(green)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (19, 9, 50, 40)  # a pixel around it: 60 / 60
    assert not green[10:40, 20:50].any() and (pixels[10:40, 20:50] == 90).all() and sample.mark == (0, (20, 10, 50, 40))
    for name in "ab":
        Image.new("RGB", (120, 90), "gray").save(tmp_path / f"{name}.png")
    clip = {"task": "caption", "kind": "rc", "query": "what is in the box?", "references": ["dark"], "fps": 1.0}
    clip |= {"frames": ["a.png", "b.png"], "region": {"bbox": [20, 10, 50, 40], "frame": 1}}
    (tmp_path / "clip.jsonl").write_text(json.dumps(clip))
    first, second = map(np.asarray, load_frames(load_jsonl(tmp_path / "clip.jsonl", TASKS)[0]))
    assert (first == first[0, 0]).all() and second[20, 19].tolist() == [0, 255, 0]
    large = Image.new("RGB", (1000, 480))
    mark(large, (100.0, 100.0, 200.0, 200.0))
    assert large.getpixel((92, 150)) == (0, 255, 0) != large.getpixel((100, 150)) and large.getpixel((91, 150)) == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ({"task": "caption"}, "field 'references' is missing"),
        ({"task": "caption", "references": []}, "field 'references' must be a list of 1 to 100 texts"),
        ({"task": "caption", "references": ["a", "A."]}, "none may stand there twice"),
        ({"task": "caption", "references": ["?!"]}, "each text must have a word"),
        ({"task": "caption", "references": ["a"], "kind": "dvc"}, "field 'kind' must be one of vs, rc, not 'dvc'"),
        ({"task": "caption", "references": ["a"], "kind": "rc"}, "field 'region' is missing"),
        (
            {"task": "caption", "references": ["a"], "region": {"bbox": [1, 2, 3, 4]}},
            "field 'region' is for captions of",
        ),
        ({"task": "caption", "references": ["a"], "kind": "rc", "region": [1, 2, 3, 4]}, "field 'region' must be"),
        ({"task": "caption", "references": ["a"], "kind": "rc", "region": {"bbox": [1, 2, 130, 4]}}, "reaches outside"),
        (
            {"task": "caption", "references": ["a"], "kind": "rc", "region": {"bbox": [1, 2, 3, 4], "frame": 1}},
            "field 'region.frame' must be from 0 to 0, not 1",
        ),
        ({"task": "caption", "references": ["a b"], "slots": [["c", "d"]]}, r"field 'slots\[0\]': 'a b' must name one"),
        ({"task": "dvc", "events": []}, "field 'events' must be a list of 1 to 100 events"),
        ({"task": "dvc", "events": [[2.0, 1.0, "a"]]}, r"field 'events\[0\]' must be \[start, end, caption\]"),
        ({"task": "dvc", "events": [[0, 1, " "]]}, r"field 'events\[0\]\[2\]' must be a non-empty string"),
        ({"task": "skill", "label": [1]}, "field 'label' must be 1 to 20 {aspect: grade}"),
        ({"task": "skill", "label": {"A": 0}}, "field 'label': 'A' must be a whole number from 1 to 5, not 0"),
        ({"task": "cvs", "label": {"A": 3}}, "must be a whole number from 0 to 2, not 3"),
        ({"task": "cvs", "label": {"A 1": 2}}, "aspect 'A 1' must be words without digits"),
        ({"task": "cvs", "label": {"A": 2, "a": 1}}, "has an aspect twice"),
        ({"task": "next", "options": ["a", "b"], "label": "c"}, "field 'label' must be one of the options"),
    ],
)
def test_a_record_that_is_wrong_is_a_sentence(line, words, tmp_path):
    with pytest.raises(InputError, match=rf"r.jsonl:1: .*{words}"):
        load_jsonl(records(tmp_path, line), TASKS)


def test_records_are_read_and_asked(tmp_path):
    osats = {"Respect for tissue": 2, "Time and motion": 4}
    file = records(
        tmp_path,
        {"task": "caption", "references": ["a", "b"]}, {"task": "dvc", "events": [[5, 9.5, "ties"], [0, 5, "cuts"]]},
        {"task": "skill", "label": osats}, {"task": "cvs", "label": {"Cystic plate": 1}},
        {"task": "next", "options": ["cutting", "tying"], "label": "Tying"},
    )  # fmt: skip
    caption, dense, skill, cvs, following = load_jsonl(file, TASKS, BadRecords())
    assert caption.target == Caption(("a", "b"), "vs", ()) and caption.query == "what is there?"
    assert dense.target == Events(((0.0, 5.0, "cuts"), (5.0, 9.5, "ties")))
    assert skill.query.endswith(
        "Aspects: Respect for tissue, Time and motion. Grades: 1 to 5, written Respect for tissue: GRADE/5."
    )
    assert cvs.target == Grades((1,), ("Cystic plate",)) and following.target == Choice("tying", ("cutting", "tying"))
    said = {s.task: TASKS[s.task].answer(s.target, (1, 1), "answer", s.query) for s in (caption, dense, skill, cvs)}
    assert said["skill"] == "Respect for tissue: 2/5, Time and motion: 4/5" and said["cvs"] == "Cystic plate: 1"
    assert said["dvc"] == "0.0-5.0 seconds: cuts\n5.0-9.5 seconds: ties" and said["caption"] == "a"
    for sample in (caption, dense, skill, cvs, following):  # what SFT teaches is worth 1, in each style
        for style in ("answer", "think", "qwen"):
            task = TASKS[sample.task]
            text = task.answer(sample.target, (1.0, 1.0), style, sample.query)
            scored = task.score([text], [prompt(sample.target, sample.task)])
            assert scored.u.item() == pytest.approx(1.0) and scored.reasons == [""], (sample.task, style)
        task.draw(Image.new("RGB", (60, 60)), 1.0, sample.target, scored.answers * 2)
        constant = task.constant([((9, 9), sample.target)])((9, 9), sample.target)
        assert task.score([constant], [prompt(sample.target, sample.task)]).u.item() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------- dense captions

CLIP = Events(((0.0, 4.0, "cuts the duct"), (4.0, 10.0, "clips the artery")))


def test_dense_captions_are_matched_in_time_and_judged_in_pairs():
    texts = [
        "0-4 s: cuts the duct\n4.0 - 10.0 seconds: clips the artery", "Sure!\n5 to 10 sec: clips it", "4-0 seconds: x",
        "nothing", "20-30 seconds: cuts the duct",
    ]  # fmt: skip
    judge = Said({"clips it": level(3), "cuts the duct": level(5), "clips the artery": None})
    configure(None, {"dvc"}, judge)
    ask = prompt(CLIP, "dvc")
    found = TASKS["dvc"].score(texts, [ask] * 5)
    assert found.reasons == ["", "", "inverted", "no event", ""] and found.answers[1] == [[5.0, 10.0, "clips it"]]
    # 5-10 against 4-10: temporal IoU 5/6, matched at .3 .5 .7; one of two events: F1 2/3
    np.testing.assert_allclose(found.parts["f1"], [1, 2 / 3, 0, 0, 0], atol=1e-6)
    likeness = [1.0, chrf("clips it", "clips the artery") / 2]
    np.testing.assert_allclose(found.parts["similarity"], likeness + [0] * 3, atol=1e-6)
    worths = [(1 + 0.75) / 2, 0.5 / 2]  # without a verdict: the mean of the group's, 1 and .5
    np.testing.assert_allclose(found.parts["judge"], worths + [0] * 3, atol=1e-6)
    expected = [0.5 * f + 0.25 * s + 0.25 * j for f, s, j in zip((1, 2 / 3), likeness, worths, strict=True)]
    np.testing.assert_allclose(found.u, expected + [0] * 3, atol=1e-6)
    assert found.parts["unjudged"].tolist() == [1, 0, 0, 0, 0]
    assert {item.references for item in judge.asked} == {("cuts the duct",), ("clips the artery",)}


def test_the_leaderboards_f1_lets_many_match_one():
    configure(None, {"dvc"})
    twice = "0-4 s: cuts the duct\n0-4 s: cuts the duct\n0-4 s: cuts"
    found = metrics(score_rows([prompt(CLIP, "dvc")], [twice]))
    precision, recall = 1.0, 0.5
    assert found["f1_paper"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert found["f1"] == pytest.approx(2 * 1 / 5, abs=1e-6) and 0 < found["soda"] < found["f1"] + 0.01
    nothing = metrics(score_rows([prompt(CLIP, "dvc")] * 2, ["", "?"]))
    assert nothing["f1"] == nothing["f1_paper"] == nothing["soda"] == nothing["u"] == 0.0


# ------------------------------------------------------------------------------------------------- grades, next action

PARTS = ("Two structures", "Cystic plate", "Hepatocystic triangle")


@pytest.mark.parametrize(
    "text, answer, reason",
    [
        ("Two structures: 2, Cystic plate: 1, Hepatocystic triangle: 0", [2, 1, 0], ""),
        ("hepatocystic triangle=0; **Cystic plate**: 1\nTWO STRUCTURES: 2.", [2, 1, 0], ""),
        ('```json\n{"Two structures": 2, "Cystic plate": 1, "Hepatocystic triangle": 0}\n```', [2, 1, 0], ""),
        ("<think>Cystic plate: 0</think> Two structures: 2, Cystic plate: 1, Hepatocystic triangle: 0", [2, 1, 0], ""),
        ("Two structures: 2, Cystic plate: 1", None, "an aspect is missing"),
        ("Two structures: 2, Two structures: 2, Cystic plate: 1, Hepatocystic triangle: 0", None, "an aspect twice"),
        ("Two structures: 2, Cystic plate: 3, Hepatocystic triangle: 0", None, "out of range"),
        ("Two structures: 2, Cystic plate: 1.5, Hepatocystic triangle: 0", None, "out of range"),
        ("Two structures: -1, Cystic plate: 1, Hepatocystic triangle: 0", None, "out of range"),
        ("Two structures: 2/2, Cystic plate: 1, Hepatocystic triangle: 0", None, "out of range"),
        ("", None, "an aspect is missing"),
    ],
)  # fmt: skip
def test_several_grades_are_read_strictly(text, answer, reason):
    assert TASKS["cvs"].read_answer(text, PARTS) == (answer, reason)


def test_grades_are_paid_by_distance_and_measured_by_both_rules():
    """cvs: an unread answer is "poor" to the leaderboard, and often right. skill: it is left out."""
    target = Grades((0, 1, 0), PARTS)
    said = "Two structures: {}, Cystic plate: {}, Hepatocystic triangle: {}"
    texts = [said.format(0, 1, 0), said.format(2, 1, 0), "I cannot tell", said.format(1, 0, 0)]
    rows = score_rows([prompt(target, "cvs")] * 4, texts)
    assert [row["u"] for row in rows] == pytest.approx([1, (0.0625 + 2) / 3, 0, (0.25 + 0.25 + 1) / 3])
    found = metrics(rows)
    assert TASKS["cvs"].forgiving("two structures: 12, cystic plate: 1", ("Two structures", "Cystic plate")) == [0, 1]
    assert found["level"] == 0.5 and found["level_paper"] == 0.75  # sums 1, 3, unread as 0, 1: poor fair poor poor
    assert found["aspect_accuracy"] == pytest.approx((3 + 2 + 0 + 1) / 12, abs=1e-6) and found["all_right"] == 0.25
    assert found["mae"] == pytest.approx((0 + 2 + 6 + 2) / 12, abs=1e-6) and found["left_out_by_paper"] == 0
    skill = Grades((2, 3), ("Respect for tissue", "Time and motion"))
    texts = ["Respect for tissue: 2/5, Time and motion: 3/5", "about 2/5 and 4/5", "no idea"]
    found = metrics(score_rows([prompt(skill, "skill")] * 3, texts))
    assert (
        found["level"] == pytest.approx(1 / 3, abs=1e-6)
        and found["level_paper"] == 1.0
        and found["left_out_by_paper"] == 1
    )
    graded = {"skill": [(2, 2), (2, 3), (3, 4), (4, 4)], "cvs": [(1, 0, 0), (2, 1, 0), (2, 2, 1), (2, 2, 2)]}
    levels = [[TASKS[task].level(grades) for grades in several] for task, several in graded.items()]
    assert levels == [["novice", "intermediate", "intermediate", "expert"], ["poor", "fair", "good", "excellent"]]
    configure(["cvs:ordinal=exact"], {"cvs"})
    assert TASKS["cvs"].score([said.format(2, 1, 0)], [prompt(target, "cvs")]).u.item() == pytest.approx(2 / 3)


def test_the_next_action_is_one_of_the_options_and_by_the_leaderboard_the_nearest():
    target = Choice("tying", ("cutting", "tying", "suturing"))
    rows = score_rows([prompt(target, "next")] * 4, ["tying", "tieing a knot", "cutting", "tying or cutting"])
    assert [row["u"] for row in rows] == [1, 0, 0, 0] and [bool(row["reason"]) for row in rows] == [
        False,
        True,
        False,
        True,
    ]
    found = metrics(rows)
    assert found["accuracy"] == 0.25 and found["accuracy_paper_chrf"] in (0.5, 0.75) and found["parse_failures"] == 2


# -------------------------------------------------------------------------------------------------------------- rewards

CAPTIONS, BOX, LABEL = ("c", "caption"), ("b", "box"), ("l", "label")


def test_what_pays_a_task_is_its_terms_where_they_are_named():
    assert paid_by("caption", {"task": 1, "similarity": 0.5, "format": 0}) == ["similarity", "format"]
    assert paid_by("box", {"task": 1, "similarity": 0.5, "f1": 1, "format": 0}) == ["task", "format"]
    assert paid_by("caption", {"task": 1}) == paid_by("box", {"task": 1}) == ["task"]
    assert read_weights("similarity=.5,judge=.5") == {"similarity": 0.5, "judge": 0.5}
    assert places([CAPTIONS, BOX], {"task": 1, "judge": 1}) == [(CAPTIONS, "judge"), (BOX, "task")]
    for keys, weights, words in (
        ([CAPTIONS, BOX], {"similarity": 0.5, "judge": 0.5}, "pays nothing for the task 'box'; weigh task"),
        ([BOX], {"task": 1, "judge": 1}, "judge pays no record's task; drop it"),
        ([CAPTIONS], {"task": 1, "judge": 0}, "task pays no record's task"),
        (
            [CAPTIONS],
            {"similarity": 0, "format": 0},
            "pays nothing for the task 'caption'; weigh task or similarity, judge",
        ),
    ):
        with pytest.raises(InputError, match=words):
            places(keys, weights)
    with pytest.raises(InputError, match="no reward is called 'clarity'; there are task, format, .*judge, similarity"):
        read_weights("clarity=1")


@pytest.mark.parametrize("how", ["sum", "gdpo"])
def test_each_term_is_normalised_by_its_own_quartiles_and_paid_to_its_own_task(how):
    """By hand, in float64: boxes and labels by u, captions by both terms; the third caption cannot be read."""
    torch.manual_seed(0)
    u, similarity, judge = (torch.rand(3, 4) for _ in range(3))
    u[2] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    u[0, 2] = -1.0  # what says here that it cannot be read
    keys = [CAPTIONS, BOX, LABEL]
    table = {
        (CAPTIONS, "similarity"): Quartiles(0.2, 0.3, 0.5, 99), (CAPTIONS, "judge"): Quartiles(0.5, 0.6, 0.9, 99),
        (BOX, "task"): Quartiles(0.1, 0.4, 0.6, 99), (LABEL, "task"): Quartiles(0, 0, 1, 99, 0.0, True),
    }  # fmt: skip
    weights = {"task": 1.0, "similarity": 0.5, "judge": 0.25}
    made = Schedules(["raw"], keys, 10, norms("", table))
    assert made.norms.check(places(keys, weights)) == ["not normalised, since it was 0 or 1 throughout: l/label: task"]
    found = combine(scores(u, keys, similarity=similarity, judge=judge), made, weights, how)

    def logistic(x, place):
        q = table[place]
        return 1 / (1 + torch.exp(-3 * (x.double() - q.p50) / (q.p75 - q.p25)))

    def over(x):
        return (x - x.mean()) / (x.std() + 1e-4) if how == "gdpo" else x

    terms = [logistic(similarity[0], (CAPTIONS, "similarity")), logistic(judge[0], (CAPTIONS, "judge"))]
    for term in terms:
        term[2] = 0.0
    expected = torch.stack(
        [0.5 * over(terms[0]) + 0.25 * over(terms[1]), over(logistic(u[1], (BOX, "task"))), over(u[2].double())]
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    del table[CAPTIONS, "judge"]
    with pytest.raises(InputError, match="no quartiles of the reward 'judge' for dataset 'c', task 'caption'"):
        norms("", table).check(places(keys, weights))


def test_a_penalty_on_a_term_is_for_its_own_task_alone():
    u = torch.tensor([[0.5, -1.0]])
    made = Schedules(["raw"], [BOX, CAPTIONS], 10)
    rows = scores(u.repeat(2, 1), [BOX, CAPTIONS], judge=torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
    assert combine(rows, made, {"task": 1.0, "judge": -1.0})[1].tolist() == [
        -0.5,
        -1.0,
    ]  # breaking the form is no way out
    assert combine(rows, made, {"task": 1.0, "judge": -1.0})[0, 0] == 0.5


def test_answers_of_several_tasks_are_scored_together():
    prompts = [prompt(ROUND), prompt((0, 0, 9, 9), "box"), prompt(Choice("a", ("a", "b")), "label")]
    found = by_task(["a small round lesion", "[0,0,9,9]", "a"], prompts)
    assert found.u.tolist() == [1.0, 1.0, 1.0] and found.parts["similarity"].tolist() == [1.0, 0.0, 0.0]


def test_a_judge_or_a_setting_that_reaches_no_record_is_refused():
    with pytest.raises(InputError, match="--judge: no record has the task caption or dvc; drop it"):
        configure(None, {"box"}, Said({}))


# ------------------------------------------------------------------------------------------------------------- phantoms


def test_what_a_caption_of_a_phantom_says_is_seen():
    """Its quarter and its extent from the pixels that differ from the skin, its colour from their channels, its lobes
    from how little of its box they fill."""
    seen: dict[str, list] = {"large": [], "round": [], "red": [], "blue": []}
    for index in range(40):
        said = phantom_tasks.record("captions", 3, index)["references"][0].split()
        pixels = phantom_tasks.picture("captions", 3, index).astype(float)
        skin = np.median(pixels.reshape(-1, 3), axis=0)
        mask = np.abs(np.log((pixels + 1) / (skin + 1))).sum(-1) > 0.9
        mask &= np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).mean((2, 3)) > 0.6  # fewer hairs
        ys, xs = np.nonzero(mask)
        assert (np.median(ys) < 70, np.median(xs) < 70) == ("upper" in said, "left" in said), index
        red, green, blue = np.median(pixels[mask] / skin, axis=0)
        near = (np.abs(xs - np.median(xs)) < 45) & (np.abs(ys - np.median(ys)) < 45)
        sides = [np.ptp(np.percentile(v[near], (1.5, 98.5))) for v in (xs, ys)]
        found = {"large": len(ys), "red": red / green, "blue": blue / red, "round": near.sum() / np.prod(sides)}
        for name, value in found.items():
            seen[name].append((value, name in said))
    for name, pairs in seen.items():
        true = sum(is_so for _, is_so in pairs)
        assert sum(is_so for _, is_so in sorted(pairs)[-true:]) >= 0.75 * true, name
    samples = load_samples("phantoms:captions", TASKS, 0, "test")
    assert len({s.target.references for s in samples}) == 48 and {len(s.target.slots) for s in samples} == {5}


def test_a_coarse_caption_has_a_habit_and_stays_in_its_grammar():
    sample = load_samples("phantoms:captions", TASKS, 0, "test")[0]
    grammar, counts = phantom_tasks.SLOTS, np.zeros(5)
    target = sample.target._replace(references=(phantom_tasks.SENTENCE.format(*(o[-1] for o in grammar)),))
    for i in range(400):
        (said,) = coarse_caption(target, np.random.default_rng(i)).references
        words = said.split()
        chosen = [words[1], words[2], words[3], words[-2], words[-1]]
        assert phantom_tasks.SENTENCE.format(*chosen) == said
        counts += [word == options[0] for word, options in zip(chosen, grammar, strict=True)]
    assert np.abs(counts / 400 - FIRST).max() < 0.1
    first = target._replace(references=(phantom_tasks.SENTENCE.format(*(o[0] for o in grammar)),))
    assert coarse_caption(first, np.random.default_rng(0)) == first
