"""tasks/span.py and tasks/tube.py: what is read, what it is worth and what is measured; the leaderboard's by hand."""

import itertools
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import Record
from errors import InputError
from eval import Original, metrics, score_rows
from images import Sample
from tasks import TASKS, configure, summary
from tasks.span import MOST, Span, leaderboard, matched, merged, parse_spans, tiou, union_iou
from tasks.task import ANSWER, TRUTH
from tasks.tube import Tube, parse_tube, viou

SPAN, TUBE = TASKS["span"], TASKS["tube"]
CLIP = 9.0  # seconds
ONE, TWO = [(1.1, 3.0)], [(1.1, 3.0), (5.0, 7.5)]
A, B = (1.0, 2.0, 30.0, 40.0), (5.0, 6.0, 25.0, 30.0)


def original(target, scale=(1.0, 1.0)) -> Original:
    return Original(Sample(None, "", None, "d", "span" if isinstance(target, Span) else "tube"), target, scale)


def rows_of(*pairs) -> list[dict]:
    """(target, answer) -> rows as predictions.jsonl has them."""
    return json.loads(json.dumps(score_rows([original(target) for target, _ in pairs], [text for _, text in pairs])))


def record(fields: dict, seconds: float | None = CLIP, clip: bool = False) -> Record:
    return Record(fields, {}, (40, 50), clip, seconds=seconds)


# --------------------------------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize(
    "text, spans",
    [
        ("1.1-3.0 seconds.", ONE),
        ("1.1-3.0, 5.0-7.5 seconds.", TWO),
        ("1.1-3", ONE),
        ("from 1.1 s to 3.0 s", ONE),
        ("1.1s–3.0s", ONE),
        ("1.1 — 3.0, 5.0 — 7.5", TWO),
        ("between 1.1 and 3 seconds", ONE),
        ("[[1.1, 3.0], [5, 7.5]]", TWO),
        ('{"start": 1.1, "end": 3.0}', ONE),
        ('```json\n[{"start_time": "1.1", "end_time": "3.0"},\n {"start_time": 5, "end_time": 7.5}]\n```', TWO),
        ("Start: 1.1 s\nEnd: 3.0 s", ONE),
        ("0:01.1 - 0:03", ONE),
        ("00:00:05-00:00:07.5, 1.1-3", [TWO[1], TWO[0]]),
        ("1.1秒到3.0秒", ONE),
        ("１．１－３．０", ONE),
        ("The duct is clipped twice, from 1.1 to 3.0 s and 5-7.5s.", TWO),
        ("<think> 8-9 or 2 </think><answer>1.1-3.0 seconds.</answer>", ONE),
        ("8.5-9.1", [(8.5, 9.1)]),  # 9.08 seconds, to one decimal
    ],
)
def test_spans_are_read_in_every_usual_form(text, spans):
    assert parse_spans(text, CLIP) == (spans, "")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no span"),
        ("at the end", "no span"),
        ("1.1 3.0", "no span"),
        ("[1, 2, 3]", "no span"),
        ("1-2 minutes", "no span"),
        ("10-20%", "no span"),
        ("1:75-2:00", "no span"),
        ("<think>1.1-3.0 seconds.", "no span"),
        ("3.0", "incomplete span"),
        ("1.1-3.0, 5.0", "incomplete span"),
        ("1.1-3.0 and 5.0-", "incomplete span"),
        ("[[1.1, 3.0], [5.0", "incomplete span"),
        ("1-2-3", "incomplete span"),
        ("3.0-1.1", "reversed"),
        ("1-1.0", "empty span"),
        ("nan-3", "not finite"),
        ("1-1e999", "not finite"),
        ("-1-3", "beyond the clip"),
        ("5-9.2", "beyond the clip"),
        ("1-2, 1.0-2.0", "the same span twice"),
        (", ".join(f"{i / 50:.2f}-{i / 50 + 0.01:.2f}" for i in range(MOST + 1)), "too many spans"),
    ],
)
def test_a_span_that_cannot_be_read_has_a_reason_and_is_worth_0(text, reason):
    assert parse_spans(text, CLIP) == (None, reason) and reason in SPAN.reasons
    scores = SPAN.score([text, "1.1-3.0"], [original(Span(tuple(ONE), CLIP))] * 2)
    assert scores.u.tolist() == [0.0, 1.0] and scores.valid.tolist() == [False, True]


