import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manyheads.layers.basic import LayerNorm, RMSNorm, layer_norm, make_norm, rms_norm

DTYPES = pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])


def rms_norm_float64(x, weight, eps=1e-6):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm_float64(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def draw(rng, dtype):
    """Inputs of many sizes, weights and a bias; and the same numbers in float64."""
    x = rng.standard_normal((3, 5, 32)) * 10.0 ** rng.integers(-2, 5, (3, 5, 1))
    arrays = [jnp.asarray(a, dtype) for a in (x, rng.standard_normal(32), rng.standard_normal(32))]
    return arrays, [np.asarray(a, np.float64) for a in arrays]


@DTYPES
def test_rms_norm(dtype, rounding, rng):
    (x, weight, _), (x64, weight64, _) = draw(rng, dtype)
    y = rms_norm(x, weight)
    assert y.dtype == dtype
    desired = rms_norm_float64(x64, weight64)
    assert np.all(np.abs(np.asarray(y, np.float64) - desired) <= rounding * np.abs(desired) + 1e-7)
    np.testing.assert_array_equal(rms_norm(x), rms_norm(x, jnp.ones(32)))


@DTYPES
def test_layer_norm(dtype, rounding, rng):
    (x, weight, bias), (x64, weight64, bias64) = draw(rng, dtype)
    y = layer_norm(x, weight, bias)
    assert y.dtype == dtype
    desired = layer_norm_float64(x64, weight64, bias64)
    assert np.all(np.abs(np.asarray(y, np.float64) - desired) <= rounding * np.abs(desired) + 1e-5)


def test_layer_norm_of_a_small_spread_around_a_large_mean(rng):
    x = (1000 + rng.standard_normal((4, 64))).astype(np.float32)
    np.testing.assert_allclose(layer_norm(x), layer_norm_float64(x.astype(np.float64), 1, 0), atol=2e-4)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_zeros_are_finite_with_their_gradient(norm):
    y, gradient = jax.value_and_grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((2, 4)))
    assert y == 0 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_eps_counts_where_the_features_are_small(norm, rng):
    x = 1e-3 * rng.standard_normal((3, 16)).astype(np.float32)
    desired = {rms_norm: rms_norm_float64(x, 1, 1e-2), layer_norm: layer_norm_float64(x, 1, 0, 1e-2)}[norm]
    np.testing.assert_allclose(norm(x, eps=1e-2), desired, rtol=1e-4, atol=1e-8)


def test_modules_are_the_functions_with_their_parameters(rng):
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    for module, function in ((RMSNorm(8, eps=0.1), rms_norm), (LayerNorm(8, eps=0.1), layer_norm)):
        np.testing.assert_allclose(module(x), function(x, eps=0.1), rtol=1e-6)
        module.weight[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
        parameters = [module.weight[...]]
        if hasattr(module, "bias"):
            module.bias[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
            parameters.append(module.bias[...])
        np.testing.assert_allclose(module(x), function(x, *parameters, eps=0.1), rtol=1e-6)


def test_make_norm():
    assert isinstance(make_norm("rms", 4), RMSNorm) and make_norm("rms", 4).eps == 1e-6
    assert isinstance(make_norm("layer", 4), LayerNorm) and make_norm("layer", 4).eps == 1e-5
    assert make_norm("rms", 4, eps=0.5).eps == 0.5
    with pytest.raises(ValueError, match="norm='batch' is not one of rms, layer"):
        make_norm("batch", 4)
