"""Records -> prompts: JSONL and phantoms, pixels -> patches, chat prompt, both coordinate frames, the sampler.

TWO FRAMES, and every box here says which one it is in:
  original  pixels of the image as displayed (after EXIF rotation), before any resizing: records, Sample.box, Prompt.box
  model     pixels of the resized image that the policy sees: boxes in prompts and answers
Boxes are (x1, y1, x2, y2), half-open (x2 = last column + 1). Prompt.scale = original pixels per model pixel.

Conventions are Qwen2.5-VL's. Patches are bit-equal to transformers' PIL image processor (its torchvision one differs by
up to 0.41 at edges), ids to its chat template, positions to get_rope_index; tests/ holds all three. VLM-R1's records
(github.com/om-ai-lab/VLM-R1, grpo_jsonl.py) are read as they are, and its question for referring expressions is ours.

Left out: several images or boxes per record, video, DICOM, augmentation.
Bad input is an InputError that names file, line and field; nothing is clipped, truncated or skipped in silence.
Headers of pictures are read with their records, pixels when a sample is loaded: images.py, ahead of time pipeline.py.
"""

import json
import math
import os
import re
import signal
import string
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from errors import InputError, cause_of, named, one_line, read_json, read_text, short
from images import Box, PhantomImage, Picture, Sample, displayed_size, load, read_picture, smart_resize
from phantoms import KINDS, QUERIES
from weights import COMPANIONS

IMAGE_TOKEN = "<|image_pad|>"  # names, never ids: the nano policy has ids of its own
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand around a record: the UTF-8 byte order mark and JSON's white space
MAX_LINE = 1_000_000  # bytes of a JSONL line: a record has a few hundred, so a longer line is another kind of file
MAX_LIST = 2**31  # bytes of a file that is one JSON list, read whole; lines are read one by one
MAX_TEXT = 10_000  # characters of a query: more than any prompt holds, and the tokenizer is not kept busy with it
QUERIES_REMEDY = 'write {"query of the records": "phrase to ask with", ...}'

TRAIN_PHANTOMS = 20_000
TEST_PHANTOMS = 600
TEST_SEED, TEST_START = 0, 10_000_000  # the test series is one for all runs, and no training index reaches it

