"""Samples -> pictures: open, turn, convert, resize; or draw, where a sample is a phantom.

Without torch, so that a worker process (pipeline.py) starts in a tenth of a second. Pixels here are 8-bit RGB; data.py
normalises them and cuts them into patches. The two frames of a box are explained there.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from errors import InputError, cause_of, named, one_line
from phantoms import phantom

Box = tuple[float, float, float, float]

PIXEL_LIMIT = 89_478_485  # of --pixel-limit: Pillow's own, 256 MB as RGB
# What is opened, whatever a file's name says. Pillow would go by content and read forty more: for EPS it starts
# Ghostscript, with the file as its program, and decoders that nobody uses are the ones that nobody has attacked yet.
# JPEG has MPO in it, the several pictures in one file of many phones; PPM has PGM and PBM.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP")
MAX_ASPECT = 200  # Qwen's limit: beyond it one side would be a single token


@dataclass(frozen=True)
class PhantomImage:
    """Stands where a file's path would: the arguments of phantoms.phantom, drawn when the sample is loaded."""

    kind: str
    seed: int
    index: int
    size: int  # pixels, square


@dataclass(frozen=True)
class Sample:
    """One record. Pictures, and the boxes of phantoms, exist only after load(sample)."""

    image: Path | PhantomImage
    query: str
    box: Box | None  # original frame; None for a phantom, whose box is drawn with it: use load(sample) or Prompt.box
    dataset: str
    task: str = "ground"
    source: str = ""  # "train.jsonl:17", for messages
    size: tuple[int, int] | None = None  # (width, height) in the original frame, from the file's header; phantoms: None
    query_field: str = "query"  # where the record holds its query, for messages


@dataclass
class Picture:
    """A sample's picture as the policy sees it, and what is to be remembered of the original."""

    pixels: np.ndarray  # (h, w, 3) uint8 RGB, model frame
    size: tuple[int, int]  # (width, height) of the original frame
    box: Box  # original frame


def read_picture(sample: Sample, factor: int, min_pixels: int, max_pixels: int) -> Picture:
    """Load and resize; the three numbers are smart_resize's."""
    image, box = load(sample)
    with named(sample.source), named("field 'image'"):
        return Picture(resized(image, factor, min_pixels, max_pixels), image.size, box)


def load(sample: Sample) -> tuple[Image.Image, Box]:
    """The picture of a sample (RGB, as displayed) and its box in that picture's pixels: the original frame."""
    if isinstance(sample.image, PhantomImage):
        p = sample.image
        drawn = phantom(p.kind, p.seed, p.index, p.size)
        return Image.fromarray(drawn.image), tuple(map(float, drawn.box))
    with named(sample.source):
        image = open_image(sample.image)
        if sample.size not in (None, image.size):
            raise InputError(
                f"field 'image': {one_line(sample.image)} is {image.width}x{image.height} as displayed, but was "
                f"{sample.size[0]}x{sample.size[1]} when its record was read; leave pictures as they are during a run"
            )
    return image, sample.box


@contextmanager
def picture(path: Path) -> Iterator[Image.Image]:
    """The opened file; whatever PIL says about it inside becomes one sentence.

    Image.MAX_IMAGE_PIXELS is --pixel-limit, a guard against small files that unfold to more than the memory. PIL only
    warns up to twice that.
    """
    if not os.path.isfile(path):  # PIL would wait for ever at a pipe
        raise InputError(f"image {one_line(path)} is not a file; name a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                yield file
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
        raise InputError(f"image {one_line(path)} {limit}; scale it down, or let it in by --pixel-limit") from error
    except Exception as error:  # PIL's plugins raise all kinds on damaged files, down to NotImplementedError
        unknown = f"no picture format that is read here: {', '.join(FORMATS)}"
        why = unknown if isinstance(error, UnidentifiedImageError) else cause_of(error)
        raise InputError(f"image {one_line(path)} cannot be read ({why}); replace it") from error


def displayed_size(path: Path) -> tuple[int, int]:
    """(width, height) of the picture that open_image returns, from the file's header: no pixel is decoded."""
    return size_and_orientation(path)[0]


def size_and_orientation(path: Path, whole: bool = False) -> tuple[tuple[int, int], int]:
    """The displayed size and EXIF's orientation, 1 to 8 (1: displayed as stored; from 5 on: sides exchanged).

    whole: the pixels are decoded too, so that damage behind the header is found; a JPEG's to an eighth of its size,
    which is nearly as quick as its header alone.
    """
    with picture(path) as file:
        size = file.size
        if file.format == "PNG" and whole:
            file.load()
        elif file.format == "PNG":
            # EXIF may stand behind the pixels; step over them, since getexif() of PIL's PNGs would decode them.
            file.load_prepare()
            file.load_end()
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
        orientation = orientation if orientation in range(2, 9) else 1
        if whole:
            file.draft("L", (1, 1))
            file.load()
        # a TIFF's size is turned already
        return (size[::-1] if orientation > 4 and file.format != "TIFF" else size), orientation


def open_image(path: Path) -> Image.Image:
    """Open, rotate as its EXIF says, convert to 8-bit RGB. Of an animation or a stack, the first picture.

    More than 8 bits of gray (16-bit X-rays: modes I;16, I, F) are stretched from the picture's own minimum .. maximum
    to 0 .. 255: PIL's convert("RGB") would clip at 255 and return a white picture. Transparency is laid over white, as
    transformers and qwen-vl-utils do.
    """
    with picture(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode[0] in "IF":
        gray = np.asarray(image, np.float32)
        low, span = gray.min(), np.ptp(gray)
        if not np.isfinite(span):
            raise InputError(f"image {one_line(path)} has pixels that are not finite numbers; replace it")
        image = Image.fromarray(np.rint((gray - low) * (255 / (span or 1))).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """(height, width) that the model sees: multiples of factor, the aspect about kept, within the pixel budget.

    Qwen's rule to the letter. A side below factor becomes factor at least; for slivers that wins over max_pixels.
    InputError when one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"one side of a {width}x{height} image is more than {MAX_ASPECT} times the other; crop it")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def resized(image: Image.Image, factor: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """(h, w, 3) uint8 of an RGB image, the size as smart_resize says."""
    h, w = smart_resize(image.height, image.width, factor, min_pixels, max_pixels)
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
