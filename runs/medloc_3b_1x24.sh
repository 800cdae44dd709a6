#!/usr/bin/env bash
# MedLoc-R1's experiment on ONE 24 GB GPU: Qwen2.5-VL-3B with adapters. Never run on a GPU by us.
#
# The paper trains all weights on 4 x 80 GB; that does not fit here. Adapters of rank 64 in the decoder, one frozen bf16
# copy of the weights that is policy, actor and reference at once. Adapters take a larger learning rate than whole weights:
# 1e-5 is a guess, the paper's is 1e-6.
#
# ESTIMATED memory, runtime/plan.py's arithmetic (GB = 2^30 bytes): the peak is 14.7 GB, with the 8 prompts
# of a step in one pass and activations recomputed, which is what a run chooses on a GPU that has 24 GB to spare:
#   python train_grpo.py --estimate --device=cuda --memory=24GB --recipe=paper --model=FOLDER \
#     --lora-rank=64 --batch-size=8 --max-tokens=256 --max-pixels=401408
#
# A checkpoint is about 16 GB: five of them in 500 steps, or fewer with --keep.
#
#   MODEL   a folder with Qwen2.5-VL-3B-Instruct         TRAIN, VAL   records (README: "Your own images")
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # MODEL, TRAIN and VAL are relative to where you are

python "$here/train_grpo.py" --schedule=medloc --recipe=paper \
  --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" --data="${TRAIN:-train.jsonl}" --val="${VAL:-val.jsonl}" \
  --out="${OUT:-out-medloc-3b}" \
  --lora-rank=64 --lr=1e-5 \
  --batch-size=8 --max-tokens=256 --max-pixels=401408 \
  --steps=500 --eval-every=100 --save-every=100
