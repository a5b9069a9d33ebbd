"""A training run of a second or two, for tests of the loop: a linear map is learned from noisy examples.

``python tests/toy_training.py --out FOLDER`` trains it as ``manyheads train`` trains its tasks, with the same handling of
arguments and errors.
"""

import importlib
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manyheads.experiments.benchmarks.kill_resume import final_arrays
from manyheads.experiments.record import write_text
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.trainer import Result, TrainerConfig, train
from manyheads.layers.basic import Linear

FEATURES, ROWS = 8, 4
FAR = sys.maxsize


@dataclass(frozen=True)
class ToyTask:
    """Learn y = 2 x. Batch ``bad_batch`` holds a NaN, and the held-out loss is NaN if ``bad_eval``."""

    seed: int = 0
    bad_batch: int = -1
    bad_eval: bool = False
    seconds_per_batch: float = 0.0

    def init_model(self, rngs: nnx.Rngs) -> Linear:
        return Linear(FEATURES, FEATURES, use_bias=True, rngs=rngs)

    def _batch(self, number: int, seed: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng((seed, number)).standard_normal((ROWS, FEATURES), np.float32)
        return {"x": x, "y": 2 * x}

    def train_data(self) -> grain.MapDataset:
        def batch(number: int) -> dict[str, np.ndarray]:
            time.sleep(self.seconds_per_batch)
            batch = self._batch(number, self.seed)
            return {**batch, "y": batch["y"] * np.float32("nan")} if number == self.bad_batch else batch

        return grain.MapDataset.range(FAR).map(batch)

    def eval_data(self) -> list[dict[str, np.ndarray]]:
        scale = np.float32("nan" if self.bad_eval else "1")
        return [{name: scale * array for name, array in self._batch(number, FAR).items()} for number in range(3)]

    def loss(self, model: Linear, batch: dict[str, np.ndarray]):
        error = model(jnp.asarray(batch["x"])) - batch["y"]
        return jnp.mean(error**2), {"largest_error": jnp.max(jnp.abs(error))}

    def tokens(self, batch: dict[str, np.ndarray]) -> int:
        return len(batch["x"])

    def finish(self, model: Linear, out: Path) -> None:
        write_text(out / "kernel.txt", f"{float(model.kernel[...].sum())}\n")


@dataclass(frozen=True)
class ToyRun(TrainerConfig):
    """Train on toy data."""

    steps: int = 24
    log_every: int = 1
    eval_every: int = 10
    save_every: int = 5
    out: str = "runs/toy"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    bad_batch: int = -1
    bad_eval: bool = False
    seconds_per_batch: float = 0.0

    def task(self) -> ToyTask:
        return ToyTask(self.seed, self.bad_batch, self.bad_eval, self.seconds_per_batch)


def train_toy(out: Path, **settings) -> Result:
    """Train in this process; the settings are those of ``ToyRun``."""
    run = ToyRun(out=str(out), **settings)
    trainer = TrainerConfig(**{f.name: getattr(run, f.name) for f in fields(TrainerConfig)})
    return train(run.task(), trainer, run.optimizer, out, {"task": "toy", **asdict(run)})


def outcome(out: Path) -> tuple[bytes, dict[str, bytes]]:
    """What is the same in every repetition of a run, byte for byte: its metrics and its last checkpoint."""
    return (out / "metrics.jsonl").read_bytes(), {name: array.tobytes() for name, array in final_arrays(out).items()}


if "torch" not in sys.modules:  # tensorboardX imports it if it is there, which takes longer than a run
    sys.modules["torch"] = None
    importlib.import_module("manyheads.experiments.training.tensorboard")
    del sys.modules["torch"]

if __name__ == "__main__":
    from manyheads.experiments import cli
    from manyheads.experiments.commands import train as command

    command.RUNS["toy"] = ToyRun
    sys.exit(cli.main(["train", "toy", *sys.argv[1:]]))
