"""Decoder-only language model over any sequence mixers.

A stack of pre-norm blocks between an embedding and an output layer::

    x = embed(tokens) (+ position)
    x = x + mixer_l(norm(x));  x = x + feed_forward_l(norm(x))        for every layer l
    logits = norm(x) W_out^T

The mixers follow a pattern that repeats over the layers. Each repeat is one step of a scan over stacked parameters, so
that compile time does not grow with depth; layers beyond the last whole repeat follow one by one.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.layers.basic import Embedding, FeedForward, GatedFeedForward, Linear, make_norm
from manyheads.layers.cache.kv_cache import advance
from manyheads.layers.mixer import make_mixer, mixer_info, parse_mixer
from manyheads.layers.position.segments import segment_positions

__all__ = ["Block", "Decoder", "DecoderConfig", "DecoderState"]

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Settings of a ``Decoder``.

    Attributes:
      vocab_size: number of tokens.
      d_model: features D.
      num_layers: number of blocks.
      mixers: pattern of mixers, repeated over the layers: names, or names with options as in "softmax(window=64)".
      num_heads, num_kv_heads, head_dim: for every mixer that has them and does not set its own; None for its default.
      position: "learned" adds a table of max_length positions to the embedding and leaves the mixers without any; other
        values ("rope", "rope_interleaved", "alibi", "none") go to the mixers that apply positions themselves.
      max_length: positions of the learned table.
      rope_base: base of the rotary frequencies.
      feed_forward: "gated", "plain", or "none" for blocks with a mixer alone.
      hidden: features of the feed-forward layer; None for 8/3 D (gated) or 4 D (plain), rounded up to a multiple of 8.
      activation: of the feed-forward layer.
      norm: "rms" or "layer".
      norm_eps: None for the norm's own default.
      tie_embeddings: use the embedding as the output layer.
      remat: what the backward pass may keep of a block: "none" recomputes nothing, "dots" keeps the products with
        weights, "full" keeps the input of each repeat alone.
      scan_layers: stack the parameters of repeated layers and scan; False keeps every layer apart.
      dtype: of activations; parameters are float32.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    mixers: tuple[str, ...] = ("softmax",)
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: Literal["rope", "rope_interleaved", "alibi", "learned", "none"] = "rope"
    max_length: int = 1024
    rope_base: float = 10000.0
    feed_forward: Literal["gated", "plain", "none"] = "gated"
    hidden: int | None = None
    activation: str = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | None = None
    tie_embeddings: bool = True
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if not self.mixers:
            raise ValueError("mixers=() must name at least one mixer")
        choices = {
            "position": ("rope", "rope_interleaved", "alibi", "learned", "none"),
            "feed_forward": ("gated", "plain", "none"),
            "remat": tuple(REMAT_POLICIES),
            "dtype": ("float32", "bfloat16"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be at least 1, or None")
        for spec in self.mixers:
            if not mixer_info(parse_mixer(spec)[0]).causal:
                raise ValueError(f"mixers: {spec!r} is not causal, a decoder needs causal mixers")

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer of every layer."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_layers))

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats."""
        layers = self.layers
        return next(p for p in range(1, len(layers) + 1) if all(layers[i] == layers[i % p] for i in range(len(layers))))

    @property
    def hidden_size(self) -> int:
        """Features of the feed-forward layer."""
        if self.hidden is not None:
            return self.hidden
        wide = 8 * self.d_model / 3 if self.feed_forward == "gated" else 4 * self.d_model
        return -(-int(wide) // 8) * 8


@functools.partial(jax.tree_util.register_dataclass, data_fields=("repeats", "rest", "length"), meta_fields=())
@dataclass(frozen=True)
class DecoderState:
    """Decode state of a ``Decoder``.

    Attributes:
      repeats: the states of one repeat's mixers, stacked over the repeats; None without a scan.
      rest: the states of the layers that are kept apart.
      length: ``B``, tokens that each row has seen.
    """

    repeats: tuple[Any, ...] | None
    rest: tuple[Any, ...]
    length: Int[Array, "B"]

    def unrolled(self) -> "DecoderState":
        """The same state for ``Decoder.unrolled()``."""
        if self.repeats is None:
            return self
        return DecoderState(None, (*_unstack(self.repeats), *self.rest), self.length)


def _unstack(repeats: Any) -> list[Any]:
    """What is stacked over the repeats (blocks, or their states), layer by layer."""
    count = len(jax.tree.leaves(repeats)[0])
    return [layer for i in range(count) for layer in jax.tree.map(lambda x: x[i], repeats)]  # noqa: B023


class Block(nnx.Module):
    """One layer: mixer and feed-forward layer, each behind a norm and around a residual.

    Args:
      config: of the decoder.
      spec: the mixer.
      depth: place of the layer in the model, from 0 to 1; may be traced.
      rngs: source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, spec: str, *, depth: float | Array = 0.0, rngs: nnx.Rngs):
        defaults: dict[str, Any] = {
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rope_base": config.rope_base,
            "position": "none" if config.position == "learned" else config.position,
            "depth": depth,
        }
        self.mixer_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps)
        self.mixer = make_mixer(spec, config.d_model, defaults=defaults, rngs=rngs)
        kinds = {"gated": GatedFeedForward, "plain": FeedForward}
        if config.feed_forward != "none":
            kind = kinds[config.feed_forward]
            self.feed_forward_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps)
            self.feed_forward = kind(config.d_model, config.hidden_size, activation=config.activation, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """The layer on whole sequences."""
        return self._transform(x + self.mixer(self.mixer_norm(x), segment_ids))

    def extend(
        self, x: Float[Array, "B n D"], state: Any, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], Any]:
        """The layer on the next n tokens."""
        y, state = self.mixer.extend(self.mixer_norm(x), state, lengths)
        return self._transform(x + y), state

    def _transform(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if not hasattr(self, "feed_forward"):
            return x
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """Decoder-only language model; see the module docstring.

    Args:
      config: settings.
      rngs: source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        if config.position == "learned":
            self.positions = Embedding(config.max_length, config.d_model, rngs=rngs)
        period, layers = config.period, config.layers
        repeats = len(layers) // period if config.scan_layers else 0
        repeats = repeats if repeats > 1 else 0  # nothing to scan over
        depth = jnp.arange(len(layers)) / max(1, len(layers) - 1)

        def one_repeat(key: Array, depth: Float[Array, "period"]) -> nnx.List:
            keys = nnx.Rngs(key)
            return nnx.List([Block(config, spec, depth=depth[i], rngs=keys) for i, spec in enumerate(layers[:period])])

        scanned = repeats * period
        if repeats:
            keys = jax.random.split(rngs.params(), repeats)
            self.repeats = jax.vmap(one_repeat)(keys, depth[:scanned].reshape(repeats, period))
        self.rest = nnx.List([Block(config, layers[i], depth=depth[i], rngs=rngs) for i in range(scanned, len(layers))])
        self.norm = make_norm(config.norm, config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.out = Linear(config.d_model, config.vocab_size, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T vocab"]:
        """Logits (float32) of the token after each one, from the tokens of its document up to it."""
        return self.logits(self.features(tokens, segment_ids))

    def features(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The normalised output of the last layer."""
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"max_length={self.config.max_length} is less than the {tokens.shape[1]} tokens of a sequence"
            )
        positions = jnp.arange(tokens.shape[1])[None] if segment_ids is None else segment_positions(segment_ids)
        x = self._embed(tokens, positions)

        def repeat(x: Array, blocks: nnx.List) -> tuple[Array, None]:
            for block in blocks:
                x = block(x, segment_ids)
            return x, None

        if self.config.remat != "none":
            repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[self.config.remat])
        if hasattr(self, "repeats"):
            x, _ = jax.lax.scan(repeat, x, self.repeats)
        for block in self.rest:
            x, _ = repeat(x, [block])
        return self.norm(x)

    def logits(self, features: Float[Array, "... D"]) -> Float[Array, "... vocab"]:
        """The output layer, float32."""
        out = self.embedding.attend if self.config.tie_embeddings else self.out
        return out(features).astype(jnp.float32)

    def init_state(self, batch: int, capacity: int) -> DecoderState:
        """The state before the first token, with room for ``capacity`` tokens a row."""
        repeats = None
        if hasattr(self, "repeats"):
            repeats = jax.vmap(lambda blocks: tuple(b.mixer.init_state(batch, capacity) for b in blocks))(self.repeats)
        rest = tuple(block.mixer.init_state(batch, capacity) for block in self.rest)
        return DecoderState(repeats, rest, jnp.zeros(batch, jnp.int32))

    def extend(
        self,
        tokens: Int[Array, "B n"],
        state: DecoderState,
        lengths: Int[Array, "B"] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B n vocab"], DecoderState]:
        """Logits after each of the next n tokens, and the state after them.

        Args:
          tokens: the next tokens.
          state: the state before them.
          lengths: how many of them are real in each row; default all.
          last_only: return the logits after the last real token alone, ``B 1 vocab``.
        """
        positions, length = advance(state.length, tokens.shape[1], None)
        x = self._embed(tokens, positions)

        def repeat(x: Array, now: tuple[nnx.List, tuple[Any, ...]]) -> tuple[Array, tuple[Any, ...]]:
            states = []
            for block, before in zip(*now):
                x, after = block.extend(x, before, lengths)
                states.append(after)
            return x, tuple(states)

        repeats = state.repeats
        if hasattr(self, "repeats"):
            x, repeats = jax.lax.scan(repeat, x, (self.repeats, repeats))
        x, rest = repeat(x, (self.rest, state.rest))
        if last_only:
            last = tokens.shape[1] - 1 if lengths is None else lengths[:, None, None] - 1
            x = jnp.take_along_axis(x, jnp.broadcast_to(last, (x.shape[0], 1, 1)), axis=1, mode="clip")
        if lengths is not None:
            length = state.length + lengths.astype(jnp.int32)
        return self.logits(self.norm(x)), DecoderState(repeats, rest, length)

    def unrolled(self) -> "Decoder":
        """The same model with every layer apart: decoding one token streams separate weights fastest."""
        if not hasattr(self, "repeats"):
            return self
        blocks = _unstack(self.repeats)
        model = nnx.clone(self)
        del model.repeats
        model.rest = nnx.List([*blocks, *self.rest])
        model.config = replace(self.config, scan_layers=False)
        return model

    def _embed(self, tokens: Int[Array, "B n"], positions: Int[Array, "B n"]) -> Float[Array, "B n D"]:
        x = self.embedding(tokens)
        if self.config.position == "learned":
            x = x + self.positions(positions)
        return x.astype(self.config.dtype)
