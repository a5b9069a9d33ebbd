"""Choosing the next token from logits.

With temperature t, the distribution is ``softmax(logits / t)``, cut to the k most probable tokens (top-k: Hierarchical
Neural Story Generation, 2018), then cut to the fewest tokens of the rest whose probabilities sum to at least p (nucleus:
The Curious Case of Neural Text Degeneration, 2020), then normalised. Of equal logits the one with the lower id comes
first, so that a cut keeps a definite set.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["check_sampling", "greedy", "keep_top_k", "keep_top_p", "sample"]


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The most probable token."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """The logits of the ``k`` most probable tokens; -inf for the others."""
    _, kept = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    mask = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], kept].set(True)
    return jnp.where(mask, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[Array, ""]) -> Float[Array, "B V"]:
    """The logits of the fewest most probable tokens whose probabilities sum to ``p`` or more; -inf for the others."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < p) | jnp.asarray(p >= 1)  # the sum may round up to 1 before the end
    mask = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], order].set(kept)
    return jnp.where(mask, logits, -jnp.inf)


def sample(
    key: Array,
    logits: Float[Array, "B V"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, "B"]:
    """Draw a token for each row.

    Args:
      key: of the random numbers.
      logits: unnormalised log-probabilities.
      temperature: 0 takes the most probable token. As an array, which may be traced, it is positive.
      top_k: draw from this many most probable tokens only.
      top_p: draw from the fewest most probable tokens with this probability only.

    Raises:
      ValueError: see ``check_sampling``.
    """
    check_sampling(temperature, top_k, top_p)
    if not isinstance(temperature, jax.Array) and temperature == 0:
        return greedy(logits)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def check_sampling(temperature: float | Array, top_k: int | None, top_p: float | Array | None) -> None:
    """ValueError unless temperature >= 0, top_k >= 1 and 0 < top_p <= 1. Arrays, which may be traced, pass unseen."""
    if not isinstance(temperature, jax.Array) and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a number from 0 up")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")
    if top_p is not None and not isinstance(top_p, jax.Array) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None for all tokens")
