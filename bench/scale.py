"""What a step costs and what it grows with: FLOPs counted at Qwen2.5-VL's sizes, time and memory measured at nano's.

    python -m bench.scale                                              everything, six minutes on one CPU core
    python -m bench.scale --json scale.json --save assets/scale.png    and every figure in a file, and the curves

Three ways to do the same step. FULL ROWS: every prompt is given G times, with one completion each, as in trainers that
know of no groups; all else that this code saves is saved there too. SHARED: image and prompt of a group are computed
once, in the rollout and again in the update. ONE PASS: where the batch is one micro-batch, the update goes on from the
rollout's prefix. All have a reference policy (beta > 0), one inner step, all weights trained, no checkpointing, and
completions of a forced length. Measured are full rows and one pass, which is what the trainer does at these sizes.

FLOPs: torch's FlopCounterMode, which counts matrix products, 2 per multiply-add, and nothing else. Attention is counted
as the plain products it consists of: causal attention in full, as torch does everywhere, and without the product that
a fused kernel makes a second time in the backward pass. The log-probs of the head make their logits once more in the
backward pass, and that is in. The published sizes are counted on the meta device with 1 and 2 decoder layers, from
which the rest follows in a straight line. A test holds this count equal to that of a real step of the trainer.

Time and memory: nano policy, fp32, one thread, each point in a process of its own. Time is that of the processor, so
that waiting for it on a busy machine does not count: the faster of two steps after a first one, or the first alone if
it takes 5 seconds. A picture's decoding is not in it. Memory is the peak above what was resident before the first step.
The exponent of a curve is the least-squares slope of log y over log x, over the points from the geometric middle of its
measured range on.
"""

import argparse
import json
import math
import multiprocessing
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch.fx.experimental import _config as meta_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import errors
import model
from bench.kernels import markdown
from config import parse
from errors import InputError
from images import Sample
from model import ModelConfig, Policy, collate
from prompts import Processor, Prompt, mrope_positions
from rollout import sample
from runtime.metrics import peak_megabytes
from runtime.stream import uniforms
from tasks import TASKS
from train_grpo import algorithm, refresh, update
from weights import NANO, load_policy, read_config

SIZES = {  # published config.json: hidden, layers, heads, kv heads, FFN, rows of the head, tied, vision FFN
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
}
TEXT_TOKEN = 10  # any id that is a byte of text, not one of an image or a video
WAYS = ("one pass", "full rows")  # that are measured; "shared" is counted only
PARTS = ("vision", "prefill", "decode", "reference", "forward", "backward")
COLUMNS = dict(seconds=2, mib=0)  # of what is measured: digits in the tables
AT_MOST = dict(seconds=60, mib=4000)  # of a point, as the two before let expect; others are left out, and that is said


@dataclass(frozen=True)
class Case:
    """One step, in one micro-batch. Sizes of pictures are in tokens: 28 x 28 pixels each."""

    prompts: int  # B
    group: int  # G
    rows: int
    columns: int
    text: int  # tokens of the prompt beside the image's
    completion: int  # tokens
    reuse: bool = True  # the update goes on from the rollout's prefix

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.rows * self.columns + self.text

    def way(self, name: str) -> "Case":
        full = replace(self, prompts=self.prompts * self.group, group=1, reuse=False)
        return {"one pass": self, "shared": replace(self, reuse=False), "full rows": full}[name]

    def batch(self, config: ModelConfig, device: str = "cpu") -> list[Prompt]:
        """Its prompts: text, one picture of noise, which on the meta device has no values, and more text."""
        vision, merge = config.vision, config.vision.spatial_merge_size
        ids = torch.full((self.tokens,), TEXT_TOKEN)
        start = self.text // 2
        ids[start : start + self.rows * self.columns] = config.image_token_id
        grid = (1, self.rows * merge, self.columns * merge)
        positions, next_position = mrope_positions(ids, [grid], (config.image_token_id,), merge)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.rand(grid[1] * grid[2], width, device=device)
        size = grid[2] * vision.patch_size, grid[1] * vision.patch_size
        sample = Sample(None, "", (0, 0, *size), "noise", source="noise")
        prompt = Prompt(ids, patches, grid, positions, next_position, (1.0, 1.0), size, (0, 0, *size), sample, "")
        return [replace(prompt) for _ in range(self.prompts)]  # none knows what the tower saw of another


