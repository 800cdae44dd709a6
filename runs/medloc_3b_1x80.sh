#!/usr/bin/env bash
# MedLoc-R1's experiment on ONE 80 GB GPU: Qwen2.5-VL-3B, the whole decoder. Never run on a GPU by us.
#
# ESTIMATED memory, runtime/plan.py's arithmetic (GB = 2^30 bytes): 51 GB are always there, the peak is 69.7 GB, with the 8 prompts
# of a step in one pass and activations recomputed, which is what a run chooses on a GPU that has 80 GB to spare:
#   python train_grpo.py --estimate --device=cuda --memory=80GB --recipe=paper --model=FOLDER \
#     --freeze-vision --batch-size=8 --max-tokens=512 --max-pixels=401408
# Too tight? --beta=0 frees 7 GB, runs/medloc_3b_1x24.sh needs far less.
#
# A checkpoint is about 40 GB: five of them in 500 steps, or fewer with --keep.
#
#   MODEL   a folder with Qwen2.5-VL-3B-Instruct         TRAIN, VAL   records (README: "Your own images")
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # MODEL, TRAIN and VAL are relative to where you are

python "$here/train_grpo.py" --schedule=medloc --recipe=paper \
  --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" --data="${TRAIN:-train.jsonl}" --val="${VAL:-val.jsonl}" \
  --out="${OUT:-out-medloc-3b}" \
  --freeze-vision \
  --batch-size=8 --max-tokens=512 --max-pixels=401408 \
  --steps=500 --eval-every=100 --save-every=100