def spans_of(rng, count: int) -> list[tuple[float, float]]:
    """On a grid of tenths, so that moments can be counted."""
    found = set()
    while len(found) < count:
        start, end = sorted(rng.sample(range(91), 2))
        found.add((start / 10, end / 10))
    return list(found)


def moments(spans) -> set[int]:
    return {i for start, end in spans for i in range(round(10 * start), round(10 * end))}


def test_worth_is_that_of_brute_force():
    """tIoU by counting tenths of a second; the matching over all permutations; both sides exchanged; in any order."""
    rng = random.Random(0)
    for _ in range(300):
        found, true = spans_of(rng, rng.randint(1, 4)), spans_of(rng, rng.randint(1, 4))

        def counted(a, b):
            a, b = moments([a]), moments([b])
            return len(a & b) / len(a | b)

        assert tiou(found[0], true[0]) == pytest.approx(counted(found[0], true[0]))
        few, many = sorted((found, true), key=len)
        sums = [sum(map(counted, few, picked)) for picked in itertools.permutations(many, len(few))]
        assert matched(found, true, tiou) == pytest.approx(max(sums) / len(many))
        a, b = moments(found), moments(true)
        assert union_iou(found, true) == pytest.approx(len(a & b) / len(a | b))
        assert moments(merged(found)) == a and union_iou(found, merged(found)) == pytest.approx(1)
        told = ", ".join(f"{x}-{y}" for x, y in rng.sample(found, len(found)))
        (u,) = SPAN.score([told], [original(Span(tuple(true), CLIP))]).u.tolist()
        assert u == pytest.approx(matched(true, found, tiou), abs=1e-6)
        # Twice as slow a clip, twice the seconds: worth the same.
        slow = [[(2 * x, 2 * y) for x, y in spans] for spans in (found, true)]
        assert matched(*slow, tiou) == pytest.approx(u, abs=1e-6)


def test_many_spans_earn_less_than_the_best_single_one():
    grid, rng = [(i / 2, i / 2 + 1.0) for i in range(16)], random.Random(1)
    for _ in range(50):
        place = original(Span(tuple(spans_of(rng, rng.randint(1, 3))), CLIP))
        texts = [", ".join(f"{a}-{b}" for a, b in grid), *(f"{a}-{b}" for a, b in grid)]
        every, *single = SPAN.score(texts, [place] * len(texts)).u.tolist()
        assert every <= max(single) and (every < max(single) or every == 0)


def test_other_rewards_of_spans_are_settings():
    place = original(Span(((2.0, 4.0), (5.0, 7.0)), 10.0))
    texts = ["2.0-4.0, 5.0-6.0", "2-7", "2-4, 5-7, 8-9", "2.0-4.0, 5.0-7.0", "3-5"]
    by = {
        "span": [(1 + 0.5) / 2, 0.4 / 2, 2 / 3, 1, (1 / 3) / 2],
        "span:u=union": [3 / 4, 4 / 5, 4 / 5, 1, 1 / 5],
        # Time-R1: 0.5 * (1 - 0) * (1 - .1); 2-7 against 2-4: .4 * 1 * .7, against 5-7: .4 * .7 * 1; 3-5: 1/3 * .9 * .9
        "span:u=time-r1": [(1 + 0.45) / 2, 0.28 / 2, 2 / 3, 1, 0.27 / 2],
    }
    for said, expected in by.items():
        configure([said], {"span"})
        assert SPAN.score(texts, [place] * 5).u.tolist() == pytest.approx(expected, abs=1e-6), said
    configure(None, set())
    with pytest.raises(InputError, match="u must be one of matched, union, time-r1"):
        configure(["span:u=best"], {"span"})


