"""model.py against transformers' Qwen2.5-VL, and the shared prefix against plain full rows."""

import copy
import json
import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from full_rows import full_logprobs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import layers
import model
from errors import InputError
from generate import sample
from model import Policy, collate
from weights import load_policy, read_config, save_policy

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
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.ndim == 1 else 0.0))
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
    image_tokens: Tensor | None = None


def fake_prompt(peer, rows: int, columns: int, before: int, after: int, seed: int = 0) -> FakePrompt:
    """`before` text tokens, an image of rows x columns patches, `after` text tokens; positions are the peer's own."""
    g = torch.Generator().manual_seed(seed)
    image = torch.full((rows * columns // 4,), IMAGE)
    start, end = (torch.randint(6, 100, (n,), generator=g) for n in (before, after))
    ids = torch.cat((start, image, end))
    grid = torch.tensor([[1, rows, columns]])
    kinds = (ids == IMAGE).int()[None]
    positions, delta = peer.model.get_rope_index(ids[None], kinds, image_grid_thw=grid)
    patches = torch.randn(rows * columns, 1176, generator=g)
    return FakePrompt(ids, positions[:, 0], int(delta) + len(ids), patches, (1, rows, columns))


def peer_inputs(peer, prompt: FakePrompt, ids: Tensor) -> dict:
    pictures = dict(pixel_values=prompt.patches.to(peer.dtype), image_grid_thw=torch.tensor([prompt.grid]))
    return dict(input_ids=ids[None], mm_token_type_ids=(ids == IMAGE).int()[None], **pictures)


def peer_logits(peer, prompt: FakePrompt, completion: Tensor | None = None) -> Tensor:
    """At every token of the prompt; or those that the tokens of a completion are drawn from."""
    if completion is None:
        return peer(**peer_inputs(peer, prompt, prompt.ids)).logits[0]
    return peer(**peer_inputs(peer, prompt, torch.cat((prompt.ids, completion)))).logits[0, len(prompt.ids) - 1 : -1]


PROMPTS = [(10, 10, 3, 5), (4, 6, 1, 9), (10, 14, 4, 2), (10, 10, 2, 6), (2, 2, 3, 1)]  # rows, columns, before, after


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    peer = save_peer(folder, tie_word_embeddings=request.param == "tied")
    return load_policy(folder), peer, folder


@pytest.fixture(scope="module")
def prompts(pair):
    return [fake_prompt(pair[1], *shape, seed=i) for i, shape in enumerate(PROMPTS)]


def random_completions(b: int, g: int, t: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b, g), generator=rng)
    lengths[0, 0] = t
    return torch.randint(6, 100, (b, g, t), generator=rng), lengths


@torch.no_grad()
def test_logits_equal_transformers(pair, prompts):
    """The peer sees one unpadded row at a time; we a sorted batch of unequal prompts with images of different size."""
    policy, peer, _ = pair
    ids, lengths = random_completions(len(prompts), 2, 7)
    batch = collate(prompts)
    prefix = policy.prefix(batch)
    ours, full = policy.logprobs(prefix, ids, lengths), full_logprobs(policy, batch, ids, lengths)
    warm, entropy = policy.logprobs(prefix, ids, lengths, temperature=0.7, entropy=True)
    for row, b in enumerate(prefix.order.tolist()):
        theirs = peer_logits(peer, prompts[b])[-1]
        assert (policy.logits(prefix.hidden[row]) - theirs).abs().max() < 1e-5
        for g, n in enumerate(lengths[b].tolist()):
            logits, tokens = peer_logits(peer, prompts[b], ids[b, g]), ids[b, g][:, None]
            theirs, theirs_warm = (x.log_softmax(-1).gather(1, tokens)[:n, 0] for x in (logits, logits / 0.7))
            assert (ours[b, g, :n] - theirs).abs().max() < 2e-5 and (full[b, g, :n] - theirs).abs().max() < 2e-5
            assert (warm[b, g, :n] - theirs_warm).abs().max() < 2e-5  # the temperature divides the logits
            spread = torch.distributions.Categorical(logits=logits / 0.7).entropy()[:n]
            assert (entropy[b, g, :n] - spread).abs().max() < 2e-5
            assert (ours[b, g, n:] == 0).all() and (full[b, g, n:] == 0).all()


@torch.no_grad()
def test_greedy_tokens_equal_transformers(pair, prompts):
    policy, peer, _ = pair
    completions = policy.generate(policy.prefix(collate(prompts)), group_size=2, max_tokens=9)
    for b, prompt in enumerate(prompts):
        inputs = peer_inputs(peer, prompt, prompt.ids) | dict(attention_mask=torch.ones_like(prompt.ids)[None])
        theirs = peer.generate(**inputs, max_new_tokens=9, do_sample=False)[0, len(prompt.ids) :]
        for g in range(2):
            n = int(completions.lengths[b, g])
            assert completions.ids[b, g, :n].tolist() == theirs[:n].tolist() and n == len(theirs)
            assert bool(completions.truncated[b, g]) == (theirs[-1] != EOS)


@torch.no_grad()
def test_saved_folder_loads_in_transformers(pair, prompts, tmp_path):
    policy, peer, _ = pair
    save_policy(policy, tmp_path)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(peer_logits(again, prompts[0]), peer_logits(peer, prompts[0]))
    ours = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), policy.parameters(), strict=True))


