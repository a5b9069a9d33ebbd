import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_cases import ROWS, pairs, random_mask
from numerics import quick_jit

from manyheads.pallas_kernels import BlockMask, create_block_mask
from manyheads.pallas_kernels.block_mask import evaluate_mask
from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow

HEADS = 2


def sizes(rng):
    """T, S and a block size, which need not divide them."""
    T, S, rows, columns = (int(rng.integers(1, n)) for n in (40, 60, 12, 18))
    print(f"{T=} {S=} {rows=} {columns=}")
    return T, S, (rows, columns)


@quick_jit
def parts(mask):
    """The map and the pairs of a block mask."""
    return mask.block_map, mask.to_dense()


def create(*args):
    """``create_block_mask``, compiled as a whole."""
    return quick_jit(functools.partial(create_block_mask, *args))()


def blocks(dense, block_size):
    """Which blocks of a dense mask hold an allowed pair."""
    T, S = dense.shape[2:]
    rows, columns = block_size
    dense = np.pad(dense, [(0, 0), (0, 0), (0, -T % rows), (0, -S % columns)])
    return dense.reshape(*dense.shape[:2], -1, rows, dense.shape[3] // columns, columns).any((3, 5))


PLAIN = {
    "diagonals": lambda b, h, q, k: (q + k) % 7 == 0,
    "by row": lambda b, h, q, k: k * (b + 1) < q,
    "by head": lambda b, h, q, k: (k // 5 + q // 4) % (h + 2) == 0,
    "by both": lambda b, h, q, k: (q * 3 + k + b) % (5 + h) == 4,
    "all": lambda b, h, q, k: True,
    "none": lambda b, h, q, k: k < 0,
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_function_gives_its_blocks(name, rng):
    T, S, block_size = sizes(rng)
    dense = np.broadcast_to(PLAIN[name](*np.ogrid[:ROWS, :HEADS, :T, :S]), (ROWS, HEADS, T, S))
    mask = create(PLAIN[name], ROWS, HEADS, T, S, block_size)
    expected = blocks(dense, block_size)
    for got, wanted in zip(parts(mask), (expected, dense)):
        np.testing.assert_array_equal(got, wanted)
    assert mask.shape == (ROWS, HEADS, T, S)
    np.testing.assert_allclose(mask.density(), expected.mean(), rtol=1e-6)


def test_pairs_beyond_the_ends_do_not_count():
    mask = create(lambda b, h, q, k: (q >= 5) | (k >= 7), None, None, 5, 7, (4, 4))
    assert not np.any(mask.block_map)


def test_closed_over_arrays_decide(rng):
    T, S, block_size = sizes(rng)
    documents = np.sort(rng.integers(0, 4, max(T, S)))
    table = jnp.asarray(documents)
    mask = create(lambda b, h, q, k: table[q] == table[k], None, None, T, S, block_size)
    dense = (documents[:T, None] == documents[None, :S])[None, None]
    np.testing.assert_array_equal(mask.block_map, blocks(dense, block_size))


@pytest.mark.parametrize(
    "mask_mod",
    [
        Causal(),
        Causal(9),
        Causal(-9),
        SlidingWindow(4),
        Causal() & SlidingWindow(6),
        Causal(5) & SlidingWindow(6, 5),
        FirstKeys(7),
        (Causal() & SlidingWindow(3)) | FirstKeys(2),
        Causal() & FirstKeys(10),
    ],
    ids=repr,
)
def test_causal_and_window_masks_are_tight(mask_mod, rng):
    for T, S, block_size in (sizes(rng), (5, 23, (4, 4))):
        mask = create(mask_mod, None, None, T, S, block_size)
        dense = pairs(mask_mod, 0, (0, T - 1), (0, S - 1))[None, None]
        for got, wanted in zip(parts(mask), (blocks(dense, block_size), dense)):
            np.testing.assert_array_equal(got, wanted)


def test_no_structured_mask_drops_a_pair(rng):
    for T, S, block_size in ((29, 44, (8, 16)), (64, 64, (16, 16)), (5, 50, (1, 7))):
        for _ in range(4):
            mask_mod = random_mask(rng)
            build = functools.partial(create_block_mask, mask_mod, ROWS, HEADS, T, S, block_size)
            block_map = quick_jit(lambda build=build: build().block_map)()
            dense = np.stack([pairs(mask_mod, b, (0, T - 1), (0, S - 1)) for b in range(ROWS)])[:, None]
            assert not np.any(blocks(dense, block_size) & ~np.asarray(block_map)), mask_mod


def test_a_structured_mask_costs_its_blocks():
    """10^12 pairs, which nothing looks at."""
    mask = create(Causal() & SlidingWindow(10_000), None, None, 10**6, 10**6, (5_000, 5_000))
    q, k = np.ogrid[:200, :200]
    np.testing.assert_array_equal(mask.block_map[0, 0], (k <= q) & (q - k <= 2))


def test_a_traced_offset_gives_a_traced_map():
    build = jax.jit(lambda offset: create_block_mask(Causal(offset), 2, None, 8, 24, (4, 4)).block_map)
    offset = np.array([3, 12])
    dense = np.stack([pairs(Causal(n), 0, (0, 7), (0, 23)) for n in offset])[:, None]
    np.testing.assert_array_equal(build(offset), blocks(dense, (4, 4)))


def test_a_block_mask_is_a_pytree(rng):
    block_map = rng.random((5, 1, 2, 3, 4)) < 0.5
    build = functools.partial(
        BlockMask.from_blocks, block_size=(4, 8), mask_mod=PLAIN["diagonals"], q_len=10, kv_len=30
    )
    mask = jax.jit(lambda mask: mask)(jax.jit(build)(block_map[0]))  # in and out of jit, with all that is not an array
    assert (mask.block_size, mask.q_len, mask.kv_len, mask.mask_mod) == ((4, 8), 10, 30, PLAIN["diagonals"])
    dense = jax.jit(jax.vmap(lambda block_map: build(block_map).to_dense()))(block_map)
    inside = PLAIN["diagonals"](*np.ogrid[:1, :2, :10, :30])
    np.testing.assert_array_equal(dense, block_map.repeat(4, 3).repeat(8, 4)[..., :10, :30] & inside)


def test_without_lengths_blocks_are_whole(rng):
    block_map = rng.random((1, 2, 3, 2)) < 0.5
    mask = BlockMask.from_blocks(block_map, (4, 8))
    assert mask.shape == (1, 2, 12, 16)
    np.testing.assert_array_equal(mask.to_dense(), block_map.repeat(4, 2).repeat(8, 3))
    mask.check(9, 15)
    mask.check(12, 16)


def test_evaluate_mask_is_the_function_on_every_tuple():
    index = (jnp.array([1]), jnp.array([0, 3]), jnp.arange(5), jnp.array([2, 7, 9]))
    got = evaluate_mask(PLAIN["by both"], *index)
    np.testing.assert_array_equal(got, PLAIN["by both"](*np.ix_(*map(np.asarray, index))))


MAP = np.ones((1, 1, 2, 3), bool)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: BlockMask.from_blocks(MAP.astype(int), (4, 4)),
            r"block_map must be bool with axes B H nQ nS, got int",
        ),
        (lambda: BlockMask.from_blocks(MAP[0], (4, 4)), r"block_map must be bool .*\[1, 2, 3\]"),
        (lambda: BlockMask.from_blocks(MAP, (4, 0)), r"block_size=\(4, 0\) must be two positive integers"),
        (lambda: BlockMask.from_blocks(MAP, (4, 4, 4)), r"block_size=\(4, 4, 4\) must be two positive integers"),
        (
            lambda: BlockMask.from_blocks(MAP, (4, 4), q_len=9),
            "mask: a BlockMask of 2 x 3 blocks of 4 x 4 .* 9 queries",
        ),
        (lambda: BlockMask.from_blocks(MAP, (4, 4)).check(8, 13), "mask: .* does not fit 8 queries and 13 keys"),
        (lambda: BlockMask.from_blocks(MAP, (4, 4), q_len=7).check(8, 12), "mask: .* does not fit 8 queries"),
        (lambda: create_block_mask(Causal(), None, None, 8, 8, (0, 8)), "block_size"),
        (lambda: create_block_mask(Causal(), None, None, 0, 8), "q_len=0 and kv_len=8 must be positive"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
