"""What all implementations of flex attention share: modified scores, the mask inside a tile, and the softmax monoid."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from manyheads.pallas_kernels.block_mask import evaluate_mask

__all__ = ["FlexSpec", "Hoisted", "Partial", "allowed_pairs", "hoist", "modified_scores", "softmax_combine"]

NORMALIZERS = ("softmax", "sum", "none")


@dataclass(frozen=True)
class Hoisted:
    """A function whose closed-over arrays became its first argument; hashable, so that it can key a jit cache.

    Two are equal if they come from the same function, unless that function captured tracers: those belong to one
    trace, and the function is then known by its identity alone.
    """

    key: Any
    call: Callable[..., Any] = field(compare=False)
    reads: tuple[bool, ...] = field(compare=False)  # for each argument, whether the result depends on it


def hoist(fn: Callable[..., Any], *example: Any) -> tuple[Hoisted, tuple[Array, ...]]:
    """Turn the arrays that ``fn`` closes over into an explicit argument.

    A custom gradient must not close over tracers, and the arrays that a score function captures deserve gradients.

    Returns:
      ``(hoisted, arrays)`` such that ``hoisted.call(arrays, *args) == fn(*args)``.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*example)
    if jax.tree.structure(shape) != jax.tree.structure(0) or shape.shape != ():
        raise ValueError(f"mask_mod and score_mod must return one scalar, got {shape}")
    jaxpr = closed.jaxpr

    def call(arrays: tuple[Array, ...], *args: Any) -> Any:
        return jax.core.eval_jaxpr(jaxpr, arrays, *jax.tree.leaves(args))[0]

    arrays = tuple(closed.consts)
    key: Any = object()
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):
        try:
            hash(fn)
            key = (fn, jax.tree.structure(example), tuple((jnp.shape(a), jnp.result_type(a)) for a in arrays))
        except TypeError:
            pass
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return Hoisted(key, call, tuple(id(v) in used for v in jaxpr.invars)), arrays


@dataclass(frozen=True)
class FlexSpec:
    """The static part of a call: everything but arrays."""

    scale: float
    normalizer: str
    block_size: tuple[int, int]
    mask_mod: Hoisted | None
    score_mod: Hoisted | None


Partial = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "... V"]]


def softmax_combine(first: Partial, second: Partial) -> Partial:
    """Combine the softmax reads of two disjoint sets of keys: the monoid of (max, sum, weighted sum).

    A read of the keys s with scores z_s is ``m = max_s z_s``, ``l = sum_s exp(z_s - m)``,
    ``o = sum_s exp(z_s - m) v_s``; that of no keys, the identity, is ``(-inf, 0, 0)``. Associative and commutative. The
    attention output is ``o / l``, its log-sum-exp ``m + log l``.
    """
    (m1, l1, o1), (m2, l2, o2) = first, second
    m = jnp.maximum(m1, m2)
    finite = jnp.where(m == -jnp.inf, 0, m)  # no keys at all: exp(-inf - 0) = 0 rather than NaN
    a1, a2 = jnp.exp(m1 - finite), jnp.exp(m2 - finite)
    return m, a1 * l1 + a2 * l2, a1[..., None] * o1 + a2[..., None] * o2


def modified_scores(
    spec: FlexSpec,
    raw: Float[Array, "b h q k"],
    score_arrays: tuple[Array, ...],
    score_params: Any,
    bias: Float[Array, "b h q k"] | None,
    index: tuple[Array, Array, Array, Array],
) -> Float[Array, "b h q k"]:
    """``score_mod(scale * raw) + bias`` on a tile whose rows, heads, queries and keys have the indices ``index``."""
    scores = raw * spec.scale
    if spec.score_mod is not None:
        args = (score_params,) if score_params is not None else ()
        fn = lambda s, b, h, q, k: spec.score_mod.call(score_arrays, s, b, h, q, k, *args)
        for position in (3, 2, 1, 0):
            axes = [None] * 4
            axes[position] = 0
            fn = jax.vmap(fn, in_axes=(0, *axes))
        scores = fn(scores, *index).astype(raw.dtype)
    if bias is not None:
        scores = scores + bias.astype(raw.dtype)
    return scores


def allowed_pairs(
    spec: FlexSpec,
    mask_arrays: tuple[Array, ...],
    segments: tuple[Array, Array] | None,
    index: tuple[Array, Array, Array, Array],
    lengths: tuple[int, int],
) -> Bool[Array, "b h q k"] | None:
    """Which pairs of a tile may meet: inside the lengths, allowed by the mask, in the same segment. None for all."""
    b, h, q, k = index
    allowed = None

    def also(more: Array) -> Array:
        return more if allowed is None else allowed & more

    if lengths[1] % k.shape[0]:
        allowed = also((k < lengths[1])[None, None, None, :])
    if spec.mask_mod is not None:
        allowed = also(evaluate_mask(lambda *i: spec.mask_mod.call(mask_arrays, *i), b, h, q, k))
    if segments is not None:
        rows, columns = segments
        allowed = also((rows[:, :, None] == columns[:, None, :])[:, None])
    return allowed
