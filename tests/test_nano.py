"""prepare/nano.py: its folders are whole checkpoints, and its two stages end in what they are said to."""

import json
from dataclasses import replace

import torch

import data
from errors import run
from prepare import nano
from prompts import default_prompt
from train_sft import Coarse
from weights import NANO, load_policy


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
