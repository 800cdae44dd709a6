"""What a step costs, in exact whole numbers: FLOPs against a formula of the configuration, and calls of blocks.

The formula says what the design promises: a group pays for its image and prompt once and for G suffixes; logits exist
for completion tokens only; the head is multiplied once a token in decoding, once in each pass of log-probs and once
more in the backward pass. Whoever computes anything twice breaks an equality here; time is not looked at.
"""

import math
import multiprocessing
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

import generate
import kernels
import model
import vision
from bench import scale
from bench.scale import Case, counted, published, square, step_flops, trainer_step
from config import parse
from data import phantom_samples
from errors import InputError
from experiments import plot
from kernels import logprob
from prompts import Processor
from rollout import sample
from runtime.stream import uniforms
from tasks import TASKS
from train_grpo import algorithm, update
from weights import NANO, load_policy

CONFIG = load_policy(NANO).config
CASE = Case(prompts=2, group=3, rows=3, columns=5, text=9, completion=6)  # windows of 4 x 4 that the grid cuts


# --------------------------------------------------------------------------------------------------------- the formula


def matrix(tokens: int, *shapes: tuple[int, int]) -> int:
    """FLOPs of `tokens` rows times matrices."""
    return sum(2 * tokens * a * b for a, b in shapes)


class Formula:
    """FLOPs of one prompt and its group, forward, by part."""

    def __init__(self, config: model.ModelConfig, case: Case):
        self.config, self.case = config, case
        hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
        self.down = (inner, hidden)
        self.decoder = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), *[(hidden, inner)] * 2]
        p, g, r = case.tokens, case.group, case.completion
        # Behind the keys and values of the last layer, only the last token of a prompt goes on.
        self.prefix_ends = matrix(p, (hidden, kv), (hidden, kv))
        self.prefix_ends += matrix(1, (hidden, hidden), (hidden, hidden), *[(hidden, inner)] * 2, self.down)
        self.prefix_ends += 4 * p * hidden
        layers = config.num_hidden_layers
        self.prefix = self.blocks(p, p) // layers * (layers - 1) + self.prefix_ends
        self.suffix = g * self.blocks(r - 1, p + r - 1)  # the last token is never an input
        self.head = g * self.logits(r)
        self.decode = self.logits(1) + g * sum(self.blocks(1, p + t) + self.logits(1) for t in range(1, r))
        self.rows = (layers - 1) * p + 1 + layers * g * (r - 1)  # that go through the end of a decoder block
        self.vision_blocks, self.patch_embed, merger, self.vision_down = self.vision_parts()
        self.vision = self.vision_blocks + self.patch_embed + merger

    def blocks(self, queries: int, keys: int) -> int:
        """One row through the decoder: q k^T and its product with v, heads * head_dim = hidden wide, causal or not."""
        c = self.config
        return c.num_hidden_layers * (matrix(queries, *self.decoder, self.down) + 4 * queries * keys * c.hidden_size)

    def logits(self, tokens: int) -> int:
        return matrix(tokens, (self.config.hidden_size, self.config.vocab_size))

    def vision_parts(self) -> tuple[int, int, int, int]:
        """All blocks, the patch embedding, the merger of 2 x 2 patches; and of the blocks the last matrix alone."""
        v, rows, columns = self.config.vision, self.case.rows, self.case.columns
        patches, h = 4 * rows * columns, v.hidden_size
        linear = matrix(patches, (h, 3 * h), (h, h), *[(h, v.intermediate_size)] * 3)
        side = v.window_size // v.patch_size // 2
        tall, wide = ([min(side, n - i) for i in range(0, n, side)] for n in (rows, columns))
        sizes = [4 * a * b for a in tall for b in wide]
        full = len(v.fullatt_block_indexes)
        attention = 4 * h * (full * patches**2 + (v.depth - full) * sum(size**2 for size in sizes))
        merger = matrix(rows * columns, (4 * h, 4 * h), (4 * h, v.out_hidden_size))
        down = v.depth * matrix(patches, (v.intermediate_size, h))
        return v.depth * linear + attention, matrix(patches, (3 * 2 * 14 * 14, h)), merger, down

    def step(self, beta=True, inner: int = 1, checkpointing=False, reuse=True, frozen=False) -> int:
        """All prompts: rollout, log-probs of the old policy if there are inner steps, reference, update. reuse: the
        update goes on from the rollout's prefix. frozen: the vision tower is, and looks once for all."""
        suffix = self.suffix + self.head
        # Two products for each of the forward pass, but no gradient of pixels; and the head's logits are made again.
        backward, backward_look = 2 * (self.prefix + suffix) + self.head, 2 * self.vision - self.patch_embed
        if checkpointing:
            # torch ends a recomputation when it has what the backward pass needs: before the last matrix of a block.
            backward += self.prefix + self.suffix - matrix(self.rows, self.down)
            backward_look += self.vision_blocks - self.vision_down
        decoder = self.prefix + self.decode + suffix * (inner > 1) + (self.prefix + suffix) * beta
        decoder += inner * (self.prefix * (not reuse) + suffix + backward)
        looks, learnt = (1, 0) if frozen else (1 + beta + inner * (not reuse), inner)
        return self.case.prompts * (decoder + looks * self.vision + learnt * backward_look)


