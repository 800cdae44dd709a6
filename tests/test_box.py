"""Answers -> boxes -> what they are worth: a table, fuzz, time bounds, frames, IoU by counting pixels; tasks mixed."""

import math
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import refused

import tasks
from rewards import REWARDS, Schedules, combine, format_reward, other_rewards, read_weights
from rollout import GroupScores
from tasks import TASKS, by_task
from tasks.box import ANSWERS, OTHER_FRAMES, REASONS, parse_box, to_model, to_original
from tasks.task import ANSWER, TRUTH, Scores, Task

BOX = TASKS["box"]


def prompt(target, scale=(1.0, 1.0), size=(100, 100), task="box"):
    return SimpleNamespace(target=target, scale=scale, size=size, sample=SimpleNamespace(task=task))


B = (10.0, 20.0, 30.0, 40.0)
# Answers that say B, between bars.
SAYS_B = """
{"label": "nodule 3", "bbox_2d": [10, 20, 30, 40], "score": 0.97} |
[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [10, 20, 30, 40]}] | ```json\n[\n\t{"bbox_2d": [10, 20, 30, 40]}\n]\n``` |
{"bbox_2d": "[10, 20, 30, 40]"} | {bbox_2d: [10, 20, 30, 40]} | [10\n,20\n,\n30,\n40\n] | [\r\n\t10,\r\n20, 30, 40] |
10,20,30,40 | 10 20 30 40 | [10, 20, 30, 40,] | [[1, 2, 3, 4], [10, 20, 30, 40]] | The box is [10, 20, 30, 40]. |
The box is 10, 20, 30, 40... | box:10,20,30,40; | 10, 20, 30, 40] | (10, 20)\n(30, 40) |
In 2 of 3 views [10, 20, 30, 40] with 1 margin | [10, 20, 30, 40] (see [1]) | <-box_start->(10,20),(30,40)<-box_end-> |
{"x1": 10, "x2": 30, "y1": 20, "y2": 40} | x1=10, y1=20, x2=30, y2=40 | X1: 10\nY1: 20\nX2: 30\nY2: 40 |
{'x1':1,'y1':2,'x2':3,'y2':4},{'x1':10,'y1':20,'x2':30,'y2':40} |
{"x1": 10, "y1": 20, "x2": 30, "y2": 40}, {"x1": 1, "y1": 2} | 病变位于（10，20，30，40）。 | 〔10，20，30，40〕 |
10、20、30、40 | ［１０．０，２Ｅ１，＋３０，４０］ | [10，20, 30、　40\xa0] | 【（10，20）、（30，40）】 |
｛“bbox_2d”：［10，20，30，40］，“label”：“病变（1、2、3、4）”｝ | ｘ１＝10；ｙ１＝20；ｘ２＝30；ｙ２＝40 |
｛＂bbox_2d＂：［10，20，30，40］，＂label＂：＂病变（1、2、3、4）＂｝ |
{“bbox_2d”: [10, 20, 30, 40], “label”: “the "big" one, 1, 2, 3, 4”} |
{"bbox_2d": [10, 20, 30, 40], "label"："the ”big“ one，1，2，3，4 | [10., 20., 30., 40.] | [1e1, 2E1, 3e+1, 400e-1] |
[+10, +20, +30, +40] | [0010, 020, 30, 40] | <think>[1, 2, 3, 4]</think><answer>[10, 20, 30, 40]</answer> |
<answer>[10, 20, 30, 40] | <answer>[1, 2, 3, 4]</answer> no: <answer>[10, 20, 30, 40]</answer> |
<answer>[10, 20, 30, 40]</answer> or [1, 2, 3, 4] | [1, 2, 3, 4]</answer> [10, 20, 30, 40] |
<answer>[10, 20, 30, 40] then [1, 2, 3</answer> | [10, 20, 30, 40] confidence [0.1, 0.2, 0.3, 0.4, 0.5] |
[10, 20, 30, 40], (1, 2), (3, 4), (5, 6) | [1, 2, 3, 4] (10, 20), (30, 40) |
[{"bbox_2d": [10, 20, 30, 40], "label" : "lines 5, 6, 7, 8
"""
OTHERS = {
    "[.5, .25, 1.5, 2.75]": (0.5, 0.25, 1.5, 2.75), "（－３，−4.5，7，8）": (-3.0, -4.5, 7.0, 8.0),
    "[0, 0, 1000000, 1e6]": (0.0, 0.0, 1e6, 1e6), "9" * 10**6 + " is [10, 20, 30, 40]": B,
    # The last decides: hedging does not pay.
    '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "b"}]': (5, 6, 7, 8),
}  # fmt: skip
REFUSED = {  # reason -> answers, between bars
    "no box": """ | no lesion | There are 3 lesions. | bbox_2d | [] | [null, null, null, null] | [1, 2, 3, 4]<answer> |
        <think>[1, 2, 3, 4]</think><answer>I see none</answer> | ٣, ٤, ٥, ٦ | [10px, 20px, 30px, 40px] | 有３个病变 |
        {"label": "7, 7, 8, 8"} | ［１０ｐｘ，２０ｐｘ，３０ｐｘ，４０ｐｘ］""",
    "incomplete box": """[ınf, 1, 2, 3] | [10, 20, 30] | [10] | 10, 20, 30 | [10, 20, 30, 40 | [10, 20, 30, 40} |
        (10, 20) | (10, 20) to (30, 40) | {"x1": 10, "y1": 20, "x2": 30} | [10.5.1, 20, 30, 40] | （10，20，30，40""",
    "too many numbers": """[10, 20, 30, 40, 50] | [1, 2, 3, 4, 5 | 1 2 3 4 5 6 7 8 | （10，20，30，40，50） |
        (1, 2), (3, 4), (5, 6), (7, 8)""",
    "inverted": "[30, 20, 10, 40] | [10, 40, 30, 20] | [10, 20, 30, 40] or [9, 9, 3, 4] | （30，20，10，40）",
    "degenerate": "[10, 20, 10, 40] | [10, 20, 30, 20] | [0, 0, 0, 0]",
    "not finite": """[NaN, 20, 30, 40] | [0, 0, Infinity, Infinity] | [-Infinity, 0, 1, 2] | [0, 0, 1e999, 1] |
        （0，0，ｉｎｆ，1） | [1, 2, 3, """ + "9" * 10**6 + "]",
    "absurd value": "[0, 0, 1000001, 1] | [-1e7, 0, 1, 1] | [0, 0, 1e300, 1]",
}  # fmt: skip


