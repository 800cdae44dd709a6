"""Records, frames, prompts and order. Oracles: transformers' processor, chat template and get_rope_index."""

import json
import os
import shutil
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

import data
import images
from data import (
    BadRecords,
    ImageConfig,
    Sampler,
    answer_text,
    build_prompt,
    check_prompt,
    load,
    load_jsonl,
    load_samples,
    mrope_positions,
    read_queries,
)
from errors import InputError
from images import open_image
from phantoms import KINDS, QUERIES, phantom

DATA = Path(__file__).parents[2] / "shared" / "data"  # real images stay outside the repository
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
IMAGE_ID = 256 + 5
# What Qwen2.5-VL's own template says about one user turn, less its branches for video and for counting images.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, template=TEMPLATE, image_token_id=IMAGE_ID):
    """A checkpoint folder as far as text goes: one token per byte, cut up as Qwen2 does, Qwen's special tokens."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "image_token_id": image_token_id}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def folder(tmp_path):
    """A data folder with one 60x40 picture, a text file under a picture's name and a folder."""
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path


RECORD = {"image": "a.png", "query": "the lesion", "bbox": [1, 2.5, 30, 40]}


def write(folder, *records, name="train.jsonl"):
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return folder / name


# ---------------------------------------------------------------- records


def test_our_record_and_its_defaults(folder):
    full = RECORD | {"width": 60, "height": 40, "dataset": "isic", "task": "classify"}
    path = write(folder, RECORD, "", full, RECORD | {"dataset": ""}, RECORD | {"query": " x\u2028y "})
    first, second, third, fourth = load_jsonl(path)
    assert (first.image, first.query, first.box) == (folder / "a.png", "the lesion", (1.0, 2.5, 30.0, 40.0))
    assert (first.dataset, first.task, first.size, first.source) == ("train", "ground", (60, 40), f"{path}:1")
    assert (second.dataset, second.task, second.size, second.source) == ("isic", "classify", (60, 40), f"{path}:3")
    assert third.dataset == "train" and fourth.query == "x\u2028y"
    assert first == replace(first) and hash(first) == hash(replace(first))


