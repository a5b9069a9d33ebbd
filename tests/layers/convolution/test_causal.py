from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from manyheads.layers.convolution import long_convolution, short_convolution
from manyheads.layers.convolution.causal import InputCache, TailCache
from manyheads.tpu import make_mesh

BATCH, FEATURES = 2, 3
FORMS = pytest.mark.parametrize("convolve", [short_convolution, long_convolution])


def draw(rng, length, taps, dtype=np.float32):
    u, filters = rng.standard_normal((BATCH, length, FEATURES)), rng.standard_normal((taps, FEATURES))
    return jnp.asarray(u, dtype), jnp.asarray(filters, dtype)


def convolved(u, filters):
    """numpy.convolve, in float64, of each row and feature."""
    u, filters = np.asarray(u, np.float64), np.asarray(filters, np.float64)
    columns = [[np.convolve(row, taps)[: len(row)] for row, taps in zip(x.T, filters.T)] for x in u]
    return np.swapaxes(np.array(columns), 1, 2)


@pytest.mark.parametrize(
    ("convolve", "length", "taps"),
    [
        *[(short_convolution, *sizes) for sizes in [(1, 1), (1, 3), (5, 40), (13, 3), (64, 4)]],
        *[(long_convolution, *sizes) for sizes in [(1, 1), (1, 3), (13, 13), (13, 40), (128, 128)]],
    ],
)
def test_values(convolve, length, taps, rng):
    u, filters = draw(rng, length, taps)
    np.testing.assert_allclose(jax.jit(convolve)(u, filters), convolved(u, filters), rtol=1e-5, atol=2e-5)


@FORMS
def test_packed_documents_are_convolved_alone(convolve, rng):
    u, filters = draw(rng, 17, 17)
    borders = [[0, 1, 9, 17], [0, 4, 16, 17]]
    ids = jnp.array([np.repeat([7, -2, 0], np.diff(row)) for row in borders])  # an id may be zero or less
    y = np.asarray(jax.jit(convolve)(u, filters, ids))
    for b, row in enumerate(borders):
        for start, stop in pairwise(row):
            alone = convolved(np.asarray(u)[b : b + 1, start:stop], filters)
            np.testing.assert_allclose(y[b : b + 1, start:stop], alone, rtol=1e-5, atol=2e-5)


@FORMS
def test_gradients(convolve, rng):
    u, filters = draw(rng, 11, 4)
    cotangent = draw(rng, 11, 4)[0]
    for segment_ids in (None, jnp.zeros((BATCH, 11), jnp.int32)):
        loss = lambda u, filters: jnp.sum(cotangent * convolve(u, filters, segment_ids))  # noqa: B023
        du, dfilters = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(u, filters))
        reverse = lambda x: np.asarray(x)[:, ::-1]
        np.testing.assert_allclose(du, reverse(convolved(reverse(cotangent), filters)), rtol=1e-4, atol=1e-4)
        for lag in range(4):
            desired = np.sum(np.asarray(cotangent)[:, lag:] * np.asarray(u)[:, : 11 - lag], axis=(0, 1))
            np.testing.assert_allclose(dfilters[lag], desired, rtol=1e-4, atol=1e-4)


def test_long_convolution_of_bfloat16_transforms_in_float32(rng):
    u, filters = draw(rng, 64, 64, jnp.bfloat16)
    y = long_convolution(u, filters)
    assert y.dtype == jnp.bfloat16
    desired = convolved(u, filters)
    assert np.all(np.abs(np.asarray(y, np.float64) - desired) <= 2**-8 * np.abs(desired) + 1e-4)


def test_long_convolution_over_a_mesh(rng):
    mesh = make_mesh(data=2, sequence=4)
    u, filters = draw(rng, 16, 16)
    spread = jax.device_put(u, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    run = jax.jit(jax.value_and_grad(lambda u: jnp.sum(jnp.sin(long_convolution(u, filters)))))
    for actual, desired in zip(run(spread), run(u)):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "taps"), [(TailCache, 1), (TailCache, 4), (TailCache, 40), (InputCache, 30), (InputCache, 40)]
)
def test_caches_continue_a_convolution(kind, taps, rng):
    length = 30
    u, filters = draw(rng, length, taps)
    if kind is TailCache:
        cache = TailCache(jnp.zeros((BATCH, taps - 1, FEATURES)))
    else:
        cache = InputCache(jnp.zeros((BATCH, length, FEATURES)), jnp.zeros(BATCH, jnp.int32))
    whole = convolved(u, filters)
    step = jax.jit(lambda cache, u, lengths: cache.convolve(u, filters, lengths))
    start = np.zeros(BATCH, int)
    while start.min() < length:
        n = int(rng.choice([1, 7]))
        lengths = np.minimum(rng.integers(0, n + 1, BATCH), length - start).astype(np.int32)
        piece = 100 * np.asarray(draw(rng, n, 1)[0])
        for b in range(BATCH):
            piece[b, : lengths[b]] = u[b, start[b] : start[b] + lengths[b]]
        y, cache = step(cache, piece, lengths)
        y = np.asarray(y)
        for b in range(BATCH):
            desired = whole[b, start[b] : start[b] + lengths[b]]
            np.testing.assert_allclose(y[b, : lengths[b]], desired, rtol=1e-4, atol=1e-3)
        start += lengths
