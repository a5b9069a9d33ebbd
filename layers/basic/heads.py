"""Features as heads."""

from jaxtyping import Array, Float

__all__ = ["head_size", "split_heads"]


def head_size(d_model: int, num_heads: int, head_dim: int | None = None) -> int:
    """``head_dim``, or D / H if it is None; ValueError if the heads do not divide the features."""
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    if head_dim is None and d_model % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}; choose a divisor or set head_dim")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim={head_dim} must be at least 1")
    return d_model // num_heads if head_dim is None else head_dim


def split_heads(x: Float[Array, "B T F"], heads: int) -> Float[Array, "B T H K"]:
    """The last axis as ``heads`` equal parts."""
    return x.reshape(*x.shape[:2], heads, -1)
