"""What bench.gpu_report measures of a policy of Qwen2.5-VL-3B's SHAPE: published sizes, random weights, no download.

    python -m bench.gpu_steps decode      tokens per second of a rollout, eager and by CUDA graph, beside the floor
    python -m bench.gpu_steps step        a whole GRPO step: time, its split, peak memory beside the plan's estimate
    python -m bench.gpu_steps plain       the same step in plain transformers
    python -m bench.gpu_steps mismatch    log-probs of rollout and trainer, bf16 against fp32

8 prompts x 8 answers, 1174 prompt tokens (a picture of 1089), 128 new ones; no answer ends early. --tiny: the nano
policy's shape on whatever device there is, so that every line here has run before a GPU is paid for.

A floor is bytes over the rate of a large copy on the same card: weights and keys and values, each read once a token.
"""

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch

import errors
import generate
from bench import scale, step_programs
from bench.kernels import copy_rate, markdown
from bench.scale import Case
from data import phantom_samples
from errors import read_object
from model import ModelConfig, Policy, collate
from prompts import Processor
from runtime import plan
from runtime.stream import uniforms
from tasks import TASKS
from weights import NANO, load_policy, read_config

STEPS = 3  # counted ones, after one that is not
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    raw: dict  # config.json
    case: Case
    decode: tuple[int, ...]  # prompts of a rollout
    copied: int  # bytes of the copy that says how fast the memory is

    @property
    def config(self) -> ModelConfig:
        return read_config(self.raw)


def sizes_of(tiny: bool) -> Sizes:
    if tiny:
        return Sizes(read_object(NANO / "config.json"), scale.square(2, 2, 62, 4), (1, 2), 2**20)
    return Sizes(scale.published_config("3B"), scale.square(8, 8, 1174, 128), (1, 8, 32), 2**31)


def random_policy(config: ModelConfig, dtype: torch.dtype, seed: int) -> Policy:
    """Weights N(0, .02^2), made on the device; there is no EOS, so that no answer ends early."""
    with torch.device("meta"):
        policy = Policy(config, eos_ids=(config.vocab_size,)).to(dtype)
    assert not list(policy.buffers())  # they would stay empty
    policy = policy.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    policy.compute_dtype = torch.bfloat16
    return policy


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object], times: int = 2) -> float:
    """The fastest of `times` runs after one that is not counted."""
    found = []
    for _ in range(1 + times):
        started = now()
        run()
        found.append(now() - started)
    return min(found[1:])


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


# -------------------------------------------------------------------------------------------------------------- decode


def floor_bytes(config: ModelConfig, case: Case) -> float:
    """What a decode step reads at least, on average: decoder and head once, each prompt's keys and values once, and of
    each row half of what it will write."""
    weights = plan.count(config)["decoder"] + config.vocab_size * config.hidden_size
    kept = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return 2 * (weights + kept * case.prompts * (case.tokens + case.group * case.completion / 2))


@torch.no_grad()
def decode(sizes: Sizes) -> None:
    policy = random_policy(sizes.config, torch.bfloat16, 0).requires_grad_(False)
    rate, rows = copy_rate(DEVICE, sizes.copied), []
    say(f"a copy: {rate / 1e9:.0f} GB/s; {sum(p.numel() for p in policy.parameters()) / 1e9:.3f} billion weights", "")
    header = ["prompts x answers", "prefill s", "way", "decode s", "ms a token", "tokens/s", "floor ms", "of the floor"]
    say(markdown(header, []))
    for prompts in sizes.decode:
        case = replace(sizes.case, prompts=prompts)
        luck = torch.rand(prompts, case.group, case.completion, device=DEVICE)
        floor = floor_bytes(sizes.config, case) / rate
        try:
            batch = collate(case.batch(sizes.config), DEVICE)
            prefill = seconds(lambda batch=batch: policy.prefix(batch), 1)
            prefix = policy.prefix(batch)
            for way in ("eager", "graph") if CUDA else ("eager",):  # no graph without CUDA
                policy.graph = way == "graph"
                took = seconds(lambda prefix=prefix, case=case, luck=luck: policy.generate(
                    prefix, case.group, case.completion, 1.0, luck
                ))  # fmt: skip
                each, total = took / case.completion, prompts * case.group * case.completion
                figures = [f"{prefill:.2f}", way, f"{took:.2f}", f"{1e3 * each:.2f}", f"{total / took:.0f}"]
                rows.append([f"{prompts} x {case.group}", *figures, f"{1e3 * floor:.2f}", f"{floor / each:.2f}"])
                say(markdown(header, rows).splitlines()[-1])
        except torch.OutOfMemoryError:
            say(f"{prompts} x {case.group}: out of memory")
        gc.collect()


