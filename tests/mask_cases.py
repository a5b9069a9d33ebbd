"""What the tests of masks share: random structured masks, and masks pair by pair."""

import numpy as np

from manyheads.pallas_kernels.masks import And, Causal, FirstKeys, Or, SlidingWindow

ROWS = 3


def random_offset(rng):
    """One for all rows of the batch, or one a row."""
    return int(rng.integers(-20, 20)) if rng.random() < 0.5 else rng.integers(-20, 20, ROWS)


def random_mask(rng, depth=2):
    """Any mask of ``pallas_kernels.masks``, composed up to ``depth`` times."""
    kind = rng.integers(5 if depth else 3)
    if kind == 0:
        return Causal(random_offset(rng))
    if kind == 1:
        return SlidingWindow(int(rng.integers(1, 20)), random_offset(rng))
    if kind == 2:
        return FirstKeys(int(rng.integers(0, 30)))
    return (And, Or)[kind - 3](random_mask(rng, depth - 1), random_mask(rng, depth - 1))


def pairs(mask, b, q, k):
    """The mask over queries q[0]..q[1] and keys k[0]..k[1], both included."""
    queries, keys = (np.arange(low, high + 1) for low, high in (q, k))
    return np.asarray(mask(b, 0, queries[:, None], keys[None, :]))
