"""text.py against the libraries that define these scores, or against every possibility counted out."""

import itertools
import math
import random

import numpy as np
import pytest

from text import TfIdf, chrf, cider_d, meteor_exact, ngrams, rouge_l, soda, temporal_iou, tokens

LESIONS = "a small round brown lesion in the upper left", "a large lobed blue lesion in the lower right"
TEXTS = (
    *LESIONS, "The hook dissects the gallbladder.", "the the the", "", "L'Étude: 3.5 mm, non-malignant", "a",
    "皮肤病变", "The grasper retracts the gallbladder while the hook dissects the gallbladder from the liver bed.",
)  # fmt: skip


def drawn(seed: int, count: int, words: str = "abcd", longest: int = 6) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.choices(words, k=rng.randint(1, longest)) for _ in range(count)]


def test_chrf_is_sacrebleus():
    chrF = pytest.importorskip("sacrebleu.metrics").CHRF
    theirs = chrF(lowercase=True)
    for a, b in itertools.product(TEXTS, TEXTS):
        assert 100 * chrf(a, b) == pytest.approx(theirs.sentence_score(a, [b]).score, abs=1e-6), (a, b)


def test_the_cosine_is_scikit_learns():
    learn = pytest.importorskip("sklearn.feature_extraction.text")
    corpus = [text for text in TEXTS if text]
    theirs = learn.TfidfVectorizer(tokenizer=tokens, lowercase=False, token_pattern=None)
    vectors = theirs.fit_transform(corpus).toarray()
    ours = TfIdf(map(tokens, corpus))
    found = [[ours.cosine(tokens(a), tokens(b)) for b in corpus] for a in corpus]
    np.testing.assert_allclose(found, vectors @ vectors.T, atol=1e-12)
    assert ours.cosine([], tokens("a")) == ours.cosine(tokens("a"), []) == 0.0
    # a word that no reference has still makes an answer longer: babble is not free
    assert ours.cosine(tokens("hook xyzzy"), tokens("hook")) < ours.cosine(tokens("hook"), tokens("hook"))


def test_rouge_l_is_that_of_every_subsequence():
    def longest(a, b):
        def within(part, rest):
            rest = iter(rest)
            return all(word in rest for word in part)

        return max(n for n in range(len(a) + 1) for part in itertools.combinations(a, n) if within(part, b))

    for a, b in itertools.product(drawn(0, 12), drawn(1, 12)):
        common = longest(a, b)
        p, r = common / len(a), common / len(b)
        assert rouge_l(a, b) == pytest.approx(2 * p * r / (p + r) if common else 0.0)
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == 0.0 and rouge_l(["a"], ["a"]) == 1.0


def test_rouge_l_is_googles():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for a, b in itertools.product(LESIONS, TEXTS[:4]):
        assert rouge_l(tokens(a), tokens(b)) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


def alignments(a, b):
    """Every one-to-one alignment of equal words with as many matches as there can be -> (matches, chunks)."""
    most = sum((ngrams(a, 1) & ngrams(b, 1)).values())
    choices = [[j for j, other in enumerate(b) if other == word] + [None] for word in a]
    for chosen in itertools.product(*choices):
        pairs = [(i, j) for i, j in enumerate(chosen) if j is not None]
        if len(pairs) == most and len({j for _, j in pairs}) == most:
            yield most, sum(n == 0 or (pairs[n - 1][0] + 1, pairs[n - 1][1] + 1) != p for n, p in enumerate(pairs))


def test_meteor_exact_is_the_formula_over_all_alignments():
    """Of words that occur once there is one alignment; of others ours has all matches, and nearly always the fewest
    chunks, never fewer."""

    def formula(a, b, matches, chunks):
        p, r = matches / len(a), matches / len(b)
        return 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matches) ** 3)

    rng, best, pairs = random.Random(3), 0, 0
    for _ in range(60):
        a, b = (rng.sample("abcdefgh", rng.randint(1, 6)) for _ in range(2))
        ((matches, chunks),) = alignments(a, b)
        assert meteor_exact(a, b) == pytest.approx(formula(a, b, matches, chunks) if matches else 0.0)
    for a, b in itertools.product(drawn(4, 12), drawn(5, 12)):
        matches, chunks = min(alignments(a, b))
        value = meteor_exact(a, b)
        if matches:
            assert value <= formula(a, b, matches, chunks) + 1e-12 and value >= formula(a, b, matches, matches) - 1e-12
            best, pairs = best + math.isclose(value, formula(a, b, matches, chunks)), pairs + 1
    assert best / pairs > 0.9
    words = tokens("the cat sat on the mat")
    assert meteor_exact(words, words) == pytest.approx(1 - 0.5 * (1 / 6) ** 3)  # the paper's own kind of example
    assert meteor_exact([], words) == meteor_exact(words, []) == 0.0