# --------------------------------------------------------------------------------------------------------------- FLOPs


def real_flops(case: Case, *flags: str) -> int:
    """Of train_grpo's rollout() and update() of the nano policy, on the CPU."""
    step = trainer_step(case, *flags)
    with counted() as counter:
        step()
    return counter.get_total_flops()


OTHERS = [replace(CASE, group=2, completion=1), Case(3, 2, 4, 4, 5, 9), Case(1, 5, 1, 2, 4, 70)]


@pytest.mark.parametrize("case", [CASE, *OTHERS])
def test_the_flops_of_a_step_are_those_of_the_formula(case):
    assert real_flops(case) == Formula(CONFIG, case).step()


OPTIONS = [(0, 1, 0, 0), (0.04, 1, 0, 1), (0.04, 2, 0, 0), (0, 2, 1, 1), (0.04, 1, 1, 0), (0.04, 2, 1, 1)]
NAMES = "beta, inner, checkpointing, frozen"


def options(beta, inner, checkpointing, frozen) -> list[str]:
    flags = ["--beta", str(beta), "--inner-steps", str(inner)]
    return flags + ["--checkpointing"] * checkpointing + ["--freeze-vision"] * frozen


@pytest.mark.parametrize(NAMES, OPTIONS)
def test_the_flops_with_and_without_each_option(beta, inner, checkpointing, frozen):
    expected = Formula(CONFIG, CASE).step(beta > 0, inner, checkpointing, inner == 1, frozen)
    assert real_flops(CASE, *options(beta, inner, checkpointing, frozen)) == expected


def test_doubling_the_group_at_case_b_costs_a_third_more_at_most():
    """2 prompts, 448 x 448 pixels, 293 prompt tokens, 32 new ones. In full rows it costs twice as much."""
    eight, sixteen = (Formula(CONFIG, square(2, group)).step() for group in (8, 16))
    full = [Formula(CONFIG, square(2, group).way("full rows")).step(reuse=False) for group in (8, 16)]
    assert sixteen <= 1.35 * eight and full[1] == 2 * full[0]


@pytest.mark.parametrize("way", ["one pass", "shared", "full rows"])
def test_the_count_without_numbers_is_that_of_a_real_step(way):
    case = CASE.way(way)
    parts, formula = step_flops(CONFIG, case), Formula(CONFIG, case)
    assert sum(parts.values()) == real_flops(case) == formula.step(reuse=case.reuse)
    assert parts["vision"] == case.prompts * formula.vision * (2 if way == "one pass" else 3)
    assert parts["prefill"] == case.prompts * formula.prefix
    assert parts["decode"] == case.prompts * formula.decode
    assert parts["reference"] - parts["forward"] == (parts["prefill"] if way == "one pass" else 0)


@pytest.mark.parametrize("size", scale.SIZES)
def test_the_published_sizes_follow_the_formula(size):
    """Counted with few tokens and two vision blocks, as each of them takes its time on the meta device."""
    config, case = published(size), Case(1, 3, 5, 6, 8, 4)
    config = replace(config, vision=replace(config.vision, depth=2, fullatt_block_indexes=(1,)))
    assert sum(step_flops(config, case).values()) == Formula(config, case).step()


@pytest.mark.parametrize("case, totals", [(scale.LARGE, [548, 98, 85]), (scale.SMALL, [211, 71, 67])])
def test_the_totals_of_the_table(case, totals):
    """TFLOP of a group at 3B: full rows, shared, in one pass."""
    ways = [case.way(way) for way in ("full rows", "shared", "one pass")]
    assert [round(Formula(published("3B"), way).step(reuse=way.reuse) / 1e12) for way in ways] == totals


# ----------------------------------------------------------------------------------------- operators of our own


