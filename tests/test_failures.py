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
    "special token": (GOOD | {"query": "<|image_pad|>"}, "'<|image_pad|>' holds the special token"),  # as a prompt
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


def test_a_picture_that_is_lost_on_the_way_saves_the_run_first(folder, monkeypatch):
    """Gone when its turn comes: what was learned is saved, repair and --resume go on as if nothing had been. Cut off
    behind its header, with --skip-bad: the next record takes its place."""
    rows = []
    for i, name in enumerate("abcdefgh"):  # phantoms, so that there is something to learn
        image, box = load(phantom_samples(None, 5, i, 1, size=84)[0])
        image.save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "query": GOOD["query"], "bbox": box})
    file, val = write(folder, *rows), write(folder, rows[0], name="val.jsonl")
    number = Sampler(8, 2, 0).take(5, 1)[0]  # in the third step
    victim, update = folder / rows[number]["image"], train_grpo.update
    whole = victim.read_bytes()
    assert number  # the first is evaluated on
    flags = ["--data", str(file), "--val", str(val), "--steps", "4", "--batch-size", "2", "--group-size", "4"]
    flags += ["--schedule", "raw", "--workers", "0", "--out"]
    run(train_grpo, *flags, str(folder / "straight"))
    assert all(row["grad_norm"] > 0 for row in lines(folder / "straight" / "metrics.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "update", lambda *a: victim.unlink(missing_ok=True) or update(*a))
        error = sentence(run(train_grpo, *flags, str(folder / "out"), expect=2))
    assert f"{file}:{number + 1}: " in error and victim.name in error and "All up to step 2 is saved" in error
    assert [f.name for f in (folder / "out").glob("step-*")] == ["step-000002"]
    victim.write_bytes(whole[:1000])
    output = run(train_grpo, *flags, str(folder / "skipping"), "--skip-bad", "1")
    assert f"left out: {file}:{number + 1}: " in output
    assert [row["drawn"] for row in lines(folder / "skipping" / "metrics.jsonl")] == [2, 4, 7, 9]
    victim.write_bytes(whole)
    run(train_grpo, "--resume", "--out", str(folder / "out"))
    ends = [load_policy(folder / out / "step-000004").parameters() for out in ("straight", "out")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_pictures_to_evaluate_on_are_decoded_before_the_first_step(folder):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    file, val = write(folder, GOOD), write(folder, GOOD, GOOD | {"image": "b.png"}, name="val.jsonl")
    error = sentence(run(train_grpo, "--data", str(file), "--val", str(val), "--out", str(folder / "out"), expect=2))
    assert f"{val}:2: " in error and "b.png" in error and not (folder / "out").exists()


# --------------------------------------------------------------------------------------------------- checkpoints, --out


def fields(name: str, **changes):
    def strike(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return strike


def damage(name: str, content: bytes | None = None):
    """A file with this in it, or a flipped bit."""

    def strike(folder: Path) -> None:
        whole = bytearray((folder / name).read_bytes())
        whole[len(whole) // 2] ^= 4
        (folder / name).write_bytes(whole if content is None else content)

    return strike


def gone(name: str):
    return lambda folder: (folder / name).unlink()


def tensors(**changes):
    def strike(folder: Path) -> None:
        changed = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
        save_file({name: t for name, t in changed.items() if t is not None}, folder / "model.safetensors")

    return strike


HALF = (NANO / "model.safetensors").read_bytes()[:9999]
WRONG = "config.json: a field has the wrong type ("
# fmt: off
MODELS = {  # what is wrong with a copy of the nano policy
    "foreign": (fields("config.json", model_type="llama"), "config.json: model_type is 'llama', only 'qwen2_5_vl' is"),
    "broken config": (damage("config.json", b'{"model_type": '), "config.json: is not valid JSON"),
    "no weights": (gone("model.safetensors"), "model.safetensors does not exist; the checkpoint is not whole"),
    "cut off": (damage("model.safetensors", HALF), "model.safetensors: not a readable safetensors file"),
    "no tensor": (tensors(visual__merger__ln_q__weight=None), "1 tensors are missing, the first is visual.merger.ln_q"),
    "one too many": (tensors(h__0__weight=torch.ones(1)), "tensor h.0.weight is not one of Qwen2.5-VL's"),
    "another shape": (tensors(model__norm__weight=torch.ones(3)), "norm.weight has shape (3,), config.json asks for"),
    "no tokenizer": (gone("tokenizer.json"), "holds no tokenizer.json; restore it from its checkpoint"),
    "no preprocessor": (gone("preprocessor_config.json"), "does not exist; restore it from its checkpoint"),
    "unknown prompt": (fields("medloc.json", prompt="sing"), "field 'prompt': the question 'sing' does not hold {que"),
    "no prompt": (fields("medloc.json", prompt=["answer"]), "medloc.json: field 'prompt': must be a string, not ['an"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json: field 'weight_map' must"),
    "odd size": (fields("config.json", hidden_size="large"), WRONG + "hidden_size is 'large'"),
    "no heads": (fields("config.json", num_attention_heads=0), WRONG + "num_attention_heads is 0"),
    "odd heads": (fields("config.json", num_attention_heads=3), WRONG + "128 cannot be split into 3 heads"),
    "no positions": (fields("config.json", max_position_embeddings=None), WRONG + "max_position_embeddings is None"),
    "EOS": (fields("generation_config.json", eos_token_id="end"), "must be a token's id or a list of them, not 'end'"),
}
# fmt: on


@pytest.mark.parametrize("name", MODELS)
def test_an_unreadable_or_foreign_model_is_named(name, folder):
    strike, words = MODELS[name]
    strike(model := shutil.copytree(NANO, folder / "model"))
    with pytest.raises(InputError) as error:
        default_prompt(model)
        load_policy(model)
        Processor(model, "answer", TASKS)
    assert words in str(error.value) and f"{folder.name}/model" in str(error.value)
    if name == "cut off":
        flags = ("--model", str(model), "--recipe", "nano")
        assert words in sentence(grpo(folder / "out", write(folder, GOOD), *flags, expect=2))
        assert not (folder / "out").exists()


def test_a_folder_that_is_not_there_and_more_tokens_than_positions_are_named(folder):
    file = write(folder, GOOD)
    for flags, *words in (
        (("--model", str(folder / "no")), "no/config.json does not exist; --model wants a folder of a Qwen2.5-VL ch"),
        (("--max-tokens", "2048"), "--max-tokens 2048: the model has 2048 positions"),
        (("--max-tokens", "2040"), f"{file}:1: ", "but 8 are allowed", "--max-tokens"),
    ):
        error = sentence(grpo(folder / "out", file, *flags, expect=2))
        assert all(word in error for word in words), error


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("stopped")
    Image.new("RGB", (84, 56), "gray").save(folder / "a.png")
    grpo(folder / "run", write(folder, GOOD), "--steps", "1")
    return folder / "run"


STEP = "step-000001/"
BREAKS = {  # of all else that a checkpoint can have: test_state.py
    "cut-off state": (damage(STEP + "trainer.json", b'{"step": 1, "op'), "1/trainer.json: is damaged, {'bytes': 15"),
    "a bit of a weight": (damage(STEP + "model.safetensors"), STEP + "model.safetensors: is damaged, {'bytes': 9"),
    "another format": (fields(STEP + "manifest.json", format=99), STEP + "manifest.json: format 99 is not 4"),
    "no object": (damage(STEP + "manifest.json", b"[]"), STEP + "manifest.json: cannot be read"),
    "odd manifest": (fields(STEP + "manifest.json", files=[1]), STEP + "manifest.json: cannot be read"),
    "no manifest": (gone(STEP + "manifest.json"), "step-000001: no manifest.json; an"),
    "foreign line": (damage("metrics.jsonl", b"{}\n"), "metrics.jsonl:1: is no line of this run"),
    "no config": (gone("config.json"), "is not empty, and holds no run to go on with (no config.json)"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_named_on_resume(name, stopped, tmp_path):
    strike, words = BREAKS[name]
    strike(out := shutil.copytree(stopped, tmp_path / "run"))
    error = sentence(run(train_grpo, "--resume", "--out", str(out), "--steps", "2", expect=2))
    way = f"{tmp_path.name}/run/step-000001 and --resume goes on"
    assert words in error and (name in ("foreign line", "no config") or way in error)
    assert name == "foreign line" or len(lines(out / "metrics.jsonl")) == 1


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


NEEDS, BOX = "answers.jsonl:1: needs the field 'box'", "answers.jsonl:1: field 'box' must be four numbers or null"
PREDICTIONS = {
    "a pipe": (None, "answers.jsonl: is not a file; write"),
    "brackets": (b"[" * 2000 + b"]" * 2000, f"(answers.jsonl:1: is not valid JSON|{NEEDS})"),
    "deep box": (b'{"box": ' + b"[" * 400 + b"]" * 400 + b"}", BOX),
    "box of another kind": (b'{"box": {"x": 1}}', BOX + ", not {'x': 1}"),
    "box of words": (b'{"box": ["1", "2", "3", "4"]}', "answers.jsonl:1: field 'box' must be"),
    "not UTF-8": (b'{"text": "\xff"}', "answers.jsonl: cannot be read"),
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


QUESTIONS = [
    (["--query", "x" * 100_000], "--query: field 'query' has 100000 characters; shorten it to at most 10000"),
    (["--query", "the \udcff lesion"], "--query the .*udcff lesion holds a character that no name has"),
    (["--query", " \n"], "--query: field 'query' must be a non-empty string"),
    (["--query", "<|im_end|>"], "holds the special token"),
    (["--query", "it", "--max-tokens", "1" + "0" * 30], "--max-tokens must be at most 1000000"),
    (["--query", "it", "--max-tokens", "2048"], "--max-tokens 2048: the model has 2048 positions"),
    (["--query", "it", "--max-tokens", "2047"], "but 1 are allowed"),
    (["--query", "it", "--image", "fifo.png"], "is not a file; name a picture"),
]


def test_questions_about_one_picture_are_held_to_what_records_are(folder, monkeypatch):
    os.mkfifo(folder / "fifo.png")
    monkeypatch.chdir(folder)
    for flags, words in QUESTIONS:
        output = run(evaluation, "--image", "a.png", *flags, "--out", str(folder / "out"), expect=2)
        assert re.search(words, output) and len(output.splitlines()) == 1, output


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
    for gives, words in ((lambda n: [math.nan] * n, "numbers, one an answer"), (lambda n: [1.0], "(1,)")):
        monkeypatch.setitem(REWARDS, "odd", lambda texts, scores, samples, gives=gives: gives(len(texts)))
        error = sentence(grpo(folder / "a", file, "--rewards", "task=1,odd=1", expect=2))
        assert "reward 'odd' must give 16 finite numbers" in error and words in error
        shutil.rmtree(folder / "a", ignore_errors=True)


def cuda(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nx")


OUT_OF_MEMORY = {"the CPU's": lambda *_: torch.empty(1 << 60), "CUDA's": cuda, "numpy's": lambda *_: np.ones(1 << 59)}


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
