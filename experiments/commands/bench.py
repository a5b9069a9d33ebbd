"""``manyheads bench``: list the benchmarks, or run one and record the result."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from manyheads.experiments.arguments import parse
from manyheads.experiments.benchmarks.harness import benchmark_names, load_benchmark, load_record, measure, record
from manyheads.experiments.commands.output import print_json, print_rows, report_progress

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads bench``."""

    name: Annotated[str, Positional, arg(metavar="[NAME]")] = ""
    """Benchmark to run; without it, all benchmarks are listed."""
    quick: bool = False
    """A tiny run that only shows that everything works; it is not recorded."""
    json: bool = False
    """Print JSON."""


def run(argv: list[str]) -> int:
    """List the benchmarks, or run one."""
    arguments = parse(Arguments, argv, prog="manyheads bench", description="Run a benchmark, or list all benchmarks.")
    if arguments.name:
        _run(arguments)
    else:
        _list(arguments.json)
    return 0


def _list(as_json: bool) -> None:
    rows = []
    for benchmark in map(load_benchmark, benchmark_names()):
        result = load_record(benchmark.name) or {}
        measured = {key: result.get(key) for key in ("headline", "device", "date")}
        rows.append({"name": benchmark.name, "description": benchmark.description, **measured})
    print_rows(("name", "description", "headline", "device", "date"), rows, as_json=as_json)


def _run(arguments: Arguments) -> None:
    benchmark = load_benchmark(arguments.name)
    with report_progress() as progress:
        figures = measure(benchmark, quick=arguments.quick, progress=progress)
    file = None if arguments.quick else record(benchmark, figures)
    if arguments.json:
        print_json(figures)
        return
    print(f"{benchmark.name}: {benchmark.description}")
    for name, value in figures.items():
        if name != "headline":
            print(f"  {name} = {value:.6g}" if isinstance(value, float) else f"  {name} = {value}")
    print(figures["headline"])
    if file:
        print(f"recorded in {file}")
