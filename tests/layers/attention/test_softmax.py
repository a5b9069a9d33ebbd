import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.layers.attention import SoftmaxAttention

T, D = 11, 24
OPTIONS = [
    {},
    {"position": "none"},
    {"position": "rope", "rope_base": 100.0},
    {"position": "rope_interleaved"},
    {"position": "alibi", "num_heads": 3},
    {"num_heads": 6, "num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 10},
    {"window": 1},
    {"window": 3},
    {"window": 3, "first_tokens": 2},
    {"window": 50, "first_tokens": 2},
    {"sinks": True},
    {"softcap": 0.5},
    {"qk_norm": True},
    {"use_bias": True},
    {"num_heads": 4, "num_kv_heads": 2, "window": 4, "first_tokens": 1, "sinks": True, "softcap": 1.0, "qk_norm": True,
     "position": "alibi", "use_bias": True},
]  # fmt: skip


def build(options, rng):
    """A mixer with random numbers in place of every zero and one of the initial parameters."""
    mixer = SoftmaxAttention(D, **options, rngs=nnx.Rngs(int(rng.integers(2**31))))
    return jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(p.dtype), mixer)


def numbers(parameter):
    return 0 if parameter is None else np.asarray(parameter[...], np.float64)


def rotate(x, base, interleaved):
    """RoPE of ``T H K`` as multiplication of complex numbers."""
    K = x.shape[-1]
    even, odd = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, K // 2), slice(K // 2, None))
    turned = (x[..., even] + 1j * x[..., odd]) * np.exp(
        1j * np.arange(len(x))[:, None, None] * base ** (-np.arange(0, K, 2) / K)
    )
    y = np.empty_like(x)
    y[..., even], y[..., odd] = turned.real, turned.imag
    return y


def explicit(mixer, x):
    """Attention of one sequence, row by row of the score matrix, in float64."""
    n, H, G, K = len(x), mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    project = lambda layer, heads: (x @ numbers(layer.kernel).T + numbers(layer.bias)).reshape(n, heads, K)
    q, k, v = project(mixer.query, H), project(mixer.key, G), project(mixer.value, G)
    if mixer.query_norm is not None:
        norm = lambda x, weight: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * numbers(weight)
        q, k = norm(q, mixer.query_norm.weight), norm(k, mixer.key_norm.weight)
    if mixer.position.startswith("rope"):
        q, k = (rotate(x, mixer.rope_base, mixer.position == "rope_interleaved") for x in (q, k))
    slopes = {3: [2**-4, 2**-8, 2**-2], 4: [2**-2, 2**-4, 2**-6, 2**-8]}
    out = np.zeros((n, H, K))
    for h in range(H):
        for t in range(n):
            near = t + 1 if mixer.window is None else mixer.window
            keys = [s for s in range(t + 1) if t - s < near or s < mixer.first_tokens]
            z = k[keys, h * G // H] @ q[t, h] / np.sqrt(K)
            if mixer.softcap is not None:
                z = mixer.softcap * np.tanh(z / mixer.softcap)
            if mixer.position == "alibi":
                z = z - slopes[H][h] * (t - np.array(keys))
            total = np.exp(z).sum() + (0 if mixer.sinks is None else np.exp(numbers(mixer.sinks)[h]))
            out[t, h] = np.exp(z) @ v[keys, h * G // H] / total
    return out.reshape(n, -1) @ numbers(mixer.out.kernel).T + numbers(mixer.out.bias)


def assert_close(actual, desired):
    assert np.abs(actual - desired).max() <= 2e-5 * np.abs(desired).max()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_row_by_row(options, rng):
    mixer = build(options, rng)
    x = rng.standard_normal((2, T, D))
    y = np.asarray(jax.jit(lambda mixer, x: mixer(x))(mixer, x.astype(np.float32)))
    for row in range(2):
        assert_close(y[row], explicit(mixer, x[row]))


@pytest.mark.parametrize("options", [{"window": 2, "first_tokens": 2}, {"position": "alibi"}], ids=str)
def test_packed_documents_have_their_own_first_tokens(options, rng):
    mixer = build(options, rng)
    x = rng.standard_normal((1, T, D))
    ids = np.array([[5] * 4 + [2] * 6 + [9]], np.int32)
    y = np.asarray(jax.jit(lambda mixer, x, ids: mixer(x, ids))(mixer, x.astype(np.float32), ids))[0]
    for start, stop in ((0, 4), (4, 10), (10, 11)):
        assert_close(y[start:stop], explicit(mixer, x[0, start:stop]))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=24; choose a divisor or set head_dim"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must be a divisor of num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be a divisor of num_heads=4"),
        ({"position": "learned"}, "position='learned' is not one of rope, rope_interleaved, alibi, none"),
        ({"head_dim": 5}, "head_dim=5 must be even for position='rope'"),
        ({"window": 0}, "window=0 must be at least 1, or None for all tokens"),
        ({"first_tokens": 2}, "first_tokens=2 must be 0, or positive together with a window"),
        ({"window": 3, "first_tokens": -1}, "first_tokens=-1 must be 0, or positive together with a window"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive, or None"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        SoftmaxAttention(D, **options, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_an_odd_head_needs_no_pairs_without_rotary_positions():
    mixer = SoftmaxAttention(D, head_dim=5, position="alibi", rngs=nnx.Rngs(0))
    assert jax.eval_shape(mixer, jnp.zeros((1, 2, D))).shape == (1, 2, D)
