"""Texts against texts: tokens, the thought in an answer, sentence BLEU."""

import math
import re
from collections import Counter

THOUGHT = re.compile(r"<think>(.*?)(?:</think>|(?=<answer>)|\Z)", re.DOTALL)
WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")  # a word with its hyphens and apostrophes


def tokens(text: str) -> list[str]:
    """Its words, in small letters; punctuation is none of them."""
    return WORD.findall(text.casefold())


def thought(text: str) -> str:
    """What stands in the <think> of an answer, up to its end, the <answer> or the text's; of several all, so that a
    second one hides nothing. "" if there is none."""
    return " ".join(THOUGHT.findall(text)).strip()


def sentence_bleu(hypothesis: list[str], reference: list[str], n: int = 4) -> float:
    """BLEU (Papineni et al., 2002) of one sentence of tokens against one reference, in [0, 1].

    The orders from 2 on have 1 added to matches and to counts (Lin and Och, 2004), so that a short sentence without a
    common 4-gram is not 0; without one common word it is. It is sacrebleu's with smooth_method="add-k", smooth_value=1.
    """
    if not hypothesis or not reference or not set(hypothesis) & set(reference):
        return 0.0
    logs = 0.0
    for order in range(1, n + 1):
        found, there = (Counter(zip(*(x[i:] for i in range(order)), strict=False)) for x in (hypothesis, reference))
        matches, count = (found & there).total(), found.total()
        added = order > 1
        logs += math.log((matches + added) / (count + added)) / n
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(logs + brevity)