def between_bars(text: str) -> list[str]:
    return [part.strip(" \n").replace("<-", "<|").replace("->", "|>") for part in text.split("|")]


def test_the_table_of_answers():
    for text, box in [*OTHERS.items(), *((text, B) for text in between_bars(SAYS_B))]:
        assert parse_box(text) == (box, ""), text[-99:]
    for reason, texts in REFUSED.items():
        for text in between_bars(texts):
            assert parse_box(text) == (None, reason), text[:99]
    assert {"", *REFUSED} == set(REASONS) == set(BOX.reasons)


PIECES = '[ ] ( ) { } , （ ］ ， 、 ３ “label”：“ ” "label":" " <answer> </answer> "x1": y1= x2: \'y2\': 1 20 -3.5 1e5 '
PIECES = [*(PIECES + "1e999 nan inf -Infinity . e - _ ı ٣ ſ bbox_2d").split(), " ", "\n", "\0"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_box_or_a_reason(text):
    box, reason = parse_box(text)
    assert reason in REASONS and (box is None) == (reason != "")
    if box is not None:
        assert -1e6 <= box[0] < box[2] <= 1e6 and -1e6 <= box[1] < box[3] <= 1e6
    assert format_reward(text, box is not None) in (0.0, 1.0)


FORMS = ["[ {} ,{}\n, {},{} ]", "({},{},{},{})", "{}, {}, {}, {}", "[[{}, {}], [{}, {}]]", "x1={}; y1={}; x2={}; y2={}"]
FORMS += ['```json\n[{{"bbox_2d": [{}, {}, {}, {}], "label": "x"}}]\n```', '{{"x1": {}, "y1": {}, "x2": {}, "y2": {}}}']
COORDINATE = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.floats(0, 4096).map(lambda v: round(v, 2))
# Junk ends and begins in a letter: "3" in front of "10, 20, 30, 40" makes it another list, and rightly so.
JUNK = st.text(alphabet=st.characters(exclude_characters="<")).map(lambda s: "see " + s + " is ")


@given(st.lists(COORDINATE, min_size=4, max_size=4), st.sampled_from(FORMS), JUNK, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_printed_box_parses_back_exactly(values, form, junk, tagged):
    (x1, x2), (y1, y2) = sorted(values[:2]), sorted(values[2:])
    assume(x1 != x2 and y1 != y2)
    text = junk + form.format(x1, y1, x2, y2) + " and nothing else"
    if tagged:
        text = f"<think>[5, 6, 7, 8]</think><answer>{text}</answer> [1, 2, 3, 4]"
    assert parse_box(text) == ((float(x1), float(y1), float(x2), float(y2)), "")


N = 200_000  # characters: quadratic time would be minutes
LONG = [*"[ 9 , ( 1; (1,2) x1: - . 1e <answer> [1,2,3,4] （ ９ １、 “label”：“".split(), "1\n[", "[ ", "x1:1 "]
LONG = [part * (N // len(part)) for part in LONG]
LONG += ["9" * N + "a", "0." + "1" * N, "1e" + "9" * N, "1," * (N // 2), "[" + "1," * (N // 2), "[1" + " " * N + "a"]
LONG += ["1" + " ," * (N // 2) + "a", "x1" + " " * N, "“label”" + "\u3000" * N]


@pytest.mark.parametrize("text", LONG, ids=[repr(text[:9]) for text in LONG])
def test_junk_takes_linear_time(text):
    begin = time.process_time()  # not the wall clock: other work on the machine is none of the parser's
    parse_box(text)
    format_reward("<think></think><answer>" + text, True)
    assert time.process_time() - begin < 2.0


QUERIES = ["levels 1, 2, 3, 4", "(10, 20), (30, 40)", 'x1: 1, y1: 2, x2: 3, y2: 4"', '"label": "[1,2,3,4]"']
QUERIES += ["\\", '\\"', '", [1, 2, 3, 4]']
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40) | st.sampled_from(QUERIES)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*ANSWERS, "a question of its own: {query}"]), TEXTS,
    st.tuples(*[st.floats(0, 2000)] * 2, *[st.floats(1, 500)] * 2), st.sampled_from([(1.0, 1.0), (2.5, 0.5)]),
)  # fmt: skip
def test_what_is_taught_is_read_back_within_half_a_pixel(style, query, box, scale):
    """Also with a label that has numbers, quotes and brackets in it."""
    x, y, w, h = box
    framed = np.array([x, y, x + w, y + h])
    target = tuple(framed * np.array(scale * 2))
    assert np.allclose(to_original(framed, scale), target) and np.allclose(to_model(target, scale), framed)
    text = BOX.answer(target, scale, style, query)
    got = parse_box(text).box
    assert got == tuple(map(int, got)) and np.abs(got - framed).max() <= 0.5 + 1e-9
    assert format_reward(text, True) == (style == "think")


def test_answers_in_full():
    box, one = (12.4, 3.6, 99.5, 140.0), (1.0, 1.0)
    assert BOX.answer(box, one, "answer", "it") == "[12,4,100,140]"
    assert BOX.answer(box, one, "think", "it") == (
        "<think> I look for the region that the question describes and frame it. </think>\n"
        '<answer>{"bbox_2d": [12, 4, 100, 140]}</answer>'
    )
    qwen = '```json\n[\n\t{"bbox_2d": [12, 4, 100, 140], "label": "the \\"Ödem\\""}\n]\n```'
    assert BOX.answer(box, one, "qwen", 'the "Ödem"') == qwen and ANSWERS.keys() == BOX.questions.keys()
    assert BOX.answer((139.6, 7.1, 139.9, 7.3), one, "answer", "it") == "[139,7,140,8]"  # thinner than a pixel: inside


def test_u_is_the_iou_in_the_original_frame_and_failures_say_why():
    """The frame of the first two answers is smaller in x, larger in y; the others' is the same."""
    target = (100.0, 40.0, 300.0, 80.0)
    prompts = [*[prompt(target, (2.5, 0.5))] * 2, *[prompt(target)] * 4]
    texts = ["[40, 80, 120, 160]", "[40, 80, 80, 160]", "[40, 80, 120, 160]", "none", "[4, 4, 0, 0]", "[0, 0, inf, 4]"]
    scores = BOX.score(texts, prompts)
    assert scores.answers == [[100, 40, 300, 80], [100, 40, 200, 80], [40, 80, 120, 160], None, None, None]
    assert scores.u.tolist() == [1, 0.5, 0, 0, 0, 0] and scores.valid.tolist() == [True] * 3 + [False] * 3
    assert scores.parts["giou"][0] == 1.0 and scores.parts["giou"][2] < 0 and not scores.parts["giou"][3:].any()
    assert scores.reasons == ["", "", "", "no box", "inverted", "not finite"]
    assert scores.u.dtype == scores.parts["giou"].dtype == torch.float32
    empty = BOX.score([], [])
    assert empty.u.shape == empty.valid.shape == empty.parts["giou"].shape == (0,) and empty.answers == []


@pytest.mark.parametrize("frame", OTHER_FRAMES)
def test_the_hint_finds_the_frame_that_the_numbers_are_meant_in(frame):
    """A policy that sees 200 x 100 pixels of 1000 x 500 and answers in another frame than that."""
    targets, size = [(100.0, 50.0, 300.0, 250.0), (600.0, 100.0, 900.0, 400.0)], np.array([1000, 500] * 2)
    written = {"pixels": 1, "thousandths": 1000 / size, "shares": 1 / size}[frame.split()[0]]
    prompts = [prompt(target, (5.0, 5.0), (1000, 500)) for target in targets]
    texts = [str((np.array(target) * written).tolist()) for target in targets]
    scores = BOX.score([*texts, "none", "none"], prompts * 2)
    groups = [list(pair) for pair in zip(scores.answers[:2], scores.answers[2:], strict=True)]
    hint = BOX.hint(prompts, groups, scores.u.mean().item())
    assert f"read as {frame} their mean IoU would be 1.00" in hint
    assert BOX.hint(prompts, [[target] for target in targets], 1.0) == BOX.hint(prompts, [[None], [None]], 0.0) == ""


def test_boxes_are_drawn_where_they_are_and_any_size_of_them():
    image = Image.new("RGB", (40, 40))
    BOX.draw(image, 2.0, (2.0, 3.0, 10.0, 12.0), [None, (12.0, 12.0, 18.0, 19.0), (-1e6, -1e6, 1e6, 1e6)])
    pixels = np.asarray(image)
    for colour, (x1, y1, x2, y2) in ((TRUTH, (4, 6, 20, 24)), (ANSWER, (24, 24, 36, 38))):  # half-open
        rows, columns = np.nonzero((pixels == colour).all(2))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
        assert not pixels[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].any()  # an outline
    BOX.draw(image, 2.0, None, [])
    assert (np.asarray(image) == pixels).all()


class Length(Task):
    """u is the share of an answer's letters that it should have."""

    name, reasons, parts = "length", {"": "a text", "empty": "no letter"}, ("letters",)

    def score(self, texts, prompts):
        u = torch.tensor([min(len(t) / p.target, 1.0) for t, p in zip(texts, prompts, strict=True)])
        letters = torch.tensor([float(len(t)) for t in texts])
        valid = torch.tensor([t != "" for t in texts])
        return Scores(u, valid, ["" if t else "empty" for t in texts], [t or None for t in texts], {"letters": letters})


def test_two_tasks_mixed_are_each_scored_in_their_place(monkeypatch):
    monkeypatch.setitem(TASKS, "length", Length())
    box, length = prompt((0.0, 0.0, 4.0, 4.0)), prompt(4, task="length")
    scores = by_task(["ab", "[0, 0, 4, 2]", "", "none", "abcd"], [length, box, length, box, length])
    assert scores.u.tolist() == [0.5, 0.5, 0, 0, 1] and scores.valid.tolist() == [True, True, False, False, True]
    assert scores.answers == ["ab", [0, 0, 4, 2], None, None, "abcd"]
    assert scores.reasons == ["", "", "empty", "no box", ""] and tasks.reasons()[0] == ""
    assert set(tasks.reasons()) > {*REASONS, "empty"} and len(set(tasks.reasons())) == len(tasks.reasons())
    assert scores.parts["letters"].tolist() == [2, 0, 0, 0, 4] and scores.parts["giou"].tolist() == [0, 0.5, 0, 0, 0]
    alone = by_task(["abcd", ""], [length, length])
    assert alone.u.tolist() == [1, 0] and list(alone.parts) == ["letters"]
    assert by_task([], []).u.shape == (0,)


def test_the_base_measures_sums_up_and_draws_in_words():
    task, us = Length(), [0.5, 1.0, 0.0, 0.25]
    rows = [{"u": u, "reason": "" if u else "empty", "answer": None, "target": 4} for u in us]
    error = round(statistics.stdev(us) / math.sqrt(4), 6)
    assert task.metrics(rows) == {"u": 0.4375, "u_standard_error": error, "n": 4, "parse_failures": 1}
    assert task.metrics(rows[:1])["u_standard_error"] == 0
    told = task.summary(task.metrics(rows) | {"task": "length"})
    assert told == "u 0.438  u_standard_error 0.213  n 4  parse_failures 1"
    image = Image.new("RGB", (60, 60))
    task.draw(image, 1.0, None, [None])
    assert not np.asarray(image).any() and task.hint([], [], 0.0) == ""
    task.draw(image, 1.0, "left", [None, "right"])
    shown = [np.flatnonzero((np.asarray(image)[..., i] > 150).any(1)) for i in (1, 0)]  # green, then red below it
    assert len(shown[0]) and len(shown[1]) and shown[0].max() < shown[1].min() < 26
    assert task.question("At {query}:") == "At {query}:"
    refused("--train: the task 'length' has no constant answer; drop it", task.constant, [])


def test_an_evaluation_of_several_tasks_is_summed_up_by_task(monkeypatch):
    monkeypatch.setitem(TASKS, "length", Length())
    boxes = BOX.metrics([{"u": u, "reason": ""} for u in (0.45, 0.85)])
    words = Length().metrics([{"u": 1.0, "reason": ""}])
    assert tasks.summary("final", boxes).startswith("final: mIoU 0.650 +- 0.200  A@.5 0.500  A@.8 0.500  pmAP 0.")
    both = tasks.summary("final", {"n": 3, "tasks": {"box": boxes, "length": words}})
    assert both.startswith("final: box: mIoU 0.650 ") and "; length: u 1.000  u_standard_error 0.000  n 1" in both


FORMATTED = """<think>hm</think><answer>[1, 2, 3, 4]</answer> | <think></think><answer>[1, 2, 3, 4]</answer> |
    <think>\nhm\n</think>\n\n<answer>\n```json\n[1, 2, 3, 4]\n```\n</answer>\n |
    <think>a < b, <b>bold</b></think><answer>[1, 2, 3, 4]</answer>"""
UNFORMATTED = """ | [1, 2, 3, 4] | <answer>[1, 2, 3, 4]</answer> | <think>[1, 2, 3, 4]</think><answer>none</answer> |
    <think>hm</think><answer>[3, 4, 1, 2]</answer> | <think>hm</think><answer>[1, 2, 3, 4] |
    <think>hm<answer>[1, 2, 3, 4]</answer></think> | <answer>[1, 2, 3, 4]</answer><think>hm</think> |
    so: <think>hm</think><answer>[1, 2, 3, 4]</answer> | <think>hm</think> so: <answer>[1, 2, 3, 4]</answer> |
    <think>hm</think><answer>[1, 2, 3, 4]</answer> done | <think>a</think><answer>[1, 2, 3, 4]</answer></answer> |
    <think>a</think><think>b</think><answer>[1, 2, 3, 4]</answer> | <think>a<think>b</think><answer>[1,2,3,4]</answer> |
    <think>a</think><answer>x</answer><answer>[1, 2, 3, 4]</answer>"""


def test_the_format_is_the_whole_text():
    for texts, expected in ((FORMATTED, 1.0), (UNFORMATTED, 0.0)):
        for text in between_bars(texts):
            assert format_reward(text, parse_box(text).box is not None) == expected, text


def test_weights_are_read_from_one_string():
    assert read_weights("task=1, format=-0.5") == {"task": 1.0, "format": -0.5}
    assert read_weights("task=0,format=2") == {"task": 0.0, "format": 2.0}  # logged, not counted
    refused("'box' is called 'task' now, since every task has it: task=.5", read_weights, "box=.5")
    for texts, words in [
        (["", "iou=1", "task=1,,"], "no reward is called '.*'; there are task, format"),
        (["task", "task=", "task=one"], "must be NAME=WEIGHT, such as task=1"),
        (["task=nan", "task=inf"], "must have a finite weight"), (["task=1,task=2"], "'task' is named twice"),
        (["task=0,format=0"], "gives every reward the weight 0; one must count"),
    ]:  # fmt: skip
        for text in texts:
            refused(words, read_weights, text)


def test_rewards_of_ones_own_see_texts_scores_and_samples(monkeypatch):
    samples, seen = ["a", "b", "c"], []  # stand-ins: passed on as they are
    monkeypatch.setitem(REWARDS, "mine", lambda *given: seen.append(given) or [len(text) for text in given[0]])
    texts = ["<think>x</think><answer>[0,0,10,10]</answer>", "[0,0,10,20]", "nothing"]
    scores = BOX.score(texts, [prompt((0.0, 0.0, 10.0, 10.0))] * 3)
    parts = other_rewards({"task": 1.0, "format": 1.0, "mine": 0.5}, texts, scores, samples)
    assert parts["format"].tolist() == [1, 0, 0] and parts["mine"].tolist() == [len(text) for text in texts]
    assert list(parts) == ["format", "mine"] and seen == [(texts, scores, samples)]


def test_the_reward_is_the_weighted_sum_with_each_groups_own_schedule():
    keys = [("a", "box"), ("b", "box")]
    u, form = torch.tensor([[0.9, 0.5], [0.9, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    zeros = torch.zeros(2, 2, dtype=torch.long)
    scores = GroupScores(zeros, u, zeros, zeros, zeros.bool(), {"giou": u, "format": form}, u, keys=keys)
    schedules = Schedules(["fixed:tau=.6"], keys, 10)
    schedules.of[keys[1]] = Schedules(["raw"], keys, 10).of[keys[1]]
    reward = combine(scores, schedules, {"task": 2.0, "format": 0.25})
    assert torch.equal(reward, torch.tensor([[2.0, 0.25], [1.8 + 0.25, 1.0]]))
    assert torch.equal(scores.parts["task"], torch.tensor([[1.0, 0.0], [0.9, 0.5]]))
