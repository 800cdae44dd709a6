"""Whatever a file of records holds: good samples, or one sentence that begins with the file's name. Nothing else."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import BAD, RECORD, SPECIAL, write_tokenizer
from test_prompts import processor_of

from data import BadRecords, load_jsonl
from errors import InputError
from prompts import load_tokenizer
from tasks import TASKS

SIZES = {"a.png": (60, 40), "turned.jpg": (40, 60), "sliver.png": (402, 2), "cut.png": (60, 40)}  # as displayed
SETTINGS = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of SIZES, cut.png without half of its pixels, and a text file under a picture's name."""
    folder = tmp_path_factory.mktemp("fuzz")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 50).save(folder / "a.png")
    Image.new("L", (60, 40)).save(folder / "turned.jpg", exif=exif)
    Image.new("L", (402, 2)).save(folder / "sliver.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-1000])
    (folder / "text.png").write_text("this is no picture")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("fuzz_tokenizer")))


# ---------------------------------------------------------------- what files hold

anything = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates and control characters too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**310) | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)
numbers = st.sampled_from([0, 1, 39, 40, 40.5, 59, 60, 60.5]) | st.integers(-2, 70) | st.floats(-2, 70) | st.floats()
inside = st.tuples(*[st.floats(0, 19), st.floats(0, 19), st.floats(20, 40), st.floats(20, 40)]).map(list)
boxes = inside | st.lists(numbers, min_size=4, max_size=4) | st.lists(numbers, min_size=3, max_size=5)
answers = boxes | boxes.map(json.dumps) | boxes.map(lambda box: f"<answer>{json.dumps(box)}</answer>")
queries = st.sampled_from(["the lesion", "<image>Where is it?", "<image>", " \n", "x" * 10_001, *SPECIAL]) | anything
images = st.sampled_from([*SIZES, " a.png", "./a.png", "text.png", "b.png", ".", "..", "a\0", "b" * 300, "\udc80"])
plausible = {
    "image": images,
    "query": queries,
    "bbox": boxes,
    "width": st.sampled_from([60, 40, 60.0, True, 0, 10**400]),
    "height": st.sampled_from([40, 60, "40", None, -1]),
    "dataset": queries,
    "task": queries,
    "problem": queries,
    "solution": answers,
    "conversations": st.lists(st.fixed_dictionaries({"value": queries | answers}), min_size=1, max_size=3)
    | st.tuples(st.fixed_dictionaries({"value": queries}), st.fixed_dictionaries({"value": answers})).map(list),
}
valid = st.fixed_dictionaries(
    {"image": st.sampled_from(["a.png", "turned.jpg"]), "query": st.text(min_size=1).filter(str.strip), "bbox": inside}
)
fields = st.sampled_from(list(plausible))
odd_records = st.builds(  # valid up to some fields, which are gone, hold something plausible, or anything at all
    lambda base, removed, changed: {k: v for k, v in (base | changed).items() if k != removed},
    valid,
    st.sampled_from(["", "", "", "image", "query", "bbox"]),
    st.one_of(
        fields.flatmap(lambda field: st.fixed_dictionaries({field: plausible[field]})),
        boxes.map(lambda box: {"bbox": box}),
        st.fixed_dictionaries({"width": plausible["width"], "height": plausible["height"]}),
        st.fixed_dictionaries({}, optional=plausible),
        st.dictionaries(fields, values, max_size=2),
    ),
)


