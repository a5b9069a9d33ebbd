import jax.numpy as jnp
import numpy as np
import pytest

from manyheads.layers.position import rope

FORMS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def rotated(x, positions, base, interleaved):
    """RoPE as multiplication of complex numbers, in float64."""
    K = x.shape[-1]
    x = x.astype(np.float64)
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., : K // 2] + 1j * x[..., K // 2 :]
    angle = positions[..., None, None] * base ** (-np.arange(0, K, 2) / K)
    pairs = pairs * np.exp(1j * angle)
    parts = (pairs.real, pairs.imag)
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)


@FORMS
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_values(interleaved, base, rng):
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5))
    desired = rotated(x, positions, base, interleaved)
    actual = rope(jnp.asarray(x), jnp.asarray(positions), base=base, interleaved=interleaved)
    np.testing.assert_allclose(actual, desired, atol=1e-3)  # angles of 1000 radians in float32
    shared = rope(jnp.asarray(x), jnp.asarray(positions[0]), base=base, interleaved=interleaved)
    np.testing.assert_array_equal(shared[0], actual[0])


@FORMS
def test_products_depend_on_the_distance_alone(interleaved, rng):
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 16)), jnp.float32)
    t, s, shift = rng.integers(0, 200, 3)

    def product(t, s):
        at = lambda x, position: rope(x, jnp.array([position]), interleaved=interleaved)[0, 0, 0]
        return at(q, t) @ at(k, s)

    np.testing.assert_allclose(product(t + shift, s + shift), product(t, s), atol=2e-3)
    assert abs(product(t + 1, s) - product(t, s)) > 1e-5


@FORMS
def test_it_is_a_rotation_and_none_at_the_origin(interleaved, rng):
    x = jnp.asarray(rng.standard_normal((1, 4, 2, 6)), jnp.float32)
    np.testing.assert_array_equal(rope(x, jnp.zeros(4, jnp.int32), interleaved=interleaved), x)
    y = rope(x, jnp.arange(4) * 37, interleaved=interleaved)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_the_two_forms_differ_by_a_permutation_of_features(rng):
    K = 10
    x = jnp.asarray(rng.standard_normal((2, 7, 3, K)), jnp.float32)
    positions = jnp.arange(7) + 3
    to_interleaved = np.arange(K).reshape(2, K // 2).T.ravel()
    np.testing.assert_allclose(
        rope(x, positions)[..., to_interleaved],
        rope(x[..., to_interleaved], positions, interleaved=True),
        atol=1e-6,
    )


@FORMS
def test_bfloat16_features_turn_by_float32_angles(interleaved, rng):
    # Integers above 256 do not fit into bfloat16: angles in it would be off by radians.
    x = jnp.asarray(rng.standard_normal((1, 64, 2, 8)), jnp.bfloat16)
    positions = rng.integers(1000, 4000, (1, 64))
    y = rope(x, jnp.asarray(positions), interleaved=interleaved)
    assert y.dtype == jnp.bfloat16
    desired = rotated(np.asarray(x), positions, 10000.0, interleaved)
    error = np.abs(np.asarray(y, np.float64) - desired)
    assert np.all(error <= 2**-8 * np.abs(desired) + 2e-3)


def test_an_odd_head_cannot_be_paired():
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        rope(jnp.zeros((1, 2, 1, 7)), jnp.arange(2))
