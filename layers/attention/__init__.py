"""Softmax attention and its variants."""

from manyheads.layers.attention.softmax import SoftmaxAttention

__all__ = ["SoftmaxAttention"]
