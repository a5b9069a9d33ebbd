"""Rotary position embedding (RoFormer, 2021): rotate pairs of features by an angle proportional to the position.

Feature pair i of K/2 turns by ``position * base^(-2 i / K)``, so that ``q_t . k_s`` depends on t - s alone. The pairs are
(i, i + K/2) in the half-split form (Llama and most checkpoints) and (2 i, 2 i + 1) in the interleaved form (RoFormer, GPT-J,
GGUF files). The two differ by a fixed permutation of the features of queries and keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["rope"]


def rope(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"] | Int[Array, "T"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """Rotate the features of ``x`` by its positions.

    Args:
      x: queries or keys; K is even.
      positions: of the tokens; of any origin, since only differences matter.
      base: the longest wavelength is about ``2 pi base`` tokens.
      interleaved: pairs of neighbours instead of pairs half the features apart.

    Returns:
      The rotated features in the dtype of ``x``; angles in float32.
    """
    K = x.shape[-1]
    if K % 2:
        raise ValueError(f"rope: head_dim={K} must be even")
    frequency = base ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    positions = positions if positions.ndim == 2 else positions[None]
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency.reshape(1, 1, 1, -1)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)
    y = x.astype(dtype)
    a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else (y[..., : K // 2], y[..., K // 2 :])
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return y.astype(x.dtype)
