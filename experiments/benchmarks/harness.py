"""Benchmarks: what is timed, how it is timed, and the record of the result.

A benchmark is a module ``experiments/benchmarks/NAME.py`` that defines::

    BENCHMARK = Benchmark(name="NAME", description="what is compared with what", run=run)

where ``run(quick, progress) -> dict`` returns what it measured, ready for JSON, with a ``headline`` in a few words:
``{"headline": "1.8 x the scan at T = 4096", "ratio": 1.8}``. ``quick`` asks for a tiny run that only shows that
everything works; ``progress(message)`` tells how far it is. Times depend on the machine and on what else it does, so
what a benchmark reports is ratios of times that ``interleave`` took side by side.
"""

import importlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from manyheads.experiments.record import environment, write_json
from manyheads.layers.mixer import unknown_name

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "benchmark_names",
    "interleave",
    "load_benchmark",
    "load_record",
    "measure",
    "record",
    "timeit",
]

BENCHMARKS = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name: that of its module.
      description: what is compared with what, in a line.
      run: ``run(quick, progress)`` measures and returns the figures and their headline.
    """

    name: str
    description: str
    run: Callable[[bool, Callable[[str], None]], dict[str, Any]]


def timeit(
    fn: Callable[..., Any],
    *args: Any,
    repeats: int = 5,
    warmup: int = 1,
    reduce: Callable[[Iterable[float]], float] = statistics.median,
) -> float:
    """Seconds that ``fn(*args)`` takes until its arrays are ready.

    Args:
      fn: the function, usually jitted.
      args: its arguments.
      repeats: timed calls.
      warmup: calls before, which compile and fill the caches.
      reduce: what to report of the ``repeats`` times: their median, or ``min``.
    """
    return interleave({"": lambda: fn(*args)}, repeats=repeats, warmup=warmup, reduce=reduce)[""]


def interleave(
    competitors: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    reduce: Callable[[Iterable[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds that each of several functions takes until its arrays are ready, timed in turns: A B A B ...

    Whatever else slows the machine down for a while then slows all of them, and their ratios stay fair. The arguments
    are those of ``timeit``; ``competitors`` are functions without arguments by name.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(warmup + repeats):
        for name, fn in competitors.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: reduce(seconds) for name, seconds in times.items()}


def benchmark_names() -> tuple[str, ...]:
    """Names of all benchmarks: the modules of this folder that define one."""
    defines = re.compile(r"^BENCHMARK\b", re.MULTILINE)
    files = sorted(BENCHMARKS.glob("*.py"))
    return tuple(file.stem for file in files if defines.search(file.read_text(encoding="utf-8")))


def load_benchmark(name: str) -> Benchmark:
    """Import the benchmark of that name; ValueError with the nearest name if there is none."""
    if name not in benchmark_names():
        raise unknown_name("benchmark", name, benchmark_names())
    benchmark = importlib.import_module(f"{__package__}.{name}").BENCHMARK
    if benchmark.name != name:
        raise ValueError(f"{name}.py: the benchmark in it is named {benchmark.name!r}, and must be named as its module")
    return benchmark


def measure(benchmark: Benchmark, *, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run a benchmark and return what it measured; ValueError if that has no headline."""
    figures = benchmark.run(quick, progress)
    if not isinstance(figures.get("headline"), str):
        raise ValueError(f"benchmark {benchmark.name!r}: its result must have a headline, got {list(figures)}")
    return figures


def record(benchmark: Benchmark, figures: Mapping[str, Any]) -> Path:
    """Write what a full run measured, with device, versions and date, to ``results/NAME.json``; returns the file."""
    file = _record_file(benchmark.name)
    headline = figures["headline"]
    rest = {name: value for name, value in figures.items() if name != "headline"}
    write_json(file, {"benchmark": benchmark.name, "headline": headline, "figures": rest, **environment()})
    return file


def load_record(name: str) -> dict[str, Any] | None:
    """The recorded result of a benchmark, or None if there is none."""
    file = _record_file(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _record_file(name: str) -> Path:
    return BENCHMARKS / "results" / f"{name}.json"
