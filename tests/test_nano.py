"""prepare/nano.py: its folders are whole checkpoints, and its two stages end in what they are said to."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import config
import data
from errors import run
from knowledge import Knowledge
from model import collate
from phantom_tasks import ceiling, record
from prepare import nano, nano_tasks
from prompts import Processor, default_prompt
from runtime.readers import Readers
from tasks import TASKS
from text import thought
from train_sft import Coarse, Sft, adamw, answer_of, sft
from weights import NANO, NANO_TASKS, load_policy, model_folder


def test_what_is_written_is_a_whole_checkpoint(tmp_path):
    """transformers loads model and tokenizer, before the training and after it; the stored one has less than 6 MB."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    nano.write_nano(tmp_path, seed=0)
    for folder in (NANO, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("[12,34,100,120]", "größe\n\tΔ 左", " the  skin lesion"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("[12,34,100,120]")) == 15  # one token a digit
        peer = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in load_policy(folder).parameters())
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):  # the stored one is of this very recipe
        stored, made = (json.loads((folder / file).read_text()) for folder in (NANO, tmp_path))
        assert stored | {"dtype": ""} == made | {"dtype": ""}
    assert sum(f.stat().st_size for f in NANO.iterdir()) < 6e6


def test_the_stored_policy_starts_in_the_sparse_regime_and_says_so():
    report = json.loads((NANO / "eval.json").read_text())
    assert report["exact"]["miou"] >= 0.65 and report["exact"]["n"] == 600
    assert report["coarse"]["miou"] <= 0.30 and report["coarse"]["acc@0.5"] < 0.05


def test_both_stages_are_made_stored_and_measured(tmp_path, monkeypatch):
    """Of one step and two, on pictures of which none is seen twice."""
    drawn, real = [], data.phantom_samples
    monkeypatch.setattr(data, "TEST_PHANTOMS", 4)
    monkeypatch.setattr(nano, "STAGES", (("exact", 1, 1e-3, None), ("coarse", 2, 5e-4, Coarse())))
    monkeypatch.setattr(nano, "BATCH", 4)
    monkeypatch.setattr(nano, "phantom_samples", lambda *a: drawn.append(a) or real(*a))
    monkeypatch.setattr(nano, "WORKERS", replace(nano.WORKERS, default=0))
    run(lambda: nano.main(["--out", str(tmp_path / "nano"), "--keep-exact", str(tmp_path / "exact")]))
    assert drawn == [(None, nano.DATA_SEED, 0, 4), (None, nano.DATA_SEED, 4, 8)]
    report = json.loads((tmp_path / "nano" / "eval.json").read_text())
    assert report["command"] == "python -m prepare.nano" and report["exact"]["n"] == report["coarse"]["n"] == 4
    coarse, exact = (list(load_policy(tmp_path / name).parameters()) for name in ("nano", "exact"))
    for a, b in zip(coarse, exact, strict=True):  # what is stored is what was measured: bf16, and so is its basis
        assert torch.equal(a, a.bfloat16().float()) and torch.equal(b, b.bfloat16().float())
    assert any(not torch.equal(a, b) for a, b in zip(coarse, exact, strict=True))
    assert default_prompt(tmp_path / "nano") == default_prompt(tmp_path / "exact") == "answer"


