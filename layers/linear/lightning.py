"""Lightning attention (Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, 2024).

For head h with the fixed decay ``lambda_h = exp(-s_h)``, silu on queries and keys, no scale and no denominator::

    o_t = sum_{s <= t} lambda_h^(t - s) (q_t . k_s) v_s
    y_t = W_o [norm(o_t) * gate(W_g x_t)]

where ``norm`` is the RMS norm over all heads without a weight and ``gate`` the identity, as in TransNormerLLM (2023). The
slopes ``s_h`` are those of ALiBi times ``1 - depth + 1e-5``, where depth runs from 0 in the first layer of a model to 1
in the last: lower layers forget faster.
Cost: O(T D K) time; decode state H K^2 numbers, whatever the length.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.activation import activation_function
from manyheads.layers.basic.constant import Constant
from manyheads.layers.basic.heads import head_size, split_heads
from manyheads.layers.basic.linear import Linear
from manyheads.layers.basic.norm import RMSNorm, rms_norm
from manyheads.layers.linear.state import MatrixState, real_tokens
from manyheads.layers.mixer import register_mixer
from manyheads.layers.position.alibi import alibi_slopes
from manyheads.pallas_kernels.linear_attention import linear_attention

__all__ = ["LightningAttention", "lightning_log_decay"]


def lightning_log_decay(num_heads: int, depth: float | Array = 0.0) -> Float[Array, "H"]:
    """``-s_h``: the log of the decay of each head in a layer at ``depth``, 0 for the first and 1 for the last."""
    return -alibi_slopes(num_heads) * (1 - depth + 1e-5)


@register_mixer(
    "lightning",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    paper="048",
    state="fixed",
    variants=(
        {"num_heads": 2, "value_activation": "silu", "gate_activation": "sigmoid", "norm_weight": True, "depth": 1.0},
    ),
)
class LightningAttention(nnx.Module):
    """Linear attention with a fixed decay per head; keeps the contract of ``layers.mixer``.

    Args:
      d_model: features D of input and output.
      num_heads: heads H.
      head_dim: features of keys and values of a head; default D / H.
      activation: on queries and keys.
      value_activation: on values.
      gate_activation: on the output gate ("sigmoid" in MiniMax-01, 2025).
      norm_weight: learn a weight in the output norm.
      depth: place of the layer in its model, 0 for the first and 1 for the last; sets the decay.
      implementation: of ``linear_attention``.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        activation: str = "silu",
        value_activation: str = "identity",
        gate_activation: str = "identity",
        norm_weight: bool = False,
        depth: float | Array = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim = head_size(d_model, num_heads, head_dim)
        width = num_heads * head_dim
        self.num_heads, self.head_dim, self.implementation = num_heads, head_dim, implementation
        self.activations = (activation, value_activation, gate_activation)
        for name in self.activations:
            activation_function(name)
        self.query, self.key, self.value, self.gate = (Linear(d_model, width, rngs=rngs) for _ in range(4))
        self.out = Linear(width, d_model, rngs=rngs)
        self.norm = RMSNorm(width) if norm_weight else None
        self.log_decay = Constant(lightning_log_decay(num_heads, depth))

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Attention within the sequence."""
        return self._mix(x, None, segment_ids, None)[0]

    def init_state(self, batch: int, capacity: int) -> MatrixState:
        """The state before the first token; ``capacity`` plays no part."""
        return MatrixState.empty(batch, self.num_heads, self.head_dim, self.head_dim)

    def extend(
        self, x: Float[Array, "B n D"], state: MatrixState, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], MatrixState]:
        """Attention of the next n tokens to the state and to themselves."""
        return self._mix(x, state, None, lengths)

    def _mix(
        self, x: Array, state: MatrixState | None, segment_ids: Array | None, lengths: Array | None
    ) -> tuple[Array, MatrixState]:
        act, value_act, gate_act = map(activation_function, self.activations)
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        log_decay = jax.lax.stop_gradient(self.log_decay[...])
        q, k, v = act(q), act(k), value_act(v)
        real = real_tokens(x.shape[1], lengths)
        if real is not None:  # tokens that are not there add nothing and do not decay the state
            k = jnp.where(real, k, 0)
            log_decay = jnp.where(real[..., 0], log_decay[None, None], 0)
        y, matrix = linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            initial_state=None if state is None else state.matrix,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = y.reshape(*y.shape[:2], -1)
        y = rms_norm(y) if self.norm is None else self.norm(y)
        return self.out(y * gate_act(self.gate(x))), MatrixState(matrix)