REC_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {query}."
PROMPTS = {
    "answer": "{query}",  # box only: what the nano policy is trained on
    "think": REC_QUESTION + " First output the thinking process in <think> </think> tags and then output the final "
    "answer in <answer> </answer> tags. Output the final answer in JSON format.",
    "qwen": "Locate {query}, output its bbox coordinates using JSON format.",  # of Qwen2.5-VL's own grounding examples
}
THOUGHT = "I look for the region that the question describes and frame it."
ANSWERS = {
    "answer": "[{},{},{},{}]",
    "think": f'<think> {THOUGHT} </think>\n<answer>{{{{"bbox_2d": [{{}}, {{}}, {{}}, {{}}]}}}}</answer>',
    "qwen": '```json\n[\n\t{{"bbox_2d": [{}, {}, {}, {}], "label": {}}}\n]\n```',  # to the tab as Qwen2.5-VL answers
}
MAX_CHAT = 10 * MAX_TEXT  # characters of a rendered chat: query and question have MAX_TEXT at most, each
HALF = "[\ud800-\udfff]"  # JSON can escape half a character, which UTF-8 cannot hold
TRIAL = 5, 2**31  # seconds of a CPU and bytes that a checkpoint's template and tokenizer may take for the text below
TRIAL_TEXT = string.printable + REC_QUESTION + "a" * 64
CHAT = (  # for a tokenizer without a template of its own: what Qwen2.5-VL's template renders
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


# ---------------------------------------------------------------- records


class BadRecords:
    """The records that were left out, each with its sentence; one more than allowed is an InputError."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.sentences: dict[str, str] = {}  # source, such as "train.jsonl:17" -> sentence
        self.clipped: list[str] = []  # sources of the boxes that --clip has cut

    def add(self, source: str, error: InputError) -> None:
        """Leave out the record at source because of error; a record that fails twice counts once."""
        self.sentences.setdefault(source, str(error))
        if len(self.sentences) > self.allowed:
            hint = "--skip-bad N leaves up to N such records out"
            if self.allowed:
                hint = f"this is bad record number {len(self.sentences)}, --skip-bad allows {self.allowed}"
            raise InputError(f"{error} ({hint})") from error

    def lines(self) -> list[str]:
        """What to say of them: a line for each that was left out, one for all boxes that were cut."""
        lines = [f"left out: {sentence}" for sentence in self.sentences.values()]
        return lines + ([counted("boxes clipped at the picture's edge", self.clipped)] if self.clipped else [])


def counted(reason: str, where: list[str]) -> str:
    """How often something was done to the data, and the first three places."""
    return f"{reason}: {len(where)} ({', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"


def load_samples(
    spec: str,
    seed: int,
    split: str,
    bad: BadRecords | None = None,
    queries: str | None = None,
    outside: bool = False,
    clip: bool = False,
) -> list[Sample]:
    """Read --data: "phantoms", "phantoms:<kind>" or a JSONL/JSON file; several of them separated by commas.

    seed picks the training phantoms. split is "train" or "test" and matters to phantoms only (a file is its own split):
    the test phantoms are the same for every seed and disjoint from all training ones. bad takes the records that cannot
    be used; without it the first one is an InputError. queries: a file of other words to ask in (read_queries).
    outside: --allow-outside, see picture_path. clip: --clip, see load_jsonl.
    """
    bad = bad or BadRecords()
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    series = (seed, 0, TRAIN_PHANTOMS) if split == "train" else (TEST_SEED, TEST_START, TEST_PHANTOMS)
    samples = []
    for part in spec.split(","):
        name, colon, kind = part.strip().partition(":")
        if name == "phantoms":
            samples += phantom_samples(kind if colon else None, *series)
        else:
            samples += load_jsonl(part.strip(), bad, outside=outside, clip=clip)
    return ask_in_words_of(queries, samples, seed if split == "train" else None, bad) if queries else samples


def read_queries(path: str | Path) -> dict[str, list[str]]:
    """--queries, a JSON object: the query of a record, such as its class -> the phrases to ask with instead, one or
    a list of them."""
    table = read_json(path, QUERIES_REMEDY)
    with named(one_line(path)):
        if not isinstance(table, dict):
            raise InputError(f"holds {short(table)} and no JSON object; {QUERIES_REMEDY}")
        phrases = {query: value if isinstance(value, list) else [value] for query, value in table.items()}
        if empty := [query for query, some in phrases.items() if not some]:
            raise InputError(f"field {short(empty[0])} has no phrase; {QUERIES_REMEDY}")
        return {query: [_text(phrase, query) for phrase in some] for query, some in phrases.items()}


def ask_in_words_of(path: str, samples: list[Sample], seed: int | None, bad: BadRecords) -> list[Sample]:
    """The samples with a phrase of read_queries(path) each in place of their queries, all of which must be in it.

    Of several phrases the seed and the sample's index choose one, for the whole run; without a seed, where answers are
    evaluated, it is the first: two policies are asked the same.
    """
    phrases, asked = read_queries(path), []
    for index, sample in enumerate(samples):
        if some := phrases.get(sample.query):
            luck = 0 if seed is None else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            asked.append(replace(sample, query=some[luck % len(some)]))
        else:
            field = f"field {sample.query_field!r} {short(sample.query)}"
            bad.add(sample.source, InputError(f"{sample.source}: {field} is not in {one_line(path)}; add it there"))
    if samples and not asked:
        raise InputError(f"{one_line(path)}: holds none of the queries of {len(samples)} records")
    return asked


def held_out_phantoms(spec: str) -> str:
    """What of --data has a held-out split of its own, as a spec for load_samples: its phantoms; "" if none."""
    parts = [part.strip() for part in spec.split(",")]
    return ",".join(part for part in parts if part.partition(":")[0] == "phantoms")


def phantom_samples(kind: str | None, seed: int, start: int, count: int, size: int = 140) -> list[Sample]:
    """Phantoms start .. start + count - 1 of the series (kind, seed), not yet drawn; kind None takes turns by index."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"unknown phantom kind {kind!r}: use phantoms, or phantoms:<kind> of {', '.join(KINDS)}")
    samples = []
    for index in range(start, start + count):
        k = kind or KINDS[index % len(KINDS)]
        source = f"phantoms:{k} seed {seed} index {index}"
        samples.append(Sample(PhantomImage(k, seed, index, size), QUERIES[k], None, f"phantoms-{k}", source=source))
    return samples


def load_jsonl(
    path: str | Path,
    bad: BadRecords | None = None,
    images: Path | None = None,
    outside: bool = False,
    clip: bool = False,
) -> list[Sample]:
    """Read a file of records; image paths are relative to its folder or to images, boxes are in the original frame.

    Ours, one per line:   {"image", "query", "bbox": [x1, y1, x2, y2], "width"?, "height"?, "dataset"?, "task"?}
    VLM-R1, one per line: {"image", "conversations": [{"value": "<image>question"}, {"value": box, list or string}]}
    VLM-R1, older:        a JSON list of {"image", "problem", "solution"}
    Of each picture the header is read. A record that cannot be used goes to bad with a sentence that names file, line
    (or record of a list) and field; without bad it is an InputError, and so is a file with no usable record. A box that
    reaches over the picture's edge is one of these, unless `clip`: then it is cut there, and bad.clipped has its place.
    """
    path, bad, samples = Path(path), bad or BadRecords(), []
    name = repr(str(path))[1:-1]  # as it is, but on one line, whatever characters it has
    for source, record in _records(path, name):
        try:
            with named(source):
                sample, cut = _sample(record, images or path.parent, path.stem, source, outside, clip)
        except InputError as error:
            bad.add(source, error)
        else:
            samples.append(sample)
            bad.clipped += [source] if cut else []
    if not samples:
        raise InputError(f"{name}: holds no usable records; write one JSON object per line")
    return samples


def _records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of each record: of JSONL the bytes of a line, so that each is parsed, and fails, on its own."""
    first = True
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device would be read for ever
            raise InputError(f"{name}: is not a file; name a JSONL file of records")
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if first and line.lstrip(BLANK)[:1] == b"[":
                    with named(name):
                        if os.path.getsize(path) > MAX_LIST:
                            raise InputError(f"has more than {MAX_LIST} bytes; write one JSON object per line")
                        records = _parse(line + file.read(), "a file that begins with [ must be one JSON list")
                    yield from ((f"{name} record {i}", record) for i, record in enumerate(records, 1))
                    return
                rest = line
                while len(rest) > MAX_LINE and rest[-1:] != b"\n":  # keep the beginning only
                    rest = file.readline(MAX_LINE + 1)
                if line.strip(BLANK) or len(line) > MAX_LINE:
                    first = False
                    yield f"{name}:{number}", line
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        raise InputError(f"{name}: cannot be read ({cause_of(error)}); name a JSONL file of records") from error


def _parse(text: str | bytes, remedy: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("line 1 ", "").partition(";")[0]  # behind ; Python advises on its limit of digits
        raise InputError(f"not valid JSON in UTF-8 ({one_line(why)}); {remedy}") from error


def _sample(record: Any, folder: Path, name: str, source: str, outside: bool, clip: bool) -> tuple[Sample, bool]:
    """The record of a file called name, whose image path is relative to folder; and whether its box was cut."""
    if isinstance(record, bytes):
        if len(record) > MAX_LINE:
            raise InputError(f"the line is longer than {MAX_LINE} bytes; write one JSON object per line")
        record = _parse(record.rstrip(b"\r\n"), "write one JSON object per line")
    if not isinstance(record, dict):
        raise InputError(f"a record must be a JSON object with image, query and bbox, not {short(record)}")
    if "conversations" in record:
        query_field, box_field = "conversations[0].value", "conversations[1].value"
        turns = record["conversations"]
        if not isinstance(turns, list) or [isinstance(t, dict) and "value" in t for t in turns] != [True, True]:
            raise InputError("field 'conversations' must be a question and an answer, each an object with a 'value'")
        query, box = (turn["value"] for turn in turns)
    else:
        query_field, box_field = ("problem", "solution") if "problem" in record else ("query", "bbox")
        query, box = _required(record, query_field), _required(record, box_field)
    query = _text(query, query_field)
    if query_field != "query":  # VLM-R1: without its marker, and of its usual question the phrase alone
        query = query.replace("<image>", "").strip()
        before, after = REC_QUESTION.split("{query}")
        query = _text(
            query.removeprefix(before).removesuffix(after) if query.startswith(before) else query, query_field
        )
        if isinstance(box, str):
            with named(f"field {box_field!r} {short(box)}"):
                box = _parse(re.sub(r"</?answer>", "", box), "write [x1, y1, x2, y2]")

    image, size = _image(record, folder, outside)
    box, cut = _box(box, box_field, size, clip)
    dataset, task = _text(record.get("dataset") or name, "dataset"), _text(record.get("task", "ground"), "task")
    return Sample(image, query, box, dataset, task, source, size, query_field), cut


def picture_path(folder: Path, name: str, field: str, outside: bool) -> Path:
    """Where a record says that its picture is. Records may come from anywhere, and pictures are shown to whoever looks
    at overlays: the path must not lead out of the folder, unless `outside`. Links in it are its owner's: followed."""
    if not outside and (os.path.isabs(name) or ".." in Path(name).parts):
        raise InputError(
            f"field {field!r} {short(name)} leads out of {one_line(folder)}; put the file of records above its "
            "pictures, or allow it by --allow-outside"
        )
    return folder / name


def _image(record: dict, folder: Path, outside: bool) -> tuple[Path, tuple[int, int]]:
    """The path of a record's picture and its size as displayed, held against the size that the record states."""
    name = _text(_required(record, "image"), "image")
    image, shown = picture_path(folder, name, "image", outside), short(name)
    if not os.path.isfile(image):  # unlike Path.is_file, False also for names that no file can have
        raise InputError(f"field 'image' names {shown}, which is not a file; paths are relative to {one_line(folder)}")
    with named("field 'image'"):
        size = displayed_size(image)
    if "width" in record or "height" in record:
        stated = _required(record, "width"), _required(record, "height")
        if not all(type(side) is int and 0 < side < 1e9 for side in stated):
            raise InputError(f"fields 'width' and 'height' must be positive integers, not {short(stated)}")
        if stated != size:
            raise InputError(
                f"fields 'width' and 'height' say {stated[0]}x{stated[1]}, but {shown} is {size[0]}x{size[1]} as "
                "displayed (after EXIF rotation): the box is in another frame; give size and box as displayed"
            )
    return image, size


def _required(record: dict, field: str) -> Any:
    if field not in record:
        raise InputError(f"field {field!r} is missing, add it; the record has {short(list(record))}")
    return record[field]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"field {field!r} must be a non-empty string, not {short(value)}")
    if len(value) > MAX_TEXT:
        raise InputError(f"field {field!r} has {len(value)} characters; shorten it to at most {MAX_TEXT}")
    if re.search("[\ud800-\udfff]", value):  # JSON can escape half a character, which UTF-8 cannot hold
        raise InputError(f"field {field!r} {short(value)} holds half a surrogate pair; write the whole character")
    return value.strip()