# ------------------------------------------------------------------------------------------- gradients and checkpoints


def in_float64(folder) -> Policy:
    policy = load_policy(folder, dtype=torch.float64)
    policy.compute_dtype = torch.float64
    return policy


def backward(policy: Policy, prompts: list, group: int = 2, full: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that weighs every token's log-prob by chance -> the log-probs and the gradients by name."""
    (ids, lengths), batch = random_completions(len(prompts), group, 6), collate(prompts)
    weights = torch.randn(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    policy.zero_grad()
    logp = (full_logprobs if full else logprobs)(policy, batch, ids, lengths, temperature=0.9)
    (logp * weights).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def logprobs(policy: Policy, batch, ids: Tensor, lengths: Tensor, **options) -> Tensor:
    return policy.logprobs(policy.prefix(batch), ids, lengths, **options)


def assert_same(ours: tuple[Tensor, dict], theirs: tuple[Tensor, dict], logp=1e-12, gradients=1e-12) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=logp)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=gradients)
    assert all(gradient.abs().max() > 1e-6 for gradient in ours[1].values())


@pytest.mark.parametrize("group", [1, 8])
def test_prefix_equals_full_rows(pair, prompts, group):
    """In float64: log-probs to 1e-10 and the gradient of every parameter to 1e-9; unequal prompts and completions."""
    policy = in_float64(pair[2])
    shared = backward(policy, prompts, group)
    assert_same(shared, backward(policy, prompts, group, full=True), 1e-10, 1e-9)
    assert shared[1].keys() == dict(policy.named_parameters()).keys()


def count_checkpoints(patch: pytest.MonkeyPatch) -> list:
    calls, checkpoint = [], layers.checkpoint
    patch.setattr(layers, "checkpoint", lambda f, *inputs, **more: calls.append(f) or checkpoint(f, *inputs, **more))
    return calls


def test_checkpointing_changes_no_number(pair, prompts, monkeypatch):
    """And every block takes part: 3 of the vision tower, 3 of the prompt, 3 of the completions; without a gradient none
    does. The head keeps no logits anyway (kernels.linear_logprob)."""
    policy, calls = in_float64(pair[2]), count_checkpoints(monkeypatch)
    plain = backward(policy, prompts)
    assert not calls
    policy.checkpointing = True
    assert_same(backward(policy, prompts), plain)
    assert len(calls) == 3 + 3 + 3
    with torch.no_grad():
        completions = policy.generate(prefix := policy.prefix(collate(prompts)), 2, 4)
        policy.logprobs(prefix, completions.ids, completions.lengths)
    assert len(calls) == 3 + 3 + 3


