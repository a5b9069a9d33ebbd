"""AdamW (Decoupled Weight Decay Regularization, 2019) with warm-up, a schedule and gradient clipping."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax

__all__ = ["OptimizerConfig", "learning_rate", "make_optimizer"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      learning_rate: the highest one, reached after warm-up.
      warmup_steps: steps from 0 to it, linear.
      schedule: "cosine" down to ``final_fraction`` of it at the last step, or "constant".
      final_fraction: see ``schedule``.
      weight_decay: on matrices alone, not on biases, norms and other vectors.
      b1, b2: decay of the means of gradients and of their squares.
      clip_norm: gradients with a larger norm are scaled down to it.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 20
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 0.1
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
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
        for field in ("b1", "b2", "final_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must be between 0 and 1")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step of a run of ``steps`` steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation for a run of ``steps`` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )
