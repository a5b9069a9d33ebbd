"""Multi-query associative recall (Zoology: Measuring and Improving Recall in Efficient Language Models, 2024).

A sequence lists K pairs and then asks for each of them once::

    inputs  k1 v1 k2 v2 ... kK vK   0   k2  0   0   0   k1  0 ...
    labels   .  .  .  . ...  .  .   .   v2  .   .   .   v1  . ...

Keys are K distinct tokens of {1 .. V/2-1}, values K distinct tokens of {V/2 .. V-1}. The tail of L - 2K positions has
(L - 2K)/2 slots of two positions; key i is asked at the first position of slot g_i, and K distinct slots are drawn one
after the other with probability p(g) ~ a g^(a-1), g = 1, 2, ...: the smaller the power a, the sooner the query, and
a = 1 is uniform. The label stands at the position of the query, where the model predicts the token that would come
next. All other labels are ``IGNORE``.
"""

from dataclasses import dataclass

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from manyheads.experiments.data.batching import Batch, fixed_batches, shuffled_indices

__all__ = ["IGNORE", "MQARData", "mqar_batch", "mqar_batch_jax"]

IGNORE = -100


def _check(vocab_size: int, length: int, pairs: int, power: float) -> None:
    if pairs < 1:
        raise ValueError(f"pairs={pairs} must be positive")
    if 4 * pairs > length:
        raise ValueError(f"pairs={pairs} is more than a quarter of {length=}")
    if vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size} must be greater than {length=}")
    if not power > 0:
        raise ValueError(f"power={power} must be positive")


