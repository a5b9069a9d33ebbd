"""The definition of linear attention with decay, token by token in float32, or float64 for float64 inputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def linear_attention_reference(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    state: Array,
    segment_ids: Array | None,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Output ``B T H V`` without the scale, and the final state; the arguments are those of ``linear_attention_xla``."""
    B, T, H, _ = query.shape
    dtype = state.dtype
    key, value = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (key, value))
    if log_decay is None:
        decay = jnp.ones((B, T, H, 1), dtype)
    elif log_decay.ndim == 1:
        decay = jnp.broadcast_to(jnp.exp(log_decay.astype(dtype))[None, None, :, None], (B, T, H, 1))
    else:
        decay = jnp.exp(log_decay.astype(dtype)).reshape(B, T, H, -1)
    keep = jnp.ones((B, T), bool)
    if segment_ids is not None:
        keep = keep.at[:, 1:].set(segment_ids[:, 1:] == segment_ids[:, :-1])

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a, keep = now
        state = jnp.where(keep[:, None, None, None], a[..., None] * state, 0)
        state = state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    inputs = (query.astype(dtype), key.astype(dtype), value.astype(dtype), decay, keep)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs))
    return jnp.moveaxis(out, 0, 1), state
