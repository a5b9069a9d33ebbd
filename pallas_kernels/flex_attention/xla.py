"""Flex attention tile by tile in plain XLA: memory O(T + S), only active tiles computed, backward by recomputation.

A tile is a block of queries against a block of keys, for all rows and heads that share a block map. The forward pass
folds the tiles of a row of blocks with ``softmax_combine``; the backward pass recomputes the weights of each tile
from the saved maximum and sum of each row and accumulates the gradients of keys, values, bias and score parameters in
place.
Cost: 2 (K + V) operations a pair of an active tile forward, 2 (3 K + 2 V) backward.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from manyheads.pallas_kernels.flex_attention import tuning
from manyheads.pallas_kernels.flex_attention.scores import FlexSpec, allowed_pairs, modified_scores, softmax_combine

Operands = dict[str, Any]


@dataclass(frozen=True)
class _Tiles:
    """Shapes of the tiling. Queries are ``B T G R K``: R query heads share one of G key heads."""

    spec: FlexSpec
    batch: int
    groups: int
    repeats: int
    q_len: int
    kv_len: int
    maps: tuple[int, int]  # rows and heads of the block map: each has its own list of active tiles
    key_axes: str  # order of the axes of keys and values: "bkg." or "bgk."

    @property
    def n_q(self) -> int:
        return -(-self.q_len // self.spec.block_size[0])

    @property
    def n_kv(self) -> int:
        return -(-self.kv_len // self.spec.block_size[1])

    @property
    def local(self) -> tuple[int, int, int]:
        """Rows, key heads and query heads per key head in one tile."""
        rows = self.batch // self.maps[0]
        return (rows, self.groups, self.repeats) if self.maps[1] == 1 else (rows, 1, 1)

    def corner(self, i: Array, qi: Array, ki: Array) -> dict[str, Array]:
        """Where tile (qi, ki) of block map i begins on every axis."""
        heads_each = self.groups * self.repeats // self.maps[1]
        h = (i % self.maps[1]) * heads_each
        return {
            "b": (i // self.maps[1]) * self.local[0],
            "g": h // self.repeats,
            "r": h % self.repeats,
            "q": qi * self.spec.block_size[0],
            "k": ki * self.spec.block_size[1],
        }

    def sizes(self) -> dict[str, int]:
        b, g, r = self.local
        return {"b": b, "g": g, "r": r, "q": self.spec.block_size[0], "k": self.spec.block_size[1]}

    def index(self, at: dict[str, Array]) -> tuple[Array, Array, Array, Array]:
        size = self.sizes()
        arange = lambda start, n: start + jnp.arange(n, dtype=jnp.int32)
        return (
            arange(at["b"], size["b"]),
            arange(at["g"] * self.repeats + at["r"], size["g"] * size["r"]),
            arange(at["q"], size["q"]),
            arange(at["k"], size["k"]),
        )


def _slice(array: Array, axes: str, at: dict[str, Array], size: dict[str, int]) -> Array:
    """The part of ``array`` in the tile at ``at``; ``axes`` names its axes, "." is taken whole, as are axes of size 1."""
    whole = [axis == "." or n == 1 for axis, n in zip(axes, array.shape)]
    start = [jnp.int32(0) if w else at[axis] for axis, w in zip(axes, whole)]
    sizes = [n if w else size[axis] for axis, n, w in zip(axes, array.shape, whole)]
    return jax.lax.dynamic_slice(array, start, sizes)


def _add(array: Array, part: Array, axes: str, at: dict[str, Array]) -> Array:
    """Add ``part`` to ``array`` in place at the tile ``at``."""
    start = [jnp.int32(0) if axis == "." or n == 1 else at[axis] for axis, n in zip(axes, array.shape)]
    old = jax.lax.dynamic_slice(array, start, part.shape)
    return jax.lax.dynamic_update_slice(array, old + part, start)


def _pad(array: Array, axis: int, multiple: int, **how: Any) -> Array:
    """Fill an axis up to a multiple; ``how`` as for ``jnp.pad``, zeros by default."""
    short = -array.shape[axis] % multiple
    if not short:
        return array
    return jnp.pad(array, [(0, short if a == axis else 0) for a in range(array.ndim)], **how)


def _in_order(array: Array, tiles: _Tiles, other: str = "bkg.") -> Array:
    """Keys or values from axes in the order ``other`` to that of the tiles, or back."""
    return array if tiles.key_axes == other else jnp.swapaxes(array, 1, 2)


def _layout(spec: FlexSpec, operands: Operands) -> tuple[_Tiles, Operands]:
    """The operands padded to whole blocks, with query heads as ``G R``.

    Heads stay behind tokens: they move to the front tile by tile, inside the processor's cache. Except those of keys and
    values where few queries read many keys: the caches of decoding hold heads first, and a view of them moved back is free.
    Padding repeats the last query and the last key, here and in ``_scores``, so that a score function meets real pairs only.
    """
    query, key = operands["query"], operands["key"]
    (B, T, H, K), (S, G) = query.shape, key.shape[1:3]
    rows, columns = spec.block_size
    block_map = operands["block_map"]
    maps = (1, 1) if block_map is None else block_map.shape[:2]
    key_axes = "bgk." if T <= tuning.XLA_DECODE_QUERIES else "bkg."
    tiles = _Tiles(spec, B, G, H // G, T, S, maps, key_axes)
    arranged = dict(operands)
    arranged["query"] = _pad(query.reshape(B, T, G, H // G, K), 1, rows, mode="edge")
    arranged["key"] = _pad(_in_order(key, tiles), key_axes.index("k"), columns, mode="edge")
    arranged["value"] = _pad(_in_order(operands["value"], tiles), key_axes.index("k"), columns)
    if operands["bias"] is not None:
        bias = _pad(operands["bias"], 3, columns)
        bias = bias if bias.shape[2] == 1 else _pad(bias, 2, rows)
        # The head axis becomes G R, or 1 1.
        heads = (G, H // G) if bias.shape[1] == H else (1, 1)
        arranged["bias"] = bias.reshape(bias.shape[0], *heads, *bias.shape[2:])
    if operands["segments"] is not None:
        q_ids, k_ids = operands["segments"]
        arranged["segments"] = (_pad(q_ids, 1, rows), _pad(k_ids, 1, columns))
    return tiles, arranged


def _tile_inputs(tiles: _Tiles, x: Operands, at: dict[str, Array]) -> tuple[Array, Array, Array, Any, Any]:
    """Query, key, value, bias and allowed pairs of one tile; q is ``b g (r q) K``, the mask ``b g r q k``."""
    size = tiles.sizes()
    b, g, r = tiles.local
    q = _heads_first(_slice(x["query"], "bqgr.", at, size))
    q = q.reshape(b, g, r * size["q"], q.shape[-1])
    k, v = (_in_order(_slice(x[name], tiles.key_axes, at, size), tiles, "bgk.") for name in ("key", "value"))
    bias = None if x["bias"] is None else _slice(x["bias"], "bgrqk", at, size)
    segments = x["segments"]
    if segments is not None:
        segments = (_slice(segments[0], "bq", at, size), _slice(segments[1], "bk", at, size))
    allowed = allowed_pairs(tiles.spec, x["mask_arrays"], segments, tiles.index(at), (tiles.q_len, tiles.kv_len))
    if allowed is not None:
        heads = (g, r) if allowed.shape[1] > 1 else (1, 1)
        allowed = allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
    return q, k, v, bias, allowed


def _scores(tiles: _Tiles, at: dict[str, Array], raw: Array, params: Any, bias: Any) -> Array:
    """Modified scores of a tile, ``b g r q k``, from the raw products ``b g (r q) k``."""
    size = tiles.sizes()
    b, g, r = tiles.local
    by_head = (b, g * r, size["q"], size["k"])
    if bias is not None:
        heads = 1 if bias.shape[1] * bias.shape[2] == 1 else g * r
        bias = bias.reshape(bias.shape[0], heads, *bias.shape[3:])
    b_index, h_index, q_index, k_index = tiles.index(at)
    index = (b_index, h_index, jnp.minimum(q_index, tiles.q_len - 1), jnp.minimum(k_index, tiles.kv_len - 1))
    scores = modified_scores(tiles.spec, raw.reshape(by_head), *params, bias, index)
    return scores.reshape(b, g, r, size["q"], size["k"])


def _heads_first(array: Array) -> Array:
    """``b q g r ...`` -> ``b g r q ...``."""
    return jnp.moveaxis(array, 1, 3)


def _tokens_first(array: Array) -> Array:
    """``b g r q ...`` -> ``b q g r ...``."""
    return jnp.moveaxis(array, 3, 1)


def _score_params(x: Operands) -> tuple[Any, Any]:
    return x["score_arrays"], x["score_params"]


def _has_gradient(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _products(q: Array, k: Array) -> Array:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=dtype)


def _forward_tile(tiles: _Tiles, x: Operands, at: dict[str, Array]) -> tuple[Array, Array, Array]:
    """The softmax read of one tile's keys, as an element of the monoid: ``b g r q`` and ``b g r q V``."""
    q, k, v, bias, allowed = _tile_inputs(tiles, x, at)
    scores = _scores(tiles, at, _products(q, k), _score_params(x), bias)
    if tiles.spec.normalizer == "softmax":
        scores = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
        m = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - jnp.where(m == -jnp.inf, 0, m)[..., None])
    else:
        weights = scores if allowed is None else jnp.where(allowed, scores, 0)
        m = jnp.zeros(weights.shape[:-1], weights.dtype)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    o = jnp.einsum("bgqs,bgsv->bgqv", rows.astype(v.dtype), v, preferred_element_type=weights.dtype)
    return m, jnp.sum(weights, axis=-1), o.reshape(*m.shape, -1)


