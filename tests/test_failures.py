"""What a user gets wrong, as a user meets it: train_grpo.py ends with exit code 2 and one sentence that names file,
line and field and says what to do. No traceback, nothing left in --out but what was learned."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import grpo, lines, run, sentence
from safetensors.torch import load_file, save_file

import eval as evaluation
import train_grpo
import train_sft
from data import phantom_samples
from errors import InputError
from images import load
from model import Policy
from prompts import Processor, default_prompt
from rewards import REWARDS
from runtime import checkpoint
from runtime.stream import Sampler
from scheduler import Schedule
from tasks import TASKS
from weights import NANO, load_policy

GOOD = {"image": "a.png", "query": "the skin lesion", "bbox": [10, 10, 50, 40]}


@pytest.fixture
def folder(tmp_path):
    """Eight 84x56 pictures."""
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        Image.fromarray(rng.integers(0, 256, (56, 84, 3), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *records, name: str = "train.jsonl") -> Path:
    rows = [record if isinstance(record, (str, bytes)) else json.dumps(record) for record in records]
    (folder / name).write_bytes(b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows))
    return folder / name


# --------------------------------------------------------------------------------------------------------- records

RECORDS = {  # what line 17 says, when it is found, and the words of the sentence; all others: test_data.py
    "broken JSON": ('{"image": "a.png", ', "not valid JSON"),  # when it is read
    "no picture": (GOOD | {"image": "train.jsonl"}, "train.jsonl"),  # when its header is
    "unknown task": (GOOD | {"task": "sing"}, "field 'task' is 'sing'; there are box"),
    "special token": (  # when a prompt is made of it
        GOOD | {"query": "the <|image_pad|>"},
        "field 'query' 'the <|image_pad|>' holds the special token",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_ends_the_run_by_name_or_is_skipped_and_listed(name, folder):
    record, words = RECORDS[name]
    file, good = write(folder, *[GOOD] * 16, record, GOOD), write(folder, *[GOOD] * 4, name="good.jsonl")
    place, out = f"{file}:17: ", str(folder / "out")
    for data, val in ((file, good), (good, file)):
        error = sentence(run(train_grpo, "--data", str(data), "--val", str(val), "--out", out, expect=2))
        assert place in error and words in error and len(error) < 500 + 2 * len(str(folder)), error
        assert not (folder / "out").exists()
    flags = ["--steps", "1", "--batch-size", "2", "--group-size", "2", "--eval-limit", "1", "--skip-bad", "1"]
    output = grpo(folder / "out", file, *flags)  # the same file is evaluated on: one record, counted once
    assert output.count(f"left out: {place}") == 1 and words in output
    assert "17 training samples, 1 to evaluate on" in output
    sft = ["--data", str(file), "--steps", "1", "--batch-size", "2", "--out", str(folder / "a")]
    assert place in sentence(run(train_sft, *sft, expect=2))
    assert run(train_sft, *sft, "--skip-bad", "1").count(f"left out: {place}") == 1


def test_more_bad_records_than_allowed_end_the_run(folder):
    file = write(folder, GOOD, "{", GOOD, {}, GOOD, "[]")
    error = sentence(grpo(folder / "out", file, "--skip-bad", "2", expect=2))
    assert f"{file}:6: " in error and "bad record number 3" in error and "--skip-bad allows 2" in error
    assert "--skip-bad N" in sentence(grpo(folder / "out", file, expect=2))


FILES = {
    "missing": (None, "train.jsonl: cannot be read"),
    "empty": (b"", "train.jsonl: holds no usable records; write one JSON object per line"),
    "blank": (b"\n \n", "train.jsonl: holds no usable records"),
    "broken list": (b'[{"image": 1}, ', "train.jsonl: not valid JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, folder):
    content, words = FILES[name]
    if content is not None:
        (folder / "train.jsonl").write_bytes(content)
    assert words in sentence(grpo(folder / "out", folder / "train.jsonl", "--skip-bad", "9", expect=2))


def test_every_record_bad_is_said_though_they_may_be_skipped(folder):
    file = write(folder, "{", "[]")
    assert "train.jsonl" in sentence(grpo(folder / "out", file, "--skip-bad", "9", expect=2))
    file = write(folder, GOOD | {"query": "<|im_end|>"})
    assert "none of 1 records can be used" in sentence(grpo(folder / "out", file, "--skip-bad", "9", expect=2))


def test_a_picture_that_breaks_on_the_way_saves_the_run_first(folder):
    """Cut off behind its header, it is noticed when its turn comes: what was learned is saved, repair and --resume go
    on as if nothing had been; with --skip-bad the next record takes its place."""
    names = "abcdefgh"
    records = []
    for i, name in enumerate(names):  # phantoms, so that there is something to learn
        image, box = load(phantom_samples(None, 5, i, 1, size=84)[0])
        image.save(folder / f"{name}.png")
        records.append({"image": f"{name}.png", "query": GOOD["query"], "bbox": box})
    file = write(folder, *records)
    val = write(folder, records[0], name="val.jsonl")
    whole = {name: (folder / f"{name}.png").read_bytes() for name in names}
    order = Sampler(8, 2, 0).take(0, 8)
    victim = names[order[5]]  # in the third step
    flags = ["--data", str(file), "--val", str(val), "--steps", "4", "--batch-size", "2", "--group-size", "4"]
    flags += ["--schedule", "raw"]
    run(train_grpo, *flags, "--out", str(folder / "straight"))
    assert all(row["grad_norm"] > 0 for row in lines(folder / "straight" / "metrics.jsonl"))

    assert victim != "a"  # which is evaluated on
    (folder / f"{victim}.png").write_bytes(whole[victim][:1000])
    error = sentence(run(train_grpo, *flags, "--out", str(folder / "out"), expect=2))
    assert f"{file}:{order[5] + 1}: " in error and f"{victim}.png" in error and "All up to step 2 is saved" in error
    assert [f.name for f in (folder / "out").glob("step-*")] == ["step-000002"]
    output = run(train_grpo, *flags, "--out", str(folder / "skipping"), "--skip-bad", "1")
    assert f"left out: {file}:{order[5] + 1}: " in output
    assert [row["drawn"] for row in lines(folder / "skipping" / "metrics.jsonl")] == [2, 4, 7, 9]

    (folder / f"{victim}.png").write_bytes(whole[victim])
    run(train_grpo, "--resume", "--out", str(folder / "out"))
    ends = [load_policy(folder / out / "step-000004").parameters() for out in ("straight", "out")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_pictures_to_evaluate_on_are_decoded_before_the_first_step(folder):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    file = write(folder, GOOD)
    val = write(folder, GOOD, GOOD | {"image": "b.png"}, name="val.jsonl")
    error = sentence(run(train_grpo, "--data", str(file), "--val", str(val), "--out", str(folder / "out"), expect=2))
    assert f"{val}:2: " in error and "b.png" in error and not (folder / "out").exists()


# --------------------------------------------------------------------------------------------------- checkpoints, --out


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def broken_model(folder: Path, name: str) -> Path:
    """A copy of the nano policy with one thing wrong."""
    copy = shutil.copytree(NANO, folder / "model")
    if name == "foreign architecture":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    elif name == "broken config":
        (copy / "config.json").write_text('{"model_type": ')
    elif name == "no weights":
        (copy / "model.safetensors").unlink()
    elif name == "weights cut off":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:9999])
    elif name == "a tensor is missing":
        tensors = load_file(copy / "model.safetensors")
        del tensors["visual.merger.ln_q.weight"]
        save_file(tensors, copy / "model.safetensors")
    elif name == "a tensor is foreign":
        tensors = load_file(copy / "model.safetensors")
        save_file(tensors | {"transformer.h.0.attn.weight": torch.ones(1)}, copy / "model.safetensors")
    elif name == "another shape":
        tensors = load_file(copy / "model.safetensors")
        save_file(tensors | {"model.norm.weight": torch.ones(3)}, copy / "model.safetensors")
    elif name == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif name == "broken tokenizer":
        (copy / "tokenizer.json").write_text("{}")
    elif name == "no preprocessor":
        (copy / "preprocessor_config.json").unlink()
    elif name == "unknown prompt":
        (copy / "medloc.json").write_text('{"prompt": "sing"}')
    elif name == "prompt of another kind":
        (copy / "medloc.json").write_text('{"prompt": ["answer"]}')
    elif name == "index without a map":
        (copy / "model.safetensors.index.json").write_text("{}")
    elif name == "size of another kind":
        edit(copy / "config.json", hidden_size="large")
    elif name == "no heads":
        edit(copy / "config.json", num_attention_heads=0)
    elif name == "heads that do not fit":
        edit(copy / "config.json", num_attention_heads=3)
    elif name == "no positions":
        edit(copy / "config.json", max_position_embeddings=None)
    elif name == "EOS of another kind":
        edit(copy / "generation_config.json", eos_token_id="end")
    elif name == "patches of another kind":
        edit(copy / "preprocessor_config.json", patch_size="14")
    return copy


MODELS = {
    "foreign architecture": "config.json: model_type is 'llama', only 'qwen2_5_vl' is implemented here",
    "broken config": "config.json: is not valid JSON",
    "no weights": "model.safetensors does not exist; the checkpoint is not whole",
    "weights cut off": "model.safetensors: not a readable safetensors file",
    "a tensor is missing": "1 tensors are missing, the first is visual.merger.ln_q.weight",
    "a tensor is foreign": "tensor transformer.h.0.attn.weight is not one of Qwen2.5-VL's",
    "another shape": "tensor model.norm.weight has shape (3,), config.json asks for (128,)",
    "no tokenizer": "holds no tokenizer.json; restore it from its checkpoint",
    "broken tokenizer": "holds no tokenizer that transformers can load",
    "no preprocessor": "processor_config.json: does not exist; restore it from its checkpoint",
    "unknown prompt": "medloc.json: field 'prompt': the question 'sing' does not hold {query}",
    "prompt of another kind": "medloc.json: field 'prompt': must be a string, not ['answer']",
    "index without a map": "model.safetensors.index.json: field 'weight_map' must say",
    "size of another kind": "config.json: a field has the wrong type (hidden_size is 'large'",
    "no heads": "config.json: a field has the wrong type (num_attention_heads is 0",
    "heads that do not fit": "config.json: a field has the wrong type (128 cannot be split into 3 heads",
    "no positions": "config.json: a field has the wrong type (max_position_embeddings is None",
    "EOS of another kind": "eos_token_id must be a token's id or a list of them, not 'end'",
    "patches of another kind": "image processor settings must be whole numbers, not",
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unreadable_or_foreign_model_is_named(name, folder):
    model = broken_model(folder, name)
    with pytest.raises(InputError) as error:
        default_prompt(model)
        load_policy(model)
        Processor(model, "answer", TASKS)
    assert MODELS[name] in str(error.value) and f"{folder.name}/model" in str(error.value)
    if name == "weights cut off":
        flags = ("--model", str(model), "--recipe", "nano")
        assert MODELS[name] in sentence(grpo(folder / "out", write(folder, GOOD), *flags, expect=2))
        assert not (folder / "out").exists()


def test_a_folder_that_is_not_there_is_named(folder):
    error = sentence(grpo(folder / "out", write(folder, GOOD), "--model", str(folder / "nowhere"), expect=2))
    assert "nowhere/config.json does not exist; --model wants a folder of a Qwen2.5-VL checkpoint or 'nano'" in error


def test_more_tokens_than_positions_are_refused(folder):
    file = write(folder, GOOD)
    error = sentence(grpo(folder / "out", file, "--max-tokens", "2048", expect=2))
    assert "--max-tokens 2048: the model has 2048 positions" in error
    error = sentence(grpo(folder / "out", file, "--max-tokens", "2040", expect=2))
    assert f"{file}:1: " in error and "but 8 are allowed" in error and "--max-tokens" in error


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("stopped")
    Image.new("RGB", (84, 56), "gray").save(folder / "a.png")
    grpo(folder / "run", write(folder, GOOD), "--steps", "1")
    return folder / "run"


def manifest(out: Path, **changes) -> None:
    edit(out / "step-000001" / "manifest.json", **changes)


def damage(name: str, content: bytes | None):
    """A file of the checkpoint with this in it, or a flipped bit."""

    def strike(out: Path) -> None:
        file = out / "step-000001" / name
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 4
        file.write_bytes(whole if content is None else content)

    return strike


BREAKS = {
    "cut-off state": (damage("trainer.json", b'{"step": 1, "op'), "step-000001/trainer.json: is damaged, {'bytes': 15"),
    "cut-off moments": (damage("trainer.safetensors", b"12345678"), "trainer.safetensors: is damaged, {'bytes': 8"),
    "a bit of a weight": (damage("model.safetensors", None), "step-000001/model.safetensors: is damaged, {'bytes': 9"),
    "lost file": (lambda out: (out / "step-000001" / "tokenizer.json").unlink(), "tokenizer.json: cannot be read (No"),
    "another format": (lambda out: manifest(out, format=99), "step-000001/manifest.json: format 99 is not 4"),
    "no object": (damage("manifest.json", b"[]"), "step-000001/manifest.json: cannot be read"),
    "cut-off manifest": (damage("manifest.json", b'{"format": 4, "fi'), "step-000001/manifest.json: is not valid JSON"),
    "odd manifest": (lambda out: manifest(out, files=[1]), "step-000001/manifest.json: cannot be read"),
    "no manifest": (lambda out: (out / "step-000001" / "manifest.json").unlink(), "step-000001: no manifest.json; an"),
    "foreign line": (lambda out: (out / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl:1: is no line of this run"),
    "no config": (
        lambda out: (out / "config.json").unlink(),
        "is not empty, and holds no run to go on with (no config.json)",
    ),
    "broken config": (lambda out: (out / "config.json").write_text("{"), "config.json: is not valid JSON"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_named_on_resume(name, stopped, tmp_path):
    damage, words = BREAKS[name]
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(out)
    error = sentence(run(train_grpo, "--resume", "--out", str(out), "--steps", "2", expect=2))
    assert words in error and ("step-000001" in words) <= (
        f"{tmp_path.name}/run/step-000001 and --resume goes on" in error
    )
    assert name == "foreign line" or len(lines(out / "metrics.jsonl")) == 1


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(folder, monkeypatch):
    file = write(folder, GOOD)
    save = checkpoint.save_file

    def full(tensors, path, **_):
        if "000002" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    error = sentence(grpo(folder / "out", file, "--steps", "3", "--save-every", "1", expect=2))
    assert "step-000002 cannot be written" in error and "No space left on device" in error and "--resume" in error
    assert [f.name for f in (folder / "out").iterdir() if "step" in f.name] == ["step-000001"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    run(train_grpo, "--resume", "--out", str(folder / "out"))
    assert (folder / "out" / "step-000003").is_dir()


def test_an_evaluation_that_fails_at_the_end_does_not_cost_the_run(folder):
    """The picture to evaluate on vanishes after the first look."""
    file, val = write(folder, GOOD | {"image": "b.png"}), write(folder, GOOD, name="val.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        observe = Schedule.observe
        vanish = lambda self, ious: (folder / "a.png").unlink(missing_ok=True) or observe(self, ious)  # noqa: E731
        patch.setattr(Schedule, "observe", vanish)
        flags = ["--data", str(file), "--val", str(val), "--steps", "2", "--out", str(folder / "out")]
        error = sentence(run(train_grpo, *flags, expect=2))
    assert f"{val}:1: " in error and "a.png" in error
    assert (folder / "out" / "step-000002" / "trainer.json").exists()


def test_what_was_left_out_is_still_counted_after_a_resume(folder):
    """Two pictures break on the way and one is allowed: the second ends the run, also if it was resumed in between."""
    names = "abcdefgh"
    file = write(folder, *[GOOD | {"image": f"{name}.png"} for name in names])
    order = Sampler(8, 2, 0).take(0, 8)
    for place in (1, 5):
        picture = folder / f"{names[order[place]]}.png"
        picture.write_bytes(picture.read_bytes()[:2000])
    flags = ["--data", str(file), "--batch-size", "2", "--group-size", "2", "--schedule", "raw", "--skip-bad", "1"]
    run(train_grpo, *flags, "--steps", "1", "--out", str(folder / "out"))
    error = sentence(run(train_grpo, "--resume", "--out", str(folder / "out"), "--steps", "4", expect=2))
    assert f"{file}:{order[5] + 1}: " in error and "this is bad record number 2, --skip-bad allows 1" in error


def test_training_records_are_never_evaluated_on_unasked(folder):
    """A path with "phantoms" in it is no phantom; of a mixture, the phantoms alone are held out."""
    (folder / "phantoms_mine").mkdir()
    shutil.copy(folder / "a.png", folder / "phantoms_mine")
    file = write(folder / "phantoms_mine", GOOD)
    output = run(train_grpo, "--data", str(file), "--steps", "1", "--batch-size", "2", "--out", str(folder / "a"))
    assert "no evaluation: name records with --val" in output
    flags = ["--data", f"phantoms:xray, {file}", "--steps", "1", "--batch-size", "2", "--eval-limit", "2"]
    output = run(train_grpo, *flags, "--out", str(folder / "b"))
    assert "20001 training samples, 2 to evaluate on" in output


def test_a_used_or_unwritable_folder_is_refused(stopped, folder):
    file = write(folder, GOOD)
    assert "is not empty: name a new folder, or go on" in sentence(grpo(stopped, file, expect=2))
    assert "--resume goes on with --lr 0.0001, not 0.1" in sentence(
        run(train_grpo, "--resume", "--out", str(stopped), "--lr", "0.1", expect=2)
    )
    assert "is a file, or a link that leads nowhere" in sentence(grpo(file, file, expect=2))
    assert "cannot be written" in sentence(grpo(file / "below", file, expect=2))


# ------------------------------------------------------------------------------------- files of others, at a terminal


def test_names_of_others_are_printed_on_one_line(folder, capsys, monkeypatch):
    """A record's dataset, and what a model answers to --image: no colour, no title, no second line."""
    evil = "\x1b]0;title\x07\x1b[31m\nerror: all is lost " + "x" * 5000
    file = write(folder, GOOD | {"dataset": evil}, GOOD)
    answers = write(folder, {"text": evil}, {"box": [10, 10, 50, 40]}, name="answers.jsonl")
    flags = ["--data", str(file), "--predictions", str(answers), "--out", str(folder / "out")]
    output = run(evaluation, *flags)
    assert "\x1b" not in output and "\x07" not in output and max(map(len, output.splitlines())) < 300
    assert not any(line.startswith("error") for line in output.splitlines())
    assert evil in json.loads((folder / "out" / "eval.json").read_text())["datasets"]  # a file has it as it is
    monkeypatch.setattr(evaluation, "greedy", lambda *_: [evil])
    output = run(evaluation, "--image", str(folder / "a.png"), "--query", "it", "--out", str(folder / "out"))
    assert "\x1b" not in output and "all is lost" in output and len(output.splitlines()) == 2


