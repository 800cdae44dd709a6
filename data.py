"""Records -> samples: JSONL and phantoms, each line read strictly, its picture's header with it.

TWO FRAMES, and every box here says which one it is in:
  original  pixels of the image as displayed (after EXIF rotation), before any resizing: records, Sample, Prompt.target
  model     pixels of the resized image that the policy sees: boxes in prompts and answers
Boxes are (x1, y1, x2, y2), half-open (x2 = last column + 1). Prompt.scale = original pixels per model pixel.

A record names its task (default: box), which reads the target from it (tasks/); fields that nobody asks for stay in
Sample.extra. VLM-R1's records (github.com/om-ai-lab/VLM-R1, grpo_jsonl.py) are read as they are.

Instead of an image a record may have a clip: "frames", a list of pictures of one size, with their "fps", or "video", a
file, from which "fps" frames a second are taken between "start" and "end" (clips.py). Seconds count from its first.

Left out: several images per record, DICOM. Bad input is an InputError that names file, line and field; nothing is
clipped, truncated or skipped in silence. Pixels are decoded when a sample is loaded: images.py.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phantom_clips
import phantom_tasks
from clips import MOST_FRAMES, Clip, Film, film_header, frames_between
from errors import InputError, cause_of, named, one_line, short
from images import Box, PhantomImage, Sample, displayed_size
from phantoms import KINDS, QUERIES

BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand around a record: the UTF-8 byte order mark and JSON's white space
MAX_LINE = 1_000_000  # bytes of a JSONL line: a record has a few hundred, so a longer line is another kind of file
MAX_LIST = 2**31  # bytes of a file that is one JSON list, read whole; lines are read one by one
MAX_TEXT = 10_000  # characters of a query: more than any prompt holds, and the tokenizer is not kept busy with it
HALF = "[\ud800-\udfff]"  # JSON can escape half a character, which UTF-8 cannot hold
COMMON = "image query dataset task width height conversations problem solution".split()  # fields read here
CLIPS = ("frames", "video", "fps", "start", "end")  # and of a clip's
MEDIA = ("image", "frames", "video")  # of which a record has one

TRAIN_PHANTOMS = 20_000
TEST_PHANTOMS = 600
TEST_SEED, TEST_START = 0, 10_000_000  # the test series is one for all runs, and no training index reaches it

REC_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {query}."  # VLM-R1's


class BadRecords:
    """The records that were left out, each with its sentence; one more than allowed is an InputError."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.sentences: dict[str, str] = {}  # source, such as "train.jsonl:17" -> sentence
        self.clipped: list[str] = []  # sources of the boxes that --clip-boxes has cut

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


@dataclass
class Record:
    """One record while its task reads the target from it."""

    fields: dict[str, Any]  # under our names
    names: dict[str, str]  # what the file calls them
    size: tuple[int, int]  # (width, height) of its picture as displayed
    clip: bool  # --clip-boxes
    cut: bool = False  # whether a box was
    seconds: float | None = None  # that its clip lasts; of a picture None
    mark: tuple[int, Box] | None = None  # what the task wants drawn: Sample.mark
    read: list[str] = dataclasses.field(default_factory=list)  # fields that the task has asked for

    def __getitem__(self, field: str) -> Any:
        self.read.append(field)
        return _required(self.fields, field)

    def get(self, field: str, default: Any) -> Any:
        """One that may be missing."""
        return self[field] if field in self.fields else default

    def text(self, field: str) -> str:
        """A field that must be a text, stripped."""
        return check_text(self[field], self.names.get(field, field))


