import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.layers.basic import Embedding, Linear, head_size, linear, split_heads


def test_linear_has_its_kernel_as_out_in(rng):
    layer = Linear(5, 3, use_bias=True, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (3, 5) and not np.any(layer.bias[...])
    layer.bias[...] = jnp.asarray(rng.standard_normal(3), jnp.float32)
    x = rng.standard_normal((2, 4, 5)).astype(np.float32)
    desired = x.astype(np.float64) @ np.asarray(layer.kernel[...], np.float64).T + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), desired, rtol=1e-5, atol=1e-6)
    assert Linear(5, 3, rngs=nnx.Rngs(0)).bias is None


def test_linear_computes_in_the_dtype_of_its_input(rng):
    x, kernel = rng.standard_normal((2, 5)), jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
    y = linear(jnp.asarray(x, jnp.bfloat16), kernel, jnp.ones(3))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ np.asarray(kernel).T + 1, atol=0.1)


@pytest.mark.parametrize(("options", "stddev"), [({}, 0.05), ({"stddev": 0.5}, 0.5)])
def test_the_initial_kernel_is_a_truncated_normal(options, stddev, seed):
    kernel = np.asarray(Linear(400, 100, **options, rngs=nnx.Rngs(seed)).kernel[...]) / stddev
    assert 1.99 < np.abs(kernel).max() <= 2
    assert abs(kernel.std() - 0.8796) < 0.02  # of a standard normal cut at 2


def test_embedding_rows_and_logits(rng):
    embedding = Embedding(6, 4, rngs=nnx.Rngs(0))
    table = np.asarray(embedding.table[...])
    ids = rng.integers(0, 6, (2, 5))
    np.testing.assert_array_equal(embedding(ids), table[ids])
    np.testing.assert_array_equal(embedding(jnp.array([6, 1000])), table[[5, 5]])
    x = rng.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(embedding.attend(x), x @ table.T, rtol=1e-5, atol=1e-6)


def test_heads():
    assert head_size(12, 3) == 4 and head_size(12, 5, 7) == 7
    x = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(split_heads(x, 2)[:, :, 1], x[:, :, 4:])


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((12, 5), "num_heads=5 does not divide d_model=12; choose a divisor or set head_dim"),
        ((12, 0), "num_heads=0 must be at least 1"),
        ((12, 3, 0), "head_dim=0 must be at least 1"),
    ],
)
def test_heads_that_do_not_fit(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        head_size(*sizes)
