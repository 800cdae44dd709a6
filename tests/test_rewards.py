"""rewards.py: a table of answers, fuzz, time bounds, frames, IoU by counting pixels, the format, the weighted sum."""

import math
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from errors import InputError
from rewards import REASONS, REWARDS, combine, format_reward, parse_box, parts_of_reward, read_weights, score
from scheduler import ScheduleConfig, make_schedule

B = (10.0, 20.0, 30.0, 40.0)
NO, CUT, MANY = "no box", "incomplete box", "too many numbers"

# answer -> the box, or the reason why there is none
ANSWERS = [
    # JSON and near JSON
    ('{"bbox_2d": [10, 20, 30, 40]}', B),
    ('{"bbox_2d": [10, 20, 30, 40], "label": "lesion"}', B),
    ('{"bbox": [10, 20, 30, 40]}', B),
    ("{'box': [10, 20, 30, 40]}", B),
    ('{"coordinates": [10,20,30,40]}', B),
    ('{"label": "nodule 3", "bbox_2d": [10, 20, 30, 40], "score": 0.97}', B),
    ('[{"bbox_2d": [10, 20, 30, 40], "label": "a"}]', B),
    ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [10, 20, 30, 40]}]', B),
    ('```json\n[\n\t{"bbox_2d": [10, 20, 30, 40]}\n]\n```', B),
    ("```\n[10, 20, 30, 40]\n```", B),
    ('{"bbox_2d": "[10, 20, 30, 40]"}', B),
    ('{"bbox_2d": [10, 20, 30, 40]', B),  # the brace is cut off, the box is whole
    ('"bbox_2d": [10, 20, 30, 40]', B),
    ("{bbox_2d: [10, 20, 30, 40]}", B),
    # bare lists and brackets
    ("[10, 20, 30, 40]", B),
    ("[10,20,30,40]", B),
    ("[ 10 , 20 , 30 , 40 ]", B),  # VLM-R1 rejected the space before "]"
    ("[10\n,20\n,\n30,\n40\n]", B),
    ("[\r\n\t10,\r\n\t20,\r\n\t30,\r\n\t40\r\n]", B),
    ("(10, 20, 30, 40)", B),
    ("10, 20, 30, 40", B),
    ("10,20,30,40", B),
    ("10 20 30 40", B),
    ("[10 20 30 40]", B),
    ("[10, 20, 30, 40,]", B),
    ("[[10, 20, 30, 40]]", B),
    ("[[1, 2, 3, 4], [10, 20, 30, 40]]", B),
    ("[[[10, 20, 30, 40]]]", B),
    ("The box is [10, 20, 30, 40].", B),
    ("The box is 10, 20, 30, 40.", B),
    ("The box is 10, 20, 30, 40...", B),
    ("box:10,20,30,40;", B),
    ("10, 20, 30, 40]", B),  # the prompt may end in the opening bracket
    ("In 2 of 3 views [10, 20, 30, 40] with 1 margin", B),
    ("[10, 20, 30, 40] (see [1])", B),
    # two points, corners by name
    ("(10, 20), (30, 40)", B),
    ("<|box_start|>(10,20),(30,40)<|box_end|>", B),
    ("[[10, 20], [30, 40]]", B),
    ("(10, 20)\n(30, 40)", B),
    ('{"x1": 10, "y1": 20, "x2": 30, "y2": 40}', B),
    ('{"bbox_2d": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}', B),
    ('{"x1": 10, "x2": 30, "y1": 20, "y2": 40}', B),
    ("x1=10, y1=20, x2=30, y2=40", B),
    ("X1: 10\nY1: 20\nX2: 30\nY2: 40", B),
    ("{'x1':1,'y1':2,'x2':3,'y2':4},{'x1':10,'y1':20,'x2':30,'y2':40}", B),
    ('{"x1": 10, "y1": 20, "x2": 30, "y2": 40}, {"x1": 1, "y1": 2}', B),  # the second is no patch for the first
    # as Chinese text writes them
    ("（10，20，30，40）", B),
    ("［10，20，30，40］", B),
    ("【10，20，30，40】", B),
    ("〔10，20，30，40〕", B),
    ("病变位于（10，20，30，40）。", B),
    ("10、20、30、40", B),
    ("10，20，30，40", B),
    ("１０，２０，３０，４０", B),
    ("［１０．０，２Ｅ１，＋３０，４０］", B),
    ("（－３，−4.5，7，8）", (-3.0, -4.5, 7.0, 8.0)),
    ("[10，20, 30、\u300040\xa0]", B),
    ("（10，20），（30，40）", B),
    ("【（10，20）、（30，40）】", B),
    ("(10，20)、(30，40)", B),
    ("“bbox_2d”：［10，20，30，40］", B),
    ("｛“bbox_2d”：［10，20，30，40］，“label”：“病变（1、2、3、4）”｝", B),
    ("｛＂bbox_2d＂：［10，20，30，40］，＂label＂：＂病变（1、2、3、4）＂｝", B),
    ('{“bbox_2d”: [10, 20, 30, 40], “label”: “the "big" one, 1, 2, 3, 4”}', B),
    ('{"bbox_2d": [10, 20, 30, 40], "label": "the “big” one, 1, 2, 3, 4"}', B),
    ('{"bbox_2d": [10, 20, 30, 40], "label"："the ”big“ one，1，2，3，4', B),
    ("ｘ１＝10；ｙ１＝20；ｘ２＝30；ｙ２＝40", B),
    ("‘x1’：10，‘y1’：20，‘x2’：30，‘y2’：40", B),
    ("<think>（1，2，3，4）</think><answer>（10，20，30，40）</answer>", B),
    ("（10，20，30，40，50）", MANY),
    ("（10，20，30，40", CUT),
    ("（10，20）到（30，40）", CUT),
    ("［１０ｐｘ，２０ｐｘ，３０ｐｘ，４０ｐｘ］", NO),
    ("（30，20，10，40）", "inverted"),
    ("（0，0，ｉｎｆ，1）", "not finite"),
    ("有３个病变", NO),
    # numbers
    ("[10.0, 20.0, 30.0, 40.0]", B),
    ("[10., 20., 30., 40.]", B),
    ("[1e1, 2E1, 3e+1, 400e-1]", B),
    ("[+10, +20, +30, +40]", B),
    ("[.5, .25, 1.5, 2.75]", (0.5, 0.25, 1.5, 2.75)),
    ("[-3, -4.5, 7, 8]", (-3.0, -4.5, 7.0, 8.0)),
    ("[0, 0, 1, 1]", (0.0, 0.0, 1.0, 1.0)),
    ("[0010, 020, 30, 40]", B),
    ("[0, 0, 1000000, 1e6]", (0.0, 0.0, 1e6, 1e6)),
    # which box: the last complete one in the last answer
    ("<think>[1, 2, 3, 4]</think><answer>[10, 20, 30, 40]</answer>", B),
    ("<answer>[10, 20, 30, 40]", B),
    ("<answer>[1, 2, 3, 4]</answer> no: <answer>[10, 20, 30, 40]</answer>", B),
    ("<answer>[10, 20, 30, 40]</answer> or [1, 2, 3, 4]", B),
    ("[1, 2, 3, 4]</answer> [10, 20, 30, 40]", B),  # a closing tag alone is no answer
    ("<answer>[10, 20, 30, 40] then [1, 2, 3</answer>", B),
    ("[10, 20, 30, 40] confidence [0.1, 0.2, 0.3, 0.4, 0.5]", B),
    ("[10, 20, 30, 40], (1, 2), (3, 4), (5, 6)", B),  # a polygon behind it hides nothing
    ("[1, 2, 3, 4] (10, 20), (30, 40)", B),
    ("<think>[1, 2, 3, 4]</think><answer>I see none</answer>", NO),
    ("[1, 2, 3, 4]<answer>", NO),
    ("[10, 20, 30, 40] or [9, 9, 3, 4]", "inverted"),  # the last decides: hedging does not pay
    # no box
    ("", NO),
    ("no lesion", NO),
    ("There are 3 lesions.", NO),
    ("bbox_2d", NO),
    ("[]", NO),
    ("{}", NO),
    ("[null, null, null, null]", NO),
    ("[ten, twenty, thirty, forty]", NO),
    ("٣, ٤, ٥, ٦", NO),  # only ASCII digits are numbers
    ("[ınf, 1, 2, 3]", CUT),  # a dotless i is not the i of inf; 1, 2, 3 is left
    # incomplete, too many
    ("[10, 20, 30]", CUT),
    ("[10]", CUT),
    ("10, 20, 30", CUT),
    ("[10, 20, 30, 40", CUT),  # the 40 may be half of 405
    ("[10, 20, 30, 4", CUT),
    ("[10, 20, 30, 40}", CUT),
    ("(10, 20)", CUT),
    ("(10, 20) to (30, 40)", CUT),
    ('{"x1": 10, "y1": 20, "x2": 30}', CUT),
    ("[10px, 20px, 30px, 40px]", NO),
    ("[10.5.1, 20, 30, 40]", CUT),
    ("[10, 20, 30, 40, 50]", MANY),
    ("[1, 2, 3, 4, 5", MANY),  # cut off, and still too many
    ("1 2 3 4 5 6 7 8", MANY),
    ("(1, 2), (3, 4), (5, 6), (7, 8)", MANY),
    # not a box
    ("[30, 20, 10, 40]", "inverted"),
    ("[10, 40, 30, 20]", "inverted"),
    ("[30, 40, 10, 20]", "inverted"),
    ("[10, 20, 10, 40]", "degenerate"),
    ("[10, 20, 30, 20]", "degenerate"),
    ("[0, 0, 0, 0]", "degenerate"),
    ("[NaN, 20, 30, 40]", "not finite"),
    ("[10, 20, nan, 40]", "not finite"),
    ("[0, 0, Infinity, Infinity]", "not finite"),
    ("[-Infinity, 0, 1, inf]", "not finite"),
    ("[0, 0, 1e999, 1]", "not finite"),
    ("[0, 0, 1000001, 1]", "absurd value"),
    ("[-1e7, 0, 1, 1]", "absurd value"),
    ("[0, 0, 1e300, 1]", "absurd value"),
]


