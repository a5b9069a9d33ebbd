"""Mask functions with structure: which (query, key) pairs may meet, element by element and block by block.

A mask is any function ``mask_mod(b, h, q, k) -> bool`` of integer scalars. The classes here are such functions that can
also bound themselves over a rectangle of positions, so that the active blocks of a T x S mask are found in time
O(blocks) instead of O(T S). They combine with ``&`` and ``|`` and compare by value.

Positions: query ``q`` stands at ``q + offset`` on the axis of the keys. ``offset`` is 0 for self-attention; with a
cache it is the number of tokens before the first query, an integer or one per row of the batch (``B``).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

__all__ = ["And", "Causal", "FirstKeys", "Mask", "Or", "SlidingWindow"]


def _shift(offset: Any, b: Any) -> Any:
    """The offset of row ``b``, whether there is one for all rows or one a row."""
    return offset if jnp.ndim(offset) == 0 else jnp.asarray(offset)[b]


class Mask:
    """Base of the structured masks: a ``mask_mod`` that knows its value on rectangles of positions."""

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Whether query q may read key k."""
        raise NotImplementedError

    def bounds(self, b: Any, q: tuple[Any, Any], k: tuple[Any, Any]) -> tuple[Any, Any]:
        """Over queries ``q[0]..q[1]`` and keys ``k[0]..k[1]`` (inclusive): (may some pair be allowed, are all allowed).

        "Some" may err on the side of True, "all" on the side of False.
        """
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@dataclass(frozen=True)
class And(Mask):
    """Pairs that both masks allow."""

    first: Mask
    second: Mask

    def __call__(self, b, h, q, k):
        """Whether query q may read key k."""
        return self.first(b, h, q, k) & self.second(b, h, q, k)

    def bounds(self, b, q, k):
        """See ``Mask.bounds``."""
        (some1, all1), (some2, all2) = self.first.bounds(b, q, k), self.second.bounds(b, q, k)
        return some1 & some2, all1 & all2


@dataclass(frozen=True)
class Or(Mask):
    """Pairs that either mask allows."""

    first: Mask
    second: Mask

    def __call__(self, b, h, q, k):
        """Whether query q may read key k."""
        return self.first(b, h, q, k) | self.second(b, h, q, k)

    def bounds(self, b, q, k):
        """See ``Mask.bounds``."""
        (some1, all1), (some2, all2) = self.first.bounds(b, q, k), self.second.bounds(b, q, k)
        return some1 | some2, all1 | all2


@dataclass(frozen=True)
class Causal(Mask):
    """Key k is at or before the query: k <= q + offset."""

    offset: Any = 0

    def __call__(self, b, h, q, k):
        """Whether query q may read key k."""
        return k <= q + _shift(self.offset, b)

    def bounds(self, b, q, k):
        """See ``Mask.bounds``."""
        shift = _shift(self.offset, b)
        return k[0] <= q[1] + shift, k[1] <= q[0] + shift


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Key k is one of the ``size`` last positions up to the query, or after it: q + offset - k < size."""

    size: int
    offset: Any = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"SlidingWindow: size={self.size} must be at least 1")

    def __call__(self, b, h, q, k):
        """Whether query q may read key k."""
        return q + _shift(self.offset, b) - k < self.size

    def bounds(self, b, q, k):
        """See ``Mask.bounds``."""
        shift = _shift(self.offset, b)
        return q[0] + shift - k[1] < self.size, q[1] + shift - k[0] < self.size


@dataclass(frozen=True)
class FirstKeys(Mask):
    """Key k is one of the first ``count``: attention sinks, or a prefix that all may read."""

    count: int

    def __call__(self, b, h, q, k):
        """Whether query q may read key k."""
        return (k < self.count) & (q >= 0)

    def bounds(self, b, q, k):
        """See ``Mask.bounds``."""
        return (k[0] < self.count) & (q[1] >= 0), (k[1] < self.count) & (q[0] >= 0)
