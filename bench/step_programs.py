"""The programs that bench.step compares; each is a process of its own, which does a step when it is told to.

    python -m bench.step_programs ours FOLDER           train_grpo's rollout() and update() as they are
    python -m bench.step_programs plain FOLDER          transformers by hand: generate(), whole rows, nothing shared
    TRL'S-PYTHON -I bench/step_programs.py trl FOLDER   TRL's GRPOTrainer; trl-checkpointing: with its default, on

FOLDER is bench.step's: model/, records.jsonl and images, and case.json with the sizes. A program says on standard
output that it is ready; then it reads one command a line and answers each with a line of JSON. In between it waits.

A step is the same work everywhere: read and prepare the pictures, sample `tokens` tokens for each of `group` answers to
each prompt (EOS cannot be drawn, so nothing ends early), decode and score them, log-probs of the reference, loss of
GRPO, backward, clip, AdamW. All prompts go through in one micro-batch.

TRL has an interpreter of its own and must not find this repository: transformers takes any package called kernels for
the one of that name. So the file imports at its top only what both have, and -I keeps its folder off the path.
"""

import gc
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

LEARNING_RATE, CLIP, BETA, GRAD_CLIP = 1e-5, 0.2, 0.04, 1.0
PARTS = ("vision", "prefix", "decode", "reference", "forward", "backward", "optimiser", "other")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


# ------------------------------------------------------------------------------------------------- a program's process


class Parent:
    """Standard output carries answers to bench.step alone: what libraries print goes to standard error."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, message: dict) -> None:
        print(json.dumps(message), file=self.out, flush=True)

    def ready(self, *packages: str) -> None:
        """Models and optimiser are there: what is resident from here on up is the step's."""
        gc.collect()
        versions = {name: version(name) for name in ("torch", "transformers", *packages)}
        self.tell({"versions": versions, "resident_mib": memory("VmRSS")})

    def command(self) -> str:
        """The next command; "" when there will be none."""
        return sys.stdin.readline().strip()


def memory(field: str) -> float:
    """MiB of this process: VmRSS, resident now; VmHWM, the most that was resident since Meter.start()."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024


class Meter:
    """From start() to stop(): seconds by the clock and of the processor, and the highest resident memory."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes what is resident now
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> dict:
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": memory("VmHWM")}


def read_case(folder: Path) -> SimpleNamespace:
    case = SimpleNamespace(**json.loads((folder / "case.json").read_text()))
    torch.set_num_threads(case.threads)
    torch.manual_seed(case.seed)
    return case


def work(prompts: list[Tensor], pictures: list[Tensor], lengths: Tensor) -> dict:
    """What bench.step holds equal between programs: each prompt's ids, a number for its picture, all lengths."""
    numbers = [float(patches.double().square().mean()) for patches in pictures]
    return {"prompts": [ids.tolist() for ids in prompts], "pictures": numbers, "lengths": lengths.flatten().tolist()}


def letters(text: str) -> float:
    """The share of letters: a reward by which the answers of random weights differ, when no box is worth anything."""
    return sum(c.isalpha() for c in text) / max(len(text), 1)


def box_hit(text: str, box: list[float]) -> float:
    """1 if the last four numbers of a text are a box with an IoU of at least .5."""
    numbers = [float(n) for n in NUMBER.findall(text)[-4:]]
    if len(numbers) < 4 or numbers[2] <= numbers[0] or numbers[3] <= numbers[1]:
        return 0.0
    sides = [max(0.0, min(numbers[i + 2], box[i + 2]) - max(numbers[i], box[i])) for i in (0, 1)]
    both = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (numbers, box))
    common = sides[0] * sides[1]
    return float(common >= 0.5 * (both - common))


