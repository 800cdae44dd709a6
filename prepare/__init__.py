"""Public datasets and the common annotation formats -> our JSONL; see README.md in this folder."""
