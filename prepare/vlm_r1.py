"""VLM-R1's records (JSONL or JSON list, github.com/om-ai-lab/VLM-R1) -> our JSONL, checked and split.

    python -m prepare.vlm_r1 --source rec.jsonl --images coco --out data --val 0.05

Training reads such files as they are where image paths start at the file. This is for those whose paths start elsewhere
(VLM-R1's --image_folders), and for splits. Questions lose VLM-R1's frame around the phrase; boxes are pixels of the
picture as displayed.
"""

from pathlib import Path

import errors
from data import load_jsonl
from prepare import common
from prepare.common import Entry
from tasks import TASKS

BOXES = {"box": TASKS["box"]}  # records of another task are faults


def read(args, report) -> list[Entry]:
    images = Path(args.images) if args.images else None
    samples = load_jsonl(args.source, BOXES, report.bad, images, args.allow_outside, args.clip_boxes)
    return [Entry(Path(s.media).absolute(), s.source, s.query, s.target, size=s.size) for s in samples]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("vlm_r1", __doc__, query=None)
    parser.add_argument("--images", help="folder that image paths are relative to; default: the file's")
    parser.add_argument("--allow-outside", action="store_true", help="paths may lead out of that folder")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
