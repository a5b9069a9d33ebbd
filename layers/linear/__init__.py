"""Linear attention and its decayed forms."""

from manyheads.layers.linear.lightning import LightningAttention, lightning_log_decay
from manyheads.layers.linear.linear_attention import LinearAttention, elu_plus_one
from manyheads.layers.linear.state import MatrixState

__all__ = ["LightningAttention", "LinearAttention", "MatrixState", "elu_plus_one", "lightning_log_decay"]
