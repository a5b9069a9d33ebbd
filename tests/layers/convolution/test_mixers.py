"""The convolution mixers against their equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.layers.convolution import BaseConv, GatedShortConvolution

T, D = 12, 5
run = jax.jit(lambda mixer, x: mixer(x))


def numbers(parameter):
    return np.asarray(parameter[...], np.float64)


def convolved(u, filters):
    return np.array([np.convolve(row, taps)[: len(row)] for row, taps in zip(u.T, filters.T)]).T


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("filter", ["short", "long", "implicit"])
def test_base_conv(filter, residual, rng):
    mixer = BaseConv(D, filter=filter, kernel_size=4, max_length=20, residual=residual, rngs=nnx.Rngs(0))
    for parameter in (mixer.bias, mixer.project.bias):
        parameter[...] = jnp.asarray(rng.standard_normal(D), jnp.float32)
    u = rng.standard_normal((T, D))
    if filter == "implicit":
        t = np.linspace(0, 1, 20)
        features = np.stack([t, np.cos(2 * np.pi * t), np.sin(2 * np.pi * t)], -1)
        hidden = np.maximum(features @ numbers(mixer.hidden.kernel).T + numbers(mixer.hidden.bias), 0)
        taps = (hidden @ numbers(mixer.readout.kernel).T + numbers(mixer.readout.bias)) / np.sqrt(20)
    else:
        taps = numbers(mixer.taps)
        assert taps.shape == (4 if filter == "short" else 20, D)
    mixed = convolved(u, taps) + (0 if filter == "short" else u) + numbers(mixer.bias)
    desired = (u @ numbers(mixer.project.kernel).T + numbers(mixer.project.bias)) * mixed + (u if residual else 0)
    np.testing.assert_allclose(run(mixer, u[None].astype(np.float32))[0], desired, rtol=1e-4, atol=1e-5)


def test_gated_short_convolution(rng):
    mixer = GatedShortConvolution(D, kernel_size=3, rngs=nnx.Rngs(0))
    x = rng.standard_normal((T, D))
    before, after, value, out = (numbers(part.kernel) for part in (mixer.before, mixer.after, mixer.value, mixer.out))
    z = convolved((x @ before.T) * (x @ value.T), numbers(mixer.filters))
    desired = ((x @ after.T) * z) @ out.T
    np.testing.assert_allclose(run(mixer, x[None].astype(np.float32))[0], desired, rtol=1e-4, atol=1e-5)


def test_a_long_filter_has_an_end():
    mixer = BaseConv(D, filter="long", max_length=8, rngs=nnx.Rngs(0))
    assert jax.eval_shape(mixer, jnp.zeros((1, 8, D))).shape == (1, 8, D)
    for beyond in (lambda: mixer(jnp.zeros((1, 9, D))), lambda: mixer.init_state(1, 9)):
        with pytest.raises(ValueError, match="max_length=8 of a BaseConv filter is shorter than 9 tokens"):
            beyond()
    BaseConv(D, filter="short", max_length=8, rngs=nnx.Rngs(0)).init_state(1, 9)


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        (BaseConv, {"filter": "fourier"}, "filter='fourier' is not one of short, long, implicit"),
        (BaseConv, {"kernel_size": 0}, "kernel_size=0 and max_length=1024 must be at least 1"),
        (BaseConv, {"max_length": -1}, "max_length=-1 must be at least 1"),
        (GatedShortConvolution, {"kernel_size": 0}, "kernel_size=0 must be at least 1"),
    ],
)
def test_options_that_make_no_sense(kind, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        kind(D, **options, rngs=nnx.Rngs(0))
