"""Token embeddings and learned absolute positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.linear import linear

__all__ = ["Embedding"]


class Embedding(nnx.Module):
    """A table of vectors, one a token or position; ``attend`` uses the same table as the output layer.

    Args:
      size: number of rows.
      features: length D of a row.
      stddev: standard deviation of the initial rows (normal).
      rngs: source of the initial parameters.
    """

    def __init__(self, size: int, features: int, *, stddev: float = 0.02, rngs: nnx.Rngs):
        self.table = nnx.Param(stddev * jax.random.normal(rngs.params(), (size, features)))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """The rows of ``ids``; an id beyond the table gives the nearest row."""
        return jnp.take(self.table[...], ids, axis=0, mode="clip")

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... size"]:
        """Logits of every row: x E^T (Using the Output Embedding to Improve Language Models, 2017)."""
        return linear(x, self.table[...])
