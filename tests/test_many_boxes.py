"""tasks/boxes.py: several boxes or none are read, matched one to one, worth what they should be, and measured."""

import itertools
import json
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from programs import read_records

from errors import InputError
from eval import Original, metrics, score_rows
from images import Sample
from tasks import TASKS, configure, summary
from tasks.boxes import MOST, assign, f1, matched, parse_boxes

TASK = TASKS["boxes"]
A, B, C = [10, 20, 30, 40], [50, 60, 80, 90], [5, 5, 9, 9]


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("[[10,20,30,40],[50,60,80,90]]", [A, B]),
        ("[10, 20, 30, 40], [50, 60, 80, 90]", [A, B]),
        (
            '```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "cell 1"},\n\t{"bbox_2d": [50, 60, 80, 90]}\n]\n```',
            [A, B],
        ),
        ("<think> [1,2,3,4]? </think><answer>[[50,60,80,90]]</answer>", [B]),
        ("(10, 20), (30, 40); (50, 60), (80, 90)", [A, B]),
        ('{"x1": 10, "y1": 20, "x2": 30, "y2": 40}, {"x1": 50, "y1": 60, "x2": 80, "y2": 90}', [A, B]),
        ("10, 20, 30, 40", [A]),
        ("none", []),
        ("None.", []),
        ("There are no objects", []),
        ("[]", []),
        ("```json\n[]\n```", []),
        ("<answer>none</answer>", []),
    ],
)
def test_boxes_are_read_in_every_usual_form(text, boxes):
    found, reason = parse_boxes(text)
    assert reason == "" and found == [tuple(map(float, box)) for box in boxes]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no box"),
        ("I see nothing that I could frame, sorry", "no box"),
        ("[[10,20,30,40],[50,60,80", "incomplete box"),
        ("[[10,20,30,40],[50,60]]", "incomplete box"),
        ("[[10,20,30,40,50]]", "too many numbers"),
        ("(1, 2), (3, 4), (5, 6)", "too many numbers"),
        ("[[10,20,30,40],[10,20,30,40]]", "the same box twice"),
        ("[[10,20,30,40],[10.0,20,30,40]]", "the same box twice"),
        ("none, or [10,20,30,40]", "none, and boxes"),
        ("[[10,20,30,40],[30,60,20,90]]", "inverted"),
        ("[[10,20,30,40],[30,60,30,90]]", "degenerate"),
        ("[[10,20,30,40],[1e9,60,1e10,90]]", "absurd value"),
        ("[[10,20,nan,40]]", "not finite"),
        (json.dumps([[i, 0, i + 5, 5] for i in range(MOST + 1)]), "too many boxes"),
    ],
)
def test_what_cannot_be_read_has_a_reason_and_is_worth_0(text, reason):
    assert parse_boxes(text) == (None, reason) and reason in TASK.reasons
    original = Original(Sample(None, "", None, "d", "boxes", size=(99, 99)), [tuple(map(float, A))])
    scores = TASK.score([text, "[10,20,30,40]"], [original] * 2)
    assert scores.u.tolist() == [0.0, 1.0] and scores.valid.tolist() == [False, True]


def test_the_matching_is_that_of_brute_force():
    """1,000 tables up to 6 x 6, with ties and zeros, wide and tall; by sums, whoever is matched."""
    rng = random.Random(0)
    for _ in range(1000):
        rows, columns = rng.randint(0, 6), rng.randint(0, 6)
        table = [[rng.choice([0.0, 0.25, 0.5, rng.random()]) for _ in range(columns)] for _ in range(rows)]
        pairs = assign(table)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) == (min(rows, columns))
        flat = np.array(table).reshape(rows, columns)
        flat = flat if rows <= columns else flat.T  # the fewer are the rows
        picks = np.array(list(itertools.permutations(range(flat.shape[1]), flat.shape[0])), int)
        taken = flat[np.arange(flat.shape[0]), picks]  # (permutations, fewer)
        assert sum(table[i][j] for i, j in pairs) == pytest.approx(taken.sum(1).max())
        # As many pairs from tau on as there can be, which is not always what the best sum has.
        tau = rng.choice([0.25, 0.5, 0.75])
        assert len(matched(table, tau)) == (taken >= tau).sum(1).max()


def test_of_the_matchings_with_most_pairs_the_best_one_counts():
    """Three pairs at the threshold before two that fit perfectly; and of two the one with the larger sum."""
    assert matched([[1.0, 0.3, 0.0], [0.0, 1.0, 0.3], [0.3, 0.0, 0.0]], 0.3) == [(0, 1), (1, 2), (2, 0)]
    assert matched([[0.6, 0.9], [0.9, 0.6]], 0.5) == [(0, 1), (1, 0)]


