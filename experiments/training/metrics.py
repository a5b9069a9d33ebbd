"""Metrics of a run: a JSONL file that a resumed run continues exactly, TensorBoard, and a plot."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.experiments.record import write_text

__all__ = ["Metrics", "plot_losses", "read_metrics"]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut off in the middle is left out."""
    file = out / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file}: a line is damaged ({error})") from None


class Metrics:
    """Writes the metrics of a run.

    ``metrics.jsonl`` holds what is the same in every repetition of the run, and no times: a run that was killed and resumed
    ends with the same bytes as one that was not. Speeds go to TensorBoard.

    Args:
      out: folder of the run.
      step: the step that the run continues from; later lines are cut off.

    Raises:
      OSError: from any of the methods, if there is no room.
    """

    def __init__(self, out: Path, step: int):
        from manyheads.experiments.training.tensorboard import EventFile  # its package imports torch if that is there

        kept = [line for line in read_metrics(out) if line["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._board = EventFile(out / "tensorboard", step)
        self._stream = (out / "metrics.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the files. If the run stops because of an error, a full disk does not hide it."""
        with contextlib.ExitStack() as stack:
            if kind is not None:
                stack.enter_context(contextlib.suppress(OSError))
            stack.callback(self._board.close)
            stack.callback(self._stream.close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` (finite numbers) at ``step`` in both places."""
        self._stream.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self.show(step, values)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` in TensorBoard alone: what depends on the machine."""
        self._board.write(step, values)

    def flush(self) -> None:
        """Bring all lines into ``metrics.jsonl``, where they outlive this process."""
        self._stream.flush()

    def sync(self) -> None:
        """Bring everything to the disk, where it outlives the machine's power."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._board.flush()


def plot_losses(out: Path) -> None:
    """Draw the losses of ``metrics.jsonl`` against the step into ``loss.png``."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(out)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training batch", {"lw": 0.8}), ("eval_loss", "held out", {"marker": "o"})):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points), label=f"{label}, {points[-1][1]:.3f} at the end", **style)
    axes.set(xlabel="step", ylabel="loss (nats)", title=out.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)
