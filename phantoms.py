"""Synthetic dermoscopy, X-ray and ultrasound images, each with one lesion, its exact mask and its exact box.

They stand in for a dataset that nobody can ship: drawn on the fly, without a download, and the ground truth is exact
by construction. The box is drawn FIRST (size, position), then a wobbly outline is stretched to fill it, so nothing is
rejected and boxes are spread as written here. The lesion always stands out from what surrounds it, by a varied amount.

What this leaves out: anatomy. The pictures follow the look of each modality (pigment and hair; a hollow shaft seen in
projection; speckle under a transducer), not a body, and no number measured on them says anything about patients.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from errors import InputError

KINDS = ("dermoscopy", "xray", "ultrasound")
QUERIES = {"dermoscopy": "the skin lesion", "xray": "the bone fragment", "ultrasound": "the nodule"}
# Datasets of unequal difficulty, for mixtures: a coarse box is nearly right where the nodule fills the picture, and far
# off where it is small. name -> kind, smallest and largest share of a side.
SIZED = {"easy": ("ultrasound", 0.55, 0.9), "hard": ("ultrasound", 0.08, 0.16)}
QUERIES |= {name: QUERIES[kind] for name, (kind, *_) in SIZED.items()}

SMALLEST, LARGEST = 0.12, 0.55  # lesion width and height, as shares of the image's width and height
ELONGATION = 2.0  # the two shares differ by at most this factor, so that no lesion is a sliver
BORDER = 2  # pixels of background that are left on every side
MIN_SIDE = 28  # pixels: one merged token of Qwen2.5-VL; below this there is nothing to localise
ORDERS = np.arange(2, 6)  # angular frequencies of the wobble; order 1 would only shift the outline
SMOOTH = np.zeros(0, complex)  # no frequencies beyond these
BROWN = (0.62, 0.48, 0.42)  # of the light, what pigment lets pass: blue is taken most


class Phantom(NamedTuple):
    """One image and its ground truth, all in the pixels of that image."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    box: tuple[int, int, int, int]  # (x1, y1, x2, y2), half-open: x2 is the last lesion column + 1
    mask: np.ndarray  # (H, W) bool, the lesion; the box is its extent


def phantom(kind: str, seed: int, index: int, size: int | tuple[int, int] = 140) -> Phantom:
    """Draw image number `index` of the endless series (kind, seed); the same arguments give the same arrays.

    size: pixels, one int for a square or (width, height). InputError on an unknown kind, a side below 28 pixels or a
    negative seed or index.
    """
    if kind not in QUERIES:
        raise InputError(f"unknown phantom kind {kind!r}: use one of {', '.join(QUERIES)}")
    width, height = (size, size) if isinstance(size, int) else size
    check_size(width, height)
    if min(seed, index) < 0:
        raise InputError(f"phantom seed {seed} and index {index} must not be negative")
    # A flat [seed, index, kind] would run the 32-bit words of large numbers into each other; the spawn key keeps them
    # apart: SeedSequence pads the seed to a fixed length before it.
    number = KINDS.index(kind) if kind in KINDS else 100 + list(SIZED).index(kind)
    key = np.random.SeedSequence(seed, spawn_key=(index, number))
    rng = np.random.Generator(np.random.PCG64(key))

    kind, *sizes = SIZED.get(kind, (kind, SMALLEST, LARGEST))
    target = draw_box(rng, width, height, *sizes)
    alpha = lesion(rng, width, height, target)
    mask = alpha >= 0.5
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    # Measured, not `target`: a pointed outline can end between two pixel centres.
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Phantom(rgb(PAINTERS[kind](rng, alpha, box)), box, mask)


def check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise InputError(f"phantom size {width}x{height} is too small: each side needs at least {MIN_SIDE} pixels")


