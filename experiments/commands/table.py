"""``manyheads table``: write the table of the corpus into WORKSPACE.md, or check that it is up to date."""

import sys
from dataclasses import dataclass

from manyheads.experiments.arguments import parse
from manyheads.experiments.record import write_text
from manyheads.experiments.table import WORKSPACE, render, splice

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads table``."""

    check: bool = False
    """Write nothing; exit with code 1 if the table in the file is out of date."""


def run(argv: list[str]) -> int:
    """Write the table, or check it."""
    description = "Write the table of the corpus, generated from the claims and their records, into WORKSPACE.md."
    arguments = parse(Arguments, argv, prog="manyheads table", description=description)
    document = WORKSPACE.read_text(encoding="utf-8")
    current = splice(document, render())
    if arguments.check:
        if document != current:
            print(f"{WORKSPACE} is out of date: run manyheads table", file=sys.stderr)
        return int(document != current)
    if document != current:
        write_text(WORKSPACE, current)
    return 0