PREDICTIONS = {
    "a pipe": (None, "answers.jsonl: is not a file; write"),
    "brackets": (b"[" * 2000 + b"]" * 2000, "answers.jsonl:1: (is not valid JSON|needs the field 'box')"),
    "deep box": (
        b'{"box": ' + b"[" * 400 + b"]" * 400 + b"}",
        "answers.jsonl:1: field 'box' must be four numbers or null",
    ),
    "box of another kind": (
        b'{"box": {"x": 1}}',
        "answers.jsonl:1: field 'box' must be four numbers or null, not {'x': 1}",
    ),
    "box of words": (b'{"box": ["1", "2", "3", "4"]}', "answers.jsonl:1: field 'box' must be"),
    "not UTF-8": (b'{"text": "\xff"}', "answers.jsonl: cannot be read"),
    "a list": (b"[1]", "answers.jsonl:1: needs the field 'box'"),
    "many digits": (b'{"box": [' + b"9" * 5000 + b"]}", "answers.jsonl:1: is not valid JSON"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_of_odd_kinds_are_one_sentence(name, folder):
    content, words = PREDICTIONS[name]
    file = folder / "answers.jsonl"
    file.write_bytes(content) if content is not None else os.mkfifo(file)
    with pytest.raises(InputError, match=words) as error:
        evaluation.read_predictions(str(file), [])
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--query", "x" * 100_000], "--query: field 'query' has 100000 characters; shorten it to at most 10000"),
        (["--query", "the \udcff lesion"], "--query the .*udcff lesion holds a character that no name has"),
        (["--query", " \n"], "--query: field 'query' must be a non-empty string"),
        (["--query", "<|im_end|>"], "holds the special token"),
        (["--query", "it", "--max-tokens", "1" + "0" * 30], "--max-tokens must be at most 1000000"),
        (["--query", "it", "--max-tokens", "2048"], "--max-tokens 2048: the model has 2048 positions"),
        (["--query", "it", "--max-tokens", "2047"], "but 1 are allowed"),
        (["--query", "it", "--image", "FIFO"], "is not a file; name a picture"),
    ],
    ids=range(8),
)
def test_questions_about_one_picture_are_held_to_what_records_are(flags, words, folder):
    os.mkfifo(folder / "fifo.png")
    flags = [str(folder / "fifo.png") if flag == "FIFO" else flag for flag in flags]
    flags = ([] if "--image" in flags else ["--image", str(folder / "a.png")]) + flags
    output = run(evaluation, *flags, "--out", str(folder / "out"), expect=2)
    assert re.search(words, output) and len(output.splitlines()) == 1