def test_a_raw_line_separator_inside_a_string_is_no_line_end(folder):
    path = write(folder, json.dumps(RECORD | {"query": "x\u2028y"}, ensure_ascii=False), json.dumps(RECORD))
    assert [s.source for s in load_jsonl(path)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\r\n")  # as Windows editors save it
    assert load_jsonl(path)[0].query == "the lesion"


@pytest.mark.parametrize("answer", [[1, 2, 30, 40], "[1, 2, 30, 40]", "<answer> [1,2,30,40.0] </answer>"])
def test_vlm_r1_records(folder, answer):
    asked = "<image>Please provide the bounding box coordinate of the region this sentence describes: the lesion."
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    new = load_jsonl(write(folder, {"id": 1, "image": "a.png", "conversations": turns}))
    older = {"image": "a.png", "problem": "Where is it?", "solution": answer}
    path = write(folder, json.dumps([older, older], indent=1), name="old.json")
    old = load_jsonl(path)
    assert [s.query for s in new + old] == ["the lesion", "Where is it?", "Where is it?"]
    assert {s.box for s in new + old} == {(1.0, 2.0, 30.0, 40.0)}
    assert old[1].source == f"{path} record 2" and old[0].dataset == "old"


TURN = {"from": "human", "value": "where?"}
OLDER = {"image": "a.png", "problem": "it", "solution": [1, 2, 3, 4]}
BAD = {
    '{"image": ': r"not valid JSON in UTF-8 \(Expecting value: column 11 .*; write one JSON object per line",
    "[" * 100_000: "not valid JSON in UTF-8 .maximum recursion depth",
    "9" * 5000: "not valid JSON in UTF-8 .*value has 5000 digits.; write",
    '"text"': "a record must be a JSON object with image, query and bbox, not 'text'",
    json.dumps({"image": "a.png", "bbox": [1, 2, 3, 4]}): r"field 'query' is missing, .* has \['image', 'bbox'\]",
    json.dumps({"query": "it", "bbox": [1, 2, 3, 4]}): "field 'image' is missing, add it",
    json.dumps({"image": "a.png", "query": "it"}): "field 'bbox' is missing",
    json.dumps({f"{i}\n" * 9: i for i in range(9999)}): r"field 'query' is missing, add it; the record has \['0\\n0",
    json.dumps(RECORD | {"image": 3}): "field 'image' must be a non-empty string, not 3",
    json.dumps(
        RECORD | {"image": "b.png"}
    ): "field 'image' names 'b.png', which is not a file; paths are relative to /",
    json.dumps(RECORD | {"image": "b\n\0.png"}): r"field 'image' names 'b\\n\\x00.png', which is not a file",
    json.dumps(RECORD | {"image": "b" * 5000}): "field 'image' names 'bbb.*bbb', which is not a file",
    json.dumps(RECORD | {"image": "folder.png"}): "field 'image' names 'folder.png', which is not a file",
    json.dumps(RECORD | {"image": "\ud800.png"}): "field 'image' .* holds half a surrogate pair; write the whole",
    json.dumps(RECORD | {"image": "text.png"}): "field 'image': image .*text.png cannot be read .no picture format",
    json.dumps(RECORD | {"query": " "}): "field 'query' must be a non-empty string",
    json.dumps(RECORD | {"query": "a \udfff lesion"}): r"field 'query' 'a \\udfff lesion' holds half a surrogate pair",
    json.dumps(RECORD | {"query": "x" * 10_001}): "field 'query' has 10001 characters; shorten it to at most 10000",
    json.dumps(RECORD | {"dataset": 7}): "field 'dataset' must be a non-empty string, not 7",
    json.dumps(RECORD | {"task": None}): "field 'task' must be a non-empty string, not None",
    json.dumps(RECORD | {"bbox": [1, 2, 3]}): r"field 'bbox' must be four finite numbers .* not \[1, 2, 3\]",
    json.dumps(RECORD | {"bbox": "[1, 2, 3, 4]"}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": [1, 2, "3", 4]}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": [True, 2, 3, 4]}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": [1, 2, float("nan"), 4]}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": [1, 2, float("inf"), 4]}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": [1, 2, 10**400, 4]}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": {"x\n" * 500: 10**4000}}): "field 'bbox' must be four finite numbers",
    json.dumps(RECORD | {"bbox": 0}).replace("0}", "[" * 900 + "]" * 900 + "}"): "field 'bbox' must be four finite",
    json.dumps(RECORD | {"bbox": [3, 2, 3, 4]}): r"field 'bbox' \[3, 2, 3, 4\] is an empty or inverted box; write x1 <",
    json.dumps(RECORD | {"bbox": [1, 4, 3, 4]}): "field 'bbox' .* is an empty or inverted box",
    json.dumps(RECORD | {"bbox": [1, -2, 3, 4]}): "field 'bbox' .* reaches outside the 60x40 image; write pixels of",
    json.dumps(RECORD | {"bbox": [1, 5, 3, 4]}): "field 'bbox' .* is an empty or inverted box",
    json.dumps(RECORD | {"bbox": [-1, 2, 3, 4]}): "field 'bbox' .* reaches outside the 60x40 image",
    json.dumps(RECORD | {"bbox": [1, 2, 60.5, 40]}): r"field 'bbox' \[1, 2, 60.5, 40\] reaches outside the 60x40 image",
    json.dumps(RECORD | {"bbox": [1, 2, 60, 40.5]}): "field 'bbox' .* reaches outside the 60x40 image",
    json.dumps(RECORD | {"width": 60}): "field 'height' is missing",
    json.dumps(RECORD | {"width": 60.0, "height": 40}): "fields 'width' and 'height' must be positive integers",
    json.dumps(RECORD | {"width": 60, "height": 0}): "fields 'width' and 'height' must be positive integers",
    json.dumps(RECORD | {"width": 10**4000, "height": 1}): "fields 'width' and 'height' must be positive integers",
    json.dumps(
        RECORD | {"width": 120, "height": 80}
    ): "fields .* say 120x80, but 'a.png' is 60x40 as displayed .*; give",
    json.dumps(RECORD | {"width": 40, "height": 60}): "fields 'width' and 'height' say 40x60, but",
    json.dumps({"image": "a.png", "conversations": [TURN]}): "field 'conversations' must be a question and an answer",
    json.dumps(
        {"image": "a.png", "conversations": [TURN, TURN]}
    ): r"field 'conversations\[1\].value' 'where\?': not valid JSON .*; write \[x1, y1, x2, y2\]",
    json.dumps(
        {"image": "a.png", "conversations": [{"value": "<image>"}, {"value": [1, 2, 3, 4]}]}
    ): r"field 'conversations\[0\].value' must be a non-empty string",
    json.dumps(
        {"image": "a.png", "conversations": [TURN, {"value": [1, 2, 99, 4]}]}
    ): r"field 'conversations\[1\].value' \[1, 2, 99, 4\] reaches outside",
    json.dumps({"image": "a.png", "problem": "it"}): "field 'solution' is missing",
    json.dumps(OLDER | {"problem": "\ud800"}): "field 'problem' .* holds half a surrogate pair",
    json.dumps(OLDER | {"solution": [4, 3, 2, 1]}): "field 'solution' .* inverted",
    json.dumps(OLDER | {"solution": "<answer>" + "[" * 5000}): r"field 'solution' '<answer>\[\[.*': not valid JSON",
}