def _backward_tile(
    tiles: _Tiles, x: Operands, at: dict[str, Array], grads: Operands, dq: Array, saved: dict[str, Array]
) -> tuple[Operands, Array]:
    """Add one tile's contributions to the gradients; ``dq`` is that of its row of blocks."""
    spec, size = tiles.spec, tiles.sizes()
    q, k, v, bias, allowed = _tile_inputs(tiles, x, at)
    raw = _products(q, k)
    scores, pullback = jax.vjp(functools.partial(_scores, tiles, at), raw, _score_params(x), bias)
    top, norm, shift = (
        _heads_first(_slice(saved[name], "bqgr", at, size))[..., None] for name in ("top", "norm", "shift")
    )
    dout = _heads_first(_slice(saved["dout"], "bqgr.", at, size))
    if spec.normalizer == "softmax":
        scores = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
        weights = slope = jnp.exp(scores - top) * norm
    else:
        slope = jnp.broadcast_to(norm, scores.shape)
        slope = slope if allowed is None else jnp.where(allowed, slope, 0)
        weights = jnp.where(slope == 0, 0, scores * slope)
    rows = lambda t: t.reshape(*t.shape[:2], -1, t.shape[-1])
    dout_rows = rows(dout)
    dtype = raw.dtype
    dweights = jnp.einsum("bgqv,bgsv->bgqs", dout_rows, v, preferred_element_type=dtype).reshape(scores.shape)
    dscores = slope * (dweights - shift)
    draw, dparams, dbias = pullback(dscores)
    draw = draw.astype(q.dtype)
    dv = jnp.einsum("bgqs,bgqv->bgsv", rows(weights).astype(v.dtype), dout_rows, preferred_element_type=dtype)
    dk = jnp.einsum("bgqs,bgqk->bgsk", draw, q, preferred_element_type=dtype)
    dq = dq + jnp.einsum("bgqs,bgsk->bgqk", draw, k, preferred_element_type=dtype).reshape(dq.shape)
    grads = dict(grads)
    grads["key"] = _add(grads["key"], _in_order(dk, tiles, "bgk."), tiles.key_axes, at)
    grads["value"] = _add(grads["value"], _in_order(dv, tiles, "bgk."), tiles.key_axes, at)
    grads["params"] = jax.tree.map(
        lambda total, part: total + part if _has_gradient(total) else total, grads["params"], dparams
    )
    if bias is not None:
        grads["bias"] = _add(grads["bias"], dbias.astype(dtype), "bgrqk", at)
    return grads, dq