def test_the_leaderboards_rule_of_spans():
    """By hand. The hull of two spans that do not touch is no union, but then its IoU is 0 all the same. The first true
    span takes an answer that would suit the second better; spans too many, and those that were missed, do not count."""
    assert leaderboard([(1.0, 3.0)], [(2.0, 4.0)], 0.3) == (pytest.approx(1 / 3), 1.0)
    assert leaderboard([(1.0, 3.0)], [(2.0, 4.0)], 0.5) == (0.0, 0.0)
    assert leaderboard([(0.0, 1.0)], [(2.0, 4.0)], 0.0) == (0.0, 1.0)  # at 0 everything is a hit
    many = [(2.0, 4.0), (5.0, 6.0), (7.0, 8.0), (0.0, 1.0)]
    assert leaderboard(many, [(2.0, 4.0)], 0.5) == (1.0, 1.0)
    assert leaderboard([(2.0, 4.0)], [(2.0, 4.0), (6.0, 8.0)], 0.5) == (1.0, 0.5)
    # The first (0-4) takes 0-6 (2/3), the better of what is there; for 0-7 then only 5-7 is left (2/7).
    greedy = leaderboard([(0.0, 6.0), (5.0, 7.0)], [(0.0, 4.0), (0.0, 7.0)], 0.3)
    assert greedy == (pytest.approx(2 / 3), 0.5)
    assert matched([(0.0, 6.0), (5.0, 7.0)], [(0.0, 4.0), (0.0, 7.0)], tiou) == pytest.approx((2 / 3 + 2 / 7) / 2)
    assert leaderboard([], [(0.0, 1.0)], 0.5) == (0.0, 0.0)


