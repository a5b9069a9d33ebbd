"""Layers: sequence mixers and their parts, each a pure function and a thin Flax NNX module.

Importing this package registers every mixer (``manyheads.layers.mixer``).
"""

from manyheads.layers import attention, convolution, linear
from manyheads.layers.mixer import MixerInfo, SequenceMixer, make_mixer, mixer_info, mixer_names

__all__ = [
    "MixerInfo",
    "SequenceMixer",
    "attention",
    "convolution",
    "linear",
    "make_mixer",
    "mixer_info",
    "mixer_names",
]
