import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manyheads.layers.cache import KVCache, WindowCache, advance

BATCH, HEADS, FEATURES = 3, 2, 4
append = jax.jit(lambda cache, key, value, lengths: cache.append(key, value, lengths))


def pieces(rng, count):
    """Random pieces of keys and values, with and without lengths; what is not real is not a number."""
    for _ in range(count):
        n = int(rng.choice([1, 8]))
        key, value = rng.standard_normal((2, BATCH, n, HEADS, FEATURES)).astype(np.float32)
        lengths = None if rng.integers(2) else rng.integers(0, n + 1, BATCH).astype(np.int32)
        if lengths is not None:
            key[np.arange(n) >= lengths[:, None]] = np.nan
        yield key, value, lengths


def follow(cache, rng, count):
    """Append random pieces to a cache and, as the model of it, to a list a row; yield both after each."""
    rows = [[] for _ in range(BATCH)]
    for key, value, lengths in pieces(rng, count):
        before = jax.tree.map(np.array, cache)
        after = append(cache, key, value, lengths)
        jax.tree.map(np.testing.assert_array_equal, cache, before)  # caches are values: the old one stays as it was
        cache = after
        for b, row in enumerate(rows):
            row += list(zip(key[b], value[b]))[: None if lengths is None else lengths[b]]
        yield cache, rows


def test_kv_cache_holds_every_token_in_its_slot(rng):
    for cache, rows in follow(KVCache.empty(BATCH, 64, HEADS, FEATURES), rng, 8):
        assert cache.capacity == 64
        np.testing.assert_array_equal(cache.length, [len(row) for row in rows])
        keys, values = jax.device_get(cache.tokens())
        for b, row in enumerate(rows):
            for position, (key, value) in enumerate(row):
                np.testing.assert_array_equal(keys[b, position], key)
                np.testing.assert_array_equal(values[b, position], value)
            assert not np.any(keys[b, len(row) :]), "slots beyond the tokens are empty"


def test_tokens_beyond_the_capacity_are_dropped(rng):
    key, value = rng.standard_normal((2, BATCH, 8, HEADS, FEATURES)).astype(np.float32)
    cache = append(KVCache.empty(BATCH, 5, HEADS, FEATURES), key, value, None)
    np.testing.assert_array_equal(cache.tokens()[0], key[:, :5])
    again = append(cache, key, value, None)
    np.testing.assert_array_equal(again.tokens()[0], key[:, :5])


@pytest.mark.parametrize(("window", "first"), [(5, 0), (5, 2), (1, 3), (20, 4)])
def test_window_cache_holds_the_first_tokens_and_the_last(window, first, rng):
    for cache, rows in follow(WindowCache.empty(BATCH, window, first, HEADS, FEATURES), rng, 12):
        assert cache.capacity == window + first
        np.testing.assert_array_equal(cache.length, [len(row) for row in rows])
        keys, values = jax.device_get(cache.tokens())
        for b, row in enumerate(rows):
            desired = [p for p in range(len(row)) if p < first or p >= len(row) - window]
            held = np.asarray(cache.position)[b]
            assert sorted(held[held >= 0]) == desired
            for slot in np.flatnonzero(held >= 0):
                key, value = row[held[slot]]
                np.testing.assert_array_equal(keys[b, slot], key)
                np.testing.assert_array_equal(values[b, slot], value)


def test_caches_keep_their_dtype(rng):
    for cache in (KVCache.empty(1, 4, 1, 2, jnp.bfloat16), WindowCache.empty(1, 4, 1, 1, 2, jnp.bfloat16)):
        after = append(cache, *jnp.ones((2, 1, 3, 1, 2)), None)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)


def test_advance():
    positions, length = advance(jnp.array([0, 7]), 3, None)
    np.testing.assert_array_equal(positions, [[0, 1, 2], [7, 8, 9]])
    np.testing.assert_array_equal(length, [3, 10])
    positions, length = advance(jnp.array([0, 7]), 3, jnp.array([0, 2]))
    np.testing.assert_array_equal(length, [0, 9])
    np.testing.assert_array_equal(positions[1, :2], [7, 8])
    assert np.all(positions[0] > 10**9) and positions[1, 2] > 10**9