@pytest.mark.parametrize(("text", "expected"), ANSWERS)
def test_the_table_of_answers(text, expected):
    parsed = parse_box(text)
    if isinstance(expected, str):
        assert parsed == (None, expected)
    else:
        assert parsed == (expected, "")


def test_every_reason_is_documented_and_reached():
    assert len(ANSWERS) >= 60
    assert {parse_box(text).reason for text, _ in ANSWERS} == set(REASONS)


PIECES = st.sampled_from(
    ["[", "]", "(", ")", "{", "}", ",", " ", "\n", "（", "］", "，", "、", "３", "“label”：“", "”", '"label":"', '"']
    + ["<answer>", "</answer>", '"x1":', "y1=", "x2:", "'y2':"]
    + ["1", "20", "-3.5", "1e5", "1e999", "nan", "inf", "-Infinity", ".", "e", "-", "_", "ı", "٣", "ſ", "\0", "bbox_2d"]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_a_box_or_a_reason(text):
    box, reason = parse_box(text)
    assert reason in REASONS and (box is None) == (reason != "")
    if box is not None:
        assert -1e6 <= box[0] < box[2] <= 1e6 and -1e6 <= box[1] < box[3] <= 1e6
    assert format_reward(text) in (0.0, 1.0)


STYLES = [
    "[{}, {}, {}, {}]",
    "[ {} ,{}\n, {},{} ]",
    "({},{},{},{})",
    "{}, {}, {}, {}",
    '{{"bbox_2d": [{}, {}, {}, {}]}}',
    "[[{}, {}, {}, {}]]",
    "[[{}, {}], [{}, {}]]",
    "({}, {}),({}, {})",
    '```json\n[{{"bbox_2d": [{}, {}, {}, {}], "label": "x"}}]\n```',
    '{{"x1": {}, "y1": {}, "x2": {}, "y2": {}}}',
    "x1={}; y1={}; x2={}; y2={}",
]
COORDINATE = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6), st.floats(0, 4096).map(lambda v: round(v, 2))
)
# Junk ends and begins in a letter: "3" in front of "10, 20, 30, 40" makes it another list, and rightly so.
JUNK = st.text(alphabet=st.characters(exclude_characters="<")).map(lambda s: "see " + s + " is ")


