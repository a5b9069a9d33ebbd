"""Normalisation over the last axis, with statistics in float32.

RMS norm (Root Mean Square Layer Normalization, 2019):   y = x / sqrt(mean(x^2) + eps) * w
Layer norm (Layer Normalization, 2016):                  y = (x - mean(x)) / sqrt(var(x) + eps) * w + b
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "make_norm", "rms_norm"]


def _scale(y: Float[Array, "... D"], weight: Float[Array, "D"] | None) -> Float[Array, "... D"]:
    return y if weight is None else y * jnp.expand_dims(weight.astype(y.dtype), range(y.ndim - 1))


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"] | None = None, *, eps: float = 1e-6
) -> Float[Array, "... D"]:
    """Returns ``x / sqrt(mean(x^2) + eps) * weight`` in the dtype of ``x``; at least float32 inside."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return _scale(y, weight).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "... D"]:
    """Returns ``(x - mean) / sqrt(var + eps) * weight + bias`` in the dtype of ``x``; at least float32 inside."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = _scale(y, weight)
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS norm over ``features`` with a learned weight, initially one."""

    def __init__(self, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised x."""
        return rms_norm(x, self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """Layer norm over ``features`` with a learned weight and bias, initially one and zero."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised x."""
        return layer_norm(x, self.weight[...], self.bias[...], eps=self.eps)


def make_norm(kind: str, features: int, *, eps: float | None = None) -> nnx.Module:
    """The norm named ``"rms"`` or ``"layer"``, with its own default ``eps`` if none is given."""
    norms = {"rms": RMSNorm, "layer": LayerNorm}
    if kind not in norms:
        raise ValueError(f"norm={kind!r} is not one of {', '.join(norms)}")
    return norms[kind](features) if eps is None else norms[kind](features, eps=eps)
