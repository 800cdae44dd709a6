"""runtime/plan.py: whole runs take what it says, and it decides as it says."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import measured_peak
import pytest
import torch
from PIL import Image
from programs import records, run  # noqa: F401  (records is a fixture)

import train_grpo
import weights
from config import parse
from data import load_samples
from errors import InputError
from model import Policy
from prompts import Processor
from runtime import plan
from runtime.plan import GB, Run
from tasks import TASKS
from weights import NANO, read_config, save_policy

# hidden, layers, heads, kv heads, inner, vocabulary, tied, inner of the tower; parameters
PUBLISHED = {
    "3B": ((2048, 36, 16, 2, 11008, 151936, True, 3420), 3_754_622_976),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False, 3420), 8_292_166_656),
    "32B": ((5120, 64, 40, 8, 27648, 152064, False, 3456), 33_452_718_336),
}


def config_of(size, layers, heads, kv, inner, words, tied, tower_inner, tower=1280, depth=32, tower_heads=16) -> dict:
    half, base = size // heads // 2, json.loads((NANO / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = base | dict(zip(names, (size, layers, heads, kv, inner), strict=True)) | {"vocab_size": words}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [half // 4, half // 4, half - 2 * (half // 4)]}
    sizes = {"hidden_size": tower, "depth": depth, "num_heads": tower_heads, "intermediate_size": tower_inner}
    vision = base["vision_config"] | sizes | {"out_hidden_size": size, "fullatt_block_indexes": [depth - 1]}
    return config | {"tie_word_embeddings": tied, "vision_config": vision}


PAPER = Run(read_config(config_of(*PUBLISHED["3B"][0])), 128, 2048, 8, 8, 8, 512, 2, "cuda", 1, 0, reference=True)
WHOLE = [  # ranks, side, flags, shape: a small one; pictures and KL, alone and sharded; long answers; a frozen tower
    (1, 392, "--micro-batch=1 --max-tokens=24 --beta=0.04 --group-size=4", (128, 2, 4, 2, 512, 320, True, 768)),
    (1, 448, "--micro-batch=1 --max-tokens=48 --beta=0.04", (256, 4, 4, 2, 768, 320, True, 768)),
    (2, 448, "--micro-batch=1 --max-tokens=48 --beta=0.04", (256, 4, 4, 2, 768, 320, True, 768)),
    (1, 280, "--micro-batch=2 --max-tokens=96 --checkpointing", (384, 4, 6, 2, 1024, 320, True, 512)),
    (1, 140, "--batch-size=4 --freeze-vision --checkpointing", (512, 4, 8, 2, 1024, 4000, False, 768)),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3, 4))])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(number, tmp_path):
    ranks, side, flags, shape = WHOLE[number]
    config = config_of(*shape, tower=256, depth=3, tower_heads=4)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(NANO / file, tmp_path / file)
    policy = Policy(read_config(config), (2,)).init_weights(0)
    policy.raw_config = config
    save_policy(policy, tmp_path, torch.bfloat16)
    record, data = {"image": "0.png", "query": "the skin lesion", "bbox": [9, 9, 50, 60]}, tmp_path / "train.jsonl"
    data.write_text(f"{json.dumps(record)}\n" * 4)
    Image.new("RGB", (side, side), (9, 80, 200)).save(tmp_path / "0.png")
    common = f"--recipe=nano --model={tmp_path} --data={data} --val={data} --max-pixels=200704 --no-checkpointing"
    flags = f"{common} --batch-size=2 --micro-batch=2 --max-tokens=32 {flags}".split()
    if ranks == 1:  # a fork, which need not import torch again
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            seen = pool.submit(measured_peak.measure, tmp_path, flags).result()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command += [measured_peak.__file__, str(tmp_path), *flags, "--shard"]
        seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\nestimated {seen['estimated'] / 1e6:.0f} MB, measured {seen['measured'] / 1e6:.0f} MB")
    assert seen["measured"] > 1.2 * seen["always"]  # there is something to estimate
    assert abs(seen["estimated"] / seen["measured"] - 1) < 0.2


def estimate(folder: Path, *flags: str, name: str = "3B", ranks: int = 1, shard: bool = False) -> str:
    (folder / "config.json").write_text(json.dumps(config_of(*PUBLISHED[name][0])))
    args = parse("train_grpo.py", ["--estimate", "--device=cuda", "--recipe=paper", "--memory=24GB", *flags])
    args.model, args.prompt, args.dtype, args.ranks, args.shard = str(folder), "think", "bfloat16", ranks, shard
    return plan.settle(args, folder, [])[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_planned_from_config_json_alone(name, tmp_path):
    """No weights, no tokenizer, no data, no GPU, and no memory: 32 B parameters of fp32 would be 134 GB."""
    text, always = estimate(tmp_path, "--max-pixels=401408", name=name), 16 * PUBLISHED[name][1] / GB  # 4 + 8 + 2 + 2
    assert float(re.search(r"always there +([\d.]+)", text)[1]) == pytest.approx(always, abs=0.2)
    assert "640 tokens a prompt, 512 of its picture (the largest that --max-pixels 401408 lets in)" in text
    assert text.count("no flags make it fit") == (3 if name == "32B" else 0)  # --memory, a 24 GB and an 80 GB card
    assert name == "32B" or "24 GB: --lora-rank 64" in text


@pytest.mark.parametrize("name, card, shards, changes, expected", [
    ("3B", 24, 1, {"lora_rank": 64}, True), ("3B", 24, 1, {"freeze_vision": True}, False), ("3B", 80, 1, {}, False),
    ("3B", 80, 1, {"freeze_vision": True}, True), ("7B", 80, 4, {}, True), ("32B", 80, 8, {"reference": False}, False),
    ("7B", 80, 2, {"freeze_vision": True}, False), ("7B", 80, 2, {"freeze_vision": True, "reference": False}, True),
])  # fmt: skip
def test_the_readmes_sides_of_the_cards(name, card, shards, changes, expected):
    run = replace(PAPER, config=read_config(config_of(*PUBLISHED[name][0])), checkpointing=True, **changes)
    assert replace(run, batch=8 // shards, micro=8 // shards, shards=shards).fits(card * GB) == expected


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"lora_rank": 8}, {"freeze_vision": True}])
@pytest.mark.parametrize("name", ["micro", "group", "tokens", "text", "patches", "evaluation"])
def test_more_of_anything_takes_more(name, changes):
    """In every moment at least as much, in some moment more."""
    ladder = [replace(PAPER, batch=5000, **changes | {name: value}) for value in (64, 128)]
    less, more = ([sum(parts.values()) for parts in plan.moments(run).values()] for run in ladder)
    assert all(a <= b for a, b in zip(less, more, strict=True)) and sum(less) < sum(more)


def test_the_choice_is_the_first_that_fits():
    """Against all of them: fewest passes, then no checkpointing; the least of all where none fits."""
    asked = replace(PAPER, batch=6, micro=6, tokens=256, lora_rank=64)
    order = [replace(asked, micro=size, checkpointing=way) for size in (6, 3, 2, 1) for way in (False, True)]
    for memory in [1, *(plan.peak(each) / plan.FILL["cuda"] + 1 for each in order)]:
        fitting = [each for each in order if plan.peak(each) <= plan.FILL["cuda"] * memory]
        assert plan.choose(asked, memory) == (fitting[0] if fitting else min(order, key=plan.peak))
    assert plan.choose(asked, 0, micro=3) == min((each for each in order if each.micro == 3), key=plan.peak)
    assert plan.choose(asked, 10**15, checkpointing=True) == order[1]


def test_an_evaluation_that_does_not_fit_answers_fewer_at_a_time():
    asked = replace(PAPER, lora_rank=64, patches=16384, evaluation=50)
    chosen = plan.choose(asked, 24 * GB)
    assert chosen.evaluation == chosen.micro < 50 and chosen.fits(24 * GB)
    assert plan.choose(asked, 800 * GB).evaluation == 50 and plan.choose(PAPER, GB).evaluation == 0


@pytest.mark.parametrize("card, pixels", [(18, 401408), (24, 12845056), (60, 401408), (80, 401408), (80, 12845056)])
def test_the_remedy_fits_and_is_no_larger_than_it_must_be(card, pixels, tmp_path):
    asked = [f"--max-pixels={pixels}", f"--memory={card}GB", "--micro-batch=2", "--no-checkpointing"]
    words = estimate(tmp_path, *asked).split("it does not fit: ")[1].split(", estimated")[0]
    *flags, micro, way = (f"--{flag.replace(' ', '=')}" for flag in words[2:].split(" --"))
    assert "\nit fits\n" in estimate(tmp_path, *asked, *flags, micro, way)
    for flag in flags:  # not one of them less
        assert "it does not fit" in estimate(tmp_path, *asked[:2], *(other for other in flags if other != flag)), flag


@pytest.mark.parametrize("script, card, ranks", [("1x24", 24, 1), ("1x80", 80, 1), ("4x80", 80, 4)])
def test_the_commands_in_runs_fit_their_cards(script, card, ranks, tmp_path):
    text = (Path(__file__).parents[1] / "runs" / f"medloc_3b_{script}.sh").read_text().replace("\\\n", " ")
    flags = [flag for flag in text.split('train_grpo.py"')[1].split() if "{" not in flag]
    assert "\nit fits\n" in estimate(tmp_path, *flags, f"--memory={card}GB", ranks=ranks)


def test_a_run_plans_by_what_is_free_and_resumes_as_it_was(records, tmp_path, monkeypatch):  # noqa: F811
    seen = set()

    class Noting(Policy):
        def prefix(self, batch):
            seen.add((len(batch.lengths), self.checkpointing))
            return super().prefix(batch)

    monkeypatch.setattr(weights, "Policy", Noting)
    monkeypatch.setattr(plan, "free_memory", lambda device: GB // 4)
    flags = ["--data", str(records), "--out", str(tmp_path / "a"), "--batch-size=4", "--group-size=2", "--steps=1"]
    assert "plan: --micro-batch 4 --no-checkpointing, estimated peak 0." in run(train_grpo, *flags)
    assert seen == {(4, False)}
    saved = json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]
    assert (saved["micro_batch"], saved["checkpointing"], saved["memory"]) == (4, False, None)
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)  # then a resumed run stays as it was, and says so
    seen.clear()
    text = run(train_grpo, "--resume", "--out", str(tmp_path / "a"), "--steps", "2")
    assert "this may run out of memory: " in text and "no flags make it fit" in text and seen == {(4, False)}


def on_cpu(data: str, *flags: str) -> tuple:
    args = parse("train_grpo.py", [f"--data={data}", *flags])
    args.prompt, args.dtype = "answer", "float32"
    words = plan.settle(args, NANO, load_samples(data, TASKS, 0, "train")[:12])[1]
    return args.micro_batch, args.checkpointing, words.split(";")[0]


def test_given_memory_is_held_and_what_is_too_little_is_refused(records):  # noqa: F811
    flags = str(records), "--batch-size=4", "--group-size=4", "--memory=0.08GB"
    micro, checkpointing, words = on_cpu(*flags)
    assert f"plan: --micro-batch {micro} " in words and "(60% of 0.08 GB)" in words and (micro < 4 or checkpointing)
    with pytest.raises(InputError, match=r"--memory 0.08GB: --micro-batch 4 --no.*it does not fit: .* would fit$"):
        on_cpu(*flags, "--micro-batch=4", "--no-checkpointing")


def test_shards_are_told_of_no_adapters(tmp_path):
    text = estimate(tmp_path, "--max-pixels=401408", "--memory=4x80GB", ranks=4, shard=True)
    assert "on each of 4 ranks" in text and "gathered weights 6.99" in text and "\nit fits\n" in text
    text = estimate(tmp_path, "--memory=2x16GB", ranks=2, shard=True)
    assert "no flags make it fit" in text and "more ranks" in text and "lora" not in text


def test_ranks_make_do_with_the_least_memory_of_all(monkeypatch):
    """And on a CPU, all of one machine share what it has."""

    def settled(here: int, elsewhere: int) -> tuple:
        monkeypatch.setattr(plan, "free_memory", lambda device: here)
        monkeypatch.setattr(plan.ranks, "gather_objects", lambda work: [work(), elsewhere])
        return on_cpu("phantoms")

    least = settled(GB // 8, GB // 8)
    assert settled(GB, GB)[:2] == (16, False) and settled(GB, GB // 8) == settled(GB // 8, GB) == least
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert settled(GB // 2, GB) == least


def test_the_longest_prompt_is_the_datas(records):  # noqa: F811
    """Exact where the largest picture has the longest question, else as if it had; unusable records do not count."""
    samples = load_samples(str(records), TASKS, 0, "train")
    prompts = [Processor(NANO, "answer", TASKS).prompt(sample) for sample in samples]
    patches = max(len(p.patches) for p in prompts)
    text = max(len(p.ids) for p in prompts) - patches // 4
    assert plan.longest_prompt(NANO, samples, "answer", None)[:2] == (text, patches)
    samples += [replace(samples[0], size=(250, 250), query="?"), replace(samples[1], size=(30, 9000))]
    samples += [replace(samples[2], query="<|image_pad|>" * 100)]
    assert plan.longest_prompt(NANO, samples, "answer", None)[:2] == (text, 18 * 18)
    assert plan.longest_prompt(NANO, samples, "answer", 140 * 140)[:2] == (text, 100)


@pytest.mark.parametrize("text", ["24", "24 GB", "24gb", "0GB", "-1GB", "nanGB", "1e3GB", "", "0x8GB", "4x", "4x0GB"])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="--memory wants a number of GB such as 24GB, or with --estimate 4x80GB, not"):
        plan.read_memory(text)
    assert plan.read_memory("0.5GB") == (GB // 2, None) and plan.read_memory("4x80GB") == (80 * GB, 4)


V1, OWN, NONE = "5:cpu,cpuacct:/\n4:memory:/job/task\n0::/\n", "0::/job/task\n", "9223372036854771712"
NESTED = [  # /proc/self/cgroup; folder below sys/fs/cgroup -> limit, use, memory.stat; version; what is left
    (V1, {"memory/job/task": (NONE, "10"), "memory/job": ("500", "100")}, 1, 400),
    (V1, {"memory": ("700", "100")}, 1, 600),  # a container has no other files
    (V1, {"memory/job/task": (NONE, "10"), "memory": (NONE, "10")}, 1, None),
    (V1, {"memory/job": ("500", "400", "inactive_file 7\ntotal_inactive_file 300")}, 1, 400),
    ("7:cpu,memory:/a\n", {"memory/a": ("50", "20")}, 1, 30),
    (V1, {"memory/job/other": ("5", "4")}, 1, None),
    (OWN, {"job/task": ("900", "100"), "job": ("300", "120"), "": ("max", "9")}, 2, 180),
    ("0::/../../job\n", {"": ("300", "120")}, 2, 180),  # of a container
    (OWN, {"job": ("500", "400", "file 350\ninactive_file 300\n")}, 2, 400),
    (OWN, {"job": ("500", "600")}, 2, 0),
    (OWN, {"job": ("500",), "": ("5e2", "0")}, 2, None),
]


@pytest.mark.parametrize("own, groups, version, left", NESTED)
def test_what_is_free_minds_every_group_around_the_process(own, groups, version, left, tmp_path):
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    files = {"proc/self/cgroup": own, "proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   700 kB\n"}
    for folder, texts in groups.items():
        named = zip((*names, "stat"), texts, strict=False)
        files |= {f"sys/fs/cgroup/{folder}/memory.{name}": f"{text}\n" for name, text in named}
    assert 0 < plan.free_memory("cpu") <= plan.free_memory("cpu", tmp_path)  # all there is: no file says another thing
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert plan.free_memory("cpu", tmp_path) == (700 * 1024 if left is None else left)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_here_needs_a_number():
    with pytest.raises(InputError, match="there is no GPU here to ask; say what it has, such as --memory 24GB"):
        on_cpu("phantoms", "--estimate", "--device=cuda")
