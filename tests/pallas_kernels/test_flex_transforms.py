"""Flex attention under transformations, with arrays that its functions close over, and in parts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from flex_cases import COLUMNS, ROWS, call, check, compiled, dense, draw, slopes, with_gradients
from numerics import assert_accurate, assert_close, each, quick_jit

from manyheads.pallas_kernels import BlockMask, softmax_combine
from manyheads.pallas_kernels.masks import Causal, SlidingWindow

pytestmark = pytest.mark.usefixtures("small_tiles")


def test_score_parameters_are_any_pytree(rng):
    ((arrays, cotangents),) = draw(rng, n=1)
    parameters = {"slopes": arrays["query"][0, 0, :, 0], "steps": np.arange(4), "pair": (0.5, None)}

    def loss(parameters, implementation):
        def score_mod(score, b, h, q, k, p):
            return score * p["pair"][0] + p["slopes"][h] * (q - k) * p["steps"][h]

        out, lse = call(implementation, arrays, score_mod=score_mod, score_params=parameters)
        return jnp.vdot(out, cotangents[0]) + jnp.vdot(lse, cotangents[1])

    gradient = quick_jit(jax.grad(loss, allow_int=True), static_argnums=1)
    got, expected = gradient(parameters, "xla"), gradient(parameters, "reference")
    for x, y in zip((got["slopes"], got["pair"][0]), (expected["slopes"], expected["pair"][0])):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert got["steps"].dtype == jax.dtypes.float0


def test_gradients_of_arrays_that_a_score_function_closes_over(rng):
    def run(implementation, arrays):
        arrays = dict(arrays)
        params = arrays.pop("params")
        return call(implementation, arrays, mask=Causal(9), score_mod=lambda *score: slopes(*score, params))

    check(run, draw(rng, params=(4,)), allowed=dense(Causal(9), 2, 4, 19, 37), score_mod=slopes)


def test_a_function_with_new_contents_is_not_mistaken_for_the_old_one(rng):
    ((arrays, _),) = draw(rng, n=1, T=4, S=6)

    def one(offset, implementation):
        table = jnp.full(4, offset, jnp.float32)
        mask, score_mod = lambda b, h, q, k: k <= q + offset, lambda s, b, h, q, k: s * table[h]
        return call(implementation, arrays, mask=mask, score_mod=score_mod)[0]

    for offset in (0, 5):
        np.testing.assert_allclose(one(offset, "xla"), one(offset, "reference"), rtol=1e-5, atol=1e-5)


def test_vmap(rng):
    """Over everything, the offset of the mask and the block map included."""
    draws = draw(rng, n=4, params=(4,))
    offsets, maps = np.array([-3, 8, 30, 0]), rng.random((4, 1, 1, 3, 3)) < 0.7

    def run(implementation, offset, block_map, arrays, cotangents):
        mask = BlockMask.from_blocks(block_map, (ROWS, COLUMNS), Causal(offset))
        function = functools.partial(call, implementation, mask=mask, score_mod=slopes)
        return with_gradients(function, arrays, cotangents)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *draws)
    got, reference = (
        quick_jit(jax.vmap(functools.partial(run, name)))(offsets, maps, *stacked) for name in ("xla", "reference")
    )

    def definition(offset, block_map, arrays, cotangents):
        allowed = block_map.repeat(ROWS, 2).repeat(COLUMNS, 3)[:, :, :19, :37] & dense(Causal(offset), 2, 4, 19, 37)
        return numerics.attention(arrays, cotangents, allowed=allowed, score_mod=slopes)

    truth = each(definition, [(offset, block_map, *one) for offset, block_map, one in zip(offsets, maps, draws)])
    assert_accurate(got, reference, truth)


def test_queries_in_pieces_inside_scan_and_checkpoint(rng):
    """A scan over pieces of the queries, each with the traced offset of its mask, is the whole."""
    n, pieces = 11, 3
    T = n * pieces

    def run(implementation, arrays):
        query = jnp.moveaxis(arrays["query"].reshape(2, pieces, n, 4, 5), 1, 0)

        @jax.checkpoint
        def piece(offset, query):
            params = arrays["params"]  # closed over, inside the scan and the checkpoint
            inputs = {"query": query, "key": arrays["key"], "value": arrays["value"]}
            score_mod = lambda s, b, h, q, k: slopes(s, b, h, q + offset, k, params)
            mask = Causal(offset) & SlidingWindow(20, offset)
            return offset + n, call(implementation, inputs, mask=mask, score_mod=score_mod)

        results = jax.lax.scan(piece, jnp.int32(0), query)[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(2, T, *x.shape[3:]), results)

    allowed = dense(Causal() & SlidingWindow(20), 2, 4, T, T + 4)
    check(run, draw(rng, T=T, S=T + 4, params=(4,)), allowed=allowed, score_mod=slopes)


def test_any_split_of_the_keys_is_the_whole(rng):
    cuts = [0, *sorted(rng.choice(np.arange(1, 37), 3, replace=False)), 37]
    order = rng.permutation(4)

    def run(implementation, arrays):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            part = {"query": arrays["query"], **{name: arrays[name][:, start:stop] for name in ("key", "value")}}
            out, lse = call(implementation, part, mask=Causal(-int(start)))  # later parts have queries without keys
            parts.append((lse, jnp.ones_like(lse), out))
        m, l, o = functools.reduce(softmax_combine, [parts[i] for i in order])
        return o / l[..., None], m + jnp.log(l)

    ((arrays, cotangents),) = draw(rng, n=1)
    got = compiled(run, "xla")(arrays, cotangents)
    assert_close(got, numerics.attention(arrays, cotangents, allowed=dense(Causal(), 2, 4, 19, 37)), 3e-6)


def test_softmax_combine_is_a_commutative_monoid(rng):
    def part():
        m = np.where(rng.random(50) < 0.2, -np.inf, rng.uniform(-100, 100, 50))
        empty = m == -np.inf
        return tuple(
            jnp.asarray(x, jnp.float32)
            for x in (m, np.where(empty, 0, rng.uniform(1, 9, 50)), np.where(empty, 0, rng.standard_normal((3, 50))).T)
        )

    a, b, c = part(), part(), part()
    identity = (jnp.full(50, -jnp.inf), jnp.zeros(50), jnp.zeros((50, 3)))
    for x, y in (
        (softmax_combine(a, identity), a),
        (softmax_combine(identity, a), a),
        (softmax_combine(a, b), softmax_combine(b, a)),
    ):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    left, right = softmax_combine(softmax_combine(a, b), c), softmax_combine(a, softmax_combine(b, c))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), left, right)
