"""What the training loop asks of an experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import grain
from flax import nnx
from jaxtyping import Array

from manyheads.experiments.data.batching import Batch

__all__ = ["Task"]


class Task(Protocol):
    """One experiment: a model, its data and its loss."""

    def init_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with fresh parameters; what is not an ``nnx.Param`` is not trained."""

    def train_data(self) -> grain.MapDataset:
        """Endless batches, the same in every call."""

    def eval_data(self) -> Sequence[Batch]:
        """The held-out batches, all of one shape."""

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """The loss (float32 scalar) and further scalars to record; pure and jittable."""

    def tokens(self, batch: Batch) -> int:
        """Tokens in a batch, for the speed that is shown."""

    def finish(self, model: nnx.Module, out: Path) -> None:
        """Write what the task has to show of a trained model into the folder of the run."""
