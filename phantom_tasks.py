"""Phantoms that ask for something else than one box: a grade, a class that only its knowledge block explains, a
modality, all lesions that there are.

    grades    ultrasound: how suspicious is the nodule, 0 to 4? It grows, its outline frays and bright specks in it
              become more with a severity that is its grade and noise: the best possible accuracy is ceiling(), not 1.
    classes   dermoscopy: six classes, size x colour. Their names A to F say nothing and are dealt anew in EVERY
              record, and the record's own field "knowledge" says which is which: without it nobody beats 1/6.
    kinds     which of the three modalities is it? The easy one.
    named     classes whose names stay as they are: what a block says of them can go into the weights.
    several   dermoscopy: the box of each of none to four lesions that lie apart, all five counts equally frequent.
    captions  dermoscopy: describe the lesion. A closed grammar, 48 sentences of five slots; what a slot says is a
              truth about the picture, so what judges and likenesses reward can be held against it.

A record is drawn first and its picture from it, by two streams of random numbers, so that all that is asked is known
before the picture is there, and nothing that is asked depends on the label.
"""

from statistics import NormalDist
from typing import Any

import numpy as np

import phantoms
from errors import InputError
from phantoms import PAINTERS, check_size, draw_box, lesion, phantom, rgb

KINDS = {
    "grades": 0,
    "classes": 1,
    "kinds": 2,
    "named": 3,
    "several": 3,
    "captions": 3,
}  # and which series of draws is theirs
GRADES = 5
SPREAD = 0.43  # std of a severity about its grade: neighbours overlap
GROWN = (0.12, 0.5)  # sides of the smallest and the largest nodule, as shares of the picture's
SPECKS = 2  # more of them a grade
SPECK = 1.5  # pixels, the std of a speck's blur
APART = 4.0  # pixels between two specks at least, so that they can be counted

SIZES = {"small": (0.14, 0.24), "large": (0.4, 0.55)}  # smallest and largest side, as shares of the picture's
COLOURS = {"brown": phantoms.BROWN, "red": (0.80, 0.34, 0.36), "blue": (0.40, 0.46, 0.62)}  # of light, what passes
CLASSES = tuple((size, colour) for size in SIZES for colour in COLOURS)
NAMES = tuple("ABCDEF")

MOST_LESIONS = 4
# Sides of each, as shares of the picture's. Three of the largest, each with a margin, leave room for a smallest one
# wherever they lie: 3 (.3 + .12 + 2 x .03)^2 < (1 - .12 - 2 x BORDER / 140)^2, so a place is always found.
LESION = (0.12, 0.3)
MARGIN = 0.03  # of the picture's side, at least so much skin between the boxes of two

EXTENTS = {"small": (0.2, 0.28), "large": (0.42, 0.54)}  # of captions: least and largest side, shares of the picture's
SLOTS = tuple(EXTENTS), ("round", "lobed"), tuple(COLOURS), ("upper", "lower"), ("left", "right")
SENTENCE = "a {} {} {} lesion in the {} {}"
CENTRE = (0.24, 0.4)  # least and largest share of the picture's side from its edge to a lesion's centre
LOBES, LOBED = 6, 0.36  # their number, and how much of the radius they are

FRAYING = np.arange(phantoms.ORDERS[-1] + 1, 13)  # angular frequencies of a frayed outline
FRAYED = FRAYING >= 8  # those that count: the lower ones would look like lobes
MOST = 0.45  # of the radius, the sum of their amplitudes at most: below 0.5 the outline stays one


def ceiling(grades: int = GRADES, spread: float = SPREAD) -> float:
    """The best accuracy that anybody can have who reads the severity from the picture without error. Grades are equally
    frequent and their noise is one normal distribution, so the most probable grade is the nearest one: inner grades are
    found where the noise stays below 1/2 on both sides, the two outer ones where it does on one."""
    below = NormalDist(0, spread).cdf(0.5)
    return ((grades - 2) * (2 * below - 1) + 2 * below) / grades


def record(kind: str, seed: int, index: int, size: int = 140) -> dict[str, Any]:
    """What a line of JSONL would say about number `index` of the series (kind, seed), but for its picture. size: the
    side of that, in pixels, of which boxes are."""
    check_size(size, size)
    return _drawn(kind, seed, index, size)[0]


def severity(seed: int, index: int) -> float:
    """What a picture of `grades` shows: its grade and normal noise."""
    return _drawn("grades", seed, index)[1]


def picture(kind: str, seed: int, index: int, size: int = 140) -> np.ndarray:
    """The picture (size, size, 3) uint8 RGB of that record; the same arguments give the same array. InputError as
    phantoms.phantom."""
    check_size(size, size)
    look, rng = _drawn(kind, seed, index, size)[1], _stream(kind, seed, index, 1)
    if kind == "several":
        alpha = np.max([np.zeros((size, size), np.float32), *(_filling(rng, size, box) for box in look)], axis=0)
        return rgb(PAINTERS["dermoscopy"](rng, alpha, (0, 0, size, size)))
    if kind == "kinds":
        return phantom(look, seed, index, size).image
    if kind in ("classes", "named"):
        extent, colour = look
        box = draw_box(rng, size, size, *SIZES[extent])
        alpha = lesion(rng, size, size, box)
        return rgb(PAINTERS["dermoscopy"](rng, alpha, box, COLOURS[colour]))
    if kind == "captions":
        extent, shape, colour, *where = look
        box = _box_there(rng, size, EXTENTS[extent], *where)
        fray = LOBED * (FRAYING == LOBES) * np.exp(1j * rng.uniform(0, 2 * np.pi)) * (shape == "lobed")
        alpha = lesion(rng, size, size, box, fray)
        return rgb(PAINTERS["dermoscopy"](rng, alpha, box, COLOURS[colour]))
    share = min(max((look + 1.5) / (GRADES + 2), 0.0), 1.0)  # 1.5 beyond either end lies 3 stds out
    side = GROWN[0] + (GROWN[1] - GROWN[0]) * share
    box = draw_box(rng, size, size, side, 1.1 * side)
    alpha = lesion(rng, size, size, box, _fray(rng, MOST * share))
    return rgb(_specked(rng, PAINTERS["ultrasound"](rng, alpha, box), alpha, round(SPECKS * (GRADES + 2) * share)))


