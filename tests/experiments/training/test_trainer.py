import errno
import fcntl
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import grain
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from toy_training import ToyRun, ToyTask, outcome, train_toy

from manyheads.experiments.benchmarks.kill_resume import final_arrays
from manyheads.experiments.training.metrics import read_metrics
from manyheads.experiments.training.optimizer import OptimizerConfig
from manyheads.experiments.training.trainer import TrainerConfig, TrainingError, load_description, restore_model

STEPS = ToyRun.steps


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def train_until_stopped(monkeypatch):
    """Trains for so many steps, until SIGTERM comes; returns the step that the run has reached."""

    def train(out: Path, steps: int, **settings) -> int:
        left = iter(range(steps - 1, -1, -1))

        def tokens(task: ToyTask, batch: dict) -> int:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return 1

        with monkeypatch.context() as patch:
            patch.setattr(ToyTask, "tokens", tokens)
            result = train_toy(out, **settings)
        assert not result.finished
        return result.step

    return train


def test_every_step_is_recorded_once(undisturbed):
    lines = read_metrics(undisturbed)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20, STEPS]
    assert all(line.keys() == {"step", "loss", "largest_error", "grad_norm", "learning_rate"} for line in trained)
    assert trained[5]["learning_rate"] == pytest.approx(5 / 20 * OptimizerConfig().learning_rate)


def test_files_of_a_finished_run(undisturbed):
    lines = read_metrics(undisturbed)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary == {"seed": 0, **lines[-2], **lines[-1]}
    assert matplotlib.image.imread(undisturbed / "loss.png").ndim == 3
    assert float((undisturbed / "kernel.txt").read_text()) == pytest.approx(
        final_arrays(undisturbed)["params.kernel.value"].sum(), rel=1e-5
    )
    assert load_description(undisturbed)["optimizer"]["learning_rate"] == OptimizerConfig().learning_rate
    assert [path.name for path in (undisturbed / "tensorboard").iterdir()]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, undisturbed):
    train_toy(tmp_path / "again")
    train_toy(tmp_path / "other", seed=1)
    assert outcome(tmp_path / "again") == outcome(undisturbed)
    assert outcome(tmp_path / "other")[0] != outcome(undisturbed)[0]


def test_how_often_one_looks_and_saves_changes_nothing(tmp_path, undisturbed, rng):
    log, save, keep = (int(rng.integers(low, 30)) for low in (1, 1, 2))
    train_toy(tmp_path / "run", log_every=log, save_every=save, keep=keep)
    assert outcome(tmp_path / "run") == outcome(undisturbed), (log, save, keep)


def test_a_stop_saves_and_the_same_command_continues(tmp_path, undisturbed, train_until_stopped, rng, said):
    one, two = sorted(int(step) for step in rng.choice(np.arange(1, STEPS), 2, replace=False))
    assert train_until_stopped(tmp_path, one, log_every=7) == one
    assert said == [f"stopped at step {one} of {STEPS} and saved; the same command continues"]
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == list(range(1, one + 1))
    assert train_until_stopped(tmp_path, two - one, log_every=5, save_every=3) == two
    assert said[1] == f"continuing {tmp_path} from step {one}"
    assert train_toy(tmp_path).finished
    assert outcome(tmp_path) == outcome(undisturbed)


def test_finished_run_says_so_and_stays(tmp_path, undisturbed, said):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = tree(tmp_path)
    result = train_toy(tmp_path / "run")
    assert said == [f"{tmp_path}/run is finished: {STEPS} steps"]
    assert (result.step, result.finished) == (STEPS, True)
    assert result.metrics == {k: v for k, v in read_metrics(undisturbed)[-1].items() if k != "step"}
    assert {name for name, data in tree(tmp_path).items() if before.get(name) != data} <= {
        f"{tmp_path}/run/config.json"
    }