def load_samples(
    spec: str,
    tasks: Mapping[str, Any],
    seed: int,
    split: str,
    bad: BadRecords | None = None,
    outside: bool = False,
    clip: bool = False,
    knowledge: Any = None,
) -> list[Sample]:
    """Read --data: "phantoms", "phantoms:<kind>" or a JSONL/JSON file, =WEIGHT behind; several are separated by commas.

    tasks: tasks.TASKS, which read the targets. seed picks the training phantoms. split is "train" or "test" and matters
    to phantoms only (a file is its own split): the test phantoms are the same for every seed and disjoint from all
    training ones. bad takes the records that cannot be used; without it the first one is an InputError. outside:
    --allow-outside, see picture_path. clip: --clip-boxes, see load_jsonl. knowledge: a knowledge.Knowledge, put around
    the queries unless it is for training only and the split is "test".
    """
    bad = bad or BadRecords()
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    series = (seed, 0, TRAIN_PHANTOMS) if split == "train" else (TEST_SEED, TEST_START, TEST_PHANTOMS)
    samples = []
    for part, weight in parts_of(spec):
        name, colon, kind = part.partition(":")
        if name == "phantoms":
            some = phantom_samples(kind if colon else None, *series, tasks=tasks)
        else:
            some = load_jsonl(part, tasks, bad, outside=outside, clip=clip)
        samples += some if weight is None else [dataclasses.replace(sample, weight=weight) for sample in some]
    if knowledge is None or (split == "test" and knowledge.shown.used == "train"):
        return samples
    return knowledge.attach(samples)


