"""The command ``manyheads``: finds the subcommand, and turns what goes wrong into one line and an exit code.

A subcommand is a module with ``run(argv: list[str]) -> int``. It is imported only when it is called, so that the help
and the list of papers come at once.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("manyheads.experiments.commands.train", "train a model on a task"),
    "generate": ("manyheads.experiments.commands.generate", "continue a text with a trained model"),
    "list": ("manyheads.experiments.commands.list", "list the mixers, the architectures or the papers"),
    "claims": ("manyheads.experiments.commands.claims", "measure the claim of a paper, or list all claims"),
    "bench": ("manyheads.experiments.commands.bench", "run a benchmark, or list all benchmarks"),
    "table": ("manyheads.experiments.commands.table", "write the table of the corpus into WORKSPACE.md"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``manyheads`` with the given arguments (default: those of the process) and return its exit code.

    0 is success; 2 a mistake of the user or a failure of the system (ValueError, OSError), told in one line on stderr,
    or as a traceback if MANYHEADS_DEBUG=1; 130 an interrupt; 141 an output that nobody reads any more.
    """
    try:
        with _messages_to_stderr():
            code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its exit
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("MANYHEADS_DEBUG") == "1":
            traceback.print_exc()
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"manyheads: error: {message}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _messages_to_stderr() -> Iterator[None]:
    """What the library has to say to a user goes to stderr as it is, whatever else configures logging."""
    log = logging.getLogger("manyheads")
    log.addHandler(logging.lastResort)  # writes the plain message to what is stderr at that time
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(logging.lastResort)
        log.propagate = True


def _run(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"manyheads {importlib.metadata.version('manyheads')}")
        return 0
    if command not in COMMANDS:
        from manyheads.layers.mixer import unknown_name  # brings jax, which only this mistake needs

        raise unknown_name("command", command, COMMANDS)
    module = importlib.import_module(COMMANDS[command][0])
    try:
        return module.run(rest)
    except SystemExit as stop:  # --help of a command
        return int(stop.code or 0)


def _help() -> str:
    lines = [f"  {name:10}{help}" for name, (_, help) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: manyheads COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            "manyheads COMMAND --help explains a command; manyheads --version prints the version.",
            "MANYHEADS_DEBUG=1 shows the traceback of an error.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