def line(value, ascii_only=True):
    """JSON in one line; lone surrogates, if not escaped, become bytes that are no UTF-8."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw):
    """A valid record with some bytes replaced, cut out or put in."""
    text = bytearray(line(draw(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
        text[at : at + length] = draw(st.text('[]{}",:.-0123 \\u', max_size=3)).encode() or draw(st.binary(max_size=1))
    return bytes(text)


odd_json = st.builds(line, values | st.lists(odd_records | values, max_size=4), st.booleans())
odd_lines = st.one_of(
    st.builds(line, odd_records, st.booleans()),
    st.builds(line, values, st.booleans()),
    mutated(),
    st.binary(max_size=99),
)
NASTY = [text.encode() for _, *lines in BAD for text in lines if isinstance(text, str)]
NASTY += [line(RECORD).replace(b"lesion", b"l\xc3\x28sion"), line(RECORD).decode().encode("utf-16")]

# ---------------------------------------------------------------- records


def read(folder, content, bad=None):
    """The samples of a file with this content, or the InputError's sentence; either way held against the promise."""
    path = folder / "f.jsonl"
    path.write_bytes(content)
    try:
        samples = load_jsonl(path, TASKS, bad)
    except InputError as error:
        sentences, samples = [str(error)], str(error)
    else:
        sentences = []
        for sample in samples:
            width, height = SIZES[sample.media.name]
            x1, y1, x2, y2 = sample.target
            assert sample.size == (width, height) and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert sample.query.strip() == sample.query != "" and sample.query.encode() and len(sample.query) <= 10_000
    for sentence in [*sentences, *(bad.sentences.values() if bad else [])]:
        assert re.match(f"{re.escape(str(path))}(:[0-9]+| record [0-9]+)?: ", sentence), sentence
        assert sentence.isprintable() and len(sentence) < 300 + len(str(path))
    return samples


@SETTINGS
@given(
    st.binary(max_size=300) | st.text('[]{}",:0123 \n\\eEtrunlfas', max_size=60).map(str.encode) | mutated() | odd_json
)
def test_whatever_bytes_a_file_holds(folder, content):
    read(folder, content)


@settings(SETTINGS, max_examples=200)
@given(odd_records, st.booleans())
def test_odd_records(folder, record, ascii_only):
    samples = read(folder, line(record, ascii_only))
    if not isinstance(samples, str):
        width, height = samples[0].size
        assert record.get("width", width) == width and record.get("height", height) == height


@SETTINGS
@given(st.lists(odd_lines.map(lambda text: text.replace(b"\n", b"")) | st.sampled_from(NASTY), max_size=6))
@example([b" " * 1_000_001 + line(RECORD), b"\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + line(RECORD)])
def test_a_line_does_not_depend_on_its_neighbours(folder, lines):
    """With bad lines allowed a file gives what its lines give one by one, and lists every bad one by its number."""
    lines = [line(RECORD), *lines]  # one that begins with [ would make the file a JSON list
    want, sources = [], []
    for number, text in enumerate(lines, 1):
        alone, source = read(folder, line(RECORD) + b"\n" + text, BadRecords(1))[1:], f"{folder / 'f.jsonl'}:{number}"
        want += [replace(sample, source=source) for sample in alone]
        if not alone and text.strip(b"\xef\xbb\xbf \t\r\n"):
            sources.append(source)
    bad = BadRecords(10**6)
    assert read(folder, b"\n".join(lines), bad) == want and list(bad.sentences) == sources


# ---------------------------------------------------------------- prompts


@SETTINGS
@given(
    st.sampled_from(list(SIZES)),
    st.lists(anything | st.sampled_from(SPECIAL) | st.text("<|>imagepd_{}"), max_size=4).map("".join),
    st.sampled_from(["answer", "think"]),
    st.none() | st.integers(0, 300),
)
@example("cut.png", "it", "answer", None)
@example("sliver.png", "it", "answer", None)
def test_check_says_what_prompt_would(folder, tokenizer, image, query, style, most):
    samples = read(folder, line(RECORD | {"image": image, "query": query, "bbox": [0, 0, 2, 2]}))
    if isinstance(samples, str):
        return
    said, processor = [], processor_of(tokenizer, style, max_prompt_tokens=most)
    for call in (processor.check, lambda sample: processor.check(sample, decode=True), processor.prompt):
        try:
            found = call(samples[0])
            said.append("")
        except InputError as error:
            said.append(str(error))
            assert said[-1].startswith(f"{folder / 'f.jsonl'}:1: ") and said[-1].isprintable() and len(said[-1]) < 400
    assert said[1] == said[2] and (said[0] == said[2] or image == "cut.png")
    if not said[2]:
        assert processor.check(samples[0]) == len(found.ids) == found.positions.shape[1] <= (most or 10**6)
