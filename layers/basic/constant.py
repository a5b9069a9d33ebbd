"""Arrays that a module owns and nothing trains."""

from flax import nnx

__all__ = ["Constant"]


class Constant(nnx.Variable):
    """A fixed array of a module, such as a decay rate: it is saved and sharded with the model, and never updated.

    Training takes gradients with respect to ``nnx.Param`` alone.
    """
