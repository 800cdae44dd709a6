#!/usr/bin/env bash
# VRFT-Aug (arXiv 2602.10619) on ONE 80 GB GPU: Qwen2.5-VL-3B, boxes first, then labels. Never run on a GPU by us.
#
# Its four parts, each a flag: localisation before classification (the second run begins with the first one's policy, and
# its KL is to that one), knowledge in the prompt (--knowledge), fuzzy ordinal reward (records of task "grade"; --tasks),
# recitation (a negative weight: reciting the block is punished, which generalises better, as notes on the paper say). By its
# reviews no run of the paper combines all of them, and its text was not at hand: steps, weights, pairs of data are our guess.
#
#   MODEL       a folder with Qwen2.5-VL-3B-Instruct
#   BOXES       records of boxes, LABELS of labels or grades, of the same pictures where there are masks: python -m
#   VAL_BOXES   prepare.ham10000 and prepare.labels, or prepare.busi, which writes both
#   VAL_LABELS
#   KNOWLEDGE   {"*": {"melanoma": "irregular border, several colours", ...}}: a sentence for every option
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)  # the files are relative to where you are
out="${OUT:-out-vrft-aug}"

python "$here/train_grpo.py" --schedule=raw --recipe=paper \
  --model="${MODEL:-Qwen2.5-VL-3B-Instruct}" --data="${BOXES:-train.jsonl}" --val="${VAL_BOXES:-val.jsonl}" \
  --out="$out/boxes" \
  --freeze-vision --batch-size=8 --max-tokens=512 --max-pixels=401408 \
  --steps=300 --eval-every=100 --keep=1

python "$here/train_grpo.py" --schedule=raw --recipe=paper \
  --model="$out/boxes/step-000300" --data="${LABELS:-labels-train.jsonl}" --val="${VAL_LABELS:-labels-val.jsonl}" \
  --out="$out/labels" \
  --knowledge="${KNOWLEDGE:-knowledge.json}" --rewards=task=1,format=1,recite=-.5,thought=0 \
  --freeze-vision --batch-size=8 --max-tokens=512 --max-pixels=401408 \
  --steps=500 --eval-every=100 --keep=2