def held_bytes(policy: Policy, forward) -> int:
    """What autograd keeps of a forward pass until the backward pass, weights aside: distinct storages of saved tensors
    and of the inputs of checkpoints."""
    tensors, checkpoint = {}, layers.checkpoint

    def keep(tensor: Tensor) -> Tensor:
        tensors[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    def noting(function, *inputs, **options):
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                keep(tensor)
        return checkpoint(function, *inputs, **options)

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(layers, "checkpoint", noting)
        assert forward().requires_grad
    weights = {p.data_ptr() for p in policy.parameters()}
    return sum(t.untyped_storage().nbytes() for address, t in tensors.items() if address not in weights)


def test_checkpointing_holds_less_memory(pair, prompts):
    """The whole pass, and the vision tower alone, which has a loop of its own."""
    policy, batch = load_policy(pair[2]), collate(prompts)
    policy.visual.patch_embed.requires_grad_(False)  # else the patches are kept for it, and outweigh these tiny blocks
    completions = random_completions(len(prompts), 8, 20)
    held = []
    for policy.checkpointing in (False, True):
        held.append(held_bytes(policy, lambda: logprobs(policy, batch, *completions)))
        held.append(held_bytes(policy, lambda: policy.visual(batch.patches, batch.grids, policy.checkpointing)))
    assert held[2] < held[0] / 2 and held[3] < held[1] / 2


def test_a_frozen_vision_tower_builds_no_graph(pair, prompts):
    """And the gradients of all the rest are what they were."""
    policy, batch = in_float64(pair[2]), collate(prompts)
    logp, gradients = backward(policy, prompts)
    rest = {name: g for name, g in gradients.items() if not name.startswith("visual.")}
    policy.visual.requires_grad_(False)
    for policy.checkpointing in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(backward(policy, prompts), (logp, rest))
        assert not policy.visual(batch.patches.double(), batch.grids, policy.checkpointing).requires_grad


def test_logprobs_without_gradient_are_the_same_bits(pair, prompts):
    """So the ratio of an on-policy step is exactly 1 also when the old log-probs had a pass of their own."""
    policy = pair[0]
    ids, lengths = random_completions(len(prompts), 4, 5)
    with_gradient = policy.logprobs(policy.prefix(collate(prompts)), ids, lengths)
    with torch.no_grad():
        without = policy.logprobs(policy.prefix(collate(prompts)), ids, lengths)
    assert torch.equal((with_gradient - without).exp(), torch.ones_like(without))


@torch.no_grad()
def test_sampling_follows_the_policy(pair, prompts):
    """The mean of many sampled first tokens is the softmax; log-probs of samples are those of the sampled policy."""
    policy = pair[0]
    prefix = policy.prefix(collate(prompts[:2]))
    g = 4000
    uniforms = torch.rand(2, g, 1, generator=torch.Generator().manual_seed(0))
    out = policy.generate(prefix, g, 1, temperature=1.3, uniforms=uniforms)
    for row, b in enumerate(prefix.order.tolist()):
        expected = torch.softmax(policy.logits(prefix.hidden[row]) / 1.3, -1)
        frequency = torch.bincount(out.ids[b, :, 0], minlength=128) / g
        assert (frequency - expected).abs().max() < 5 * (expected.max() / g).sqrt()


@torch.no_grad()
def test_rollouts_depend_on_their_own_prompt_and_luck_only(pair, prompts):
    """The same prompt with the same uniforms gives the same completions, alone or in a batch."""
    policy = pair[0]
    uniforms = torch.rand(len(prompts), 3, 8, generator=torch.Generator().manual_seed(3))
    together = policy.generate(policy.prefix(collate(prompts)), 3, 8, 1.0, uniforms)
    for b, prompt in enumerate(prompts):
        alone = policy.generate(policy.prefix(collate([prompt])), 3, 8, 1.0, uniforms[b : b + 1])
        assert torch.equal(alone.lengths[0], together.lengths[b])
        for g in range(3):
            n = int(alone.lengths[0, g])
            assert torch.equal(alone.ids[0, g, :n], together.ids[b, g, :n])
    assert len({tuple(row) for row in together.ids[0].tolist()}) > 1  # and members of a group differ


@pytest.mark.parametrize("deterministic", [False, True])
def test_sample_never_draws_probability_zero(deterministic, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    luck = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-24])
    assert sample(logits, 1.0, luck).tolist() == [1, 1, 3, 3]
    assert sample(logits[:1] + torch.tensor([0, 0, 0, 1.0, 0]), 0, None).tolist() == [3]


