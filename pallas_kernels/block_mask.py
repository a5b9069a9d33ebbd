"""Block-sparse masks: which blocks of the T x S score matrix have to be computed.

A ``BlockMask`` holds one bit a block, and optionally a ``mask_mod`` that decides inside the active blocks. Static masks
come from ``create_block_mask``; dynamic ones, chosen by a model while it runs, from ``BlockMask.from_blocks``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from manyheads.pallas_kernels.masks import Mask

__all__ = ["BlockMask", "MaskMod", "create_block_mask", "evaluate_mask"]

MaskMod = Callable[[Any, Any, Any, Any], Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("block_map",),
    meta_fields=("block_size", "q_len", "kv_len", "mask_mod"),
)
@dataclass(frozen=True)
class BlockMask:
    """Active blocks of a T x S mask, a pytree.

    Attributes:
      block_map: ``B|1 H|1 nQ nS`` bool, True where a block has to be computed.
      block_size: rows and columns of a block.
      q_len, kv_len: the T and S that the mask is for; None for any that gives as many blocks.
      mask_mod: decides about the pairs inside active blocks; None allows all of them.
    """

    block_map: Bool[Array, "B H nQ nS"]
    block_size: tuple[int, int]
    q_len: int | None = None
    kv_len: int | None = None
    mask_mod: MaskMod | None = None

    @classmethod
    def from_blocks(
        cls,
        block_map: Bool[Array, "B H nQ nS"],
        block_size: tuple[int, int],
        mask_mod: MaskMod | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> "BlockMask":
        """A mask from the map of its active blocks, which may be traced.

        Args:
          block_map: ``B|1 H|1 nQ nS``, True where a block is active.
          block_size: rows and columns of a block.
          mask_mod: decides about the pairs inside active blocks; None allows all of them.
          q_len, kv_len: T and S, checked when the mask is used; None for any that gives as many blocks.
        """
        block_map = jnp.asarray(block_map)
        if block_map.ndim != 4 or block_map.dtype != jnp.bool_:
            raise ValueError(
                f"block_map must be bool with axes B H nQ nS, got {block_map.dtype}{list(block_map.shape)}"
            )
        block_mask = cls(block_map, _check_block_size(block_size), q_len, kv_len, mask_mod)
        block_mask.check(*block_mask.shape[2:])
        return block_mask

    def check(self, q_len: int, kv_len: int) -> None:
        """Raise a ValueError if the mask is not one for ``q_len`` queries and ``kv_len`` keys."""
        lengths, allowed = (q_len, kv_len), (self.q_len, self.kv_len)
        blocks = tuple(-(-n // size) for n, size in zip(lengths, self.block_size))
        if blocks != self.block_map.shape[2:] or any(a not in (None, n) for a, n in zip(allowed, lengths)):
            rows, columns = self.block_size
            raise ValueError(
                f"mask: a BlockMask of {' x '.join(map(str, self.block_map.shape[2:]))} blocks of {rows} x {columns} for "
                f"(q_len, kv_len)={self.shape[2:]} does not fit {q_len} queries and {kv_len} keys"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B|1, H|1, T, S); whole blocks where a length is not given."""
        batch, heads, n_q, n_kv = self.block_map.shape
        rows, columns = self.block_size
        return batch, heads, self.q_len or n_q * rows, self.kv_len or n_kv * columns

    def density(self) -> Array:
        """The share of blocks that are active."""
        return jnp.mean(self.block_map.astype(jnp.float32))

    def to_dense(self) -> Bool[Array, "B H T S"]:
        """The mask element by element. Memory O(T S): for looking at, and for tests."""
        dense = self.block_map
        for axis, size in zip((2, 3), self.block_size):
            dense = jnp.repeat(dense, size, axis)
        dense = dense[:, :, : self.shape[2], : self.shape[3]]
        if self.mask_mod is not None:
            dense = dense & evaluate_mask(self.mask_mod, *(jnp.arange(n, dtype=jnp.int32) for n in self.shape))
        return dense


def _check_block_size(block_size: tuple[int, int]) -> tuple[int, int]:
    if len(block_size) != 2 or any(int(n) < 1 for n in block_size):
        raise ValueError(f"block_size={block_size!r} must be two positive integers, rows and columns")
    return int(block_size[0]), int(block_size[1])


def evaluate_mask(mask_mod: MaskMod, b: Array, h: Array, q: Array, k: Array) -> Bool[Array, "b h q k"]:
    """``mask_mod`` on the product of four vectors of indices."""
    fn = mask_mod
    for position in (3, 2, 1, 0):
        axes = [None] * 4
        axes[position] = 0
        fn = jax.vmap(fn, in_axes=tuple(axes))
    return jnp.asarray(fn(b, h, q, k), jnp.bool_)


def create_block_mask(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int] = (128, 128),
) -> BlockMask:
    """The block mask of ``mask_mod``: a block is active where some pair of it is allowed.

    Args:
      mask_mod: ``(b, h, q, k) -> bool`` on integer scalars. For the masks of ``pallas_kernels.masks`` the cost is that of
        the blocks; any other function is evaluated on all T x S pairs, one row of blocks at a time, in memory O(S).
      batch, heads: sizes that the mask depends on; None or 1 where it is the same for all.
      q_len, kv_len: T and S.
      block_size: rows and columns of a block.
    """
    rows, columns = _check_block_size(block_size)
    if q_len < 1 or kv_len < 1:
        raise ValueError(f"q_len={q_len} and kv_len={kv_len} must be positive")
    b, h = (jnp.arange(n or 1, dtype=jnp.int32) for n in (batch, heads))
    q_start = jnp.arange(0, q_len, rows, dtype=jnp.int32)
    k_start = jnp.arange(0, kv_len, columns, dtype=jnp.int32)
    if isinstance(mask_mod, Mask):
        q = (q_start[:, None], jnp.minimum(q_start + rows, q_len)[:, None] - 1)
        k = (k_start[None, :], jnp.minimum(k_start + columns, kv_len)[None, :] - 1)
        some = jax.vmap(lambda row: jnp.broadcast_to(mask_mod.bounds(row, q, k)[0], (len(q_start), len(k_start))))(b)
        block_map = jnp.broadcast_to(some[:, None], (len(b), len(h), *some.shape[1:]))
    else:
        k_index = jnp.arange(len(k_start) * columns, dtype=jnp.int32)

        def row_of_blocks(start: Array) -> Array:
            q_index = start + jnp.arange(rows, dtype=jnp.int32)
            # Positions beyond the ends repeat the last one, which is in the same block.
            pairs = evaluate_mask(mask_mod, b, h, jnp.minimum(q_index, q_len - 1), jnp.minimum(k_index, kv_len - 1))
            return pairs.reshape(len(b), len(h), rows, len(k_start), columns).any((2, 4))

        block_map = jnp.moveaxis(jax.lax.map(row_of_blocks, q_start), 0, 2)
    return BlockMask(block_map, (rows, columns), q_len, kv_len, mask_mod)