@given(st.lists(COORDINATE, min_size=4, max_size=4), st.sampled_from(STYLES), JUNK, st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_printed_box_parses_back_exactly(values, style, junk, tagged):
    x1, y1, x2, y2 = values
    assume(x1 != x2 and y1 != y2)
    box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    text = junk + style.format(*box) + " and nothing else"
    if tagged:
        text = f"<think>[5, 6, 7, 8]</think><answer>{text}</answer> [1, 2, 3, 4]"
    assert parse_box(text) == (tuple(float(v) for v in box), "")


MB = 10**6
LONG = {
    "brackets": "[" * MB,
    "digits": "9" * MB,
    "digits and a letter": "9" * MB + "a",
    "a long fraction": "0." + "1" * MB,
    "a long exponent": "1e" + "9" * MB,
    "commas": "," * MB,
    "a list without end": "1," * (MB // 2),
    "an open list without end": "[" + "1," * (MB // 2),
    "lone numbers": "1;" * (MB // 2),
    "open numbers": "1\n[" * (MB // 3),
    "points": "(1,2)" * (MB // 5),
    "spaces in a list": "[1" + " " * MB + "a",
    "separators": "1" + " ," * (MB // 2) + "a",
    "brackets and spaces": "[ " * (MB // 2),
    "keys": "x1:" * (MB // 3),
    "a key and spaces": "x1" + " " * MB,
    "corners": "x1:1 " * (MB // 5),
    "signs": "-" * MB,
    "points of numbers": "." * MB,
    "half exponents": "1e" * (MB // 2),
    "tags": "<answer>" * (MB // 8),
    "boxes": "[1,2,3,4]" * (MB // 9),
    "fullwidth brackets": "（" * (MB // 3),  # three bytes each
    "fullwidth digits": "９" * (MB // 3),
    "a fullwidth list without end": "１、" * (MB // 6),
    "labels that do not end": "“label”：“" * (MB // 25),
    "a label and spaces": "“label”" + "\u3000" * (MB // 3),
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_of_junk_takes_linear_time(name):
    def seconds() -> float:
        begin = time.process_time()  # not the wall clock: other work on the machine is none of the parser's
        parse_box(LONG[name])
        format_reward("<think></think><answer>" + LONG[name])
        return time.process_time() - begin

    assert seconds() < 3.0  # about one, on a machine busy with other work; in quadratic time a megabyte takes hours


def test_a_box_behind_a_megabyte_of_digits_is_found():
    assert parse_box("9" * MB + " is [10, 20, 30, 40]").box == B
    assert parse_box("[1, 2, 3, " + "9" * MB + "]").reason == "not finite"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>hm</think><answer>[1, 2, 3, 4]</answer>", 1.0),
        ("  <think>\nhm\n</think>\n\n<answer>\n```json\n[1, 2, 3, 4]\n```\n</answer>\n", 1.0),
        ("<think></think><answer>[1, 2, 3, 4]</answer>", 1.0),
        ("<think>a < b, <b>bold</b></think><answer>[1, 2, 3, 4]</answer>", 1.0),
        ("", 0.0),
        ("[1, 2, 3, 4]", 0.0),
        ("<answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>[1, 2, 3, 4]</think><answer>none</answer>", 0.0),
        ("<think>hm</think><answer>[3, 4, 1, 2]</answer>", 0.0),
        ("<think>hm</think><answer>[1, 2, 3, 4]", 0.0),
        ("<think>hm<answer>[1, 2, 3, 4]</answer></think>", 0.0),
        ("<answer>[1, 2, 3, 4]</answer><think>hm</think>", 0.0),
        ("so: <think>hm</think><answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>hm</think> so: <answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>hm</think><answer>[1, 2, 3, 4]</answer> done", 0.0),
        ("<think>a</think><think>b</think><answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>a</think><answer>x</answer><answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>a<think>b</think><answer>[1, 2, 3, 4]</answer>", 0.0),
        ("<think>a</think><answer>[1, 2, 3, 4]</answer></answer>", 0.0),
    ],
)
def test_the_format_is_the_whole_text(text, expected):
    assert format_reward(text) == expected


def test_score_takes_iou_in_the_original_frame():
    targets = torch.tensor([[100.0, 40.0, 300.0, 80.0]] * 2)
    scale = torch.tensor(
        [[2.5, 0.5], [1.0, 1.0]]
    )  # 1: the answer's frame is smaller in x, larger in y; 2: the same frame
    scores = score(["[40, 80, 120, 160]", "[40, 80, 120, 160]"], targets, scale)
    assert scores.boxes.tolist() == [[100, 40, 300, 80], [40, 80, 120, 160]]
    assert scores.iou.tolist() == [1.0, 0.0] and scores.giou[0] == 1.0 and scores.giou[1] < 0
    assert scores.boxes.dtype == scores.iou.dtype == scores.giou.dtype == scores.format.dtype == torch.float32


def test_score_of_failures_is_zero_and_says_why():
    texts = ["<think></think><answer>[0, 0, 4, 4]</answer>", "none", "[4, 4, 0, 0]", "[0, 0, inf, 4]"]
    scores = score(texts, torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 4), torch.ones(4, 2))
    assert scores.valid.tolist() == [True, False, False, False]
    assert scores.reasons == ["", "no box", "inverted", "not finite"]
    assert scores.iou.tolist() == scores.giou.tolist() == scores.format.tolist() == [1, 0, 0, 0]
    assert scores.boxes[1:].isnan().all() and not scores.boxes[0].isnan().any()


def test_score_of_nothing_and_of_wrong_shapes():
    empty = score([], torch.zeros(0, 4), torch.zeros(0, 2))
    assert empty.boxes.shape == (0, 4) and empty.iou.shape == empty.valid.shape == (0,)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        score(["a", "b"], torch.zeros(1, 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        score(["a", "b"], torch.zeros(2, 4), torch.zeros(2))


def test_score_equals_counting_pixels():
    generator = torch.Generator().manual_seed(0)
    size, scale = 24, torch.tensor([[3.0, 2.0]])
    corners = torch.randint(0, 8, (100, 2, 2, 2), generator=generator)  # 100 answers and targets, two points each
    corners = corners.sort(2).values
    corners[:, :, 1] += 1  # width and height of at least one
    answers, targets = corners.flatten(2).unbind(1)  # (100, 4) each, model and original frame
    targets = targets * 2
    scores = score([str(box) for box in answers.tolist()], targets.float(), scale.expand(100, 2))
    row, column = torch.arange(3 * size)[:, None], torch.arange(3 * size)[None, :]
    for answer, target, iou in zip(answers.tolist(), targets.tolist(), scores.iou.tolist(), strict=True):
        a = (answer[0] * 3 <= column) & (column < answer[2] * 3) & (answer[1] * 2 <= row) & (row < answer[3] * 2)
        b = (target[0] <= column) & (column < target[2]) & (target[1] <= row) & (row < target[3])
        assert iou == pytest.approx(((a & b).sum() / (a | b).sum()).item(), abs=1e-6)
    assert 20 < (scores.iou > 0).sum() < 100


def test_combine_is_the_weighted_sum():
    parts = {"iou": torch.tensor([[1.0, 0.5]]), "format": torch.tensor([[0.0, 1.0]])}
    assert combine(parts, {"iou": 2.0, "format": 0.25}).tolist() == [[2.0, 1.25]]
    assert combine(parts, {"iou": 1.0}).tolist() == [[1.0, 0.5]]


def test_weights_are_read_from_one_string():
    assert read_weights("box=1") == {"box": 1.0}
    assert read_weights("box=1, format=-0.5") == {"box": 1.0, "format": -0.5}
    assert read_weights("box=0,format=2") == {"box": 0.0, "format": 2.0}  # logged, not counted


@pytest.mark.parametrize(
    "text", ["", "iou=1", "box", "box=", "box=one", "box=nan", "box=inf", "box=1,,", "box=0,format=0"]
)
def test_other_weights_are_refused(text):
    with pytest.raises(InputError):
        read_weights(text)


def test_parts_are_the_schedules_reward_and_registered_functions(monkeypatch):
    samples = ["a", "b", "c"]  # stand-ins: passed on as they are
    seen = []

    def mine(texts, scores, records):
        seen.append((texts, scores, records))
        return [len(text) for text in texts]

    monkeypatch.setitem(REWARDS, "mine", mine)
    texts = ["<think>x</think><answer>[0,0,10,10]</answer>", "[0,0,10,20]", "nothing"]
    scores = score(texts, torch.tensor([[0.0, 0, 10, 10]] * 3), torch.ones(3, 2))
    schedule = make_schedule("fixed", ScheduleConfig(fixed_tau=0.6), 10)
    parts = parts_of_reward(["box", "format", "mine"], texts, scores, samples, schedule)
    assert parts["box"].tolist() == [1, 0, 0] and parts["format"].tolist() == [1, 0, 0]
    assert parts["mine"].tolist() == [len(text) for text in texts] and seen == [(texts, scores, samples)]
    assert list(parts_of_reward(["format"], texts, scores, samples, schedule)) == ["format"]


@pytest.mark.parametrize("value", [[1.0], [[1.0], [2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_a_reward_without_a_finite_number_for_each_answer_is_refused_by_name(value, monkeypatch):
    monkeypatch.setitem(REWARDS, "mine", lambda *_: value)
    scores = score(["a", "b"], torch.ones(2, 4), torch.ones(2, 2))
    with pytest.raises(InputError, match="reward 'mine' must give 2 finite numbers, one an answer"):
        parts_of_reward(["mine"], ["a", "b"], scores, [None] * 2, None)
