"""Causal softmax attention with grouped heads.

For head h of H, which shares key head ``h // (H / G)``, over the keys s <= t that the window lets through::

    z_ts = cap * tanh(q_t . k_s / (sqrt(K) cap))     (the product alone without a soft cap)
    y_t  = W_o concat_h sum_s softmax_s(z_ts [, sink_h]) v_s

Attention Is All You Need (2017); grouped heads: GQA (2023); soft cap and query-key norm: Gemma 2 (2024) and Scaling Vision
Transformers to 22 Billion Parameters (2023); a window with first tokens kept: Efficient Streaming Language Models with
Attention Sinks (2023); learned sinks: one logit a head that takes weight and gives nothing.

Cost: 4 T^2 H K operations a sequence, or 4 T (window + first tokens) H K; decode state 2 G K numbers a token of capacity,
or of the window if there is one.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic.heads import head_size, split_heads
from manyheads.layers.basic.linear import Linear
from manyheads.layers.basic.norm import RMSNorm
from manyheads.layers.cache.kv_cache import KVCache, WindowCache, advance
from manyheads.layers.mixer import register_mixer
from manyheads.layers.position.alibi import alibi_slopes
from manyheads.layers.position.rope import rope
from manyheads.layers.position.segments import segment_positions
from manyheads.pallas_kernels.block_mask import MaskMod
from manyheads.pallas_kernels.flex_attention import flex_attention
from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow

__all__ = ["SoftmaxAttention"]

POSITIONS = ("rope", "rope_interleaved", "alibi", "none")


@register_mixer(
    "softmax",
    title="Attention Is All You Need",
    year=2017,
    state="capacity",
    variants=(
        {"num_kv_heads": 1, "softcap": 5.0, "qk_norm": True, "position": "rope_interleaved"},
        {"window": 5, "sinks": True, "position": "alibi"},
        {"window": 4, "first_tokens": 2, "position": "none"},
    ),
)
class SoftmaxAttention(nnx.Module):
    """Causal softmax attention; keeps the contract of ``layers.mixer``.

    Args:
      d_model: features D of input and output.
      num_heads: query heads H.
      num_kv_heads: key heads G, a divisor of H; default H.
      head_dim: features K of a head; default D / H.
      window: a token reads the last ``window`` tokens, itself included; default all before it.
      first_tokens: with a window, the first tokens of the sequence stay readable too.
      sinks: learn one logit a head that joins the denominator, initially zero.
      softcap: bound on the scores; default none.
      qk_norm: normalise queries and keys (RMS over K, learned weight) before the position is applied.
      position: "rope" (half-split), "rope_interleaved", "alibi" or "none".
      rope_base: base of the rotary frequencies.
      use_bias: biases on the four projections.
      implementation: of ``flex_attention``.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        first_tokens: int = 0,
        sinks: bool = False,
        softcap: float | None = None,
        qk_norm: bool = False,
        position: str = "rope",
        rope_base: float = 10000.0,
        use_bias: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = head_size(d_model, num_heads, head_dim)
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must be a divisor of num_heads={num_heads}")
        if position not in POSITIONS:
            raise ValueError(f"position={position!r} is not one of {', '.join(POSITIONS)}")
        if position.startswith("rope") and head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even for position={position!r}")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1, or None for all tokens")
        if first_tokens < 0 or (first_tokens and window is None):
            raise ValueError(f"first_tokens={first_tokens} must be 0, or positive together with a window")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap={softcap} must be positive, or None")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.first_tokens, self.softcap = window, first_tokens, softcap
        self.position, self.rope_base, self.implementation = position, rope_base, implementation
        self.query = Linear(d_model, num_heads * head_dim, use_bias=use_bias, rngs=rngs)
        self.key = Linear(d_model, num_kv_heads * head_dim, use_bias=use_bias, rngs=rngs)
        self.value = Linear(d_model, num_kv_heads * head_dim, use_bias=use_bias, rngs=rngs)
        self.out = Linear(num_heads * head_dim, d_model, use_bias=use_bias, rngs=rngs)
        self.query_norm = RMSNorm(head_dim) if qk_norm else None
        self.key_norm = RMSNorm(head_dim) if qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(num_heads)) if sinks else None

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Attention within the sequence."""
        index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        mask = Causal()
        if self.window is not None:
            near = SlidingWindow(self.window)
            if self.first_tokens and segment_ids is not None:
                mask = self._packed_mask(segment_positions(segment_ids))
            else:
                mask = mask & ((near | FirstKeys(self.first_tokens)) if self.first_tokens else near)
        q, k, v = self._project(x, index)
        return self._read(q, k, v, mask, index, index, segment_ids)

    def init_state(self, batch: int, capacity: int) -> KVCache | WindowCache:
        """An empty cache: of ``capacity`` tokens, or of the window and the first tokens if there is one."""
        dtype = self.key.kernel[...].dtype
        if self.window is None:
            return KVCache.empty(batch, capacity, self.num_kv_heads, self.head_dim, dtype)
        return WindowCache.empty(batch, self.window, self.first_tokens, self.num_kv_heads, self.head_dim, dtype)

    def extend(
        self, x: Float[Array, "B n D"], state: KVCache | WindowCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], KVCache | WindowCache]:
        """Attention of the next n tokens to the cache and to themselves."""
        positions, _ = advance(state.length, x.shape[1], None)
        q, k, v = self._project(x, positions)
        after = state.append(k, v, lengths)
        if isinstance(state, KVCache):
            held = jnp.arange(state.capacity, dtype=jnp.int32)[None]
            return self._read(q, *after.tokens(), Causal(state.length), positions, held), after
        # The ring drops what the first new tokens still read: read the old ring and the new tokens side by side.
        keys, values = state.tokens()
        keys = jnp.concatenate([keys, k.astype(keys.dtype)], axis=1)
        values = jnp.concatenate([values, v.astype(values.dtype)], axis=1)
        held = jnp.concatenate([state.position, positions], axis=1)

        def mask(b, h, q, k):
            at, of = positions[b, q], held[b, k]
            return (of >= 0) & (of <= at) & ((at - of < self.window) | (of < self.first_tokens))

        return self._read(q, keys, values, mask, positions, held), after

    def _packed_mask(self, in_document: Int[Array, "B T"]) -> MaskMod:
        """Causal window with the first tokens of every document kept."""
        return lambda b, h, q, k: (k <= q) & ((q - k < self.window) | (in_document[b, k] < self.first_tokens))

    def _project(self, x: Float[Array, "B n D"], positions: Int[Array, "B n"]) -> tuple[Array, Array, Array]:
        q = split_heads(self.query(x), self.num_heads)
        k = split_heads(self.key(x), self.num_kv_heads)
        v = split_heads(self.value(x), self.num_kv_heads)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.position.startswith("rope"):
            options = {"base": self.rope_base, "interleaved": self.position == "rope_interleaved"}
            q, k = rope(q, positions, **options), rope(k, positions, **options)
        return q, k, v

    def _read(
        self,
        q: Float[Array, "B n H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G K"],
        mask: MaskMod,
        q_positions: Int[Array, "B|1 n"],
        k_positions: Int[Array, "B|1 S"],
        segment_ids: Int[Array, "B n"] | None = None,
    ) -> Float[Array, "B n D"]:
        """Flex attention with this layer's scores, and the output projection."""
        slopes = alibi_slopes(self.num_heads) if self.position == "alibi" else None

        def score_mod(score, b, h, q, k):
            if self.softcap is not None:
                score = self.softcap * jnp.tanh(score / self.softcap)
            if slopes is not None:
                row = lambda positions: positions[b if positions.shape[0] > 1 else 0]
                score = score - slopes[h] * (row(q_positions)[q] - row(k_positions)[k])
            return score

        y = flex_attention(
            q,
            k,
            v,
            mask=mask,
            score_mod=None if self.softcap is None and slopes is None else score_mod,
            segment_ids=segment_ids,
            sinks=None if self.sinks is None else self.sinks[...],
            implementation=self.implementation,
        )
        return self.out(y.reshape(*y.shape[:2], -1))