def test_the_policy_for_more_than_boxes_is_a_whole_checkpoint_that_reads_its_block():
    """transformers loads it; every word of its prompts is one token; eval.json says what it could and what is left."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    peer = Qwen2_5_VLForConditionalGeneration.from_pretrained(NANO_TASKS, dtype=torch.float32)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in load_policy(NANO_TASKS).parameters())
    assert sum(f.stat().st_size for f in NANO_TASKS.iterdir()) < 6e6
    assert model_folder("nano-tasks") == NANO_TASKS and default_prompt(NANO_TASKS) == "answer"
    assert config.parse("train_grpo.py", ["--model", "nano-tasks", "--data", "phantoms:grades"]).recipe == "nano"
    tokenizer = AutoTokenizer.from_pretrained(NANO_TASKS)
    knowledge = Knowledge("records")
    (sample,) = knowledge.attach(data.phantom_samples("classes", 5, 0, 1, tasks=TASKS))
    assert len(tokenizer.encode(sample.knowledge)) == 2 + 6 * 5 - 1
    for text in (sample.query, "größe\n\tΔ 左"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    exact, coarse = (json.loads((NANO_TASKS / "eval.json").read_text())[name] for name in ("exact", "coarse"))
    assert all(row["n"] == 600 for row in (*exact.values(), *coarse.values()))
    assert exact["classes"]["accuracy"] > 0.9 and 0.55 < exact["grades"]["accuracy"] <= ceiling() + 0.05
    assert 0.1 < coarse["grades"]["accuracy"] < 0.4 and coarse["classes"]["accuracy"] < 0.5
    assert coarse["boxes"]["miou"] < 0.3 < exact["boxes"]["miou"]
    for name, row in exact.items():
        cut_off = 12 if name == "classes by a thought" else 6  # a thought may be longer than its tokens
        assert row["parse_failures"] <= cut_off, name
    for report in (exact, coarse):  # names are dealt anew in every record: nobody knows them without the block
        assert abs(report["classes without block"]["accuracy"] - 1 / 6) < 0.06


def test_a_coarse_answer_keeps_what_is_seen_and_loses_what_it_is_called():
    samples = nano_tasks.asking(nano_tasks.ALL, (2, 6), 0, 960)
    rng = np.random.default_rng(0)
    classes = [sample for sample in samples if sample.knowledge and "<think>" not in sample.query]
    assert {sample.target.options for sample in classes} == {("A", "B"), tuple("ABCDEF")}
    assert all(sample.extra["knowledge"].keys() == set(sample.target.options) for sample in classes)
    for sample in classes:  # the label's line still says what the picture shows
        whole = record("classes", nano_tasks.DATA_SEED, sample.media.index)
        assert sample.extra["knowledge"][sample.target.label] == whole["knowledge"][whole["label"]]
    whole = [sample for sample in classes if len(sample.target.options) == 6]
    right = alike = 0
    for sample in whole:
        lines, label = sample.extra["knowledge"], sample.target.label
        assert nano_tasks.said_of_class(sample, False, rng) == label
        said = nano_tasks.said_of_class(sample, True, rng)
        right, alike = right + (said == label), alike + (lines[said].split()[1] == lines[label].split()[1])
    assert 0.2 < right / len(whole) < 0.5 and 0.75 < alike / len(whole) < 0.98  # .33 and .87 are meant
    thoughtful = [sample for sample in samples if "<think>" in sample.query]
    for sample in thoughtful[:50]:
        text = nano_tasks.said_of_class(sample, False, rng)
        assert text.endswith(f"<answer>{sample.target.label}</answer>")
        words = thought(text)
        assert words.startswith("the lesion is") or words in sample.knowledge.replace("\n", " ")
        assert sample.query.startswith(f"{sample.query.partition(chr(10))[0]}\nOptions: ")


@pytest.mark.slow
def test_the_stages_of_the_second_policy_are_made_and_measured(tmp_path, monkeypatch):
    """Of one step each, on few pictures."""
    monkeypatch.setattr(data, "TEST_PHANTOMS", 2)
    stages = [(name, 1, *rest) for name, _, *rest in nano_tasks.STAGES]
    monkeypatch.setattr(nano_tasks, "STAGES", stages)
    monkeypatch.setattr(nano_tasks, "BATCH", 4)
    monkeypatch.setattr(nano_tasks, "MAX_TOKENS", {"answer": 3, "think": 3})
    monkeypatch.setattr(nano, "WORKERS", replace(nano.WORKERS, default=0))
    run(lambda: nano.main(["--tasks", "--out", str(tmp_path / "tasks"), "--keep-exact", str(tmp_path / "exact")]))
    report = json.loads((tmp_path / "tasks" / "eval.json").read_text())
    assert report["command"] == "python -m prepare.nano --tasks"
    assert report["exact"].keys() == report["coarse"].keys() and report["exact"]["classes"]["n"] == 2
    coarse, exact = (list(load_policy(tmp_path / name).parameters()) for name in ("tasks", "exact"))
    for a, b in zip(coarse, exact, strict=True):
        assert torch.equal(a, a.bfloat16().float()) and torch.equal(b, b.bfloat16().float())
    assert any(not torch.equal(a, b) for a, b in zip(coarse, exact, strict=True))
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):  # the stored one is of this very recipe
        stored, made = (json.loads((folder / file).read_text()) for folder in (NANO_TASKS, tmp_path / "tasks"))
        assert stored == made


def test_the_loss_over_answers_counts_short_ones_as_much_as_long_ones():
    """A grade of two tokens beside a box of sixteen; in micro-batches of one and of two."""
    samples = data.phantom_samples(None, 1, 0, 1) + data.phantom_samples("grades", 1, 0, 1, tasks=TASKS)
    policy, processor = load_policy(NANO), Processor(NANO, "answer", TASKS)
    means = []
    for sample in samples:
        prompt = processor.prompt(sample)
        text = answer_of(prompt, processor, Sft(1, 2, 2, 1e-9, 1, 0), 0, 0)
        ids = torch.tensor([*processor.tokenizer.encode(text, add_special_tokens=False), policy.eos_ids[0]])
        with torch.no_grad():
            logp = policy.logprobs(policy.prefix(collate([prompt])), ids[None, None], torch.tensor([[len(ids)]]))
        means.append((-logp.mean().item(), len(ids)))
    (box, long), (grade, short) = means
    for per_answer, loss in ((True, (box + grade) / 2), (False, (box * long + grade * short) / (long + short))):
        for micro in (1, 2):
            settings = Sft(1, 2, micro, 1e-9, 1, 0, per_answer=per_answer)
            with Readers(0) as readers:
                (row,) = sft(policy, processor, adamw(policy, 1e-9), samples, settings, readers)
            assert abs(row["loss"] - loss) < 1e-4 * loss
