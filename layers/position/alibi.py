"""Attention with linear biases (Train Short, Test Long, 2021): ``z_ts = q_t . k_s - slope_h * (t - s)``.

The slopes are ``2^(-8 h / H)`` for h = 1..H if H is a power of two; otherwise those of the next lower power, followed by
every second slope of twice that power.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["alibi_slopes"]


def alibi_slopes(num_heads: int) -> Float[Array, "H"]:
    """The slope of each head, float32, positive. Lightning attention uses the same numbers as its decay rates."""
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads={num_heads} must be at least 1")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return jnp.asarray(np.concatenate([slopes, between[: num_heads - power]]), jnp.float32)
