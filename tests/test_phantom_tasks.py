"""Phantoms that ask for more than a box: repeatable, balanced, as hard as they say, no question tells its answer."""

import hashlib
import json
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

import data
import phantom_tasks
from data import load_samples, phantom_samples
from errors import InputError
from images import ImageConfig, load
from knowledge import Knowledge
from phantom_tasks import (
    CLASSES,
    COLOURS,
    GRADES,
    KINDS,
    MARGIN,
    MOST_LESIONS,
    NAMES,
    SIZES,
    SPREAD,
    ceiling,
    picture,
    record,
    severity,
)
from phantoms import phantom
from prepare.boxes import components
from runtime.readers import Readers
from tasks import TASKS
from weights import NANO

CHOICES = ("grades", "classes", "kinds", "named")  # those that ask for one of several labels
kinds = pytest.mark.parametrize("kind", KINDS)
choices = pytest.mark.parametrize("kind", CHOICES)
N = 3000


@kinds
def test_the_same_arguments_give_the_same_record_and_picture_and_others_give_others(kind):
    words = 2**32
    keys = [(0, 0), (0, 1), (1, 0), (5, 7), (5 + words, 7), (5, 7 + words), (5, 1 + 7 * words), (0, data.TEST_START)]
    for key in keys[:3]:
        for size in (28, 140):
            image = picture(kind, *key, size)
            assert image.shape == (size, size, 3) and image.dtype == np.uint8
            assert np.array_equal(image, picture(kind, *key, size)) and record(kind, *key) == record(kind, *key)
    assert len({picture(kind, *key, 56).tobytes() for key in keys}) == len(keys)
    assert json.loads(json.dumps(record(kind, 3, 4))) == record(kind, 3, 4)  # as a line of a file would say it


def test_pictures_and_records_do_not_drift_between_versions():
    """A committed policy and its scores belong to these."""
    told = {kind: json.dumps([record(kind, 7, index) for index in range(20)], sort_keys=True) for kind in KINDS}
    hashes = [hashlib.sha256(words.encode()).hexdigest()[:8] for words in told.values()]
    assert hashes == ["55ebdac2", "7fe2ce7a", "9c712939", "18244373", "426f1687", "6832f3be"]
    means = [picture(kind, 7, 123).mean() for kind in KINDS]
    expected = [91.75, 196.06, 150.3, 136.43, 182.68, 138.34]
    assert np.abs(np.subtract(means, expected)).max() < 0.5  # rounding is the platform's


@choices
def test_labels_are_balanced(kind):
    labels = Counter(record(kind, 0, index)["label"] for index in range(N))
    many = {"grades": GRADES, "kinds": 3}.get(kind, len(CLASSES))
    assert len(labels) == many and max(abs(count - N / many) for count in labels.values()) < 5 * (N / many) ** 0.5


def test_the_ceiling_of_grades_is_what_the_best_reader_of_severities_has():
    """By formula; by the exact posterior on a fine grid of severities; and by draws. It is about .8, as meant."""
    grid = np.linspace(-4, GRADES + 3, 20_001)
    density = np.array([[NormalDist(grade, SPREAD).pdf(x) for x in grid] for grade in range(GRADES)]) / GRADES
    exact = density.max(0).sum() * (grid[1] - grid[0])
    assert abs(ceiling() - exact) < 1e-3 and 0.78 < ceiling() < 0.82
    hits = [round(min(max(severity(0, i), 0), GRADES - 1)) == record("grades", 0, i)["label"] for i in range(N)]
    assert abs(np.mean(hits) - ceiling()) < 4 * (0.16 / N) ** 0.5


def test_a_severity_is_seen_in_the_picture():
    """Specks become more with it: in a dark nodule, the share of what is bright in a picture too coarse for speckle."""
    order = sorted(range(60), key=lambda i: severity(1, i))
    bright = []
    for i in order:
        grey = np.asarray(Image.fromarray(picture("grades", 1, i)).convert("L").reduce(2), float)
        around = np.lib.stride_tricks.sliding_window_view(np.pad(grey, 4, "edge"), (9, 9)).mean((2, 3))
        bright.append(((grey > around + 60) & (around < 90)).sum() / (around < 90).sum())
    assert np.corrcoef(bright, [severity(1, i) for i in order])[0, 1] > 0.4


