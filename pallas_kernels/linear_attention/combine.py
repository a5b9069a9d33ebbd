"""The monoid of linear attention: what a stretch of tokens does to the state."""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["decay_combine"]

Stretch = tuple[Float[Array, "..."], Float[Array, "... K V"]]


def decay_combine(first: Stretch, second: Stretch) -> Stretch:
    """Combine two adjacent stretches of tokens, the earlier one first.

    A stretch ``(decay, state)`` maps the state S before it to ``decay * S + state`` after it, where ``decay: ... K|1`` is
    the product of its decays. Associative, not commutative; the identity is ``(1, 0)``.
    """
    (decay1, state1), (decay2, state2) = first, second
    return decay1 * decay2, jnp.expand_dims(decay2, -1) * state1 + state2
