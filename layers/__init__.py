"""Layers: sequence mixers and their parts, each a pure function and a thin Flax NNX module."""
