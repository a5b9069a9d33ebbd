import itertools
import math
from collections import Counter

import numpy as np
import pytest

from manyheads.experiments.analysis.ar_slices import associative_recall_hits, bigram_counts, perplexity_by_slice


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("vocab", [1, 3, 60_000])
def test_hits_are_repeated_bigrams(length, vocab, rng):
    tokens = rng.integers(vocab, size=(20, length))
    expected = np.zeros(tokens.shape, bool)
    for row, result in zip(tokens.tolist(), expected):
        for t in range(1, length):
            result[t] = (row[t - 1], row[t]) in itertools.pairwise(row[:t])
    np.testing.assert_array_equal(associative_recall_hits(tokens), expected)


def test_hits_by_hand():
    assert associative_recall_hits(np.array([[1, 2, 1, 2, 1], [5, 5, 5, 2, 1]])).tolist() == [
        [False, False, False, True, True],
        [False, False, True, False, False],
    ]


@pytest.mark.parametrize("train_length", [0, 1, 500])
def test_bigram_counts(train_length, rng):
    train, tokens = rng.integers(6, size=train_length), rng.integers(8, size=(4, 30)).astype(np.uint16)
    counts = Counter(zip(train[:-1].tolist(), train[1:].tolist()))
    expected = [[0] + [counts[pair] for pair in itertools.pairwise(row)] for row in tokens.tolist()]
    np.testing.assert_array_equal(bigram_counts(tokens, train), expected)


def test_perplexity_by_slice():
    nll = np.log([[2.0, 8.0, 3.0, 3.0, 5.0]])
    hits = np.array([[True, True, False, False, True]])
    result = perplexity_by_slice(nll, hits)
    assert result == pytest.approx({"recall": 80 ** (1 / 3), "other": 3.0, "recall_fraction": 0.6})
    counts = np.array([[1249, 0, 0, 2000, 1250]])
    result = perplexity_by_slice(nll, hits, counts)
    assert result == pytest.approx({"recall": 4.0, "other": 45 ** (1 / 3), "recall_fraction": 0.4})
    result = perplexity_by_slice(nll, hits, counts, threshold=0)
    assert math.isnan(result["recall"]) and result["recall_fraction"] == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="arrays of one shape"):
        perplexity_by_slice(np.zeros((1, 4)), np.zeros((1, 5), bool))
    with pytest.raises(ValueError, match="at least one token"):
        perplexity_by_slice(np.zeros((0, 4)), np.zeros((0, 4), bool))