def test_metrics_of_spans():
    one, two = Span(((2.0, 4.0),), 10.0), Span(((2.0, 4.0), (6.0, 8.0)), 10.0)
    found = metrics(rows_of((one, "2-4"), (one, "2.0-3.2"), (two, "2-4"), (one, "?")))
    assert found["miou"] == pytest.approx((1 + 0.6 + 0.5 + 0) / 4) == found["u"]
    assert [found[f"r@{t}"] for t in (0.3, 0.5, 0.7)] == [0.75, 0.75, 0.25]
    assert found["leaderboard_miou@0.5"] == pytest.approx((1 + 0.6 + 1 + 0) / 4)
    assert found["leaderboard_recall@0.7"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert (found["n"], found["parse_failures"]) == (4, 1)
    assert "R@.7 0.250  leaderboard's @.3 @.5 0.650 0.650" in summary("x", found)
    configure(["span:u=union"], {"span"})  # what is paid is another thing than what is measured
    assert metrics(rows_of((two, "2-8")))["u"] == pytest.approx(2 / 3)
    assert metrics(rows_of((two, "2-8")))["miou"] == pytest.approx(1 / 6, abs=1e-6)
    configure(None, set())


def test_records_answers_and_pictures_of_spans():
    target = SPAN.read(record({"segments": [[5, 7.5], [1.1, 3.0]]}))
    assert target == Span(((1.1, 3.0), (5.0, 7.5)), CLIP)
    assert SPAN.phrase("when?", target) == "when?\nThe clip lasts 9.0 seconds."
    for style, words in (("answer", "1.1-3.0, 5.0-7.5"), ("qwen", "1.1-3.0, 5.0-7.5 seconds.")):
        assert SPAN.answer(target, (1, 1), style, "") == words
    for exact in (target, Span(((0.125, 0.25), (1 / 3, 2 / 3)), CLIP)):
        for style in ("answer", "think", "qwen"):
            spans, _ = parse_spans(SPAN.answer(exact, (1, 1), style, ""), CLIP)
            assert matched(spans, exact.segments, tiou) == pytest.approx(1, abs=5e-3)
    told = SPAN.constant([((1, 1), Span(((1.0, 2.0),), 10.0)), ((1, 1), Span(((4.0, 6.0), (7.0, 9.0)), 10.0))])
    assert told((1, 1), Span(((0.0, 1.0),), 20.0)) == "8.0-12.0"  # the median shares, of a clip twice as long
    image = Image.new("RGB", (100, 60), (90, 90, 90))
    SPAN.draw(image, 1.0, Span(((2.0, 4.0),), 10.0), [[[6.0, 10.0]], None])
    pixels = np.asarray(image)
    truth, answer = (np.flatnonzero((pixels == colour).all(2).any(0)) for colour in (TRUTH, ANSWER))
    assert (truth.min(), truth.max(), answer.min(), answer.max()) == (20, 39, 60, 99)
    assert (pixels[:40] == 90).all()


@pytest.mark.parametrize(
    "segments, words",
    [
        ("x", "field 'segments' must be a list of 1 to 100 spans, not 'x'"),
        ([], "must be a list of 1 to 100 spans"),
        ([[1, 2], [1]], r"field 'segments\[1\]' must be \[start, end\] in seconds, not \[1\]"),
        ([[1, float("nan")]], r"must be \[start, end\] in seconds"),
        ([[3, 1]], r"field 'segments\[0\]' \[3, 1\] is no span; write 0 <= start < end"),
        ([[-1, 1]], "is no span"),
        ([[1, 9.5]], r"\[1, 9.5\] ends behind the clip of 9.0 seconds"),
        ([[9.05, 9.1]], "begins at the clip's end"),
        ([[1, 2], [1.0, 2.0]], r"field 'segments\[1\]' \[1.0, 2.0\] is there twice"),
    ],
)
def test_a_record_of_a_span_that_is_wrong_is_one_sentence(segments, words):
    with pytest.raises(InputError, match=words):
        SPAN.read(record({"segments": segments}))
    with pytest.raises(InputError, match="a span wants a clip"):
        SPAN.read(record({"segments": segments}, seconds=None))


# --------------------------------------------------------------------------------------------------------------- tubes


@pytest.mark.parametrize(
    "text",
    [
        "1.0 seconds: [1,2,30,40] 5.0 seconds: [5,6,25,30]",
        '{"1.0": [1, 2, 30, 40], "5.0": [5, 6, 25, 30]}',
        '```json\n[{"time": 1.0, "bbox_2d": [1, 2, 30, 40]},\n {"time": 5, "bbox_2d": [5, 6, 25, 30]}]\n```',
        '{"1.0": {"bbox_2d": [1, 2, 30, 40]}, "5.0": {"bbox_2d": [5, 6, 25, 30]}}',
        "1s: (1, 2, 30, 40); 5s: (5, 6, 25, 30)",
        "At 0:01: [1, 2, 30, 40].\nAt 0:05: [5, 6, 25, 30].",
        "<think>9.0: [1,2,3,4]</think><answer>5.0 seconds: [5,6,25,30] 1.0 seconds: [1,2,30,40]</answer>",
    ],
)
def test_tubes_are_read_in_every_usual_form(text):
    assert parse_tube(text, CLIP) == ({"1.0": A, "5.0": B}, "")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no box"),
        ("1.0 seconds", "no box"),
        ("[1,2,3,4]", "no second"),
        ("1.0: [1,2,3,4] [1,2,5,6]", "no second"),
        ("1.0: [1,2,3,4] 5.0: [1,2,5", "incomplete box"),
        ("1.0: [1,2,3,4] 5.0: [1,2]", "incomplete box"),
        ("1.0: (1,2) 5.0: (3,4)", "incomplete box"),
        ("1.0: [1,2,3,4,5]", "too many numbers"),
        ("1.0: [3,2,1,4]", "inverted"),
        ("1.0: [1,2,1,4]", "degenerate"),
        ("1.0: [1,2,nan,4]", "not finite"),
        ("inf: [1,2,3,4]", "not finite"),
        ("1.0: [1,2,1e9,4]", "absurd value"),
        ("1.0: [1,2,3,4] 1.04: [1,2,3,5]", "the same second twice"),
        ("9.2: [1,2,3,4]", "beyond the clip"),
        ("-1: [1,2,3,4]", "beyond the clip"),
        (" ".join(f"{i / 200:.3f}: [1,2,3,4]" for i in range(1001)), "too many boxes"),
    ],
)
def test_a_tube_that_cannot_be_read_has_a_reason_and_is_worth_0(text, reason):
    assert parse_tube(text, CLIP) == (None, reason) and reason in TUBE.reasons
    scores = TUBE.score([text, "1.0: [1,2,30,40]"], [original(Tube({"1.0": A}, CLIP))] * 2)
    assert scores.u.tolist() == [0.0, 1.0] and scores.valid.tolist() == [False, True]
    assert TUBE.score([], []).u.shape == (0,)


def iou(a, b) -> float:
    w, h = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - w * h)


def tube_of(rng, count: int) -> dict[str, tuple]:
    times, corners, sizes = rng.choice(8, count, replace=False), rng.integers(0, 30, (count, 2)), rng.integers(9, 30, 2)
    return {f"{t:.1f}": (*corner, *(corner + sizes)) for t, corner in zip(times, corners, strict=True)}


