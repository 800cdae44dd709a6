"""Samples -> pictures or clips -> patches: open, turn, convert, resize, normalise, cut; or draw, if it is a phantom.

Without torch, so that a worker process (runtime/readers.py) starts in a tenth of a second. The two frames of a target
are explained in data.py. Patches are bit-equal to transformers' PIL image processor (its torchvision one differs by up
to 0.41 at edges).
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps, UnidentifiedImageError

import phantom_clips
import phantom_tasks
from clips import Clip, Film, film_frames
from errors import InputError, cause_of, named, one_line, read_object, short
from phantoms import phantom

Box = tuple[float, float, float, float]

PIXEL_LIMIT = 89_478_485  # of the largest picture file that is opened: Pillow's own, 256 MB as RGB
# What is opened, whatever a file's name says. Pillow would go by content and read forty more: for EPS it starts
# Ghostscript, with the file as its program, and decoders that nobody uses are the ones that nobody has attacked yet.
# JPEG has MPO in it, the several pictures in one file of many phones; PPM has PGM and PBM.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP")
Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT
GREEN = (0, 255, 0)  # of a marked region
MAX_ASPECT = 200  # Qwen's limit: beyond it one side would be a single token
# A clip's frames share the pixels of so many of the largest pictures; two frames become one picture's tokens. Qwen's
# own budget is 90 of 1,280 tokens, more than a training step has room for.
CLIP_PICTURES = 16


@dataclass(frozen=True)
class PhantomImage:
    """Stands where a file's path would: the arguments of what draws it, phantoms.phantom or phantom_tasks.picture."""

    kind: str
    seed: int
    index: int
    size: int  # pixels, square


@dataclass(frozen=True)
class Sample:
    """One record. Pictures, and the targets of phantoms, exist only after load(sample)."""

    media: Path | PhantomImage | Clip  # what is looked at
    query: str
    target: Any  # of its task, in the original frame; None for a phantom whose box is drawn with it: load(sample)
    dataset: str
    task: str = "box"  # a key of tasks.TASKS
    source: str = ""  # "train.jsonl:17", for messages
    size: tuple[int, int] | None = None  # (width, height) in the original frame, from the file's header; phantoms: None
    query_field: str = "query"  # where the record holds its query, for messages
    weight: float | None = None  # of its dataset in the mixture, as --data says
    knowledge: str = ""  # the block that knowledge.py has put around the query
    mark: tuple[int, Box] | None = None  # number of a frame (0: the picture's), box that is drawn on it, original frame
    extra: dict = dataclasses.field(default_factory=dict, hash=False)  # other fields, for a reward of your own

    @property
    def frames(self) -> int:
        return self.media.count if isinstance(self.media, Clip) else 1

    @property
    def kind(self) -> str:
        """What a chat template calls it."""
        return "video" if isinstance(self.media, Clip) else "image"

    @property
    def media_field(self) -> str:
        """Where the record says what is looked at, for messages."""
        return self.media.field if isinstance(self.media, Clip) else "image"

    @property
    def displayed(self) -> tuple[int, int] | None:
        """(width, height) in the original frame, if it is known without decoding."""
        drawn = self.media.frames if isinstance(self.media, Clip) else self.media
        return (drawn.size, drawn.size) if isinstance(drawn, PhantomImage) else self.size

    @property
    def key(self) -> tuple[str, str]:
        """What has a schedule of its own."""
        return self.dataset, self.task


@dataclass
class Picture:
    """A sample's picture as the policy sees it, and what is to be remembered of the original."""

    pixels: np.ndarray  # (h, w, 3) uint8 RGB, model frame; of a clip (N, h, w, 3)
    size: tuple[int, int]  # (width, height) of the original frame
    target: Any  # as Sample's, a phantom's too
    fps: float | None = None  # of a clip