def _box(value: Any, field: str, size: tuple[int, int], clip: bool) -> tuple[Box, bool]:
    """The box of a record whose picture has that size, and whether it was cut there."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(v, list | dict) for v in value):
        raise InputError(
            f"field {field!r} holds {len(value)} boxes, but one phrase, one box is the method; write a record for "
            "each, with a phrase that fits it alone"
        )
    # The bound also refuses NaN, infinities and integers beyond floats; a bool is an int to Python, but no coordinate.
    numbers = isinstance(value, list) and [type(v) in (int, float) and abs(v) < 1e9 for v in value]
    if numbers != [True] * 4:
        raise InputError(f"field {field!r} must be four finite numbers [x1, y1, x2, y2], not {short(value)}")
    x1, y1, x2, y2 = map(float, value)
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"field {field!r} {short(value)} is an empty or inverted box; write x1 < x2 and y1 < y2")
    if x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]:
        outside = f"lies outside the {size[0]}x{size[1]} image"
        raise InputError(f"field {field!r} {short(value)} {outside}; write pixels of the displayed image")
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
    cut = inside != (x1, y1, x2, y2)
    if cut and not clip:
        remedy = "write pixels of the displayed image, or have boxes cut by --clip"
        raise InputError(f"field {field!r} {short(value)} reaches outside the {size[0]}x{size[1]} image; {remedy}")
    return inside, cut


# ---------------------------------------------------------------- images


# What of an image processor's settings must be as it is in every Qwen2.5-VL checkpoint, if it is there at all:
PROCESSOR = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
# ... and what its model must agree on, else it is shown pieces of pictures: ours -> in the vision_config
PATCHES = {name: name for name in ("patch_size", "temporal_patch_size")} | {"merge_size": "spatial_merge_size"}


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

    def view(self, picture: Picture) -> "View":
        """The picture, resized within our limits, cut into patches."""
        patches, grid = pixels_to_patches(picture.pixels, self)
        (width, height), (h, w, _) = picture.size, picture.pixels.shape
        return View(patches, grid, (width / w, height / h), picture.size, picture.box)

    @classmethod
    def from_folder(cls, folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None):
        """Read preprocessor_config.json, or processor_config.json where transformers 5 nests it; arguments win. What it
        says of patches must be what the folder's config.json says of them."""
        path, nested = Path(folder) / "preprocessor_config.json", Path(folder) / "processor_config.json"
        if os.path.lexists(path):
            config = _read_object(path)
            if os.path.lexists(nested):
                _read_object(nested)  # which write_max_pixels will, at the end of a run
        else:
            path, config = nested, _read_object(nested).get("image_processor")
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
            vision = _read_object(model).get("vision_config")
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
                whole = _read_object(path)
                config = whole["image_processor"] if isinstance(whole.get("image_processor"), dict) else whole
                if isinstance(config.get("size"), dict) and "longest_edge" in config["size"]:
                    config["size"]["longest_edge"] = self.max_pixels
                if "max_pixels" in config or "size" not in config:
                    config["max_pixels"] = self.max_pixels
                path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _read_object(path: Path) -> dict:
    """A JSON file of a checkpoint's."""
    value = read_json(path, "restore it from its checkpoint")
    if not isinstance(value, dict):
        raise InputError(f"{one_line(path)}: holds {short(value)} and no JSON object; restore it from its checkpoint")
    return value


