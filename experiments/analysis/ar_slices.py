"""Perplexity on associative-recall hits (Zoology: Measuring and Improving Recall in Efficient Language Models, 2024).

A token is a hit when it completes a bigram that has occurred earlier in the same row: a model can predict it by recall.
A frequent bigram it can also know by heart; recall shows on the hits whose bigram is rare in the training data.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["associative_recall_hits", "bigram_counts", "perplexity_by_slice"]


def _bigrams(tokens: Int[np.ndarray, "... T"]) -> Int[np.ndarray, "... T-1"]:
    """One integer for each pair of neighbours."""
    tokens = np.asarray(tokens, np.int64)
    return tokens[..., :-1] << 32 | tokens[..., 1:]


def associative_recall_hits(tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Whether the bigram (x[t-1], x[t]) ends at some earlier position of the row too; False at t = 0.

    Cost: O(T log T) a row.
    """
    bigrams = _bigrams(tokens)
    order = np.argsort(bigrams, axis=1, kind="stable")  # Equal bigrams in the order of their positions.
    ordered = np.take_along_axis(bigrams, order, axis=1)
    hits = np.zeros(np.shape(tokens), bool)
    np.put_along_axis(hits, order[:, 1:] + 1, ordered[:, 1:] == ordered[:, :-1], axis=1)
    return hits


def bigram_counts(tokens: Int[np.ndarray, "B T"], train_tokens: Int[np.ndarray, "N"]) -> Int[np.ndarray, "B T"]:
    """How often the bigram (x[t-1], x[t]) occurs in ``train_tokens``; 0 at t = 0, where there is none."""
    known, counts = np.unique(_bigrams(train_tokens), return_counts=True)
    bigrams = _bigrams(tokens)
    result = np.zeros(np.shape(tokens), np.int64)
    if known.size:
        place = np.minimum(np.searchsorted(known, bigrams), known.size - 1)
        result[:, 1:] = np.where(known[place] == bigrams, counts[place], 0)
    return result


def perplexity_by_slice(
    nll: Float[np.ndarray, "B T"],
    hits: Bool[np.ndarray, "B T"],
    train_bigram_counts: Int[np.ndarray, "B T"] | None = None,
    *,
    threshold: int = 1250,
) -> dict[str, float]:
    """Perplexity on the hits that are rare in training, and on the rest.

    Args:
      nll: negative log likelihood of each token in nats.
      hits: from ``associative_recall_hits``, for the same tokens.
      train_bigram_counts: from ``bigram_counts``; None takes all hits.
      threshold: a bigram is rare if it occurs less often than this.

    Returns:
      ``recall`` and ``other``, perplexities (nan for an empty slice), and ``recall_fraction`` of the tokens.

    Raises:
      ValueError: if the shapes differ, or there is no token.
    """
    shapes = [np.shape(a) for a in (nll, hits, train_bigram_counts) if a is not None]
    if len(set(shapes)) > 1 or not np.size(nll):
        raise ValueError(f"perplexity_by_slice: arrays of one shape with at least one token are needed, got {shapes}")
    nll = np.asarray(nll, np.float64)
    recall = np.asarray(hits, bool)
    if train_bigram_counts is not None:
        recall = recall & (np.asarray(train_bigram_counts) < threshold)

    def perplexity(mask: np.ndarray) -> float:
        return float(np.exp(nll[mask].mean())) if mask.any() else float("nan")

    return {"recall": perplexity(recall), "other": perplexity(~recall), "recall_fraction": float(recall.mean())}
