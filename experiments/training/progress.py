"""Progress of a run on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]


class Progress:
    """Steps done, loss, tokens per second and time left.

    Args:
      steps: length of the run.
      step: steps that are done already.
    """

    SECONDS_BETWEEN_LINES = 10

    def __init__(self, steps: int, step: int):
        self.steps, self.step, self.first = steps, step, step
        self.tokens = 0
        self.console = Console(file=sys.stderr)
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, completed=step, text="compiling")

    def __enter__(self) -> "Progress":
        self.start = self.said = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Mean speed since the first step of this process was done."""
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def advance(self, step: int, tokens: int) -> None:
        """One more step is on its way."""
        if step == self.first + 1:
            self.start = time.monotonic()  # the first step compiles
        else:
            self.tokens += tokens
        self.step = step
        self.bar.update(self.task, completed=step)

    def show(self, loss: float) -> None:
        """The loss of the last step that is known."""
        text = f"loss {loss:.3f}  {self.tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, text=text)
        if not self.console.is_terminal and time.monotonic() - self.said > self.SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            left = (self.steps - self.step) * (self.said - self.start) / max(self.step - self.first - 1, 1)
            print(f"step {self.step}/{self.steps}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.console.is_terminal:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
