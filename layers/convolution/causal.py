"""Causal convolution over time, one filter a channel: ``y_t = sum_{j >= 0} h_j u_{t-j}`` within a document."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manyheads.layers.cache.kv_cache import advance

__all__ = ["InputCache", "TailCache", "long_convolution", "short_convolution"]


def _delayed(x: Array, lag: int | Array) -> Array:
    """x with ``lag`` zeros before it, cut to its length; ``lag`` may be traced."""
    padded = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
    start = jnp.maximum(x.shape[1] - lag, 0)  # a negative one would count from the end
    return jax.lax.dynamic_slice_in_dim(padded, start, x.shape[1], axis=1)


def _lag(u: Array, tap: Array, lag: int | Array, segment_ids: Array | None) -> Array:
    """The contribution of the inputs ``lag`` tokens back."""
    term = _delayed(u, lag) * tap[None, None]
    if segment_ids is None:
        return term
    # Ids move up by one so that the zeros before the first token belong to no document.
    ids = segment_ids - jnp.min(segment_ids) + 1
    return jnp.where((_delayed(ids, lag) == ids)[..., None], term, 0)


def short_convolution(
    u: Float[Array, "B T D"], filters: Float[Array, "L D"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Convolution with few taps, lag by lag: 2 T L D operations; ``filters[j]`` weighs the input j tokens back."""
    return sum(_lag(u, filters[j], j, segment_ids) for j in range(filters.shape[0]))


def long_convolution(
    u: Float[Array, "B T D"], filters: Float[Array, "L D"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Convolution with as many taps as tokens, L >= T: by FFT of length 2 T in O(T D log T).

    Packed documents cannot share a transform: with ``segment_ids`` the lags are summed one by one, in O(T^2 D).
    """
    T = u.shape[1]
    filters = filters[:T]
    if segment_ids is not None:
        body = jax.checkpoint(lambda y, xs: (y + _lag(u, *xs, segment_ids), None))
        return jax.lax.scan(body, jnp.zeros_like(u), (filters, jnp.arange(filters.shape[0])))[0]
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    size = 2 * T
    spectrum = jnp.fft.rfft(u.astype(dtype), size, axis=1) * jnp.fft.rfft(filters.astype(dtype), size, axis=0)[None]
    return jnp.fft.irfft(spectrum, size, axis=1)[:, :T].astype(u.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("inputs",), meta_fields=())
@dataclass(frozen=True)
class TailCache:
    """The last L - 1 inputs of a convolution with L taps, ``inputs: B L-1 D``: the same size at any length."""

    inputs: Float[Array, "B L D"]

    def convolve(
        self, u: Float[Array, "B n D"], filters: Float[Array, "L D"], lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], "TailCache"]:
        """The next n outputs, and the cache after the first ``lengths[b]`` (default all n) of the inputs."""
        n, kept = u.shape[1], self.inputs.shape[1]
        both = jnp.concatenate([self.inputs, u.astype(self.inputs.dtype)], axis=1)
        y = short_convolution(both, filters)[:, kept:].astype(u.dtype)
        if lengths is None:
            return y, TailCache(both[:, n:])
        index = lengths[:, None] + jnp.arange(kept)[None, :]
        return y, TailCache(jnp.take_along_axis(both, index[..., None], axis=1))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("inputs", "length"), meta_fields=())
@dataclass(frozen=True)
class InputCache:
    """All inputs of a long convolution: ``inputs: B C D`` with room for C tokens, ``length: B`` of them filled."""

    inputs: Float[Array, "B C D"]
    length: Int[Array, "B"]

    def convolve(
        self, u: Float[Array, "B n D"], filters: Float[Array, "L D"], lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], "InputCache"]:
        """The next n outputs, and the cache after the first ``lengths[b]`` (default all n) of the inputs.

        One token costs O(C D); several at once O(C D log C), the transform of the whole cache.
        """
        B, n, _ = u.shape
        C = self.inputs.shape[1]
        positions, length = advance(self.length, n, lengths)
        inputs = self.inputs.at[jnp.arange(B)[:, None], positions].set(u.astype(self.inputs.dtype), mode="drop")
        at = self.length[:, None] + jnp.arange(n)[None, :]
        if n > 1:
            y = jnp.take_along_axis(long_convolution(inputs, filters), at[..., None], axis=1, mode="clip")
        else:
            lag = at - jnp.arange(C)[None, :]
            taps = jnp.where((lag >= 0)[..., None], filters[jnp.clip(lag, 0, filters.shape[0] - 1)], 0)
            y = jnp.einsum("bcd,bcd->bd", taps, inputs)[:, None]
        return y.astype(u.dtype), InputCache(inputs, length)