# ---------------------------------------------------------------------------------------------------------- whole step


def ways(sizes: Sizes, memory: int) -> dict[str, plan.Run]:
    """In words -> the run that the plan would choose on this device, where one fits; what changes the method least
    comes first. The last is there in any case."""
    config, case = sizes.config, sizes.case
    patches = case.rows * case.columns * config.vision.spatial_merge_size**2
    whole = plan.Run(config, case.text, patches, case.prompts, case.prompts, case.group, case.completion, 2, DEVICE)
    whole = replace(whole, evaluation=0)
    runs = {
        "all weights trained, beta .04": replace(whole, reference=True),
        "vision tower frozen, beta .04": replace(whole, reference=True, freeze_vision=True),
        "vision tower frozen, beta 0": replace(whole, freeze_vision=True),
    }
    runs = {words: plan.choose(run, memory) for words, run in runs.items()}
    last = list(runs)[-1]
    return {words: run for words, run in runs.items() if run.fits(memory) or words == last}


def whole_step(sizes: Sizes) -> None:
    memory = plan.free_memory(DEVICE)
    for words, run in ways(sizes, memory).items():
        say(f"{words}: {run} of {memory / GIB:.1f} GB")
        try:
            return measure_step(sizes, run)
        except torch.OutOfMemoryError:  # the estimate was wrong, and that is worth knowing
            say(f"OUT OF MEMORY: the plan had said {plan.peak(run) / GIB:.2f} GB")
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    raise SystemExit(1)


def flops_of(sizes: Sizes, run: plan.Run) -> float:
    """Of a step, as bench.scale counts them, without what the run does not do: a frozen tower looks once for all and
    has no backward pass, and with beta 0 there is no reference."""
    reuse = run.micro >= sizes.case.prompts
    parts = scale.step_flops(sizes.config, replace(sizes.case, prompts=1, reuse=reuse))
    looks = 3 - reuse  # rollout and reference, and the update, where it starts anew
    look = parts["vision"] / looks
    total = sum(parts.values()) - (0 if run.reference else parts["reference"])
    if run.freeze_vision:
        total -= (looks - 1) * look + 2 * look
    elif not run.reference:
        total -= look
    return sizes.case.prompts * total


def measure_step(sizes: Sizes, run: plan.Run) -> None:
    flags = ["--micro-batch", str(run.micro), "--device", DEVICE, *["--freeze-vision"] * run.freeze_vision]
    args = scale.flags_of(sizes.case, *flags, *["--beta", "0"] * (not run.reference))
    policy = random_policy(sizes.config, torch.float32, 0)
    policy.checkpointing, policy.graph = run.checkpointing, CUDA
    policy.visual.requires_grad_(not run.freeze_vision)
    actor = copy.deepcopy(policy).to(torch.bfloat16)
    reference = random_policy(sizes.config, torch.bfloat16, 1).requires_grad_(False) if run.reference else None
    step, optimizer = scale.step_of(sizes.case, args, policy, actor, reference)
    step()  # AdamW's moments come with the first one
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(STEPS):
        started = now()
        metrics = step()
        times.append(now() - started)
        say(f"step {number + 1}: {times[-1]:.2f} s, of it update {metrics['seconds_update']:.2f}")
    case = sizes.case
    made = case.prompts * case.group * case.completion
    rate = flops_of(sizes, run) / min(times)
    each = f"{made / min(times):.0f} new tokens/s, {rate / 1e12:.3g} TFLOP/s as bench.scale counts"
    say(f"a step: {min(times):.2f} s, {each}")
    if CUDA:
        peak, estimate = torch.cuda.max_memory_allocated(), plan.peak(run)
        say(f"peak {peak / GIB:.2f} GB, the plan said {estimate / GIB:.2f} ({estimate / peak:.2f} of it)")
    parts = step_programs.split_of(step, policy, actor, reference, optimizer, now)
    total = sum(parts.values())
    say("its split: " + ", ".join(f"{part} {took:.2f} s ({took / total:.0%})" for part, took in parts.items()))


