import numpy as np
import pytest

from manyheads.layers.position import alibi_slopes


def slopes(n: int) -> list[float]:
    """The rule of the paper: a geometric sequence from 2^(-8/n), or that of the power of two below and every other one
    of the power above."""
    if n & (n - 1) == 0:
        return [2 ** (-8 / n * (i + 1)) for i in range(n)]
    below = 1 << (n.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[0::2][: n - below]


@pytest.mark.parametrize("num_heads", range(1, 13))
def test_slopes(num_heads):
    actual = alibi_slopes(num_heads)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, slopes(num_heads), rtol=1e-6)


def test_no_heads():
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        alibi_slopes(0)
