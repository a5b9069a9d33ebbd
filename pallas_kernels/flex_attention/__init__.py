"""Softmax attention over any mask and any score function.

For query t of head h (which reads key head ``g = h // (H / G)``), over the keys s that the mask allows::

    z_ts = score_mod(scale * q_t . k_s) + bias_ts
    o_t  = sum_s exp(z_ts) v_s / (sum_s exp(z_ts) + exp(sink_h))        lse_t = log of the denominator

One primitive serves dense, causal, windowed, packed, block-sparse and grouped attention: Attention Is All You Need (2017),
evaluated in tiles as in FlashAttention (2022), with mask and score functions as in FlexAttention (2024).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from manyheads.pallas_kernels.block_mask import BlockMask, MaskMod, create_block_mask
from manyheads.pallas_kernels.dispatch import choose
from manyheads.pallas_kernels.flex_attention import tuning
from manyheads.pallas_kernels.flex_attention.reference import flex_attention_reference
from manyheads.pallas_kernels.flex_attention.scores import NORMALIZERS, FlexSpec, Hoisted, hoist, softmax_combine
from manyheads.pallas_kernels.flex_attention.xla import flex_attention_xla

__all__ = ["flex_attention", "softmax_combine"]

_IMPLEMENTATIONS = {"reference": flex_attention_reference, "xla": flex_attention_xla}


def flex_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    *,
    mask: BlockMask | MaskMod | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_params: Any = None,
    bias: Float[Array, "B H T S"] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    sinks: Float[Array, "H"] | None = None,
    normalizer: str = "softmax",
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention of ``query`` over ``key`` and ``value``.

    Args:
      query, key, value: H is a multiple of G; query head h reads key head ``h // (H / G)``.
      mask: a ``BlockMask``, or ``mask_mod(b, h, q, k) -> bool`` on integer scalars; None lets all pairs meet. The masks
        of ``pallas_kernels.masks`` find their active blocks without looking at every pair; pass any other function
        through ``create_block_mask`` once where it is used often.
      score_mod: ``score_mod(score, b, h, q, k) -> score`` on scalars, applied to ``scale * q . k``; with a last argument
        ``params`` if ``score_params`` is given. Arrays that it closes over get gradients too.
      score_params: pytree of small arrays for ``score_mod``, with gradients.
      bias: ``B|1 H|1 T|1 S``, added to the modified scores, with gradients.
      scale: default 1/sqrt(K).
      segment_ids: only tokens with equal ids meet. One array if T = S, else a pair (queries, keys).
      sinks: one more logit a head in the denominator.
      normalizer: "softmax"; "sum" divides the non-negative scores that ``score_mod`` gives by their sum instead of
        exponentiating; "none" takes them as the weights.
      return_lse: also return the natural log of the denominator ("sum", "none": of the sum of weights), float32.
      implementation: "reference" (T x S in memory), "xla" (tiles, memory O(T + S)), or None for the device's best.

    Returns:
      The output in the dtype of ``query``, and the log-sum-exp if asked for. A query that may read no key gets zeros
      and -inf. First derivatives only in "xla"; "reference" has all of them.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    _check(query, key, value, bias, sinks, normalizer, score_mod, score_params)
    (B, T, H, K), S = query.shape, key.shape[1]
    segments = _check_segments(segment_ids, B, T, S)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    run = choose("flex_attention", implementation, _IMPLEMENTATIONS)

    zero = jnp.int32(0)
    hoisted_score, score_arrays = None, ()
    if score_mod is not None:
        extra = () if score_params is None else (score_params,)
        hoisted_score, score_arrays = hoist(score_mod, jnp.zeros((), dtype), zero, zero, zero, zero, *extra)
    mask_mod = mask.mask_mod if isinstance(mask, BlockMask) else mask
    hoisted_mask, mask_arrays = (None, ()) if mask_mod is None else hoist(mask_mod, zero, zero, zero, zero)

    if isinstance(mask, BlockMask):
        mask.check(T, S)
        if mask.block_map.shape[0] not in (1, B) or mask.block_map.shape[1] not in (1, H):
            raise ValueError(f"mask: a BlockMask for B={mask.block_map.shape[0]}, H={mask.block_map.shape[1]} "
                             f"does not fit B={B}, H={H}")  # fmt: skip
        block_size, block_map = mask.block_size, mask.block_map
    else:
        block_size, block_map = (T, S), None
        single = T * S <= tuning.XLA_SINGLE_TILE and S <= tuning.XLA_MOST_KEYS
        if run is not flex_attention_reference and not single:
            block_size, block_map = _tiling(mask, hoisted_mask, segments, (B, H, T, S))

    spec = FlexSpec(K**-0.5 if scale is None else float(scale), normalizer, block_size, hoisted_mask, hoisted_score)
    operands = {
        "query": query, "key": key, "value": value, "bias": bias, "sinks": sinks, "segments": segments,
        "score_params": score_params, "score_arrays": score_arrays, "mask_arrays": mask_arrays, "block_map": block_map,
    }  # fmt: skip
    out, lse = run(spec, operands)
    return (out, lse) if return_lse else out


def _tiling(
    mask: MaskMod | None,
    hoisted: Hoisted | None,
    segments: tuple[Array, Array] | None,
    sizes: tuple[int, int, int, int],
) -> tuple[tuple[int, int], Array | None]:
    """Tile sizes, and the tiles that mask and segments leave, where the caller gives no BlockMask."""
    B, H, T, S = sizes
    most_rows, columns = tuning.XLA_BLOCK
    rows = min(T, most_rows)
    columns = min(S, tuning.XLA_MOST_KEYS, columns * most_rows // rows)
    block_map = None
    if mask is not None:
        batch, heads = B if hoisted.reads[0] else 1, H if hoisted.reads[1] else 1
        block_map = create_block_mask(mask, batch, heads, T, S, (rows, columns)).block_map
    if segments is not None:
        overlap = _segment_overlap(segments, (rows, columns))[:, None]
        block_map = overlap if block_map is None else block_map & overlap
    if block_map is not None and T <= tuning.XLA_DECODE_QUERIES:
        block_map = block_map.any((0, 1), keepdims=True)  # few queries: one loop for all rows and heads
    return (rows, columns), block_map


def _segment_overlap(segments: tuple[Array, Array], block_size: tuple[int, int]) -> Bool[Array, "B nQ nS"]:
    """Which tiles may hold a query and a key of one segment: those whose ranges of ids overlap."""

    def ranges(ids: Array, size: int) -> tuple[Array, Array]:
        blocks = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge").reshape(ids.shape[0], -1, size)
        return blocks.min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = (ranges(ids, size) for ids, size in zip(segments, block_size))
    return (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])


def _check_segments(segment_ids: Any, B: int, T: int, S: int) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2 or pair[0].shape != (B, T) or pair[1].shape != (B, S):
        raise ValueError(
            f"segment_ids: shapes {[list(ids.shape) for ids in pair]} must be [[{B}, {T}], [{B}, {S}]] (one array if T = S)"
        )
    return pair


def _check(
    query: Array, key: Array, value: Array, bias: Any, sinks: Any, normalizer: str, score_mod: Any, score_params: Any
) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name}: shape {list(array.shape)} must have four axes, batch time heads features")
    (B, T, H, K), (S, G) = query.shape, key.shape[1:3]
    if key.shape != (B, S, G, K):
        raise ValueError(
            f"key: shape {list(key.shape)} does not fit query {list(query.shape)}; needed [{B}, S, G, {K}]"
        )
    if value.shape[:3] != (B, S, G):
        raise ValueError(
            f"value: shape {list(value.shape)} does not fit key {list(key.shape)}; needed [{B}, {S}, {G}, V]"
        )
    if H % G:
        raise ValueError(f"query: {H} heads are not a multiple of the {G} heads of key")
    if bias is not None and (
        bias.ndim != 4 or any(n not in allowed for n, allowed in zip(bias.shape, ((1, B), (1, H), (1, T), (S,))))
    ):
        raise ValueError(f"bias: shape {list(bias.shape)} must be [{B}|1, {H}|1, {T}|1, {S}]")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks: shape {list(sinks.shape)} must be [{H}], one a head")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r} is not one of {', '.join(NORMALIZERS)}")
    if sinks is not None and normalizer != "softmax":
        raise ValueError(f"sinks: only normalizer='softmax' has them, got normalizer={normalizer!r}")
    if score_params is not None and score_mod is None:
        raise ValueError("score_params: given without a score_mod that reads them")
