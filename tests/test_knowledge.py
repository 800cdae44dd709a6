"""knowledge.py, text.py and the recitation reward: what the prompt tells, and what reciting it earns."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from programs import grpo, lines, run, small, without_times  # noqa: F401

import train_grpo
from data import load_samples
from errors import InputError
from images import Sample
from knowledge import Knowledge
from norms import Normalise, Norms, Quartiles
from rewards import REWARDS, Schedules, combine, other_rewards
from tasks import TASKS
from tasks.label import Choice
from text import sentence_bleu, thought, tokens

LINES = {"nevus": "round and brown", "melanoma": "ragged, many colours", "scar": "pale"}
RECORD = {"image": "a.png", "task": "label", "query": "what?", "options": list(LINES), "label": "nevus"}
BLOCK = "Knowledge:\nnevus: round and brown\nmelanoma: ragged, many colours\nscar: pale"
ASKED = "what?\nOptions: nevus, melanoma, scar."


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    return tmp_path


def samples(folder, said: str, *records: dict, split="train", table=None) -> list[Sample]:
    (folder / "k.json").write_text(json.dumps({"*": LINES} if table is None else table))
    (folder / "ham.jsonl").write_text("\n".join(map(json.dumps, records or [RECORD])))
    knowledge = Knowledge(said.replace("FILE", str(folder / "k.json")))
    found = load_samples(str(folder / "ham.jsonl"), TASKS, 0, split, knowledge=knowledge)
    if split == "train":
        knowledge.complete()
    return found


def test_the_block_tells_of_all_options_wherever_it_stands(folder):
    (sample,) = samples(folder, "FILE")
    assert (sample.query, sample.knowledge) == (f"{ASKED}\n{BLOCK}", BLOCK)
    (sample,) = samples(folder, "FILE:at=before")
    assert sample.query == f"{BLOCK}\n{ASKED}"
    (sample,) = samples(folder, "FILE", table={"*": {"x": "y"}, "ham": LINES})  # a dataset's own goes first
    assert sample.knowledge == BLOCK
    (train,), (test,) = (samples(folder, "FILE:used=train", split=split) for split in ("train", "test"))
    assert train.knowledge == BLOCK and (test.query, test.knowledge) == (ASKED, "")


def test_the_prompt_does_not_depend_on_the_answer(folder):
    """Whichever option is true, in a file's lines and in a record's own, question and block are the same."""
    own = [RECORD | {"label": label, "knowledge": LINES} for label in LINES]
    for said in ("FILE", "FILE:lines=shuffled,at=before", "records", "records:lines=shuffled"):
        found = [samples(folder, said, record)[0] for record in own]
        assert len({(sample.query, sample.knowledge) for sample in found}) == 1
        assert {sample.target.label for sample in found} == set(LINES)


def test_shuffled_lines_are_dealt_anew_for_each_record_and_never_ones_own(folder):
    """As likely any other's, so no fixed code can be learned; the same in another process, folder and split."""
    own, count = {f"option {i}": f"line {i}" for i in range(5)}, 1000
    record = RECORD | {"options": list(own), "label": "option 0", "knowledge": own}
    for said in ("FILE:lines=shuffled", "records:lines=shuffled"):
        found = samples(folder, said, *[record] * count, table={"*": own})
        dealt = Counter(line for sample in found for line in sample.knowledge.splitlines()[1:])
        assert all(sorted(line[-1] for line in sample.knowledge.splitlines()[1:]) == list("01234") for sample in found)
        pairs = {f"option {i}: line {j}" for i in range(5) for j in range(5) if i != j}
        assert dealt.keys() == pairs and max(abs(n - count / 4) for n in dealt.values()) < 70  # 5 stds
    (folder / "b").mkdir()
    Image.new("RGB", (30, 40)).save(folder / "b" / "a.png")
    again = samples(folder / "b", said, *[record] * 9, split="test")
    assert [sample.query for sample in again] == [sample.query for sample in found[:9]]
    assert [line[-1] for line in again[0].knowledge.splitlines()[1:]] == list("30142")  # as every process has it


def test_each_record_may_bring_its_own_lines_and_boxes_have_none(folder):
    box = {"image": "a.png", "query": "it", "bbox": [1, 2, 3, 4]}
    first, second, third = samples(
        folder, "records", RECORD | {"knowledge": LINES}, RECORD | {"knowledge": LINES | {"scar": "new"}}, box
    )
    assert first.knowledge == BLOCK and second.knowledge.endswith("scar: new") and third.knowledge == ""
    assert third.query == "it"


