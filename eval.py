"""Greedy answers -> the tasks' metrics, and pictures to look at.

    python eval.py --model FOLDER --data val.jsonl --train train.jsonl --out out-eval
    python eval.py --predictions answers.jsonl --data val.jsonl --out out-eval        answers of another model
    python eval.py --model FOLDER --data test.jsonl --submission submission.json      for MedVidBench's leaderboard
    python eval.py --model FOLDER --image a.png --query "the skin lesion"             a box in original pixels

Writes eval.json, predictions.jsonl and sheet.png (best, median, worst answers) into --out. What is measured, and in
which frame, is a task's to say (for boxes tasks/box.py: mIoU, A@t, pmAP). An answer that cannot be read has u 0 and
counts.
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
import ranks
import submission
from clips import Clip
from data import BadRecords, first_of_each, load_samples
from errors import InputError, one_line, parse_json, read_text, short
from images import Sample, load, load_frames
from judge import read_judge
from knowledge import Knowledge
from model import Policy, collate
from norms import ASKED, LEAST, Quartiles, fingerprint, write_norms
from prompts import Processor, Prompt, default_prompt
from rewards import MAIN, REWARDS, other_rewards
from runtime.stream import uniforms
from tasks import TASKS, CaptionTask, by_task, configure, judged, summary, terms
from tasks.task import Scores
from weights import load_policy, model_folder


def greedy(policy: Policy, processor: Processor, prompts: list[Prompt], max_tokens: int) -> list[str]:
    """One greedy answer to each prompt."""
    with torch.no_grad():
        prefix = policy.prefix(collate(prompts, next(policy.parameters()).device))
        completions = policy.generate(prefix, 1, max_tokens)
    return processor.texts(completions.ids[:, 0], completions.lengths[:, 0])


def evaluate(
    policy: Policy,
    processor: Processor,
    samples: list[Sample],
    batch_size: int,
    max_tokens: int,
    progress: str | None = None,
) -> tuple[dict, list[dict]]:
    """Greedy answers to all samples -> (metrics, a row per sample: source, dataset, task, text, answer, target, u,
    reason).

    Of several ranks each answers its share of the samples, and all get all rows. errors.Stopped if one was asked to.
    """

    def share() -> list[dict] | None:
        mine, rows = samples[ranks.rank :: ranks.size], []
        silent = progress is None or ranks.rank > 0
        for start in tqdm(range(0, len(mine), batch_size), desc=progress, disable=silent, leave=False):
            if errors.asked_to_stop:
                break
            prompts = [processor.prompt(sample) for sample in mine[start : start + batch_size]]
            rows += score_rows(prompts, greedy(policy, processor, prompts, max_tokens))
        return None if errors.asked_to_stop else rows

    shares = ranks.gather_objects(share)
    if None in shares:
        raise errors.Stopped
    rows = [shares[i % ranks.size][i // ranks.size] for i in range(len(samples))]
    return metrics(rows), rows


class Original(NamedTuple):
    """In a prompt's place, for an answer that is in the original frame."""

    sample: Sample
    target: Any
    scale: tuple[float, float] = (1.0, 1.0)


