"""Linear attention (Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, 2020).

For every head, with the positive feature map ``phi(x) = elu(x) + 1``::

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      y_t = W_o [phi(q_t) S_t / (phi(q_t) . z_t)]

The normaliser z is the state of one more value feature that is always 1.
Cost: O(T D K) time; decode state H K (V + 1) numbers, whatever the length.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.heads import head_size, split_heads
from manyheads.layers.basic.linear import Linear
from manyheads.layers.linear.state import MatrixState, real_tokens
from manyheads.layers.mixer import register_mixer
from manyheads.pallas_kernels.linear_attention import linear_attention

__all__ = ["LinearAttention", "elu_plus_one"]


def elu_plus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The feature map elu(x) + 1, positive everywhere: x + 1 above zero, and below it exp(x) to full relative precision."""
    return jnp.maximum(x, 0) + jnp.exp(jnp.minimum(x, 0))


@register_mixer(
    "linear",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    year=2020,
    state="fixed",
    variants=({"num_heads": 2, "head_dim": 6},),
)
class LinearAttention(nnx.Module):
    """Normalised linear attention without decay; keeps the contract of ``layers.mixer``.

    Args:
      d_model: features D of input and output.
      num_heads: heads H.
      head_dim: features of keys and values of a head; default D / H.
      implementation: of ``linear_attention``.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim = head_size(d_model, num_heads, head_dim)
        self.num_heads, self.head_dim, self.implementation = num_heads, head_dim, implementation
        self.query, self.key, self.value = (Linear(d_model, num_heads * head_dim, rngs=rngs) for _ in range(3))
        self.out = Linear(num_heads * head_dim, d_model, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Attention within the sequence."""
        return self._mix(x, None, segment_ids, None)[0]

    def init_state(self, batch: int, capacity: int) -> MatrixState:
        """The state before the first token; ``capacity`` plays no part."""
        return MatrixState.empty(batch, self.num_heads, self.head_dim, self.head_dim + 1)

    def extend(
        self, x: Float[Array, "B n D"], state: MatrixState, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], MatrixState]:
        """Attention of the next n tokens to the state and to themselves."""
        return self._mix(x, state, None, lengths)

    def _mix(
        self, x: Array, state: MatrixState | None, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, MatrixState]:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        q, k = elu_plus_one(q), elu_plus_one(k)
        real = real_tokens(x.shape[1], lengths)
        k = k if real is None else jnp.where(real, k, 0)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        y, matrix = linear_attention(
            q,
            k,
            v,
            initial_state=None if state is None else state.matrix,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        # Where every feature underflows: a floor whose inverse square is finite keeps the gradient of the quotient finite.
        y = y[..., :-1] / jnp.maximum(y[..., -1:], float(jnp.finfo(y.dtype).tiny) ** 0.5)
        return self.out(y.reshape(*y.shape[:2], -1)), MatrixState(matrix)
