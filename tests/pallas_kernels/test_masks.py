import jax.numpy as jnp
import pytest
from mask_cases import ROWS, pairs, random_mask

from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow


@pytest.mark.parametrize("leaf", [Causal, SlidingWindow, FirstKeys, None], ids=["causal", "window", "first", "any"])
def test_bounds_are_sound(leaf, rng):
    outcomes = set()
    for _ in range(30):
        mask = random_mask(rng)
        while leaf and not isinstance(mask, leaf):
            mask = random_mask(rng, depth=0)
        for height, width in ((1, 1), (1, 12), (9, 5), (16, 16)):
            b, q0, k0 = int(rng.integers(ROWS)), int(rng.integers(40)), int(rng.integers(40))
            q, k = (q0, q0 + height - 1), (k0, k0 + width - 1)
            (some, every), allowed = mask.bounds(b, q, k), pairs(mask, b, q, k)
            assert some or not allowed.any(), (mask, b, q, k)
            assert allowed.all() or not every, (mask, b, q, k)
            if leaf:  # exact, but for compositions
                assert (bool(some), bool(every)) == (allowed.any(), allowed.all()), (mask, b, q, k)
            outcomes.add((bool(some), bool(every)))
    assert outcomes >= {(False, False), (True, False), (True, True)}


def test_what_the_masks_allow():
    def rows(mask, b=0):
        return ["".join(".x"[int(x)] for x in row) for row in pairs(mask, b, (0, 3), (0, 5))]

    assert rows(Causal()) == ["x.....", "xx....", "xxx...", "xxxx.."]
    assert rows(Causal(2)) == ["xxx...", "xxxx..", "xxxxx.", "xxxxxx"]
    assert rows(Causal(jnp.array([9, -2])), b=1) == ["......", "......", "x.....", "xx...."]
    assert rows(SlidingWindow(2)) == ["xxxxxx", "xxxxxx", ".xxxxx", "..xxxx"]
    assert rows(Causal(1) & SlidingWindow(2, 1)) == ["xx....", ".xx...", "..xx..", "...xx."]
    assert rows((Causal() & SlidingWindow(1)) | FirstKeys(1)) == ["x.....", "xx....", "x.x...", "x..x.."]


def test_masks_compare_by_value():
    one, other = (Causal(3) & SlidingWindow(4, 3) | FirstKeys(2) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != Causal(3) & SlidingWindow(5, 3) | FirstKeys(2)


def test_a_window_without_keys_is_an_error():
    with pytest.raises(ValueError, match="SlidingWindow: size=0 must be at least 1"):
        SlidingWindow(0)
