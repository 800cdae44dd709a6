"""Clips through the policy: positions in time, patches of two frames, the shared prefix; records, readers, films."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from full_rows import full_logprobs
from PIL import Image
from test_data import refused
from test_model import IMAGE, backward, assert_same, in_float64, random_completions, save_peer
from transformers import Qwen2_5_VLForConditionalGeneration

import clips
import phantom_clips
from clips import Clip, Film, frames_between
from data import BadRecords, load_jsonl, phantom_samples
from images import (
    CLIP_PICTURES,
    ImageConfig,
    PhantomImage,
    Picture,
    Sample,
    load_frames,
    pixels_to_patches,
    read_picture,
)
from model import collate
from prompts import Prompt, Processor, mrope_positions
from runtime.readers import Readers
from tasks import TASKS
from weights import NANO, load_policy, save_policy

VIDEO = 121
NOISE = np.random.default_rng(0)

# ---------------------------------------------------------------------------------------------------------- positions

# vLLM's rule for a grid of (6, 4, 6) patches behind two tokens of text, tokens_per_second 2: fps -> time of each patch.
# transformers 4.57 has 0 2 4 6 8 10 at 1.5 fps and zeros at 3; 5.24's time is the same, the text's place is not.
GOLDEN = {
    0.5: [0, 8, 16, 24, 32, 40], 1: [0, 4, 8, 12, 16, 20], 1.5: [0, 2, 5, 8, 10, 13], 2: [0, 2, 4, 6, 8, 10],
    3: [0, 1, 2, 4, 5, 6],
}  # fmt: skip


@pytest.mark.parametrize("fps", GOLDEN)
def test_positions_are_vllms(fps):
    ids = torch.tensor([7, 7] + [9] * 36 + [7] * 3)
    positions, next_position = mrope_positions(ids, [(6, 4, 6)], (9,), 2, [2 / fps * 2])
    time, row, column = (positions[:, 2:38] - 2).view(3, 6, 2, 3)
    assert time[:, 0, 0].tolist() == GOLDEN[fps] and (time == time[:, :1, :1]).all()
    assert (row == torch.arange(2)[:, None]).all() and (column == torch.arange(3)).all()
    after = 2 + max(GOLDEN[fps][-1], 2) + 1
    assert positions[:, 38:].tolist() == [[after, after + 1, after + 2]] * 3 and next_position == after + 3
    assert positions[:, :2].tolist() == [[0, 1]] * 3


def test_time_is_the_exact_one_rounded_down_wherever_fp32_can_tell():
    for hundredths in range(10, 1000):
        fps = Fraction(hundredths, 100)
        positions, _ = mrope_positions(torch.full((96,), 9), [(96, 2, 2)], (9,), 2, [float(4 / fps)])
        exact = [i * 4 / fps for i in range(96)]
        for t, x in zip(positions[0].tolist(), exact, strict=True):
            assert t == int(x) or abs(x - round(x)) < Fraction(1, 1000), (fps, x)


# ------------------------------------------------------------------------------------------- the policy, transformers


def clip_prompt(grid: tuple[int, int, int], fps: float, before: int, after: int, seed: int) -> Prompt:
    """`before` tokens of text, a clip of noise, `after` tokens; a picture if fps is 0."""
    g, pad = torch.Generator().manual_seed(seed), VIDEO if fps else IMAGE
    start, end = (torch.randint(6, 100, (n,), generator=g) for n in (before, after))
    t, rows, columns = grid
    ids = torch.cat((start, torch.full((t * rows * columns // 4,), pad), end))
    positions, then = mrope_positions(ids, [grid], (pad,), 2, [4 / fps if fps else 0.0])
    patches = torch.randn(t * rows * columns, 1176, generator=g)
    return Prompt(ids, patches, grid, positions, then, (1.0, 1.0), (1, 1), None, None, "")


CASES = [
    ((3, 10, 10), 1, 3, 5),
    ((1, 4, 6), 2, 1, 4),
    ((1, 4, 6), 0, 1, 4),
    ((2, 4, 6), 0.5, 2, 7),
    ((1, 10, 10), 0, 3, 2),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    peer = save_peer(folder)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["vision_config"]["tokens_per_second"] == 4  # the class's own
    raw["vision_config"]["tokens_per_second"] = 2
    (folder / "config.json").write_text(json.dumps(raw))
    return load_policy(folder), Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval(), folder


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [clip_prompt(*case, seed=i) for i, case in enumerate(CASES)]


def peer_logits(peer, prompt: Prompt, fps: float, completion=(), positions=None) -> torch.Tensor:
    """(tokens, V) by transformers' own positions, unless they are given."""
    ids = torch.cat((prompt.ids, torch.tensor(completion, dtype=torch.long)))
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grid = torch.tensor([prompt.grid])
    media = dict(pixel_values=prompt.patches, image_grid_thw=grid)
    if fps:
        media = dict(
            pixel_values_videos=prompt.patches, video_grid_thw=grid, second_per_grid_ts=torch.tensor([2 / fps])
        )
    if positions is not None:
        media |= dict(position_ids=positions[:, None])
    return peer(input_ids=ids[None], mm_token_type_ids=kinds[None], **media).logits[0]