def _drawn(kind: str, seed: int, index: int, size: int = 140) -> tuple[dict[str, Any], Any]:
    """A record, and what its picture shows."""
    rng = _stream(kind, seed, index, 0)
    if kind == "several":
        boxes = _apart(rng, int(rng.integers(MOST_LESIONS + 1)), size)
        return {"task": "boxes", "query": "skin lesion", "boxes": [list(box) for box in boxes]}, boxes
    if kind == "grades":
        grade = int(rng.integers(GRADES))
        asked = {"task": "grade", "query": "how suspicious is the nodule?", "grades": GRADES, "label": grade}
        return asked, grade + SPREAD * rng.standard_normal()
    if kind in ("classes", "named"):
        dealt = [CLASSES[i] for i in rng.permutation(len(CLASSES))] if kind == "classes" else CLASSES
        true = int(rng.integers(len(CLASSES)))
        lines = {name: " ".join(look) for name, look in zip(NAMES, dealt, strict=True)}
        asked = {"task": "label", "query": "what is the lesion?", "options": list(NAMES), "label": NAMES[true]}
        return asked | {"knowledge": lines}, dealt[true]
    if kind == "captions":
        said = [options[rng.integers(len(options))] for options in SLOTS]
        asked = {"task": "caption", "query": "describe the lesion", "references": [SENTENCE.format(*said)]}
        return asked | {"slots": [list(options) for options in SLOTS]}, said
    modality = phantoms.KINDS[rng.integers(len(phantoms.KINDS))]
    asked = {"task": "label", "query": "what kind of picture is this?", "options": list(phantoms.KINDS)}
    return asked | {"label": modality}, modality


def _stream(kind: str, seed: int, index: int, part: int) -> np.random.Generator:
    """part 0: of the record, 1: of its picture."""
    if kind not in KINDS:
        raise InputError(f"unknown phantom task {kind!r}: use one of {', '.join(KINDS)}")
    if min(seed, index) < 0:
        raise InputError(f"phantom seed {seed} and index {index} must not be negative")
    key = np.random.SeedSequence(seed, spawn_key=(index, len(phantoms.KINDS) + KINDS[kind], part))
    return np.random.Generator(np.random.PCG64(key))


def _apart(rng: np.random.Generator, count: int, size: int) -> list[tuple[int, int, int, int]]:
    """`count` boxes of lesions that lie apart, in a picture of that side."""
    boxes, margin = [], MARGIN * size
    while len(boxes) < count:
        x1, y1, x2, y2 = box = draw_box(rng, size, size, *LESION)
        if all(c + margin <= x1 or x2 + margin <= a or d + margin <= y1 or y2 + margin <= b for a, b, c, d in boxes):
            boxes.append(box)
    return boxes


def _filling(rng: np.random.Generator, size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Opacity (size, size) of a lesion whose extent is the box. An outline whose tip ends between two pixel centres
    gives way to the next: one in 1,500 at 28 pixels, none seen at 140."""
    while True:
        alpha = lesion(rng, size, size, box)
        columns, rows = np.flatnonzero((alpha >= 0.5).any(0)), np.flatnonzero((alpha >= 0.5).any(1))
        if len(columns) and (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == box:
            return alpha


def _box_there(
    rng: np.random.Generator, size: int, extent: tuple[float, float], vertical: str, horizontal: str
) -> tuple[int, int, int, int]:
    """A box with its centre well inside one quarter of the picture."""
    sides = rng.uniform(*extent, 2)
    centres = [rng.uniform(max(CENTRE[0], side / 2 + 0.02), CENTRE[1]) for side in sides]
    for i, far in enumerate((horizontal == "right", vertical == "lower")):
        centres[i] = 1 - centres[i] if far else centres[i]
    (x, y), (w, h) = centres, sides
    return tuple(round(size * edge) for edge in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))


def _fray(rng: np.random.Generator, most: float) -> np.ndarray:
    """Amplitudes for phantoms.lesion, whose sizes sum to `most`."""
    phases = np.exp(1j * rng.uniform(0, 2 * np.pi, len(FRAYING)))
    sizes = rng.uniform(0.6, 1.0, len(FRAYING)) * FRAYED
    return most * phases * sizes / sizes.sum()


def _specked(rng: np.random.Generator, grey: np.ndarray, alpha: np.ndarray, count: int) -> np.ndarray:
    """With `count` bright specks inside the lesion, fewer only where no more fit: microcalcifications."""
    height, width = grey.shape
    unit = min(height, width) / 140
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    free, light = alpha > 0.9, np.zeros_like(grey)
    for _ in range(count):
        rows, columns = np.nonzero(free)
        if not len(rows):
            break
        at = int(rng.integers(len(rows)))
        distance = (y - rows[at]) ** 2 + (x - columns[at]) ** 2
        free &= distance > (APART * unit) ** 2
        light = np.maximum(light, np.exp(-distance / np.float32(2 * (SPECK * unit) ** 2)))
    return grey + light * (225 - grey)
