"""Moving phantoms: clips of a lesion that drifts over skin, and lights up for a while.

    clips    when is it lit? A span of seconds. There are three rates (fps) and nothing else tells them apart: neither
             frames nor question say how fast a clip is, so only a policy that reads M-RoPE's time row can answer.
    tubes    where is it, at a few seconds? A box each.

A patch of Qwen2.5-VL is two frames in time. The lesion lights up and goes out, and is asked for, where patches begin:
whoever tells patches apart and knows the rate can answer exactly, so the grid's ceiling is 1; blind() is what is left
to one who does not know the rate. A record is drawn first and its frames from it, as in phantom_tasks.py.
"""

from typing import Any, NamedTuple

import numpy as np

import phantoms
from errors import InputError
from phantoms import BORDER, PAINTERS, lesion, rgb

KINDS = {"clips": "span", "tubes": "tube"}  # kind -> its task
QUERIES = {"clips": "when is the lesion lit?", "tubes": "the skin lesion"}
SIZE = 84  # pixels: nine tokens a patch
PATCHES = (4, 8)  # in time, two frames each: fewest and most
RATES = (0.5, 1.0, 2.0)  # frames per second
SIDES = (0.2, 0.4)  # of a lesion, as shares of the frame's
LIT = (2.2, 2.0, 1.2)  # of the light, what leaves it while it is lit; of a dark one phantoms.BROWN
STAMPS = 3  # seconds at which a tube has a box


class Drawn(NamedTuple):
    fps: float
    patches: int
    lit: tuple[int, int]  # patches, half-open
    box: tuple[int, int, int, int]  # where the lesion is drawn in the first frame
    moves: np.ndarray  # (frames, 2) int: columns and rows from there
    asked: tuple[int, ...]  # patches of a tube


def record(kind: str, seed: int, index: int) -> dict[str, Any]:
    """What a line of JSONL would say about number `index` of the series (kind, seed); for its frames, their number."""
    clip = _drawn(kind, seed, index)
    fields = {"task": KINDS[kind], "query": QUERIES[kind], "frames": 2 * clip.patches, "fps": clip.fps}
    if kind == "clips":
        return fields | {"segments": [[2 * patch / clip.fps for patch in clip.lit]]}
    mask = _shape(kind, seed, index, clip) >= 0.5
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))  # measured: an outline can end between pixels
    moved = {patch: box + np.tile(clip.moves[2 * patch], 2) for patch in clip.asked}
    return fields | {"tube": {f"{2 * patch / clip.fps:.1f}": there.tolist() for patch, there in moved.items()}}


def frames(kind: str, seed: int, index: int) -> list[np.ndarray]:
    """The frames (SIZE, SIZE, 3) uint8 RGB of that record; the same arguments give the same arrays."""
    clip = _drawn(kind, seed, index)
    nothing, all_of_it = np.zeros((SIZE, SIZE), np.float32), np.ones((SIZE, SIZE), np.float32)
    # Light passes skin, brown or lit pigment; each painted once, by the same draws, and mixed by the lesion's opacity.
    skin, brown, bright = (
        PAINTERS["dermoscopy"](_stream(kind, seed, index, 2), alpha, clip.box, colour)
        for alpha, colour in ((nothing, LIT), (all_of_it, phantoms.BROWN), (all_of_it, LIT))
    )
    made, shape = [], _shape(kind, seed, index, clip)
    for i, (right, down) in enumerate(clip.moves.tolist()):
        shown = bright if clip.lit[0] <= i // 2 < clip.lit[1] else brown
        made.append(rgb(skin + np.roll(shape, (down, right), (0, 1)) * (shown - skin)))  # it never reaches an edge
    return made


def blind(seed: int, count: int) -> float:
    """Mean temporal IoU over `count` clips of one who tells patches exactly and takes every rate for the middle one."""
    found = []
    for index in range(count):
        clip = _drawn("clips", seed, index)
        (start, end), ratio = clip.lit, clip.fps / RATES[1]
        inner = max(min(end, end * ratio) - max(start, start * ratio), 0.0)
        found.append(inner / ((end - start) * (1 + ratio) - inner))
    return float(np.mean(found))


def _drawn(kind: str, seed: int, index: int) -> Drawn:
    rng = _stream(kind, seed, index, 0)
    patches, fps = int(rng.integers(*PATCHES, endpoint=True)), float(rng.choice(RATES))
    start, end = sorted(rng.permutation(patches + 1)[:2].tolist())
    sides = np.rint(rng.uniform(*SIDES, 2) * SIZE)
    first, last = rng.uniform(BORDER, SIZE - BORDER - sides, (2, 2))  # left and upper edge
    at = np.rint(np.linspace(first, last, 2 * patches)).astype(int)
    asked = sorted(rng.permutation(patches)[:STAMPS].tolist())
    x, y, w, h = *at[0].tolist(), *sides.astype(int).tolist()
    return Drawn(fps, patches, (start, end), (x, y, x + w, y + h), at - at[0], tuple(asked))


def _shape(kind: str, seed: int, index: int, clip: Drawn) -> np.ndarray:
    """The lesion's opacity (SIZE, SIZE) in the first frame; it moves by whole pixels."""
    return lesion(_stream(kind, seed, index, 1), SIZE, SIZE, clip.box)


def _stream(kind: str, seed: int, index: int, part: int) -> np.random.Generator:
    """part 0: of the record, 1: of the lesion's shape, 2: of the colours."""
    if kind not in KINDS:
        raise InputError(f"unknown phantom clip {kind!r}: use one of {', '.join(KINDS)}")
    if min(seed, index) < 0:
        raise InputError(f"phantom seed {seed} and index {index} must not be negative")
    key = np.random.SeedSequence(seed, spawn_key=(index, 200 + list(KINDS).index(kind), part))
    return np.random.Generator(np.random.PCG64(key))
