"""assets/nano-video and what makes it: the policy that tells time by M-RoPE alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import config
from data import phantom_samples
from phantom_clips import RATES, blind
from prepare import nano_video
from prompts import Processor, default_prompt
from runtime.readers import Readers
from tasks import TASKS
from tasks.span import Span, tiou
from weights import NANO, NANO_VIDEO, load_policy, model_folder


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(NANO_VIDEO, "answer", TASKS)


def test_it_is_a_whole_checkpoint_with_the_tower_of_nano_and_says_what_it_could():
    peer = Qwen2_5_VLForConditionalGeneration.from_pretrained(NANO_VIDEO, dtype=torch.float32)
    policy, before = load_policy(NANO_VIDEO), load_policy(NANO)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in policy.parameters())
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in policy.named_parameters() if n.startswith("visual."))
    assert peer.config.vision_config.tokens_per_second == 2 and peer.config.video_token_id == 6
    assert sum(f.stat().st_size for f in NANO_VIDEO.iterdir()) < 5e6
    assert model_folder("nano-video") == NANO_VIDEO and default_prompt(NANO_VIDEO) == "answer"
    assert config.parse("train_grpo.py", ["--model", "nano-video", "--data", "phantoms:clips"]).recipe == "nano"
    report = json.loads((NANO_VIDEO / "eval.json").read_text())
    exact, coarse = report["exact"], report["coarse"]
    assert exact["clips"]["miou"] > 0.8 and exact["clips"]["r@0.7"] > 0.8
    assert 0.3 < coarse["clips"]["miou"] < 0.65 and coarse["clips"]["r@0.7"] < 0.4
    for told in (exact, coarse):  # of a wrong rate: no better than who knows none
        assert told["clips told a wrong rate"]["miou"] < min(told["clips"]["miou"] - 0.05, blind(0, 500))


def test_told_a_wrong_rate_it_answers_in_wrong_seconds(processor):
    """The same ids and patches: what it loses, it had from the time row."""
    found = nano_video.measured(load_policy(NANO_VIDEO), processor, "coarse", 40)
    right, wrong = (found[name]["miou"] for name in ("clips", "clips told a wrong rate"))
    assert wrong < right - 0.05


def test_both_stages_end_in_whole_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(nano_video, "CLIPS", 32)
    monkeypatch.setattr(nano_video, "STAGES", tuple((name, 1, 1e-3, c) for name, _, _, c in nano_video.STAGES))
    monkeypatch.setattr(nano_video, "measured", lambda policy, processor, name: {"named": name})
    with Readers(0) as readers:
        nano_video.make(tmp_path / "coarse", tmp_path / "exact", readers)
    coarse, exact, stored = (
        load_policy(folder).state_dict() for folder in (tmp_path / "coarse", tmp_path / "exact", NANO)
    )
    for name, weight in coarse.items():  # what is stored is what was measured: bf16
        assert torch.equal(weight, weight.bfloat16().float()) and torch.equal(
            exact[name], exact[name].bfloat16().float()
        )
        assert not name.startswith("visual.") or torch.equal(weight, stored[name])
    assert any(not torch.equal(weight, exact[name]) for name, weight in coarse.items())
    report = json.loads((tmp_path / "coarse" / "eval.json").read_text())
    assert report["exact"] == {"named": "exact"} and 0.4 < report["who knows no rate"] < 0.55
    ours = json.loads((NANO_VIDEO / "config.json").read_text())
    assert ours == json.loads((tmp_path / "coarse" / "config.json").read_text())  # the stored one is of this recipe
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (NANO_VIDEO / file).read_text() == (tmp_path / "coarse" / file).read_text()


def test_a_clip_at_another_rate_is_the_record_at_that_rate(processor):
    policy = load_policy(NANO_VIDEO).requires_grad_(False)
    with Readers(0) as readers:
        samples = phantom_samples("clips", 5, 0, 3, tasks=TASKS)
        prompts = nano_video.seen(policy, processor, samples, readers)
    for sample, prompt in zip(samples, prompts, strict=True):
        assert prompt.patches is None and len(prompt.image_tokens) == 9 * prompt.grid[0]
        for fps in RATES:
            told, made = (
                replace(sample, media=replace(sample.media, fps=fps)),
                nano_video.at_rate(prompt, fps, processor),
            )
            want = processor.prompt(told)
            assert torch.equal(made.positions, want.positions) and made.next_position == want.next_position
            assert made.target.seconds == told.media.seconds
            patches = [value * fps / 2 for value in made.target.segments[0]]
            assert patches == [value * sample.media.fps / 2 for value in sample.target.segments[0]]


def test_a_coarse_span_knows_when_and_not_how_long():
    rng, span, coarse = np.random.default_rng(0), Span(((8.0, 16.0),), 32.0), nano_video.STAGES[-1][-1]
    ends = np.array([nano_video.coarse_span(span, rng, coarse).segments[0] for _ in range(2000)])
    assert ends.min() >= 0 and ends.max() <= 32 and (ends[:, 0] < ends[:, 1]).all() and (ends % 1 == 0).all()
    assert abs(ends.mean() - 12) < 0.3 and 2.5 < np.median(np.diff(ends)) < 4.5
    assert 0.25 < np.mean([tiou(tuple(one), (8.0, 16.0)) for one in ends]) < 0.45
    for grown in (coarse, replace(coarse, scale=0.8)):
        for _ in range(500):
            ((start, end),) = nano_video.coarse_span(Span(((0.0, 1.0),), 4.0), rng, grown).segments
            assert 0 <= start < end <= 4
