"""Positions of tokens inside packed documents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["segment_positions"]


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token in its document, from 0: the count restarts where the id changes."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