def boxes_of(rng, count: int) -> list[tuple[float, ...]]:
    corners = rng.uniform(0, 80, (count, 2))
    return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, rng.uniform(5, 40, (count, 2)), strict=True)]


def iou(a, b) -> float:
    w, h = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return w * h / (area - w * h)


def test_u_is_that_of_the_best_matching_in_any_order_and_frame():
    """In float64 by brute force; of many answers at once, whose tables must not be mixed up; scaled to the original."""
    rng = np.random.default_rng(1)
    originals, texts, expected = [], [], []
    for n in range(150):
        truth, told = boxes_of(rng, rng.integers(0, 4)), boxes_of(rng, rng.integers(0, 5))
        told += [tuple(v + rng.normal(0, 2) for v in box) for box in truth[: rng.integers(0, 3)]]
        told = [box for box in told if box[0] < box[2] and box[1] < box[3]]
        few, many = sorted((truth, told), key=len)
        sums = [sum(iou(a, b) for a, b in zip(few, p, strict=False)) for p in itertools.permutations(many, len(few))]
        expected.append(max(sums) / len(many) if many else 1.0)
        scale = (1.0 + n % 3, 1.0 + n % 2)
        rng.shuffle(told)
        model = [[v / s for v, s in zip(box, scale * 2, strict=True)] for box in told]
        texts.append(json.dumps(model) if model else "none")
        originals.append(Original(Sample(None, "", None, "d", "boxes"), truth, scale))
    scores = TASK.score(texts, originals)
    np.testing.assert_allclose(scores.u, expected, atol=1e-5)
    assert scores.valid.all() and TASK.score([], []).u.shape == (0,)


def test_a_grid_of_guesses_earns_less_than_the_best_single_one():
    grid = [[x, y, x + 20, y + 20] for x in range(0, 100, 20) for y in range(0, 100, 20)]
    rng = np.random.default_rng(2)
    for _ in range(50):
        original = Original(Sample(None, "", None, "d", "boxes"), boxes_of(rng, rng.integers(1, 5)))
        every, *single = TASK.score([json.dumps(grid), *(json.dumps([b]) for b in grid)], [original] * 26).u.tolist()
        assert every <= max(single)


def test_other_rewards_are_settings():
    truth = [(10.0, 20.0, 30.0, 40.0), (50.0, 60.0, 80.0, 90.0)]
    original = Original(Sample(None, "", None, "d", "boxes"), truth)
    texts = ["[[10,20,30,40],[50,60,80,90],[0,0,5,5]]", "[[10,20,30,40]]", "none", "[[10,20,30,36],[50,60,80,90]]"]
    by = {"boxes": [2 / 3, 0.5, 0, 0.9], "boxes:u=f1": [0.8, 2 / 3, 0, 1], "boxes:u=f1,tau=.9": [0.8, 2 / 3, 0, 0.5]}
    by |= {"boxes:surplus=.1": [2 / 3 - 0.1, 0.5, 0, 0.9], "boxes:surplus=.9": [0, 0.5, 0, 0.9]}  # never below 0
    for said, expected in by.items():
        configure([said], {"boxes"})
        scores = TASK.score(texts, [original] * 4)
        assert scores.u.tolist() == pytest.approx(expected), said
        assert scores.parts["f1"].tolist() == pytest.approx([0.8, 2 / 3, 0, 0.5 if "tau" in said else 1])
    configure(None, set())
    with pytest.raises(InputError, match="surplus must be a number from 0 to 1"):
        configure(["boxes:surplus=2"], {"boxes"})


def rows_of(*pairs) -> list[dict]:
    originals = [Original(Sample(None, "", None, "d", "boxes"), target) for target, _ in pairs]
    return json.loads(json.dumps(score_rows(originals, [text for _, text in pairs])))


def test_metrics_count_pairs_over_all_pictures_and_false_alarms():
    far = (300.0, 300.0, 500.0, 500.0)  # a large object; A is a small one (20 x 20), B a small one too (30 x 30)
    rows = rows_of(
        ([tuple(map(float, A)), far], json.dumps([A, [300, 300, 500, 420]])),  # 1 and .6
        ([tuple(map(float, B))], "none"),
        ([], "none"),
        ([], json.dumps([C])),
        ([tuple(map(float, B))], "?"),
    )
    found = metrics(rows)
    assert found["f1@0.5"] == pytest.approx(2 * 2 / (3 + 4), abs=1e-6)
    assert found["f1@0.75"] == pytest.approx(2 * 1 / 7, abs=1e-6)
    assert found["f1"] == pytest.approx((3 * 4 / 7 + 7 * 2 / 7) / 10, abs=1e-6)  # .6 counts at .50 .55 .60
    assert found["recall_small"] == pytest.approx(1 / 3, abs=1e-6) and found["recall_large"] == 1.0
    assert found["recall_medium"] is None and found["false_alarms"] == 0.5 and found["negatives"] == 2
    assert (found["n"], found["parse_failures"], found["u"]) == (
        5,
        1,
        pytest.approx((0.8 + 0 + 1 + 0 + 0) / 5, abs=1e-6),
    )
    words = summary("x", found)
    assert "F1@.5 0.571" in words and "false alarms 0.500 of 2" in words
    assert metrics(rows_of(([], "none")))["f1"] == 1.0


