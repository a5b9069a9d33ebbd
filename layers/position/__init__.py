"""Positions: rotary embedding, linear biases, and positions inside packed documents."""

from manyheads.layers.position.alibi import alibi_slopes
from manyheads.layers.position.rope import rope
from manyheads.layers.position.segments import segment_positions

__all__ = ["alibi_slopes", "rope", "segment_positions"]