def test_boxes_over_the_edge_are_cut_for_an_evaluation_if_it_is_asked_for(folder):
    file = write(folder, GOOD, GOOD | {"bbox": [10, 10, 85.5, 40]})
    answers = write(folder, {"box": [10, 10, 50, 40]}, {"box": [10, 10, 84, 40]}, name="answers.jsonl")
    flags = ["--data", str(file), "--predictions", str(answers), "--train", str(file), "--out", str(folder / "out")]
    assert f"{file}:2: field 'bbox' [10, 10, 85.5, 40] reaches" in run(evaluation, *flags, expect=2)
    output = run(evaluation, *flags, "--clip-boxes")
    assert output.count(f"boxes clipped at the picture's edge: 1 ({file}:2)") == 2  # of --data and of --train
    assert json.loads((folder / "out" / "eval.json").read_text())["miou"] == 1.0


# ---------------------------------------------------------------------------------------------------- rewards, memory


def test_a_reward_that_gives_no_number_is_named(folder, monkeypatch):
    file = write(folder, GOOD)
    monkeypatch.setitem(REWARDS, "odd", lambda texts, scores, samples: [math.nan] * len(texts))
    error = sentence(grpo(folder / "a", file, "--rewards", "task=1,odd=1", expect=2))
    assert "reward 'odd' must give 16 finite numbers, one an answer" in error
    monkeypatch.setitem(REWARDS, "odd", lambda texts, scores, samples: [1.0])
    error = sentence(grpo(folder / "b", file, "--rewards", "task=1,odd=1", expect=2))
    assert "reward 'odd' must give 16 finite numbers" in error and "(1,)" in error


