#!/usr/bin/env bash
# MedLoc-R1's experiment as the paper has it, on FOUR 80 GB GPUs: Qwen2.5-VL-3B. Never run on a GPU by us.
#
# 32 prompts x 8 answers a step, dealt out over the ranks; each rank holds what runs/medloc_3b_1x80.sh does.
#
# A checkpoint is about 40 GB: five of them in 500 steps, or fewer with --keep.
#
#   MODEL   a folder with Qwen2.5-VL-3B-Instruct         TRAIN, VAL   records (README: "Your own images")
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # MODEL, TRAIN and VAL are relative to where you are

torchrun --nproc-per-node=4 "$here/train_grpo.py" --schedule=medloc --recipe=paper \
  --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" --data="${TRAIN:-train.jsonl}" --val="${VAL:-val.jsonl}" \
  --out="${OUT:-out-medloc-3b}" \
  --freeze-vision --checkpointing \
  --batch-size=32 --micro-batch=8 --max-tokens=512 --max-pixels=401408 \
  --steps=500 --eval-every=100 --save-every=100