def score_rows(prompts: list[Prompt] | list[Original], texts: list[str]) -> list[dict]:
    scores = by_task(texts, prompts)
    return [
        {
            "source": prompt.sample.source,
            "dataset": prompt.sample.dataset,
            "task": prompt.sample.task,
            "text": text,
            "answer": rounded(scores.answers[i], 3),
            "target": prompt.target,
            "u": scores.u[i].item(),
            "reason": scores.reasons[i],
        }
        | parts_of_row(scores, i, prompt.sample.task)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def parts_of_row(scores: Scores, i: int, task: str) -> dict:
    """What u is made of and more, of tasks with terms."""
    if not TASKS[task].terms:
        return {}
    values = {name: scores.parts[name][i].item() for name in TASKS[task].parts}
    return {"parts": {name: None if math.isnan(value) else value for name, value in values.items()}}


def rounded(answer: Any, digits: int) -> Any:
    """Floats, also in a list or an object, for a file that people read."""
    if isinstance(answer, dict):
        return {name: rounded(value, digits) for name, value in answer.items()}
    if isinstance(answer, list):
        return [rounded(value, digits) for value in answer]
    return round(answer, digits) if isinstance(answer, float) else answer


def metrics(rows: list[dict]) -> dict:
    """The task's metrics over rows; of several tasks one part each; per dataset too. Rows without a truth do not
    count. InputError where a judge has left out too many."""
    if judge := CaptionTask.judge:
        asked = [row for row in rows if row["task"] in judged() and row["reason"] == ""]
        judge.check(int(sum(row["parts"]["unjudged"] for row in asked)), len(asked))

    def over(rows: list[dict]) -> dict:
        tasks = defaultdict(list)
        for row in rows:
            tasks[row["task"]].append(row)
        parts = {name: {"task": name} | TASKS[name].metrics(some) for name, some in sorted(tasks.items())}
        if len(parts) == 1:
            return next(iter(parts.values()))
        whole = {name: sum(part[name] for part in parts.values()) for name in ("n", "parse_failures")}
        return whole | {"tasks": parts}

    datasets, rows = defaultdict(list), [row for row in rows if TASKS[row["task"]].known(row["target"])]
    for row in rows:
        datasets[row["dataset"]].append(row)
    return over(rows) | {"datasets": {name: over(group) for name, group in sorted(datasets.items())}}


def sized(sample: Sample) -> tuple[tuple[int, int], Any]:
    """The size of a sample's picture and its target; looked at only where they are not known without."""
    if sample.target is not None and sample.displayed:
        return sample.displayed, sample.target
    image, target = load(sample)
    return image.size, target


def constant(train: list[Sample], samples: list[Sample]) -> dict:
    """The row to beat: one answer for every picture, as the task makes it of the training targets."""
    answers = {}
    for name in {sample.task for sample in samples}:
        answers[name] = TASKS[name].constant([sized(sample) for sample in train if sample.task == name])
    originals, texts = [], []
    for sample in samples:
        size, target = sized(sample)
        originals.append(Original(sample, target))
        texts.append(answers[sample.task](size, target))
    return metrics(score_rows(originals, texts))


# ------------------------------------------------------------------------------------------------------------ pictures


FRAMES = 4  # of a clip, side by side


def overlay(sample: Sample, answers: list[Any], caption: str, side: int = 280, truth: bool = True) -> Image.Image:
    """The picture scaled to `side` pixels of width, with target and answers (original frame) as the task draws them; of
    a clip some frames side by side (Task.moments)."""
    if isinstance(sample.media, Clip):
        target, every = sample.target, load_frames(sample)
        last, fps, few = len(every) - 1, sample.media.fps, min(len(every), FRAMES)
        chosen = [min(round(moment * fps), last) for moment in TASKS[sample.task].moments(target)]
        images = [every[i] for i in chosen or [i * last // max(few - 1, 1) for i in range(few)]]
    else:
        image, target = load(sample)
        images = [image]
    width = side // len(images)
    scale = width / images[0].width
    size = width, max(1, round(images[0].height * scale))
    canvas = Image.new("RGB", (width * len(images), size[1] + TASKS[sample.task].bar * (1 + len(answers))))
    for i, image in enumerate(images):
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (i * width, 0))
    TASKS[sample.task].draw(canvas, scale, target if truth else None, answers)
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


CLASSES = 60  # on a picture of a confusion, which grows with their square


def confusions(result: dict) -> dict[str, dict]:
    """DATASET-TASK, fit for a file's name -> confusion, of the tasks that have one."""
    found = {}
    for dataset, over in result["datasets"].items():
        for task, part in (over.get("tasks") or {over["task"]: over}).items():
            if "confusion" in part:
                found[re.sub(r"[^\w.-]+", "_", f"{dataset}-{task}")] = part["confusion"]
    return found


def confusion_picture(confusion: dict, cell: int = 54) -> Image.Image:
    """A row for each true class, a column for each answer and one for those that cannot be read: how often, and as a
    share of the row, the darker the more."""
    labels, counts = confusion["labels"], confusion["rows"]
    names = [label if len(label) <= 18 else f"{label[:16]}.." for label in labels]
    left, top = 12 + 7 * max(map(len, names)), 12 + 7 * max(len("cannot be read"), *map(len, names))
    canvas = Image.new("RGB", (left + cell * len(counts[0]) + 8, top + cell * len(counts) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate([*names, "cannot be read"]):  # upright words, turned: columns are narrower than they
        words = Image.new("RGB", (top, 12), "white")
        ImageDraw.Draw(words).text((2, 0), name, fill="black")
        canvas.paste(words.rotate(90, expand=True), (left + cell * j + cell // 2 - 6, -4))
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        y = top + cell * i
        draw.text((4, y + cell // 2 - 6), name, fill="black")
        for j, count in enumerate(row):
            share, x = count / max(sum(row), 1), left + cell * j
            colour = (0, 114, 178) if i == j else (213, 94, 0)
            fill = tuple(round(255 + share * (c - 255)) for c in colour)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)
            ink = "white" if share > 0.75 else "black"
            draw.text((x + 6, y + 12), str(count), fill=ink)
            draw.text((x + 6, y + 27), f"{share:.0%}", fill=ink)
    draw.text((4, 4), "truth", fill="black")
    return canvas


def contact_sheet(samples: list[Sample], rows: list[dict], each: int = 4) -> Image.Image:
    """The best, the median and the worst answers, a row of each."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["u"])
    each = min(each, len(order))
    middle = max(0, len(order) // 2 - each // 2)
    tiles = []
    for name, part in (("best", order[:each]), ("median", order[middle : middle + each]), ("worst", order[-each:])):
        for i in part:
            unit = TASKS[samples[i].task].unit
            caption = f"{name}: {unit} {rows[i]['u']:.2f} {rows[i]['reason']}"
            tiles.append(overlay(samples[i], [rows[i]["answer"]], caption))
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


def load_model(args) -> tuple[Policy, Processor]:
    folder = model_folder(args.model)
    policy = load_policy(folder, args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    policy.compute_dtype = next(policy.parameters()).dtype
    args.prompt = args.prompt or default_prompt(folder)
    args.max_tokens = args.max_tokens or (24 if args.prompt == "answer" else 512)
    return policy, Processor(folder, args.prompt, TASKS, policy.room(args.max_tokens))


def ask(args, out: Path) -> None:
    """--image: one question about one picture."""
    policy, processor = load_model(args)
    # The box is unknown; a sample needs one, and the whole picture is the only honest stand-in.
    sample = Sample(Path(args.image), args.query, (0.0, 0.0, 1.0, 1.0), "image", source=one_line(args.image))
    prompt = processor.prompt(sample)
    (row,) = score_rows([prompt], greedy(policy, processor, [prompt], args.max_tokens))
    print(repr(row["text"])[1:-1])  # as long as --max-tokens lets it be, but one line of printable characters
    print(f"box in original pixels: {row['answer'] or 'none: ' + row['reason']}")
    overlay(sample, [row["answer"]], args.query, truth=False).save(out / "overlay.png")


def check_norms(args, samples: list[Sample]) -> None:
    """InputError, before hours go by, where --write-norms could not be written in the end."""
    folder = Path(args.write_norms).parent
    if not folder.is_dir() or Path(args.write_norms).is_dir():
        raise InputError(f"--write-norms {one_line(args.write_norms)}: name a file in a folder that exists")
    answers = {key: n * max(args.samples, 1) for key, n in Counter(sample.key for sample in samples).items()}
    if few := [key for key, n in answers.items() if n < LEAST]:
        has = f"{'/'.join(few[0])} has {answers[few[0]]} answers, quartiles want {LEAST}"
        raise InputError(f"--write-norms: {has}; give more --data, or more --samples")


def digest(samples: list[Sample]) -> str:
    """sha256 of what the records ask for and of what is right; not of their pictures."""
    asked = "\n".join(f"{s.source} {s.dataset} {s.task} {s.query} {s.target}" for s in samples)
    return hashlib.sha256(asked.encode()).hexdigest()


def measure_norms(args, policy: Policy, processor: Processor, samples: list[Sample]) -> None:
    """--write-norms: the quartiles of every reward, u under the name of the schedule's among them, of `samples` answers
    to each prompt; --samples 0: of the greedy one."""
    count, seen = max(args.samples, 1), defaultdict(list)  # ((dataset, task), reward) -> values
    valid: dict[tuple[str, str], list[bool]] = defaultdict(list)
    device, size = next(policy.parameters()).device, max(args.batch_size // count, 1)
    for start in tqdm(range(0, len(samples), size), desc="norms", leave=False):
        some, places = samples[start : start + size], range(start, min(start + size, len(samples)))
        prompts = [processor.prompt(sample) for sample in some]
        luck = uniforms(0, 0, places, places, count, args.max_tokens) if args.samples else None
        with torch.no_grad():
            prefix = policy.prefix(collate(prompts, device))
            done = policy.generate(prefix, count, args.max_tokens, args.temperature if args.samples else 0.0, luck)
        texts = processor.texts(done.ids.flatten(0, 1), done.lengths.flatten())
        repeated = [prompt for prompt in prompts for _ in range(count)]
        scores = by_task(texts, repeated)
        owners = [prompt.sample for prompt in repeated]
        found = {MAIN: scores.u} | other_rewards(dict.fromkeys(REWARDS, 1.0), texts, scores, owners)
        for term in terms() & scores.parts.keys():
            for sample, value in zip(owners, scores.parts[term].tolist(), strict=True):
                if term in TASKS[sample.task].terms and not math.isnan(value):
                    seen[sample.key, term].append(value)
        for name, values in found.items():  # not all of those of an answer that cannot be read are 0 by themselves
            for sample, value in zip(owners, values.where(scores.valid, 0.0).tolist(), strict=True):
                seen[sample.key, name].append(value)
        for sample, fine in zip(owners, scores.valid.tolist(), strict=True):
            valid[sample.key].append(fine)
    table = {
        place: Quartiles.of(values, 1 - sum(valid[place[0]]) / len(valid[place[0]]))
        for place, values in sorted(seen.items())
    }
    write_norms(
        Path(args.write_norms),
        table,
        {
            "model": fingerprint(model_folder(args.model)),
            "data": digest(samples),
            "tasks": sorted(args.tasks or ()),
            "judge": CaptionTask.judge.name if CaptionTask.judge else None,
            **{name: getattr(args, name) for name in ("samples", *ASKED)},
            "versions": {"torch": torch.__version__},
        },
    )
    for ((dataset, task), name), q in table.items():
        words = "0 or 1 throughout, stays as it is" if q.zero_one else f"{q.p25:.3f} {q.p50:.3f} {q.p75:.3f}"
        if name == MAIN or not q.zero_one:
            print(f"quartiles of {dataset}/{task}/{name}: {words}, n {q.n}, cannot be read {q.invalid:.1%}")


def read(args, spec: str, split: str, knowledge: Knowledge | None = None) -> list[Sample]:
    bad = BadRecords()
    samples = load_samples(spec, TASKS, 0, split, bad, args.allow_outside, args.clip_boxes, knowledge)
    for line in bad.lines():
        print(line)
    return samples


def main() -> None:
    args = config.parse("eval.py")
    out = Path(args.out)
    os.makedirs(out, exist_ok=True)
    if args.image:
        return ask(args, out)
    knowledge = Knowledge(args.knowledge) if args.knowledge else None
    with submission.unlabelled(args.submission is not None):
        samples = read(args, args.data, "test", knowledge)
    if knowledge:
        knowledge.complete()
    samples = first_of_each(samples, args.limit)
    judge = args.judge and read_judge(args.judge, out)
    configure(args.tasks, {sample.task for sample in samples}, judge, samples)
    if args.write_norms is not None:
        check_norms(args, samples)
    if args.submission is not None:
        submission.check(args.submission, samples)
    if args.predictions:
        originals = [Original(sample, load(sample)[1]) for sample in samples]
        rows = score_rows(originals, read_predictions(args.predictions, samples))
        result = metrics(rows)
    else:
        policy, processor = load_model(args)
        result, rows = evaluate(policy, processor, samples, args.batch_size, args.max_tokens, progress="evaluation")
    if args.submission is not None:
        submission.write(args.submission, samples, rows)
        print(f"{one_line(args.submission)}: {len(rows)} answers, {len(rows) - result['n']} of them without a truth")
    if result["n"]:
        print(summary(args.predictions or args.model, result))
    for name, part in result["datasets"].items():
        print(summary(f"  {name}", part))
    if args.write_norms is not None:
        measure_norms(args, policy, processor, samples)
    if reasons := Counter(row["reason"] for row in rows if row["reason"]):
        words = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        print(f"answers that cannot be read: {words}")
    if args.train:
        result["constant"] = constant(read(args, args.train, "train"), samples)
        if result["n"]:
            print(summary("constant answer", result["constant"]))
    (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    contact_sheet(samples, rows).save(out / "sheet.png")
    for name, part in confusions(result).items():
        if len(part["labels"]) > CLASSES:
            print(f"no confusion-{name}.png: {len(part['labels'])} classes, eval.json has their counts")
        else:
            confusion_picture(part).save(out / f"confusion-{name}.png")


if __name__ == "__main__":
    errors.run(main, "lower --batch-size or --max-tokens")
