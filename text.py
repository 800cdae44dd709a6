"""Texts against texts: tokens, the thought in an answer, and how close a caption is to its references.

    sentence_bleu rouge_l meteor_exact chrf     of one answer, in [0, 1]
    TfIdf(corpus).cosine                        by the weights of a corpus's words, in [0, 1]
    cider_d                                     of a whole set of answers, whose references weigh the words, 0 to 10
    soda                                        of events in time with their captions, in [0, 1]

Words are tokens(): no stemming, no synonyms, so what METEOR calls its exact stage is all of it here, and named so.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Words = list[str]
Event = tuple[float, float, str]  # start and end in seconds, caption

THOUGHT = re.compile(r"<think>(.*?)(?:</think>|(?=<answer>)|\Z)", re.DOTALL)
WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")  # a word with its hyphens and apostrophes


def tokens(text: str) -> Words:
    """Its words, in small letters; punctuation is none of them."""
    return WORD.findall(text.casefold())


def thought(text: str) -> str:
    """What stands in the <think> of an answer, up to its end, the <answer> or the text's; of several all, so that a
    second one hides nothing. "" if there is none."""
    return " ".join(THOUGHT.findall(text)).strip()


def sentence_bleu(hypothesis: Words, reference: Words, n: int = 4) -> float:
    """BLEU (Papineni et al., 2002) of one sentence of tokens against one reference, in [0, 1].

    The orders from 2 on have 1 added to matches and to counts (Lin and Och, 2004), so that a short sentence without a
    common 4-gram is not 0; without one common word it is. It is sacrebleu's with smooth_method="add-k", smooth_value=1.
    """
    if not hypothesis or not reference or not set(hypothesis) & set(reference):
        return 0.0
    logs = 0.0
    for order in range(1, n + 1):
        found, there = ngrams(hypothesis, order), ngrams(reference, order)
        matches, count = (found & there).total(), found.total()
        added = order > 1
        logs += math.log((matches + added) / (count + added)) / n
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(logs + brevity)


def ngrams(items: Sequence, n: int) -> Counter:
    return Counter(zip(*(items[i:] for i in range(n)), strict=False))


def rouge_l(hypothesis: Words, reference: Words) -> float:
    """F1 of the longest common subsequence (Lin, 2004; both weights alike, as the package rouge-score)."""
    row = [0] * (len(reference) + 1)
    for word in hypothesis:
        before = 0  # of the row above, one column back
        for j, other in enumerate(reference, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(hypothesis) + len(reference)) if row[-1] else 0.0


def meteor_exact(hypothesis: Words, reference: Words) -> float:
    """METEOR's exact stage alone (Banerjee and Lavie, 2005): F = 10 P R / (R + 9 P) of the words that are equal, less
    .5 (chunks / matches)^3. Neither stems nor synonyms: NOT METEOR, and below it.

    Words are matched from left to right: where the last match goes on if it does, else where most words run on.
    """
    places: dict[str, list[int]] = {}
    for j, word in enumerate(reference):
        places.setdefault(word, []).append(j)
    matches, chunks, last = 0, 0, -2
    for i, word in enumerate(hypothesis):
        free = places.get(word)
        if not free:
            last = -2
            continue
        if last + 1 in free:
            last += 1
        else:
            chunks += 1
            last = max(free, key=lambda j, i=i: (_run(hypothesis[i:], reference[j:]), -j))
        free.remove(last)
        matches += 1
    if not matches:
        return 0.0
    p, r = matches / len(hypothesis), matches / len(reference)
    return 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matches) ** 3)


def _run(a: Words, b: Words) -> int:
    """Words that are equal from the beginning on."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chrf(hypothesis: str, reference: str, order: int = 6, beta: float = 2.0) -> float:
    """F of character n-grams (Popovic, 2015), blanks left out, case folded: sacrebleu's chrF2 / 100. Precision and
    recall are means over the orders that both texts have."""
    a, b = ("".join(text.casefold().split()) for text in (hypothesis, reference))
    precision = recall = 0.0
    orders = min(order, len(a), len(b))
    for n in range(1, orders + 1):
        found, there = ngrams(a, n), ngrams(b, n)
        matches = (found & there).total()
        precision, recall = precision + matches / found.total(), recall + matches / there.total()
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall) / orders


