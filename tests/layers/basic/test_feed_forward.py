import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf, expit

from manyheads.layers.basic import FeedForward, GatedFeedForward, activation_function
from manyheads.layers.basic.activation import ACTIVATIONS

FORMULAS = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": expit,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, rng):
    x = 4 * rng.standard_normal(200)
    np.testing.assert_allclose(
        activation_function(name)(jnp.asarray(x, jnp.float32)), FORMULAS[name](x), rtol=2e-5, atol=1e-5
    )


def parameters(layer):
    return np.asarray(layer.kernel[...], np.float64), 0 if layer.bias is None else np.asarray(layer.bias[...])


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_plain(activation, use_bias, rng):
    layer = FeedForward(6, 10, activation=activation, use_bias=use_bias, rngs=nnx.Rngs(0))
    if use_bias:
        layer.up.bias[...] = jnp.asarray(rng.standard_normal(10), jnp.float32)
    x = rng.standard_normal((2, 3, 6))
    (up, up_bias), (down, down_bias) = parameters(layer.up), parameters(layer.down)
    desired = FORMULAS[activation](x @ up.T + up_bias) @ down.T + down_bias
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), desired, rtol=1e-4, atol=1e-5)


def test_gated(rng):
    layer = GatedFeedForward(6, 10, rngs=nnx.Rngs(0))
    x = rng.standard_normal((2, 3, 6))
    (gate, _), (up, _), (down, _) = (parameters(part) for part in (layer.gate, layer.up, layer.down))
    desired = (FORMULAS["silu"](x @ gate.T) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), desired, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_an_unknown_activation_is_one_line(kind):
    with pytest.raises(ValueError, match=r"activation='swish' is not one of silu, gelu, .*identity$"):
        kind(4, 8, activation="swish", rngs=nnx.Rngs(0))