OUT_OF_MEMORY = {
    "a real one of the CPU": lambda *_: torch.empty(1 << 60),
    "CUDA's": lambda *_: (_ for _ in ()).throw(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nx")
    ),
    "Python's": lambda *_: bytearray(1 << 62),
    "numpy's": lambda *_: np.ones(1 << 59),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_the_end_of_the_memory_is_one_sentence_with_the_flags_that_help(name, folder, monkeypatch):
    monkeypatch.setattr(Policy, "generate", OUT_OF_MEMORY[name])
    monkeypatch.setattr(Policy, "logprobs", OUT_OF_MEMORY[name])
    file = write(folder, GOOD)
    error = sentence(run(train_grpo, "--data", str(file), "--out", str(folder / "out"), expect=2))
    assert error.startswith("error: not enough memory (") and "--micro-batch" in error and "--checkpointing" in error
    error = sentence(run(train_sft, "--data", str(file), "--out", str(folder / "sft"), expect=2))
    assert error.startswith("error: not enough memory (")


def test_another_runtime_error_is_a_bug_and_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(Policy, "generate", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(train_grpo, "--data", str(write(folder, GOOD)), "--out", str(folder / "out"))


def test_a_log_that_is_not_installed_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if absent
    error = sentence(grpo(folder / "out", write(folder, GOOD), "--log", "wandb", expect=2))
    assert "--log wandb: the package is not installed (pip install wandb)" in error