def rgb(planes: np.ndarray) -> np.ndarray:
    """What a painter made, (H, W) grey or (3, H, W) colour, float32, as a picture: (H, W, 3) uint8."""
    planes = np.clip(planes + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.stack(np.broadcast_to(planes, (3, *planes.shape[-2:])), axis=-1)


def draw_box(
    rng: np.random.Generator, width: int, height: int, smallest: float = SMALLEST, largest: float = LARGEST
) -> tuple[int, int, int, int]:
    """A box of admissible size anywhere in the image."""
    share_w = rng.uniform(smallest, largest)
    share_h = rng.uniform(max(smallest, share_w / ELONGATION), min(largest, share_w * ELONGATION))
    w, h = round(share_w * width), round(share_h * height)
    x1 = int(rng.integers(BORDER, width - BORDER - w, endpoint=True))
    y1 = int(rng.integers(BORDER, height - BORDER - h, endpoint=True))
    return x1, y1, x1 + w, y1 + h


def lesion(
    rng: np.random.Generator, width: int, height: int, box: tuple[int, int, int, int], fray: np.ndarray = SMOOTH
) -> np.ndarray:
    """Opacity (H, W) of a star-shaped blob that fills the box: 0.5 on its outline, soft across it. fray: complex
    amplitudes of the angular frequencies behind ORDERS, shares of the radius; their sizes must sum below 0.5."""
    tilt = np.exp(1j * rng.uniform(0, np.pi))
    flatness = rng.uniform(0.6, 1.0)
    phases = np.exp(1j * rng.uniform(0, 2 * np.pi, len(ORDERS)))
    coefficients = phases * rng.uniform(0.0, 0.35, len(ORDERS)) / ORDERS  # sums below 0.45: the radius stays positive
    coefficients = np.concatenate((coefficients, fray))
    softness = max(1.0, rng.uniform(1.0, 4.0) * min(width, height) / 140)  # pixels from opacity 0 to 1

    def radius(u: np.ndarray) -> np.ndarray:
        """Outline radius in the direction of the unit complex number u: an ellipse times 1 + sum a_k cos(k t + p_k)."""
        turned = u * u.dtype.type(tilt)
        series, power = np.ones_like(u.real), u
        for coefficient in coefficients:
            power = power * u
            series += (power * u.dtype.type(coefficient)).real
        return series / np.sqrt(turned.real**2 + turned.imag**2 / np.float32(flatness**2))

    around = np.exp(1j * np.linspace(0, 2 * np.pi, 512, endpoint=False))
    outline = around * radius(around)
    x1, y1, x2, y2 = box
    scale_x, scale_y = (x2 - x1) / np.ptp(outline.real), (y2 - y1) / np.ptp(outline.imag)
    # Only the box and its soft rim are worth computing: further out the opacity is 0.
    rim = int(np.ceil(softness / 2))
    left, right, top, bottom = max(0, x1 - rim), min(width, x2 + rim), max(0, y1 - rim), min(height, y2 + rim)
    # Pixels from the star's centre to each pixel's centre: (w,) and (h, 1).
    dx = (np.arange(left, right) + 0.5 - x1 + scale_x * outline.real.min()).astype(np.float32)
    dy = (np.arange(top, bottom) + 0.5 - y1 + scale_y * outline.imag.min()).astype(np.float32)[:, None]
    z = dx / np.float32(scale_x) + 1j * (dy / np.float32(scale_y))  # (h, w) complex64, in the outline's own frame
    distance = np.abs(z) + np.float32(1e-6)
    inside = (radius(z / distance) / distance - 1) * np.hypot(dx, dy)  # pixels to the outline along the ray
    ramp = np.clip(0.5 + inside / np.float32(softness), 0, 1)
    alpha = np.zeros((height, width), np.float32)
    alpha[top:bottom, left:right] = ramp * ramp * (3 - 2 * ramp)  # smoothstep keeps 0.5 where it was
    return alpha


def _dermoscopy(
    rng: np.random.Generator, alpha: np.ndarray, box: tuple[int, int, int, int], colour: tuple = BROWN
) -> np.ndarray:
    """Skin of any tone, a variegated lesion (brown), sometimes a vignette, a few hairs and freckles."""
    height, width = alpha.shape
    pale, dark = np.array([236, 196, 178]), np.array([146, 100, 76])
    skin = (pale + rng.uniform(0, 1) * (dark - pale) + rng.normal(0, 6, 3)).astype(np.float32)
    pigment = np.array(colour, np.float32) * np.float32(rng.uniform(0.6, 1.2))
    fine = texture(rng, alpha.shape, 40)  # pores of the skin, network of the lesion
    shade = 1 + 0.03 * texture(rng, alpha.shape, 4) + 0.03 * fine
    patches = 0.16 * texture(rng, alpha.shape, 14) + 0.07 * fine
    if rng.random() < 0.5:
        x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        shade *= 1 - np.float32(rng.uniform(0.1, 0.28)) * (x * x + y * y)
    # Hairs and freckles are strokes of one mask at twice the resolution: how much light they take, 0 to 255.
    strokes = Image.new("L", (2 * width, 2 * height))
    draw, unit = ImageDraw.Draw(strokes), 2 * min(width, height) / 140
    for _ in range(rng.integers(0, 7)):
        r, x, y = unit * rng.uniform(0.8, 2.2), 2 * width * rng.random(), 2 * height * rng.random()
        draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(30, 80)))
    for _ in range(rng.integers(0, 5)):
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * (2 * width, 2 * height)
        t = np.linspace(0, 1, 16)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * (0.8 * (start + end) / 2 + 0.2 * bend) + t**2 * end
        draw.line(curve.ravel().tolist(), fill=int(rng.integers(90, 170)), width=max(1, round(0.8 * unit)))
    shade *= 1 - np.asarray(strokes.reduce(2), np.float32) / 255
    # Outside the lesion light passes (1), inside it each channel keeps its pigment's share, more or less by patch.
    keep = 1 - alpha * (1 - pigment[:, None, None] * np.clip(1 + patches, 0.5, 1.4))  # (3, H, W)
    return skin[:, None, None] * keep * shade