def in_place(total, a, b, out_shape=None, **options) -> int:  # addmm_, which torch does not count
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_formula_of_the_head_is_what_its_reference_does(wanted):
    """Seven rows, two of them without gradient, in chunks of three."""
    hidden, weight, tokens = torch.randn(7, 8), torch.randn(20, 8), torch.arange(7)
    grad = torch.tensor([1.0, 0, 2, 3, 0, 4, 5])
    products = {torch.ops.aten.addmm_: in_place}
    with torch.utils.flop_counter.FlopCounterMode(display=False, custom_mapping=products) as counter:
        forward = logprob.reference_forward
        _, lse, _ = logprob.linear_forward(hidden, weight, tokens, 1.0, 3, False, forward)
    assert counter.get_total_flops() == 2 * 7 * 8 * 20
    with torch.utils.flop_counter.FlopCounterMode(display=False, custom_mapping=products) as inside:
        backward = logprob.reference_backward
        logprob.linear_backward(grad, hidden, weight, tokens, lse, 1.0, 3, wanted, backward)
    inputs = [x.requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True)]
    logp = kernels.linear_logprob(*inputs, tokens, chunk=3)
    with counted() as outside:
        logp.backward(grad)
    assert inside.get_total_flops() == outside.get_total_flops() == 2 * 5 * 8 * 20 * (1 + sum(wanted))