@torch.no_grad()
def test_a_clip_in_the_tower_is_its_stills(pair):
    """To the last bit: windows of 4 x 4 tokens cut the grid of 5 x 5, and a block of full attention is there too."""
    (prompt, *_), tower = [clip_prompt((3, 10, 10), 1, 3, 5, 0)], pair[0].visual
    stills = [tower(part, ((10, 10),)) for part in prompt.patches.split(100)]
    assert torch.equal(pair[0].look(collate([prompt])), torch.cat(stills))
    theirs = pair[1].model.visual(prompt.patches, grid_thw=torch.tensor([[3, 10, 10]])).pooler_output
    assert (torch.cat(stills) - theirs).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("fps", [0.5, 1, 1.5, 2, 3])
def test_logits_equal_transformers_up_to_the_text_behind_a_clip(pair, fps):
    """There it has the same positions; behind it, where 5.24 goes another way, with ours given."""
    policy, peer, _ = pair
    prompt = clip_prompt((3, 4, 6), fps, 2, 0, 4)
    last = policy.logits(policy.prefix(collate([prompt])).hidden)[0]
    assert (last - peer_logits(peer, prompt, fps)[-1]).abs().max() < 1e-5
    prompt = clip_prompt((3, 4, 6), fps, 2, 5, 4)
    ids, lengths = random_completions(1, 2, 6)
    logp = policy.logprobs(policy.prefix(collate([prompt])), ids, lengths)
    for g, n in enumerate(lengths[0].tolist()):
        tokens = ids[0, g, :n]
        places = torch.cat((prompt.positions, (prompt.next_position + torch.arange(n)).expand(3, -1)), dim=1)
        logits = peer_logits(peer, prompt, fps, tokens.tolist(), places)[len(prompt.ids) - 1 : -1]
        assert (logp[0, g, :n] - logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]).abs().max() < 2e-5
    other = clip_prompt((3, 4, 6), 2 * fps, 2, 5, 4)  # the same frames at another rate are another question
    assert (policy.prefix(collate([other])).hidden - policy.prefix(collate([prompt])).hidden).abs().max() > 1e-3


def test_prefix_equals_full_rows_with_clips_and_pictures_in_one_batch(pair, prompts):
    ids, lengths = random_completions(len(prompts), 2, 6)
    with torch.no_grad():
        batch = collate(prompts)
        shared, full = (
            pair[0].logprobs(pair[0].prefix(batch), ids, lengths),
            full_logprobs(pair[0], batch, ids, lengths),
        )
    assert (shared - full).abs().max() < 1e-5
    policy = in_float64(pair[2])
    assert_same(backward(policy, prompts), backward(policy, prompts, full=True), 1e-10, 1e-9)


@torch.no_grad()
def test_what_a_frozen_tower_has_seen_goes_with_its_prompt(pair, prompts):
    policy = load_policy(pair[2])
    policy.visual.requires_grad_(False)
    seen = [replace(prompt) for prompt in prompts]
    policy.cache_image_tokens(seen)
    assert [len(p.image_tokens) for p in seen] == [75, 6, 6, 12, 25]
    luck = torch.rand(len(prompts), 3, 6, generator=torch.Generator().manual_seed(0))
    plain, cached = (policy.generate(policy.prefix(collate(p)), 3, 6, 1.0, luck) for p in (prompts, seen))
    assert torch.equal(plain.ids, cached.ids)
    alone = policy.generate(policy.prefix(collate(prompts[:1])), 3, 6, 1.0, luck[:1])  # as in the batch
    assert torch.equal(alone.lengths[0], plain.lengths[0])
    with pytest.raises(ValueError, match="places for 6 image tokens, but their pictures make 12"):
        policy.prefix(collate([replace(prompts[1], grid=(2, 4, 6), patches=prompts[3].patches)]))


@torch.no_grad()
def test_a_saved_policy_has_its_clock_in_transformers(pair, prompts, tmp_path):
    """Also where its config.json does not say it: transformers would take 4."""
    policy, (prompt, *_) = load_policy(pair[2]), prompts
    del policy.raw_config["vision_config"]["tokens_per_second"]
    save_policy(policy, tmp_path)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.video_token_id == VIDEO and again.config.vision_config.tokens_per_second == 2
    assert torch.equal(peer_logits(again, prompt, 1), peer_logits(pair[1], prompt, 1))
    assert load_policy(tmp_path).config == policy.config
