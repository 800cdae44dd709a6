"""What a reader copies: the paper's recipe end to end, the commands in runs/, the README's own reward and schedule."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from programs import as_main, fork, lines, records, run, small  # noqa: F401  (records is a fixture)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import train_grpo
from config import parse
from model import Policy
from rewards import REWARDS
from weights import load_policy, read_config, save_policy

ROOT = Path(__file__).parent.parent
QWEN_SPECIALS = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad"
).split()


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory) -> Path:
    """Random weights under a config.json flat as published, with Qwen's 151,936 embedding rows and special tokens at
    their published ids. Its ordinary tokens are 256 bytes and made-up words, so every id below 151,643 has a text."""
    folder = tmp_path_factory.mktemp("tiny-qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {f"w{i}": i for i in range(256, 151643)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in QWEN_SPECIALS])
    assert tokenizer.token_to_id("<|im_end|>") == 151645 and tokenizer.token_to_id("<|image_pad|>") == 151655
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(
        model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], torch_dtype="bfloat16",
        vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=128000,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=True, use_sliding_window=False,
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
        bos_token_id=151643, eos_token_id=151645,
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=14,
            fullatt_block_indexes=[1], window_size=112, spatial_merge_size=2, temporal_patch_size=2, in_chans=3,
        ),
    )  # fmt: skip
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [151645, 151643], "pad_token_id": 151643},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    policy = Policy(read_config(config), (151645, 151643)).init_weights(0)
    policy.raw_config = config
    save_policy(policy, folder, torch.bfloat16)
    return folder


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
def test_the_commands_in_runs_are_commands_that_the_parser_takes(script, tmp_path):
    """Run by bash with stand-ins that only print what they are asked; and marked for what they are."""
    assert "Never run on a GPU by us" in script.read_text()
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "a folder", "OUT": "there"}
    asked = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
    words = asked.splitlines()
    args = parse("train_grpo.py", words[words.index(str(ROOT / "train_grpo.py")) + 1 :])
    assert (args.recipe, args.schedule, args.model, args.out) == ("paper", ["medloc"], "a folder", "there")
    assert (args.group_size, args.temperature, args.beta) == (8, 0.9, 0.04)
    assert args.lora_rank or args.lr == 1e-6


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