def _active(tiles: _Tiles, x: Operands) -> tuple[Array | None, Array | None]:
    """Per map and row of blocks: the columns of active tiles, first ones first, and their number."""
    block_map = x["block_map"]
    if block_map is None:
        return None, None
    block_map = block_map.reshape(-1, tiles.n_q, tiles.n_kv)
    columns = jnp.argsort(~block_map, axis=-1, stable=True).astype(jnp.int32)
    return columns, jnp.sum(block_map, axis=-1, dtype=jnp.int32)


def _fold_row(tiles: _Tiles, x: Operands, i: Array, qi: Array, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """Fold ``body(ki, carry)`` over the active tiles of row ``qi`` in block map ``i``."""
    columns, counts = x["active"]
    if columns is not None:
        return jax.lax.fori_loop(0, counts[i, qi], lambda j, carry: body(columns[i, qi, j], carry), start)
    if tiles.n_kv == 1:
        return body(jnp.int32(0), start)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(tiles.n_kv), body, start)


def _each_row(tiles: _Tiles, body: Callable[[Any, tuple[Array, Array]], tuple[Any, Any]], carry: Any) -> Any:
    """Scan ``body`` over block maps and rows of blocks: (final carry, outputs ``maps nQ ...``)."""
    n_maps = tiles.maps[0] * tiles.maps[1]
    if n_maps * tiles.n_q == 1:
        carry, out = body(carry, (jnp.int32(0), jnp.int32(0)))
        return carry, jax.tree.map(lambda t: t[None, None], out)
    i, qi = jnp.meshgrid(jnp.arange(n_maps, dtype=jnp.int32), jnp.arange(tiles.n_q, dtype=jnp.int32), indexing="ij")
    carry, out = jax.lax.scan(body, carry, (i.ravel(), qi.ravel()))
    return carry, jax.tree.map(lambda t: t.reshape(n_maps, tiles.n_q, *t.shape[1:]), out)


