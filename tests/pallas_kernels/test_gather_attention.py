import functools
import importlib

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from numerics import assert_accurate, assert_close, each, quick_jit

from manyheads.pallas_kernels import gather_attention


def draw(rng, *, n=12, B=2, T=7, S=23, H=4, G=2, K=5, V=3, M=9, dtype=jnp.float32):
    """n times arrays and the cotangent of the output; then indices, repeated ones too, and valid, with empty rows."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    shapes = {"query": (B, T, H, K), "key": (B, S, G, K), "value": (B, S, G, V)}
    draws = [({name: normal(*s) for name, s in shapes.items()}, normal(B, T, H, V)) for _ in range(n)]
    valid = rng.random((B, T, G, M)) < 0.7
    valid[0, :, 0] &= rng.random((T, 1)) < 0.6
    return draws, rng.integers(0, S, (B, T, G, M)), valid


def with_gradients(implementation, arrays, cotangent, **options):
    run = lambda arrays: gather_attention(**arrays, implementation=implementation, **options)
    out, pullback = jax.vjp(run, arrays)
    return {"out": out, **{f"d {name}": gradient for name, gradient in pullback(cotangent)[0].items()}}


def definition(indices, valid, scale, arrays, cotangent):
    """Attention over all keys, each as often as valid indices name it."""
    B, T, H, _ = arrays["query"].shape
    S, G = arrays["key"].shape[1:3]
    counts = np.sum((indices[..., None] == np.arange(S)) & valid[..., None], axis=3)  # B T G S
    counts = np.repeat(counts.swapaxes(1, 2), H // G, axis=1)
    bias = np.log(np.where(counts == 0, 1, counts))
    cotangents = (cotangent, np.zeros((B, T, H)))
    truth = numerics.attention(arrays | {"bias": bias}, cotangents, allowed=counts > 0, scale=scale)
    return {name: truth[name] for name in ("out", *(f"d {name}" for name in arrays))}


@pytest.fixture(params=[None, 500], ids=["at once", "in pieces"])
def pieces(request, monkeypatch):
    # The function of the same name hides the module from a plain import.
    module = importlib.import_module("manyheads.pallas_kernels.gather_attention")
    if request.param:
        monkeypatch.setattr(module, "_PIECE", request.param)
    module._IMPLEMENTATIONS["xla"].clear_cache()  # or the other way of the same shapes would run


def check(draws, indices, valid, scale=None, jit=quick_jit):
    options = {"indices": jnp.asarray(indices), "valid": jnp.asarray(valid), "scale": scale}
    got, reference = (
        each(jit(functools.partial(with_gradients, name, **options)), draws) for name in ("xla", "reference")
    )
    assert_accurate(got, reference, each(functools.partial(definition, indices, valid, scale), draws))
    return got


def test_random_shapes(pieces, rng):
    B, G, repeats = (int(n) for n in rng.integers(1, 4, 3))
    T, S, K, V, M = (int(rng.integers(1, n)) for n in (20, 40, 7, 7, 30))
    print(f"{B=} {T=} {S=} {G=} {repeats=} {K=} {V=} {M=}")
    draws, indices, valid = draw(rng, B=B, T=T, S=S, H=G * repeats, G=G, K=K, V=V, M=M)
    got = check(draws, indices, valid, scale=float(rng.uniform(0.2, 2)))
    empty = np.repeat(~valid.any(-1), repeats, axis=2)
    assert not np.any(got["out"][:, empty]) and not np.any(got["d query"][:, empty])


def test_scores_of_80(pieces, rng):
    draws, indices, valid = draw(rng)
    for arrays, _ in draws:
        arrays["key"] = arrays["key"].at[..., 0].set(80.0 * np.sign(rng.standard_normal((2, 23, 2))))
        arrays["query"] = arrays["query"].at[..., 0].set(1.0)
    check(draws, indices, valid, scale=1.0)


def test_one_query(rng):
    check(*draw(rng, T=1))


def test_bfloat16(pieces, rng):
    """Against the truth alone, since both implementations compute alike: rounding inputs' products is all it may cost."""
    draws, indices, valid = draw(rng, n=3, K=16, V=16, M=20, dtype=jnp.bfloat16)
    options = {"indices": jnp.asarray(indices), "valid": jnp.asarray(valid)}
    got = each(jax.jit(functools.partial(with_gradients, "xla", **options)), draws)
    assert {array.dtype for array in got.values()} == {np.dtype(jnp.bfloat16)}
    assert_close(got, each(functools.partial(definition, indices, valid, None), draws), 2**-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64_and_vmap(implementation, pieces, rng):
    draws, indices, _ = draw(rng, n=3, dtype=np.float32)
    everything = np.ones_like(indices, bool)
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.float64), *draws)
        got = quick_jit(jax.vmap(functools.partial(with_gradients, implementation, indices=jnp.asarray(indices))))(
            *stacked
        )
    assert {array.dtype for array in got.values()} == {np.dtype(np.float64)}
    assert_close(got, each(functools.partial(definition, indices, everything, None), draws), 1e-13)


ARGUMENTS = {
    "query": jnp.ones((2, 6, 4, 3)),
    "key": jnp.ones((2, 9, 2, 3)),
    "value": jnp.ones((2, 9, 2, 5)),
    "indices": jnp.zeros((2, 6, 2, 7), int),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": jnp.ones((6, 4, 3))}, "query, key and value must have four axes"),
        ({"key": jnp.ones((2, 9, 2, 2))}, r"key: shapes key \[2, 9, 2, 2\]"),
        ({"value": jnp.ones((2, 8, 2, 5))}, "do not fit query"),
        ({"query": jnp.ones((2, 6, 3, 3))}, "query: 3 heads are not a multiple of the 2 heads of key"),
        (
            {"indices": jnp.zeros((2, 6, 4, 7), int)},
            r"indices: int32\[2, 6, 4, 7\] must be integers of shape \[2, 6, 2, M\]",
        ),
        ({"indices": jnp.zeros((2, 6, 2, 7))}, "indices: float32"),
        ({"valid": jnp.ones((2, 6, 2, 8), bool)}, r"valid: shape \[2, 6, 2, 8\] must be that of indices"),
        ({"implementation": "pallas_tpu"}, "gather_attention: implementation='pallas_tpu' does not exist for it"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        gather_attention(**ARGUMENTS | changes)
    assert "\n" not in str(error.value)
