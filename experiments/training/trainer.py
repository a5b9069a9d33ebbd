"""The training loop: resumes bit for bit after a kill at any moment, and says clearly why it stops.

Everything in a run is a function of its description and its step, so a run that is stopped and started again ends with the
same parameters and the same ``metrics.jsonl`` as one that ran through. The folder of a run holds ``config.json``,
``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end, ``loss.png``, ``summary.json`` and what the task
shows.
"""

import contextlib
import fcntl
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx

from manyheads.experiments.record import write_json
from manyheads.experiments.training.checkpoint import Checkpoints, named_leaves, with_leaves
from manyheads.experiments.training.metrics import Metrics, plot_losses, read_metrics
from manyheads.experiments.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from manyheads.experiments.training.progress import Progress
from manyheads.experiments.training.signals import stop_signals
from manyheads.experiments.training.task import Task

__all__ = ["Result", "TrainerConfig", "TrainingError", "load_description", "make_update", "restore_model", "train"]

logger = logging.getLogger("manyheads")


class TrainingError(ValueError):
    """Training cannot go on: a metric or a parameter is not finite."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of the loop.

    Attributes:
      steps: length of the run.
      seed: of the initial parameters and of the order of the data.
      log_every: steps between two looks at the losses; every step is recorded all the same.
      eval_every: steps between two evaluations on held-out data; the last step is evaluated too.
      save_every: steps between two checkpoints; the last step is saved too.
      keep: checkpoints to keep.
    """

    steps: int = 300
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2

    def __post_init__(self):
        for field in ("steps", "log_every", "eval_every", "save_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.keep < 2:
            raise ValueError(f"keep={self.keep} must be at least 2: one is left if the newest checkpoint is damaged")


# Settings that a resumed run may change: they do not change its result.
FREE = ("log_every", "save_every", "keep", "out")


@dataclass(frozen=True)
class Result:
    """How a run ended: the step it reached, whether that is the last, and its last held-out metrics."""

    step: int
    finished: bool
    metrics: Mapping[str, float]


def train(
    task: Task, config: TrainerConfig, optimizer: OptimizerConfig, out: Path, description: Mapping[str, Any]
) -> Result:
    """Train, or go on from the newest whole checkpoint in ``out``.

    Args:
      task: model, data and loss.
      config: the loop.
      optimizer: the optimizer.
      out: folder of the run.
      description: all settings, as JSON; a resumed run must have the same.

    Returns:
      How far it came: SIGTERM or an interrupt saves and ends early.

    Raises:
      TrainingError: a metric or a parameter is not finite; the last checkpoint is good.
      ValueError: ``description`` is not that of the run in ``out``, or no checkpoint can be read.
      OSError: ``out`` cannot be written; what was saved is untouched.
    """
    out = Path(out)
    description = json.loads(json.dumps(description))
    _check_same_run(out, description)
    loop = _Loop(task, config, optimizer, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone_in(out), stop_signals() as stopping:
            loop.restore()
            write_json(out / "config.json", description)
            loop.run(stopping)
            if loop.finished and not (out / "summary.json").exists():
                loop.finish()
        if not loop.finished:
            logger.warning("stopped at step %d of %d and saved; the same command continues", loop.step, config.steps)
    except OSError as error:
        raise OSError(f"out={str(out)!r}: {error}; {loop.saved}") from error
    evals = [line for line in read_metrics(out) if "eval_loss" in line]
    return Result(loop.step, loop.finished, {k: v for k, v in (evals[-1] if evals else {}).items() if k != "step"})


def load_description(out: Path) -> dict[str, Any]:
    """The settings of the run in ``out``; ValueError if there is no run."""
    try:
        return json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{out}: no run here, config.json is missing") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{out}: config.json is damaged ({error})") from None


def restore_model(out: Path, model: nnx.Module) -> nnx.Module:
    """``model`` with the parameters of the newest whole checkpoint of the run in ``out``."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    found = Checkpoints(Path(out) / "checkpoints").restore(named_leaves({"params": params}))
    if found is None:
        raise ValueError(f"{out}: no checkpoint here")
    return nnx.merge(graph, with_leaves({"params": params}, found[1])["params"], rest)


def _check_same_run(out: Path, description: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that are not finite, and if ``out`` holds a run with others."""
    now = _flatten(description)
    for field, value in now.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field}={value} must be finite")
    if not (out / "config.json").is_file():
        if Checkpoints(out / "checkpoints").steps():
            raise ValueError(f"out={str(out)!r} holds checkpoints, but config.json is missing: choose another folder")
        return
    before = _flatten(load_description(out))
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field) and field not in FREE:
            raise ValueError(
                f"out={str(out)!r} holds a run with {field}={before.get(field)!r}, not {now.get(field)!r}: "
                "continue it with its own settings, or choose another folder"
            )


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; ValueError if another process has it. It goes with the process that holds it."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out={str(out)!r}: another process is training here") from None
        yield