@pytest.mark.parametrize("line, message", BAD.items(), ids=range(len(BAD)))
def test_bad_records_name_file_line_and_field(folder, line, message):
    path = write(folder, RECORD, line, RECORD)
    with pytest.raises(InputError, match=f"^{path}:2: {message}") as caught:
        load_jsonl(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) - len(str(path)) < 300
    assert [s.source for s in load_jsonl(path, BadRecords(1))] == [f"{path}:1", f"{path}:3"]


def test_bad_json_on_line_17_is_named_and_can_be_skipped(folder):
    lines = [json.dumps(RECORD | {"query": f"lesion {n}"}).encode() for n in range(1, 31)]
    for bad_line in (lines[16][:-1], lines[16] + b"}", lines[16].replace(b"17", b"\xff"), lines[16] + lines[17]):
        path = folder / "train.jsonl"
        path.write_bytes(b"\r\n".join([*lines[:16], bad_line, *lines[17:]]))
        with pytest.raises(InputError, match=f"^{path}:17: not valid JSON in UTF-8 .*--skip-bad N"):
            load_jsonl(path)
        bad = BadRecords(1)
        samples = load_samples(f"{path}", 0, "train", bad)
        assert [s.query for s in samples] == [f"lesion {n}" for n in range(1, 31) if n != 17]
        assert [s.source for s in samples][15:17] == [f"{path}:16", f"{path}:18"]
        assert list(bad.sentences) == [f"{path}:17"]
        assert bad.sentences[f"{path}:17"].startswith(f"{path}:17: not valid JSON in UTF-8 (")
        assert "--skip-bad" not in bad.sentences[f"{path}:17"]


def test_bad_records_count_sources_once_and_stop_at_one_too_many(folder):
    bad = BadRecords(2)
    for source in ("a:1", "a:2", "a:1", "a:2"):
        bad.add(source, InputError(f"{source}: no"))
    assert bad.sentences == {"a:1": "a:1: no", "a:2": "a:2: no"}
    with pytest.raises(InputError, match="^b:1: no .this is bad record number 3, --skip-bad allows 2.$"):
        bad.add("b:1", InputError("b:1: no"))
    with pytest.raises(InputError, match="^b:1: no .--skip-bad N leaves up to N such records out.$"):
        BadRecords().add("b:1", InputError("b:1: no"))
    two, one = write(folder, RECORD, "{", "{", name="two.jsonl"), write(folder, RECORD, "{", name="one.jsonl")
    assert len(load_samples(f"{two},{one}", 0, "train", BadRecords(3))) == 2  # the bound is one for all files
    with pytest.raises(InputError, match=f"^{one}:2: .* bad record number 3, --skip-bad allows 2"):
        load_samples(f"{two},{one}", 0, "train", BadRecords(2))


def test_a_line_of_100_mb_is_refused_without_reading_it_whole(folder):
    path, good = folder / "train.jsonl", json.dumps(RECORD).encode()
    with open(path, "wb") as file:
        file.write(good + b'\n{"query": "')
        file.seek(100_000_000)  # a hole: takes no room on the disk
        file.write(
            b'"}\n' + good + b"\n" + good.ljust(data.MAX_LINE - 1) + b"\n" + good.ljust(data.MAX_LINE) + b"\n" + good
        )
    tracemalloc.start()
    bad = BadRecords(2)
    samples = load_jsonl(path, bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.source for s in samples] == [f"{path}:{n}" for n in (1, 3, 4, 6)] and peak < 10_000_000
    assert list(bad.sentences) == [f"{path}:2", f"{path}:5"]
    with pytest.raises(
        InputError, match=f"^{path}:2: the line is longer than 1000000 bytes; write one JSON object per"
    ):
        load_jsonl(path)


