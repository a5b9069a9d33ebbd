"""The definition of flex attention on the whole T x S score matrix, in float32, or float64 for float64 inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from manyheads.pallas_kernels.flex_attention.scores import FlexSpec, allowed_pairs, modified_scores


def flex_attention_reference(spec: FlexSpec, operands: dict[str, Any]) -> tuple[Array, Array]:
    """Output ``B T H V`` and log-sum-exp ``B T H``; the arguments are those of ``flex_attention_xla``."""
    query, key, value = operands["query"], operands["key"], operands["value"]
    (B, T, H, _), (S, G) = query.shape, key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(x.astype(dtype), H // G, axis=2) for x in (key, value))
    raw = jnp.einsum("bthk,bshk->bhts", query.astype(dtype), key, precision="highest")
    index = tuple(jnp.arange(n, dtype=jnp.int32) for n in (B, H, T, S))
    scores = modified_scores(spec, raw, operands["score_arrays"], operands["score_params"], operands["bias"], index)
    allowed = allowed_pairs(spec, operands["mask_arrays"], operands["segments"], index, (T, S))
    allowed = jnp.ones((1, 1, 1, 1), bool) if allowed is None else allowed
    if operands["block_map"] is not None:
        blocks = operands["block_map"]
        for axis, size in zip((2, 3), spec.block_size):
            blocks = jnp.repeat(blocks, size, axis)
        allowed = allowed & blocks[:, :, :T, :S]

    if spec.normalizer == "softmax":
        scores = jnp.where(allowed, scores, -jnp.inf)
        sinks = operands["sinks"]
        if sinks is not None:
            extra = jnp.broadcast_to(sinks.astype(dtype)[None, :, None, None], (B, H, T, 1))
            scores = jnp.concatenate([scores, extra], axis=-1)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - top)
    else:
        top = 0
        weights = jnp.where(allowed, scores, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total == 0, 1, total)  # rows without a key, whose gradients must be zero rather than NaN
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))[..., 0]
    weights = weights[..., :S] if spec.normalizer == "none" else weights[..., :S] / safe
    out = jnp.einsum("bhts,bshv->bthv", weights, value, precision="highest")
    return out.astype(operands["query"].dtype), jnp.swapaxes(lse, 1, 2)