# ---------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """train_grpo's own objects, put together as its main() does."""

    def __init__(self, folder: Path):
        self.case = case = read_case(folder)
        import config
        import rewards
        import train_grpo
        from data import BadRecords, load_samples
        from prompts import Processor
        from runtime.stream import Stream
        from tasks import TASKS

        rewards.REWARDS["letters"] = lambda texts, scores, samples: [letters(text) for text in texts]
        model, records = folder / "model", str(folder / "records.jsonl")
        flags = f"""--recipe nano --prompt answer --rewards task=1,letters=1 --batch-size {case.prompts}
            --micro-batch {case.prompts} --group-size {case.group} --max-tokens {case.tokens} --beta {BETA}
            --lr {LEARNING_RATE} --seed {case.seed} --device cpu"""
        args = config.parse("train_grpo.py", ["--model", str(model), "--data", records, *flags.split()])
        args.dtype, args.checkpointing = "float32", False
        self.policy, self.actor, self.reference = train_grpo.make_policies(args, model, model)
        self.policy.eos_ids = (self.policy.config.vocab_size,)  # the head has no such row: no answer ends early
        self.grpo, processor = train_grpo.algorithm(args), Processor(model, args.prompt, TASKS)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
        samples, sizes = load_samples(records, TASKS, args.seed, "train"), (case.prompts, case.group, case.tokens)
        self.stream = Stream(samples, processor, BadRecords(), *sizes, args.seed)
        self.schedules = rewards.Schedules(args.schedule, self.stream.keys, args.steps)
        self.train_grpo, self.meter, self.steps = train_grpo, Meter(), 0

    def one_step(self):
        """A step of train_grpo's main() -> the Rollout that was learned from."""
        models = self.policy, self.actor, self.reference, self.optimizer
        _, roll, *_ = self.train_grpo.step(self.steps, *models, self.stream, self.schedules, self.grpo)
        self.steps += 1
        return roll

    def step(self) -> dict:
        self.meter.start()
        roll = self.one_step()
        measured = self.meter.stop()
        return measured | work([p.ids for p in roll.prompts], [p.patches for p in roll.prompts], roll.lengths)

    def generate(self) -> dict:
        """Vision, prefill and decode, of prompts that have been read."""
        prompts, uniforms = self.stream.draw(self.steps, self.case.prompts)
        self.meter.start()
        with torch.no_grad():
            prefix = self.actor.prefix(self.train_grpo.collate(prompts))
            done = self.actor.generate(prefix, self.case.group, self.case.tokens, self.grpo.temperature, uniforms)
        return self.meter.stop() | {"lengths": done.lengths.flatten().tolist()}

    def split(self) -> dict:
        """Processor time of each of PARTS, in one step more."""
        return split_of(self.one_step, self.policy, self.actor, self.reference, self.optimizer, time.process_time)


def split_of(step: Callable, policy, actor, reference, optimizer, now: Callable[[], float]) -> dict:
    """Time by the clock `now` of each of PARTS, in one step: the wrappers are gone afterwards."""
    clock = Clock(now)
    parts = [
        (policy.visual, "forward", "vision"),
        (policy, "prefix", "prefix"),
        (actor, "generate", "decode"),
        (policy, "logprobs", "forward"),
        (Tensor, "backward", "backward"),
        (optimizer, "zero_grad", "optimiser"),
        (torch.nn.utils, "clip_grad_norm_", "optimiser"),
        (optimizer, "step", "optimiser"),
    ]
    if reference is not None:
        parts += [(reference.visual, "forward", "vision")]
        parts += [(reference, name, "reference") for name in ("prefix", "logprobs")]
    if actor is not policy:
        parts += [(actor.visual, "forward", "vision"), (actor, "prefix", "prefix")]
    with ExitStack() as wrapped:
        for owner, name, part in parts:
            wrapped.enter_context(mock.patch.object(owner, name, clock.of(part, getattr(owner, name))))
        clock.start()
        step()
        clock.charge()
    return {part: clock.seconds[part] for part in PARTS}