class TfIdf:
    """Words weighed by how few texts of a corpus have them: log((1 + texts) / (1 + texts with it)) + 1."""

    def __init__(self, corpus: Iterable[Words]):
        texts = [set(words) for words in corpus]
        self.count, self.having = len(texts), Counter(word for words in texts for word in words)

    def vector(self, words: Words) -> dict[str, float]:
        """Of length 1; {} of no words."""
        weighed = {w: n * (math.log((1 + self.count) / (1 + self.having[w])) + 1) for w, n in Counter(words).items()}
        length = math.sqrt(sum(x * x for x in weighed.values()))
        return {word: x / length for word, x in weighed.items()}

    def cosine(self, hypothesis: Words, reference: Words) -> float:
        a, b = self.vector(hypothesis), self.vector(reference)
        return min(sum(x * b.get(word, 0.0) for word, x in a.items()), 1.0)


def cider_d(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D (Vedantam et al., 2015), 0 to 10, of each answer against its references: clipped cosine of TF-IDF
    vectors of n-grams, n = 1 .. 4, times exp(-(difference of lengths)^2 / (2 sigma^2)).

    How frequent an n-gram is, is counted over the references of these very answers, each answer's taken together: one
    answer alone has 0, and figures of different sets cannot be compared.
    """
    scores = [0.0] * len(hypotheses)
    for n in range(1, 5):
        having = Counter(gram for own in references for gram in {g for words in own for g in ngrams(words, n)})

        def vector(words: Words, n=n, having=having) -> tuple[dict, float]:
            counts = ngrams(words, n)
            weighed = {g: c * math.log(len(references) / max(having[g], 1)) for g, c in counts.items()}
            return weighed, math.sqrt(sum(x * x for x in weighed.values()))

        for i, (words, own) in enumerate(zip(hypotheses, references, strict=True)):
            a, a_length = vector(words)
            for reference in own:
                b, b_length = vector(reference)
                if a_length and b_length:
                    common = sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b) / (a_length * b_length)
                    far = len(words) - len(reference)
                    scores[i] += 10 / 4 / len(own) * common * math.exp(-far * far / (2 * sigma * sigma))
    return scores


def temporal_iou(a: Sequence, b: Sequence) -> float:
    """Of two stretches of time [start, end, ...], in seconds; 0 where both are the same single moment."""
    common, whole = min(a[1], b[1]) - max(a[0], b[0]), max(a[1], b[1]) - min(a[0], b[0])
    return common / (a[1] - a[0] + b[1] - b[0] - common) if common > 0 and whole > 0 else 0.0


def soda(found: Sequence[Event], true: Sequence[Event], score: Callable[[Words, Words], float] = meteor_exact) -> float:
    """SODA_c (Fujita et al., 2020) of one clip's events: F1 of sum / found and sum / true, where the sum of temporal
    IoU x score of captions is the largest that a matching in the order of time has. 1 where neither has any."""
    if not found or not true:
        return float(not found and not true)
    found, true = (sorted(events, key=lambda event: event[:2]) for events in (found, true))
    said, meant = ([tokens(event[2]) for event in events] for events in (found, true))
    best = [0.0] * (len(true) + 1)
    for i, event in enumerate(found):
        before = 0.0
        for j, other in enumerate(true, 1):
            iou = temporal_iou(event, other)
            worth = before + (iou * score(said[i], meant[j - 1]) if iou else 0.0)
            before, best[j] = best[j], max(best[j], best[j - 1], worth)
    return 2 * best[-1] / (len(found) + len(true))
