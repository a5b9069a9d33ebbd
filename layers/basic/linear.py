"""Affine map y = x W^T + b with the weight stored as [out, in].

That is the layout of PyTorch and of safetensors files, so weights load without a transposed copy; and a scan over
stacked layers streams it at memory bandwidth when there is one token to decode.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

__all__ = ["Linear", "linear"]


def linear(
    x: Float[Array, "... I"], kernel: Float[Array, "O I"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "... O"]:
    """Returns ``x @ kernel.T + bias`` in the dtype of ``x``. Cost: 2 I O operations a row."""
    kernel = kernel.astype(x.dtype)
    y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(x.dtype), range(y.ndim - 1))
    return y


class Linear(nnx.Module):
    """Affine map with parameters ``kernel: out in`` and, if ``use_bias``, ``bias: out``.

    Args:
      in_features, out_features: sizes of the last axis before and after.
      use_bias: whether to add a bias, initially zero.
      stddev: standard deviation of the normal from which the initial kernel comes, cut at two of them; default
        1/sqrt(in_features).
      dtype: dtype of the parameters. Computation happens in the dtype of the input.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        stddev: float | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stddev = in_features**-0.5 if stddev is None else stddev
        init = jax.nn.initializers.truncated_normal(stddev)
        self.kernel = nnx.Param(init(rngs.params(), (out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Returns x W^T + b."""
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...])
