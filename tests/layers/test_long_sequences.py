"""Lengths beyond one tile or chunk of the primitives, where the parallel form and ``extend`` take other paths."""

import jax
import numpy as np
import pytest
from flax import nnx

from manyheads.layers import make_mixer

LENGTH, D = 1100, 8


@pytest.mark.parametrize(
    "spec",
    [
        "softmax(num_heads=2, num_kv_heads=1)",
        "softmax(num_heads=2, window=100, sinks=True, position='alibi')",
        "softmax(num_heads=2, window=70, first_tokens=3)",
        "lightning(num_heads=2)",
        "linear(num_heads=2)",
    ],
)
def test_pieces_equal_the_whole(spec, rng):
    mixer = make_mixer(spec, D, rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = rng.standard_normal((1, LENGTH, D)).astype(np.float32)
    whole = np.asarray(jax.jit(lambda mixer, x: mixer(x))(mixer, x))
    extend = jax.jit(lambda mixer, x, state: mixer.extend(x, state))
    state, pieces = mixer.init_state(1, LENGTH), []
    for piece in np.split(x, [int(rng.integers(300, 700))], axis=1):
        y, state = extend(mixer, piece, state)
        pieces.append(y)
    assert np.abs(np.concatenate(pieces, axis=1) - whole).max() <= 2e-5 * np.abs(whole).max()


@pytest.mark.parametrize(
    "spec", ["softmax(num_heads=2)", "softmax(num_heads=2, window=70, first_tokens=3)", "lightning(num_heads=2)"]
)
def test_packed_documents_are_what_they_are_alone(spec, rng):
    mixer = make_mixer(spec, D, rngs=nnx.Rngs(int(rng.integers(2**31))))
    x = rng.standard_normal((1, LENGTH, D)).astype(np.float32)
    border = int(rng.integers(300, 800))
    ids = np.repeat([[4, 1]], [border, LENGTH - border], axis=1).astype(np.int32)
    run = jax.jit(lambda mixer, x, ids=None: mixer(x, ids))
    packed = np.asarray(run(mixer, x, ids))
    for document in (slice(0, border), slice(border, LENGTH)):
        alone = np.roll(x, -document.start, axis=1)
        desired = np.asarray(run(mixer, alone))[:, : document.stop - document.start]
        assert np.abs(packed[:, document] - desired).max() <= 2e-5 * np.abs(desired).max()