def pixels_to_patches(pixels: np.ndarray, config: ImageConfig) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Resized RGB (h, w, C) uint8 -> patches (gh*gw, C*T*p*p) float32 and the grid (1, gh, gw) of patches.

    Rows go merge block by merge block, so that merge_size**2 rows in a row become one token; a row is C, T, p, p.
    """
    (h, w, _), p, m = pixels.shape, config.patch_size, config.merge_size
    gh, gw = h // p, w // p
    # A byte has 256 values: normalise those, rounding where transformers rounds (1/255 in float64), and look them up.
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    normalised = np.empty((h, w, 3), np.float32)
    for channel, (mean, std) in enumerate(zip(np.float32(config.mean), np.float32(config.std), strict=True)):
        normalised[..., channel] = ((values - mean) / std).take(pixels[..., channel])
    cells = normalised.reshape(gh // m, m, p, gw // m, m, p, 3)
    cells = cells.transpose(0, 3, 1, 4, 6, 2, 5)  # (gh/m, gw/m, m, m, C, p, p)
    patches = np.empty((*cells.shape[:5], config.temporal_patch_size, p, p), np.float32)  # (.., C, T, p, p)
    patches[:] = cells[:, :, :, :, :, None]  # one frame, T times
    return torch.from_numpy(patches.reshape(gh * gw, -1)), (1, gh, gw)


# ---------------------------------------------------------------- frames


def to_model(box: Box, scale: tuple[float, float]) -> Box:
    """Original frame -> model frame; scale = (original width / model width, original height / model height)."""
    return box[0] / scale[0], box[1] / scale[1], box[2] / scale[0], box[3] / scale[1]


def to_original(box: Box, scale: tuple[float, float]) -> Box:
    """Model frame -> original frame; scale as in to_model. rewards.score multiplies by the same two factors."""
    return box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]


def answer_text(box: Box, style: str, query: str) -> str:
    """What supervised training wants to hear for a box of the MODEL frame, in whole pixels; the EOS is not in it.

    style "think": a fixed thought and VLM-R1's JSON; "qwen": Qwen's JSON, with the query as label; else
    [x1,y1,x2,y2]. Each side moves by half a pixel at most, unless the box would vanish: then it becomes the pixel that
    it lies in.
    """
    x1, y1, x2, y2 = map(round, box)
    if x1 == x2:
        x1, x2 = math.floor(box[0]), math.floor(box[0]) + 1
    if y1 == y2:
        y1, y2 = math.floor(box[1]), math.floor(box[1]) + 1
    return ANSWERS.get(style, ANSWERS["answer"]).format(x1, y1, x2, y2, json.dumps(query, ensure_ascii=False))


# ---------------------------------------------------------------- prompts


def prompt_style(value: str) -> str:
    """--prompt -> what all of this takes as `style`: a name of PROMPTS, or a question with {query} in it, which is the
    text of the file that --prompt names."""
    if value in PROMPTS:
        return value
    if not os.path.isfile(value):
        known = ", ".join(PROMPTS)
        raise InputError(f"--prompt {one_line(value)}: there are {known}, or a text file with {{query}} in it")
    with named(f"--prompt {one_line(value)}"):
        return check_style(read_text(value, "write it in UTF-8").strip())


def check_query(query: str) -> str:
    """--query, the phrase of one question: as a record's."""
    return _text(query, "query")