def test_matches_are_cocos(tmp_path):
    """Of boxes that do not compete for one another COCO's evaluation finds the same pairs."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(3)
    truth = [(x * 60.0, y * 60.0, x * 60.0 + 40, y * 60.0 + 40) for x in range(5) for y in range(4)]
    told = [tuple(v + rng.normal(0, 4) for v in box) for box in truth if rng.random() < 0.8]
    table = [[iou(a, b) for b in truth] for a in told]

    def wide(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    base = {"images": [{"id": 1}], "categories": [{"id": 1}]}
    base["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": wide(b), "area": 1600.0, "iscrowd": 0}
        for i, b in enumerate(truth)
    ]
    whole = coco.COCO()
    whole.dataset = base
    whole.createIndex()
    theirs = whole.loadRes([{"image_id": 1, "category_id": 1, "bbox": wide(b), "score": 1.0} for b in told])
    run = cocoeval.COCOeval(whole, theirs, "bbox")
    run.evaluate()
    hits = (run.evalImgs[0]["dtMatches"] > 0).sum(1)  # at .50, .55 ... .95
    ours = [len(matched(table, tau)) for tau in (0.5 + 0.05 * i for i in range(10))]
    assert ours == hits.tolist()


RECORD = {"image": "a.png", "task": "boxes", "query": "the cell", "boxes": [[1, 2, 10, 20], [5, 6, 25, 30]]}


def test_records_answers_and_pictures_of_several_boxes_or_none(tmp_path):
    several, none = read_records(tmp_path, RECORD, RECORD | {"boxes": []})
    assert several.target == [(1.0, 2.0, 10.0, 20.0), (5.0, 6.0, 25.0, 30.0)] and none.target == []
    assert several.query == none.query  # whether there is something to find is not told
    for style in ("answer", "think", "qwen"):
        for sample in (several, none):
            text = TASK.answer(sample.target, (0.5, 0.25), style, "the 2 cells")
            found, _ = parse_boxes(text)
            back = [tuple(v * s for v, s in zip(box, (0.5, 0.25) * 2, strict=True)) for box in found]
            assert back == sample.target
    assert TASK.constant([((30, 40), []), ((30, 40), [])])((30, 40), []) == "none"
    assert parse_boxes(TASK.constant([((30, 40), several.target)])((60, 80), []))[0][0][2] == pytest.approx(35.0)
    image = Image.new("RGB", (60, 80))
    TASK.draw(image, 2.0, several.target, [[[1, 2, 10, 21], [20, 1, 29, 5]], None])
    colours = {colour for _, colour in image.getcolors(9999)}
    assert {(40, 220, 90), (255, 70, 60), (255, 200, 40)} <= colours


@pytest.mark.parametrize(
    "boxes, words",
    [
        ("x", "field 'boxes' must be a list of up to 100 boxes, not 'x'"),
        ([[1, 2, 3]], r"field 'boxes\[0\]' must be four finite numbers"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], r"field 'boxes\[1\]' \[1, 2, 3, 4\] is there twice"),
        ([[1, 2, 3, 4], [9, 2, 3, 4]], r"field 'boxes\[1\]' \[9, 2, 3, 4\] is an empty or inverted box"),
        ([[1, 2, 3, 44]], r"field 'boxes\[0\]' \[1, 2, 3, 44\] reaches outside the 30x40 image"),
        ([[i / 100, 0, 3, 4] for i in range(101)], "field 'boxes' must be a list of up to 100 boxes"),
    ],
)
def test_a_record_that_is_wrong_is_one_sentence(boxes, words, tmp_path):
    with pytest.raises(InputError, match=f"train.jsonl:1: {words}"):
        read_records(tmp_path, RECORD | {"boxes": boxes})


def test_long_answers_take_little_time():
    started = time.process_time()
    for junk in ("[1,2,3,4]" * 20_000, "[" * 100_000, "(1,2)" * 20_000, "none " * 20_000, "[[1,2,3,4]," * 9_000):
        assert parse_boxes(junk)[0] is None
    original = Original(Sample(None, "", None, "d", "boxes"), boxes_of(np.random.default_rng(0), MOST))
    many = json.dumps(boxes_of(np.random.default_rng(1), MOST))
    assert TASK.score([many], [original]).valid.all()
    assert f1([], 0, 0, 0.5) == 1.0 and torch.get_num_threads() >= 1
    assert time.process_time() - started < 20