def make_update(
    task: Task, model: nnx.Module, config: OptimizerConfig, steps: int
) -> tuple[dict[str, Any], Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]]:
    """The first state of a run, and ``update(state, step, batch) -> (state, metrics)``, pure, to be jitted.

    The state holds the ``nnx.Param`` of the model under "params", and the optimizer's under "optimizer".
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    transform, rate = make_optimizer(config, steps), learning_rate(config, steps)

    def loss(params: nnx.State, batch: Any) -> Any:
        return task.loss(nnx.merge(graph, params, rest), batch)

    def update(state: dict[str, Any], step: jax.Array, batch: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch)
        updates, optimizer = transform.update(grads, state["optimizer"], state["params"])
        values = {"loss": value, **extra, "grad_norm": optax.tree.norm(grads), "learning_rate": rate(step)}
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, values

    return {"params": params, "optimizer": transform.init(params)}, update


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}


class _Loop:
    """The state of a run, and its steps."""

    def __init__(self, task: Task, config: TrainerConfig, optimizer: OptimizerConfig, out: Path):
        self.task, self.config, self.out = task, config, out
        self.checkpoints = Checkpoints(out / "checkpoints", config.keep)
        model = task.init_model(nnx.Rngs(config.seed))
        self.graph, params, self.rest = nnx.split(model, nnx.Param, ...)
        self.state, update = make_update(task, model, optimizer, config.steps)
        self.step = 0
        data, self.held_out = task.train_data(), task.eval_data()
        self.batches = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []

        def evaluate(params: nnx.State, batch: Any) -> dict[str, jax.Array]:
            value, extra = task.loss(nnx.merge(self.graph, params, self.rest), batch)
            return {"eval_loss": value, **{f"eval_{name}": number for name, number in extra.items()}}

        self._update = jax.jit(update, donate_argnums=0)
        self._evaluate = jax.jit(evaluate)
        # Settings that do not fit together are found here, before anything is written.
        jax.eval_shape(self._update, self.state, np.int32(0), data[0])
        jax.eval_shape(self._evaluate, params, self.held_out[0])

    def restore(self) -> None:
        """Go to the newest whole checkpoint, if there is one."""
        found = self.checkpoints.restore(named_leaves(self.state))
        if found is not None:
            self.step, arrays, note = found
            self.state = with_leaves(self.state, arrays)
            self.batches.set_state(note["data"])

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.steps

    @property
    def saved(self) -> str:
        """What a run that cannot go on leaves."""
        last = self.checkpoints.last or max(self.checkpoints.steps(), default=None)
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is that of step {last}"

    def run(self, stopping: Callable[[], bool]) -> None:
        """Take the steps that are left, until the end or until ``stopping()``."""
        if self.finished:
            logger.warning("%s is finished: %d steps", self.out, self.step)
            return
        if self.step:
            logger.warning("continuing %s from step %d", self.out, self.step)
        config = self.config
        due = lambda every: self.step % every == 0 or self.finished
        with Metrics(self.out, self.step) as self.metrics, Progress(config.steps, self.step) as self.progress:
            while not self.finished:
                self._one_step()
                stop = stopping()
                if due(config.log_every) or due(config.eval_every) or due(config.save_every) or stop:
                    self._look()
                if due(config.eval_every):
                    self._hold_out()
                if due(config.save_every) or stop:
                    self._save()
                if stop:
                    break

    def finish(self) -> None:
        """Write plot, summary and what the task shows."""
        plot_losses(self.out)
        self.task.finish(nnx.merge(self.graph, self.state["params"], self.rest), self.out)
        lines = read_metrics(self.out)
        last: dict[str, Any] = {}
        for line in lines:
            last.update(line)
        write_json(self.out / "summary.json", {"seed": self.config.seed, **last})

    def _one_step(self) -> None:
        batch = next(self.batches)
        self.state, values = self._update(self.state, np.int32(self.step), batch)
        self.step += 1
        self.pending.append((self.step, values))
        if len(self.pending) > 2:
            jax.block_until_ready(self.pending[-3][1])  # steps that wait for the device would delay a stop
        self.progress.advance(self.step, self.task.tokens(batch))

    def _look(self) -> None:
        """Fetch, check and record the metrics of the steps since the last look."""
        for step, values in jax.device_get(self.pending):
            numbers = {name: float(value) for name, value in values.items()}
            self._record(step, numbers, f"on batch {step - 1} (seed {self.config.seed})")
        if self.pending:
            self.progress.show(numbers["loss"])
            self.metrics.show(self.step, {"tokens_per_second": self.progress.tokens_per_second})
        self.pending = []
        self.metrics.flush()

    def _hold_out(self) -> None:
        values = jax.device_get([self._evaluate(self.state["params"], batch) for batch in self.held_out])
        means = jax.tree.map(lambda *numbers: float(np.mean(numbers)), *values)
        self._record(self.step, means, "on held-out data")
        self.metrics.flush()
        self.progress.note(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))

    def _record(self, step: int, numbers: Mapping[str, float], where: str) -> None:
        bad = [f"{name}={number}" for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            raise TrainingError(f"step {step}: {', '.join(bad)} {where}; {self.saved}")
        self.metrics.write(step, numbers)

    def _save(self) -> None:
        self.metrics.sync()
        try:
            self.checkpoints.save(self.step, named_leaves(self.state), {"data": self.batches.get_state()})
        except ValueError as error:
            raise TrainingError(f"{error}; {self.saved}") from None
