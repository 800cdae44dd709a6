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
from phantom_tasks import CLASSES, COLOURS, GRADES, KINDS, NAMES, SIZES, SPREAD, ceiling, picture, record, severity
from phantoms import phantom
from runtime.readers import Readers
from tasks import TASKS
from weights import NANO

OLD = KINDS[:3]  # captions: here as far as they are drawn, the rest in test_captions.py
kinds = pytest.mark.parametrize("kind", KINDS)
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
    told = json.dumps([record(kind, 7, index) for kind in OLD for index in range(20)], sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "08fab267cc901176"
    told = json.dumps([record("captions", 7, index) for index in range(20)], sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "6832f3be4ad6d19e"
    means = [picture(kind, 7, 123).mean() for kind in KINDS]
    assert (
        np.abs(np.subtract(means, [91.75, 196.06, 150.3, 138.34])).max() < 0.5
    )  # a pixel's rounding is the platform's


@kinds
def test_labels_are_balanced(kind):
    label = "references" if kind == "captions" else "label"
    labels = Counter(str(record(kind, 0, index)[label]) for index in range(N))
    many = {"grades": GRADES, "classes": len(CLASSES), "kinds": 3, "captions": 48}[kind]
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
        shown = {
            json.dumps({k: v for k, v in r.items() if k not in ("label", "knowledge", "references")}) for r in asked
        }
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


def test_the_query_is_a_function_of_the_block_alone():
    """Of a sample as it is asked, with its knowledge: another answer to the same record asks the same."""
    for kind in ("grades", "classes", "kinds"):
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
    assert {s.dataset for s in train} == {f"phantoms-{kind}"} and {s.task for s in train} <= {
        "label",
        "grade",
        "caption",
    }
    image, target = load(test[0])
    assert image.size == (140, 140) and target == test[0].target
    asked = record(kind, 0, data.TEST_START)
    assert target[0] == (asked["label"] if "label" in asked else tuple(asked["references"]))
    assert np.array_equal(np.asarray(image), picture(kind, 0, data.TEST_START))


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
        (lambda: record("mri", 0, 0), "grades, classes, kinds"),
        (lambda: picture("grades", 0, 0, 27), "27x27"),
        (lambda: picture("classes", -1, 0), "seed -1"),
        (lambda: record("kinds", 0, -2), "index -2"),
        (lambda: load_samples("phantoms:mri", TASKS, 0, "test"), "dermoscopy.*grades, classes, kinds"),
    ]:
        with pytest.raises(InputError, match=word):
            call()
    assert phantom_tasks.KINDS == KINDS
