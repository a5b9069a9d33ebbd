"""Convolutions over time."""

from manyheads.layers.convolution.base_conv import BaseConv
from manyheads.layers.convolution.causal import long_convolution, short_convolution
from manyheads.layers.convolution.short_conv import GatedShortConvolution

__all__ = ["BaseConv", "GatedShortConvolution", "long_convolution", "short_convolution"]