def test_deterministic_sampling_draws_from_the_same_distribution(monkeypatch):
    """Whole numbers instead of floats: the tokens differ only where a uniform falls on the rounding of a bound."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 151, generator=generator)
    luck = torch.rand(4000, generator=generator)
    floats = sample(logits, 0.9, luck)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert (sample(logits, 0.9, luck) != floats).sum() <= 2


def test_completions_end_with_the_first_eos(pair, prompts):
    """Lengths count up to and including the first EOS; nothing is generated behind it."""
    policy = pair[0]
    uniforms = torch.rand(len(prompts), 16, 30, generator=torch.Generator().manual_seed(4))
    out = policy.generate(policy.prefix(collate(prompts)), 16, 30, 2.0, uniforms)
    ended = ~out.truncated
    assert ended.any() and out.truncated.any()
    for ids, n, cut in zip(out.ids.flatten(0, 1), out.lengths.flatten(), out.truncated.flatten(), strict=True):
        assert (EOS in ids[:n].tolist()) != bool(cut)
        assert EOS not in ids[: n - 1].tolist()
        assert (ids[n:] == EOS).all()


# ------------------------------------------------------------------------------------------- folders of another kind

CONFIG = json.loads((Path(model.__file__).parent / "assets" / "nano" / "config.json").read_text())
ODD_CONFIGS = [  # what config.json says instead, words of the sentence
    ({"num_hidden_layers": 1000000}, "num_hidden_layers is 1000000, at most 256"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776, at most"),
    ({"intermediate_size": 1e3}, "intermediate_size is 1000.0, a whole number above 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, a whole number"),
    ({"max_position_embeddings": "2048"}, "max_position_embeddings is '2048'"),
    ({"image_token_id": 320}, "image_token_id 320 is none of vocab_size 320 tokens"),
    ({"image_token_id": -1}, "image_token_id is -1"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\], an object is needed"),
    ({"rope_parameters": 7}, "rope_parameters is 7, an object is needed"),
    ({"text_config": "x"}, "text_config is 'x', an object is needed"),
    ({"vision_config": [1]}, "vision_config is .*, an object is needed"),
    ({"vision_config": None}, "field '.*' is missing"), ({"rope_theta": 0}, "rope_theta is 0, a number"),
    ({"rope_theta": math.nan}, "rope_theta is nan, a number"), ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', a number between 0 and 1"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"), ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\], only 'silu'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', true or false"),
    ({"model_type": "\x1b]0;x\x07" * 10**5}, "model_type is '"),
    ({"model_type": {"a": [[[[[[]]]]]]}}, "model_type is {"),
]  # fmt: skip
ODD_ROPES = [
    ({"mrope_section": [-4, 14, 6]}, r"mrope_section \(-4, 14, 6\) must be 3 whole numbers with the sum 16"),
    ({"mrope_section": [4.0, 6.0, 6.0]}, "mrope_section .* must be 3 whole numbers"),
    ({"mrope_section": [True, 9, 6]}, "mrope_section .* must be 3 whole numbers"),
    ({"mrope_section": "466"}, "mrope_section '466' must be"), ({"mrope_section": None}, "mrope_section None must be"),
    ({"mrope_section": [[4], 6, 6]}, "mrope_section .* must be"),
    ({"type": ["mrope"]}, r"rope type \['mrope'\] is not implemented"),
    ({"type": "yarn"}, "rope type 'yarn' is not implemented"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6', a number between 1 and 1e.12"),
]  # fmt: skip
ODD_VISION = [
    ({"depth": 10**30}, "vision_config.depth is 1000000000"),
    ({"window_size": 27}, "vision_config.window_size 27 is less than a token's 28 pixels"),
    ({"patch_size": 0}, "vision_config.patch_size is 0"),
    ({"spatial_merge_size": 10**9}, "spatial_merge_size is 1000000000, at most 16"),
    ({"temporal_patch_size": "2"}, "temporal_patch_size is '2'"),
    ({"num_heads": 64}, "a head of it must be a multiple of 4"), ({"num_heads": 3}, "128 cannot be split into 3 heads"),
    ({"in_channels": 4}, "vision_config.in_channels is 4, pictures have 3"),
    ({"out_hidden_size": 64}, "vision_config.out_hidden_size 64 is not hidden_size 128"),
    ({"fullatt_block_indexes": "02"}, "fullatt_block_indexes '02' must be a list of whole numbers"),
    ({"fullatt_block_indexes": [0.0]}, "fullatt_block_indexes .* must be a list"),
    ({"fullatt_block_indexes": 3}, "fullatt_block_indexes 3 must be a list"),
    ({"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu', only 'silu'"),
]  # fmt: skip


@pytest.mark.parametrize("part, odd", [(None, ODD_CONFIGS), ("rope_scaling", ODD_ROPES), ("vision_config", ODD_VISION)])
def test_a_config_of_odd_kinds_is_one_short_sentence(part, odd):
    for changes, words in odd:
        with pytest.raises(InputError, match=f"^config.json: .*{words}") as error:
            read_config(CONFIG | ({part: CONFIG[part] | changes} if part else changes))
        assert str(error.value).isprintable() and len(str(error.value)) < 300


OUTSIDE = ("vision_config", "model_type", "image_token_id", "video_token_id")  # of a text_config


def test_what_published_configs_leave_out_or_call_otherwise_is_still_taken():
    whole = read_config(CONFIG)
    assert read_config(CONFIG | {"text_config": {}, "rope_parameters": None}) == whole
    text = {key: CONFIG[key] for key in CONFIG if key not in OUTSIDE}
    assert read_config({key: CONFIG[key] for key in CONFIG if key not in text} | {"text_config": text}) == whole
    assert read_config(CONFIG | {"rope_theta": 10000}).rope_theta == whole.rope_theta
    assert read_config(CONFIG | {"tie_word_embeddings": None}).tie_word_embeddings is False


@pytest.fixture
def folder(pair, tmp_path):
    save_policy(pair[0], tmp_path)
    return tmp_path


def refuses(folder: Path, words: str) -> None:
    """One short line."""
    with pytest.raises(InputError, match=words) as error:
        load_policy(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_bad_weights_are_refused_in_one_sentence(folder):
    """Others are in test_failures.py."""
    file, name = folder / "model.safetensors", "model.norm.weight"
    weights = load_file(file)
    norm = weights[name]
    bad = [
        (weights | {"\x1b]0;title\x07\nerror: " + "x" * 10**6: torch.ones(1)}, "is not one of Qwen2.5-VL's"),
        (weights | {"model.language_model.norm.weight": norm + 1}, "norm.weight is there a second time"),
    ]
    kinds = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    odd = "tensor model.norm.weight is of type .*; weights must be floating point"
    for tensors, words in bad + [(weights | {name: norm.to(kind)}, odd) for kind in kinds]:
        save_file(tensors, file)
        refuses(folder, words)
    file.unlink()
    save_file(weights, folder / "a.safetensors")
    save_file({name: norm}, folder / "b.safetensors")
    where = dict.fromkeys(weights, "a.safetensors") | {name: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refuses(folder, "b.safetensors: tensor model.norm.weight is there a second time")


FILES = "config.json generation_config.json model.safetensors.index.json model.safetensors vocab.json".split()


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_not_waited_for(folder, name):
    """vocab.json: nothing reads it, but save_policy, at the end of a run, would copy it."""
    file = folder / name
    for strike in (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), os.mkdir):
        file.unlink(missing_ok=True)
        strike(file)
        refuses(folder, f"{name}:? is not a file; ")


def test_a_shard_that_is_no_file_and_a_link_to_nothing(folder):
    settings = folder / "generation_config.json"
    settings.unlink()
    settings.symlink_to("nowhere")  # a cache that was cleaned: other EOS, if it were passed over
    refuses(folder, "generation_config.json: is not a file")
    settings.unlink()
    os.mkfifo(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    refuses(folder, "a.safetensors is not a file; the checkpoint is not whole")
    (folder / "config.json").unlink()
    refuses(folder, "config.json: does not exist")


BAD_JSON = [
    (b"[" * 2000 + b"]" * 2000, "is not valid JSON|no JSON object"), (b'{"a":' * 100_000, "is not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"), (b'{"a": "\xff"}', "cannot be read"),
    (b"[1]", r"holds \[1\] and no JSON object"), (b"", "is not valid JSON"), (b"{", "is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize("name", FILES[:3])
def test_json_that_is_none_or_too_deep_is_one_sentence(folder, name):
    for content, words in BAD_JSON:
        (folder / name).write_bytes(content)
        refuses(folder, f"{name}.*({words})")


def test_an_eos_that_is_no_token_is_refused(folder):
    for eos in (10**30, 128, -1, 1.0, True, "5", [], [[5]], [5, 128], {"a": 5}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        refuses(folder, "eos_token_id .*(is none of 128 tokens|must be a token's id or a list)")


def test_places_and_image_tokens_must_be_equally_many(pair, prompts):
    """masked_scatter would take the first ones: of merge_size 4, a quarter of the picture in wrong places."""
    policy, at = pair[0], prompts[0].ids.tolist().index(IMAGE)
    for ids in (prompts[0].ids.clone(), torch.cat((prompts[0].ids, torch.tensor([IMAGE, 1])))):
        ids[at] = 1 if len(ids) == len(prompts[0].ids) else IMAGE
        positions = torch.arange(len(ids)).expand(3, -1)
        odd = replace(prompts[0], ids=ids, positions=positions)
        places, tokens = int((ids == IMAGE).sum()), int((prompts[0].ids == IMAGE).sum())
        with pytest.raises(ValueError, match=f"places for {places} image tokens, but their pictures make {tokens}"):
            policy.prefix(collate([odd]))
        with pytest.raises(ValueError, match=f"places for {places + tokens} .* make {2 * tokens}"):
            full_logprobs(policy, collate([prompts[0], odd]), torch.ones(2, 1, 1, dtype=torch.long), torch.ones(2, 1))


# ------------------------------------------------------------------------------------------------------------ on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(policy: Policy, dtype: torch.dtype) -> Policy:
    there = copy.deepcopy(policy).to("cuda", dtype)
    there.compute_dtype = dtype
    return there


@pytest.mark.gpu
@needs_cuda
def test_attention_is_flash_attention_forward_and_backward(pair, prompts):
    """Prefix, suffix and decode of prompts of one length need no mask, so no scores are materialised: all of it runs
    where only the flash kernel is allowed, in bfloat16, and gives what float32 gives on a CPU."""
    equal = [prompts[0], prompts[3]]
    ids, lengths = random_completions(2, 4, 7)
    there = on_cuda(pair[0], torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        prefix = there.prefix(collate(equal, "cuda"))
        logp = there.logprobs(prefix, ids.cuda(), lengths.cuda())
        logp.sum().backward()
        there.generate(prefix, 4, 6)
    expected = pair[0].logprobs(pair[0].prefix(collate(equal)), ids, lengths)
    assert (logp.cpu() - expected).abs().max() < 0.15 and (logp.cpu() - expected).abs().mean() < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in there.parameters())


@pytest.mark.gpu
@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_decode_path_draws_what_it_draws_on_a_cpu(pair, prompts, temperature):
    """Prompts of unequal length, so with the mask over the padded cache; float32, the same luck, the same tokens."""
    luck = torch.rand(len(prompts), 3, 8, generator=torch.Generator().manual_seed(3))
    here, there = pair[0], on_cuda(pair[0], torch.float32)
    expected = here.generate(here.prefix(collate(prompts)), 3, 8, temperature, luck)
    got = there.generate(there.prefix(collate(prompts, "cuda")), 3, 8, temperature, luck)
    assert torch.equal(got.lengths.cpu(), expected.lengths) and torch.equal(got.ids.cpu(), expected.ids)


@pytest.mark.gpu
@needs_cuda
@torch.no_grad()
def test_a_repeated_pass_on_a_gpu_gives_the_same_bits(pair, prompts):
    there = on_cuda(pair[0], torch.bfloat16)
    ids, lengths = random_completions(len(prompts), 4, 7)
    ids, lengths, batch = ids.cuda(), lengths.cuda(), collate(prompts, "cuda")
    first, *others = (there.logprobs(there.prefix(batch), ids, lengths) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