# --------------------------------------------------------------------------------------------------------------- plain


def plain(sizes: Sizes) -> None:
    """As step_programs.Plain, for a GPU: bf16 throughout, a prompt's rows at a time, gradient checkpointing. (bf16
    weights and moments, which fp32 ones do not fit beside: kinder to its time and memory than ours are to ours.) What
    is trained is what whole_step() tries first on this device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    case, config = sizes.case, Qwen2_5_VLConfig.from_dict(sizes.raw)
    words, run = next(iter(ways(sizes, plan.free_memory(DEVICE)).items()))
    say(words)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)  # of a method's new name, which older versions do not have
    with torch.device(DEVICE):
        made = (Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16) for _ in range(1 + run.reference))
        policy, *reference = made
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in reference:
        each.requires_grad_(False).eval()
    policy.model.visual.requires_grad_(not run.freeze_vision)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
    prompts, image, group = case.batch(sizes.config), sizes.config.image_token_id, case.group
    for prompt in prompts:  # some versions of transformers count pictures by this token
        prompt.ids = prompt.ids.clone()
        prompt.ids[int((prompt.ids == image).nonzero()[0]) - 1] = sizes.raw["vision_start_token_id"]
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(group)[:group]

    def rows_of(some: list) -> dict:
        return {name: value.to(DEVICE) for name, value in step_programs.plain_rows(some, image).items()}

    def sample() -> torch.Tensor:
        policy.eval()
        made = policy.generate(
            **rows_of(prompts), num_return_sequences=group, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=case.completion, max_new_tokens=case.completion, suppress_tokens=[image], pad_token_id=0,
        )  # fmt: skip
        policy.train()
        return made[:, case.tokens :].view(case.prompts, group, -1)

    def step() -> float:
        started = now()
        ids = sample()
        took = now() - started
        optimizer.zero_grad(set_to_none=True)
        for prompt, own in zip(prompts, ids, strict=True):
            rows = rows_of([prompt] * group)
            with torch.no_grad():
                logp_ref = [step_programs.plain_logprobs(each, rows, own) for each in reference]
            logp = step_programs.plain_logprobs(policy, rows, own)
            logp_ref = logp_ref[0] if logp_ref else logp.detach()  # without one there is no KL
            (step_programs.plain_loss(logp, logp_ref, signs) / case.prompts).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return took

    times = []
    for number in range(STEPS):
        if CUDA and number == 1:
            torch.cuda.reset_peak_memory_stats()
        started = now()
        generated = step()
        times.append(now() - started)
        say(f"step {number + 1}: {times[-1]:.2f} s, of it generate {generated:.2f}")
    say(f"a step: {min(times[1:]):.2f} s, {case.prompts * group * case.completion / min(times[1:]):.0f} new tokens/s")
    if CUDA:
        say(f"peak {torch.cuda.max_memory_allocated() / GIB:.2f} GB")


# ------------------------------------------------------------------------------------------------------------ mismatch


class Recording(generate.Decoding):
    """Keeps the log-prob of each token that it draws."""

    kept: list[torch.Tensor] = []

    def draw(self, logits: torch.Tensor) -> None:
        super().draw(logits)
        drawn = self.ids.index_select(1, self.at)
        self.kept.append((logits.float() / self.temperature).log_softmax(-1).gather(1, drawn)[:, 0])


@torch.no_grad()
def rolled_out(actor: Policy, prompts: list, group: int, tokens: int, luck: torch.Tensor):
    """Completions, and their log-probs (B, G, T) as the decode path had them."""
    actor.graph, Recording.kept = False, []
    with mock.patch.object(generate, "Decoding", Recording):
        prefix = actor.prefix(collate(prompts, DEVICE))
        done = actor.generate(prefix, group, tokens, 1.0, luck)
    logp = torch.stack(Recording.kept, 1)[:, : done.ids.shape[2]]  # rows stand in the prefix's order
    return done, logp.unflatten(0, (-1, group))[torch.argsort(prefix.order)]


@torch.no_grad()
def trained_on(policy: Policy, prompts: list, done) -> torch.Tensor:
    """(B, G, T) as the update computes them."""
    return policy.logprobs(policy.prefix(collate(prompts, DEVICE)), done.ids, done.lengths)


def mismatch(sizes: Sizes) -> None:
    """Of one rollout in bf16: the same tokens' log-probs by the decode path, by the trainer, and by both in fp32."""
    nano, processor = load_policy(NANO, DEVICE), Processor(NANO, "answer", TASKS)
    drawn = phantom_samples(None, 0, 0, 8)
    case = replace(sizes.case, prompts=min(sizes.case.prompts, 2))
    many = {"nano, trained, phantoms": (nano, [processor.prompt(sample) for sample in drawn], 8, 24)}
    many["random weights"] = (None, case.batch(sizes.config), case.group, case.completion)
    header = [
        "policy",
        "log-probs",
        "against",
        "mean |d|",
        "max |d|",
        "KL, k3",
        "ratio off by > .2",
        "max of a row's sum",
    ]
    say(markdown(header, []))
    for name, (policy, prompts, group, tokens) in many.items():
        policy = (policy or random_policy(sizes.config, torch.float32, 0)).requires_grad_(False)
        places = range(len(prompts))
        luck = uniforms(0, 0, places, places, group, tokens)
        actor = copy.deepcopy(policy).to(torch.bfloat16)
        actor.compute_dtype = policy.compute_dtype = torch.bfloat16
        done, rollout = rolled_out(actor, prompts, group, tokens, luck)
        del actor
        trainer = trained_on(policy, prompts, done)
        policy.compute_dtype = torch.float32
        exact = trained_on(policy, prompts, done)
        real = torch.arange(done.ids.shape[2], device=DEVICE) < done.lengths[..., None]
        pairs = {
            ("rollout bf16", "trainer bf16"): (rollout, trainer),
            ("rollout bf16", "fp32"): (rollout, exact),
            ("trainer bf16", "fp32"): (trainer, exact),
        }
        for (one, other), (a, b) in pairs.items():
            d = (b - a).float().where(real, 0.0)
            each, n = d[real].abs(), int(real.sum())
            k3 = (d.exp() - d - 1)[real].mean()
            off = ((d.exp() - 1).abs() > 0.2)[real].sum() / n
            figures = [f"{x:.2e}" for x in (each.mean(), each.max(), k3)]
            cells = [name, one, other, *figures, f"{off:.2%}", f"{d.sum(-1).abs().max():.3f}"]
            say(markdown(header, [cells]).splitlines()[-1])


WHAT = {"decode": decode, "step": whole_step, "plain": plain, "mismatch": mismatch}


def main(arguments: list[str] | None = None) -> None:
    parser = errors.Parser(
        prog="-m bench.gpu_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--tiny", action="store_true", help="the nano policy's shape, on any device")
    options = parser.parse_args(arguments)
    if not CUDA and not options.tiny:
        parser.error("there is no GPU that torch can use here; --tiny runs the same lines at a size that says nothing")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as train_grpo.py has it
    WHAT[options.what](sizes_of(options.tiny))


if __name__ == "__main__":
    errors.run(main)
