"""prepare/queries.py: records asked for in other words, and nothing else about them changes."""

import json

import pytest
from layouts import bright, picture, refusal, run

from data import load_jsonl
from prepare import queries
from tasks import TASKS

PHRASES = ["the melanoma", "the dark lesion", "what looks malignant"]
TABLE = {"nv": "the mole", "mel": PHRASES, "bcc": ["the basal cell carcinoma"], "df": "never asked for"}


@pytest.fixture
def flags(tmp_path):
    """Sixty records of three classes and one picture, a blank line after the first; the table."""
    picture(tmp_path / "set" / "images" / "a.png")
    record = {"image": "images/a.png", "bbox": [10, 8, 30, 28], "grade": 3, "width": 64, "height": 48}
    lines = [json.dumps(record | {"query": ["nv", "mel", "bcc"][i % 3]}) for i in range(60)]
    (tmp_path / "set" / "train.jsonl").write_text("\n\n".join(lines[:2]) + "\n" + "\n".join(lines[2:]))
    (tmp_path / "q.json").write_text(json.dumps(TABLE))
    return [tmp_path / "set" / "train.jsonl", tmp_path / "q.json", "--out", tmp_path / "set" / "new.jsonl"]


def test_records_are_asked_for_in_the_words_of_a_file(tmp_path, flags):
    def asked(*more) -> list[str]:
        assert "new.jsonl: 60 records" in run(queries, *flags, "--overwrite", *more)
        records = [json.loads(line) for line in flags[3].read_text().splitlines()]
        for new, old in zip(records, filter(str.strip, flags[0].read_text().splitlines()), strict=True):
            assert new | {"query": ""} == json.loads(old) | {"query": "", "dataset": "train"}  # nothing else changes
        return [record["query"] for record in records]

    first, again, other = asked(), asked("--seed", 0), asked("--seed", 1)
    assert first[0::3] == ["the mole"] * 20 and first[2::3] == ["the basal cell carcinoma"] * 20
    assert set(first[1::3]) == set(other[1::3]) == set(PHRASES)  # each phrase comes up
    assert first == again != other
    assert first[1:10:3] == ["the dark lesion", "what looks malignant", "what looks malignant"]  # and always will
    assert asked("--first") == ["the mole", "the melanoma", "the basal cell carcinoma"] * 20
    assert "already there; name another --out, or give --overwrite" in run(queries, *flags, expect=2)
    assert "--seed must not be negative" in run(queries, *flags, "--seed", -1, expect=2)


def test_questions_of_labels_and_grades_are_asked_without_their_options(tmp_path, flags):
    more = [{"task": "label", "options": ["a", "b"], "label": "b"}, {"task": "grade", "grades": 3, "label": 2}]
    old = [{"image": "images/a.png", "query": "nv", "dataset": "mine"} | one for one in more]
    flags[0].write_text("\n".join(map(json.dumps, old)))
    run(queries, *flags)
    new = [json.loads(line) for line in flags[3].read_text().splitlines()]
    assert new == [record | {"query": "the mole"} for record in old]


def test_paths_stay_right_wherever_the_new_file_lies(tmp_path, flags):
    for out, name in (("x.jsonl", "set/images/a.png"), ("set/x.jsonl", "images/a.png")):
        assert "lead out" not in run(queries, *flags[:3], tmp_path / out)
        bright(tmp_path / out)
        assert json.loads((tmp_path / out).read_text().splitlines()[0])["image"] == name
    said = run(queries, *flags[:3], tmp_path / "deep" / "er" / "x.jsonl")
    assert f"image paths lead out of {tmp_path}/deep/er: train with --allow-outside" in said
    samples = load_jsonl(tmp_path / "deep" / "er" / "x.jsonl", TASKS, outside=True)
    assert len(samples) == 60 and samples[0].dataset == "train"
    assert "leads out of" in run(queries, tmp_path / "deep" / "er" / "x.jsonl", *flags[1:3], "y.jsonl", expect=2)


def test_a_query_without_a_phrase_is_a_bad_record(tmp_path, flags):
    flags[1].write_text('{"nv": "the mole", "mel": ["the melanoma", "it"]}')
    said = run(queries, *flags, expect=2)
    assert f"error: {flags[0]}:4: field 'query' 'bcc' is not in {flags[1]}; add it there (--skip-bad N" in said
    assert not flags[3].exists()
    said = run(queries, *flags, "--skip-bad", 20)
    assert said.count("left out: ") == 20 and "new.jsonl: 40 records" in said
    few = [sample.query for sample in load_jsonl(flags[3], TASKS)]
    flags[1].write_text('{"nv": "the mole", "mel": ["the melanoma", "it"], "bcc": "x"}')
    run(queries, *flags, "--overwrite")  # a record's phrase does not hang on which others were left out
    assert few == [sample.query for sample in load_jsonl(flags[3], TASKS) if sample.query != "x"]
    flags[1].write_text('{"NV": "the mole"}')
    said = run(queries, *flags, "--skip-bad", 99, "--overwrite", expect=2)
    assert "q.json: holds none of the queries of 60 records" in said


def test_vlm_r1s_lines_and_boxes_over_the_edge_are_kept_as_they_are(tmp_path, flags):
    asked = "<image>Please provide the bounding box coordinate of the region this sentence describes: nv."
    turns = [{"from": "human", "value": asked}, {"value": "<answer>[10, 8, 30, 28]</answer>"}]
    lines = [{"image": "images/a.png", "conversations": turns}]
    lines += [{"image": "images/a.png", "problem": "nv", "solution": [10, 8, 99, 28]}]
    flags[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "clip" not in run(queries, *flags)
    one, two = map(json.loads, flags[3].read_text().splitlines())
    assert one["conversations"] == [{"from": "human", "value": "the mole"}, turns[1]]
    assert (two["problem"], two["solution"]) == ("the mole", [10, 8, 99, 28])
    assert one["dataset"] == two["dataset"] == "train"  # which the name of the new file does not say
    assert {sample.query for sample in load_jsonl(flags[3], TASKS, clip=True)} == {"the mole"}
    flags[0].write_text(json.dumps(lines))
    said = run(queries, *flags, "--overwrite", expect=2)
    assert "train.jsonl: is a JSON list; write one JSON object per line, or let prepare.vlm_r1 do it" in said


@pytest.mark.parametrize(
    "table, words",
    [
        ("{", "is not valid JSON"),
        (["nv"], "holds ['nv'] and no JSON object; write {"),
        ({"nv": []}, "field 'nv' has no phrase; write {"),
        ({"nv": 3}, "field 'nv' must be a non-empty string, not 3"),
        ({"nv": ["the mole", " "]}, "field 'nv' must be a non-empty string, not ' '"),
        ({"nv": {"a": "b"}}, "field 'nv' must be a non-empty string, not {'a': 'b'}"),
        ({"nv": "x" * 10_001}, "field 'nv' has 10001 characters"),
    ],
)
def test_bad_tables_name_file_and_field(tmp_path, table, words):
    path = tmp_path / "q.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    assert f"q.json: {words}" in refusal(queries.read_queries, path)