def test_what_a_finished_run_shows_is_made_again_if_it_is_missing(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    for name in ("summary.json", "loss.png", "kernel.txt"):
        (tmp_path / "run" / name).unlink()
    train_toy(tmp_path / "run")
    for name in ("summary.json", "loss.png", "kernel.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()


def test_lines_after_the_checkpoint_are_cut_off(tmp_path, undisturbed, train_until_stopped):
    step = train_until_stopped(tmp_path, 12)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 13, "loss": 1.0}\n{"step": 14, "lo')
    train_toy(tmp_path)
    assert step == 12 and outcome(tmp_path) == outcome(undisturbed)


def test_damaged_checkpoint_is_passed_over(tmp_path, undisturbed, rng, said):
    for damaged in ("note/metadata", "arrays/manifest.ocdbt"):
        out = tmp_path / damaged.split("/")[0]
        shutil.copytree(undisturbed, out)
        file = out / "checkpoints" / str(STEPS) / damaged
        rest = file.read_bytes()[: rng.integers(file.stat().st_size)]
        file.write_bytes(rest)
        said.clear()
        assert train_toy(out).finished
        assert said[0].startswith(f"checkpoint of step {STEPS} is damaged (") and said[0].endswith(
            "using that of step 20"
        )
        assert said[1:] == [
            f"continuing {out} from step 20",
            f"moved the damaged checkpoint of step {STEPS} to {out}/damaged/{STEPS}",
        ]
        assert (out / "damaged" / str(STEPS) / damaged).read_bytes() == rest
        assert outcome(out) == outcome(undisturbed)


def test_nothing_is_touched_if_all_checkpoints_are_damaged(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    for step in (20, STEPS):
        (tmp_path / f"run/checkpoints/{step}/note/metadata").unlink()
    before = {**tree(tmp_path), f"{tmp_path}/run/.lock": b""}
    with pytest.raises(ValueError, match="none of the 2 checkpoints can be read") as caught:
        train_toy(tmp_path / "run")
    assert "\n" not in str(caught.value) and tree(tmp_path) == before


@pytest.mark.parametrize("log_every", [1, 6, 50])
def test_nan_names_step_and_batch_and_leaves_the_last_good_checkpoint(tmp_path, rng, log_every):
    batch = int(rng.integers(5, STEPS))
    settings = {"bad_batch": batch, "log_every": log_every}
    good = batch - batch % 5
    for _ in range(2):  # the same again when it is tried again
        with pytest.raises(TrainingError) as caught:
            train_toy(tmp_path, **settings)
        assert str(caught.value) == (
            f"step {batch + 1}: grad_norm=nan, largest_error=nan, loss=nan on batch {batch} (seed 0); "
            f"the last good checkpoint is that of step {good}"
        )
        assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == good
        assert all(np.isfinite(array).all() for array in final_arrays(tmp_path).values())
        lines = read_metrics(tmp_path)
        assert lines[-1]["step"] == batch and all(math.isfinite(value) for line in lines for value in line.values())


def test_nan_before_the_first_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"^step 1: .*on batch 0 \(seed 0\); there is no checkpoint yet$"):
        train_toy(tmp_path, bad_batch=0)


def test_nan_on_held_out_data(tmp_path):
    with pytest.raises(TrainingError, match=r"^step 10: .*eval_loss=nan on held-out data; .* is that of step 5$"):
        train_toy(tmp_path, bad_eval=True)


def test_parameters_that_overflow_are_not_saved(tmp_path):
    """All metrics of the first step are finite; what comes of them is not."""
    huge = OptimizerConfig(learning_rate=3e38, warmup_steps=0, weight_decay=3e38)
    message = r"^step 1: params\.\w+\.value is not finite, so no checkpoint was written; there is no checkpoint yet$"
    with pytest.raises(TrainingError, match=message):
        train_toy(tmp_path, steps=2, eval_every=2, save_every=1, optimizer=huge)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 30}, "steps=24, not 30"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"eval_every": 5}, "eval_every=10, not 5"),
        ({"optimizer": OptimizerConfig(b1=0.5)}, "optimizer.b1=0.9, not 0.5"),
    ],
)
def test_other_settings_are_named_and_nothing_is_touched(undisturbed, settings, message):
    before = tree(undisturbed)
    with pytest.raises(ValueError) as caught:
        train_toy(undisturbed, **settings)
    assert str(caught.value) == (
        f"out={str(undisturbed)!r} holds a run with {message}: "
        "continue it with its own settings, or choose another folder"
    )
    assert tree(undisturbed) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, r"^optimizer\.learning_rate=inf must be finite$"),
        ({"seconds_per_batch": float("nan")}, "^seconds_per_batch=nan must be finite$"),
    ],
)
def test_settings_that_are_not_finite_leave_no_folder(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train_toy(tmp_path / "a/run", **settings)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["train_data", "eval_data"])
def test_data_that_do_not_fit_the_model_leave_no_folder(tmp_path, name, monkeypatch):
    batch = {"x": np.zeros((4, 3), np.float32), "y": np.zeros((4, 3), np.float32)}
    monkeypatch.setattr(ToyTask, name, lambda task: grain.MapDataset.source([batch]))
    with pytest.raises(TypeError):
        train_toy(tmp_path / "a/run")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("field", ["steps", "log_every", "eval_every", "save_every", "keep", "seed"])