def check_style(style: str) -> str:
    """The style, if it can be asked. {query} is the only placeholder: {"bbox_2d": [x1, y1, x2, y2]} is text."""
    if style in PROMPTS:
        return style
    if len(style) > MAX_TEXT:
        raise InputError(f"the question has {len(style)} characters; shorten it to at most {MAX_TEXT}")
    if other := [p for p in re.findall(r"\{\s*\w*\s*\}", style) if p != "{query}"]:
        raise InputError(f"the question holds {other[0]}; {{query}} is the only placeholder there is")
    if "{query}" not in style:
        hint = f"write it where the phrase of a record belongs, or name one of {', '.join(PROMPTS)}"
        raise InputError(f"the question {short(style)} does not hold {{query}}; {hint}")
    if re.search(HALF, style):
        raise InputError(f"the question {short(style)} holds half a surrogate pair; write the whole character")
    if IMAGE_TOKEN in style:
        raise InputError(f"the question holds {IMAGE_TOKEN}; leave it out, the picture is put in front of it")
    return style


@dataclass
class View:
    """What of a prompt follows from its picture alone and can be made ahead of time; the fields are Prompt's."""

    patches: torch.Tensor
    grid: tuple[int, int, int]
    scale: tuple[float, float]
    size: tuple[int, int]
    box: Box


