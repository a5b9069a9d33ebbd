import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from toy_training import ToyRun, ToyTask, train_toy

from manyheads.experiments.benchmarks.kill_resume import final_arrays
from manyheads.experiments.training.metrics import read_metrics
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.trainer import TrainerConfig, TrainingError, load_description, restore_model

STEPS = ToyRun.steps


def outcome(out: Path) -> tuple[bytes, dict[str, bytes]]:
    """What is the same in every repetition of a run, byte for byte: its metrics and its last checkpoint."""
    return (out / "metrics.jsonl").read_bytes(), {name: array.tobytes() for name, array in final_arrays(out).items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_toy(out).finished
    return out


@pytest.fixture
def train_until(monkeypatch):
    """Trains in a folder until SIGTERM comes in the middle of a step."""

    def train(out: Path, step: int, **settings) -> None:
        left = iter(range(step - 1, -1, -1))

        def tokens(task: ToyTask, batch: dict) -> int:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return 1

        with monkeypatch.context() as patch:
            patch.setattr(ToyTask, "tokens", tokens)
            result = train_toy(out, **settings)
        assert (result.step, result.finished) == (step, False)

    return train


def test_result_is_that_of_the_last_evaluation(undisturbed):
    result = train_toy(undisturbed)
    lines = read_metrics(undisturbed)
    assert (result.step, result.finished) == (STEPS, True)
    assert result.metrics == {name: value for name, value in lines[-1].items() if name != "step"}
    assert result.metrics.keys() == {"eval_loss", "eval_largest_error"}
    assert result.metrics["eval_loss"] < [line["eval_loss"] for line in lines if "eval_loss" in line][0]


def test_every_step_is_recorded_once(undisturbed):
    lines = read_metrics(undisturbed)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20, STEPS]
    assert all(line.keys() == {"step", "loss", "largest_error", "grad_norm", "learning_rate"} for line in trained)
    assert trained[5]["learning_rate"] == pytest.approx(5 / 20 * OptimizerConfig().learning_rate)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, undisturbed):
    train_toy(tmp_path / "again")
    train_toy(tmp_path / "other", seed=1)
    assert outcome(tmp_path / "again") == outcome(undisturbed)
    assert outcome(tmp_path / "other")[0] != outcome(undisturbed)[0]


def test_how_often_one_looks_and_saves_changes_nothing(tmp_path, undisturbed, rng):
    log, save, keep = (int(rng.integers(low, 30)) for low in (1, 1, 2))
    train_toy(tmp_path / "run", log_every=log, save_every=save, keep=keep)
    assert outcome(tmp_path / "run") == outcome(undisturbed), (log, save, keep)


def test_stop_saves_and_the_same_command_continues(tmp_path, undisturbed, train_until, rng, said):
    steps = sorted(int(step) for step in rng.choice(np.arange(1, STEPS), 2, replace=False))
    log_every = int(rng.integers(1, 10))
    train_until(tmp_path, steps[0], log_every=log_every)
    assert said == [f"stopped at step {steps[0]} of {STEPS} and saved; the same command continues"]
    assert len([line for line in read_metrics(tmp_path) if "loss" in line]) == steps[0]
    said.clear()
    train_until_second = steps[1] - steps[0]
    result = train_until_result(train_until, tmp_path, train_until_second, steps[1], log_every)
    assert said[0] == f"continuing {tmp_path} from step {steps[0]}" and result is None
    assert train_toy(tmp_path, log_every=log_every, save_every=3).finished
    assert outcome(tmp_path) == outcome(undisturbed)


def train_until_result(train_until, out, steps, expected, log_every):
    train_until(out, steps, log_every=log_every)