@pytest.mark.parametrize(
    "said, table, words",
    [
        (
            "FILE",
            {"*": {"nevus": "a"}},
            r"ham.jsonl:1: --knowledge .*k.json: \*: has no line for .*melanoma",
        ),
        ("FILE", {"bccd": LINES}, """has nothing for dataset 'ham', and no "\\*" for all others"""),
        ("FILE", {"*": LINES | {"wart": "x"}}, r"k.json: \*: 'wart' is no option of any record"),
        ("FILE", {"*": LINES | {"scar": " "}}, r"k.json: '\*': .*'scar' must be a non-empty string"),
        ("FILE", {"*": LINES | {"scar": "a\nb"}}, r"k.json: '\*': 'scar' must be one line"),
        ("FILE", {"*": list(LINES)}, r"k.json: '\*': must be an object {option: sentence}"),
        ("FILE", {}, "k.json: is empty"),
        ("FILE", [1], "k.json"),
        ("FILE:at=behind", None, "--knowledge FILE: at must be one of after, before"),
        ("notes.txt", None, "--knowledge notes.txt: name a .json file, or say records"),
        ("gone.json", None, "gone.json"),
        ("records", None, "ham.jsonl:1: has no field 'knowledge', as --knowledge records wants"),
    ],
)
def test_knowledge_that_does_not_fit_is_one_sentence(said, table, words, folder):
    with pytest.raises(InputError, match=words) as caught:
        samples(folder, said, table=table)
    assert "\n" not in str(caught.value)


def test_a_line_that_no_option_of_the_record_has_is_a_slip(folder):
    with pytest.raises(InputError, match=r"ham.jsonl:1: field 'knowledge': 'wart' is none of the record's options"):
        samples(folder, "records", RECORD | {"knowledge": LINES | {"wart": "x"}})


def test_training_and_evaluation_are_held_against_the_lines_together(folder):
    """Boxes to evaluate on, or a class that only one of the two has, are no slip."""
    grade = {"image": "a.png", "query": "how?", "task": "grade", "grades": ["low", "high"], "label": 0}
    box = {"image": "a.png", "query": "it", "bbox": [1, 2, 20, 30]}
    (folder / "k.json").write_text(json.dumps({"*": LINES | {"low": "few", "high": "many"}}))
    for name, records in {"label": [RECORD], "grade": [grade, box], "box": [box]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))

    def complete(*names: str) -> None:
        knowledge = Knowledge(str(folder / "k.json"))
        for name in names:
            load_samples(str(folder / f"{name}.jsonl"), TASKS, 0, "train", knowledge=knowledge)
        knowledge.complete()

    complete("label", "grade", "box")
    complete("grade", "label")
    with pytest.raises(InputError, match="'high' is no option of any record"):
        complete("label", "box")
    with pytest.raises(InputError, match="reaches no record"):
        complete("box")


def test_knowledge_that_reaches_no_record_is_refused(folder):
    with pytest.raises(InputError, match="reaches no record: none has options; drop it"):
        samples(folder, "FILE", {"image": "a.png", "query": "it", "bbox": [1, 2, 3, 4]})


# ---------------------------------------------------------------------------------------------------------------- text


