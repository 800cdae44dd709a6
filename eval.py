"""Greedy answers -> A@t, pmAP, mIoU, and pictures to look at.

    python eval.py --model FOLDER --data val.jsonl --train train.jsonl --out out-eval
    python eval.py --predictions answers.jsonl --data val.jsonl --out out-eval        answers of another model
    python eval.py --model FOLDER --image a.png --query "the skin lesion"             a box in original pixels

Writes eval.json, predictions.jsonl and sheet.png (best, median, worst answers) into --out.

Metrics are MedLoc-R1's: A@t = share of samples whose one greedy box has IoU >= t; pmAP = mean of A@t over t = .50, .55
... .95; mIoU = mean IoU. IoU is taken in the frame of the original image. An answer without a box has IoU 0 and counts.
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import argparse
import json
import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
import hub
import ranks
import rewards
import stop
from data import (
    BadRecords,
    Box,
    ImageConfig,
    Prompt,
    Sample,
    View,
    build_prompt,
    check_prompt,
    check_query,
    check_style,
    load,
    load_samples,
    load_tokenizer,
    prompt_style,
)
from errors import InputError, named, one_line, parse_json, read_text, short
from images import PIXEL_LIMIT
from model import Policy, collate
from ranks import check_device
from scheduler import hit
from weights import load_policy, read_json, save_policy

NANO = Path(__file__).parent / "assets" / "nano"
PROMPT_FILE = "medloc.json"  # in a checkpoint folder of ours: which prompt the policy is used to, by name or in full
THRESHOLDS = [round(0.5 + 0.05 * i, 2) for i in range(10)]  # of pmAP


class Task:
    """A policy together with what turns samples into its prompts and its tokens into text."""

    def __init__(
        self,
        policy: Policy,
        folder: Path,
        prompt: str,  # a `style` of data.prompt_style
        max_prompt_tokens: int | None = None,
        max_pixels: int | None = None,  # of the model frame; None: what the folder says
    ):
        self.policy, self.style, self.max_prompt_tokens = policy, prompt, max_prompt_tokens
        self.tokenizer = load_tokenizer(folder)
        self.image_config = ImageConfig.from_folder(folder, max_pixels=max_pixels)

    def prompt(self, sample: Sample, view: View | InputError | None = None) -> Prompt:
        """view: of its picture, as pipeline.Readers gave it; without, the picture is read here."""
        return build_prompt(sample, self.tokenizer, self.image_config, self.style, self.max_prompt_tokens, view)

    def usable(self, samples: list[Sample], bad: BadRecords, decode: bool = False) -> list[Sample]:
        """The samples that prompt() accepts, found without decoding their pictures unless asked to; `bad` takes the
        others, or ends the run."""
        kept, known = [], set()  # phantoms ask one question of one size twenty thousand times
        for sample in samples:
            key = (sample.query, sample.size)
            try:
                if key not in known or (decode and sample.size):
                    arguments = self.tokenizer, self.image_config, self.style, self.max_prompt_tokens
                    check_prompt(sample, *arguments, decode=decode)
            except InputError as error:
                bad.add(sample.source, error)
            else:
                known.add(key)
                kept.append(sample)
        if samples and not kept:
            raise InputError(
                f"none of {len(samples)} records can be used; the first: {bad.sentences[samples[0].source]}"
            )
        return kept

    def texts(self, ids: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        """ids (N, T), lengths (N,) -> N texts, special tokens such as the final EOS left out."""
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """The policy's Hugging Face folder, the prompt that it is used to, and the size of the pictures it has seen."""
        save_policy(self.policy, folder, dtype)
        if ranks.rank > 0:
            return
        self.image_config.write_max_pixels(folder)
        (folder / PROMPT_FILE).write_text(json.dumps({"prompt": self.style}) + "\n")

    def answer(self, prompts: list[Prompt], max_tokens: int) -> list[str]:
        """One greedy answer to each prompt."""
        with torch.no_grad():
            prefix = self.policy.prefix(collate(prompts, next(self.policy.parameters()).device))
            completions = self.policy.generate(prefix, 1, max_tokens)
        return self.texts(completions.ids[:, 0], completions.lengths[:, 0])


