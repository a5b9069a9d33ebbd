"""Activation functions by name."""

from collections.abc import Callable

import jax
from jaxtyping import Array

__all__ = ["ACTIVATIONS", "activation_function"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def activation_function(name: str) -> Callable[[Array], Array]:
    """The activation of that name; ValueError with the allowed ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
