#!/usr/bin/env bash
# MedGRPO (arXiv 2512.06581) on EIGHT 80 GB GPUs: Qwen2.5-VL-7B, several datasets, rewards on one scale. Never run on a GPU
# by us. Still pictures here; its videos are another file's.
#
# As far as its page tells: 5,000 steps, lr 5e-7, 8 answers, clip .2 .3, no KL, rewards normalised by the SFT
# policy's quartiles of each dataset and task (k = 3, frozen). Batch, temperature and tokens are not told: guesses.
#
#   MODEL   a folder with the SFT policy     TRAIN   records, =WEIGHT behind each file     VAL   records
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # MODEL, TRAIN and VAL are relative to where you are
model="${MODEL:-out-sft/step-005000}"
train=${TRAIN:-"boxes.jsonl=1 labels.jsonl=1"}
out="${OUT:-out-medgrpo-7b}"

# Quartiles of every reward from four answers to each prompt, sampled as in the training; there, files have no weights.
# shellcheck disable=SC2046
python "$here/eval.py" --model="$model" --data $(sed -E 's/=[0-9.]+( |$)/\1/g' <<< "$train") --limit=4000 --samples=4 --temperature=0.9 \
  --write-norms="$out.norms.json" --out="$out-start"

# shellcheck disable=SC2086
torchrun --nproc-per-node=8 "$here/train_grpo.py" --schedule=raw --recipe=paper \
  --model="$model" --data $train --val="${VAL:-val.jsonl}" --out="$out" \
  --normalise="$out.norms.json" --advantage=std --beta=0 --clip .2 .3 --inner-steps=2 \
  --shard --freeze-vision --batch-size=64 --lr=5e-7 --max-tokens=512 --max-pixels=401408 \
  --steps=5000 --eval-every=500 --save-every=500 --keep=3
