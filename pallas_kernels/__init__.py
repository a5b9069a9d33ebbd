"""Primitives: every way of mixing a sequence, with a reference, a fast XLA form and gradients.

Each primitive is a folder. ``reference.py`` is the definition, ``xla.py`` the form for CPUs (chunked, memory linear in the
length) and the one that any device runs; ``__init__.py`` checks arguments and dispatches on ``implementation``.
"""

from manyheads.pallas_kernels.block_mask import BlockMask, create_block_mask
from manyheads.pallas_kernels.flex_attention import flex_attention, softmax_combine
from manyheads.pallas_kernels.gather_attention import gather_attention
from manyheads.pallas_kernels.linear_attention import decay_combine, linear_attention

__all__ = [
    "BlockMask",
    "create_block_mask",
    "decay_combine",
    "flex_attention",
    "gather_attention",
    "linear_attention",
    "softmax_combine",
]