def square(prompts: int = 1, group: int = 8, tokens: int = 293, completion: int = 32) -> Case:
    """A square picture, as large as leaves 37 tokens for the text at least: 448 pixels of 293 tokens."""
    side = math.isqrt(tokens - 37)
    return Case(prompts, group, side, side, tokens - side**2, completion)


LARGE, SMALL = Case(1, 8, 30, 37, 64, 128), Case(1, 8, 16, 21, 64, 200)  # 1036 x 840 and 588 x 448 pixels
COUNTED = (("3B", LARGE), ("3B", SMALL), ("7B", LARGE), ("32B", LARGE))
FACTORS = {  # what is varied -> its points and how they are made; all else as in square()
    "prompt tokens": ([64, 128, 256, 512, 1024, 2048, 4096], lambda x: square(tokens=x)),
    "group size": ([2, 4, 8, 16, 32, 64], lambda x: square(prompts=2, group=x)),
    "completion tokens": ([16, 32, 64, 128, 256, 512, 1024], lambda x: square(completion=x)),
    "prompts": ([1, 2, 4, 8], lambda x: square(prompts=x)),
}
WHY = {
    "prompt tokens": "Vision tower and prompt, linear, take over from the completions, and then attention's square, "
    "above all in the vision blocks that look at the whole picture (4 patches a token)",
    "group size": "Shared, the prompt is paid for once and only the suffixes grow; in full rows all of it does",
    "completion tokens": "A token costs the same both ways, one decode step and one row of each pass; what the prompt "
    "costs beside them differs",
    "prompts": "Nothing is shared between prompts, so all grows with their number",
}


# ------------------------------------------------------------------------------------------------------------- counted


