"""Chunk sizes as data: what measured best, and where."""

# CPU (2 cores), jax 0.10.2, 2026-11.
XLA_CHUNK = 64
# Decays per key feature need C x C x K products inside a chunk of C.
XLA_CHUNK_PER_FEATURE = 16
