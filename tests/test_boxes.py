"""Masks and runs of masks -> boxes: prepare/boxes.py and prepare/rle.py, against brute force and pycocotools' own."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BOX, SIZE, mask, refusal
from PIL import Image, ImageDraw

from prepare.boxes import components, mask_box
from prepare.rle import runs_box


def assert_parts(mask: np.ndarray) -> int:
    """Against labels that spread to all 8 neighbours until none changes: boxes and pixel counts, in reading order."""
    (h, w), label, found = mask.shape, np.arange(1, mask.size + 1).reshape(mask.shape) * mask, []
    for _ in range(mask.size):
        padded = np.pad(label, 1)
        label = np.max([padded[y : y + h, x : x + w] for y in range(3) for x in range(3)], 0) * mask
    for part in dict.fromkeys(label[mask].tolist()):
        ys, xs = np.nonzero(label == part)
        found.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, len(xs)])
    assert [[*box, n] for box, n in zip(*map(np.ndarray.tolist, components(mask)), strict=True)] == found
    return len(found)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_parts_and_the_box_of_runs_are_those_of_the_pixels(height, width, density, seed):
    mask = np.random.default_rng(seed).random((height, width)) < density
    assert_parts(mask)
    runs, last = [0], False  # column by column, zeros first
    for pixel in mask.T.reshape(-1):
        runs, last = ([*runs[:-1], runs[-1] + 1] if pixel == last else [*runs, 1]), pixel
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    want = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if mask.any() else (0, 0, 0, 0)
    assert runs_box({"counts": runs, "size": [height, width]}) == (want, (width, height))


def test_parts_of_shapes_that_are_easy_to_get_wrong():
    spiral = "######### ........# #######.# #.....#.# #.###.#.# #.#...#.# #.#####.# #.......# #########"
    comb, rows = "#.#.#.#.#.# " * 5 + "#" * 11, ".....# #..... ......"  # teeth meet in the last row; a row's end
    for drawn, count in ((spiral, 1), (comb, 1), (rows, 2), ("#... .#.. ..#. ...#", 1), ("....", 0), ("### ###", 1)):
        shape = np.array([list(row) for row in drawn.split()]) == "#"
        assert {assert_parts(turned) for turned in (shape, shape[::-1], shape.T, shape.T[::-1])} == {count}


def test_jpeg_masks_keep_their_box(tmp_path):
    """And the two readings that one finds elsewhere do not, or this test could not fail."""
    rng, moved, file = np.random.default_rng(0), [], tmp_path / "a.jpg"
    for _ in range(40):
        image, (w, h) = Image.new("L", (160, 120)), rng.integers(15, 60, 2)
        x, y = int(rng.integers(2, 160 - w - 2)), int(rng.integers(2, 120 - h - 2))
        ImageDraw.Draw(image).ellipse((x, y, x + int(w), y + int(h)), fill=255)
        image.save(file)
        want, gray = image.getbbox(), np.asarray(Image.open(file))
        assert mask_box(file, 127, "largest")[0] == mask_box(file, 127, "union")[0] == want
        moved.append([Image.fromarray(odd).getbbox() != want for odd in (gray, (gray / gray.max()).astype(np.uint8))])
    assert np.min(np.sum(moved, 0)) >= 4


def test_the_box_of_a_mask(tmp_path):
    large, file = (20, 10, 40, 30), tmp_path / "a.png"
    for choice, box in (("largest", large), ("union", (1, 1, 40, 30)), ("drop", None)):
        assert mask_box(mask(file, (1, 1, 3, 3), large), 127, choice) == (box, 2, SIZE)
        assert mask_box(mask(file, large), 127, choice) == (large, 1, SIZE)
    assert mask_box(mask(file, large, (44, 20, 64, 40)), 127, "largest")[0] == large  # the first of equal ones
    line = Image.open(mask(file, (45, 2, 55, 12)))
    ImageDraw.Draw(line).line((0, 0, 39, 39), fill=255)  # the largest by its box, not by its 40 pixels
    line.save(file)
    assert mask_box(file, 127, "largest") == ((45, 2, 55, 12), 2, SIZE)
    for box, mode, white in [((63, 47, 64, 48), "L", 255), ((0, 0, *SIZE), "1", 255), (BOX, "RGB", (255, 255, 255))]:
        assert mask_box(mask(file, box, mode=mode, value=white), 127, "largest")[0] == box  # half-open, to the last
    deep = np.zeros((48, 64), np.uint16)
    deep[8:28, 10:30], deep[0, 0] = 700, 600  # 8 bits hold neither
    Image.fromarray(deep).save(file)
    assert mask_box(file, 650, "largest")[0] == BOX
    palette = Image.open(mask(file, BOX, mode="P", value=1))
    palette.putpalette([0, 0, 0, 128, 0, 0])  # as PASCAL colours its first class
    palette.save(tmp_path / "palette.png")
    for gray, value in ((mask(file, BOX, value=127), 127), (tmp_path / "palette.png", 38)):
        assert f"its largest value is {value}, --threshold is 127; --threshold 0" in refusal(mask_box, gray, 127, "")
        assert mask_box(gray, 0, "largest")[0] == mask_box(gray, value - 1, "largest")[0] == BOX


def test_compressed_runs():
    """What pycocotools 2.0 writes for masks of 64x48, and the box that it finds."""
    for counts, box in {
        "X?d0l00000000000000000000000000000000000000hb1": BOX, "Pn0:V10Po1": (20, 0, 22, 10),
        "0PP3": (0, 0, 64, 48), "PP3": (0, 0, 0, 0), "`7P3`e2": (5, 0, 7, 48),
        "X`0;]_2": (10, 0, 12, 48),  # one run, from the foot of a column to the head of the next
        "Pa09U14M2N2N2N2N2O0O2O0O2O0O2O0000000000000000000000000001N101N101N101N2N2N2N2N3Lbd0": (11, 6, 50, 35),
    }.items():  # fmt: skip
        assert runs_box({"counts": counts, "size": [48, 64]}) == (box, SIZE)
