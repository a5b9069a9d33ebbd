"""BaseConv, the minimal gated convolution (Zoology: Measuring and Improving Recall in Efficient Language Models, 2023).

::

    y = (W u + b_W) * (h (*) u + b_h) + u

``h`` is one causal filter a channel: a few learned taps ("short"), one tap a position ("long"), or as many taps made by a
small network from the position ("implicit": h_t = W_2 relu(W_1 [t, cos, sin])). The long forms add their input once more.
There is no nonlinearity besides the product, and the gate is linear in the token itself: the filter cannot depend on the
input, which is why recall needs a width that grows with the number of pairs.

Cost: O(T D^2 + T D log T) time; decode state: the last L - 1 inputs (short) or all of them (long).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.linear import Linear
from manyheads.layers.convolution.causal import InputCache, TailCache, long_convolution, short_convolution
from manyheads.layers.mixer import register_mixer

__all__ = ["BaseConv"]

FILTERS = ("short", "long", "implicit")


@register_mixer(
    "base_conv",
    title="Zoology: Measuring and Improving Recall in Efficient Language Models",
    year=2023,
    paper="039",
    state="capacity",
    variants=({"filter": "long", "max_length": 64}, {"filter": "implicit", "max_length": 64}),
)
class BaseConv(nnx.Module):
    """Minimal gated convolution; keeps the contract of ``layers.mixer``.

    Args:
      d_model: features D of input and output.
      filter: "short", "long" or "implicit".
      kernel_size: taps of the short filter.
      max_length: taps of the long filters, the longest sequence that they can mix.
      residual: add the input to the output, as the paper's code does besides the residual of the block.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        *,
        filter: str = "short",
        kernel_size: int = 3,
        max_length: int = 1024,
        residual: bool = True,
        rngs: nnx.Rngs,
    ):
        if filter not in FILTERS:
            raise ValueError(f"filter={filter!r} is not one of {', '.join(FILTERS)}")
        if kernel_size < 1 or max_length < 1:
            raise ValueError(f"kernel_size={kernel_size} and max_length={max_length} must be at least 1")
        self.filter, self.max_length, self.residual = filter, max_length, residual
        self.project = Linear(d_model, d_model, use_bias=True, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(d_model))
        if filter == "implicit":
            self.hidden = Linear(3, 16, use_bias=True, rngs=rngs)
            self.readout = Linear(16, d_model, use_bias=True, rngs=rngs)
        else:
            taps = kernel_size if filter == "short" else max_length
            self.taps = nnx.Param(taps**-0.5 * jax.random.normal(rngs.params(), (taps, d_model)))

    def filters(self) -> Float[Array, "L D"]:
        """The taps of every channel, that of the present token first; one is added there if the filter is long."""
        if self.filter == "short":
            return self.taps[...]
        if self.filter == "long":
            taps = self.taps[...]
        else:
            t = jnp.linspace(0, 1, self.max_length)
            features = jnp.stack([t, jnp.cos(2 * jnp.pi * t), jnp.sin(2 * jnp.pi * t)], axis=-1)
            taps = self.readout(jax.nn.relu(self.hidden(features))) * self.max_length**-0.5
        return taps.at[0].add(1)

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Mix whole sequences in parallel."""
        self._check_length(x.shape[1])
        convolve = short_convolution if self.filter == "short" else long_convolution
        return self._gate(x, convolve(x, self.filters().astype(x.dtype), segment_ids))

    def init_state(self, batch: int, capacity: int) -> TailCache | InputCache:
        """No inputs yet, and room for ``capacity`` of them if the filter is long."""
        dtype, d_model = self.project.kernel[...].dtype, self.bias.shape[0]
        if self.filter == "short":
            return TailCache(jnp.zeros((batch, self.taps.shape[0] - 1, d_model), dtype))
        self._check_length(capacity)
        return InputCache(jnp.zeros((batch, capacity, d_model), dtype), jnp.zeros(batch, jnp.int32))

    def extend(
        self, x: Float[Array, "B n D"], state: TailCache | InputCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], TailCache | InputCache]:
        """Mix the next n tokens with the inputs so far."""
        mixed, state = state.convolve(x, self.filters().astype(x.dtype), lengths)
        return self._gate(x, mixed), state

    def _gate(self, x: Array, mixed: Array) -> Array:
        y = self.project(x) * (mixed + self.bias[...].astype(x.dtype)[None, None])
        return y + x if self.residual else y

    def _check_length(self, length: int) -> None:
        if self.filter != "short" and length > self.max_length:
            raise ValueError(f"max_length={self.max_length} of a BaseConv filter is shorter than {length} tokens")