def _xray(rng: np.random.Generator, alpha: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A long bone in soft tissue, and beside or across it a fragment brighter than the shaft."""
    height, width = alpha.shape
    side, (x1, y1, x2, y2) = min(width, height), box
    angle, bow = rng.uniform(0, np.pi), rng.uniform(-0.15, 0.15)
    half = rng.uniform(0.07, 0.14)  # half width of the shaft, as a share of the side, like all lengths below
    miss = rng.uniform(-0.9, 0.9) * (half + 0.5 * min(x2 - x1, y2 - y1) / side)  # of the axis past the lesion's centre
    x = ((np.arange(width) + 0.5 - (x1 + x2) / 2) / side).astype(np.float32)
    y = ((np.arange(height) + 0.5 - (y1 + y2) / 2) / side).astype(np.float32)[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = cos * x + sin * y, cos * y - sin * x  # (H, W)
    middle = np.float32(rng.uniform(-0.4, 0.4))  # where the shaft is thinnest
    flare = (1 + np.float32(rng.uniform(0.2, 0.9)) * (along - middle) ** 2) * np.float32(half)
    s = ((across - np.float32(miss) - np.float32(bow) * along**2) / flare) ** 2
    # A ray crosses a cylinder along a chord: wall minus marrow gives the two bright lines of the cortex by itself.
    marrow = np.float32(rng.uniform(0.6, 0.75))
    bone = np.sqrt(np.maximum(1 - s, 0)) - np.float32(0.75) * np.sqrt(np.maximum(marrow**2 - s, 0))
    tissue = np.sqrt(np.maximum(1 - s / np.float32(rng.uniform(5, 14)), 0))
    coarse, fine = texture(rng, alpha.shape, 6), texture(rng, alpha.shape, 40)
    grey = rng.uniform(8, 24) + tissue * (rng.uniform(28, 48) + 4 * coarse) + bone * (rng.uniform(80, 125) + 7 * fine)
    fragment = rng.uniform(185, 225) + 8 * coarse + 9 * fine + 18 * (1 - alpha)  # its own cortex: brighter at the edge
    grey += alpha * (fragment - grey)
    grey += rng.uniform(1.5, 5) * rng.standard_normal(alpha.shape, np.float32)
    return grey


def _ultrasound(rng: np.random.Generator, alpha: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Layered tissue in speckle, a hypoechoic nodule, brighter echoes behind it."""
    height, width = alpha.shape
    x, depth = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(0, 1, height, dtype=np.float32)[:, None]
    layers = texture(rng, alpha.shape, (3, int(rng.integers(9, 16))))  # few columns, many rows: wavy bands
    echo = np.float32(rng.uniform(95, 140)) * np.exp(0.16 * layers + 0.08 * texture(rng, alpha.shape, 8))
    # Sector: the beam spreads and fades with depth and to the sides, the more the deeper.
    echo *= 1 - np.float32(rng.uniform(0, 0.35)) * depth - np.float32(rng.uniform(0, 0.35)) * x * x * (0.4 + depth)
    echo *= 1 + np.float32(rng.uniform(0.2, 0.7)) * np.exp(-(((depth - 0.02) / 0.025) ** 2))  # the skin line
    # Fluid attenuates less: what lies behind the nodule is brighter in proportion to the path through it.
    path = np.cumsum(alpha, axis=0, dtype=np.float32) / (box[3] - box[1])
    echo *= 1 + np.float32(rng.uniform(0, 0.4)) * path * (1 - alpha)
    echo *= 1 - alpha * np.float32(rng.uniform(0.6, 0.85))
    # Fully developed speckle is the magnitude of a complex Gaussian field (Rayleigh), its grains wider than high; the
    # power below 1 stands for the scanner's log compression. Resizing keeps the mean near 1.
    pixel = max(1.0, min(width, height) / 140)
    grain = (int(width / pixel / rng.uniform(1.6, 2.6)), int(height / pixel / rng.uniform(1.0, 1.5)))
    speckle = (texture(rng, alpha.shape, grain) ** 2 + texture(rng, alpha.shape, grain) ** 2) ** np.float32(0.3)
    return echo * speckle + 4


def texture(rng: np.random.Generator, shape: tuple[int, int], cells: int | tuple[int, int]) -> np.ndarray:
    """Smooth noise (H, W) of about unit variance: a small grid (columns, rows) of normals, resized bicubically."""
    columns, rows = (cells, cells) if isinstance(cells, int) else cells
    grid = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(grid.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


PAINTERS = {"dermoscopy": _dermoscopy, "xray": _xray, "ultrasound": _ultrasound}