def test_viou_is_that_of_brute_force_in_any_frame():
    """In float64, second by second, of many answers at once, whose boxes must not be mixed up."""
    rng, places, texts, expected = np.random.default_rng(0), [], [], []
    for n in range(100):
        told, true = (tube_of(rng, rng.integers(1, 6)) for _ in range(2))
        either = told.keys() | true.keys()
        ious = {t: iou(told[t], true[t]) if t in told and t in true else 0.0 for t in either}
        shared = len(told.keys() & true.keys())
        expected.append((sum(ious.values()) / len(either), sum(ious.values()) / len(true), shared / len(either)))
        scale = (1.0 + n % 3, 1.0 + n % 2)
        model = {t: [float(v / s) for v, s in zip(box, scale * 2, strict=True)] for t, box in told.items()}
        texts.append(json.dumps(model))
        places.append(original(Tube({t: tuple(map(float, box)) for t, box in true.items()}, CLIP), scale))
    scores = TUBE.score(texts, places)
    np.testing.assert_allclose(scores.u, [volume for volume, _, _ in expected], atol=1e-5)
    np.testing.assert_allclose(scores.parts["siou"], [space for _, space, _ in expected], atol=1e-5)
    shares = viou([(answer, place.target.boxes) for answer, place in zip(scores.answers, places, strict=True)])
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    configure(["tube:u=siou"], {"tube"})
    np.testing.assert_allclose(TUBE.score(texts, places).u, [space for _, space, _ in expected], atol=1e-5)
    configure(None, set())


def test_answers_in_another_frame_are_recognised_or_asked_for():
    """What MedVidBench's own models say: original pixels, of a picture that the policy sees at half its size."""
    place = original(Tube({"1.0": A, "5.0": B}, CLIP), (2.0, 2.0))._asdict() | {"size": (40, 50)}
    (prompt,), text = [SimpleNamespace(**place)], "1.0: [1,2,30,40] 5.0: [5,6,25,30]"
    scores = TUBE.score([text], [prompt])
    assert scores.u.item() < 0.25
    hint = TUBE.hint([prompt], [[scores.answers[0], None]], scores.u.item())
    assert "read as pixels of the ORIGINAL image their mean IoU would be 1.00" in hint
    assert TUBE.hint([prompt], [[None]], 0.0) == ""
    configure(["tube:frame=original"], {"tube"})
    assert TUBE.score([text], [prompt]).u.item() == 1.0 and TUBE.hint([prompt], [scores.answers], 0.0) == ""
    assert parse_tube(TUBE.answer(prompt.target, (2.0, 2.0), "qwen", ""), CLIP)[0] == prompt.target[0]
    configure(None, set())


def test_boxes_at_seconds_that_nobody_asked_for_cost():
    place = original(Tube({"1.0": A, "5.0": B}, CLIP))
    right = "1.0: [1,2,30,40] 5.0: [5,6,25,30]"
    texts = [right, "1.0: [1,2,30,40]", f"{right} 6.0: [1,2,3,4] 7.0: [1,2,3,4]", "2.0: [1,2,30,40]"]
    assert TUBE.score(texts, [place] * 4).u.tolist() == [1.0, 0.5, 0.5, 0.0]


def test_metrics_of_tubes_and_the_leaderboards_rule():
    """By hand. The leaderboard carries the box before into a second that has none, leaves out seconds before the first
    box, and answers without any."""
    far, square = (100.0, 100.0, 110.0, 110.0), (0.0, 0.0, 10.0, 10.0)
    tube = Tube({"1.0": square, "2.0": square, "3.0": far}, CLIP)
    pairs = [
        (tube, "2.0: [0,0,10,5]"),  # vIoU .5/3; carried into 3.0, where it is 0: (.5 + 0) / 2
        (tube, "1.0: [0,0,10,10]"),  # 1/3; carried twice: (1 + 1 + 0) / 3
        (tube, "7.0: [0,0,10,10]"),  # none of the truth's seconds: left out
        (tube, "?"),  # left out
        (tube, "1.0: [0,0,10,10] 2.0: [0,0,10,10] 3.0: [100,100,110,110] 4.0: [1,1,2,2]"),  # 3/4; 1
    ]
    found = metrics(rows_of(*pairs))
    assert found["m_viou"] == pytest.approx((0.5 / 3 + 1 / 3 + 3 / 4) / 5, abs=1e-6) == found["u"]
    assert found["siou"] == pytest.approx((0.5 / 3 + 1 / 3 + 1) / 5, abs=1e-6)
    assert found["m_tiou"] == pytest.approx((1 / 3 + 1 / 3 + 0 + 0 + 3 / 4) / 5, abs=1e-6)
    assert (found["viou@0.3"], found["viou@0.5"]) == (0.4, 0.2)
    assert found["leaderboard_miou"] == pytest.approx((0.25 + 2 / 3 + 1) / 3, abs=1e-6)
    assert (found["leaderboard_n"], found["n"], found["parse_failures"]) == (3, 5, 1)
    assert "leaderboard's 0.639 of 3  n 5" in summary("x", found)
    assert metrics(rows_of((tube, "?")))["leaderboard_miou"] == 0.0


