"""Softmax attention over explicit key indices: decoding with top-k, pages or retrieved blocks.

For query t of head h in group g, over the valid m of M::

    z_m = scale * q_t . k[indices[t, g, m]]        o_t = sum_m softmax(z)_m v[indices[t, g, m]]

Cost: 2 (K + V) operations and, per key head, one gathered row of K and V an index; nothing depends on S.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from manyheads.pallas_kernels.dispatch import choose

__all__ = ["gather_attention"]

# Gathered keys and values of at most this many entries a batch row are read at once; longer inputs go in pieces.
_PIECE = 1 << 22


def _attend(query: Array, key: Array, value: Array, indices: Array, valid: Array | None, scale: float) -> Array:
    """All queries at once: gathered keys ``B T G M K`` are in memory."""
    B, T, H, K = query.shape
    G = key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    batch = jnp.arange(B)[:, None, None, None]
    group = jnp.arange(G)[None, None, :, None]
    k, v = key[batch, indices, group], value[batch, indices, group]
    q = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,btgmk->btgrm", q, k, preferred_element_type=dtype) * scale
    if valid is not None:
        scores = jnp.where(valid[:, :, :, None, :], scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1, total)).astype(v.dtype)
    out = jnp.einsum("btgrm,btgmv->btgrv", weights, v, preferred_element_type=dtype)
    return out.reshape(B, T, H, -1).astype(query.dtype)


def _attend_in_pieces(
    query: Array, key: Array, value: Array, indices: Array, valid: Array | None, scale: float
) -> Array:
    """The same, with the gathered rows of a bounded number of queries in memory at a time, recomputed backward."""
    T = query.shape[1]
    piece = max(1, _PIECE // (indices.shape[2] * indices.shape[3] * (key.shape[3] + value.shape[3])))
    if piece >= T:
        return _attend(query, key, value, indices, valid, scale)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -T % piece)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, piece, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(parts: tuple[Array, Array, Array | None]) -> Array:
        q, i, ok = parts
        return _attend(q, key, value, i, ok, scale)

    out = jax.lax.map(one, (split(query), split(indices), None if valid is None else split(valid)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *out.shape[3:])[:, :T]


_IMPLEMENTATIONS = {"reference": _attend, "xla": jax.jit(_attend_in_pieces, static_argnums=5)}


def gather_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    indices: Int[Array, "B T G M"],
    valid: Bool[Array, "B T G M"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of each query over the M keys that ``indices`` names for it, the same for all heads of a group.

    Args:
      query, key, value: H is a multiple of G; query head h reads key head ``h // (H / G)``.
      indices: positions in 0..S-1. An index that occurs twice counts twice.
      valid: False drops an index; default all. A query without a valid index gets zeros.
      scale: default 1/sqrt(K).
      implementation: "reference", "xla" (bounded memory), or None for the device's best.

    Returns:
      The output in the dtype of ``query``; differentiable in query, key and value.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError("query, key and value must have four axes, batch time heads features")
    (B, T, H, K), (S, G) = query.shape, key.shape[1:3]
    if key.shape != (B, S, G, K) or value.shape[:3] != (B, S, G):
        raise ValueError(
            f"key: shapes key {list(key.shape)}, value {list(value.shape)} do not fit query {list(query.shape)}"
        )
    if H % G:
        raise ValueError(f"query: {H} heads are not a multiple of the {G} heads of key")
    if indices.ndim != 4 or indices.shape[:3] != (B, T, G) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices: {indices.dtype}{list(indices.shape)} must be integers of shape [{B}, {T}, {G}, M]")
    if valid is not None and valid.shape != indices.shape:
        raise ValueError(f"valid: shape {list(valid.shape)} must be that of indices, {list(indices.shape)}")
    run = choose("gather_attention", implementation, _IMPLEMENTATIONS)
    return run(query, key, value, indices, valid, K**-0.5 if scale is None else float(scale))
