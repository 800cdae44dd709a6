"""The nano policies: assets/nano from random weights, in two stages of supervised training on phantoms.

    python -m prepare.nano
    python -m prepare.nano --out coarse --keep-exact exact
    python -m prepare.nano --tasks

The first makes assets/nano anew: 2,200 steps, 20 minutes on one core. The second keeps the first stage's policy too.
The third makes the one for more than boxes: nano_tasks.py.
Exact boxes until it can see, then COARSE ones until threshold rewards are sparse: the start that the paper is about. It
is made coarse on purpose; eval.json has both rows, and the exact policy is the one to compare with.

Everything follows from SEED: weights, order of the samples, coarse labels; at another number of threads sums round
otherwise. What is stored is bf16.
"""

import errors  # first: from here on Ctrl-C is one sentence, in the seconds too that importing torch takes

# isort: split
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import load_samples, phantom_samples
from eval import evaluate
from flags import WORKERS
from images import CLIP_MEAN, CLIP_STD
from model import Policy
from phantoms import QUERIES
from prompts import Processor
from runtime.readers import Readers
from tasks import TASKS, summary
from train_sft import Coarse, Sft, adamw, sft
from weights import NANO, NANO_TASKS, NANO_VIDEO, load_policy, read_config, save_policy

# The nano policy: a real Qwen2.5-VL of 2.3 M parameters. Two full-attention blocks around a windowed one, 2 key heads
# for 4 query heads, and 5 x 5 image tokens in windows of 4 x 4: every mechanism of the large ones is in it.
TEXT = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, max_position_embeddings=2048, use_sliding_window=False, hidden_act="silu",
    rope_theta=1e4,  # positions stay below 100; the published 1e6 would leave most frequencies still
    rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
)  # fmt: skip
VISION = dict(
    model_type="qwen2_5_vl", depth=3, hidden_size=128, intermediate_size=512, num_heads=4, out_hidden_size=128,
    fullatt_block_indexes=[0, 2], window_size=112, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
    tokens_per_second=2, in_channels=3, hidden_act="silu",
)  # fmt: skip
SEED, BATCH, WARMUP, MAX_TOKENS = 0, 32, 50, 24
DATA_SEED = 20_260_328  # of its phantoms: a series that no GRPO run (seed 0, 1, 2 ...) draws from
STAGES = (  # name, steps of BATCH, lr, how labels are made coarse
    ("exact", 2000, 1e-3, None),
    ("coarse", 200, 5e-4, Coarse()),
)

SPECIALS = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>").split()
# Qwen2.5-VL's template without the system turn: twenty tokens less in every prompt.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's way to cut a text before byte pairs are merged; each digit stays alone, so a coordinate is its digits.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


WORDS = ("user\n", "assistant\n", *dict.fromkeys(QUERIES.values()))


def nano_tokenizer(texts: Sequence[str] = WORDS, most: int = 400) -> Tokenizer:
    """Byte-level byte-pair encoding: all 256 bytes, the special tokens, and the words of the phantoms' prompts; `most`
    tokens, which must be more than these texts need."""
    pieces = pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*texts] * 2
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=most, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def write_nano(folder: Path, seed: int, tokenizer: Tokenizer | None = None) -> None:
    """A checkpoint folder with random weights: everything but the training."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or nano_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    config = TEXT | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,  # as the published: more rows than tokens
        "tie_word_embeddings": True,
        "bos_token_id": pad,
        "eos_token_id": eos,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": VISION,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [eos, pad], "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": TEMPLATE,
            "model_max_length": TEXT["max_position_embeddings"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 252 * 252,  # 81 image tokens
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    policy = Policy(read_config(config), (eos, pad)).init_weights(seed)
    policy.raw_config = config
    save_policy(policy, folder)


def make(folder: Path, keep_exact: Path | None, readers: Readers) -> None:
    """The policy after all STAGES into folder, the one after the first into keep_exact (fp32: for what goes on)."""
    write_nano(folder, SEED)
    policy, processor = load_policy(folder), Processor(folder, "answer", TASKS)
    test = load_samples("phantoms", TASKS, SEED, "test")
    results = {"command": "python -m prepare.nano", "seed": SEED}
    start = 0  # each stage draws its phantoms from where the last one stopped: no picture is seen twice
    for name, steps, lr, coarse in STAGES:
        settings = Sft(steps, BATCH, BATCH, lr, WARMUP, SEED, coarse, f"sft {name}")
        samples = phantom_samples(None, DATA_SEED, start, steps * BATCH)
        for _ in sft(policy, processor, adamw(policy, lr), samples, settings, readers):
            pass
        start += steps * BATCH
        # What is stored is bf16: go on from, and evaluate, exactly that.
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        results[name], _ = evaluate(policy, processor, test, 50, MAX_TOKENS, progress=name)
        tqdm.write(summary(name, results[name]))
        if keep_exact and coarse is None:
            save_policy(policy, keep_exact)
            processor.save(keep_exact)
    save_policy(policy, folder, torch.bfloat16)
    processor.save(folder)
    (folder / "eval.json").write_text(json.dumps(results, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = errors.Parser(prog="-m prepare.nano", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", action="store_true", help="the policy for more than boxes: prepare/nano_tasks.py")
    parser.add_argument("--video", action="store_true", help="the policy for clips: prepare/nano_video.py")
    parser.add_argument("--out", type=Path, help="folder of the policy; default: assets/nano, -tasks or -video, anew")
    parser.add_argument("--keep-exact", type=Path, help="folder for the policy before it is made coarse")
    args = parser.parse_args(argv)
    with Readers(WORKERS.default) as readers:
        if args.tasks:
            from prepare import nano_tasks  # which begins where this one ends

            nano_tasks.make(args.out or NANO_TASKS, args.keep_exact, readers)
        elif args.video:
            from prepare import nano_video  # as well

            nano_video.make(args.out or NANO_VIDEO, args.keep_exact, readers)
        else:
            make(args.out or NANO, args.keep_exact, readers)


if __name__ == "__main__":
    errors.run(main)