def read_picture(sample: Sample, factor: int, min_pixels: int, max_pixels: int) -> Picture:
    """Load and resize; the three numbers are smart_resize's, of a still. All frames of a clip get one size."""
    limits = frame_limits(sample.frames, factor, min_pixels, max_pixels)
    if not isinstance(sample.media, Clip):
        image, target = load(sample)
        with named(sample.source), named("field 'image'"):
            return Picture(resized(image, *limits), image.size, target)
    frames = load_frames(sample)
    with named(sample.source), named(f"field {sample.media_field!r}"):
        pixels = np.stack([resized(frame, *limits) for frame in frames])
    return Picture(pixels, frames[0].size, sample.target, sample.media.fps)


def frame_limits(frames: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
    """smart_resize's three numbers for each of so many frames, from those for a still."""
    shared = 2 * CLIP_PICTURES * max_pixels // frames
    return factor, min_pixels, max(min_pixels, min(max_pixels, shared))


def load_frames(sample: Sample) -> list[Image.Image]:
    """The frames of a clip (RGB, as displayed), all of one size."""
    clip, source = sample.media, sample.media.frames
    if isinstance(source, PhantomImage):
        return [Image.fromarray(frame) for frame in phantom_clips.frames(source.kind, source.seed, source.index)]
    with named(sample.source), named(f"field {clip.field!r}"):
        if isinstance(source, Film):
            frames = [Image.fromarray(frame) for frame in film_frames(clip)]
        else:
            frames = [open_image(path) for path in source]
        for i, frame in enumerate(frames):
            if frame.size != (sample.size or frames[0].size):
                raise InputError(
                    f"frame {i + 1} of {len(frames)} is {frame.width}x{frame.height}, but all must be as large as the "
                    "first was when its record was read; leave them as they are during a run"
                )
    if sample.mark:
        mark(frames[sample.mark[0]], sample.mark[1])
    return frames


def load(sample: Sample) -> tuple[Image.Image, Any]:
    """The picture of a sample (RGB, as displayed), of a clip the one in the middle, and its target; a box is in that
    picture's pixels: the original frame."""
    if isinstance(sample.media, Clip):
        return load_frames(sample)[sample.frames // 2], sample.target
    if isinstance(sample.media, PhantomImage):
        p = sample.media
        if p.kind in phantom_tasks.KINDS:
            return Image.fromarray(phantom_tasks.picture(p.kind, p.seed, p.index, p.size)), sample.target
        drawn = phantom(p.kind, p.seed, p.index, p.size)
        return Image.fromarray(drawn.image), tuple(map(float, drawn.box))
    with named(sample.source):
        image = open_image(sample.media)
        if sample.size not in (None, image.size):
            raise InputError(
                f"field 'image': {one_line(sample.media)} is {image.width}x{image.height} as displayed, but was "
                f"{sample.size[0]}x{sample.size[1]} when its record was read; leave pictures as they are during a run"
            )
    if sample.mark:
        mark(image, sample.mark[1])
    return image, sample.target


def mark(image: Image.Image, box: Box) -> None:
    """Draw a green frame around a box, its inner edge on the box's: 8 pixels wide where the shorter side has 480, as
    MedGRPO's region captions have it, else in that proportion."""
    width = max(1, round(min(image.size) / 60))
    x1, y1, x2, y2 = (round(side) for side in box)
    ImageDraw.Draw(image).rectangle(
        (x1 - width, y1 - width, x2 - 1 + width, y2 - 1 + width), outline=GREEN, width=width
    )


@contextmanager
def picture(path: Path) -> Iterator[Image.Image]:
    """The opened file; whatever PIL says about it inside becomes one sentence.

    PIXEL_LIMIT guards against small files that unfold to more than the memory; PIL itself only warns up to twice that.
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
        raise InputError(f"image {one_line(path)} {limit}; scale it down, or raise PIXEL_LIMIT in images.py") from error
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


# ------------------------------------------------------------------------------------------------------------ patches

RESTORE = "restore it from its checkpoint"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What of an image processor's settings must be as it is in every Qwen2.5-VL checkpoint, if it is there at all:
PROCESSOR = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
# ... and what its model must agree on, else it is shown pieces of pictures: ours -> in the vision_config
PATCHES = {name: name for name in ("patch_size", "temporal_patch_size")} | {"merge_size": "spatial_merge_size"}


@dataclass
class View:
    """What of a prompt follows from its picture alone and can be made ahead of time; the fields are Prompt's."""

    patches: np.ndarray  # (t*gh*gw, C*T*p*p) float32
    grid: tuple[int, int, int]  # (t, gh, gw) in patches; t: 1 of a picture, frames / T of a clip
    scale: tuple[float, float]  # model frame * scale = original frame
    size: tuple[int, int]  # (width, height) of the picture in the original frame
    target: Any
    seconds: float = 0.0  # of a clip, from one of the t to the next


@dataclass(frozen=True)
class ImageConfig:
    """How a policy wants its pictures; from_folder reads what its checkpoint says."""

    patch_size: int = 14
    merge_size: int = 2  # merge_size x merge_size patches become one token
    temporal_patch_size: int = 2  # a still image is this many equal frames
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        counts = self.patch_size, self.merge_size, self.temporal_patch_size, self.min_pixels, self.max_pixels
        if not all(type(n) is int for n in counts):
            raise InputError(f"image processor settings must be whole numbers, not {short(counts)}")
        for field, values, least in (("image_mean", self.mean, -1e3), ("image_std", self.std, 1e-6)):
            numbers = isinstance(values, tuple) and [type(v) in (int, float) and least <= v <= 1e3 for v in values]
            if numbers != [True] * 3:  # the bounds refuse NaN, infinity and what float32 cannot divide by
                raise InputError(f"{field} must be three numbers, {least:g} to 1000, not {short(values)}")
        if min(counts[:3]) < 1:
            raise InputError(f"patch_size, merge_size and temporal_patch_size must be at least 1, not {counts[:3]}")
        if not 1 <= self.min_pixels <= self.max_pixels < 2**31 or self.max_pixels < self.factor**2:
            raise InputError(
                f"min_pixels {short(self.min_pixels)} and max_pixels {short(self.max_pixels)} leave no image: "
                f"1 <= min_pixels <= max_pixels < {2**31} and max_pixels >= {short(self.factor**2)} are needed"
            )

    @property
    def factor(self) -> int:
        """Pixels per token and side; both sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def limits(self) -> tuple[int, int, int]:
        """What smart_resize goes by."""
        return self.factor, self.min_pixels, self.max_pixels

    def tokens(self, size: tuple[int, int], frames: int = 1) -> int:
        """How many a picture, or a clip of so many frames, becomes; size: (width, height), original frame."""
        h, w = smart_resize(size[1], size[0], *frame_limits(frames, *self.limits))
        return math.ceil(frames / self.temporal_patch_size) * h * w // self.factor**2

    def view(self, picture: Picture) -> View:
        """The picture, resized within our limits, cut into patches."""
        patches, grid = pixels_to_patches(picture.pixels, self)
        (width, height), (h, w) = picture.size, picture.pixels.shape[-3:-1]
        seconds = self.temporal_patch_size / picture.fps if picture.fps else 0.0
        return View(patches, grid, (width / w, height / h), picture.size, picture.target, seconds)

    @classmethod
    def from_folder(cls, folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None):
        """Read preprocessor_config.json, or processor_config.json where transformers 5 nests it; arguments win. What it
        says of patches must be what the folder's config.json says of them."""
        path, nested = Path(folder) / "preprocessor_config.json", Path(folder) / "processor_config.json"
        if os.path.lexists(path):
            config = read_object(path, RESTORE)
            if os.path.lexists(nested):
                read_object(nested, RESTORE)  # which write_max_pixels will, at the end of a run
        else:
            path, config = nested, read_object(nested, RESTORE).get("image_processor")
        size = config.get("size") if isinstance(config, dict) else None
        if not isinstance(config, dict) or not isinstance(size, dict | None):
            raise InputError(f"{one_line(path)}: holds no image processor settings; restore it from its checkpoint")
        for field, value in PROCESSOR.items():
            if config.get(field, value) not in (value, None):
                raise InputError(
                    f"{one_line(path)}: {field} is {short(config[field])}, only {value} is implemented; restore it "
                    "from its checkpoint"
                )
        size = size or {}  # transformers 5 writes the pixel budget here, under other names
        stated = {key: config.get(key) for key in ("patch_size", "merge_size", "temporal_patch_size")} | {
            "min_pixels": size.get("shortest_edge") if config.get("min_pixels") is None else config["min_pixels"],
            "max_pixels": size.get("longest_edge") if config.get("max_pixels") is None else config["max_pixels"],
            "mean": config.get("image_mean"),
            "std": config.get("image_std"),
        }
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        values = {key: v for source in (stated, given) for key, v in source.items() if v is not None}
        with named(one_line(path)):
            images = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        if os.path.lexists(model := Path(folder) / "config.json"):
            vision = read_object(model, RESTORE).get("vision_config")
            for ours, theirs in PATCHES.items():
                here, there = getattr(images, ours), vision.get(theirs) if isinstance(vision, dict) else None
                if there not in (here, None) or (there is None and here != getattr(cls, ours)):
                    raise InputError(
                        f"{one_line(path)}: {ours} is {here}, but {one_line(model)}: vision_config.{theirs} is "
                        f"{short(getattr(cls, ours) if there is None else there)}; take both files from one checkpoint"
                    )
        return images

    def write_max_pixels(self, folder: str | Path) -> None:
        """Write our limit into the folder's processor files, under each of the names that readers look for."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = Path(folder) / name
            if path.is_file():
                whole = read_object(path, RESTORE)
                config = whole["image_processor"] if isinstance(whole.get("image_processor"), dict) else whole
                if isinstance(config.get("size"), dict) and "longest_edge" in config["size"]:
                    config["size"]["longest_edge"] = self.max_pixels
                if "max_pixels" in config or "size" not in config:
                    config["max_pixels"] = self.max_pixels
                path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def pixels_to_patches(pixels: np.ndarray, config: ImageConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Resized RGB (h, w, C) or a clip's (N, h, w, C) uint8 -> patches (t*gh*gw, C*T*p*p) float32 and the grid
    (t, gh, gw) of patches.

    Rows go merge block by merge block, so that merge_size**2 rows in a row become one token; a row is C, T, p, p. Its T
    are frames that follow each other, t = ceil(N / T); the last frame stands in for those that are missing, so a still
    picture is T equal frames.
    """
    frames, p, m = pixels.reshape(-1, *pixels.shape[-3:]), config.patch_size, config.merge_size
    (n, h, w, _), slots = frames.shape, config.temporal_patch_size
    t, gh, gw = -(-n // slots), h // p, w // p
    # A byte has 256 values: normalise those, rounding where transformers rounds (1/255 in float64), and look them up.
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    normalised = np.empty((n, h, w, 3), np.float32)
    for channel, (mean, std) in enumerate(zip(np.float32(config.mean), np.float32(config.std), strict=True)):
        normalised[..., channel] = ((values - mean) / std).take(frames[..., channel])
    cells = normalised.reshape(n, gh // m, m, p, gw // m, m, p, 3)
    cells = cells.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (N, gh/m, gw/m, m, m, C, p, p)
    patches = np.empty((t, *cells.shape[1:6], slots, p, p), np.float32)  # (t, .., C, T, p, p)
    for slot in range(slots):
        there = cells[slot::slots]
        patches[: len(there), ..., slot, :, :] = there
        patches[len(there) :, ..., slot, :, :] = cells[-1]
    return patches.reshape(t * gh * gw, -1), (t, gh, gw)
