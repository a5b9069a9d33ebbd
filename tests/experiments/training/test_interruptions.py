"""What kills a process, stops it or takes its disk away, done to real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import toy_training
from toy_training import ToyRun, outcome, train_toy

from manyheads.experiments.benchmarks.kill_resume import kill_and_resume
from manyheads.experiments.training.metrics import read_metrics

COMMAND = [sys.executable, toy_training.__file__]


def start(out: Path, **settings) -> subprocess.Popen:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [*COMMAND, *options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    while process.poll() is None and max((line["step"] for line in read_metrics(out)), default=0) < step:
        time.sleep(0.01)


def test_killed_run_ends_like_an_undisturbed_one(tmp_path, rng):
    figures = kill_and_resume([*COMMAND, "--save-every", "2"], tmp_path, kills=3, rng=rng)
    assert sum(figures["killed_in"].values()) == figures["kills"] == 3
    assert figures["arrays"] == 8 and figures["arrays_identical"] and figures["metrics_identical"], figures


def test_sigterm_saves_and_ends_within_seconds(tmp_path, undisturbed, rng):
    out = tmp_path / "run"
    process = start(out, seconds_per_batch=0.1, save_every=1000)
    wait_for_step(process, out, int(rng.integers(1, 15)))
    signalled = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0 and time.monotonic() - signalled < 10
    step = read_metrics(out)[-1]["step"]
    assert err.splitlines()[-1] == f"stopped at step {step} of {ToyRun.steps} and saved; the same command continues"
    assert "Traceback" not in err and (out / "checkpoints" / str(step)).is_dir()
    train_toy(out, seconds_per_batch=0.1, save_every=1000)
    assert outcome(out) == outcome(undisturbed)


def test_disk_that_fills_up_with_checkpoints(undisturbed, small_disk):
    """There is room for a few checkpoints, but not for all."""
    out, remount = small_disk(megabytes=1.25)
    process = start(out, save_every=2, keep=100)
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    errors = [line for line in err.splitlines() if not line.startswith("step ")]
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert len(errors) == 1 and errors[0].startswith(
        f"manyheads: error: out='{out}': no checkpoint of step {saved + 2} "
    )
    assert "No space left on device" in errors[0]
    assert errors[0].endswith(f"; the last good checkpoint is that of step {saved}")
    remount("size=8m")
    assert train_toy(out).finished and outcome(out) == outcome(undisturbed)


def test_disk_that_fills_up_with_metrics(tmp_path, small_disk):
    settings = {"steps": 100, "save_every": 1000}
    out, remount = small_disk(megabytes=1)
    filler = out.parent / "filler"
    filler.write_bytes(bytes(2**20 - 5 * 4096))
    process = start(out, **settings)
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    errors = [line for line in err.splitlines() if not line.startswith("step ")]
    assert errors == [f"manyheads: error: out='{out}': [Errno 28] No space left on device; there is no checkpoint yet"]
    filler.unlink()
    remount("size=8m")
    train_toy(tmp_path / "undisturbed", **settings)
    assert train_toy(out, **settings).finished and outcome(out) == outcome(tmp_path / "undisturbed")
