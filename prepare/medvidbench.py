"""MedVidBench (Su et al., MedGRPO, arXiv 2512.06581), its JSON as released -> records of clips.

    python -m prepare.medvidbench --source MedVidU_TrainVal.json --images frames --val 0.1 --overlay sheet.png
    python -m prepare.medvidbench --source cleaned_test_data_11_04.json --images frames
    python eval.py --model FOLDER --data questions-test.jsonl --submission submission.json

All eleven qa_types are read; tal becomes the task span, stg the task tube, the others are counted and left out. Paths
of frames are those of the authors' machine: each is looked for below --images (default: the file's folder), with ever
fewer of its folders. Records without an answer, as of the test set, go to questions-SPLIT.jsonl, which eval.py
--submission takes. A video, by its metadata's video_id, stays in one split.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import errors
from clips import MOST_FRAMES
from errors import InputError, named, one_line, read_json, short
from prepare import common, footage, layout
from prepare.common import Report
from prepare.footage import QUESTIONS, Take
from tasks.span import SLACK, parse_spans
from tasks.tube import parse_tube

MOST_BYTES = 2**32  # of the file, which lists every frame
STARTS = ("input_video_start_frame", "input_video_start_time", "start_frame")  # each source's own; the ends likewise
EVERY = re.compile(r"from (\d+(?:\.\d+)?) to (\d+(?:\.\d+)?) seconds.*?every (\d+(?:\.\d+)?)? ?seconds?", re.DOTALL)


def part(record: dict, field: str, kind: type, what: str) -> Any:
    value = record.get(field)
    if not isinstance(value, kind):
        raise InputError(f"field {field!r} must be {what}, not {short(value)}; restore it")
    return value


def infos(record: dict) -> list[dict]:
    """struc_info, one object or a list of them; none in the test set."""
    value = record.get("struc_info") or []
    value = value if isinstance(value, list) else [value]
    if not all(isinstance(info, dict) for info in value):
        raise InputError(f"field 'struc_info' must hold objects, not {short(record['struc_info'])}")
    return value


def spans(record: dict, told: str | None, seconds: float, note: Callable) -> dict:
    """tal -> the fields of a span. told: the answer's text, if there is one; note(reason): counts."""
    found = []
    for info in infos(record):
        for span in part(info, "spans", list, "a list") if "spans" in info else []:
            try:
                found.append([float(span["start"]), float(span["end"])])
            except (TypeError, KeyError, ValueError) as error:
                raise InputError(f"field 'struc_info': {short(span)} is no span with start and end") from error
    if not found and told is not None:
        read, reason = parse_spans(told, float("inf"))
        if read is None:
            raise InputError(f"its answer {short(told)} cannot be read: {reason}")
        found = [list(span) for span in read]
    if not found:
        return {"task": "span"}
    cut = [[start, min(end, seconds)] for start, end in found]
    if any(end > seconds + SLACK for _, end in found):
        note("a span was cut at the clip's end")
    once = [span for i, span in enumerate(cut) if span not in cut[:i]]
    if len(once) < len(cut):
        note("the same span again was left out")
    return {"task": "span", "segments": once}


def tube(record: dict, told: str | None, seconds: float, note: Callable) -> dict:
    """stg -> the fields of a tube; without an answer, the seconds that the question names."""
    if len(infos(record)) > 1:
        note("of several objects in 'struc_info' the first was taken")
    for info in infos(record)[:1]:
        boxes = info.get("bbox_dict", info)
        if not isinstance(boxes, dict):
            raise InputError(f"field 'struc_info': 'bbox_dict' must be an object, not {short(boxes)}")
        try:
            found = [(f"{float(stamp):.1f}", box) for stamp, box in boxes.items()]
        except ValueError as error:
            raise InputError(f"field 'struc_info': {short(list(boxes))} are no seconds") from error
        if len(dict(found)) < len(found):
            raise InputError(f"field 'struc_info': a second is there twice, to one decimal, in {short(list(boxes))}")
        if found:
            return {"task": "tube", "tube": dict(found)}
    if told is not None:
        read, reason = parse_tube(told, float("inf"))
        if read is None:
            raise InputError(f"its answer {short(told)} cannot be read: {reason}")
        return {"task": "tube", "tube": {stamp: list(box) for stamp, box in read.items()}}
    asked = EVERY.search(question(record))
    if not asked:
        raise InputError("has no answer, and its question does not say at which seconds: from A to B, every N seconds")
    start, end, every = float(asked[1]), float(asked[2]), float(asked[3] or 1)
    if not 0 < every or not (end - start) / every <= 1000:  # NaN is refused too
        raise InputError(f"its question asks for too many seconds: {short(asked[0])}")
    return {
        "task": "tube",
        "seconds": [round(start + i * every, 3) for i in range(int((end - start) / every + 1e-6) + 1)],
    }