class Clock:
    """Time by part. Where one part calls another, as prefix does vision, the inner one has it."""

    def __init__(self, now: Callable[[], float]):
        self.now = now

    def start(self) -> None:
        self.seconds, self.open, self.last = Counter(), ["other"], self.now()

    def charge(self) -> None:
        """The time since the last charge goes to the part that is innermost now."""
        now = self.now()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def of(self, part: str, function: Callable) -> Callable:
        def timed(*inputs, **options):
            self.charge()
            self.open.append(part)
            try:
                return function(*inputs, **options)
            finally:
                self.charge()
                self.open.pop()

        return timed


# ----------------------------------------------------------------------------------------------- transformers by hand


def plain_rows(prompts: list, image_token_id: int) -> dict[str, Tensor]:
    """N prompts.Prompts -> what transformers' Qwen2.5-VL takes: rows left-padded to one length P, and all their
    images."""
    longest = max(len(p.ids) for p in prompts)
    ids = torch.stack([F.pad(p.ids, (longest - len(p.ids), 0)) for p in prompts])  # (N, P)
    lengths = torch.tensor([len(p.ids) for p in prompts])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long(),
        "mm_token_type_ids": (ids == image_token_id).int(),  # without them transformers takes 1-D positions
        "pixel_values": torch.cat([p.patches for p in prompts]),
        "image_grid_thw": torch.tensor([p.grid for p in prompts]),
    }


def plain_logprobs(model, rows: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Log-probs (N, T) of completions ids (N, T), all of T tokens, behind the N prompts of plain_rows."""
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids).int()}
    whole = rows | {name: torch.cat((rows[name], tail), dim=1) for name, tail in more.items()}  # (N, P + T)
    logits = model(**whole, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits[:, :-1]  # (N, T, V)
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def plain_loss(logp: Tensor, logp_ref: Tensor, advantage: Tensor) -> Tensor:
    """GRPO's, on policy. logp, logp_ref (N, T), advantage (N,); every completion has T tokens, so one mean does."""
    ratio, a = (logp - logp.detach()).exp(), advantage[:, None]
    kl = (logp_ref - logp).exp() - (logp_ref - logp) - 1
    return (BETA * kl - torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)).mean()


