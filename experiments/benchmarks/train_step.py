"""How much of a training step of the tiny decoder is host code: whatever is not the compiled step itself."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from manyheads.architectures.language.presets import tiny
from manyheads.experiments.benchmarks.harness import Benchmark
from manyheads.experiments.data.text import TextData
from manyheads.experiments.tasks.language_model import TextTask
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.trainer import TrainerConfig, make_update, train


class _Quiet(TextTask):
    """The task without the sample at its end."""

    def finish(self, model: nnx.Module, out: Path) -> None:
        """Nothing to show."""


def run(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time runs of the training loop, whose difference in length leaves the steps, and the compiled step alone, in turns.

    The loop reads its data, records its metrics and shows its progress as always; evaluation and checkpoints come once, at
    the end, and cancel.
    """
    short, long, turns = (10, 30, 1) if quick else (50, 350, 3)
    task = _Quiet(tiny(), TextData(validation_tokens=4096), seed=0)
    optimizer = OptimizerConfig()
    batch = task.train_data()[0]

    def loop(steps: int) -> float:
        config = TrainerConfig(steps=steps, eval_every=steps, save_every=steps)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            train(task, config, optimizer, Path(folder), {})
            return time.perf_counter() - start

    def compiled(steps: int) -> float:
        state, update = make_update(task, task.init_model(nnx.Rngs(0)), optimizer, steps)
        update = jax.jit(update, donate_argnums=0)
        state, _ = update(state, np.int32(0), batch)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for step in range(1, steps):
            state, values = update(state, np.int32(step), batch)
        jax.block_until_ready((state, values))
        return (time.perf_counter() - start) / (steps - 1)

    loop(short)  # compiles, and fills the persistent cache if there is one
    whole, bare = [], []
    for turn in range(turns):
        progress(f"turn {turn + 1} of {turns}")
        whole.append((loop(long) - loop(short)) / (long - short))
        bare.append(compiled(long))
    share = max(0.0, 1 - min(bare) / min(whole))
    return {
        "host_share": round(share, 4),
        "step_seconds": round(min(whole), 6),
        "compiled_seconds": round(min(bare), 6),
        "headline": f"{100 * share:.1f}% of a training step of the tiny decoder is host code",
    }


BENCHMARK = Benchmark("train_step", "host code in a training step of the tiny decoder", run)
