"""AdamW (Decoupled Weight Decay Regularization, 2019) with warm-up, a schedule and gradient clipping."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

__all__ = ["OptimizerConfig", "decays", "learning_rate", "make_optimizer"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      learning_rate: the highest one, reached after warm-up.
      warmup_steps: steps from 0 to it, linear.
      schedule: "cosine" down to ``final_fraction`` of it at the last step, or "constant".
      final_fraction: see ``schedule``.
      weight_decay: on matrices alone, not on biases, norms and other vectors; unless ``decay_vectors``.
      decay_vectors: weight decay on these too, as PyTorch's AdamW does by default.
      b1, b2: decay of the means of gradients and of their squares.
      clip_norm: gradients with a larger norm are scaled down to it.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 20
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    decay_vectors: bool = False
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r} is not one of cosine, constant")
        for field in ("learning_rate", "clip_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        for field in ("warmup_steps", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and less than 1")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction} must be between 0 and 1")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step of a run of ``steps`` steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def decays(params: Any) -> Any:
    """Which parameters weight decay acts on, as a pytree of booleans: matrices, also when they are stacked over layers.

    The parameters of repeated layers are stacked in an attribute ``repeats``; there the first axis does not count.
    """

    def is_matrix(path: Any, param: jax.Array) -> bool:
        stacked = "repeats" in jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return param.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation for a run of ``steps`` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=None if config.decay_vectors else decays,
        ),
    )
