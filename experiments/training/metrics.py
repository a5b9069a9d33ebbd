"""Metrics of a run: a JSONL file that a resumed run continues exactly, TensorBoard, and a plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.experiments.record import write_text

__all__ = ["Metrics", "plot_losses", "read_metrics"]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut off in the middle is left out."""
    file = out / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


class Metrics:
    """Writes the metrics of a run.

    ``metrics.jsonl`` holds what is the same in every repetition of the run, and no times: a run that was killed and resumed
    ends with the same bytes as one that was not. Speeds go to TensorBoard.

    Args:
      out: folder of the run.
      step: the step that the run continues from; later lines are cut off.
    """

    def __init__(self, out: Path, step: int):
        from tensorboardX import SummaryWriter

        self.file = out / "metrics.jsonl"
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = self.file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` (finite numbers) at ``step`` in both places."""
        self._stream.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self.show(step, values)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` in TensorBoard alone: what depends on the machine."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring all lines to the disk; OSError if there is no room."""
        self._stream.flush()

    def close(self) -> None:
        """Bring all lines to the disk and close the files."""
        self._stream.close()
        self._board.close()


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
            axes.plot(*zip(*points), label=label, **style)
            axes.annotate(f"{points[-1][1]:.3f}", points[-1], xytext=(4, 0), textcoords="offset points", fontsize=8)
    axes.set(xlabel="step", ylabel="loss (nats)", title=out.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)