def test_bleu_by_hand():
    """Two of three words, one of two pairs, none of one triple: smoothed from the second order on."""
    assert sentence_bleu(["a", "b", "d"], ["a", "b", "c"], 1) == pytest.approx(2 / 3)
    assert sentence_bleu(["a", "b", "d"], ["a", "b", "c"], 2) == pytest.approx((2 / 3 * 2 / 3) ** 0.5)
    whole = sentence_bleu(["a", "b", "d"], ["a", "b", "c"], 4)
    assert whole == pytest.approx((2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25)
    assert sentence_bleu(["a"], ["a", "b"], 1) == pytest.approx(torch.tensor(-1.0).exp().item())  # brevity
    assert sentence_bleu([], ["a"]) == sentence_bleu(["a"], []) == sentence_bleu(["a"], ["b"]) == 0.0
    assert sentence_bleu(list("abcde"), list("abcde")) == 1.0


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(0)
    for _ in range(1000):
        one, other = ([rng.choice("abcdefgh") for _ in range(rng.randint(1, 15))] for _ in range(2))
        n = rng.randint(1, 4)
        theirs = sacrebleu.BLEU(
            smooth_method="add-k", smooth_value=1, effective_order=True, tokenize="none", max_ngram_order=n
        )
        expected = theirs.sentence_score(" ".join(one), [" ".join(other)]).score / 100
        assert sentence_bleu(one, other, n) == pytest.approx(expected, abs=1e-6)


def test_words_and_thoughts():
    assert tokens("Ill-defined, the patient's 3 LESIONS (!)") == "ill-defined the patient's 3 lesions".split()
    assert thought("<think> round </think> <answer>x</answer>") == "round"
    assert (thought("<think> cut off"), thought("none"), thought("<think></think>")) == ("cut off", "", "")
    assert thought("<think> never closed <answer>x</answer>") == "never closed"
    assert thought("<think></think><think>a</think> b <think>c</think>") == "a c"  # a second one hides nothing


# ---------------------------------------------------------------------------------------------------------- recitation

SAID = [  # answer, can be read
    ("<think> round and brown </think><answer>nevus</answer>", True),
    ("<think> pale </think><answer>nevus</answer>", True),
    ("<answer>nevus</answer>", True),
    ("<think></think><answer>scar</answer>", True),
    ("<think> round and brown </think><answer></answer>", False),
    ("<think> round and brown", False),
    ("nevus, scar", False),
    ("", False),
]


def rewards(weights: dict) -> dict:
    sample = Sample(None, ASKED, Choice("nevus", tuple(LINES)), "ham", "label", knowledge=BLOCK)
    texts = [text for text, _ in SAID]
    scores = TASKS["label"].score(texts, [sample] * len(texts))
    assert scores.valid.tolist() == [valid for _, valid in SAID]
    return other_rewards(weights, texts, scores, [sample] * len(texts))


def test_recitation_is_bleu_of_the_thought_against_the_block():
    found = rewards({"recite": 0.5, "recite-1": 0.5, "recite-prompt": 0.5, "thought": 0.0})
    reference = tokens(BLOCK)[1:]
    assert "knowledge" not in reference
    expected = [sentence_bleu(tokens(thought(text)), reference) for text, _ in SAID]
    assert found["recite"].tolist() == pytest.approx(expected)
    assert found["recite"][0] > found["recite"][1] > 0 and found["recite"][2:4].tolist() == [0, 0]
    assert found["recite-1"][0] == pytest.approx(sentence_bleu(["round", "and", "brown"], reference, 1))
    assert found["recite-prompt"][0] == 0.0 and found["thought"].tolist() == [3, 1, 0, 0, 3, 3, 0, 0]
    nothing = Sample(None, ASKED, None, "ham", "label")
    assert REWARDS["recite"]([SAID[0][0]], None, [nothing]).tolist() == [0.0]


def test_under_a_negative_weight_no_broken_answer_earns_more_than_any_answer():
    """Nor with normalised rewards, nor with a reward that has no largest value, such as a thought's words."""
    key, u = ("ham", "label"), [1.0, 1.0, 1.0, 0.0, 0, 0, 0, 0]
    valid = torch.tensor([valid for _, valid in SAID])
    yes_or_no, spread = Quartiles(0.0, 1.0, 1.0, 100, zero_one=True), Quartiles(0.1, 0.2, 0.4, 100)
    table = {(key, "task"): yes_or_no, (key, "format"): yes_or_no, (key, "recite"): spread, (key, "thought"): spread}
    for norms in (None, Norms(table, Normalise(), "norms.json")):
        for penalty in ("recite", "thought"):
            weights = {"task": 1.0, "format": 1.0, penalty: -0.5}
            parts = {name: part[None] for name, part in rewards(weights).items()}
            told = {name: part.clone() for name, part in parts.items()}
            reasons = torch.tensor([[int(not fine) for fine in valid]])
            scores = SimpleNamespace(u=torch.tensor([u]), reason=reasons, keys=[key], parts=parts)
            total = combine(scores, Schedules(["raw"], [key], 10, norms), weights)[0]
            assert total[~valid].max() <= total[valid].min(), (norms, penalty)
            assert all(parts[name].equal(told[name]) for name in told)  # what is logged is what was recited
            most = 3 if penalty == "thought" and norms is None else 1  # the longest thought's words, or a reward's most
            assert (total[~valid] == -0.5 * most).all()
            total = combine(scores, Schedules(["raw"], [key], 10, norms), {"task": -1.0})[0]  # the schedule's too
            assert (total[~valid] == -1.0).all()


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_labels_grades_and_boxes_in_one_run_resume_bit_by_bit(folder):
    """With knowledge, recitation and a setting of a task; medloc on grades; a file that has changed is refused."""
    box = {"image": "a.png", "query": "it", "bbox": [1, 2, 20, 30]}
    grade = {"image": "a.png", "query": "how?", "task": "grade", "grades": 3, "label": 1}
    (folder / "k.json").write_text(json.dumps({"*": LINES | {"0": "a", "1": "b", "2": "c"}}))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, [RECORD, box, grade] * 2)))
    flags = ["--knowledge", str(folder / "k.json"), "--rewards", "task=1,recite=-.1,thought=0", "--max-tokens", "8"]
    flags += ["--tasks", "grade:base=2", "--schedule", "medloc:window=2,tau_start=.1", "label=raw", "--lr", "1e-3"]
    for out, steps in (("a", "4"), ("b", "2")):
        grpo(folder / out, folder / "train.jsonl", *flags, "--steps", steps)
    run(train_grpo, "--resume", "--out", str(folder / "b"), "--steps", "4")
    straight = lines(folder / "a" / "metrics.jsonl")
    assert without_times(lines(folder / "b" / "metrics.jsonl")) == without_times(straight)
    assert {f"tau/train/{task}" for task in ("box", "label", "grade")} <= straight[0].keys()
    assert "reward_recite" in straight[0] and "reward_thought" in straight[0]
    saved = json.loads((folder / "a" / "config.json").read_text())
    assert saved["arguments"]["tasks"] == ["grade:base=2"] and set(saved["sha256"]) == {"knowledge"}
    (folder / "k.json").write_text(json.dumps({"*": LINES | {"0": "A", "1": "b", "2": "c"}}))
    words = run(train_grpo, "--resume", "--out", str(folder / "b"), "--steps", "5", expect=2)
    assert "k.json is not the file that the run began with; restore it, or start a new run" in words
    words = run(train_grpo, *small(folder / "c", folder / "train.jsonl"), "--tasks", "sing", expect=2)
    assert "--tasks: there is no 'sing'" in words
