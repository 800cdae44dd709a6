"""Records -> samples: each line on its own, whatever it holds; sizes from headers; phantoms; targets of any task."""

import json
import os
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import data
from data import BadRecords, held_out_phantoms, load_jsonl, load_samples
from errors import InputError
from images import load
from phantoms import KINDS, QUERIES, phantom
from tasks import TASKS
from tasks.task import Task, require

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
IMAGE_ID = 256 + 5
# What Qwen2.5-VL's own template says about one user turn, less its branches for video and for counting images.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder, bpe, special, template, image_token_id):
    """A checkpoint folder as far as text goes: byte-level, cut up as Qwen2 does."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # The two of tool calls are ordinary tokens that are never cut.
    tokenizer.add_tokens([AddedToken(token, special="|" in token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"model_max_length": 131072} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "image_token_id": image_token_id}))
    return folder


def write_tokenizer(folder, template=TEMPLATE, image_token_id=IMAGE_ID):
    """One token per byte, and Qwen's special ones."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return save_tokenizer(folder, models.BPE(vocab=alphabet, merges=[]), SPECIAL, template, image_token_id)


def refused(words, function, *arguments, **options):
    """The call is one printable sentence, with these words in it."""
    with pytest.raises(InputError, match=words) as caught:
        function(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


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


def read(path, *arguments, tasks=TASKS, **options):
    return load_jsonl(path, tasks, *arguments, **options)


# ------------------------------------------------------------------------------------------------------------ records


def test_our_record_and_its_defaults(folder):
    full = RECORD | {"width": 60, "height": 40, "dataset": "isic", "task": "box", "grade": 3, "at": ["left"]}
    path = write(folder, RECORD, "", full, RECORD | {"dataset": ""}, RECORD | {"query": " x\u2028y "})
    first, second, third, fourth = read(path)
    assert (first.media, first.query, first.target) == (folder / "a.png", "the lesion", (1.0, 2.5, 30.0, 40.0))
    assert (first.dataset, first.task, first.size, first.source) == ("train", "box", (60, 40), f"{path}:1")
    assert (second.key, second.source) == (("isic", "box"), f"{path}:3")
    assert first.extra == {} and second.extra == {"grade": 3, "at": ["left"]}  # for a reward of one's own
    assert third.dataset == "train" and fourth.query == "x\u2028y"
    assert first == replace(first) and hash(second) == hash(replace(second))
    path = write(folder, json.dumps(RECORD | {"query": "x\u2028y"}, ensure_ascii=False), RECORD)  # is no line's end
    assert [s.source for s in read(path)] == [f"{path}:1", f"{path}:2"]
    twice = json.dumps(RECORD | {"x": 0}).replace("{", '{"bbox": 0, ').replace("0}", "[" * 900 + "]" * 900 + "}")
    assert read(write(folder, twice, name="b"))[0].target == first.target  # of two fields of a name, the last
    two = folder / "two.jsonl"
    two.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\r\n")  # as Windows editors save it
    assert [s.dataset for s in load_samples(f"{path}, {two}", TASKS, 0, "train")] == ["train", "train", "two"]


@pytest.mark.parametrize("answer", [[1, 2, 30, 40], "[1, 2, 30, 40]", "<answer> [1,2,30,40.0] </answer>"])
def test_vlm_r1_records(folder, answer):
    asked = "<image>Please provide the bounding box coordinate of the region this sentence describes: the lesion."
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    new = read(write(folder, {"id": 1, "image": "a.png", "conversations": turns}))
    older = {"image": "a.png", "problem": "Where is it?", "solution": answer}
    path = write(folder, json.dumps([older, older], indent=1), name="old.json")
    old = read(path)
    assert [s.query for s in new + old] == ["the lesion", "Where is it?", "Where is it?"]
    assert {s.target for s in new + old} == {(1.0, 2.0, 30.0, 40.0)}
    assert old[1].source == f"{path} record 2" and old[0].dataset == "old"
    assert new[0].extra == {"id": 1} and old[0].extra == {}


class Level(Task):
    """A task of one's own: a whole number, and a text."""

    name = "level"

    def read(self, record):
        require(type(record["grade"]) is int, record, "grade", "a whole number")
        return record["grade"], record.text("note")


def test_a_task_of_ones_own_reads_its_target_and_leaves_the_rest(folder):
    tasks = TASKS | {"level": Level()}
    mine = {"image": "a.png", "query": "how bad?", "task": "level", "grade": 3, "note": " severe ", "by": "a"}
    sample, box = read(write(folder, mine, RECORD | {"grade": 3}), tasks=tasks)
    assert sample.target == (3, "severe") and sample.extra == {"by": "a"} and sample.key == ("train", "level")
    assert box.target == (1.0, 2.5, 30.0, 40.0) and box.extra == {"grade": 3}
    nested = json.loads("[" * 900 + "]" * 900)
    for changes, words in [
        ({"grade": "3\n"}, r"field 'grade' must be a whole number, not '3\\n' "),
        ({"grade": nested}, r"field 'grade' must be a whole number, not \[\[\[\[*\.\.\."),
        ({"note": None}, "field 'note' must be a non-empty string, not None "),
        ({"task": "sing"}, "field 'task' is 'sing'; there are box, .*dvc, level "),
    ]:
        path = write(folder, RECORD, mine | changes)
        assert len(read(path, BadRecords(1), tasks=tasks)) == 1
        refused(f"^{path}:2: {words}", read, path, tasks=tasks)
    path = write(folder, {"image": "a.png", "query": "it", "task": "level"})
    refused("train.jsonl:1: field 'grade' is missing, add it", read, path, tasks=tasks)


TURN, OLDER = {"from": "human", "value": "where?"}, {"image": "a.png", "problem": "it", "solution": [1, 2, 3, 4]}
QUERY, SIZE, PICTURE = "field 'query' ", "fields 'width' and 'height' ", "field 'image' names "
NESTED = json.dumps(RECORD | {"bbox": 0}).replace("0}", "[" * 900 + "]" * 900 + "}")
BAD = [  # words of the sentence, and lines or fields of a record that it is about
    (r"not valid JSON in UTF-8 \(Expecting value: column 11 .*; write one JSON object per line", '{"image": '),
    ("not valid JSON in UTF-8 .maximum recursion depth", "[" * 100_000),
    ("not valid JSON in UTF-8 .*; write", json.dumps(RECORD) + "}", json.dumps(RECORD) * 2),
    ("not valid JSON in UTF-8 .*value has 5000 digits.; write .*--skip-bad N", "9" * 5000, "[1, " + "9" * 5000),
    ("a record must be a JSON object with image, query and a target, not 'text'", '"text"'),
    (r"field 'query' is missing, .* has \['image', 'bbox'\]", '{"image": "a.png", "bbox": [1, 2, 3, 4]}'),
    ("field 'image' is missing, add it", '{"query": "it", "bbox": [1, 2, 3, 4]}'),
    ("field 'bbox' is missing", '{"image": "a.png", "query": "it"}'),
    (QUERY + r"is missing, add it; the record has \['0\\n0", json.dumps({f"{i}\n" * 9: i for i in range(9999)})),
    ("field 'image' must be a non-empty string, not 3", {"image": 3}),
    (PICTURE + "'b.png', which is not a file; paths are relative to /", {"image": "b.png"}),
    (PICTURE + r"'b\\n\\x00.png', which is not a file", {"image": "b\n\0.png"}),
    (PICTURE + "'bbb.*bbb', which is not a file", {"image": "b" * 5000}),
    (PICTURE + "'folder.png', which is not a file", {"image": "folder.png"}),
    ("field 'image' '../a.png' leads out of .*, or allow it by --allow-outside", {"image": "../a.png"}),
    ("field 'image' .* holds half a surrogate pair; write the whole", {"image": "\ud800.png"}),
    ("field 'image': image .*text.png cannot be read .no picture format", {"image": "text.png"}),
    (QUERY + "must be a non-empty string", {"query": " "}),
    (QUERY + r"'a \\udfff lesion' holds half a surrogate pair", {"query": "a \udfff lesion"}),
    (QUERY + "has 10001 characters; shorten it to at most 10000", {"query": "x" * 10_001}),
    ("field 'dataset' must be a non-empty string, not 7", {"dataset": 7}),
    ("field 'task' must be a non-empty string, not None", {"task": None}),
    ("field 'task' is 'classify'; there are box", {"task": "classify"}),
    ("field 'bbox' holds 2 boxes, but one phrase, one box is", {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}),
    (SIZE + "must be positive integers", {"width": 60.0, "height": 40}, {"width": 10**4000, "height": 1}),
    (SIZE + "say 40x60, but 'a.png' is 60x40 as displayed .*; give", {"width": 40, "height": 60}),
    ("field 'height' is missing", {"width": 60}),
    (r"field 'bbox' must be four finite numbers .* not \[1, 2, 3\]", {"bbox": [1, 2, 3]}),
    ("field 'bbox' must be four finite numbers", NESTED, {"bbox": {"x\n" * 500: 10**4000}}, {"bbox": [1, 2, "3", 4]})
    + tuple({"bbox": box} for box in ("[1, 2, 3, 4]", [True, 2, 3, 4], [1, 2, float("inf"), 4], [1, 2, 10**400, 4])),
    (r"field 'bbox' \[3, 2, 3, 4\] is an empty or inverted box; write x1 <", {"bbox": [3, 2, 3, 4]}),
    ("field 'bbox' .* is an empty or inverted box", {"bbox": [1, 5, 3, 4]}),
    (r"field 'bbox' \[1, 2, 60.5, 40\] reaches outside the 60x40 image; write pixels of", {"bbox": [1, 2, 60.5, 40]}),
    ("field 'bbox' .* reaches outside the 60x40 image",)
    + tuple({"bbox": box} for box in ([-1, 2, 3, 4], [1, -2, 3, 4], [1, 2, 60, 40.5])),
    ("field 'conversations' must be a question and an answer", {"conversations": [TURN]}),
    (r"field 'conversations\[1\].value' 'where\?': not valid JSON .*; write \[x1", {"conversations": [TURN, TURN]}),
    (r"field 'conversations\[0\].value' must be a non-empty", {"conversations": [{"value": "<image>"}, TURN]}),
    (r"field 'conversations\[1\].value' .* reaches", {"conversations": [TURN, {"value": [1, 2, 99, 4]}]}),
    ("field 'solution' is missing", {"problem": "it"}),
    ("field 'problem' .* holds half a surrogate pair", OLDER | {"problem": "\ud800"}),
    ("field 'solution' .* inverted", OLDER | {"solution": [4, 3, 2, 1]}),
    (r"field 'solution' '\[\[.*': not valid JSON", OLDER | {"solution": "<answer>" + "[" * 5000}),
]


@pytest.mark.parametrize("words, lines", [(words, lines) for words, *lines in BAD], ids=range(len(BAD)))
def test_bad_records_name_file_line_and_field(folder, words, lines):
    for line in lines:
        path = write(folder, RECORD, line if isinstance(line, str) else RECORD | line, RECORD)
        assert len(refused(f"^{path}:2: {words}", read, path)) < 300 + len(str(path))
        assert [s.source for s in read(path, BadRecords(1))] == [f"{path}:1", f"{path}:3"]


def test_bad_records_count_sources_once_and_stop_at_one_too_many(folder):
    bad = BadRecords(2)
    for source in ("a:1", "a:2", "a:1", "a:2"):
        bad.add(source, InputError(f"{source}: no"))
    assert bad.sentences == {"a:1": "a:1: no", "a:2": "a:2: no"}
    refused("^b:1: no .this is bad record number 3, --skip-bad allows 2.$", bad.add, "b:1", InputError("b:1: no"))
    with pytest.raises(InputError, match="^b:1: no .--skip-bad N leaves up to N such records out.$"):
        BadRecords().add("b:1", InputError("b:1: no"))
    two, one = write(folder, RECORD, "{", "{", name="two.jsonl"), write(folder, RECORD, "{", name="one.jsonl")
    assert len(load_samples(f"{two},{one}", TASKS, 0, "train", BadRecords(3))) == 2  # the bound is one for all files
    words = f"^{one}:2: .* bad record number 3, --skip-bad allows 2"
    refused(words, load_samples, f"{two},{one}", TASKS, 0, "train", BadRecords(2))


def test_a_line_of_100_mb_is_refused_without_reading_it_whole(folder):
    path, good = folder / "train.jsonl", json.dumps(RECORD).encode()
    with open(path, "wb") as file:
        file.write(good + b'\n{"query": "')
        file.seek(100_000_000)  # a hole: takes no room on the disk
        file.write(b"\n".join([b'"}', good, good.ljust(data.MAX_LINE - 1), good.ljust(data.MAX_LINE), good]))
    tracemalloc.start()
    bad = BadRecords(2)
    samples = read(path, bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.source for s in samples] == [f"{path}:{n}" for n in (1, 3, 4, 6)] and peak < 10_000_000
    assert list(bad.sentences) == [f"{path}:2", f"{path}:5"]
    assert "the line is longer than 1000000 bytes; write one JSON object per line" in bad.sentences[f"{path}:2"]


def test_bad_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    (folder / "new\nline").mkdir()
    for path, words in [
        (folder / "none.jsonl", f"^{folder}/none.jsonl: cannot be read .No such file.*; name a JSONL file"),
        (folder / ("n" * 300), "name too long"),
        ("a\0\n", r"^a\\x00\\n: cannot be read"),
        *[(path, f"^{path}: is not a file; name") for path in (folder / "folder.png", folder / "link", "/dev/zero")],
        (folder / "a.png", "a.png:1: not valid JSON in UTF-8 .*can't decode byte 0x89"),
        (write(folder, "", " ", name="a"), "/a: holds no usable records; write one"),
        (write(folder, "{", "{", name="b"), "/b: holds no usable records"),
        (write(folder / "new\nline", RECORD), r"/new\\nline/train.jsonl:1: field 'image' names .*/new\\nline \("),
        (write(folder, "[{}", "{}]", name="c"), "/c: not valid JSON .*line 2 column 1.*; a file that begins with . mu"),
        (write(folder, "[]", name="d"), "/d: holds no usable records"),
    ]:
        refused(words, read, path, BadRecords(0 if "field" in words or "decode" in words else 9))
    listed = write(folder, json.dumps([RECORD, {}, RECORD]), name="old.json")
    refused("old.json record 2: field 'query' is missing", read, listed)
    assert [s.source for s in read(listed, BadRecords(1))] == [f"{listed} record 1", f"{listed} record 3"]
    with open(listed, "r+") as file:
        file.truncate(data.MAX_LIST + 1)  # a hole: takes no room on the disk
    refused("old.json: has more than 2147483648 bytes; write one JSON object per line", read, listed)


def test_boxes_over_the_edge_are_cut_and_counted_where_that_is_asked_for(folder):
    for box, inside in [
        ([-10, -5, 30, 35], (0, 0, 30, 35)), ([50, 30, 99, 99.5], (50, 30, 60, 40)), ([-1e8, 2, 1e8, 4], (0, 2, 60, 4))
    ]:  # fmt: skip
        turns = [TURN, {"value": f"<answer>{box}</answer>"}]
        path = write(folder, RECORD, RECORD | {"bbox": box}, {"image": "a.png", "conversations": turns})
        refused(":2: field 'bbox' .* reaches outside the 60x40 image; .* cut by --clip", read, path)
        bad = BadRecords()
        samples = load_samples(str(path), TASKS, 0, "train", bad, clip=True)
        assert [s.target for s in samples] == [(1, 2.5, 30, 40), inside, inside]
        assert bad.clipped == [f"{path}:2", f"{path}:3"]
        assert bad.lines() == [f"boxes clipped at the picture's edge: 2 ({path}:2, {path}:3)"]
    path, bad = write(folder, RECORD, RECORD | {"bbox": [-1, 2, 3, 4], "query": 7}), BadRecords(1)
    read(path, bad, clip=True)
    assert bad.clipped == [] and len(bad.lines()) == 1  # a record that is left out is not clipped


@pytest.mark.parametrize("box", [[60, 2, 70, 4], [-9, 2, 0, 4], [1, 40, 3, 41], [1, -4, 3, 0], [70, 2, -3, 4]])
def test_of_a_box_outside_the_picture_nothing_is_left_to_cut(folder, box):
    path = write(folder, RECORD | {"bbox": box}, *[RECORD | {"bbox": [-1, 2, 3, 4]}] * 4)
    for clip in (False, True):
        refused(":1: field 'bbox' .* (lies outside the 60x40|is an empty or inverted)", read, path, clip=clip)
    bad = BadRecords(1)
    assert len(read(path, bad, clip=True)) == len(bad.clipped) == 4
    assert bad.lines()[0].startswith(f"left out: {path}:1: field 'bbox' ")
    assert bad.lines()[1].endswith(f"edge: 4 ({path}:2, {path}:3, {path}:4, ...)")


# ----------------------------------------------------------------------------------------------------- their pictures


def test_a_picture_that_the_system_refuses_is_named(folder, monkeypatch):
    def refuse(path, **_):  # what the system says to anybody but root
        raise PermissionError(13, "Permission denied", str(path))

    path = write(folder, RECORD)
    monkeypatch.setattr(Image, "open", refuse)
    refused(f"^{path}:1: field 'image': image .*a.png cannot be read .Permission denied.", read, path)


def png_with_late_exif(exif):
    """A 60x40 PNG whose EXIF stands behind the pixels, where some tools write it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60, 40, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(61 * 40)))]
    chunks += [(b"eXIf", exif.tobytes()[6:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_the_size_from_the_header_is_the_size_of_the_picture(folder):
    exif, stored = Image.Exif(), Image.open(folder / "a.png")
    for exif[0x0112] in range(1, 9):
        for name in ("e.png", "e.jpg", "e.tif", "e.webp"):
            stored.save(folder / name, exif=exif)
        stored.save(folder / "lzw.tif", exif=exif, compression="tiff_lzw")
        (folder / "late.png").write_bytes(png_with_late_exif(exif))
        for name in ("e.png", "e.jpg", "e.tif", "e.webp", "lzw.tif", "late.png"):
            sample = read(write(folder, RECORD | {"image": name, "bbox": [1, 2, 30, 30]}))[0]
            assert sample.size == load(sample)[0].size == ((60, 40) if exif[0x0112] < 5 else (40, 60)), name


def flipped(content):
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]


def test_pixels_are_not_decoded_with_the_record_and_their_damage_is_named_later(folder):
    for name, broken in ("cut.png", lambda b: b[:-999]), ("cut.jpg", lambda b: b[:-999]), ("bit.png", flipped):
        Image.open(folder / "a.png").save(folder / name)
        (folder / name).write_bytes(broken((folder / name).read_bytes()))
        sample = read(write(folder, RECORD | {"image": name}))[0]
        assert sample.size == (60, 40)
        refused(f"^{sample.source}: image .*{name} cannot be read .*; replace it", load, sample)


def test_a_picture_that_changed_after_its_record_was_read_is_refused(folder):
    sample = read(write(folder, RECORD))[0]
    image, box = load(sample)
    assert image.size == (60, 40) and image.mode == "RGB" and box == (1.0, 2.5, 30.0, 40.0)
    Image.new("RGB", (40, 60)).save(folder / "a.png")
    refused("train.jsonl:1: field 'image': .*a.png is 40x60 as displayed, but was 60x40", load, sample)


# ----------------------------------------------------------------------------------------------------------- phantoms


def test_phantoms_are_cheap_to_list_one_dataset_and_exact_when_loaded():
    samples = load_samples("phantoms", TASKS, seed=3, split="train")
    assert len(samples) == 20_000 and [s.media.kind for s in samples[:4]] == [*KINDS, KINDS[0]]
    assert {s.key for s in samples} == {("phantoms", "box")}
    for sample, index in zip(samples[:3], range(3), strict=True):
        image, box = load(sample)
        want = phantom(KINDS[index], 3, index, 140)
        assert np.array_equal(image, want.image) and box == want.box
        assert sample.query == QUERIES[KINDS[index]] and sample.target is None and sample.size is None


def test_test_phantoms_are_held_out_and_the_same_for_every_seed():
    def listed(seed, split):
        return load_samples("phantoms:xray", TASKS, seed, split)

    train, test = {s.media for s in listed(0, "train")}, listed(0, "test")
    assert len(test) == 600 and {(s.media.kind, s.dataset) for s in test} == {("xray", "phantoms-xray")}
    assert test == listed(9, "test") and train.isdisjoint(s.media for s in [*test, *listed(1, "train")])
    assert held_out_phantoms("a.jsonl, phantoms:xray,phantoms") == "phantoms:xray,phantoms"
    assert held_out_phantoms("a.jsonl,phantoms.jsonl") == ""
    for spec in ("phantoms:mri", "phantoms:"):
        refused("unknown phantom kind .* dermoscopy, xray, ultrasound", load_samples, spec, TASKS, 0, "train")
    with pytest.raises(ValueError, match="'val'"):
        load_samples("phantoms", TASKS, 0, "val")