@dataclass
class Prompt:
    """What the model is asked about one sample."""

    ids: torch.Tensor  # (P,) int64, the image token repeated once per merged patch
    patches: torch.Tensor  # (gh*gw, C*T*p*p) float32
    grid: tuple[int, int, int]  # (1, gh, gw) in patches
    positions: torch.Tensor  # (3, P) int64: M-RoPE time, row, column
    next_position: int  # of the first completion token: largest position + 1
    scale: tuple[float, float]  # model frame * scale = original frame
    size: tuple[int, int]  # (width, height) of the picture in the original frame
    box: Box  # original frame
    sample: Sample
    text: str  # the rendered chat, with one image token
    image_tokens: torch.Tensor | None = None  # (gh*gw/4, H) once a frozen vision tower has seen it: Policy.see


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, with the chat template that transformers' processor would take; local
    files only, no code from the folder is run."""
    folder, shown = Path(folder), one_line(folder)
    if not folder.is_dir():
        raise InputError(f"{shown} is not a folder; a model is a Hugging Face checkpoint folder on this machine")
    if not os.path.lexists(folder / "tokenizer.json"):  # transformers would look for other kinds of files
        raise InputError(f"{shown}: holds no tokenizer.json; restore it from its checkpoint")
    for file in (*(folder / name for name in COMPANIONS), *folder.glob("additional_chat_templates/*")):
        if os.path.lexists(file):  # transformers would wait at a pipe, and read a device until the memory ends
            read_text(file, "restore it from its checkpoint")
    config = _read_object(folder / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a broken tokenizer.json: whatever the first thing that it misses raises
        why = f"{type(error).__name__}: {cause_of(error)}"
        raise InputError(f"{shown}: holds no tokenizer that transformers can load ({why}); restore it") from error
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise InputError(f"{shown}: its tokenizer has no {IMAGE_TOKEN}; a Qwen2.5-VL checkpoint is needed")
    ids = vocabulary[IMAGE_TOKEN], config.get("image_token_id")
    if ids[0] != ids[1]:
        raise InputError(
            f"{shown}: {IMAGE_TOKEN} is {ids[0]} in the tokenizer, but config.json: image_token_id is {short(ids[1])}"
        )
    text_config = config.get("text_config")
    rows = (text_config if isinstance(text_config, dict) and text_config else config).get("vocab_size")
    if type(rows) is int and (last := max(vocabulary.values())) >= rows:
        raise InputError(f"{shown}: the tokenizer has a token {last}, but config.json: vocab_size is {short(rows)}")
    template, place = tokenizer.chat_template, folder / "tokenizer_config.json"
    if isinstance(template, dict):  # several, by name
        template = template.get("default", template)
    if os.path.lexists(file := folder / "chat_template.json"):  # a processor's, and goes before the tokenizer's own
        template, place = _read_object(file).get("chat_template", {}), file
    if not isinstance(template, str | None):
        raise InputError(f"{one_line(place)}: field 'chat_template' must be a string; restore it from its checkpoint")
    tokenizer.chat_template = template
    _try_out(tokenizer, shown)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Ask one question in a forked process that may take TRIAL seconds of a CPU and bytes of memory. InputError if it
    takes more, or dies of it.

    A chat template is a program, if one in a sandbox, and a tokenizer's rules may make a long text of a short one: both
    can be endless, in C and Rust too, where no signal is heard. Any other fault is said at the first record. Not found
    is what is endless for certain records only; of these, no rendered question may be longer than MAX_CHAT. Where there
    is no fork (Windows), nothing is tried.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has no need of
        child = os.fork()
    if child == 0:
        done = 1
        try:
            signal.alarm(60)  # should it wait for a lock that a thread of the parent held: that says nothing
            _limit(*TRIAL)
            ids = tokenizer.encode(_chat(TRIAL_TEXT, tokenizer), add_special_tokens=False)
            tokenizer.batch_decode([ids])
            done = 0
        except InputError as error:
            done = int(isinstance(error.__cause__, MemoryError))
        except Exception as error:
            done = int(isinstance(error, MemoryError))
        finally:
            os._exit(done)  # nothing of the parent's is flushed or ended a second time
    status = os.waitpid(child, 0)[1]
    if status and os.WTERMSIG(status) != signal.SIGALRM:
        raise InputError(
            f"{folder}: its tokenizer or its chat template takes more than {TRIAL[0]} seconds or "
            f"{TRIAL[1] / 2**30:.2g} GB for a short question; restore them from their checkpoint"
        )


def _limit(seconds: int, memory: int) -> None:
    """Seconds of the CPU and more bytes of memory for this process, which says nothing more."""
    import resource  # not on Windows

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread per core would take memory of its own
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = [(resource.RLIMIT_CPU, seconds)]
    if os.path.isfile("/proc/self/statm"):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits.append((resource.RLIMIT_AS, held + memory))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def build_prompt(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    image_config: ImageConfig,
    style: str,
    max_prompt_tokens: int | None = None,
    view: View | InputError | None = None,
) -> Prompt:
    """Load a sample and ask for its box, image first; style: see prompt_style.

    view: what loading it ahead of time gave. InputError, never a cut prompt, when it is longer than max_prompt_tokens
    or the query holds a special token.
    """
    view = view or image_config.view(read_picture(sample, *image_config.limits))
    if isinstance(view, InputError):
        raise view
    text, ids = _render(sample, view.size, tokenizer, image_config, style, max_prompt_tokens)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids = torch.tensor(ids)
    positions, next_position = mrope_positions(ids, [view.grid], image_token_id, image_config.merge_size)
    return Prompt(ids, view.patches, view.grid, positions, next_position, view.scale, view.size, view.box, sample, text)


def check_prompt(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    image_config: ImageConfig,
    style: str,
    max_prompt_tokens: int | None,
    decode: bool = False,
) -> int:
    """The prompt's length in tokens, or the InputError that build_prompt would raise. Known from size and query alone;
    with decode the picture is looked at too."""
    p = sample.image
    size = (p.size, p.size) if isinstance(p, PhantomImage) else sample.size
    if decode or size is None:
        size = load(sample)[0].size
    return len(_render(sample, size, tokenizer, image_config, style, max_prompt_tokens)[1])


def _render(sample, size, tokenizer, config, style, max_prompt_tokens) -> tuple[str, list[int]]:
    """The rendered chat and its ids (P,), as build_prompt; size: (width, height) of the picture, original frame."""
    image_token_id, field = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), sample.query_field
    with named(sample.source):
        with named("field 'image'"):
            h, w = smart_resize(size[1], size[0], *config.limits)
        added = tokenizer.get_added_vocab()
        if special := [token for token in added if token in sample.query]:
            raise InputError(f"field {field!r} {short(sample.query)} holds the special token {special[0]}; remove it")
        text, ids = _asked(sample.query, style, tokenizer)
        # The words around a query may make a special token of one that holds none: <|im_{query} and end|>.
        if _specials(ids, added) != _neutral(tokenizer, tokenizer.chat_template, style):
            raise InputError(
                f"field {field!r} {short(sample.query)} makes a special token together with the question around it; "
                "reword one of them"
            )
        if ids.count(image_token_id) != 1:
            raise InputError(
                f"the tokenizer's chat template writes {ids.count(image_token_id)} image tokens for one image; "
                "use the template of a Qwen2.5-VL checkpoint"
            )
        at, image_tokens = ids.index(image_token_id), h * w // config.factor**2
        ids[at : at + 1] = [image_token_id] * image_tokens
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise InputError(
                f"the prompt has {len(ids)} tokens ({image_tokens} for field 'image', the rest for the template and "
                f"field {field!r}), but {max_prompt_tokens} are allowed; lower --max-pixels or --max-tokens or shorten "
                "the query"
            )
    return text, ids


def _asked(query: str, style: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The rendered chat and its ids, before the image token is repeated."""
    text = _chat(PROMPTS.get(style, style).replace("{query}", query), tokenizer)
    try:
        return text, tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:
        raise InputError(f"the tokenizer fails ({cause_of(error)}); use a Qwen2.5-VL checkpoint's") from error


