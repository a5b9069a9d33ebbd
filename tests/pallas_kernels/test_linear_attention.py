import functools
import itertools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from numerics import assert_accurate, assert_close, each, quick_jit

from manyheads.pallas_kernels import decay_combine, linear_attention

FORMS = {"none": None, "head": "H", "token": "BTH", "feature": "BTHK"}


def decays(rng, shape):
    """Logarithms of decays per step: forget everything, or nearly, or nearly nothing, or anything between, mixed."""
    choices = [np.zeros(shape), np.full(shape, 1e-6), np.full(shape, 1 - 1e-6), rng.uniform(0.05, 0.95, shape)]
    with np.errstate(divide="ignore"):
        return np.log(np.choose(rng.choice(4, shape, p=(0.1, 0.3, 0.3, 0.3)), choices))


def draw(rng, *, n=12, B=2, T=19, H=4, G=2, K=5, V=3, dtype=jnp.float32, form="token", initial_state=True):
    """n times the arrays of a call and cotangents of its results."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    shapes = {"query": (B, T, H, K), "key": (B, T, G, K), "value": (B, T, G, V)}
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    draws = []
    for _ in range(n):
        arrays = {name: normal(*shape) for name, shape in shapes.items()}
        if FORMS[form]:
            shape = tuple({"B": B, "T": T, "H": H, "K": K}[axis] for axis in FORMS[form])
            arrays["log_decay"] = jnp.asarray(decays(rng, shape), state_dtype)
        if initial_state:
            arrays["initial_state"] = normal(B, H, K, V).astype(state_dtype)
        draws.append((arrays, (normal(B, T, H, V), normal(B, H, K, V).astype(state_dtype))))
    return draws


def call(implementation, arrays, **options):
    arrays = dict(arrays)
    inputs = [arrays.pop(name) for name in ("query", "key", "value")]
    return linear_attention(*inputs, **arrays, **options, implementation=implementation)


def with_gradients(run, arrays, cotangents):
    """Results of ``run(arrays) -> (out, state)``, and the gradients of all arrays."""
    (out, state), pullback = jax.vjp(run, arrays)
    (gradients,) = pullback(cotangents)
    return {"out": out, "state": state, **{f"d {name}": gradient for name, gradient in gradients.items()}}


def compiled(run, implementation, jit=quick_jit):
    return jit(functools.partial(with_gradients, functools.partial(run, implementation)))


def check(run, draws, jit=quick_jit, **definition):
    """``run(implementation, arrays)`` keeps the bar on results and gradients of what ``definition`` defines."""
    got, reference = (each(compiled(run, name, jit), draws) for name in ("xla", "reference"))
    assert_accurate(got, reference, each(functools.partial(numerics.linear_attention, **definition), draws))


def segments(rng, B, T):
    """Segments that begin anywhere, of one token too, with ids in no order."""
    return np.cumsum(rng.random((B, T)) < 0.2, axis=1) * 7 % 5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_random_shapes(form, packed, rng):
    B, G, repeats = (int(n) for n in rng.integers(1, 4, 3))
    T, chunk_size, K, V = (int(rng.integers(1, n)) for n in (50, 20, 7, 7))
    print(f"{B=} {T=} {chunk_size=} {G=} {repeats=} {K=} {V=}")
    draws = draw(rng, B=B, T=T, H=G * repeats, G=G, K=K, V=V, form=form, initial_state=packed)
    options = {"scale": float(rng.uniform(0.2, 2)), "segment_ids": segments(rng, B, T) if packed else None}
    check(functools.partial(call, chunk_size=chunk_size, **options), draws, **options)


@pytest.mark.parametrize("form", FORMS)
def test_one_token(form, rng):
    check(call, draw(rng, T=1, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, rng):
    draws = draw(rng, T=41, K=8, V=8, dtype=jnp.bfloat16, form=form)
    check(functools.partial(call, chunk_size=16), draws)


def test_many_extreme_decays(rng):
    check(call, draw(rng, T=150))


@pytest.mark.parametrize(
    "form, implementation, chunk_size",
    [(form, "xla", 7) for form in FORMS] + [("token", "xla", 1), ("token", "xla", 30), ("feature", "reference", None)],
)
def test_any_chunk_size_in_float64(form, implementation, chunk_size, rng):
    ids = segments(rng, 2, 30)
    options = {"scale": 0.5, "segment_ids": ids}
    with jax.enable_x64(True):
        ((arrays, cotangents),) = draw(rng, n=1, T=30, dtype=jnp.float64, form=form)
        run = functools.partial(call, chunk_size=chunk_size, **options | {"segment_ids": jnp.asarray(ids)})
        got = compiled(run, implementation)(arrays, cotangents)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float64)}
    assert_close(got, numerics.linear_attention(arrays, cotangents, **options), 1e-13)


@pytest.mark.parametrize("form", ["head", "token"])
def test_any_split_is_the_whole(form, rng):
    """Pieces that hand on their state; value and gradient, which flows back through the states."""
    T = 29
    cuts = [0, int(rng.integers(1, T)), T]
    print(cuts)

    def run(implementation, arrays):
        state, outputs = arrays["initial_state"], []
        for start, stop in itertools.pairwise(cuts):
            piece = {name: x[:, start:stop] if x.ndim > 1 else x for name, x in arrays.items()}
            out, state = call(implementation, piece | {"initial_state": state})
            outputs.append(out)
        return jnp.concatenate(outputs, axis=1), state

    check(run, draw(rng, T=T, form=form))


def test_vmap_scan_and_checkpoint(rng):
    """A scan over pieces, under vmap and checkpoint."""
    pieces, n = 3, 7
    draws = draw(rng, n=4, T=pieces * n)

    def run(implementation, arrays):
        arrays = dict(arrays)
        state = arrays.pop("initial_state")
        xs = {name: jnp.moveaxis(x.reshape(x.shape[0], pieces, n, *x.shape[2:]), 1, 0) for name, x in arrays.items()}

        @jax.checkpoint
        def piece(state, x):
            return call(implementation, x | {"initial_state": state}, chunk_size=4)[::-1]

        state, out = jax.lax.scan(piece, state, xs)
        return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], pieces * n, *out.shape[3:]), state

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *draws)
    got, reference = (
        quick_jit(jax.vmap(functools.partial(with_gradients, functools.partial(run, name))))(*stacked)
        for name in ("xla", "reference")
    )
    assert_accurate(got, reference, each(numerics.linear_attention, draws))


def test_decay_combine_is_a_monoid_and_its_scan_gives_every_state(rng):
    with jax.enable_x64(True):
        ((arrays, cotangents),) = draw(rng, n=1, T=9, G=4, dtype=jnp.float64, form="feature", initial_state=False)
        added = jnp.einsum("bthk,bthv->tbhkv", arrays["key"], arrays["value"])
        stretches = jnp.exp(jnp.moveaxis(arrays["log_decay"], 1, 0)), added
        a, b, c = ((stretches[0][t], stretches[1][t]) for t in range(3))
        identity = (jnp.ones_like(a[0]), jnp.zeros_like(a[1]))
        jax.tree.map(np.testing.assert_array_equal, decay_combine(a, identity), a)
        jax.tree.map(np.testing.assert_array_equal, decay_combine(identity, a), a)
        left, right = decay_combine(decay_combine(a, b), c), decay_combine(a, decay_combine(b, c))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13), left, right)
        _, states = quick_jit(functools.partial(jax.lax.associative_scan, jax.vmap(decay_combine)))(stretches)
        got = {"out": jnp.einsum("bthk,tbhkv->bthv", arrays["query"], states), "state": states[-1]}
    truth = numerics.linear_attention(arrays, cotangents)
    assert_close(got, {name: truth[name] for name in got}, 1e-13)


def test_a_positive_decay_that_is_traced_gives_nan(rng):
    ((arrays, _),) = draw(rng, n=1, form="head")
    arrays["log_decay"] = jnp.array([-0.1, 0.1, -0.1, -0.1])
    out, _ = quick_jit(functools.partial(call, "xla"))(arrays)
    assert np.isnan(out[:, :, 1]).all() and np.isfinite(out[:, :, [0, 2, 3]]).all()


ARGUMENTS = {"query": jnp.ones((2, 6, 4, 3)), "key": jnp.ones((2, 6, 2, 3)), "value": jnp.ones((2, 6, 2, 5))}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": jnp.ones((6, 4, 3))}, r"query: shape \[6, 4, 3\] must have four axes"),
        ({"key": jnp.ones((6, 2, 3))}, "key: shape .* must have four axes"),
        ({"value": jnp.ones((6, 2, 5))}, "value: shape .* must have four axes"),
        ({"key": jnp.ones((2, 7, 2, 3))}, r"key: .*\[2, 7, 2, 3\].* do not fit query"),
        ({"key": jnp.ones((2, 6, 2, 2))}, "key: shapes key"),
        ({"value": jnp.ones((2, 6, 1, 5))}, "do not fit query"),
        ({"query": jnp.ones((2, 6, 3, 3))}, "query: 3 heads are not a multiple of the 2 heads of key"),
        ({"log_decay": -jnp.ones((6, 4))}, r"log_decay: shape \[6, 4\] must be \[4\], \[2, 6, 4\] or \[2, 6, 4, 3\]"),
        ({"log_decay": jnp.array([-1, 0, 0.5, -1])}, "log_decay: must not be positive, its largest value is 0.5"),
        ({"initial_state": jnp.ones((2, 2, 3, 5))}, r"initial_state: shape .* must be \[2, 4, 3, 5\]"),
        ({"segment_ids": jnp.ones(6, int)}, r"segment_ids: shape \[6\] must be \[2, 6\]"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"implementation": "loop"}, "implementation='loop' is not one of reference, xla, pallas_tpu, pallas_gpu"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**ARGUMENTS | changes)
    assert "\n" not in str(error.value)