@register_flop_formula(torch.ops.medloc.linear_logprob)
def _head(hidden, weight, *rest, out_shape=None, **options) -> int:
    """The counter does not look into operators of our own. hidden (N, H) times weight (V, H): one product."""
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.medloc.linear_logprob_backward, get_raw=True)
def _head_backward(grad, hidden, weight, *rest, out_val=None, **options) -> int:
    """The product again, and one for each gradient that is wanted; rows (N,) without incoming gradient are left out."""
    rows = len(grad) if grad.is_meta else int(grad.count_nonzero())
    return 2 * rows * hidden.shape[1] * weight.shape[0] * (1 + sum(gradient.numel() > 0 for gradient in out_val))


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs inside, with attention done in plain products."""
    make = model.causal_lower_right

    def undispatched(*size):  # torch cannot make this subclass of Tensor under a dispatch mode, such as the counter
        with _disable_current_modes():
            return make(*size)

    with patch.object(model, "causal_lower_right", undispatched), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            yield counter


class Unknowns(TorchDispatchMode):
    """What a tensor of the meta device answers when it is asked for its value, which it has not: yes, every row goes
    on; and of lengths, the longest one. So it is where all completions have the forced length."""

    def __init__(self, longest: int):
        super().__init__()
        self.longest = longest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else self.longest
        return function(*args, **(kwargs or {}))


def published_config(size: str) -> dict:
    """config.json as it is published, of SIZES."""
    hidden, layers, heads, kv_heads, ffn, rows, tied, vision_ffn = SIZES[size]
    return dict(
        model_type="qwen2_5_vl", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=rows, tie_word_embeddings=tied,
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=vision_ffn, num_heads=16, out_hidden_size=hidden,
            fullatt_block_indexes=[7, 15, 23, 31], window_size=112, patch_size=14,
        ),
    )  # fmt: skip


def published(size: str) -> ModelConfig:
    return read_config(published_config(size))


def step_flops(config: ModelConfig, case: Case) -> dict[str, int]:
    """FLOPs of one optimiser step by PARTS. `vision` is all forward passes of the tower, which the other parts leave
    out: in the rollout, for the reference, and if the prefix is not reused in the update; `backward` is everything's.
    """
    one, two = (passes(replace(config, num_hidden_layers=depth), replace(case, reuse=False)) for depth in (1, 2))
    slopes = zip(one, two, strict=True)
    vision, prefill, decode, suffix, backward = (a + (config.num_hidden_layers - 1) * (b - a) for a, b in slopes)
    reference, update = prefill + suffix, suffix + (0 if case.reuse else prefill)
    parts = (3 - case.reuse) * vision, prefill, decode, reference, update, backward
    return dict(zip(PARTS, parts, strict=True))


@lru_cache
def passes(config: ModelConfig, case: Case) -> tuple[int, ...]:
    """FLOPs of vision tower, prompt, decoding, log-probs of the completions, backward pass, once each."""
    with torch.device("meta"):
        policy = Policy(config, eos_ids=(config.vocab_size,))
    batch = collate(case.batch(config, "meta"), "meta")
    luck = torch.empty(case.prompts, case.group, case.completion)
    every_row = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # what x[mask] picks
    with every_row, Unknowns(case.completion):
        vision, _ = flops_of(lambda: policy.look(batch))
        prefill, prefix = flops_of(lambda: policy.prefix(batch))
        decode, done = flops_of(lambda: policy.generate(prefix, case.group, case.completion, 1.0, luck))
        suffix, logp = flops_of(lambda: policy.logprobs(prefix, done.ids, done.lengths))
        backward, _ = flops_of(logp.sum().backward)
    return vision, prefill - vision, decode, suffix, backward


def flops_of(function: Callable) -> tuple[int, object]:
    """function() -> its FLOPs, its result."""
    with counted() as counter:
        result = function()
    return counter.get_total_flops(), result


def flops_rows() -> list[dict]:
    """Of COUNTED, every way, full rows first."""
    rows = []
    for size, case in COUNTED:
        sizes = dict(model=size, prompt=case.tokens, completion=case.completion, group=case.group)
        ways = {way: step_flops(published(size), case.way(way)) for way in ("full rows", "shared", "one pass")}
        rows += [sizes | dict(way=way, flops=flops) for way, flops in ways.items()]
    return rows


def flops_table(rows: list[dict]) -> str:
    table, full = [], 0
    for row in rows:
        total = sum(row["flops"].values())
        full = total if row["way"] == "full rows" else full
        parts = [f"{row['flops'][part] / 1e12:.1f}" for part in PARTS]
        sizes = [row["model"], f"{row['prompt']} + {row['completion']}", row["way"]]
        table.append([*sizes, *parts, f"{total / 1e12:.0f}", f"{full / total:.2f}"])
    return markdown(["model", "prompt + completion", "way", *PARTS, "all", "times less"], table)


# ------------------------------------------------------------------------------------------------------------ measured


def trainer_step(case: Case, *flags: str) -> Callable[[], dict]:
    """A rollout and an update of the nano policy, ready to run (step_of)."""
    args = flags_of(case, "--micro-batch", str(case.prompts), *flags)
    policy, reference = load_policy(NANO), load_policy(NANO).requires_grad_(False) if args.beta else None
    policy.eos_ids, policy.checkpointing = (policy.config.vocab_size,), bool(args.checkpointing)
    policy.visual.requires_grad_(not args.freeze_vision)
    return step_of(case, args, policy, policy, reference)[0]


def flags_of(case: Case, *flags: str) -> Namespace:
    """train_grpo.py's, for steps of a case."""
    sizes = ["--batch-size", str(case.prompts), "--max-tokens", str(case.completion)]
    args = parse("train_grpo.py", [*sizes, "--beta", ".04", *flags])
    args.group_size = case.group  # not as a flag, which refuses a group of one
    return args