def test_every_class_is_told_from_the_others_by_colour_and_size():
    """By the channels of its colour, and by its share of the picture."""
    seen = {}
    for index in range(60):
        asked = record("classes", 4, index)
        image = np.asarray(Image.fromarray(picture("classes", 4, index)).reduce(3), float)  # hairs are too fine for it
        lesion = image.mean(2) < np.median(image.mean(2)) - 25
        inside = image[lesion].mean(0)
        features = inside[0] / inside[2], inside[1] / inside[2], lesion.mean()
        seen.setdefault(tuple(asked["knowledge"][asked["label"]].split()), []).append(features)
    assert seen.keys() == set(CLASSES)
    mean = {look: np.mean(values, axis=0) for look, values in seen.items()}
    for size in SIZES:
        red, brown, blue = (mean[size, colour] for colour in ("red", "brown", "blue"))
        assert blue[0] + 0.3 < brown[0] < red[0] and red[1] < brown[1]
    for colour in COLOURS:
        small, large = ([share for *_, share in seen[size, colour]] for size in ("small", "large"))
        assert np.median(large) > 2 * np.median(small)


def test_nothing_that_is_asked_tells_the_answer():
    """Neither the question, nor the options, nor the block: all records ask the same but for the block, the label is
    independent of where each look stands in it, and records of one block have different labels."""
    blocks = {}
    for kind in KINDS:
        asked = [record(kind, 0, index) for index in range(N)]
        hidden = "label", "boxes", "knowledge", "references"
        shown = {json.dumps({k: v for k, v in r.items() if k not in hidden}) for r in asked}
        assert len(shown) == 1  # one question for all
    asked = [record("classes", 0, index) for index in range(N)]
    for r in asked:
        assert sorted(r["knowledge"].values()) == sorted(" ".join(look) for look in CLASSES)
        blocks.setdefault(tuple(r["knowledge"].values()), []).append(r["label"])
    assert len(blocks) > 650  # of 720 permutations
    repeated = [labels for labels in blocks.values() if len(labels) > 3]
    assert np.mean([len(set(labels)) > 1 for labels in repeated]) > 0.9
    for look in map(" ".join, CLASSES):
        letters = [next(name for name, line in r["knowledge"].items() if line == look) for r in asked]
        pairs = Counter(zip(letters, (r["label"] for r in asked), strict=True))
        table = np.array([[pairs[x, y] for y in NAMES] for x in NAMES])
        expected = table.sum(1, keepdims=True) * table.sum(0) / N
        assert ((table - expected) ** 2 / expected).sum() < 60  # chi-squared of 25 degrees of freedom: p = 1e-4
    for name in NAMES:  # nor does the look that a class had in another record
        looks = Counter(r["knowledge"][name] for r in asked if r["label"] == name)
        assert len(looks) == 6 and max(looks.values()) < 0.27 * sum(looks.values())


def test_several_lesions_are_where_their_record_says_and_nowhere_else(monkeypatch):
    """The parts of what is drawn have exactly the record's boxes; they are dark in the picture, and lie apart."""
    counts = Counter()
    for index in range(N):
        boxes = np.array(record("several", 0, index)["boxes"]).reshape(-1, 4)
        counts[len(boxes)] += 1
        assert (boxes[:, :2] >= 2).all() and (boxes[:, 2:] <= 138).all()
        for i, (a, b, c, d) in enumerate(boxes):
            assert all(max(x1 - c, a - x2, y1 - d, b - y2) >= MARGIN * 140 for x1, y1, x2, y2 in boxes[:i])
    assert counts.keys() == set(range(MOST_LESIONS + 1))
    assert max(abs(count - N / 5) for count in counts.values()) < 5 * (N / 5) ** 0.5  # a fifth has none
    for index in range(40):
        grey = np.asarray(Image.fromarray(picture("several", 3, index)).convert("L"), float)
        boxes, skin = record("several", 3, index)["boxes"], np.ones_like(grey, bool)
        for x1, y1, x2, y2 in boxes:
            skin[y1:y2, x1:x2] = False
        for x1, y1, x2, y2 in boxes:
            w, h = (x2 - x1) // 4, (y2 - y1) // 4
            assert np.median(grey[y1 + h : y2 - h, x1 + w : x2 - w]) < 0.85 * np.median(grey[skin])
        assert np.quantile(grey[skin], 0.02) > 0.5 * np.median(grey[skin])  # but for hairs there is nothing dark
    monkeypatch.setitem(phantom_tasks.PAINTERS, "dermoscopy", lambda rng, alpha, box: 255 * alpha)
    for size in (28, 56, 140):
        for index in range(60):
            parts, _ = components(picture("several", 3, index, size)[..., 0] >= 128)  # 127.5 is the outline
            assert sorted(parts.tolist()) == sorted(record("several", 3, index, size)["boxes"])