CONVERTERS: dict[str, Callable | None] = {  # qa_type -> its converter; None: not converted
    "tal": spans,
    "stg": tube,
    "next_action": None,
    "dense_captioning_gpt": None,
    "dense_captioning_gemini": None,
    "video_summary_gpt": None,
    "video_summary_gemini": None,
    "region_caption_gpt": None,
    "region_caption_gemini": None,
    "skill_assessment": None,
    "cvs_assessment": None,
}


def turn(record: dict, speakers: tuple[str, ...]) -> str | None:
    """What one of them says first."""
    for said in part(record, "conversations", list, "a list of turns"):
        if isinstance(said, dict) and said.get("from") in speakers:
            return part(said, "value", str, "a text")
    return None


def question(record: dict) -> str:
    text = turn(record, ("human", "user"))
    if text is None:
        raise InputError("field 'conversations' has no turn from 'human'; restore it")
    return text.replace("<video>", "").strip()


def frames_below(home: Path, names: list) -> list[Path]:
    """Where frames lie that have paths of another machine: below home, under as many of their folders as there are."""
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"field 'video' must be a list of frames, not {short(names)}")
    paths = [PurePosixPath(name.replace("\\", "/")) for name in names]
    parts = [[p for p in path.parts if p not in (path.root, "..")] for path in paths]  # a root may be // too
    for skipped in range(len(parts[0])):
        if os.path.isfile(home / Path(*parts[0][skipped:])):  # unlike Path.is_file, False for a name that is too long
            return [home / Path(*some[skipped:]) for some in parts]
    raise InputError(f"field 'video': {one_line(names[0])} is not below {home}; name the frames' folder by --images")


def identity(record: dict, metadata: dict, fps: str) -> str:
    """What the leaderboard calls it."""
    if isinstance(own := record.get("id"), str) and "&&" in own:
        return own
    start = next((name for name in STARTS if name in metadata), STARTS[0])
    ends = (metadata.get(name, "") for name in (start, start.replace("start", "end")))
    return "&&".join(map(str, (metadata["video_id"], *ends, fps)))


def take(record: Any, where: str, split: str, home: Path, report: Report) -> Take | None:
    """The record of a row; None if its kind is not converted."""
    if not isinstance(record, dict):
        raise InputError(f"must be an object, not {short(record)}")
    kind = record.get("qa_type")
    if not isinstance(kind, str) or kind not in CONVERTERS:
        raise InputError(f"field 'qa_type' is {short(kind)}; there are {', '.join(CONVERTERS)}")
    if CONVERTERS[kind] is None:
        report.note(f"left out, {kind} is not converted", where)
        return None
    metadata = part(record, "metadata", dict, "an object")
    fps, video = str(metadata.get("fps")), part(metadata, "video_id", str, "a text")
    try:
        rate = float(fps)
    except ValueError:
        rate = 0.0
    if not 1e-3 <= rate <= 1e3:
        raise InputError(f"field 'metadata': 'fps' must be frames per second, not {short(metadata.get('fps'))}")
    names = part(record, "video", list, "a list of frames")
    if len(names) > MOST_FRAMES:
        report.note(f"left out, more than {MOST_FRAMES} frames", where)
        return None
    frames, told = frames_below(home, names), turn(record, ("gpt", "assistant"))
    fields = CONVERTERS[kind](record, told, len(frames) / rate, lambda reason: report.note(reason, where))
    known = "segments" in fields or "tube" in fields
    made = {"frames": frames, "fps": rate, "query": question(record)} | fields
    made |= {"id": identity(record, metadata, fps), "qa_type": kind}
    if isinstance(record.get("data_source"), str) and record["data_source"].strip():
        made["dataset"] = record["data_source"]
    return Take(Path(video), where, split=split, group=video, record=made, kind=fields["task"] if known else QUESTIONS)


def read(args, report: Report, images: Path | None) -> list[Take]:
    if not args.source.is_file():
        raise InputError(f"--source {args.source}: must be the JSON file, not a folder")
    rows = read_json(args.source, most=MOST_BYTES)
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise InputError(f"{args.source}: must hold a list of records, not {short(rows)}")
    home = images or args.source.parent
    split, takes = layout.split_of(args.source.stem), []
    for i, record in enumerate(rows, 1):
        where = f"{args.source} record {i}"
        try:
            with named(where):
                made = take(record, where, split, home, report)
        except InputError as error:
            report.bad.add(where, error)
        else:
            takes += [made] if made else []
    return takes


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("medvidbench", __doc__, query=None, boxes=False)
    parser.add_argument("--images", help="folder that the frames lie below; default: the file's")
    parser.add_argument("--clip-boxes", action="store_true", help="cut boxes that reach over the edge, and count them")
    args = parser.parse_args(argv)
    footage.convert(args, partial(read, images=args.images and Path(args.images).resolve()))


if __name__ == "__main__":
    errors.run(main)