def _specials(ids: list[int], added: dict[str, int]) -> list[int]:
    """Those of the tokenizer's added tokens, in their order."""
    special = set(added.values())
    return [i for i in ids if i in special]


@lru_cache(maxsize=16)
def _neutral(tokenizer: PreTrainedTokenizerBase, template: str | None, style: str) -> list[int]:
    """Those of a question about "x"; template: the tokenizer's, so that another one is another key of the cache."""
    return _specials(_asked("x", style, tokenizer)[1], tokenizer.get_added_vocab())


def _chat(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return CHAT.format(question=question)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    try:
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program, if one in a sandbox: it may raise anything
        why = f"{type(error).__name__}: {cause_of(error)}"
        raise InputError(f"the tokenizer's chat template fails ({why}); use a Qwen2.5-VL checkpoint's") from error
    if len(text) > MAX_CHAT or re.search(HALF, text):
        what = f"{len(text)} characters" if len(text) > MAX_CHAT else "half a surrogate pair"
        raise InputError(f"the tokenizer's chat template writes {what} for a question; use a Qwen2.5-VL checkpoint's")
    return text


def mrope_positions(
    ids: torch.Tensor, grids: list[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> tuple[torch.Tensor, int]:
    """ids (P,), one grid (t, gh, gw) in patches per image -> positions (3, P) and the position after the last.

    Text counts on in all three rows alike; an image's tokens are (t, row, column) of the merged grid, offset by the
    running position, which goes on behind the largest of them (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    is_image = ids == image_token_id
    sizes = [(t, gh // merge_size, gw // merge_size) for t, gh, gw in grids]
    if int(is_image.sum()) != sum(map(math.prod, sizes)):
        raise ValueError(f"{int(is_image.sum())} image tokens in the prompt, but the grids {grids} make another number")
    parts, at, position = [], 0, 0  # at: index of the next token; position: its running position
    for size in sizes:
        start = at + int(is_image[at:].int().argmax())  # first image token from here on
        text = torch.arange(position, position + start - at).expand(3, -1)
        position += start - at
        at = start + math.prod(size)
        if not is_image[start:at].all():
            raise ValueError(f"the image tokens from index {start} on are fewer than the grid {size} needs")
        cells = torch.cartesian_prod(*map(torch.arange, size)).T  # (3, t*h*w), the column fastest
        parts += [text, cells + position]
        position += max(size)
    parts.append(torch.arange(position, position + len(ids) - at).expand(3, -1))
    return torch.cat(parts, dim=1), position + len(ids) - at


# ---------------------------------------------------------------- order


class Sampler:
    """Endless batches of sample indices. Epochs run into each other, so nothing is dropped, whatever the batch size.

    A batch follows from (seed, step) alone: there is no state to save, a resumed run cannot repeat or skip, and any
    number of ranks can cut the same batch among themselves.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        if n < 1 or batch_size < 1 or seed < 0:
            raise InputError(f"{n} samples, batch size {batch_size}, seed {seed}: must be at least 1, 1 and 0")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> list[int]:
        """The batch_size indices in [0, n) of a step, counted from 0."""
        return self.take(step * self.batch_size, self.batch_size)

    def take(self, first: int, count: int) -> list[int]:
        """The indices at places first .. first + count - 1 of the endless stream."""
        return [int(self._order_of(k // self.n)[k % self.n]) for k in range(first, first + count)]

    def _order_of(self, epoch: int) -> np.ndarray:
        """The permutation (n,) of an epoch; only the latest is kept."""
        if epoch != self._epoch:
            # Sorting Philox's raw words: numpy promises those for ever, its permutation() only within a version.
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.n)
            self._epoch, self._order = epoch, np.argsort(words, kind="stable")
        return self._order