def step_of(
    case: Case, args: Namespace, policy: Policy, actor: Policy, reference: Policy | None
) -> tuple[Callable[[], dict], torch.optim.Optimizer]:
    """A step of the trainer's own parts, ready to run; its optimizer. Completions have the case's length where the
    policy's EOS is outside of the vocabulary; advantages are +1 and -1 by turns, so that every row has its gradient,
    which rewards of noise would not give it."""
    grpo, trained = algorithm(args), [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
    processor, prompts, places = Processor(NANO, "answer", TASKS), case.batch(policy.config), range(case.prompts)
    numbers = uniforms(args.seed, 0, places, places, case.group, case.completion)
    signs = torch.ones(case.prompts * case.group)
    signs[1::2] = -1

    def step() -> dict:
        for prompt in prompts:
            prompt.image_tokens = None  # a trainer's prompts are new in each step: a frozen tower looks at them again
        roll, prefix = sample(policy if grpo.one_pass else None, actor, processor, prompts, numbers, grpo)
        roll.advantage = signs.view(case.prompts, -1)
        metrics = update(policy, reference, optimizer, roll, prefix if case.reuse else None, grpo)
        refresh(actor, policy)
        return metrics

    return step, optimizer


def measure(case: Case) -> tuple[float, float]:
    """Seconds of a step and the MiB that it needs; for a process that has done nothing before."""
    torch.set_num_threads(1)
    step = trainer_step(case)
    resident = peak_megabytes("cpu")
    times = []
    while len(times) < 3 and sum(times) < 5:
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return min(times[1:] or times), peak_megabytes("cpu") - resident


def _answer(case: Case, answers) -> None:
    answers.send(measure(case))


def in_a_fresh_process(case: Case) -> tuple[float, float]:
    """measure(), forked off a process that has imported almost everything and computed nothing."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train_grpo"])  # all that takes long; not this file, which is __main__ there
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_answer, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise InputError(f"the process of {case} ended without an answer: free some memory and repeat") from None
    finally:
        process.join()


def curve(points: list[int], make: Callable[[int], Case], way: str, run: Callable = in_a_fresh_process) -> list[dict]:
    """The measured points, up to the first that would exceed AT_MOST if the curve went on as between the last two."""
    rows = []
    for x in points:
        if any(len(rows) > 1 and rows[-1][key] ** 2 / rows[-2][key] > most for key, most in AT_MOST.items()):
            break
        seconds, mib = run(make(x).way(way))
        rows.append(dict(x=x, seconds=seconds, mib=mib))
    return rows


def exponent(rows: list[dict], of: str) -> float:
    """Slope of log y over log x, by least squares, from the geometric middle of the range on (two points at least)."""
    middle = math.sqrt(rows[0]["x"] * rows[-1]["x"])
    upper = [row for row in rows if row["x"] >= middle]
    x, y = ([math.log(row[key]) for row in (upper if len(upper) > 1 else rows[-2:])] for key in ("x", of))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def sentence(factor: str, ways: dict[str, list[dict]]) -> str:
    """What grows how with the factor."""
    by_way = {}
    for way, rows in ways.items():
        ends = f"x = {rows[0]['x']} to {rows[-1]['x']}"
        by_way[way] = f"time x^{exponent(rows, 'seconds'):.2f}, memory x^{exponent(rows, 'mib'):.2f} ({ends})"
    return f"{factor}: {by_way['one pass']}; in full rows {by_way['full rows']}. {WHY[factor]}."


def doubling(ways: dict) -> str:
    """What twice the group costs at 2 prompts x 8, 448 pixels, 32 new tokens."""
    times = {way: {row["x"]: row["seconds"] for row in rows} for way, rows in ways.items()}
    config = load_policy(NANO).config
    eight, sixteen = (sum(step_flops(config, square(2, group)).values()) for group in (8, 16))
    ours, full = (times[way][16] / times[way][8] for way in WAYS)
    return f"group 8 -> 16: time x {ours:.2f}, FLOPs x {sixteen / eight:.2f}; in full rows time x {full:.2f}"


def curve_table(factor: str, ways: dict[str, list[dict]]) -> str:
    table, by_x = [], [{row["x"]: row for row in ways[way]} for way in WAYS]
    for x in FACTORS[factor][0]:
        rows = [points.get(x) for points in by_x]
        seconds, mib = ([f"{row[key]:.{digits}f}" if row else "-" for row in rows] for key, digits in COLUMNS.items())
        table.append([str(x), *seconds, *mib])
    return markdown([factor, *(f"{way}, s" for way in WAYS), *(f"{way}, MiB" for way in WAYS)], table)


def figure(curves: dict):
    """Seconds above, memory below, a column for each factor; all axes logarithmic."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from experiments.plot import COLOURS, GREY, LOOK

    with matplotlib.rc_context(LOOK):
        fig = Figure(figsize=(14, 6.4))
        FigureCanvasAgg(fig)
        axes = fig.subplots(2, len(curves), sharex="col", sharey="row")
        for column, (factor, ways) in enumerate(curves.items()):
            for ax, (key, label) in zip(axes[:, column], (("seconds", "s a step"), ("mib", "MiB")), strict=True):
                for way, colour, style in zip(WAYS, COLOURS, ("-", "--"), strict=False):
                    x, y = zip(*((row["x"], row[key]) for row in ways[way]), strict=True)
                    ax.plot(x, y, color=colour, ls=style, marker=".", label=f"{way}: x^{exponent(ways[way], key):.2f}")
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.set_xticks(FACTORS[factor][0], [str(x) for x in FACTORS[factor][0]])
                ax.legend(loc="upper left")
                if column == 0:
                    ax.set_ylabel(label, color=GREY)
            axes[0, column].set_title(factor, loc="left", size=9.5, weight="bold")
        fig.subplots_adjust(left=0.05, right=0.99, top=0.95, bottom=0.05, hspace=0.08, wspace=0.08)
    return fig


def main(arguments: list[str] | None = None) -> None:
    parser = errors.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="save every figure")
    parser.add_argument("--save", metavar="FILE", help="draw the curves as a PNG; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.save and not find_spec("matplotlib"):  # to be known before ten minutes of work
        raise InputError('matplotlib is not installed: pip install -e ".[plot]"')

    print(f"torch {torch.__version__}, one thread\n\nTFLOP of an optimiser step per prompt, G = 8\n", flush=True)
    flops = flops_rows()
    print(flops_table(flops))
    print("\nnano policy: processor seconds and MiB of a step. 1 prompt (2 where the group is varied) x 8, 448 pixels")
    print(f"= 293 prompt tokens, 32 new ones. -: above {AT_MOST['seconds']} s or {AT_MOST['mib']} MiB", flush=True)
    curves = {}
    for factor, points in FACTORS.items():
        curves[factor] = {way: curve(*points, way) for way in WAYS}
        print(f"\n{curve_table(factor, curves[factor])}\n\n{sentence(factor, curves[factor])}", flush=True)
    print(f"\n{doubling(curves['group size'])}")
    if options.save:
        from experiments.plot import save

        save(figure(curves), options.save)
    if options.json:
        fits = {
            factor: {way: {key: exponent(rows, key) for key in COLUMNS} for way, rows in ways.items()}
            for factor, ways in curves.items()
        }
        with open(options.json, "w") as file:
            json.dump(dict(torch=torch.__version__, flops=flops, curves=curves, exponents=fits), file, indent=1)


if __name__ == "__main__":
    errors.run(main)
