"""What a reader copies: the paper's recipe end to end, the commands in runs/, the README's own reward and schedule."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from programs import as_main, fork, lines, records, run, small  # noqa: F401  (records is a fixture)
from test_data import save_tokenizer
from test_prompts import ALL_SPECIAL
from tokenizers import models, pre_tokenizers

import train_grpo
from config import parse
from data import parts_of
from model import Policy
from rewards import REWARDS
from weights import NANO, load_policy, read_config, save_policy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory) -> Path:
    """Random weights, with Qwen's 151,936 embedding rows and special tokens at their published ids. Its ordinary tokens
    are 256 bytes and made-up words, so every id below 151,643 has a text."""
    folder = tmp_path_factory.mktemp("tiny-qwen")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"w{i}": i for i in range(256, 151643)}
    save_tokenizer(folder, models.BPE(vocab=vocabulary, merges=[]), ALL_SPECIAL, None, 151655)
    raw = json.loads((NANO / "config.json").read_text()) | {"vocab_size": 151936, "image_token_id": 151655}
    raw |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": True}
    raw["vision_config"] |= dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
    raw["vision_config"]["fullatt_block_indexes"] = [1]
    files = {
        "generation_config.json": {"eos_token_id": [151645, 151643], "pad_token_id": 151643},
        "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    policy = Policy(read_config(raw), (151645, 151643)).init_weights(0)
    policy.raw_config = raw
    save_policy(policy, folder, torch.bfloat16)
    return folder


@pytest.mark.slow
def test_the_papers_recipe_runs_end_to_end(tiny_qwen, records, tmp_path, monkeypatch):  # noqa: F811
    """Think prompt, G = 8, temperature .9, KL to a reference, warm-up, format reward; the vocabulary is the real size.
    A random policy earns nothing, so a reward for length stands in to give it something to learn."""
    monkeypatch.setitem(REWARDS, "length", lambda texts, *_: [float(len(t)) for t in texts])
    out = tmp_path / "run"
    flags = ["--model", str(tiny_qwen), "--data", str(records), "--val", str(records), "--out", str(out)]
    flags += ["--steps", "3", "--batch-size", "2", "--max-tokens", "10", "--eval-limit", "2"]
    output = run(train_grpo, *flags, "--rewards", "task=1,format=1,length=0.01")
    resolved = json.loads((out / "config.json").read_text())["arguments"]
    paper = dict(recipe="paper", lr=1e-6, group_size=8, temperature=0.9, beta=0.04, prompt="think")
    assert paper.items() <= resolved.items()
    rows = lines(out / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-7, 2e-7, 3e-7])
    assert all(row["grad_norm"] > 0 and 0 <= row["kl"] < 1e-6 for row in rows)  # three such steps are no distance yet
    assert all(row["reward_task"] == row["reward_format"] == 0 < row["reward_length"] for row in rows)
    assert rows[0]["entropy"] > 10  # of log(151,936) = 11.9 nats
    sample = lines(out / "samples.jsonl")[0]
    assert sample["prompt"].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert "First output the thinking process in <think> </think> tags" in sample["prompt"]
    assert "Why is my reward zero? In the last 3 steps 0 of 48 answers reached IoU 0.30" in output
    start, end = load_policy(tiny_qwen), load_policy(out / "step-000003")
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(start.parameters(), end.parameters(), strict=True)])
    assert 1e-8 < moved.max() < 1e-6


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda script: script.name)
def test_the_commands_in_runs_are_commands_that_the_parser_takes(script, tmp_path, monkeypatch):
    """Run by bash with stand-ins that only print what they are asked; and marked for what they are."""
    assert re.search(r"Never run on a GPU\s+(# )?by us", script.read_text())
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\necho ----; printf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "k.json").write_text('{"*": {"nevus": "round"}}')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "a folder", "OUT": "there"}
    environment["KNOWLEDGE"] = str(tmp_path / "k.json")
    asked = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
    calls = []
    for call in asked.split("----\n")[1:]:
        words = call.splitlines()
        at = next(i for i, word in enumerate(words) if word.startswith(str(ROOT)))
        if found := re.search(r"nproc-per-node=(\d+)", call):
            monkeypatch.setenv("WORLD_SIZE", found[1])
        calls.append(parse(Path(words[at]).name, words[at + 1 :]))
    if "medloc" in script.name:
        (args,) = calls
        assert (args.recipe, args.schedule, args.model, args.out) == ("paper", ["medloc"], "a folder", "there")
        assert (args.group_size, args.temperature, args.beta) == (8, 0.9, 0.04)
        assert args.lora_rank or args.lr == 1e-6
        return
    first, second = calls
    assert first.model == "a folder" and second.schedule == ["raw"] and second.recipe == "paper"
    if "vrft" in script.name:  # the second run begins with the policy that the first one leaves
        assert second.model == f"{first.out}/step-{first.steps:06d}" and second.knowledge
    else:  # the quartiles are of the policy that the run begins with, on the same data
        assert (second.model, second.normalise) == (first.model, first.write_norms)
        assert parts_of(second.data) == [(file, 1.0) for file, _ in parts_of(first.data)]
        assert (first.temperature, first.max_tokens or 512) == (second.temperature, second.max_tokens)


SNIPPET = re.findall(r"```python\n(import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def test_the_readmes_own_reward_runs(records, tmp_path):  # noqa: F811
    """As written, with the flags that its last comment names."""
    (tmp_path / "my_reward.py").write_text(SNIPPET)
    flags = SNIPPET.rstrip().rpartition("python my_reward.py ")[2].split()
    command = [tmp_path / "my_reward.py", *small(tmp_path / "out", records), *flags, "--steps", "2"]
    job = fork(tmp_path / "log", lambda: as_main(*command))
    job.join()
    assert job.exitcode == 0, (tmp_path / "log").read_text()
    samples = lines(tmp_path / "out" / "samples.jsonl")[0]
    expected = [1 / (1 + len(text) / 20) for text in samples["texts"]]
    task = [r - 0.2 * e for r, e in zip(samples["rewards"], expected, strict=True)]
    assert all(min(abs(t), abs(t - 1)) < 1e-3 for t in task)
    assert all(0 < row["reward_short"] < 1 for row in lines(tmp_path / "out" / "metrics.jsonl"))
