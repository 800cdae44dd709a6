#!/usr/bin/env bash
# MedLoc-R1's experiment on ONE 80 GB GPU: Qwen2.5-VL-3B, the whole decoder. Never run on a GPU by us.
#
# By arithmetic: 3.1 G trained parameters in fp32 with gradient and AdamW's moments 50 GB, the frozen vision tower 2.7 GB,
# bf16 copies for rollout and reference 15 GB; 67 GB before activations, which are recomputed. Too tight? --beta=0 frees
# 7.5 GB, runs/medloc_3b_1x24.sh needs far less.
#
# A checkpoint is about 40 GB and none is removed: five of them in 500 steps.
#
#   MODEL   a folder with Qwen2.5-VL-3B-Instruct         TRAIN, VAL   records (README: "Your own images")
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # MODEL, TRAIN and VAL are relative to where you are

python "$here/train_grpo.py" --schedule=medloc --recipe=paper \
  --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" --data="${TRAIN:-train.jsonl}" --val="${VAL:-val.jsonl}" \
  --out="${OUT:-out-medloc-3b}" \
  --freeze-vision --checkpointing \
  --batch-size=8 --micro-batch=1 --max-tokens=512 --max-pixels=401408 \
  --steps=500 --eval-every=100 --save-every=100
