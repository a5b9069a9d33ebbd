"""Mixers under test: every registered one under its defaults and its variants, and random data for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers import MixerInfo, mixer_info, mixer_names

BATCH, LENGTH, FEATURES = 4, 24, 16


@dataclass(frozen=True)
class Case:
    """A mixer and the options that it is built with."""

    info: MixerInfo
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.info.name}({options})" if options else self.info.name

    def build(self, rng: np.random.Generator, **options: Any) -> nnx.Module:
        """A fresh mixer, its parameters off their initial values so that no zero bias hides a mistake."""
        rngs = nnx.Rngs(int(rng.integers(2**31)))
        mixer = self.info.constructor(FEATURES, **{**self.options, **options}, rngs=rngs)
        return map_parameters(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype), mixer)


CASES = [Case(info, options) for info in map(mixer_info, mixer_names()) for options in ({}, *info.variants)]


def variables(module: nnx.Module) -> list[tuple[str, Any]]:
    """The path and value of every leaf of a module: an ``nnx.Variable``, or an array outside of any."""
    leaves, _ = jax.tree.flatten_with_path(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def map_parameters(fn, module: nnx.Module) -> nnx.Module:
    """The module with ``fn`` applied to its parameters, and nothing else changed."""
    return jax.tree.map(
        lambda leaf: leaf.replace(fn(leaf[...])) if isinstance(leaf, nnx.Param) else leaf,
        module,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def tokens(rng: np.random.Generator, batch: int = BATCH, length: int = LENGTH) -> Float[np.ndarray, "B T D"]:
    """Random inputs, or cotangents."""
    return rng.standard_normal((batch, length, FEATURES)).astype(np.float32)


def documents(rng: np.random.Generator) -> Int[np.ndarray, "B T"]:
    """Segment ids of rows of four documents each, at least one token long and in no order."""
    rows = []
    for _ in range(BATCH):
        borders = np.sort(rng.choice(np.arange(1, LENGTH), 3, replace=False))
        rows.append(np.repeat(rng.permutation(10)[:4], np.diff([0, *borders, LENGTH])))
    return np.array(rows, np.int32)


@jax.jit
def _forward(mixer, x, segment_ids):
    return mixer(x, segment_ids)


@jax.jit
def _pull(mixer, x, segment_ids, cotangent):
    y, pullback = jax.vjp(lambda mixer, x: mixer(x, segment_ids), mixer, x)
    return y, pullback(cotangent)


@jax.jit
def _extend(mixer, x, state, lengths):
    return mixer.extend(x, state, lengths)


# Results come as NumPy arrays: slicing those compiles nothing.


def forward(mixer: nnx.Module, x: Array, segment_ids: Array | None = None) -> np.ndarray:
    """The output of the parallel form."""
    return jax.device_get(_forward(mixer, x, segment_ids))


def pull(
    mixer: nnx.Module, x: Array, segment_ids: Array | None, cotangent: Array
) -> tuple[np.ndarray, tuple[nnx.Module, np.ndarray]]:
    """The output of the parallel form, and the gradients of ``sum(cotangent * output)`` by mixer and input."""
    return jax.device_get(_pull(mixer, x, segment_ids, cotangent))


def extend(mixer: nnx.Module, x: Array, state: Any, lengths: Array | None = None) -> tuple[np.ndarray, Any]:
    """The output for the next tokens, and the state after them."""
    y, state = _extend(mixer, x, state, lengths)
    return jax.device_get(y), state


def assert_close(actual: Any, desired: Any, tolerance: float, what: str) -> None:
    """Every array of ``actual`` is within ``tolerance`` times the largest entry of its partner in ``desired``."""
    pairs = jax.tree.map(lambda *arrays: [np.asarray(a, np.float64) for a in arrays], actual, desired)
    for path, (a, b) in jax.tree.flatten_with_path(pairs, is_leaf=lambda leaf: isinstance(leaf, list))[0]:
        error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert error <= tolerance * scale, (
            f"{what}{jax.tree_util.keystr(path)}: off by {error:.3g} at scale {scale:.3g}"
        )


def rms(x: Array) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def cast(mixer: nnx.Module, dtype: Any) -> nnx.Module:
    """The mixer with its parameters in another dtype."""
    return map_parameters(lambda p: jnp.asarray(p, dtype), mixer)
