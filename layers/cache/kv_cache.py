"""Key-value caches behind ``extend``: one that holds every token, and one that holds a window and the first tokens."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

__all__ = ["KVCache", "WindowCache", "advance"]


def advance(length: Int[Array, "B"], n: int, lengths: Int[Array, "B"] | None) -> tuple[Int[Array, "B n"], Array]:
    """Positions of the next n tokens of each row, and the lengths after them.

    Args:
      length: tokens that each row holds.
      n: new tokens a row.
      lengths: how many of them are real; default all. The position of the others is a large number.
    """
    index = jnp.arange(n, dtype=jnp.int32)[None, :]
    positions = length[:, None] + index
    if lengths is None:
        return positions, length + n
    beyond = jnp.iinfo(jnp.int32).max // 2
    return jnp.where(index < lengths[:, None], positions, beyond), length + lengths.astype(jnp.int32)


def _write(buffer: Float[Array, "B G C K"], new: Float[Array, "B n G K"], slots: Int[Array, "B n"]) -> Array:
    """Write the tokens of ``new`` to their slots; slots beyond the buffer are dropped."""
    batch = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[batch, :, slots].set(new.astype(buffer.dtype), mode="drop")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("key", "value", "length"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens so far: slot i holds the token at position i.

    Attributes:
      key, value: ``B G C K``, heads before tokens so that decoding streams them; room for C tokens, 2 B C G K numbers.
      length: ``B``, tokens in each row. Tokens beyond C are dropped: callers keep within the capacity.
    """

    key: Float[Array, "B G C K"]
    value: Float[Array, "B G C K"]
    length: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, capacity: int, heads: int, features: int, dtype: DTypeLike = jnp.float32) -> "KVCache":
        """A cache without tokens."""
        zeros = jnp.zeros((batch, heads, capacity, features), dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.key.shape[2]

    def tokens(self) -> tuple[Float[Array, "B C G K"], Float[Array, "B C G K"]]:
        """Keys and values in the order of the primitives."""
        return jnp.swapaxes(self.key, 1, 2), jnp.swapaxes(self.value, 1, 2)

    def append(
        self, key: Float[Array, "B n G K"], value: Float[Array, "B n G K"], lengths: Int[Array, "B"] | None = None
    ) -> "KVCache":
        """The cache with the first ``lengths[b]`` (default all n) of the new tokens."""
        positions, length = advance(self.length, key.shape[1], lengths)
        return replace(
            self, key=_write(self.key, key, positions), value=_write(self.value, value, positions), length=length
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key", "value", "position", "length"), meta_fields=("first",)
)
@dataclass(frozen=True)
class WindowCache:
    """Keys and values of the first ``first`` tokens and of the last W: fixed size, whatever the length.

    Attributes:
      key, value: ``B G (first + W) K``; the slots after the first ones are a ring.
      position: ``B (first + W)``, the position of the token in a slot, -1 if it is empty.
      length: ``B``, tokens that each row has seen.
      first: slots for the first tokens.
    """

    key: Float[Array, "B G C K"]
    value: Float[Array, "B G C K"]
    position: Int[Array, "B C"]
    length: Int[Array, "B"]
    first: int

    @classmethod
    def empty(
        cls, batch: int, window: int, first: int, heads: int, features: int, dtype: DTypeLike = jnp.float32
    ) -> "WindowCache":
        """A cache without tokens."""
        zeros = jnp.zeros((batch, heads, first + window, features), dtype)
        empty = jnp.full((batch, first + window), -1, jnp.int32)
        return cls(zeros, zeros, empty, jnp.zeros(batch, jnp.int32), first)

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for at a time."""
        return self.key.shape[2]

    def tokens(self) -> tuple[Float[Array, "B C G K"], Float[Array, "B C G K"]]:
        """Keys and values in the order of the primitives."""
        return jnp.swapaxes(self.key, 1, 2), jnp.swapaxes(self.value, 1, 2)

    def append(
        self, key: Float[Array, "B n G K"], value: Float[Array, "B n G K"], lengths: Int[Array, "B"] | None = None
    ) -> "WindowCache":
        """The cache after the first ``lengths[b]`` (default all n) of the new tokens."""
        window = self.capacity - self.first
        positions, length = advance(self.length, key.shape[1], lengths)
        ring = self.first + (positions - self.first) % window
        kept = (positions >= length[:, None] - window) & (positions < length[:, None])
        slots = jnp.where(positions < self.first, positions, jnp.where(kept, ring, self.capacity))
        return replace(
            self,
            key=_write(self.key, key, slots),
            value=_write(self.value, value, slots),
            position=self.position.at[jnp.arange(len(slots))[:, None], slots].set(positions, mode="drop"),
            length=length,
        )
