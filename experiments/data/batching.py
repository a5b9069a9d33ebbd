"""Batches as pure functions of (seed, step): endless for training, a fixed list for evaluation.

The state of a training iterator is the number of the next step, so a run resumes exactly from any of them.
"""

import sys
from collections.abc import Mapping
from functools import lru_cache

import grain
import numpy as np

__all__ = ["Batch", "fixed_batches", "shuffled_indices"]

Batch = dict[str, np.ndarray]


def shuffled_indices(
    length: int, batch_size: int, *, seed: int, shard_index: int = 0, shard_count: int = 1
) -> grain.MapDataset:
    """Endless batches of example numbers that visit ``range(length)`` in a new random order in every epoch.

    Map it to batches of examples. An element is a whole batch of numbers, because gathering a batch at once is many
    times faster than a dataset of single examples. Batches run across the border of epochs; all have the same size.

    Args:
      length: number of examples in an epoch.
      batch_size: examples in a batch, over all shards together.
      seed: seed of the orders; not negative.
      shard_index, shard_count: this process takes examples ``shard_index::shard_count`` of every batch, so that the
        shards of step n together are batch n of a single process.

    Returns:
      A dataset whose element n, for step n, is ``(epochs, indices)``, two int64 [B] arrays.

    Raises:
      ValueError: if a size, the seed or the shard is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} is not from 0 to shard_count-1={shard_count - 1}")
    if batch_size % shard_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of shard_count={shard_count}")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(length)

    def draw(step: int) -> tuple[np.ndarray, np.ndarray]:
        draws = np.arange(step * batch_size + shard_index, (step + 1) * batch_size, shard_count)
        epochs, positions = np.divmod(draws, length)
        indices = [order(int(epoch))[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        return epochs, np.concatenate(indices)

    return grain.MapDataset.range(sys.maxsize).map(draw)


def fixed_batches(examples: Mapping[str, np.ndarray], batch_size: int) -> list[Batch]:
    """Cut arrays with equal first axes into batches of one size, so that a jitted step compiles once.

    Examples beyond the last whole batch are left out; fewer than ``batch_size`` examples are one smaller batch.
    """
    length = len(next(iter(examples.values())))
    size = min(batch_size, length)
    return [
        {name: array[start : start + size] for name, array in examples.items()}
        for start in range(0, length - size + 1, size)
    ]
