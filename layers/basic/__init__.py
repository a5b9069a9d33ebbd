"""Parts without a mechanism of their own: linear maps, norms, embeddings, feed-forward layers."""

from manyheads.layers.basic.activation import activation_function
from manyheads.layers.basic.constant import Constant
from manyheads.layers.basic.embedding import Embedding
from manyheads.layers.basic.feed_forward import FeedForward, GatedFeedForward
from manyheads.layers.basic.heads import head_size, split_heads
from manyheads.layers.basic.linear import Linear, linear
from manyheads.layers.basic.norm import LayerNorm, RMSNorm, layer_norm, make_norm, rms_norm

__all__ = [
    "Constant",
    "Embedding",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "activation_function",
    "head_size",
    "layer_norm",
    "linear",
    "make_norm",
    "rms_norm",
    "split_heads",
]