def test_no_operator_of_our_own_hides_a_product():
    """The counter does not look into them: each has a formula or, as far as is known here, no matrix product."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("medloc::")}
    registry = torch.utils.flop_counter.flop_registry
    formulas = {name for name in names if getattr(torch.ops.medloc, name) in registry}
    assert formulas == {"linear_logprob", "linear_logprob_backward"}
    assert names - formulas == {"token_logprob", "token_logprob_backward", "box_iou", "group_advantage"}


# --------------------------------------------------------------------------------------------------------------- calls


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each part of the model is called: VisionTower, VisionBlock, and a decoder block's three ways."""
    seen = Counter()

    def watch(owner, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counting(self, *inputs, **options):
            seen[name] += 1
            return original(self, *inputs, **options)

        monkeypatch.setattr(owner, method, counting)

    watch(vision.VisionTower, "forward", "tower")
    watch(vision.VisionBlock, "forward", "vision block")
    for way in ("prefix", "suffix", "decode"):
        watch(model.Block, way, way)
    return seen


def expected_calls(micro_batches: int, decoded: list, beta, inner=1, checkpointing=0, frozen=0) -> Counter:
    """decoded: tokens that each micro-batch's rollout samples; the first needs no decode step."""
    layers, depth = CONFIG.num_hidden_layers, CONFIG.vision.depth
    reuse = micro_batches == 1 and inner == 1  # the update's prefix is the rollout's
    prefixes = micro_batches * (1 + beta + inner - reuse)
    again = micro_batches * inner * checkpointing  # blocks of trained passes run twice
    return Counter(
        tower=micro_batches if frozen else prefixes,
        prefix=layers * (prefixes + again),
        suffix=layers * (micro_batches * (beta + (inner > 1) + inner) + again),
        decode=layers * sum(n - 1 for n in decoded),
    ) + Counter({"vision block": depth * (micro_batches if frozen else prefixes + again)})


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize(NAMES, OPTIONS)
def test_the_calls_of_a_step(calls, beta, inner, checkpointing, frozen, micro_batch):
    """They do not grow with the group."""
    case, n = replace(CASE, prompts=3, rows=2, columns=2, group=2 + 2 * micro_batch), math.ceil(3 / micro_batch)
    trainer_step(case, *options(beta, inner, checkpointing, frozen), "--micro-batch", str(micro_batch))()
    assert calls == expected_calls(n, [case.completion] * n, beta > 0, inner, checkpointing, frozen)


def test_decoding_stops_with_the_longest_completion(calls):
    """The nano policy's own answers, of unequal length: each micro-batch decodes up to the look after its longest one's
    end and no further, and the head is multiplied with their tokens only."""
    sizes = ["--batch-size", "6", "--micro-batch", "2", "--group-size", "4", "--max-tokens", "40"]
    grpo, policy = algorithm(parse("train_grpo.py", sizes)), load_policy(NANO)
    processor = Processor(NANO, "answer", TASKS)
    prompts = [processor.prompt(some) for some in phantom_samples(None, 1, 0, 6, size=84)]
    roll, _ = sample(policy, policy, processor, prompts, uniforms(0, 0, range(6), range(6), 4, 40), grpo)
    roll.advantage = torch.ones(6, 4)
    roll.advantage[0], roll.advantage[1:, ::2] = 0, -1  # a group without spread
    longest = roll.lengths.view(3, 8).amax(1).tolist()
    assert min(longest) < 40 and any(n % generate.STOP_EVERY for n in longest)  # else this would say nothing
    decoded = [min(40, math.ceil(n / generate.STOP_EVERY) * generate.STOP_EVERY) for n in longest]
    rolled = expected_calls(3, decoded, False, inner=0)
    assert calls == rolled
    with counted() as counter:
        update(policy, None, torch.optim.AdamW(policy.parameters(), lr=0.0), roll, None, grpo)
    assert calls == expected_calls(3, decoded, False)
    flops, head = counter.get_flop_counts()["Global"], (CONFIG.hidden_size, CONFIG.vocab_size)
    assert flops[torch.ops.medloc.linear_logprob] == matrix(int(roll.lengths.sum()), head)  # not of the padding
    learning = roll.lengths[1:].sum()  # the others' gradient is 0, and costs nothing
    assert flops[torch.ops.medloc.linear_logprob_backward] == 3 * matrix(int(learning), head)


# ------------------------------------------------------------------------------------------------------ bench/scale.py


def power(xs: list[int], a: float, b: float) -> list[dict]:
    return [dict(x=x, seconds=0.1 * x**a, mib=3.0 * x**b) for x in xs]


def test_the_exponent_is_that_of_the_upper_half():
    rows = power([2, 4, 8], 0.3, 2.5) + power([16, 32, 64], 1.5, 1.0)  # middle: 11.3
    assert scale.exponent(rows, "seconds") == pytest.approx(1.5) and scale.exponent(rows, "mib") == pytest.approx(1)
    assert scale.exponent(power([4, 8], 2, 1), "seconds") == pytest.approx(2)


@pytest.mark.parametrize("seconds, mib, last", [(0.001, 7.0, 32), (1e-9, 0.02, 32), (1e-9, 0.001, 128)])
def test_a_curve_ends_before_the_point_that_would_take_too_much(seconds, mib, last):
    """Cubes: at 64 they would take 262 seconds, 5243 MiB, or be small."""
    asked = []

    def run(case: Case) -> tuple[float, float]:
        asked.append(case)
        return seconds * case.group**3, mib * case.group**3 if mib < 1 else mib

    rows = scale.curve([2, 4, 8, 16, 32, 64, 128], lambda x: square(group=x), "one pass", run)
    assert [case.group for case in asked] == [row["x"] for row in rows] and rows[-1]["x"] == last
    assert rows[1] == dict(x=4, seconds=seconds * 64, mib=mib * 64 if mib < 1 else mib)


def test_full_rows_are_the_prompts_once_for_each_completion():
    full = square(2, 8).way("full rows")
    assert (full.prompts, full.group, full.tokens) == (16, 1, square().tokens) == (16, 1, 293)
    assert len(full.batch(CONFIG)) == 16 and [len(p.ids) for p in full.batch(CONFIG)] == [293] * 16
    points, make = scale.FACTORS["prompt tokens"]
    assert [make(x).tokens for x in points] == points == [64, 128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("way", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_point_is_measured_in_a_process_of_its_own(way, monkeypatch):
    """Quick: forked from this one, which need not import torch again but has memory of its own to reuse."""
    processes = multiprocessing.get_context(way)
    monkeypatch.setattr(multiprocessing, "get_context", lambda asked: processes)
    seconds, mib = scale.in_a_fresh_process(CASE)
    assert 0.005 < seconds < 60 and 0 < mib < 500
    assert way == "fork" or mib > 18  # two moments and a gradient of 2.3 M parameters are 26 MiB
    with pytest.raises(InputError, match=r"the process of Case\(prompts=1.*ended without an answer"):
        scale.in_a_fresh_process(replace(CASE, prompts=1, group=0))


def test_tables_sentences_and_curves(tmp_path):
    both = lambda points: {"one pass": power(points, 1.2, 0.5), "full rows": power(points[:3], 2, 1)}  # noqa: E731
    curves = {factor: both(points) for factor, (points, _) in scale.FACTORS.items()}
    table = scale.curve_table("prompts", curves["prompts"]).splitlines()
    assert len(table) == 2 + 4
    assert [cell.strip() for cell in table[-1].strip("|").split("|")] == ["8", "1.21", "-", "8", "-"]
    said = scale.sentence("group size", curves["group size"])
    words = "group size: time x^1.20, memory x^0.50 (x = 2 to 64); in full rows time x^2.00, memory x^1.00"
    assert said.startswith(words)
    plot.save(scale.figure(curves), tmp_path / "scale.png")
    assert Image.open(tmp_path / "scale.png").size == (1400, 640)
    assert (tmp_path / "scale.png").stat().st_size < 100_000


def test_the_table_of_flops():
    sizes = dict(model="3B", prompt=1174, completion=128, group=8)
    flops = {"full rows": 9e12, "shared": 2e12, "one pass": 1.8e12}
    rows = [sizes | dict(way=way, flops=dict.fromkeys(scale.PARTS, f)) for way, f in flops.items()]
    shared, once = scale.flops_table(rows).splitlines()[-2:]
    cells = ["3B", "1174 + 128", "shared", *["2.0"] * 6, "12", "4.50"]
    assert [cell.strip() for cell in shared.strip("|").split("|")] == cells
    assert once.split("|")[-2].strip() == "5.00"
