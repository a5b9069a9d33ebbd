import contextlib
import os
import pty
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from manyheads.experiments import cli
from manyheads.experiments.arguments import parse
from manyheads.experiments.papers import find_paper, load_papers

MAIN = [sys.executable, "-m", "manyheads.experiments.cli"]


@dataclass(frozen=True)
class Model:
    mixers: tuple[str, ...] = ("softmax",)
    d_model: int = 64
    norm: Literal["rms", "layer"] = "rms"

    def __post_init__(self):
        if self.d_model % 2:
            raise ValueError(
                f"d_model must be even so that rotary positions have pairs of features to turn, got {self.d_model}"
            )


@dataclass(frozen=True)
class Config:
    out: Path
    model: Model = Model()
    steps: int = 10
    resume: bool = True
    learning_rate: float | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


def parse_config(*argv: str, **options) -> Config:
    return parse(Config, list(argv), prog="test", description="A test.", **options)


def test_values_reach_their_fields():
    config = parse_config(
        *("--out", "x", "--model.d_model=32", "--no-resume", "--learning_rate", "-1e-3"),
        *("--model.mixers", "softmax(window=64, sinks=True)", "lightning"),
    )
    model = Model(mixers=("softmax(window=64, sinks=True)", "lightning"), d_model=32)
    assert config == Config(out=Path("x"), model=model, resume=False, learning_rate=-1e-3)
    assert parse_config("--model.d-model", "32", "--out", "x").model.d_model == 32


def test_default_replaces_what_the_class_declares():
    default = Config(out=Path("y"), model=Model(norm="layer"), steps=3)
    assert parse_config("--steps", "5", default=default) == Config(out=Path("y"), model=Model(norm="layer"), steps=5)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--out", "x", "--steps", "abc"], "--steps takes int, got 'abc'"),
        (["--out", "x", "--steps=1.5"], "--steps takes int, got '1.5'"),
        (["--out", "x", "--model.d_model"], "--model.d-model takes int, got nothing"),
        (["--out", "x", "--learning_rate", "fast"], "--learning-rate takes float | None, got 'fast'"),
        (["--out", "x", "--model.norm", "rns"], "unknown --model.norm 'rns'. Did you mean 'rms'? Allowed: layer, rms"),
        (["--steps", "3"], "--out is missing: it takes Path and has no default"),
        (["--out", "x", "--resume", "False"], "--resume takes no value, got 'False'"),
        (["--out", "x", "y"], "unexpected argument 'y': a field is set by its name, as in --name value"),
        (["--out", "x", "--steps", "0"], "steps must be positive, got 0"),
        (
            ["--out", "x", "--model.d_model", "7"],
            "d_model must be even so that rotary positions have pairs of features to turn, got 7",
        ),
    ],
)
@pytest.mark.parametrize("columns", ["15", "80"])  # tyro wraps its message at the width of the terminal
def test_mistake_is_one_exact_line(argv, expected, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(ValueError) as caught:
        parse_config(*argv)
    assert str(caught.value) == expected
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "wrong, nearest",
    [("--model.mixer", "--model.mixers"), ("--stepps", "--steps"), ("--modl.d_model", "--model.d-model")],
)
def test_unknown_field_names_the_nearest_and_all(wrong, nearest):
    with pytest.raises(ValueError, match=f"unknown field .* Did you mean '{nearest}'\\? Allowed: .*--out") as caught:
        parse_config("--out", "x", wrong, "3")
    assert "\n" not in str(caught.value)


def test_help_is_printed_on_stdout(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config("--help")
    assert not stop.value.code
    assert "--model.mixers" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and help in text for name, (_, help) in cli.COMMANDS.items())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("manyheads 0.")


def test_unknown_command_is_one_line(capsys):
    assert cli.main(["trian"]) == 2
    expected = f"unknown command 'trian'. Did you mean 'train'? Allowed: {', '.join(sorted(cli.COMMANDS))}"
    assert capsys.readouterr() == ("", f"manyheads: error: {expected}\n")


@pytest.fixture
def command(monkeypatch):
    """Registers a command that runs the function it is given."""

    def register(function):
        module = types.ModuleType("fake_command")
        module.run = function
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "a test"))

    return register


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "[Errno 2] No such file or directory: 'a.txt'"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_a_command_are_one_line(error, message, command, capsys, monkeypatch):
    monkeypatch.delenv("MANYHEADS_DEBUG", raising=False)
    command(lambda argv: _raise(error))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == f"manyheads: error: {message}\n"


def test_debug_shows_the_traceback(command, capsys, monkeypatch):
    monkeypatch.setenv("MANYHEADS_DEBUG", "1")
    command(lambda argv: _raise(ValueError("the reason")))
    assert cli.main(["fake"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.endswith("ValueError: the reason\n")


def test_exit_codes_and_arguments_pass_through(command):
    seen = []
    command(lambda argv: seen.append(argv) or 7)
    assert cli.main(["fake", "a", "--b"]) == 7
    assert seen == [["a", "--b"]]
    command(lambda argv: _raise(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    command(lambda argv: _raise(TypeError("a bug is no mistake of the user")))
    with pytest.raises(TypeError):
        cli.main(["fake"])


def test_papers_start_without_jax():
    program = (
        "import sys; from manyheads.experiments.cli import main; "
        "assert main(['list', 'papers']) == main(['--help']) == 0; assert 'jax' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run([*MAIN, "list", "papers"], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_terminal_gets_a_drawn_table():
    reader, writer = pty.openpty()
    with subprocess.Popen([*MAIN, "list", "papers"], stdout=writer, env={**os.environ, "COLUMNS": "200"}) as process:
        os.close(writer)
        text = b""
        with contextlib.suppress(OSError):  # EIO, when the other side is closed
            while piece := os.read(reader, 4096):
                text += piece
    os.close(reader)
    assert process.returncode == 0
    assert "Attention as an RNN" in text.decode() and "─" in text.decode() and "\t" not in text.decode()


def test_list_papers(capsys):
    assert cli.main(["list", "papers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["number", "name", "kind", "title", "family"]
    assert [line.split("\t")[0] for line in lines[1:]] == [paper.number for paper in load_papers()]


def test_list_mixers_matches_the_registry(capsys):
    from manyheads.layers.mixer import mixer_names

    assert cli.main(["list", "mixers"]) == 0
    assert tuple(line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]) == mixer_names()


def test_list_of_something_else(capsys):
    assert cli.main(["list", "mixer"]) == 2
    assert "Did you mean 'mixers'?" in capsys.readouterr().err
    assert cli.main(["list"]) == 2
    assert "mixers, architectures, papers" in capsys.readouterr().err


def test_corpus_is_complete():
    papers = load_papers()
    assert sorted(paper.number for paper in papers) == [f"{number:03d}" for number in range(207)]
    assert len({paper.name for paper in papers}) == 207
    assert all(paper.title and paper.kind and paper.family for paper in papers)


@pytest.mark.parametrize("number", ["207", "x", "0039", "-1"])
def test_unknown_paper(number):
    with pytest.raises(ValueError, match=f"unknown paper '{number}'. Allowed: 000 to 206"):
        find_paper(number)


def test_leading_zeros_may_be_left_out():
    assert find_paper("39") is find_paper("039")
    assert find_paper("39").name == "zoology"
