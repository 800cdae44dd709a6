"""generate.py: the decode step against the suffix pass, its memory, and that a recorded step can be replayed."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import generate
from generate import Decoding
from model import Policy, collate
from tests.test_model import needs_cuda, on_cuda, pair, prompts  # noqa: F401  fixtures

GROUP, TOKENS = 3, 11


@pytest.fixture(scope="module")
def policy(pair) -> Policy:  # noqa: F811
    exact = copy.deepcopy(pair[0]).double()
    exact.compute_dtype = torch.float64
    return exact


def luck(count: int) -> torch.Tensor:
    return torch.rand(count, GROUP, TOKENS, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_decode_steps_compute_the_suffix_pass(policy, prompts, monkeypatch):  # noqa: F811
    """float64, prompts of unequal length: the log-probs that tokens are drawn from are those that the update gets."""
    drawn, draw = [], Decoding.draw

    def watched(self, logits):
        draw(self, logits)
        drawn.append(torch.log_softmax(logits / 1.2, -1).gather(1, self.ids[:, self.at])[:, 0].clone())

    monkeypatch.setattr(Decoding, "draw", watched)
    prefix = policy.prefix(collate(prompts))
    assert len(set(prefix.lengths)) > 1
    out = policy.generate(prefix, GROUP, TOKENS, 1.2, luck(len(prompts)))
    sampled = torch.stack(drawn, -1).unflatten(0, (len(prompts), GROUP))[torch.argsort(prefix.order)]
    expected = policy.logprobs(prefix, out.ids, out.lengths, 1.2)
    real = torch.arange(out.ids.shape[2]) < out.lengths[..., None]
    torch.testing.assert_close(sampled[..., : out.ids.shape[2]][real], expected[real], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_group_holds_its_prompt_once(policy, prompts):  # noqa: F811
    """The G rows of a group read their prompt's keys in one place; only T places a row are their own."""
    prefix = policy.prefix(collate(prompts))
    rows = Decoding(policy, prefix, GROUP, TOKENS, 0.0, None)
    config = policy.config
    for (k, v), k_prefix, v_prefix in zip(rows.prefix, prefix.keys, prefix.values, strict=True):
        assert k.untyped_storage().nbytes() == k_prefix.nbytes and v.untyped_storage().nbytes() == v_prefix.nbytes
    own = sum(k.nbytes + v.nbytes for k, v in rows.own)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows.own[0][0].itemsize
    assert own == len(prompts) * GROUP * TOKENS * per_token


class Tape(TorchDispatchMode):
    """What a CUDA graph records, on a CPU: operators, and which tensors they read. A replay repeats them on the tensors
    of the outside that were there at the recording, and knows no Python value that has changed since."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func), "the step waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        made: dict[int, torch.Tensor] = {}

        def now(x):
            return made.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            outs, agains = (x if isinstance(x, (tuple, list)) else (x,) for x in (out, again))
            made |= {id(old): new for old, new in zip(outs, agains, strict=True)}


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("window", [3, 64])
def test_a_recorded_step_can_be_replayed(policy, prompts, temperature, window, monkeypatch):  # noqa: F811
    """Recorded once a window and replayed from then on, as on a GPU, it draws what plain steps draw."""
    monkeypatch.setattr(generate, "WINDOW", window)
    prefix, recordings = policy.prefix(collate(prompts)), []
    expected = policy.generate(prefix, GROUP, TOKENS, temperature, luck(len(prompts)))

    def recorded(step, pool):
        """Recording runs nothing on a GPU: so what the step did is undone."""
        rows = step.func.__self__
        state = [rows.bias, rows.ids, rows.lengths, rows.alive, rows.at, *(x for both in rows.own for x in both)]
        before = [x.clone() for x in state]
        with Tape() as tape:
            step()
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        recordings.append(tape)
        return tape.replay

    monkeypatch.setattr(generate, "recorded", recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    policy.graph = True
    try:
        got = policy.generate(prefix, GROUP, TOKENS, temperature, luck(len(prompts)))
    finally:
        policy.graph = False
    assert torch.equal(got.lengths, expected.lengths) and torch.equal(got.ids, expected.ids)
    assert len(recordings) == {3: 3, 64: 1}[window]  # 10 steps in windows of 3, 3, 3 and 1: one alone is not recorded


@torch.no_grad()
def test_a_rollout_stops_soon_after_its_last_row(policy, prompts, monkeypatch):  # noqa: F811
    """Rows that end together end the loop at the next look, not at max_tokens."""
    steps, step = [], Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self, places: (steps.append(places), step(self, places)))
    monkeypatch.setattr(generate, "sample", lambda logits, *_: torch.full((len(logits),), policy.eos_ids[0]))
    out = policy.generate(policy.prefix(collate(prompts)), GROUP, 50)
    assert out.ids.shape[2] == 1 and not out.truncated.any()
    assert len(steps) == generate.STOP_EVERY - 1


@pytest.mark.gpu
@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [3, 64])
def test_a_cuda_graph_draws_what_plain_steps_draw(policy, prompts, dtype, window, monkeypatch):  # noqa: F811
    monkeypatch.setattr(generate, "WINDOW", window)
    there = on_cuda(policy, dtype)
    for _ in range(2):  # the second time with memory that the first has left
        prefix = there.prefix(collate(prompts, "cuda"))
        expected = there.generate(prefix, GROUP, TOKENS, 1.5, luck(len(prompts)))
        there.graph = True
        got = there.generate(prefix, GROUP, TOKENS, 1.5, luck(len(prompts)))
        there.graph = False
        assert torch.equal(got.lengths, expected.lengths) and torch.equal(got.ids, expected.ids)
