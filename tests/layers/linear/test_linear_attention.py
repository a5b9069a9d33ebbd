import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.layers.linear import LinearAttention, elu_plus_one


def explicit(mixer, x):
    """The normalised sum over all earlier tokens of one sequence, in float64."""
    H, K, T = mixer.num_heads, mixer.head_dim, len(x)
    heads = lambda layer: (x @ np.asarray(layer.kernel[...], np.float64).T).reshape(T, H, K)
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    weights = np.einsum("thk,shk->hts", phi(heads(mixer.query)), phi(heads(mixer.key))) * np.tri(T)
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("hts,shk->thk", weights, heads(mixer.value))
    return o.reshape(T, -1) @ np.asarray(mixer.out.kernel[...], np.float64).T


@pytest.mark.parametrize("options", [{}, {"num_heads": 1}, {"num_heads": 3, "head_dim": 5}])
def test_explicit_sum(options, rng):
    mixer = LinearAttention(12, **options, rngs=nnx.Rngs(0))
    x = rng.standard_normal((2, 9, 12))
    y = np.asarray(jax.jit(lambda mixer, x: mixer(x))(mixer, x.astype(np.float32)))
    for row, actual in zip(x, y):
        desired = explicit(mixer, row)
        assert np.abs(actual - desired).max() <= 2e-5 * np.abs(desired).max()


def test_the_feature_map_is_positive(rng):
    x = np.concatenate([[-80.0, -20.0, 0.0, 20.0], 3 * rng.standard_normal(50)]).astype(np.float32)
    desired = np.where(x > 0, x.astype(np.float64) + 1, np.exp(x.astype(np.float64)))
    np.testing.assert_allclose(elu_plus_one(jnp.asarray(x)), desired, rtol=1e-5)
    low = jnp.asarray(x, jnp.bfloat16)
    desired = np.where(low > 0, np.asarray(low, np.float64) + 1, np.exp(np.asarray(low, np.float64)))
    np.testing.assert_allclose(np.asarray(elu_plus_one(low), np.float64), desired, rtol=2**-7)
    np.testing.assert_array_equal(jax.vmap(jax.grad(elu_plus_one))(jnp.array([-1e3, 0.0, 2.0])), [0, 1, 1])


def test_features_that_underflow_have_finite_gradients(rng):
    mixer = LinearAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    x = jnp.asarray(1000 * rng.standard_normal((2, 40, 8)), jnp.float32)
    results = jax.jit(jax.value_and_grad(lambda mixer, x: jnp.sum(mixer(x)), (0, 1)))(mixer, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads=5 does not divide d_model=12"):
        LinearAttention(12, num_heads=5, rngs=nnx.Rngs(0))
