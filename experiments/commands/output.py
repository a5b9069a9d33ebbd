"""What commands print: rows and JSON on stdout, progress on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["print_json", "print_rows", "report_progress"]


def print_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print rows with the given columns.

    On a terminal they are drawn as a table; elsewhere a row is a line with tabs between the cells, for other programs;
    ``as_json`` prints them as a JSON list.
    """
    if as_json:
        print_json([{column: row[column] for column in columns} for row in rows])
        return
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for row in [columns, *cells]:
            print("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD)
    for row in cells:
        table.add_row(*map(Text, row))  # as Text, square brackets are no markup
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def report_progress() -> Iterator[Callable[[str], None]]:
    """Yields ``progress(message)``: on a terminal a spinner with the latest message, else a line each, on stderr."""
    if not sys.stderr.isatty():
        yield lambda message: print(message, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("starting") as status:
        yield lambda message: status.update(Text(message))
