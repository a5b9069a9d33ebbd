"""Architectures: backbones, and the named models that are settings of them."""
