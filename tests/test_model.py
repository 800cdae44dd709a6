"""model.py against transformers' Qwen2.5-VL, and the shared prefix against plain full rows."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model
from errors import InputError
from model import ModelConfig, Policy, collate, sample

IMAGE, EOS = 120, 5


def tiny_config(**changes) -> dict:
    """140 x 140 images are 5 x 5 units and windows are 4 x 4: windows that do not divide the grid."""
    text = dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, window_size=112,
        patch_size=14, fullatt_block_indexes=[1],
    )  # fmt: skip
    text.update(changes.pop("text", {}))
    return dict(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=121, vision_start_token_id=122,
        vision_end_token_id=123, eos_token_id=EOS, tie_word_embeddings=True,
    ) | changes  # fmt: skip


def save_peer(folder, seed=0, **changes) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tiny_config(**changes))).eval()
    with torch.no_grad():
        for p in peer.parameters():  # the default 0.02 would hide mistakes behind tiny logits
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    peer.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    peer.save_pretrained(folder)
    return peer


@dataclass
class FakePrompt:
    ids: Tensor
    positions: Tensor
    next_position: int
    patches: Tensor
    grid: tuple[int, int, int]


def fake_prompt(peer, rows: int, columns: int, before: int, after: int, seed: int = 0) -> FakePrompt:
    """`before` text tokens, an image of rows x columns patches, `after` text tokens; positions are the peer's own."""
    g = torch.Generator().manual_seed(seed)
    image = torch.full((rows * columns // 4,), IMAGE)
    ids = torch.cat(
        (torch.randint(6, 100, (before,), generator=g), image, torch.randint(6, 100, (after,), generator=g))
    )
    grid = torch.tensor([[1, rows, columns]])
    kinds = (ids == IMAGE).int()[None]
    positions, delta = peer.model.get_rope_index(ids[None], kinds, image_grid_thw=grid)
    patches = torch.randn(rows * columns, 1176, generator=g)
    return FakePrompt(ids, positions[:, 0], int(delta) + len(ids), patches, (1, rows, columns))


def peer_logits(peer, prompt: FakePrompt, completion: Tensor | None = None) -> Tensor:
    ids = prompt.ids if completion is None else torch.cat((prompt.ids, completion))
    return peer(
        input_ids=ids[None],
        pixel_values=prompt.patches.to(peer.dtype),
        image_grid_thw=torch.tensor([prompt.grid]),
        mm_token_type_ids=(ids == IMAGE).int()[None],
    ).logits[0]


PROMPTS = [(10, 10, 3, 5), (4, 6, 1, 9), (10, 14, 4, 2), (10, 10, 2, 6), (2, 2, 3, 1)]  # rows, columns, before, after


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    peer = save_peer(folder, tie_word_embeddings=request.param == "tied")
    return Policy.from_folder(folder), peer, folder


@pytest.fixture(scope="module")
def prompts(pair):
    return [fake_prompt(pair[1], *shape, seed=i) for i, shape in enumerate(PROMPTS)]


@torch.no_grad()
def test_logits_equal_transformers(pair, prompts):
    """Every position of a prompt and its completion, images of different size in one batch, padding in the batch."""
    policy, peer, _ = pair
    batch = collate(prompts)
    ids = torch.randint(6, 100, (len(prompts), 2, 7))
    lengths = torch.full(ids.shape[:2], 7)
    ours = policy.logprobs(policy.prefix(batch), ids, lengths)
    full = policy.full_logprobs(batch, ids, lengths)
    for b, prompt in enumerate(prompts):
        for g in range(2):
            logits = peer_logits(peer, prompt, ids[b, g])[len(prompt.ids) - 1 : -1]
            theirs = logits.log_softmax(-1).gather(1, ids[b, g][:, None])[:, 0]
            assert (ours[b, g] - theirs).abs().max() < 1e-4  # log-probs of random tokens, about -50
            assert (full[b, g] - theirs).abs().max() < 1e-4
    prefix = policy.prefix(batch)
    for row, b in enumerate(prefix.order.tolist()):
        theirs = peer_logits(peer, prompts[b])[-1]
        assert (policy.logits(prefix.hidden[row]) - theirs).abs().max() < 1e-5 * theirs.abs().max()
