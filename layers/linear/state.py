"""The decode state of the linear family."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["MatrixState", "real_tokens"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=())
@dataclass(frozen=True)
class MatrixState:
    """The state of linear attention: ``matrix: B H K V``, float32, the same size at any length."""

    matrix: Float[Array, "B H K V"]

    @classmethod
    def empty(cls, batch: int, heads: int, keys: int, values: int) -> "MatrixState":
        """The state before the first token."""
        return cls(jnp.zeros((batch, heads, keys, values), jnp.float32))


def real_tokens(n: int, lengths: Int[Array, "B"] | None) -> Bool[Array, "B n 1 1"] | None:
    """Which of n new tokens a row really has, ready to mask ``B n H K``; None if all."""
    if lengths is None:
        return None
    return (jnp.arange(n)[None, :] < lengths[:, None])[:, :, None, None]