def test_wrong_setting_is_named_with_its_value(field):
    wrong = {"keep": 1, "seed": -1}.get(field, 0)
    with pytest.raises(ValueError, match=f"^{field}={wrong} must"):
        TrainerConfig(**{field: wrong})


def test_two_processes_cannot_share_a_folder(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    with (tmp_path / "run/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=rf"^out='{tmp_path}/run': another process is training here$"):
            train_toy(tmp_path / "run")
        assert tree(tmp_path) == before
    assert train_toy(tmp_path / "run").finished


def test_checkpoints_of_an_unknown_run_are_left_alone(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, but config\.json is missing"):
        train_toy(tmp_path / "run")


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_out_that_is_no_folder(tmp_path, where):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match=rf"^out='{tmp_path}/{where}': .*; there is no checkpoint yet$"):
        train_toy(tmp_path / where)
    assert (tmp_path / "file").read_text() == "precious"


def test_out_that_cannot_be_written_any_more(undisturbed, train_until_stopped, small_disk):
    out, remount = small_disk(megabytes=8)
    step = train_until_stopped(out, 7)
    remount("ro")
    before = tree(out)
    with pytest.raises(OSError, match=rf"Read-only file system.*; the last good checkpoint is that of step {step}$"):
        train_toy(out)
    assert tree(out) == before
    remount("rw")
    assert train_toy(out).finished and outcome(out) == outcome(undisturbed)


def test_disk_that_is_full_at_the_end(tmp_path, undisturbed, monkeypatch):
    """The plot finds no room; all that was trained is there, and the same command makes the plot."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=f"No space.* checkpoint is that of step {STEPS}$"),
    ):
        patch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=full))
        train_toy(tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed) and not (tmp_path / "summary.json").exists()
    assert train_toy(tmp_path).finished
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "summary.json").exists()


def test_a_run_in_another_thread(tmp_path, undisturbed):
    thread = threading.Thread(target=train_toy, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_restored_model_has_the_trained_parameters(tmp_path, undisturbed):
    model = restore_model(undisturbed, ToyTask().init_model(nnx.Rngs(1)))
    saved = final_arrays(undisturbed)
    np.testing.assert_array_equal(model.kernel[...], saved["params.kernel.value"])
    np.testing.assert_array_equal(model.bias[...], saved["params.bias.value"])
    with pytest.raises(ValueError, match="no checkpoint here"):
        restore_model(tmp_path, model)


def test_description_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"no run here, config\.json is missing"):
        load_description(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        train_toy(tmp_path)
