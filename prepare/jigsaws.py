"""JIGSAWS, robotic suturing on a bench (Gao et al., M2CAI 2014), its gestures -> records of clips.

    python -m prepare.jigsaws --source JIGSAWS --length 60 --fps 1

{Suturing,Knot_Tying,Needle_Passing}/transcriptions/Suturing_B001.txt has a line "start end G1" a gesture, in frames at
30 a second; video/Suturing_B001_capture1.avi is the film, or a folder of that name without .avi has all its frames as
pictures. Each trial becomes windows of --length seconds; of a window comes a span a gesture, with all its times. The
set has no split: --val and --test make some by surgeon, the letter in a trial's name. Films need PyAV: pip install
"medloc-grpo[video]".
"""

import math
import re
from pathlib import Path

import errors
from errors import InputError, named, read_text, short
from prepare import common, footage, layout
from prepare.common import Report
from prepare.footage import Take

RATE = 30  # frames a second, of films and transcriptions
GESTURES = {  # as the set's paper describes them
    "G1": "reaching for the needle with the right hand",
    "G2": "positioning the needle",
    "G3": "pushing the needle through the tissue",
    "G4": "transferring the needle from left to right",
    "G5": "moving to the centre with the needle in the grip",
    "G6": "pulling the suture with the left hand",
    "G7": "pulling the suture with the right hand",
    "G8": "orienting the needle",
    "G9": "using the right hand to help tighten the suture",
    "G10": "loosening more suture",
    "G11": "dropping the suture at the end and moving to the end points",
    "G12": "reaching for the needle with the left hand",
    "G13": "making a C loop around the right hand",
    "G14": "reaching for the suture with the right hand",
    "G15": "pulling the suture with both hands",
}


def gestures(path: Path) -> dict[str, list[footage.Seconds]]:
    """Description -> its times in seconds. Frames are counted from 1, and the last one is inside."""
    found: dict[str, list[footage.Seconds]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\d{1,7})\s+(\d{1,7})\s+(G\d{1,2})\s*", line)
        if not match or match[3] not in GESTURES or int(match[2]) < int(match[1]):
            raise InputError(f"{path}:{number}: {short(line)} is no 'start end G1' to G15; correct the line")
        times = max(int(match[1]) - 1, 0) / RATE, int(match[2]) / RATE
        found.setdefault(GESTURES[match[3]], []).append(times)
    if not found:
        raise InputError(f"{path}: has no gesture; restore it")
    return found


def media(folder: Path, trial: str, window: footage.Seconds, args) -> dict:
    """The fields of a window's clip."""
    name, (start, end) = f"{trial}_capture{args.camera}", window
    if (film := folder / "video" / f"{name}.avi").is_file():
        return {"video": film, "fps": args.fps, "start": start, "end": end}
    files = layout.files_below(folder / "video" / name, *layout.PICTURES)
    files.sort(key=lambda file: (len(file.name), file.name))  # 2.png before 10.png
    if not files:
        raise InputError(f"neither {film} nor a folder of its frames is there; unpack the video archives")
    count = math.ceil((end - start) * args.fps - 1e-6)  # as of a film
    places = [round((start + i / args.fps) * RATE) for i in range(count)]
    if places[-1] >= len(files):
        raise InputError(
            f"{folder / 'video' / name} has {len(files)} frames, number {places[-1]} is asked for; restore it"
        )
    return {"frames": [files[i] for i in places], "fps": args.fps}


def read(args, report: Report) -> list[Take]:
    files = sorted(args.source.glob("*/transcriptions/*.txt"))
    if not files:
        raise InputError(f"--source {args.source}: holds no Suturing/transcriptions/*.txt; it must be the folder above")
    takes = []
    for path in files:
        surgeon = re.search(r"_([A-Z])\d{3}$", path.stem)
        try:
            if not surgeon:
                raise InputError(f"{path}: its name must end like _B001, a surgeon and a trial")
            found = gestures(path)
            last = max(end for spans in found.values() for _, end in spans)
            some = []
            with named(path):
                for window in footage.windows(last, args.length):
                    clip, where = (
                        media(path.parent.parent, path.stem, window, args),
                        f"{path} {window[0]:g}-{window[1]:g} s",
                    )
                    for fields in footage.spans_in(found, window, "when is the surgeon {what}?", where, report):
                        source = f"{where}: {fields['query']}"
                        some.append(Take(path, source, group=surgeon[1], record=clip | fields))
        except InputError as error:
            report.bad.add(str(path), error)
        else:
            takes += some
    return takes


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("jigsaws", __doc__, query=None, boxes=False)
    parser.add_argument("--length", type=footage.seconds, default=60.0, help="seconds of a clip; default 60")
    parser.add_argument("--fps", type=footage.seconds, default=1.0, help="frames that are taken of a second; default 1")
    parser.add_argument("--camera", type=int, choices=(1, 2), default=1, help="the left one or the right one")
    parser.set_defaults(dataset="jigsaws")
    footage.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
