"""Architectures: backbones, and the named models that are settings of them.

Importing this package registers every preset (``manyheads.architectures.registry``).
"""

from manyheads.architectures import language
from manyheads.architectures.registry import ArchitectureInfo, architecture_info, architecture_names

__all__ = ["ArchitectureInfo", "architecture_info", "architecture_names", "language"]
