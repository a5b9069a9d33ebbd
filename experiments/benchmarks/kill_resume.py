"""A run that is killed again and again ends like one that is left alone: the same parameters and metrics, bit for bit.

The moments of the kills (SIGKILL, to the whole process group) are drawn evenly over the life of an undisturbed run: one in
each of as many slices of it as there are kills. So they fall into start-up, steps, evaluations, saves and the end in
proportion to the time that those take. A moment is a size of ``metrics.jsonl``, which is the same in both runs, and a time
after it was reached; sizes grow from kill to kill, so every attempt goes further than the one before.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from manyheads.experiments.benchmarks.harness import Benchmark
from manyheads.experiments.training.checkpoint import Checkpoints

__all__ = ["BENCHMARK", "final_arrays", "kill_and_resume"]

# Small, with a save after every second step: most of the time after start-up is spent in saves.
COMMAND = (
    *(sys.executable, "-m", "manyheads.experiments.cli", "train", "mqar"),
    *("--steps", "240", "--log-every", "1", "--save-every", "2", "--eval-every", "20"),
    *("--model.d-model", "32", "--data.length", "32", "--data.pairs", "4", "--data.vocab-size", "64"),
    *("--data.train-examples", "2000", "--data.test-examples", "512", "--data.batch-size", "64"),
)


def final_arrays(out: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint of the run in ``out``, by name."""
    checkpoints = Checkpoints(out / "checkpoints")
    folder = checkpoints.folder / str(checkpoints.steps()[-1]) / "arrays"
    with ocp.PyTreeCheckpointer() as reader:
        names = reader.metadata(folder).item_metadata.tree
        plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))


def kill_and_resume(
    command: Sequence[str],
    out: Path,
    kills: int,
    rng: np.random.Generator,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run a training command once undisturbed and once with kills, and compare how they end.

    Args:
      command: trains, and continues, in the folder that is appended to it as ``--out FOLDER``. It should record every step
        as it is done (``--log-every 1``), since that is how its progress is seen.
      out: an empty folder for the runs, ``warm-up``, ``undisturbed`` and ``killed``, and for their compilation cache.
      kills: how many.
      rng: draws their moments.
      progress: is told about every kill.

    Returns:
      ``kills``; ``killed_in``: how many of them fell into what; ``arrays``: how many were compared; ``arrays_identical``
      and ``metrics_identical``.

    Raises:
      RuntimeError: if a run fails by itself; the message ends with what it said.
    """
    _Run(command, out, "warm-up").finish()  # fills the compilation cache, so that start-up takes the same time in all
    undisturbed = _Run(command, out, "undisturbed")
    undisturbed.start()
    start, reached = time.monotonic(), [(0.0, 0)]
    while undisturbed.alive():
        size = undisturbed.size()
        if size > reached[-1][1]:
            reached.append((time.monotonic() - start, size))
        time.sleep(0.001)
    life, final_size = time.monotonic() - start, reached[-1][1]
    startup = reached[1][0]

    killed = _Run(command, out, "killed")
    killed_in = {"startup": 0, "steps": 0, "save": 0, "finish": 0}
    for number, fraction in enumerate((np.arange(kills) + rng.random(kills)) / kills, start=1):
        moment = fraction * life
        at, size = max((point for point in reached if point[0] <= moment), key=lambda point: point[0])
        while not killed.start_and_kill(size, moment - at):
            size, at, moment = 0, 0.0, rng.uniform(0, startup)  # it had ended: kill what finds it finished
        phase = killed.phase(final_size)
        killed_in[phase] += 1
        progress(f"kill {number} of {kills}, in {phase}")
    killed.finish()

    one, two = (final_arrays(run.folder) for run in (undisturbed, killed))
    return {
        "kills": kills,
        "killed_in": killed_in,
        "arrays": len(one),
        "arrays_identical": one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one),
        "metrics_identical": undisturbed.metrics.read_bytes() == killed.metrics.read_bytes(),
    }


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


class _Run:
    """A training command in a process group of its own, and what its folder tells about it."""

    def __init__(self, command: Sequence[str], out: Path, name: str):
        self.folder, self.log = out / name, out / f"{name}.log"
        self.metrics = self.folder / "metrics.jsonl"
        self.command = [*command, "--out", str(self.folder)]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = {**os.environ, **cache}

    def start(self) -> None:
        self.before = self._version(self.metrics)
        self.saves_before = self._saves()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def finish(self) -> None:
        """Start it and wait until it ends."""
        self.start()
        while self.alive():
            time.sleep(0.01)

    def alive(self) -> bool:
        """Whether it still runs; RuntimeError if it has failed."""
        code = self.process.poll()
        if code:
            raise RuntimeError(f"{' '.join(self.command)} ended with code {code}: {self.log.read_text()[-2000:]}")
        return code is None

    def size(self) -> int:
        """Bytes of metrics since it started; 0 before it has taken up its file."""
        version = self._version(self.metrics)
        return version[1] if version != self.before else 0

    def start_and_kill(self, size: int, delay: float) -> bool:
        """Start it and kill it ``delay`` seconds after its metrics have ``size`` bytes; False if it ended before."""
        self.start()
        while self.alive() and self.size() < size:
            time.sleep(0.001)
        deadline = time.monotonic() + delay
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        if not self.alive():
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def phase(self, final_size: int) -> str:
        """What the kill interrupted."""
        if self._saves() - self.saves_before:
            return "save"
        if self._version(self.metrics)[1] == final_size:
            return "finish"
        return "startup" if self._version(self.metrics) == self.before else "steps"

    def _saves(self) -> set[tuple[str, int]]:
        """The checkpoints that are being written, or were when the process was killed."""
        return {(path.name, path.stat().st_ino) for path in self.folder.glob("checkpoints/*.orbax-checkpoint-tmp*")}

    @staticmethod
    def _version(file: Path) -> tuple[int, int]:
        """Which file it is, and its size."""
        return (file.stat().st_ino, file.stat().st_size) if file.exists() else (0, 0)


def run(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Kill a small run 25 times, or twice if ``quick``."""
    kills, seed = (2 if quick else 25), time.time_ns() % 2**32
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_and_resume(COMMAND, Path(folder), kills, np.random.default_rng(seed), progress)
    bit_identical = figures["arrays_identical"] and figures["metrics_identical"]
    in_saves = figures["killed_in"]["save"]
    end = "bit-identical parameters and metrics" if bit_identical else "a DIFFERENT end"
    return {
        "headline": f"{kills} kills, {in_saves} of them inside a save: {end}",
        "seed": seed,
        "bit_identical": bit_identical,
        "share_in_saves": in_saves / kills,
        **figures,
    }


BENCHMARK = Benchmark(
    name="kill_resume",
    description="a run that is killed 25 times at random moments against one that is left alone",
    run=run,
)
