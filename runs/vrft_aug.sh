#!/usr/bin/env bash
# VRFT-Aug (arXiv 2602.10619) on ONE 80 GB GPU: Qwen2.5-VL-3B finds lesions first and names them then. Never run on a GPU by us.
#
# Neither code nor body text of the paper is known to us: that boxes earn their raw IoU, that the reference of the second stage is the
# first one's policy, lengths and weights are our reading (tasks/label.py, knowledge.py, text.py say what else is assumed).
#
# ESTIMATED memory as in runs/medloc_3b_1x80.sh, 69.7 GB; knowledge makes prompts longer, --estimate with your --data says by how much.
# A checkpoint is about 40 GB: four of them in all.
#
#   MODEL                 a folder with Qwen2.5-VL-3B-Instruct
#   BOXES, BOXES_VAL      records with boxes (README: "Your own images"), of the same kind of pictures
#   LABELS, LABELS_VAL    records of the task label or grade (runs/README.md: "Labels and grades")
#   KNOWLEDGE             {dataset or "*": {option: sentence}}
#
# What to compare it with: the second stage from MODEL itself, with --steps=1000; without --knowledge and recite; with
# --knowledge=FILE.json:lines=shuffled. Grades instead of labels: --tasks grade:ordinal=... is their reward.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # all of these are relative to where you are
out=${OUT:-out-vrft-aug}
common=(--recipe=paper --schedule=raw --freeze-vision --batch-size=8 --max-tokens=512 --max-pixels=401408
  --steps=500 --eval-every=100 --save-every=250)

python "$here/train_grpo.py" "${common[@]}" --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" \
  --data="${BOXES:-boxes.jsonl}" --val="${BOXES_VAL:-boxes-val.jsonl}" --out="$out-boxes"

python "$here/train_grpo.py" "${common[@]}" --model="$out-boxes/step-000500" \
  --data="${LABELS:-labels.jsonl}" --val="${LABELS_VAL:-labels-val.jsonl}" --out="$out" \
  --knowledge="${KNOWLEDGE:-knowledge.json}" --rewards=task=1,format=1,recite=-.5,thought=0