def test_bad_files(folder):
    for name, why in [("none.jsonl", "No such file"), ("n" * 300, "name too long")]:
        with pytest.raises(InputError, match=f"^{folder}/{name}: cannot be read .*{why}.*; name a JSONL file"):
            load_jsonl(folder / name)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    for path in (folder / "folder.png", folder / "pipe", folder / "link", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(InputError, match=f"^{path}: is not a file; name a JSONL file of records"):
            load_samples(str(path), 0, "train", BadRecords(9))
        with pytest.raises(InputError, match=f"^{path}: is not a file; write {{"):
            read_queries(path)
    with pytest.raises(InputError, match=r"^a\\x00\\n: cannot be read"):
        load_jsonl("a\0\n")
    with pytest.raises(InputError, match="a.png:1: not valid JSON in UTF-8 .*can't decode byte 0x89"):
        load_jsonl(folder / "a.png")
    with pytest.raises(InputError, match="train.jsonl: holds no usable records; write one"):
        load_jsonl(write(folder, "", " "))
    with pytest.raises(InputError, match="train.jsonl: holds no usable records"):
        load_jsonl(write(folder, "{", "{"), BadRecords(9))
    (folder / "new\nline").mkdir()
    odd = write(folder / "new\nline", RECORD)
    with pytest.raises(InputError, match=r"/new\\nline/train.jsonl:1: field 'image' names 'a.png', .*/new\\nline \("):
        load_jsonl(odd)
    with pytest.raises(
        InputError, match="old.json: not valid JSON .*line 2 column 1.*; a file that begins with . must"
    ):
        load_jsonl(write(folder, "[{}", "{}]", name="old.json"), BadRecords(9))
    with pytest.raises(InputError, match="old.json: holds no usable records"):
        load_jsonl(write(folder, "[]", name="old.json"))
    with open(folder / "old.json", "r+") as file:
        file.truncate(data.MAX_LIST + 1)  # a hole: takes no room on the disk
    with pytest.raises(InputError, match="old.json: has more than 2147483648 bytes; write one JSON object per line"):
        load_jsonl(folder / "old.json")
    listed = write(folder, json.dumps([RECORD, {}, RECORD]), name="old.json")
    with pytest.raises(InputError, match="old.json record 2: field 'query' is missing"):
        load_jsonl(listed)
    assert [s.source for s in load_jsonl(listed, BadRecords(1))] == [f"{listed} record 1", f"{listed} record 3"]


@pytest.mark.parametrize(
    "box, inside",
    [
        ([-10, -5, 30, 35], (0, 0, 30, 35)),
        ([50, 30, 99, 99.5], (50, 30, 60, 40)),
        ([-1e8, 2, 1e8, 4.5], (0, 2, 60, 4.5)),
        ([59.5, -0.001, 60.5, 1], (59.5, 0, 60, 1)),
    ],
)
def test_boxes_over_the_edge_are_cut_and_counted_where_that_is_asked_for(folder, box, inside):
    turns = [TURN, {"value": f"<answer>{box}</answer>"}]
    path = write(folder, RECORD, RECORD | {"bbox": box}, {"image": "a.png", "conversations": turns})
    with pytest.raises(InputError, match=":2: field 'bbox' .* reaches outside the 60x40 image; .* cut by --clip"):
        load_jsonl(path)
    bad = BadRecords()
    samples = load_samples(str(path), 0, "train", bad, clip=True)
    assert [s.box for s in samples] == [(1, 2.5, 30, 40), inside, inside]
    assert bad.clipped == [f"{path}:2", f"{path}:3"]
    assert bad.lines() == [f"boxes clipped at the picture's edge: 2 ({path}:2, {path}:3)"]


@pytest.mark.parametrize(
    "box", [[60, 2, 70, 4], [-9, 2, 0, 4], [1, 40, 3, 41], [1, -4, 3, 0], [1e8, 1e8, 2e8, 2e8], [70, 2, -3, 4]]
)
def test_of_a_box_outside_the_picture_nothing_is_left_to_cut(folder, box):
    path = write(folder, RECORD | {"bbox": box}, *[RECORD | {"bbox": [-1, 2, 3, 4]}] * 4)
    for clip in (False, True):
        with pytest.raises(InputError, match=":1: field 'bbox' .* (lies outside the 60x40|is an empty or inverted)"):
            load_jsonl(path, clip=clip)
    bad = BadRecords(1)
    assert len(load_jsonl(path, bad, clip=True)) == len(bad.clipped) == 4
    assert bad.lines()[0].startswith(f"left out: {path}:1: field 'bbox' ")
    some = ", ".join(f"{path}:{n}" for n in (2, 3, 4))
    assert bad.lines()[1:] == [f"boxes clipped at the picture's edge: 4 ({some}, ...)"]


def test_a_record_that_is_left_out_is_not_clipped(folder):
    path, bad = write(folder, RECORD, RECORD | {"bbox": [-1, 2, 3, 4], "task": 7}), BadRecords(1)
    load_jsonl(path, bad, clip=True)
    assert bad.clipped == [] and len(bad.lines()) == 1


def test_a_picture_that_cannot_be_read_is_named(folder, monkeypatch):
    (folder / "odd.dds").write_bytes(b"DDS \x7c".ljust(128, b"\0"))  # PIL could be asked to read these
    with pytest.raises(InputError, match="train.jsonl:1: field 'image': image .*odd.dds cannot be read .no picture fo"):
        load_jsonl(write(folder, RECORD | {"image": "odd.dds"}))

    def refuse(path, **_):  # what the system says to anybody but root
        raise PermissionError(13, "Permission denied", str(path))

    path = write(folder, RECORD)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(
        InputError, match=f"^{path}:1: field 'image': image .*a.png cannot be read .Permission denied.; "
    ):
        load_jsonl(path)


def png_with_late_exif(exif):
    """A 60x40 PNG whose EXIF stands behind the pixels, where some tools write it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60, 40, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(61 * 40)))]
    chunks += [(b"eXIf", exif.tobytes()[6:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_from_the_header_is_the_size_of_the_picture(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("e.png", "e.jpg", "e.tif", "e.webp"):
        Image.open(folder / "a.png").save(folder / name, exif=exif)
    Image.open(folder / "a.png").save(folder / "lzw.tif", exif=exif, compression="tiff_lzw")
    (folder / "late.png").write_bytes(png_with_late_exif(exif))
    for name in ("e.png", "e.jpg", "e.tif", "e.webp", "lzw.tif", "late.png"):
        sample = load_jsonl(write(folder, RECORD | {"image": name, "bbox": [1, 2, 30, 30]}))[0]
        assert sample.size == open_image(folder / name).size == ((60, 40) if orientation < 5 else (40, 60)), name
        load(sample)


def test_pixels_are_not_decoded_with_the_record_and_their_damage_is_named_later(folder):
    for name in ("cut.png", "cut.jpg"):
        Image.open(folder / "a.png").save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
        sample = load_jsonl(write(folder, RECORD | {"image": name}))[0]
        assert sample.size == (60, 40)
        with pytest.raises(InputError, match=f"^{sample.source}: image .*{name} cannot be read .*; replace it"):
            load(sample)


def test_a_picture_that_changed_after_its_record_was_read_is_refused(folder):
    sample = load_jsonl(write(folder, RECORD))[0]
    image, box = load(sample)
    assert image.size == (60, 40) and image.mode == "RGB" and box == (1.0, 2.5, 30.0, 40.0)
    Image.new("RGB", (40, 60)).save(folder / "a.png")
    with pytest.raises(InputError, match="train.jsonl:1: field 'image': .*a.png is 40x60 as displayed, but was 60x40"):
        load(sample)


def test_load_samples_reads_several_files(folder):
    one, two = write(folder, RECORD, RECORD), write(folder, RECORD, name="two.jsonl")
    assert [s.dataset for s in load_samples(f"{one}, {two}", 0, "train")] == ["train", "train", "two"]


def test_phantoms_are_cheap_to_list_and_exact_when_loaded():
    samples = load_samples("phantoms", seed=3, split="train")
    assert len(samples) == 20_000 and [s.image.kind for s in samples[:4]] == [*KINDS, KINDS[0]]
    for sample, index in zip(samples[:3], range(3), strict=True):
        image, box = load(sample)
        want = phantom(KINDS[index], 3, index, 140)
        assert np.array_equal(image, want.image) and box == want.box
        assert sample.query == QUERIES[KINDS[index]] and sample.dataset == f"phantoms-{KINDS[index]}"


def test_test_phantoms_are_held_out_and_the_same_for_every_seed():
    train = {s.image for s in load_samples("phantoms:xray", 0, "train")}
    test = load_samples("phantoms:xray", 0, "test")
    assert len(test) == 600 and {s.image.kind for s in test} == {"xray"}
    assert test == load_samples("phantoms:xray", 9, "test") and train.isdisjoint(s.image for s in test)
    assert train.isdisjoint(s.image for s in load_samples("phantoms:xray", 1, "train"))
    for spec in ("phantoms:mri", "phantoms:"):
        with pytest.raises(InputError, match="unknown phantom kind .* dermoscopy, xray, ultrasound"):
            load_samples(spec, 0, "train")
    with pytest.raises(ValueError, match="'val'"):
        load_samples("phantoms", 0, "val")


def test_both_fixture_formats_give_the_same_samples(tmp_path):
    fixtures = DATA / "fixtures"
    if not fixtures.is_dir():
        pytest.skip(f"real images are not here: {fixtures}")
    native = load_jsonl(fixtures / "native.jsonl")
    (tmp_path / "HAM10000_images_part_1").symlink_to(fixtures / "ham10000" / "HAM10000_images_part_1")
    (tmp_path / "HAM10000_images_part_2").symlink_to(fixtures / "ham10000" / "HAM10000_images_part_2")
    vlmr1 = load_jsonl(shutil.copy(fixtures / "vlmr1_rec.jsonl", tmp_path))
    assert len(native) == 12
    for a, b in zip(native, vlmr1, strict=True):
        assert (a.query, a.box, a.image.name) == (b.query, b.box, b.image.name) and np.array_equal(
            load(a)[0], load(b)[0]
        )


@pytest.mark.parametrize("name", ["isic2017", "bccd", "fracatlas"])
def test_real_sets_load(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"real images are not here: {DATA / name}")
    samples = load_jsonl(DATA / name / "val.jsonl")
    for sample in samples[:10]:
        image, box = load(sample)
        assert image.size == sample.size and box == sample.box and sample.dataset == name


# ---------------------------------------------------------------- frames


@given(
    st.tuples(st.floats(0, 900), st.floats(0, 900), st.floats(0.01, 900), st.floats(0.01, 900)),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_frames_go_there_and_back(box, width, height):
    scale = (width / 140, height / 84)
    back = data.to_original(data.to_model(box, scale), scale)
    assert np.allclose(back, box, rtol=0, atol=1e-4)
    assert np.allclose(data.to_model((0, 0, width, height), scale), (0, 0, 140, 84), rtol=0, atol=1e-4)


@given(st.floats(0, 2000), st.floats(0, 2000), st.floats(1, 500), st.floats(1, 500))
def test_answers_are_whole_pixels_within_half_a_pixel(x, y, w, h):
    box = (x, y, x + w, y + h)
    got = json.loads(answer_text(box, "answer", "it"))
    assert np.abs(np.subtract(got, box)).max() <= 0.5 + 1e-9
    assert got[0] < got[2] and got[1] < got[3]


def test_answers_in_full():
    assert answer_text((12.4, 3.6, 99.5, 140.0), "answer", "it") == "[12,4,100,140]"
    assert answer_text((12.4, 3.6, 99.5, 140.0), "think", "it") == (
        "<think> I look for the region that the question describes and frame it. </think>\n"
        '<answer>{"bbox_2d": [12, 4, 100, 140]}</answer>'
    )
    assert answer_text((139.6, 7.1, 139.9, 7.3), "answer", "it") == "[139,7,140,8]"  # thinner than a pixel: inside it


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("style", ["answer", "think"])
@pytest.mark.parametrize("size", [(60, 40), (140, 140), (211, 99)])
def test_prompt_equals_transformers_processor(folder, tokenizer, style, size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    image.save(folder / "a.png")
    config = ImageConfig(max_pixels=140 * 140)
    sample = load_jsonl(write(folder, RECORD | {"query": "the lesión {x} 12", "bbox": [1, 2, 30, 40]}))[0]
    prompt = build_prompt(sample, tokenizer, config, style)

    asked = "the lesión {x} 12"
    if style == "think":
        asked = (
            "Please provide the bounding box coordinate of the region this sentence describes: the lesión {x} 12. "
            "First output the thinking process in <think> </think> tags and then output the final answer in "
            "<answer> </answer> tags. Output the final answer in JSON format."
        )
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)  # its constructor wants a video processor: torchvision
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    processor.image_token = "<|image_pad|>"
    vision = processor.image_processor(images=[image], return_tensors="pt")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    expanded = text.replace("<|image_pad|>", processor.replace_image_token(vision, 0))
    assert prompt.text == text and text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert prompt.ids.dtype == torch.int64 and prompt.ids.tolist() == tokenizer(expanded).input_ids
    assert torch.equal(prompt.patches, vision["pixel_values"])
    assert prompt.grid == tuple(vision["image_grid_thw"][0].tolist())

    _, gh, gw = prompt.grid
    assert prompt.scale == (size[0] / (14 * gw), size[1] / (14 * gh)) and prompt.box == (1.0, 2.0, 30.0, 40.0)
    assert prompt.positions.shape == (3, len(prompt.ids)) and prompt.next_position == int(prompt.positions.max()) + 1


def test_a_template_of_its_own_is_used_and_qwens_stands_in_for_none(folder, tokenizer):
    sample = load_jsonl(write(folder, RECORD))[0]
    full = build_prompt(sample, tokenizer, ImageConfig(), "think")
    bare = data.load_tokenizer(write_tokenizer(folder / "bare", template=None))
    assert bare.chat_template is None
    assert build_prompt(sample, bare, ImageConfig(), "think").text == full.text
    short = "<|vision_start|><|image_pad|><|vision_end|>{{ messages[0].content[1].text }}:"
    nano = data.load_tokenizer(write_tokenizer(folder / "nano", template=short))
    prompt = build_prompt(sample, nano, ImageConfig(), "answer")
    assert prompt.text == "<|vision_start|><|image_pad|><|vision_end|>the lesion:"
    assert prompt.grid == (1, 4, 6) and prompt.ids[:8].tolist() == [259] + [261] * 6 + [260]
    two = data.load_tokenizer(write_tokenizer(folder / "two", template=short + "<|image_pad|>"))
    with pytest.raises(InputError, match="chat template writes 2 image tokens"):
        build_prompt(sample, two, ImageConfig(), "answer")


def test_the_scale_follows_the_configured_patch(folder, tokenizer):
    config = ImageConfig(patch_size=8, min_pixels=256, max_pixels=10_000)
    prompt = build_prompt(load_jsonl(write(folder, RECORD))[0], tokenizer, config, "answer")
    assert prompt.grid == (1, 4, 8) and prompt.scale == (60 / 64, 40 / 32)


def test_prompts_are_refused_never_cut(folder, tokenizer):
    sample = load_jsonl(write(folder, RECORD))[0]
    n = len(build_prompt(sample, tokenizer, ImageConfig(), "answer").ids)
    assert len(build_prompt(sample, tokenizer, ImageConfig(), "answer", max_prompt_tokens=n).ids) == n
    with pytest.raises(
        InputError,
        match=f"train.jsonl:1: the prompt has {n} tokens .6 for field 'image', .* field 'query'., but {n - 1} are "
        "allowed; lower --max-pixels or --max-tokens or shorten the query",
    ):
        build_prompt(sample, tokenizer, ImageConfig(), "answer", max_prompt_tokens=n - 1)
    for token in SPECIAL:
        with pytest.raises(InputError, match="train.jsonl:1: field 'query' .* holds the special token .*; remove it"):
            build_prompt(replace(sample, query=f"the {token} lesion"), tokenizer, ImageConfig(), "answer")
    Image.new("RGB", (402, 2)).save(folder / "a.png")
    sliver = load_jsonl(write(folder, RECORD | {"bbox": [0, 0, 2, 2]}))[0]
    with pytest.raises(InputError, match="train.jsonl:1: field 'image': one side of a 402x2 image.*; crop it"):
        build_prompt(sliver, tokenizer, ImageConfig(), "answer")


def test_prompts_are_checked_without_their_pictures(folder, tokenizer):
    older = {"image": "a.png", "problem": "<image>Where?", "solution": [1, 2, 3, 4]}
    talk = {"image": "a.png", "conversations": [{"value": "Where?"}, {"value": [1, 2, 3, 4]}]}
    path = write(folder, RECORD, older, talk)
    first, second, third = load_jsonl(path)
    n = len(build_prompt(first, tokenizer, ImageConfig(), "answer").ids)
    check_prompt(replace(first, size=None), tokenizer, ImageConfig(), "answer", n)  # of no file: its picture is read
    (folder / "a.png").unlink()
    check_prompt(first, tokenizer, ImageConfig(), "answer", n)
    check_prompt(first, tokenizer, ImageConfig(), "answer", None)
    with pytest.raises(InputError, match="train.jsonl:1: image .*a.png is not a file; name a picture"):
        check_prompt(first, tokenizer, ImageConfig(), "answer", n, decode=True)
    for sample, field in [(first, "query"), (second, "problem"), (third, r"conversations\[0\].value")]:
        with pytest.raises(
            InputError, match=f"^{sample.source}: the prompt has .* field '{field}'.*, but 9 are allowed"
        ):
            check_prompt(sample, tokenizer, ImageConfig(), "answer", 9)
        with pytest.raises(InputError, match=f"^{sample.source}: field '{field}' .* special token"):
            check_prompt(replace(sample, query="a <|im_end|>"), tokenizer, ImageConfig(), "answer", 99)


def test_phantoms_are_checked_without_drawing(tokenizer, monkeypatch):
    sample = data.phantom_samples("xray", 0, 0, 1, size=112)[0]
    n = len(build_prompt(sample, tokenizer, ImageConfig(), "answer").ids)
    monkeypatch.delattr(images, "phantom")
    check_prompt(sample, tokenizer, ImageConfig(), "answer", n)
    with pytest.raises(
        InputError, match=f"phantoms:xray seed 0 index 0: the prompt has {n} tokens .16 for field 'image'"
    ):
        check_prompt(sample, tokenizer, ImageConfig(), "answer", n - 1)


def test_tokenizer_errors_name_the_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        data.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no tokenizer"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(
        InputError, match="image_pad.* is 261 in the tokenizer, but config.json: image_token_id is 151655"
    ):
        data.load_tokenizer(write_tokenizer(tmp_path / "other", image_token_id=151655))


# ---------------------------------------------------------------- positions


def test_mrope_golden_values():
    """Two words, an image of 4x6 patches (2x3 tokens), two words, an image of 2x2 patches (one token), one word."""
    ids = torch.tensor([7, 7] + [9] * 6 + [7, 7] + [9] + [7])
    positions, next_position = mrope_positions(ids, [(1, 4, 6), (1, 2, 2)], 9, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert next_position == 9
    assert mrope_positions(ids[:8], [(1, 4, 6)], 9, 2)[1] == 5  # nothing after the image: still its maximum + 1
    assert mrope_positions(ids[:2], [], 9, 2)[0].tolist() == [[0, 1]] * 3
    for grids in ([(1, 4, 6)], [(1, 4, 4), (1, 2, 6)], [(1, 4, 6), (1, 2, 2), (1, 2, 2)]):
        with pytest.raises(ValueError, match="image tokens"):
            mrope_positions(ids, grids, 9, 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
def test_mrope_equals_transformers(parts):
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)  # get_rope_index reads the configuration only: no weights
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()
    ids, grids = [], []
    for words, rows, columns in parts:
        ids += [7] * words + [9] * (rows * columns)
        grids.append((1, 2 * rows, 2 * columns))
    ids = torch.tensor(ids + [7])
    types = (ids == 9).int()
    want, delta = model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=torch.tensor(grids))
    positions, next_position = mrope_positions(ids, grids, 9, 2)
    assert positions.dtype == torch.int64 and torch.equal(positions, want[:, 0])
    assert next_position == len(ids) + int(delta)


# ---------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63))
def test_every_epoch_is_a_permutation_and_nothing_is_dropped(n, batch_size, seed):
    sampler = Sampler(n, batch_size, seed)
    steps = -(-3 * n // batch_size)
    stream = [i for step in range(steps) for i in sampler.indices(step)]
    assert all(len(sampler.indices(step)) == batch_size for step in range(steps))
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000), st.integers(0, 1000))
def test_a_step_needs_no_history(n, batch_size, seed, step):
    """Resume is random access; and the batch size only cuts the stream, it does not change it."""
    walked = Sampler(n, batch_size, seed)
    for other in (0, step + 3, max(step - 1, 0)):
        walked.indices(other)
    batch = walked.indices(step)
    assert batch == Sampler(n, batch_size, seed).indices(step)
    ones = Sampler(n, 1, seed)
    assert batch == [ones.indices(step * batch_size + k)[0] for k in range(batch_size)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000), st.integers(0, 500), st.integers(0, 200))
def test_take_cuts_the_same_stream_anywhere(n, batch_size, seed, first, count):
    sampler = Sampler(n, batch_size, seed)
    steps = -(-(first + count) // batch_size)
    stream = [i for step in range(steps) for i in sampler.indices(step)]
    assert sampler.take(first, count) == stream[first : first + count]


def test_order_depends_on_seed_and_epoch_and_never_changes():
    a, b = Sampler(50, 50, 0), Sampler(50, 50, 1)
    assert len({tuple(order) for order in (a.indices(0), a.indices(1), b.indices(0), b.indices(1), range(50))}) == 5
    golden = [[0, 2, 1], [4, 3, 3], [2, 4, 1], [0, 2, 1]]  # a run saved today resumes with any numpy and torch
    assert [Sampler(5, 3, 0).indices(step) for step in range(4)] == golden
    for n, batch_size, seed in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        with pytest.raises(InputError, match="must be at least"):
            Sampler(n, batch_size, seed)