def model_folder(model: str, weights: bool = True) -> Path:
    """--model: a checkpoint folder, "nano" for the policy that comes with this repository, or org/name of the Hub, from
    which weights come only if they are wanted."""
    if model == "nano":
        return NANO
    return hub.fetch(model, weights) if hub.is_name(model) else Path(model)


def default_prompt(folder: Path) -> str:
    """The prompt a policy was trained with, if its folder says so (the nano one's does); else the paper's, think."""
    file = folder / PROMPT_FILE
    style = read_json(file).get("prompt") if os.path.lexists(file) else "think"
    with named(f"{one_line(file)}: field 'prompt'"):
        if not isinstance(style, str):
            raise InputError(f"must be a string, not {short(style)}")
        return check_style(style)


def evaluate(
    task: Task, samples: list[Sample], batch_size: int, max_tokens: int, progress: str | None = None
) -> tuple[dict, list[dict]]:
    """Greedy answers to all samples -> (metrics, one row per sample: source, text, box, target, iou, reason).

    Of several ranks each answers its share of the samples, and all get all rows. stop.Stopped if one was asked to.
    """

    def share() -> list[dict] | None:
        mine, rows = samples[ranks.rank :: ranks.size], []
        silent = progress is None or ranks.rank > 0
        for start in tqdm(range(0, len(mine), batch_size), desc=progress, disable=silent, leave=False):
            if stop.asked:
                break
            batch = mine[start : start + batch_size]
            prompts = [task.prompt(sample) for sample in batch]
            texts = task.answer(prompts, max_tokens)
            rows += score_rows(batch, texts, [p.box for p in prompts], [p.scale for p in prompts])
        return None if stop.asked else rows

    shares = ranks.everyone(share)
    if None in shares:
        raise stop.Stopped
    rows = [shares[i % ranks.size][i // ranks.size] for i in range(len(samples))]
    return metrics(rows), rows


def score_rows(samples: list[Sample], texts: list[str], targets: list[Box], scales: list) -> list[dict]:
    """targets in original pixels; scales as Prompt.scale, (1, 1) for answers that already are in original pixels."""
    scores = rewards.score(texts, torch.tensor(targets), torch.tensor(scales))
    return [
        {
            "source": sample.source,
            "dataset": sample.dataset,
            "text": text,
            "box": [round(v, 3) for v in scores.boxes[i].tolist()] if scores.valid[i] else None,
            "target": list(target),
            "iou": scores.iou[i].item(),
            "reason": scores.reasons[i],
        }
        for i, (sample, text, target) in enumerate(zip(samples, texts, targets, strict=True))
    ]


def metrics(rows: list[dict]) -> dict:
    """The paper's metrics over rows with "iou", "dataset" and "reason"; per dataset if there are several."""

    def over(rows: list[dict]) -> dict:
        ious = [row["iou"] for row in rows]
        n = len(ious)
        mean = sum(ious) / n
        spread = math.sqrt(sum((u - mean) ** 2 for u in ious) / max(n - 1, 1) / n)
        accuracy = {t: sum(hit(u, t) for u in ious) / n for t in (0.3, 0.8, *THRESHOLDS)}
        values = {"miou": mean, "miou_standard_error": spread} | {f"acc@{t}": accuracy[t] for t in (0.3, 0.5, 0.8)}
        values |= {"pmap": sum(accuracy[t] for t in THRESHOLDS) / len(THRESHOLDS)}
        values = {key: round(value, 6) for key, value in values.items()}
        return values | {"n": n, "parse_failures": sum(row["reason"] != "" for row in rows)}

    datasets = defaultdict(list)
    for row in rows:
        datasets[row["dataset"]].append(row)
    return over(rows) | {"datasets": {name: over(group) for name, group in sorted(datasets.items())}}


def constant_box(train: list[Sample], samples: list[Sample]) -> dict:
    """The row to beat: one box for every picture, the median of the training boxes as shares of width and height."""
    shares = []
    for sample in train:
        image, box = load(sample)
        shares.append([box[0] / image.width, box[1] / image.height, box[2] / image.width, box[3] / image.height])
    median = torch.tensor(shares).quantile(0.5, dim=0)  # (4,)
    texts, targets = [], []
    for sample in samples:
        image, box = load(sample)
        size = torch.tensor([image.width, image.height] * 2)
        texts.append(str((median * size).tolist()))
        targets.append(box)
    result = metrics(score_rows(samples, texts, targets, [(1.0, 1.0)] * len(samples)))
    return {"box_as_shares": [round(v, 4) for v in median.tolist()]} | result


def summary(name: str, m: dict) -> str:
    return (
        f"{one_line(name)}: mIoU {m['miou']:.3f} +- {m['miou_standard_error']:.3f}  A@.5 {m['acc@0.5']:.3f}  "
        f"A@.8 {m['acc@0.8']:.3f}  pmAP {m['pmap']:.3f}  n {m['n']}  without a box {m['parse_failures']}"
    )


# ------------------------------------------------------------------------------------------------------------ pictures

TRUTH, ANSWER = (40, 220, 90), (255, 70, 60)  # colours: ground truth, answers


def overlay(sample: Sample, boxes: list[Box | None], caption: str, side: int = 280, truth: bool = True) -> Image.Image:
    """The picture scaled to `side` pixels of width, ground truth in green, answers in red; boxes in original pixels."""
    image, target = load(sample)
    scale = side / image.width
    canvas = image.resize((side, max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for box in boxes:
        if box is not None:
            x1, y1, x2, y2 = (max(-10 * side, min(10 * side, v * scale)) for v in box)
            draw.rectangle(
                (x1, y1, x2 - 1, y2 - 1) if x2 - 1 > x1 and y2 - 1 > y1 else (x1, y1, x2, y2), outline=ANSWER
            )
    if truth:
        draw.rectangle([v * scale - (i > 1) for i, v in enumerate(target)], outline=TRUTH, width=2)
    framed = Image.new("RGB", (side, canvas.height + 16), "white")
    framed.paste(canvas, (0, 16))
    ImageDraw.Draw(framed).text((2, 2), caption, fill="black")
    return framed


def sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles of one width, row by row."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    canvas = Image.new("RGB", (columns * (tiles[0].width + 6), sum(heights) + 6 * len(rows)), "white")
    y = 0
    for row, height in zip(rows, heights, strict=True):
        for x, tile in enumerate(row):
            canvas.paste(tile, (x * (tile.width + 6), y))
        y += height + 6
    return canvas


def contact_sheet(samples: list[Sample], rows: list[dict], each: int = 4) -> Image.Image:
    """The best, the median and the worst answers, a row of each."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["iou"])
    each = min(each, len(order))
    middle = max(0, len(order) // 2 - each // 2)
    tiles = []
    for name, part in (("best", order[:each]), ("median", order[middle : middle + each]), ("worst", order[-each:])):
        for i in part:
            tiles.append(overlay(samples[i], [rows[i]["box"]], f"{name}: IoU {rows[i]['iou']:.2f} {rows[i]['reason']}"))
    return sheet(tiles, each)


# -------------------------------------------------------------------------------------------------------- command line


def read_predictions(file: str, samples: list[Sample]) -> list[str]:
    """One JSON object per line, in the order of --data: {"text": answer} or {"box": [x1, y1, x2, y2] or null}.

    Boxes are in ORIGINAL pixels: another model's frame is its own business.
    """
    texts, remedy = [], 'write {"text": answer} or {"box": [x1, y1, x2, y2] or null} into each line'
    lines = [line for line in read_text(file, remedy).split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        place = f"{one_line(file)}:{number}"
        record = parse_json(line, place, remedy)
        if not isinstance(record, dict) or not ("box" in record or isinstance(record.get("text"), str)):
            raise InputError(f"{place}: needs the field 'box' (original pixels, or null) or 'text'; {remedy}")
        box = record.get("box")
        if box is not None and not (isinstance(box, list) and all(type(v) in (int, float) for v in box)):
            raise InputError(f"{place}: field 'box' must be four numbers or null, not {short(box)}; {remedy}")
        texts.append(json.dumps(box) if "box" in record else record["text"])
    if len(texts) != len(samples):
        counts = f"has {len(texts)} answers for {len(samples)} samples"
        raise InputError(f"{one_line(file)}: {counts}; they are matched by line")
    return texts


def parse_arguments() -> argparse.Namespace:
    parser = errors.Parser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="checkpoint folder, nano, or org/name of the Hugging Face Hub")
    parser.add_argument("--data", default="phantoms", help="JSONL files, or phantoms[:dermoscopy|xray|ultrasound]")
    parser.add_argument("--train", help="training data: adds the row of the constant box, the median of its boxes")
    parser.add_argument("--predictions", help="score these answers instead of running a model")
    parser.add_argument("--image", help="ask about one picture; prints the answer, writes overlay.png")
    parser.add_argument("--query", help="with --image: what to look for")
    parser.add_argument("--out", default="out-eval", help="folder for eval.json, predictions.jsonl, sheet.png")
    parser.add_argument(
        "--prompt",
        type=prompt_style,
        help="answer, think, qwen or a text file with {query} in it; default: the one it was trained with, else think",
    )
    parser.add_argument("--queries", help="JSON file: what the records call it -> the phrase to ask with, or several")
    parser.add_argument("--max-tokens", type=int, help="of an answer; default 24 for the prompt 'answer', else 512")
    outside = "records may name pictures outside the folder of their file"
    parser.add_argument("--allow-outside", action="store_true", help=outside)
    parser.add_argument("--clip", action="store_true", help="cut boxes that reach over the picture's edge")
    limit = "pixels of the largest picture file that is opened"
    parser.add_argument("--pixel-limit", type=int, default=PIXEL_LIMIT, help=limit)
    parser.add_argument("--limit", type=int, help="evaluate the first N samples")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if (args.image is None) != (args.query is None):
        parser.error("--image and --query go together")
    if args.query is not None:
        with named("--query"):
            args.query = check_query(args.query)
    if args.image and args.queries:
        parser.error("--queries changes nothing beside --query; drop it")
    for sentence in config.out_of_bounds(args):
        parser.error(sentence)
    check_device(args.device)
    return args


def make_task(args: argparse.Namespace) -> Task:
    folder = model_folder(args.model)
    policy = load_policy(folder, args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    policy.compute_dtype = next(policy.parameters()).dtype
    args.prompt = args.prompt or default_prompt(folder)
    args.max_tokens = args.max_tokens or (24 if args.prompt == "answer" else 512)
    room = policy.config.max_position_embeddings - args.max_tokens
    if room < 1:
        raise InputError(
            f"--max-tokens {args.max_tokens}: the model has {policy.config.max_position_embeddings} positions"
        )
    return Task(policy, folder, args.prompt, room)


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    os.makedirs(out, exist_ok=True)
    Image.MAX_IMAGE_PIXELS = args.pixel_limit
    if args.image:
        task = make_task(args)
        # The box is unknown; a sample needs one, and the whole picture is the only honest stand-in.
        sample = Sample(Path(args.image), args.query, (0.0, 0.0, 1.0, 1.0), "image", source=one_line(args.image))
        prompt = task.prompt(sample)
        (text,) = task.answer([prompt], args.max_tokens)
        (row,) = score_rows([sample], [text], [prompt.box], [prompt.scale])
        print(repr(text)[1:-1])  # as long as --max-tokens lets it be, but one line of printable characters
        print(f"box in original pixels: {row['box'] or 'none: ' + row['reason']}")
        overlay(sample, [row["box"]], args.query, truth=False).save(out / "overlay.png")
        return

    def read(spec: str, split: str, queries: str | None = None) -> list[Sample]:
        bad = BadRecords()
        samples = load_samples(spec, 0, split, bad, queries, args.allow_outside, args.clip)
        for line in bad.lines():
            print(line)
        return samples

    samples = read(args.data, "test", args.queries)[: args.limit]
    if args.predictions:
        boxes = [load(sample)[1] for sample in samples]
        rows = score_rows(samples, read_predictions(args.predictions, samples), boxes, [(1.0, 1.0)] * len(samples))
        result = metrics(rows)
    else:
        result, rows = evaluate(make_task(args), samples, args.batch_size, args.max_tokens, progress="evaluation")
    print(summary(args.predictions or args.model, result))
    for name, part in result["datasets"].items():
        print(summary(f"  {name}", part))
    if reasons := Counter(row["reason"] for row in rows if row["reason"]):
        print("answers without a box: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()))
    if args.train:
        result["constant_box"] = constant_box(read(args.train, "train"), samples)
        print(summary("constant box", result["constant_box"]))
    (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    contact_sheet(samples, rows).save(out / "sheet.png")


if __name__ == "__main__":
    errors.run(main, "lower --batch-size or --max-tokens")