def first_of_each(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples, of several datasets as many of each as there are; all, without a limit."""
    of: dict[str, list[Sample]] = {}
    for sample in samples:
        of.setdefault(sample.dataset, []).append(sample)
    if limit is None or len(of) < 2:
        return samples[:limit]
    turns = itertools.zip_longest(*of.values())
    chosen = list(itertools.islice((sample for turn in turns for sample in turn if sample is not None), limit))
    kept = set(map(id, chosen))
    return [sample for sample in samples if id(sample) in kept]


def held_out_phantoms(spec: str) -> str:
    """What of --data has a held-out split of its own, as a spec for load_samples: its phantoms; "" if none."""
    return ",".join(part for part, _ in parts_of(spec) if part.partition(":")[0] == "phantoms")


def parts_of(spec: str, flag: str = "--data") -> list[tuple[str, float | None]]:
    """ "a.jsonl=2,phantoms" -> [("a.jsonl", 2.0), ("phantoms", None)]: what a flag names, and the weights. A file whose
    own name ends like that is a file."""
    parts = []
    for part in spec.split(","):
        name, sign, number = part.strip().rpartition("=")
        if not sign or os.path.exists(part.strip()):
            parts.append((part.strip(), None))
            continue
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 < weight < 1e9:
            raise InputError(f"{flag} {one_line(part)}: behind = stands a weight above 0")
        parts.append((name, weight))
    return parts


def phantom_samples(
    kind: str | None, seed: int, start: int, count: int, size: int = 140, tasks: Mapping[str, Any] | None = None
) -> list[Sample]:
    """Phantoms start .. start + count - 1 of the series (kind, seed), not yet drawn; kind None takes turns by index.
    They are one dataset, with one threshold, however many kinds: these differ no more than hospitals do. tasks: for the
    kinds of phantom_tasks, whose targets are known before they are drawn."""
    if kind is not None and kind not in (names := (*QUERIES, *phantom_tasks.KINDS, *phantom_clips.KINDS)):
        raise InputError(f"unknown phantom kind {kind!r}: use phantoms, or phantoms:<kind> of {', '.join(names)}")
    known: dict[str, tuple] = {}
    samples, dataset = [], f"phantoms-{kind}" if kind else "phantoms"
    for index in range(start, start + count):
        k = kind or KINDS[index % len(KINDS)]
        image, source = PhantomImage(k, seed, index, size), f"phantoms:{k} seed {seed} index {index}"
        if k in QUERIES:
            samples.append(Sample(image, QUERIES[k], None, dataset, source=source))
            continue
        if moving := k in phantom_clips.KINDS:
            fields = phantom_clips.record(k, seed, index)
            media = Clip(PhantomImage(k, seed, index, phantom_clips.SIZE), fields["fps"], fields["frames"])
            whole = Record(fields, {}, (phantom_clips.SIZE,) * 2, False, seconds=media.seconds)
        else:
            fields, media = phantom_tasks.record(k, seed, index, size), image
            whole = Record(fields, {}, (size, size), False)
        if (told := str(fields)) not in known:  # many ask the same
            task = tasks[fields["task"]]
            target = task.read(whole)
            ours = *COMMON, *CLIPS * moving, *whole.read
            extra = {name: value for name, value in fields.items() if name not in ours}
            # When it is lit is asked without the clip's length, which would give away the rate.
            query = fields["query"] if k == "clips" else task.phrase(fields["query"], target)
            known[told] = query, target, extra
        query, target, extra = known[told]
        samples.append(Sample(media, query, target, dataset, fields["task"], source, extra=extra))
    return samples


def load_jsonl(
    path: str | Path,
    tasks: Mapping[str, Any],
    bad: BadRecords | None = None,
    images: Path | None = None,
    outside: bool = False,
    clip: bool = False,
) -> list[Sample]:
    """Read a file of records; image paths are relative to its folder or to images, boxes are in the original frame.

    Ours, one per line:   {"image", "query", "bbox": [x1, y1, x2, y2], "width"?, "height"?, "dataset"?, "task"?}
    Ours, of clips:       {"frames": ["f/1.jpg", ...], "fps", ...} or {"video", "fps", "start"?, "end"?, ...}
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
                sample, cut = _sample(record, tasks, images or path.parent, path.stem, source, outside, clip)
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


def _sample(
    record: Any, tasks: Mapping[str, Any], folder: Path, name: str, source: str, outside: bool, clip: bool
) -> tuple[Sample, bool]:
    """The record of a file called name, whose image path is relative to folder; and whether its box was cut."""
    if isinstance(record, bytes):
        if len(record) > MAX_LINE:
            raise InputError(f"the line is longer than {MAX_LINE} bytes; write one JSON object per line")
        record = _parse(record.rstrip(b"\r\n"), "write one JSON object per line")
    if not isinstance(record, dict):
        raise InputError(f"a record must be a JSON object with image, query and a target, not {short(record)}")
    names = {name: name for name in record} | {"query": "query"}
    task = check_text(record.get("task", "box"), "task")
    if task not in tasks:
        raise InputError(f"field 'task' is {short(task)}; there are {', '.join(tasks)}")
    field = tasks[task].field
    if "conversations" in record:  # VLM-R1's
        turns = record["conversations"]
        if not isinstance(turns, list) or [isinstance(t, dict) and "value" in t for t in turns] != [True, True]:
            raise InputError("field 'conversations' must be a question and an answer, each an object with a 'value'")
        record = record | {"query": turns[0]["value"]} | ({field: turns[1]["value"]} if field else {})
        names |= {"query": "conversations[0].value", field: "conversations[1].value"}
    elif "problem" in record:  # VLM-R1's older one
        record = record | {"query": record["problem"]} | ({field: _required(record, "solution")} if field else {})
        names |= {"query": "problem", field: "solution"}
    query = check_text(_required(record, "query"), names["query"])
    if names["query"] != "query":  # without VLM-R1's marker, and of its usual question the phrase alone
        query = query.replace("<image>", "").replace("<video>", "").strip()
        before, after = REC_QUESTION.split("{query}")
        query = check_text(
            query.removeprefix(before).removesuffix(after) if query.startswith(before) else query, names["query"]
        )
        if field and isinstance(record[field], str):
            record[field] = re.sub(r"</?answer>", "", record[field])
            if field in ("bbox", "boxes"):
                with named(f"field {names[field]!r} {short(record[field])}"):
                    record[field] = _parse(record[field], "write [x1, y1, x2, y2]")

    if len(given := [field for field in MEDIA if field in record]) > 1:
        raise InputError(f"fields {given[0]!r} and {given[1]!r} are both there; a record has one of {', '.join(MEDIA)}")
    media, size = {"frames": _frames, "video": _video}.get("".join(given), _image)(record, folder, outside)
    seconds, known = (media.seconds, CLIPS) if isinstance(media, Clip) else (None, ())
    dataset = check_text(record.get("dataset") or name, "dataset")
    whole = Record(record, names, size, clip, seconds=seconds)
    target = tasks[task].read(whole)
    query = check_text(tasks[task].phrase(query, target), names["query"])
    extra = {name: value for name, value in record.items() if name not in (*COMMON, *known, *whole.read)}
    asked = dict(size=size, query_field=names["query"], mark=whole.mark, extra=extra)
    return Sample(media, query, target, dataset, task, source, **asked), whole.cut


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
    image = _file(_required(record, "image"), "image", folder, outside)
    with named("field 'image'"):
        size = displayed_size(image)
    _check_stated(record, size, short(record["image"]))
    return image, size


def _frames(record: dict, folder: Path, outside: bool) -> tuple[Clip, tuple[int, int]]:
    """The clip of a record's frames and their one size: of each the header is read."""
    names, fps = record["frames"], _rate(record)
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_FRAMES:
        count = f"{len(names)} of them" if isinstance(names, list) else short(names)
        raise InputError(f"field 'frames' must be a list of 1 to {MOST_FRAMES} pictures, not {count}")
    frames = tuple(_file(name, f"frames[{i}]", folder, outside) for i, name in enumerate(names))
    size = None
    for i, frame in enumerate(frames):
        with named(f"field 'frames[{i}]'"):
            its = displayed_size(frame)
            if its != (size := size or its):
                first = f"the first is {size[0]}x{size[1]}"
                raise InputError(f"{short(names[i])} is {its[0]}x{its[1]} as displayed, {first}; give all one size")
    _check_stated(record, size, short(names[0]))
    return Clip(frames, fps, len(frames)), size


def _video(record: dict, folder: Path, outside: bool) -> tuple[Clip, tuple[int, int]]:
    """The clip of a part of a record's video file, and the size of its frames as displayed."""
    path, fps = _file(record["video"], "video", folder, outside), _rate(record)
    with named("field 'video'"):
        size, seconds = film_header(path)
    start, end = record.get("start", 0.0), record.get("end", seconds)
    if end is None:
        raise InputError(f"field 'end' is missing, and {short(record['video'])} does not say how long it is; add it")
    for field, value in (("start", start), ("end", end)):
        if type(value) not in (int, float) or not 0 <= value < 1e9:
            raise InputError(f"field {field!r} must be seconds from the video's beginning, not {short(value)}")
    if not start < end:
        raise InputError(
            f"fields 'start' and 'end' say {start:g} to {end:g} seconds, which is nothing; write start < end"
        )
    count = frames_between(start, end, fps)
    if seconds is not None and start + (count - 1) / fps >= seconds:
        raise InputError(
            f"a frame at {start + (count - 1) / fps:g} seconds is asked for, but the video ends at {seconds:.2f}"
        )
    if count > MOST_FRAMES:
        raise InputError(f"{count} frames from {start:g} to {end:g} seconds are more than {MOST_FRAMES}; lower 'fps'")
    _check_stated(record, size, short(record["video"]))
    return Clip(Film(path, float(start), float(end)), fps, count), size


def _rate(record: dict) -> float:
    """A clip's fps. Nothing stands in for it: it is all that the policy knows of time."""
    fps = _required(record, "fps")
    if type(fps) not in (int, float) or not 1e-3 <= fps <= 1e3:  # NaN is refused too
        raise InputError(f"field 'fps' must be frames per second, .001 to 1000, not {short(fps)}")
    return float(fps)


def _file(name: Any, field: str, folder: Path, outside: bool) -> Path:
    path = picture_path(folder, check_text(name, field), field, outside)
    if not os.path.isfile(path):  # unlike Path.is_file, False also for names that no file can have
        where = f"paths are relative to {one_line(folder)}"
        raise InputError(f"field {field!r} names {short(name)}, which is not a file; {where}")
    return path


def _check_stated(record: dict, size: tuple[int, int], shown: str) -> None:
    """Hold a size that the record states against that of its picture."""
    if "width" in record or "height" in record:
        stated = _required(record, "width"), _required(record, "height")
        if not all(type(side) is int and 0 < side < 1e9 for side in stated):
            raise InputError(f"fields 'width' and 'height' must be positive integers, not {short(stated)}")
        if stated != size:
            raise InputError(
                f"fields 'width' and 'height' say {stated[0]}x{stated[1]}, but {shown} is {size[0]}x{size[1]} as "
                "displayed (after EXIF rotation): the box is in another frame; give size and box as displayed"
            )


def _required(record: dict, field: str) -> Any:
    if field not in record:
        raise InputError(f"field {field!r} is missing, add it; the record has {short(list(record))}")
    return record[field]


def check_text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"field {field!r} must be a non-empty string, not {short(value)}")
    if len(value) > MAX_TEXT:
        raise InputError(f"field {field!r} has {len(value)} characters; shorten it to at most {MAX_TEXT}")
    if re.search(HALF, value):
        raise InputError(f"field {field!r} {short(value)} holds half a surrogate pair; write the whole character")
    return value.strip()
