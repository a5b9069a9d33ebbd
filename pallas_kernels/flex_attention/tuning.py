"""Tile sizes as data: what measured best, and where."""

# CPU (2 cores, 2 x 1 MiB L2), jax 0.10.2, 2026-11: (queries, keys) of a tile where the caller gives no BlockMask.
XLA_BLOCK = (256, 256)
# Fewer queries than that take more keys, up to this many.
XLA_MOST_KEYS = 1024
# Score matrices up to this many entries a head, with no more keys than above, are one tile: no loop, no block map.
XLA_SINGLE_TILE = 512 * 512
# With at most this many queries (decoding), tiles are chosen for all rows of the batch together.
XLA_DECODE_QUERIES = 16
