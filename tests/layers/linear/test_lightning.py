import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit

from manyheads.layers.linear import LightningAttention, lightning_log_decay

ACTIVATIONS = {"silu": lambda x: x * expit(x), "identity": lambda x: x, "sigmoid": expit}


def explicit(mixer, x, slopes, activation="silu", value_activation="identity", gate_activation="identity"):
    """The sum over all earlier tokens of one sequence, in float64."""
    H, K, T = mixer.num_heads, mixer.head_dim, len(x)
    project = lambda layer: x @ np.asarray(layer.kernel[...], np.float64).T
    act, value_act, gate_act = (ACTIVATIONS[name] for name in (activation, value_activation, gate_activation))
    q, k = (act(project(layer)).reshape(T, H, K) for layer in (mixer.query, mixer.key))
    v = value_act(project(mixer.value)).reshape(T, H, K)
    o = np.zeros((T, H, K))
    for t in range(T):
        for s in range(t + 1):
            o[t] += (np.exp(-np.asarray(slopes) * (t - s)) * np.sum(q[t] * k[s], axis=-1))[:, None] * v[s]
    o = o.reshape(T, H * K)
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6)
    if mixer.norm is not None:
        o = o * np.asarray(mixer.norm.weight[...], np.float64)
    return (o * gate_act(project(mixer.gate))) @ np.asarray(mixer.out.kernel[...], np.float64).T


@pytest.mark.parametrize(
    ("options", "slopes"),
    [
        ({"num_heads": 4}, [2**-2, 2**-4, 2**-6, 2**-8]),
        ({"num_heads": 2, "head_dim": 3, "depth": 0.5}, [2**-5, 2**-9]),
        ({"num_heads": 1, "depth": 1.0, "activation": "identity", "value_activation": "silu"}, [2**-8 * 1e-5]),
        ({"num_heads": 3, "gate_activation": "sigmoid", "norm_weight": True}, [2**-4, 2**-8, 2**-2]),
    ],
)
def test_explicit_sum(options, slopes, rng):
    mixer = LightningAttention(12, **options, rngs=nnx.Rngs(0))
    if mixer.norm is not None:
        mixer.norm.weight[...] = jnp.asarray(rng.standard_normal(12), jnp.float32)
    x = rng.standard_normal((2, 9, 12))
    y = np.asarray(jax.jit(lambda mixer, x: mixer(x))(mixer, x.astype(np.float32)))
    kinds = {name: value for name, value in options.items() if name.endswith("activation")}
    for row, actual in zip(x, y):
        desired = explicit(mixer, row, slopes, **kinds)
        assert np.abs(actual - desired).max() <= 2e-5 * np.abs(desired).max()


def test_lower_layers_forget_faster():
    np.testing.assert_allclose(lightning_log_decay(2), -np.array([2**-4, 2**-8]) * (1 + 1e-5), rtol=1e-6)
    decays = np.array([lightning_log_decay(8, depth) for depth in np.linspace(0, 1, 5)])
    assert np.all(np.diff(decays, axis=0) > 0) and np.all(decays < 0)
    assert np.all(np.diff(decays, axis=1) > 0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=12"),
        ({"activation": "swish"}, "activation='swish' is not one of"),
        ({"gate_activation": "swish"}, "activation='swish' is not one of"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        LightningAttention(12, **options, rngs=nnx.Rngs(0))