class Plain:
    """What one writes with transformers in an afternoon: nothing wasted by mistake, nothing shared within a group."""

    def __init__(self, folder: Path):
        self.case = case = read_case(folder)
        from transformers import Qwen2_5_VLForConditionalGeneration

        from data import load_samples
        from prompts import Processor
        from runtime.stream import Sampler
        from tasks import TASKS

        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.policy, self.reference = (load(folder / "model", dtype=torch.float32).eval() for _ in range(2))
        self.reference.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.processor = Processor(folder / "model", "answer", TASKS)
        self.tokenizer = self.processor.tokenizer
        self.samples = load_samples(str(folder / "records.jsonl"), TASKS, case.seed, "train")
        self.sampler = Sampler(len(self.samples), case.prompts, case.seed)
        self.meter, self.steps = Meter(), 0

    def draw(self) -> list:
        return [self.processor.prompt(self.samples[index]) for index in self.sampler.indices(self.steps)]

    def sample(self, rows: dict[str, Tensor]) -> Tensor:
        """Completions (B * G, T) of B rows."""
        t, prompt = self.case.tokens, rows["input_ids"].shape[1]
        whole = self.policy.generate(
            **rows, num_return_sequences=self.case.group, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=t, max_new_tokens=t,  # EOS cannot be drawn
            suppress_tokens=[self.policy.config.image_token_id],  # nor an image token, which would want an image
        )  # fmt: skip
        return whole[:, prompt:]

    def one_step(self) -> tuple[list, Tensor]:
        prompts, group, image = self.draw(), self.case.group, self.policy.config.image_token_id
        ids = self.sample(plain_rows(prompts, image))
        repeated = [prompt for prompt in prompts for _ in range(group)]
        texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        hits = [box_hit(text, prompt.target) + letters(text) for text, prompt in zip(texts, repeated, strict=True)]
        reward = torch.tensor(hits).view(-1, group)  # (B, G)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        rows = plain_rows(repeated, image)
        with torch.no_grad():
            logp_ref = plain_logprobs(self.reference, rows, ids)
        self.optimizer.zero_grad(set_to_none=True)
        plain_loss(plain_logprobs(self.policy, rows, ids), logp_ref, advantage.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.steps += 1
        return prompts, ids

    def step(self) -> dict:
        self.meter.start()
        prompts, ids = self.one_step()
        measured = self.meter.stop()
        lengths = torch.full((len(ids),), ids.shape[1])
        return measured | work([p.ids for p in prompts], [p.patches for p in prompts], lengths)

    def generate(self) -> dict:
        rows = plain_rows(self.draw(), self.policy.config.image_token_id)
        self.meter.start()
        ids = self.sample(rows)
        return self.meter.stop() | {"lengths": [ids.shape[1]] * len(ids)}


# ----------------------------------------------------------------------------------------------------------------- TRL


def run_trl(folder: Path, parent: Parent, checkpointing: bool) -> None:
    """GRPOTrainer's own loop, held between two steps. A step lasts from on_step_end to on_step_end: it reads its
    pictures before on_step_begin."""
    from datasets import Dataset, Image
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    case, meter, seen = read_case(folder), Meter(), {}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([
        {"prompt": [{"role": "user", "content": r["query"]}], "image": str(folder / r["image"]), "box": r["bbox"]}
        for r in (records[index] for index in case.order)
    ]).cast_column("image", Image())  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder / "model", padding_side="left")
    processor.chat_template = processor.tokenizer.chat_template

    def box(completions, box, **others):
        return [box_hit(answer[0]["content"], b) for answer, b in zip(completions, box, strict=True)]

    def share_of_letters(completions, **others):
        return [letters(answer[0]["content"]) for answer in completions]

    class Turns(TrainerCallback):
        def on_train_begin(self, arguments, state, control, **others):
            parent.ready("trl")
            self.wait(control)

        def on_step_end(self, arguments, state, control, **others):
            parent.tell(meter.stop() | trl_work(seen, case))
            seen.clear()
            self.wait(control)

        def wait(self, control):
            if parent.command():
                meter.start()
            else:
                control.should_training_stop = True

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, seed=case.seed, max_steps=case.steps,
        per_device_train_batch_size=case.prompts * case.group, num_generations=case.group, shuffle_dataset=False,
        max_completion_length=case.tokens, temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": case.tokens},  # EOS cannot be drawn
        beta=BETA, loss_type="grpo", epsilon=CLIP, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=GRAD_CLIP, gradient_checkpointing=checkpointing,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(folder / "model"), [box, share_of_letters], arguments, dataset,
        processing_class=processor, callbacks=[Turns()],
    )  # fmt: skip
    # What the reference is given is all of the step's work, in order: a look at it costs nothing.
    trainer.ref_model.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    trainer.train()


def trl_work(seen: dict[str, Tensor], case: SimpleNamespace) -> dict:
    """work() of the rows (B * G, P + T) that a model was called with: prompts left-padded, completions right-padded."""
    ids, mask, tokens = seen["input_ids"], seen["attention_mask"].bool(), case.tokens
    prompts = [row[real] for row, real in zip(ids[:: case.group, :-tokens], mask[:: case.group, :-tokens], strict=True)]
    pictures = seen["pixel_values"].split(seen["image_grid_thw"].prod(-1).tolist())[:: case.group]
    return work(prompts, pictures, mask[:, -tokens:].sum(1))


def main() -> None:
    name, folder, parent = sys.argv[1], Path(sys.argv[2]), Parent()
    if name.startswith("trl"):
        run_trl(folder, parent, checkpointing=name == "trl-checkpointing")
        return
    program = Ours(folder) if name == "ours" else Plain(folder)
    parent.ready()
    while command := parent.command():
        parent.tell(getattr(program, command)())


if __name__ == "__main__":
    main()