def test_cider_d_is_the_dense_formula():
    """The definition, as vectors over all n-grams; and the library where there is one."""
    hypotheses = [*map(tokens, TEXTS[:4]), *drawn(6, 6), []]
    references = [[tokens(LESIONS[0])], [tokens(LESIONS[0]), tokens(LESIONS[1])], [tokens(TEXTS[8])], [tokens("the")]]
    references += [drawn(i, 1 + i % 2) for i in range(7)]

    def dense(words, own):
        total = 0.0
        for n in range(1, 5):
            grams = sorted({g for texts in references for text in texts for g in ngrams(text, n)} | {*ngrams(words, n)})
            df = np.array([sum(any(g in ngrams(t, n) for t in texts) for texts in references) for g in grams])
            idf = np.log(len(references)) - np.log(np.maximum(df, 1))
            a = np.array([ngrams(words, n)[g] for g in grams]) * idf
            for text in own:
                b = np.array([ngrams(text, n)[g] for g in grams]) * idf
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                if lengths:
                    gauss = np.exp(-((len(words) - len(text)) ** 2) / 72)
                    total += 10 * (np.minimum(a, b) * b).sum() / lengths * gauss / len(own) / 4
        return total

    found = cider_d(hypotheses, references)
    np.testing.assert_allclose(found, [dense(w, own) for w, own in zip(hypotheses, references, strict=True)])
    same = cider_d([r[0] for r in references[:3:2]], [r[:1] for r in references[:3:2]])
    np.testing.assert_allclose(same, 10.0)  # its own reference, if it has four words
    assert cider_d([["a"]], [[["a"]]]) == [0.0] and cider_d([], []) == []


def test_cider_d_is_pycocoevalcaps():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer()
    rows = [
        (" ".join(tokens(text)), [" ".join(tokens(other))]) for text, other in zip(TEXTS[:4], TEXTS[1:5], strict=True)
    ]
    for row in rows:
        scorer += row
    ours = cider_d([a.split() for a, _ in rows], [[r.split() for r in refs] for _, refs in rows])
    np.testing.assert_allclose(ours, scorer.compute_score()[1], atol=1e-9)


def test_soda_is_the_best_of_all_matchings_in_order():
    rng = random.Random(7)

    def events(count):
        starts = sorted(rng.uniform(0, 9) for _ in range(count))
        return [(s, s + rng.uniform(0.5, 5), " ".join(rng.choices("abc", k=3))) for s in starts]

    for _ in range(20):
        found, true = events(rng.randint(1, 4)), events(rng.randint(1, 4))
        worth = [[temporal_iou(a, b) * meteor_exact(a[2].split(), b[2].split()) for b in true] for a in found]
        most = max(
            sum(worth[i][j] for i, j in zip(rows, columns, strict=True))
            for n in range(min(len(found), len(true)) + 1)
            for rows in itertools.combinations(range(len(found)), n)
            for columns in itertools.combinations(range(len(true)), n)
        )
        p, r = most / len(found), most / len(true)
        expected = 2 * p * r / (p + r) if most else 0.0
        assert soda(found, true) == pytest.approx(expected) == pytest.approx(soda(found[::-1], true))
    assert soda([], []) == 1.0 and soda([], events(1)) == soda(events(2), []) == 0.0
    assert temporal_iou((0, 4), (2, 6)) == pytest.approx(1 / 3) and temporal_iou((1, 1), (1, 1)) == 0.0
    assert temporal_iou((0, 1), (2, 3)) == 0.0 and temporal_iou((2, 5), (2, 5)) == 1.0
