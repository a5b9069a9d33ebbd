"""Meshes for TPU pods and GPU clusters."""

from manyheads.tpu.mesh import AXES, make_mesh

__all__ = ["AXES", "make_mesh"]