def test_the_query_is_a_function_of_the_block_alone():
    """Of a sample as it is asked, with its knowledge: another answer to the same record asks the same."""
    for kind in CHOICES:
        for sample in phantom_samples(kind, 0, 0, 20, tasks=TASKS):
            task, question = TASKS[sample.task], sample.query.partition("\n")[0]
            for number, option in enumerate(sample.target.options):
                other = type(sample.target)(number if kind == "grades" else option, sample.target.options)
                assert task.phrase(question, other) == sample.query
    told = load_samples("phantoms:classes", TASKS, 0, "test", knowledge=Knowledge("records"))[:50]
    for sample in told:
        lines = sample.extra["knowledge"]
        assert sample.knowledge == "Knowledge:\n" + "\n".join(f"{name}: {lines[name]}" for name in NAMES)
        assert sample.query == f"what is the lesion?\nOptions: A, B, C, D, E, F.\n{sample.knowledge}"


@kinds
def test_as_data_they_have_a_held_out_series_and_targets_that_no_picture_is_needed_for(kind):
    train, test = (load_samples(f"phantoms:{kind}", TASKS, 3, split) for split in ("train", "test"))
    again = load_samples(f"phantoms:{kind}", TASKS, 9, "test")
    assert test == again and len(train) == data.TRAIN_PHANTOMS and len(test) == data.TEST_PHANTOMS
    assert not {s.media.index for s in train} & {s.media.index for s in test}
    asked = record(kind, 0, data.TEST_START)
    assert {s.dataset for s in train} == {f"phantoms-{kind}"} and {s.task for s in train} == {asked["task"]}
    image, target = load(test[0])
    assert image.size == (140, 140) and target == test[0].target
    told = list(map(list, target)) if "boxes" in asked else target[0]
    assert told == asked.get("label", asked.get("boxes", tuple(asked.get("references", ()))))
    assert np.array_equal(np.asarray(image), picture(kind, 0, data.TEST_START))


def test_a_named_class_has_the_same_look_in_every_record():
    asked = [record("named", 1, index) for index in range(50)]
    assert len({json.dumps(r["knowledge"]) for r in asked}) == 1 and len({r["label"] for r in asked}) == 6
    assert asked[0]["knowledge"] == {name: " ".join(look) for name, look in zip(NAMES, CLASSES, strict=True)}
    assert asked[0].keys() == record("classes", 1, 0).keys()


def test_a_modality_is_the_one_of_its_picture():
    for index in range(12):
        assert np.array_equal(picture("kinds", 2, index), phantom(record("kinds", 2, index)["label"], 2, index).image)


def test_targets_do_not_travel_to_the_processes_that_draw():
    """They are of classes in a task's module, which has torch with it: one that cannot be sent at all comes back."""
    samples = phantom_samples("grades", 0, 0, 3, tasks=TASKS)
    lonely = type("Lonely", (), {"__reduce__": lambda self: 1 / 0})()
    samples = [data.dataclasses.replace(sample, target=lonely, extra={"x": lonely}) for sample in samples]
    config = ImageConfig.from_folder(NANO)
    with Readers(1) as readers:
        views = dict(readers.read(range(3), samples, config, ahead=1))
    here = dict(Readers(0).read(range(3), samples, config, ahead=1))
    assert all(views[i].target is lonely and np.array_equal(views[i].patches, here[i].patches) for i in range(3))


def test_bad_arguments_are_named():
    for call, word in [
        (lambda: record("mri", 0, 0), "grades, classes, kinds, named, several"),
        (lambda: picture("grades", 0, 0, 27), "27x27"),
        (lambda: picture("classes", -1, 0), "seed -1"),
        (lambda: record("kinds", 0, -2), "index -2"),
        (lambda: load_samples("phantoms:mri", TASKS, 0, "test"), "dermoscopy.*grades, classes, kinds, named, several"),
    ]:
        with pytest.raises(InputError, match=word):
            call()
    assert phantom_tasks.KINDS == KINDS
