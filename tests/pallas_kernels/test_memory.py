"""Memory linear in the length, from what the compiler reserves, and work in proportion to the active tiles."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import COLUMNS, ROWS
from numerics import quick_jit

from manyheads.pallas_kernels import BlockMask, create_block_mask, flex_attention, linear_attention
from manyheads.pallas_kernels.flex_attention import tuning
from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow

HEADS, FEATURES = 2, 8
SHORT, LONG = 1024, 4096


def temporaries(function, T, gradients, *, T_decay=None):
    """Bytes that the compiled function needs beside its arguments and results."""
    shapes = [(1, T, HEADS, FEATURES)] * 3 + ([(1, T, *T_decay)] if T_decay is not None else [])
    if gradients:
        forward = function
        function = jax.grad(lambda *args: jnp.sum(forward(*args) ** 2), argnums=tuple(range(len(shapes))))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return quick_jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def assert_linear(function, gradients, **options):
    """Temporaries grow with T, not with its square, and are not much more than a few arrays like the inputs."""
    short, long = (temporaries(function, T, gradients, **options) for T in (SHORT, LONG))
    assert long < 6 * short, f"{short} bytes at T = {SHORT}, {long} at {LONG}"
    inputs = 3 * 4 * LONG * HEADS * FEATURES
    assert long < 4 * inputs, f"{long} bytes at T = {LONG}, where query, key and value are {inputs}"


FORWARD_AND_BACKWARD = pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])


@FORWARD_AND_BACKWARD
@pytest.mark.parametrize("mask", [Causal(), Causal() & SlidingWindow(256)], ids=["causal", "window"])
def test_flex_attention_needs_linear_memory(mask, gradients):
    assert_linear(functools.partial(flex_attention, mask=mask, implementation="xla"), gradients)


@FORWARD_AND_BACKWARD
@pytest.mark.parametrize("decay", [None, (HEADS,), (HEADS, FEATURES)], ids=["no decay", "token", "feature"])
def test_linear_attention_needs_linear_memory(decay, gradients):
    def run(query, key, value, log_decay=None):
        return linear_attention(query, key, value, log_decay=log_decay, implementation="xla")[0]

    assert_linear(run, gradients, T_decay=decay)


def test_the_reference_would_be_seen():
    with pytest.raises(AssertionError, match="bytes at T"):
        assert_linear(functools.partial(flex_attention, mask=Causal(), implementation="reference"), False)


CASES = {
    "causal": lambda rng: Causal(),
    "window": lambda rng: Causal(4) & SlidingWindow(9, 4),
    "sink keys": lambda rng: (Causal() & SlidingWindow(5)) | FirstKeys(3),
    "plain": lambda rng: create_block_mask(
        lambda b, h, q, k: (q // 9 + k // 17 + h) % 3 == b, 2, 4, 29, 61, (ROWS, COLUMNS)
    ),
    "dynamic": lambda rng: BlockMask.from_blocks(rng.random((2, 1, 4, 4)) < 0.5, (ROWS, COLUMNS)),
}


@pytest.mark.parametrize("name", CASES)
def test_only_active_tiles_are_computed(name, small_tiles, rng):
    """Each active tile once forward and once more backward, the others never: counted by the score function."""
    B, T, S, H = 2, 29, 61, 4
    mask = CASES[name](rng)
    visits = collections.Counter()

    def record(b, h, q, k):
        visits[int(b.min()), int(h.min()), int(q.min()) // ROWS, int(k.min()) // COLUMNS] += 1
        return np.zeros(np.broadcast_shapes(b.shape, h.shape, q.shape, k.shape), np.float32)

    def score_mod(score, b, h, q, k):
        zero = jax.ShapeDtypeStruct((), jnp.float32)
        return score + jax.pure_callback(record, zero, b, h, q, k, vmap_method="broadcast_all")

    query, key, value = (jnp.asarray(rng.standard_normal((B, n, H, 5)), jnp.float32) for n in (T, S, S))
    run = functools.partial(flex_attention, mask=mask, score_mod=score_mod, implementation="xla")
    block_mask = mask if isinstance(mask, BlockMask) else create_block_mask(mask, None, None, T, S, (ROWS, COLUMNS))
    block_map = np.asarray(block_mask.block_map)
    rows, heads = (n // m for n, m in zip((B, H), block_map.shape))  # of one map
    active = {(b * rows, h * heads, q, k) for b, h, q, k in np.argwhere(block_map)}
    assert 0 < len(active) < block_map.size

    jax.block_until_ready(quick_jit(run)(query, key, value))
    assert visits == dict.fromkeys(active, 1)
    visits.clear()
    jax.block_until_ready(
        quick_jit(jax.grad(lambda *inputs: jnp.sum(run(*inputs)), argnums=(0, 1, 2)))(query, key, value)
    )
    assert visits == dict.fromkeys(active, 2)


def test_tiles_of_different_segments_are_not_computed(monkeypatch, rng):
    """Documents that end at the borders of tiles: what they would read of each other is NaN."""
    monkeypatch.setattr(tuning, "XLA_SINGLE_TILE", 1)
    monkeypatch.setattr(tuning, "XLA_BLOCK", (8, 8))
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 8)[None]
    query, key, value = (jnp.asarray(rng.standard_normal((1, 32, 2, 4)), jnp.float32) for _ in range(3))
    poisoned = value.at[:, 8:16].set(jnp.nan)
    run = quick_jit(functools.partial(flex_attention, segment_ids=ids, implementation="xla"))
    out, expected = run(query, key, poisoned), run(query, key, value)
    others = np.r_[:8, 16:32]
    np.testing.assert_array_equal(out[:, others], expected[:, others])
    assert np.isnan(out[:, 8:16]).all()
