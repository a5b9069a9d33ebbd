"""What the tests of flex attention share: random calls, their results with gradients, and the bar for them."""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
from numerics import assert_accurate, each, quick_jit

from manyheads.pallas_kernels import flex_attention

ROWS, COLUMNS = 8, 16


def draw(rng, *, n=12, B=2, T=19, S=37, H=4, G=2, K=5, V=3, dtype=jnp.float32, **extra):
    """n times the arrays of a call and cotangents of its results; ``extra`` gives shapes of bias, sinks and params."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    shapes = {"query": (B, T, H, K), "key": (B, S, G, K), "value": (B, S, G, V), **extra}
    lse_dtype = jnp.promote_types(dtype, jnp.float32)
    return [
        (
            {name: normal(*shape) for name, shape in shapes.items()},
            (normal(B, T, H, V), normal(B, T, H).astype(lse_dtype)),
        )
        for _ in range(n)
    ]


def call(implementation, arrays, **options):
    """Output and log-sum-exp."""
    arrays = dict(arrays)
    inputs = [arrays.pop(name) for name in ("query", "key", "value")]
    if "params" in arrays:
        arrays["score_params"] = arrays.pop("params")
    return flex_attention(*inputs, **arrays, return_lse=True, implementation=implementation, **options)


def with_gradients(run, arrays, cotangents):
    """Results of ``run(arrays) -> (out, lse)``, and the gradients of all arrays."""
    (out, lse), pullback = jax.vjp(run, arrays)
    (gradients,) = pullback(cotangents)
    return {"out": out, "lse": lse, **{f"d {name}": gradient for name, gradient in gradients.items()}}


def compiled(run, implementation, jit=quick_jit):
    return jit(functools.partial(with_gradients, functools.partial(run, implementation)))


def check(run, draws, jit=quick_jit, **definition):
    """``run(implementation, arrays)`` keeps the bar on results and gradients of what ``definition`` defines."""
    got, reference = (each(compiled(run, name, jit), draws) for name in ("xla", "reference"))
    assert_accurate(got, reference, each(functools.partial(numerics.attention, **definition), draws))
    return got


def dense(mask, B, H, T, S):
    """A mask function of operators on all pairs at once."""
    return np.asarray(mask(*np.ogrid[:B, :H, :T, :S]))


def slopes(score, b, h, q, k, params):
    return score + params[h] * (q - k)