def _slot_log_weights(length: int, pairs: int, power: float) -> Float[np.ndarray, "slots"]:
    """log g^(a-1) for the slots g = 1, 2, ...; the factor a cancels when they are normalised."""
    return (power - 1) * np.log(np.arange(1, (length - 2 * pairs) // 2 + 1))


def _distinct(rng: np.random.Generator, low: int, high: int, shape: tuple[int, int]) -> Int[np.ndarray, "B K"]:
    """Rows of distinct integers from [low, high), in random order.

    Floyd's algorithm, on all rows at once: memory for the result, not for the range.
    """
    batch, count = shape
    chosen = np.full(shape, -1)
    for i, last in enumerate(range(high - low - count, high - low)):
        draw = rng.integers(last + 1, size=batch)
        seen = (chosen == draw[:, None]).any(axis=1)
        chosen[:, i] = np.where(seen, last, draw)
    return low + rng.permuted(chosen, axis=1)


def mqar_batch(
    rng: np.random.Generator | int,
    batch: int,
    *,
    vocab_size: int = 256,
    length: int = 64,
    pairs: int = 8,
    power: float = 0.01,
    random_non_queries: bool = False,
) -> dict[str, Int[np.ndarray, "B L"]]:
    """Draw a batch of sequences with NumPy.

    Args:
      rng: a generator, or a seed for one.
      batch: number of sequences, B.
      vocab_size: V, greater than ``length``.
      length: L.
      pairs: K, at most a quarter of ``length``.
      power: a, the exponent of the distribution of the gaps.
      random_non_queries: fill the empty positions of the tail with random tokens of the whole vocabulary instead of 0.
        By chance some of them are keys; they have no label.

    Returns:
      ``{"inputs", "labels"}``, int32 [B, L].

    Raises:
      ValueError: if the sizes do not fit together.
    """
    _check(vocab_size, length, pairs, power)
    rng = np.random.default_rng(rng)
    keys = _distinct(rng, 1, vocab_size // 2, (batch, pairs))
    values = _distinct(rng, vocab_size // 2, vocab_size, (batch, pairs))
    # The largest K of log p + Gumbel noise are K draws without replacement, in their order.
    log_weights = _slot_log_weights(length, pairs, power)
    slots = np.argsort(-(log_weights + rng.gumbel(size=(batch, len(log_weights)))), axis=1)[:, :pairs]
    queries = 2 * pairs + 2 * slots

    inputs = np.zeros((batch, length), np.int32)
    if random_non_queries:
        inputs[:] = rng.integers(vocab_size, size=inputs.shape)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    labels = np.full((batch, length), IGNORE, np.int32)
    np.put_along_axis(inputs, queries, keys, axis=1)
    np.put_along_axis(labels, queries, values, axis=1)
    return {"inputs": inputs, "labels": labels}


def mqar_batch_jax(
    key: PRNGKeyArray,
    batch: int,
    *,
    vocab_size: int = 256,
    length: int = 64,
    pairs: int = 8,
    power: float = 0.01,
    random_non_queries: bool = False,
) -> dict[str, Int[Array, "B L"]]:
    """Draw a batch inside jit: the distribution, arguments and result of ``mqar_batch``, from a JAX key.

    All arguments but ``key`` are static.
    """
    _check(vocab_size, length, pairs, power)
    key_rng, value_rng, slot_rng, fill_rng = jax.random.split(key, 4)

    def draw(rng: PRNGKeyArray, log_weights: Float[np.ndarray, "N"]) -> Int[Array, "B K"]:
        """K of N without replacement, in the order of the draws: the largest K of log p + Gumbel noise."""
        noise = jax.random.gumbel(rng, (batch, len(log_weights)))
        return jax.lax.top_k(noise + jnp.asarray(log_weights, noise.dtype)[None], pairs)[1]

    first_value = vocab_size // 2
    keys = 1 + draw(key_rng, np.zeros(first_value - 1))
    values = first_value + draw(value_rng, np.zeros(vocab_size - first_value))
    queries = 2 * pairs + 2 * draw(slot_rng, _slot_log_weights(length, pairs, power))

    rows = jnp.arange(batch)[:, None]
    inputs = jnp.zeros((batch, length), jnp.int32)
    if random_non_queries:
        inputs = jax.random.randint(fill_rng, inputs.shape, 0, vocab_size, jnp.int32)
    inputs = inputs.at[:, 0 : 2 * pairs : 2].set(keys).at[:, 1 : 2 * pairs : 2].set(values).at[rows, queries].set(keys)
    labels = jnp.full((batch, length), IGNORE, jnp.int32).at[rows, queries].set(values)
    return {"inputs": inputs, "labels": labels}


@dataclass(frozen=True)
class MQARData:
    """A fixed training set and a fixed test set of MQAR sequences.

    Attributes:
      vocab_size, length, pairs, power: see ``mqar_batch``.
      train_examples: sequences in an epoch of training.
      test_examples: sequences to test on, of which whole batches are used.
      batch_size: sequences in a batch, B.
    """

    vocab_size: int = 256
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    train_examples: int = 20_000
    test_examples: int = 3_000
    batch_size: int = 128

    def __post_init__(self):
        _check(self.vocab_size, self.length, self.pairs, self.power)
        for field in ("train_examples", "test_examples", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")

    def _examples(self, seed: tuple[int, ...], count: int) -> Batch:
        rng = np.random.default_rng(seed)
        return mqar_batch(
            rng, count, vocab_size=self.vocab_size, length=self.length, pairs=self.pairs, power=self.power
        )

    def train(self, seed: int, *, shard_index: int = 0, shard_count: int = 1) -> grain.MapDataset:
        """Endless training batches ``{"inputs", "labels"}``, int32 [B, L], shuffled anew in every epoch.

        Args:
          seed: seed of the examples and of their order; not negative.
          shard_index, shard_count: take this part of every batch, see ``shuffled_indices``.
        """
        draws = shuffled_indices(
            self.train_examples, self.batch_size, seed=seed, shard_index=shard_index, shard_count=shard_count
        )
        examples = self._examples((seed, 1), self.train_examples)
        return draws.map(lambda draw: {name: array[draw[1]] for name, array in examples.items()})

    def test(self) -> list[Batch]:
        """The test batches, the same for every training seed."""
        return fixed_batches(self._examples((0, 2), self.test_examples), self.batch_size)
