import io
import os
import pty
import sys

import pytest

from manyheads.experiments.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds to it."""
    now = [1000.0]
    monkeypatch.setattr("manyheads.experiments.training.progress.time.monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_lines_come_now_and_then_when_nobody_watches(clock, capsys):
    with Progress(100, 20) as progress:
        for step in range(21, 61):
            progress.advance(step, tokens=50)
            clock(1.0)
            progress.show(loss=step / 10)
    lines = capsys.readouterr().err.splitlines()
    # Step 21 compiles: its tokens do not count.
    assert lines[0] == "step 31/100  loss 3.100  45 tokens/s  76 s left"
    assert [line.split()[1] for line in lines] == ["31/100", "42/100", "53/100"]


def test_speed_leaves_out_the_step_that_compiles(clock):
    with Progress(10, 0) as progress:
        clock(60)
        progress.advance(1, tokens=100)
        for step in (2, 3, 4):
            clock(2)
            progress.advance(step, tokens=100)
        assert progress.tokens_per_second == 50


def test_notes_stay(capsys):
    with Progress(10, 0) as progress:
        progress.note("step 5: eval_loss 1.25")
    assert capsys.readouterr().err == "step 5: eval_loss 1.25\n"


def test_terminal_gets_a_bar(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        with Progress(10, 0) as progress:
            for step in range(1, 6):
                progress.advance(step, tokens=100)
            progress.show(loss=2.5)
            progress.note("step 5: eval_loss 1.25")
        text = os.read(reader, 2**16).decode()
    os.close(reader)
    assert "5/10" in text and "loss 2.500" in text and "tokens/s" in text and "step 5: eval_loss 1.25\r\n" in text


def test_nothing_is_drawn_where_nobody_watches(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10, 0) as progress:
        progress.advance(1, tokens=1)
    assert stream.getvalue() == ""