def _assemble(tiles: _Tiles, rows: Array) -> Array:
    """``maps nQ b q g r ...`` -> ``B T H ...`` without padding."""
    rows = rows.reshape(*tiles.maps, *rows.shape[1:])
    rows = jnp.moveaxis(rows, (0, 3, 2, 4, 1), (0, 1, 2, 3, 4))  # maps_b b nQ q maps_h g r ...
    rows = rows.reshape(tiles.batch, -1, tiles.groups * tiles.repeats, *rows.shape[7:])
    return rows[:, : tiles.q_len]


def _forward(spec: FlexSpec, operands: Operands) -> tuple[Array, Array, Array]:
    """Output ``B T H V``, and ``B T H`` the maximum and the sum that make up the log-sum-exp."""
    tiles, x = _layout(spec, operands)
    x["active"] = _active(tiles, x)
    dtype = jnp.promote_types(operands["query"].dtype, jnp.float32)
    shape = (*tiles.local, spec.block_size[0])
    lowest = -jnp.inf if spec.normalizer == "softmax" else 0.0
    identity = (
        jnp.full(shape, lowest, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, x["value"].shape[-1]), dtype)
    )  # fmt: skip

    def row(carry: None, at: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        def tile(ki: Array, part: Any) -> Any:
            return softmax_combine(part, _forward_tile(tiles, x, tiles.corner(*at, ki)))

        m, l, o = _fold_row(tiles, x, *at, tile, identity)
        if x["sinks"] is not None:
            h = tiles.index(tiles.corner(*at, jnp.int32(0)))[1]
            sink = jnp.broadcast_to(x["sinks"].astype(dtype)[h].reshape(1, *tiles.local[1:], 1), m.shape)
            m, l, o = softmax_combine((m, l, o), (sink, jnp.ones_like(l), jnp.zeros_like(o)))
        out = o if spec.normalizer == "none" else o / jnp.where(l == 0, 1, l)[..., None]
        return None, (_tokens_first(out.astype(operands["query"].dtype)), _tokens_first(m), _tokens_first(l))

    _, rows = _each_row(tiles, row, None)
    return tuple(_assemble(tiles, x) for x in rows)


def _backward(spec: FlexSpec, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Operands]:
    operands, out, m, l = residuals
    dout, dlse = cotangents
    tiles, x = _layout(spec, operands)
    x["active"] = _active(tiles, x)
    dtype = jnp.promote_types(operands["query"].dtype, jnp.float32)
    # A weight is exp(score - top) * norm; exp(score - lse) would first round lse, which shows where scores are large.
    # d loss / d score = slope * (d weight - shift): the shift gathers what normalisation and lse subtract.
    top = jnp.where(m == -jnp.inf, 0, m)
    norm = 1 / jnp.where(l == 0, 1, l)
    shift = -dlse.astype(dtype)
    if spec.normalizer == "none":
        shift, norm = shift * norm, jnp.ones_like(norm)
    else:
        shift = shift + jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)

    def arrange(array: Array, **how: Any) -> Array:
        array = array.reshape(*array.shape[:2], tiles.groups, tiles.repeats, *array.shape[3:])
        return _pad(array, 1, spec.block_size[0], **how)

    # With dout and shift zero, padded queries add nothing to any gradient.
    saved = {name: arrange(x, mode="edge") for name, x in (("top", top), ("norm", norm))}
    saved |= {"shift": arrange(shift), "dout": arrange(dout)}
    sources = {"key": x["key"], "value": x["value"], "bias": x["bias"], "params": _score_params(x)}
    grads = jax.tree.map(lambda t: jnp.zeros(t.shape, dtype) if _has_gradient(t) else t, sources)

    def row(grads: Operands, at: tuple[Array, Array]) -> tuple[Operands, Array]:
        def tile(ki: Array, carry: Any) -> Any:
            return _backward_tile(tiles, x, tiles.corner(*at, ki), *carry, saved)

        dq = jnp.zeros((*tiles.local, spec.block_size[0], x["query"].shape[-1]), dtype)
        grads, dq = _fold_row(tiles, x, *at, tile, (grads, dq))
        return grads, _tokens_first(dq)

    grads, dq = _each_row(tiles, row, grads)
    result: Operands = dict.fromkeys(operands)
    result["query"] = _assemble(tiles, dq)
    for name in ("key", "value"):
        result[name] = _in_order(grads[name], tiles)[:, : tiles.kv_len]
    if operands["bias"] is not None:
        shape = operands["bias"].shape
        bias = grads["bias"].reshape(shape[0], shape[1], *grads["bias"].shape[3:])
        result["bias"] = bias[:, :, : shape[2], : shape[3]]
    if operands["sinks"] is not None:
        # The sink is one more key, with value zero: d sink = -p_sink * shift.
        sink = operands["sinks"].astype(dtype)[None, None, :]
        result["sinks"] = -jnp.sum(jnp.exp(sink - top) * norm * shift, axis=(0, 1))
    result["score_arrays"], result["score_params"] = jax.tree.map(
        lambda grad: grad if _has_gradient(grad) else None, grads["params"]
    )
    cast = lambda grad, primal: None if grad is None else grad.astype(primal.dtype)
    return (jax.tree.map(cast, result, operands, is_leaf=lambda leaf: leaf is None),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flex(spec: FlexSpec, operands: Operands) -> tuple[Array, Array]:
    return _flex_forward(spec, operands)[0]


def _flex_forward(spec: FlexSpec, operands: Operands) -> tuple[tuple[Array, Array], Any]:
    out, m, l = _forward(spec, operands)
    lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1, l)))
    return (out, lse), (operands, out, m, l)


_flex.defvjp(_flex_forward, _backward)

flex_attention_xla = jax.jit(_flex, static_argnums=0)
