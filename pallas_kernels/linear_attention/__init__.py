"""Linear attention with decay: the fold of the past into a matrix state, read by the query.

For every head, with ``a_t = exp(log_decay_t)`` (1 if there is none), a number or one per key feature::

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

One primitive serves linear attention (Transformers are RNNs, 2020), retention (Retentive Network, 2023), lightning
attention (2024), gated linear attention (2023), Mamba-2 (2024) and the rest of the decay family.
Cost: 4 K V + 2 C (K + V) operations a token and head in chunks of C; decode state K V a head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manyheads.pallas_kernels.dispatch import choose
from manyheads.pallas_kernels.linear_attention import tuning
from manyheads.pallas_kernels.linear_attention.combine import decay_combine
from manyheads.pallas_kernels.linear_attention.reference import linear_attention_reference
from manyheads.pallas_kernels.linear_attention.xla import linear_attention_xla

__all__ = ["decay_combine", "linear_attention"]

_IMPLEMENTATIONS = {"reference": linear_attention_reference, "xla": linear_attention_xla}


def linear_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G V"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Causal linear attention with decay.

    Args:
      query, key, value: H is a multiple of G; query head h reads key head ``h // (H / G)``.
      log_decay: None, ``H`` (fixed a head), ``B T H`` (per token) or ``B T H K`` (per token and key feature). -inf forgets
        everything. Must not be positive: a positive value in a concrete array raises, in a traced one it gives NaN.
      scale: factor of the output.
      initial_state: the state before the first token; default zeros.
      segment_ids: the state starts from zero wherever the id changes. The first segment continues ``initial_state``.
      chunk_size: tokens a chunk of "xla"; default by the form of the decay.
      implementation: "reference" (token by token), "xla" (chunks; memory O(T)), or None for the device's best.

    Returns:
      The output in the dtype of ``query`` and the state after the last token, float32 (float64 for float64 inputs).

    Raises:
      ValueError: naming the argument that does not fit.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name}: shape {list(array.shape)} must have four axes, batch time heads features")
    (B, T, H, K), (G, V) = query.shape, value.shape[2:]
    if key.shape != (B, T, G, K) or value.shape[:3] != (B, T, G):
        raise ValueError(
            f"key: shapes key {list(key.shape)}, value {list(value.shape)} do not fit query {list(query.shape)}; "
            f"needed [{B}, {T}, G, {K}] and [{B}, {T}, G, V]"
        )
    if H % G:
        raise ValueError(f"query: {H} heads are not a multiple of the {G} heads of key")
    if log_decay is not None:
        if log_decay.shape not in ((H,), (B, T, H), (B, T, H, K)):
            raise ValueError(
                f"log_decay: shape {list(log_decay.shape)} must be [{H}], [{B}, {T}, {H}] or [{B}, {T}, {H}, {K}]"
            )
        # -inf becomes the lowest finite number: sums of decays multiply them by zero.
        log_decay = jnp.maximum(_non_positive(log_decay), jnp.finfo(log_decay.dtype).min)
    if initial_state is not None and initial_state.shape != (B, H, K, V):
        raise ValueError(f"initial_state: shape {list(initial_state.shape)} must be [{B}, {H}, {K}, {V}]")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids: shape {list(segment_ids.shape)} must be [{B}, {T}]")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    run = choose("linear_attention", implementation, _IMPLEMENTATIONS)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), dtype)
    if chunk_size is None:
        chunk_size = tuning.XLA_CHUNK_PER_FEATURE if log_decay is not None and log_decay.ndim == 4 else tuning.XLA_CHUNK
    out, state = run(query, key, value, log_decay, initial_state.astype(dtype), segment_ids, chunk_size)
    return (out * scale).astype(query.dtype), state


def _non_positive(log_decay: Array) -> Array:
    """Reject a positive log-decay: at once where its values are known, by NaN where they are traced."""
    try:
        worst = float(jnp.max(log_decay)) if log_decay.size else 0.0
    except jax.errors.ConcretizationTypeError:
        return jnp.where(log_decay > 0, jnp.nan, log_decay)
    if worst > 0:
        raise ValueError(f"log_decay: must not be positive, its largest value is {worst}")
    return log_decay
