"""Caches of decoding."""

from manyheads.layers.cache.kv_cache import KVCache, WindowCache, advance

__all__ = ["KVCache", "WindowCache", "advance"]
