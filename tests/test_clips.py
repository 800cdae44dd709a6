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
from programs import grpo, lines
from test_data import refused
from test_model import IMAGE, assert_same, backward, in_float64, random_completions, save_peer
from transformers import Qwen2_5_VLForConditionalGeneration

import clips
import phantom_clips
from clips import Clip, Film, frames_between
from data import load_jsonl, load_samples, phantom_samples
from images import (
    CLIP_PICTURES,
    ImageConfig,
    PhantomImage,
    Sample,
    load_frames,
    pixels_to_patches,
    read_picture,
)
from model import collate
from prompts import Processor, Prompt, mrope_positions
from runtime.plan import longest_prompt
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
    for hundredths in range(10, 1000, 7):
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
    save_peer(folder)
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


# ------------------------------------------------------------------------------------------------------------- pixels


def noise(count: int, width: int, height: int) -> list[np.ndarray]:
    return list(NOISE.integers(0, 256, (count, height, width, 3), np.uint8))


@pytest.mark.parametrize("count, slots", [(1, 2), (4, 2), (5, 2), (5, 3), (2, 1)])
def test_a_patch_holds_frames_that_follow_each_other_and_the_last_stands_in(count, slots):
    """Each slot of a clip's patches is that of its frame as a still, which is transformers' (test_image.py)."""
    frames, config = np.stack(noise(count, 112, 56)), ImageConfig(temporal_patch_size=slots)
    patches, grid = pixels_to_patches(frames, config)
    t = -(-count // slots)
    assert grid == (t, 4, 8) and patches.shape == (t * 32, 3 * slots * 196) and patches.flags.c_contiguous
    by_slot = patches.reshape(t, 32, 3, slots, 196)
    for i in range(t * slots):
        still = pixels_to_patches(frames[min(i, count - 1)], config)[0].reshape(32, 3, slots, 196)
        assert np.array_equal(by_slot[i // slots, :, :, i % slots], still[:, :, 0])


def test_patches_of_a_clip_are_transformers():
    """Its video processor wants torchvision only to resize, and these frames have their size."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    pytest.importorskip("torchvision")
    frames = np.stack(noise(5, 112, 56))
    peer = processing.Qwen2VLVideoProcessor(min_pixels=3136, max_pixels=10**6)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    theirs = peer(videos=[video], do_resize=False, do_sample_frames=False, return_tensors="pt")
    patches, grid = pixels_to_patches(frames, ImageConfig())
    assert theirs["video_grid_thw"].tolist() == [list(grid)]
    assert np.abs(theirs["pixel_values_videos"].numpy() - patches).max() < 1e-5


def test_frames_share_the_pixels_of_a_clip():
    config = ImageConfig(max_pixels=100 * 28 * 28)
    size = 280, 280
    assert [config.tokens(size, n) for n in (1, 2, 31, 32)] == [100, 100, 1600, 1600] and CLIP_PICTURES == 16
    assert config.tokens(size, 128) == 64 * 25 and config.tokens(size, 768) == 384 * 4  # never below min_pixels
    clip = Sample(
        Clip(PhantomImage("clips", 0, 0, 84), 1.0, phantom_clips.record("clips", 0, 0)["frames"]), "", None, ""
    )
    small = ImageConfig(max_pixels=56 * 56)
    for limits in (config, small):
        view = limits.view(read_picture(clip, *limits.limits))
        t, gh, gw = view.grid
        assert t * gh * gw // 4 == limits.tokens((84, 84), clip.frames) and view.scale == (84 / 14 / gw, 84 / 14 / gh)
        assert view.seconds == 2.0 and len(view.patches) == t * gh * gw
    assert small.tokens((84, 84), 8) == 16


# ------------------------------------------------------------------------------------------------------------ phantoms


def test_a_phantom_clip_is_what_its_record_says():
    """Lit frames are told by their colour alone, at patches' borders; the lesion of a tube is where its boxes are."""
    rates, starts = set(), set()
    for index in range(12):
        record, frames = phantom_clips.record("clips", 3, index), np.stack(phantom_clips.frames("clips", 3, index))
        assert frames.shape == (record["frames"], 84, 84, 3) and 8 <= len(frames) <= 16 and len(frames) % 2 == 0
        assert np.array_equal(frames, np.stack(phantom_clips.frames("clips", 3, index)))
        ((start, end),) = record["segments"]
        first, last = (round(value * record["fps"]) for value in (start, end))
        assert first % 2 == last % 2 == 0 and 0 <= first < last <= len(frames)
        light = np.sort((frames[..., 1] - 0.9 * frames[..., 2].astype(float)).reshape(len(frames), -1))[:, -60:].mean(1)
        lit = np.isin(np.arange(len(frames)), np.arange(first, last))
        assert lit.all() or light[lit].min() > light[~lit].max(), index
        rates.add(record["fps"])
        starts.add(first)
    assert rates == set(phantom_clips.RATES) and len(starts) > 2
    for index in range(6):
        record, frames = phantom_clips.record("tubes", 3, index), phantom_clips.frames("tubes", 3, index)
        assert len(record["tube"]) == 3
        for stamp, (x1, y1, x2, y2) in record["tube"].items():
            others = [f for k, f in enumerate(frames) if k != round(float(stamp) * record["fps"])]
            here = frames[round(float(stamp) * record["fps"])].astype(int)
            moved = np.abs(here - np.median(others, axis=0)).sum(-1) > 60  # the skin stands still
            rows, columns = np.nonzero(moved)
            inside = (rows >= y1 - 3) & (rows < y2 + 3) & (columns >= x1 - 3) & (columns < x2 + 3)
            assert y1 >= 2 and x1 >= 2 and y2 <= 82 and x2 <= 82
            assert len(rows) == 0 or inside.mean() > 0.3
    assert 0.4 < phantom_clips.blind(3, 400) < 0.55
    refused("unknown phantom clip 'x': use one of clips, tubes", phantom_clips.record, "x", 0, 0)
    refused("must not be negative", phantom_clips.record, "clips", -1, 0)


def test_phantom_clips_differ_in_nothing_but_positions_where_they_differ_in_rate():
    samples, processor = phantom_samples("clips", 3, 0, 3, tasks=TASKS), Processor(NANO, "answer", TASKS)
    for sample in samples:
        prompt = processor.prompt(sample)
        assert "seconds" not in prompt.text and sample.key == ("phantoms-clips", "span") and sample.extra == {}
        told = replace(sample, media=replace(sample.media, fps=4 * sample.media.fps))
        other = processor.prompt(told)
        assert torch.equal(prompt.ids, other.ids) and torch.equal(prompt.patches, other.patches)
        assert torch.equal(prompt.positions[1:, :30], other.positions[1:, :30])
        assert prompt.target.seconds == sample.frames / sample.media.fps
    tube = phantom_samples("tubes", 3, 0, 1, tasks=TASKS)[0]
    assert "Seconds: " in processor.prompt(tube).text and tube.task == "tube"
    assert load_samples("phantoms:clips", TASKS, 0, "test")[0].media != samples[0].media


def test_memory_is_planned_for_the_longest_clip():
    samples = phantom_samples("clips", 3, 0, 40, tasks=TASKS)
    text, patches, words = longest_prompt(NANO, samples, "answer", None)
    assert patches == 8 * 36 and "72 of its picture" in words
    processor = Processor(NANO, "answer", TASKS)
    assert text + 72 == max(map(processor.check, samples))


def test_a_run_on_clips_and_pictures(tmp_path):
    """Both tasks in one file; a frozen tower, several inner steps, readers, an evaluation, a resumed run."""
    with open(tmp_path / "train.jsonl", "w") as file:
        for i in range(4):
            record = phantom_clips.record("clips", 0, i)
            names = [f"{i}-{k}.png" for k in range(record["frames"])]
            for name, frame in zip(names, phantom_clips.frames("clips", 0, i), strict=True):
                Image.fromarray(frame).save(tmp_path / name)
            print(json.dumps(record | {"frames": names}), file=file)
            print(json.dumps({"image": names[0], "query": "the skin lesion", "bbox": [10, 10, 40, 40]}), file=file)
    flags = "--freeze-vision --inner-steps 2 --steps 1 --workers 1 --schedule raw".split()
    grpo(tmp_path / "out", tmp_path / "train.jsonl", *flags)
    grpo(tmp_path / "out", tmp_path / "train.jsonl", "--resume", "--steps", "2")
    assert [row["skipped"] for row in lines(tmp_path / "out" / "metrics.jsonl")] == [0, 0]
    tasks = json.loads((tmp_path / "out" / "eval.json").read_text())["final"]["tasks"]
    assert set(tasks) == {"box", "span"} and list((tmp_path / "out").glob("overlay-*.png"))
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out" / "step-000002")
    assert again.config.video_token_id == 6 and again.config.vision_config.tokens_per_second == 2


# ------------------------------------------------------------------------------------------------------------- records

LABEL = {"task": "label", "query": "which phase?", "options": ["a", "b"], "label": "a"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, frame in enumerate(noise(5, 84, 56)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    Image.fromarray(noise(1, 56, 84)[0]).save(tmp_path / "tall.png")
    return tmp_path


def read(folder: Path, **fields) -> Sample:
    (folder / "train.jsonl").write_text(json.dumps(LABEL | fields) + "\n")
    return load_jsonl(folder / "train.jsonl", TASKS)[0]


def test_a_record_of_frames_becomes_a_prompt(folder):
    names, processor = [f"{i}.png" for i in range(5)], Processor(NANO, "answer", TASKS)
    sample = read(folder, frames=names, fps=2, width=84, height=56, camera="left")
    assert sample.media == Clip(tuple(folder / name for name in names), 2.0, 5) and sample.extra == {"camera": "left"}
    assert sample.size == (84, 56) and sample.media.seconds == 2.5
    prompt = processor.prompt(sample)
    start = prompt.ids.tolist().index(3)
    assert prompt.grid == (3, 4, 6) and prompt.ids[start : start + 20].tolist() == [3] + [6] * 18 + [4]
    assert "<|vision_start|><|video_pad|><|vision_end|>which phase?" in prompt.text
    assert processor.check(sample) == processor.check(sample, decode=True) == len(prompt.ids)
    time = prompt.positions[0, start + 1 : start + 19].view(3, 6)
    assert (time - time[0, 0] == torch.tensor([[0], [2], [4]])).all()  # a patch is a second here, and two positions
    slow = processor.prompt(read(folder, frames=names, fps=0.5))
    assert torch.equal(slow.patches, prompt.patches) and torch.equal(slow.ids, prompt.ids)
    assert (
        slow.positions[0, start + 18] - slow.positions[0, start + 1] == 16 and slow.next_position > prompt.next_position
    )
    still = processor.prompt(read(folder, image="0.png"))
    one = processor.prompt(read(folder, frames=names[:1], fps=1))
    assert torch.equal(one.patches, still.patches) and torch.equal(one.positions, still.positions)
    assert one.ids.tolist() == [6 if i == 5 else i for i in still.ids.tolist()]


def test_bad_records_of_clips_are_one_sentence(folder):
    clip = {"frames": ["0.png", "1.png"], "fps": 1.0}
    for fields, words in [
        ({"fps": 1}, "field 'image' is missing"),
        ({"frames": ["0.png"]}, "field 'fps' is missing, add it"),
        ({"frames": [], "fps": 1}, "'frames' must be a list of 1 to 768 pictures, not 0 of them"),
        ({"frames": ["0.png"] * 769, "fps": 1}, "'frames' must be a list of 1 to 768 pictures, not 769 of them"),
        ({"frames": "0.png", "fps": 1}, "'frames' must be a list .*, not '0.png'"),
        ({"frames": ["0.png", "none.png"], "fps": 1}, r"field 'frames\[1\]' names 'none.png', which is not a file"),
        ({"frames": ["0.png", 3], "fps": 1}, r"field 'frames\[1\]' must be a non-empty string"),
        ({"frames": ["../0.png"], "fps": 1}, r"field 'frames\[0\]' '../0.png' leads out of"),
        ({"frames": ["0.png", "tall.png"], "fps": 1}, r"'frames\[1\]': 'tall.png' is 56x84 .*the first is 84x56; give"),
        (
            clip | {"image": "0.png"},
            "fields 'image' and 'frames' are both there; a record has one of image, frames, vi",
        ),
        (clip | {"width": 84, "height": 57}, "say 84x57, but '0.png' is 84x56"),
        *((clip | {"fps": fps}, "'fps' must be frames per second") for fps in (0, -1, "1", None, True, float("nan"))),
    ]:
        refused(f"^{folder}/train.jsonl:1: .*{words}", read, folder, **fields)
    sample = read(folder, **clip)
    Image.fromarray(noise(1, 56, 84)[0]).save(folder / "1.png")
    refused("train.jsonl:1: field 'frames': frame 2 of 2 is 56x84, but all must be", load_frames, sample)
    (folder / "1.png").unlink()
    refused("train.jsonl:1: field 'frames': image .*1.png is not a file", load_frames, sample)


def test_a_policy_that_knows_no_clips_says_so(folder, tmp_path, capsys):
    model, sample = tmp_path / "model", read(folder, frames=["0.png"], fps=1)
    model.mkdir()
    for file in NANO.glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    raw = json.loads((model / "config.json").read_text())
    bad = raw | {"vision_config": {k: v for k, v in raw["vision_config"].items() if k != "tokens_per_second"}}
    (model / "config.json").write_text(json.dumps(bad))
    processor = Processor(model, "answer", TASKS)
    assert [processor.check(sample), processor.tokens_per_second] == [processor.check(sample), 2]
    assert capsys.readouterr().out.count("vision_config has no tokens_per_second; 2, as published") == 1
    for odd in (None, 5, 7):
        said = {key: value for key, value in (raw | {"video_token_id": odd}).items() if value is not None}
        (model / "config.json").write_text(json.dumps(said))
        words = (
            "image_token_id and video_token_id are both 5" if odd == 5 else f"video_token_id is {odd}, but .* is 6 in"
        )
        refused(f"train.jsonl:1: field 'frames': .*{words}", Processor(model, "answer", TASKS).check, sample)
    (model / "config.json").write_text(json.dumps(raw))
    bare = Processor(model, "answer", TASKS)
    bare.tokenizer.chat_template = None  # then Qwen's own words
    assert "<|vision_start|><|video_pad|><|vision_end|>which phase?" in bare.prompt(sample).text
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("'video'", "'film'")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    refused("chat template writes 0 video tokens for one video", Processor(model, "answer", TASKS).check, sample)


def test_clips_are_read_ahead_as_pictures_are(folder):
    names, config = [f"{i}.png" for i in range(5)], ImageConfig()
    clip, still = read(folder, frames=names, fps=1), read(folder, image="1.png")
    broken = replace(clip, media=replace(clip.media, frames=(*clip.media.frames[:4], folder / "none.png")))
    samples, order = [clip, still, broken], [0, 1, 2, 0]
    with Readers(0) as none, Readers(2) as two:
        plain, ahead = (list(readers.read(order, samples, config, ahead=3)) for readers in (none, two))
    for (_, a), (_, b) in zip(plain, ahead, strict=True):
        if isinstance(a, Exception):
            assert str(a) == str(b) and "train.jsonl:1: field 'frames': image" in str(a)
        else:
            assert np.array_equal(a.patches, b.patches) and (a.grid, a.seconds, a.target) == (
                b.grid,
                b.seconds,
                b.target,
            )
    assert [view.grid for _, view in (ahead[0], ahead[1])] == [(3, 4, 6), (1, 4, 6)]


# --------------------------------------------------------------------------------------------------------------- films


def write_film(path: Path, frames: list[np.ndarray], stamps: list[int], **options) -> bytes:
    """Frames at these milliseconds, without any loss."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264rgb", rate=25, options={"qp": "0", "g": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "rgb24"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, stamp in zip(frames, stamps, strict=True):
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            shown.pts, shown.time_base = stamp, Fraction(1, 1000)
            out.mux(stream.encode(shown))
        out.mux(stream.encode(None))
    return path.read_bytes()


def test_a_film_gives_the_prompts_that_its_frames_give(folder):
    frames, processor = noise(9, 84, 56), Processor(NANO, "answer", TASKS)
    write_film(folder / "a.mp4", frames, [500 * i for i in range(9)])
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"f{i}.png")
    for start, end, fps, shown in [
        (0, 4.5, 2.0, range(9)),
        (1.0, 4.0, 1.0, (2, 4, 6)),
        (0.7, 2, 4.0, (1, 1, 2, 2, 3, 3)),
    ]:
        film = processor.prompt(read(folder, video="a.mp4", start=start, end=end, fps=fps))
        listed = processor.prompt(read(folder, frames=[f"f{i}.png" for i in shown], fps=fps))
        assert torch.equal(film.ids, listed.ids) and torch.equal(film.patches, listed.patches)
        assert torch.equal(film.positions, listed.positions) and film.size == listed.size == (84, 56)
    assert read(folder, video="a.mp4", fps=2.0).media == Clip(Film(folder / "a.mp4", 0.0, 4.04), 2.0, 9)  # to its end


def test_of_a_variable_rate_the_frame_that_a_player_shows_is_taken(folder):
    frames, stamps = noise(9, 84, 56), [0, 100, 150, 900, 2000, 2010, 2020, 5000, 7000]
    for name in ("a.mp4", "a.mkv"):
        write_film(folder / name, frames, stamps)
        clip = Clip(Film(folder / name, 0.0, 7.0), 1.0, 8)
        for found, want in zip(clips.film_frames(clip), (0, 3, 4, 6, 6, 7, 7, 8), strict=True):
            assert np.array_equal(found, frames[want])


def test_a_film_is_turned_as_it_says(folder):
    frames = noise(2, 84, 56)
    plain = write_film(folder / "a.mp4", frames, [0, 1000])
    at = plain.index(b"tkhd") + 44  # a 3 x 3 matrix in fixed point, which a player applies
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 65536, 0, -65536, 0, 0, 0, 0, 2**30))
    (folder / "a.mp4").write_bytes(plain[:at] + matrix + plain[at + 36 :])
    sample = read(folder, video="a.mp4", fps=1.0)
    assert sample.size == (56, 84)
    assert np.array_equal(load_frames(sample)[1], np.rot90(frames[1], -1))  # clockwise, as a phone held upright films


def test_bad_films_are_one_sentence(folder):
    av = pytest.importorskip("av")
    whole = write_film(folder / "a.mp4", noise(9, 84, 56), [500 * i for i in range(9)], movflags="faststart")
    film = {"video": "a.mp4", "fps": 1.0}
    for fields, words in [
        ({"start": 2, "end": 2}, "'start' and 'end' say 2 to 2 seconds, which is nothing"),
        ({"start": -1}, "'start' must be seconds from the video's beginning, not -1"),
        ({"end": float("nan")}, "'end' must be seconds"), ({"end": "4"}, "'end' must be seconds"),
        ({"end": 60}, "a frame at 59 seconds is asked for, but the video ends at 4.04"),
        ({"fps": 999.0}, "4035 frames from 0 to 4.04 seconds are more than 768; lower 'fps'"),
        ({"video": "b.mp4"}, "field 'video' names 'b.mp4', which is not a file"),
        ({"video": "0.png"}, "field 'video': video .*0.png cannot be read"),
    ]:  # fmt: skip
        refused(f"train.jsonl:1: .*{words}", read, folder, **film | fields)
    sample = read(folder, **film)
    longer = replace(sample, media=Clip(Film(folder / "a.mp4", 0.0, 9.0), 1.0, 9))
    refused("ends at 4.0. seconds, but a frame at 8.00 is asked for; is it cut off", load_frames, longer)
    (folder / "a.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    refused("train.jsonl:1: field 'video': video .*a.mp4 cannot be read .*; is it cut off", load_frames, sample)
    (folder / "a.mp4").write_bytes(whole[:200])
    refused("train.jsonl:1: field 'video': video .*a.mp4 .*cut off", read, folder, **film)
    playlist = "#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n"  # FFmpeg would open what it names
    (folder / "a.mp4").write_text(playlist)
    refused("video .*a.mp4 cannot be read", read, folder, **film)
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        out.mux([*stream.encode(sound), *stream.encode(None)])
    refused(
        "video .*sound.mp4 has no pictures, only sound",
        read,
        folder,
        **film | {"video": "sound.mp4"},
    )


def test_without_pyav_films_are_refused_and_frames_are_not(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    refused("needs PyAV, which is not installed: pip install", read, folder, video="0.png", fps=1)
    assert read(folder, frames=["0.png"], fps=1).frames == 1


def test_as_many_frames_as_there_are_stamps_before_the_end():
    for start, end, fps, count in [(0, 4, 1, 4), (0, 4.04, 1, 5), (1.1, 3, 1, 2), (0, 0.1, 1, 1), (0, 1.0, 30, 30)]:
        assert frames_between(start, end, fps) == count
