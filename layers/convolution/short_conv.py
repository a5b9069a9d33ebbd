"""Gated short convolution (LFM2 Technical Report, 2025): input-dependent gates before and after a few taps.

::

    (b_t, c_t, u_t) = W_in x_t        z_t = sum_{j < L} h_j * (b u)_{t-j}        y_t = W_out (c_t * z_t)

with one filter a channel. Cost: O(T D^2) time for the projections; decode state (L - 1) D numbers, whatever the length.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.linear import Linear
from manyheads.layers.convolution.causal import TailCache, short_convolution
from manyheads.layers.mixer import register_mixer

__all__ = ["GatedShortConvolution"]


@register_mixer("short_conv", title="LFM2 Technical Report", year=2025, state="fixed", variants=({"kernel_size": 1},))
class GatedShortConvolution(nnx.Module):
    """Gated short convolution; keeps the contract of ``layers.mixer``.

    Args:
      d_model: features D of input and output.
      kernel_size: taps L of the convolution.
      rngs: source of the initial parameters.
    """

    def __init__(self, d_model: int, *, kernel_size: int = 3, rngs: nnx.Rngs):
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} must be at least 1")
        self.before, self.after, self.value, self.out = (Linear(d_model, d_model, rngs=rngs) for _ in range(4))
        init = jax.nn.initializers.normal(kernel_size**-0.5)
        self.filters = nnx.Param(init(rngs.params(), (kernel_size, d_model), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Mix whole sequences in parallel."""
        filters = self.filters[...].astype(x.dtype)
        z = short_convolution(self.before(x) * self.value(x), filters, segment_ids)
        return self.out(self.after(x) * z)

    def init_state(self, batch: int, capacity: int) -> TailCache:
        """No inputs yet; ``capacity`` plays no part."""
        kernel_size, d_model = self.filters.shape
        return TailCache(jnp.zeros((batch, kernel_size - 1, d_model), self.value.kernel[...].dtype))

    def extend(
        self, x: Float[Array, "B n D"], state: TailCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], TailCache]:
        """Mix the next n tokens with the last inputs."""
        z, state = state.convolve(self.before(x) * self.value(x), self.filters[...].astype(x.dtype), lengths)
        return self.out(self.after(x) * z), state