def test_records_answers_and_pictures_of_tubes():
    target = TUBE.read(record({"tube": {"5.0": list(B), "1.0": list(A)}}))
    assert target == Tube({"1.0": A, "5.0": B}, CLIP) and list(target.boxes) == ["1.0", "5.0"]
    assert TUBE.phrase("the hook", target) == "the hook\nSeconds: 1.0, 5.0."
    assert TUBE.answer(target, (1, 1), "qwen", "") == "1.0 seconds: [1,2,30,40] 5.0 seconds: [5,6,25,30]"
    for style in ("answer", "think", "qwen"):
        boxes, _ = parse_tube(TUBE.answer(target, (0.5, 0.25), style, ""), CLIP)
        assert {
            t: tuple(v * s for v, s in zip(box, (0.5, 0.25) * 2, strict=True)) for t, box in boxes.items()
        } == target[0]
    cut = record({"tube": {"1.0": [1, 2, 60, 40]}}, clip=True)
    assert TUBE.read(cut).boxes == {"1.0": (1.0, 2.0, 40.0, 40.0)} and cut.cut
    told = TUBE.constant([((40, 50), target)])((80, 100), Tube({"2.0": A}, CLIP))
    assert parse_tube(told, CLIP)[0] == {"2.0": pytest.approx((6.0, 8.0, 55.0, 70.0))}
    image = Image.new("RGB", (160, 100))  # two frames of 80 x 100, twice the original
    TUBE.draw(image, 2.0, target, [{"5.0": [8.0, 6.0, 20.0, 30.0]}, None])
    pixels = np.asarray(image)
    truth, answer = (np.flatnonzero((pixels == colour).all(2).any(0)) for colour in (TRUTH, ANSWER))
    assert (truth.min(), truth.max(), answer.min(), answer.max()) == (2, 80 + 49, 80 + 16, 80 + 39)
    long = Tube({f"{t}.0": A for t in range(10)}, 10.0)
    assert TUBE.moments(long) == [0.0, 4.0, 9.0] and TUBE.moments(target) == [1.0, 5.0]


@pytest.mark.parametrize(
    "tube, words",
    [
        ([], r"field 'tube' must hold 1 to 1000 boxes by second, such as \{\"1.0\": \[x1, y1, x2, y2\]\}, not \[\]"),
        ({}, "must hold 1 to 1000 boxes"),
        ({"1": list(A)}, "field 'tube': '1' is no second; write one decimal, such as '1.0'"),
        ({"01.0": list(A)}, "'01.0' is no second"),
        ({"9.2": list(A)}, "field 'tube': 9.2 lies behind the clip of 9.0 seconds"),
        ({"1.0": [1, 2, 3]}, r"field \"tube\['1.0'\]\" must be four finite numbers"),
        ({"1.0": [1, 2, 60, 40]}, r"field \"tube\['1.0'\]\" \[1, 2, 60, 40\] reaches outside the 40x50 image"),
    ],
)
def test_a_record_of_a_tube_that_is_wrong_is_one_sentence(tube, words):
    with pytest.raises(InputError, match=words):
        TUBE.read(record({"tube": tube}))
    with pytest.raises(InputError, match="a tube wants a clip"):
        TUBE.read(record({"tube": tube}, seconds=None))


def test_long_answers_take_little_time():
    started = time.process_time()
    units = (
        "1-",
        "1.1-3.0,",
        "[1,",
        "1: [",
        "1 ",
        "9",
        "1:",
        "1.0: [1,2,3,4]",
        "start: 1 ",
        "(",
        "between 1 and ",
        "|-",
        "start_",
    )
    for junk in (*(unit * (30_000 // len(unit)) for unit in units), "1" + " " * 30_000 + "-"):
        assert parse_spans(junk, CLIP)[0] is parse_tube(junk, CLIP)[0] is None
    assert time.process_time() - started < 10
