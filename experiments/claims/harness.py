"""Claims: what a paper says can be measured, the experiment that measures it, and the record of the result.

A claim is a file ``experiments/claims/NNN_name.py``, named after its paper, that defines::

    CLAIM = Claim(
        paper="039",
        title="Recall separates attention from gated convolutions",
        statement="accuracy of attention > 0.95 and of BaseConv < 0.4 on MQAR with 8 pairs",
        code=("manyheads.layers.convolution.base_conv", "manyheads.experiments.tasks.mqar"),
        run=run,
    )

where ``run(budget, seed, progress) -> Measurement`` does the experiment: ``budget`` 1.0 is all of it, less shrinks the
training steps in proportion; ``progress(message)`` tells how far it is. The result of a full run is recorded beside
the claim, together with a fingerprint of the code that it was measured on. A change of that code makes the record stale
and asks for a new run; a change of comments, docstrings or layout does not.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.experiments.papers import find_paper
from manyheads.experiments.record import environment, write_json

__all__ = [
    "CLAIMS",
    "Claim",
    "Measurement",
    "Result",
    "claim_files",
    "claim_status",
    "fingerprint",
    "load_claim",
    "load_record",
    "measure",
    "record",
]

CLAIMS = Path(__file__).parent


@dataclass(frozen=True)
class Measurement:
    """What an experiment found.

    Attributes:
      figures: the measured numbers by name, all finite; the same names at any budget.
      holds: whether they satisfy the statement of the claim.
      headline: the result in a few words, for the table: "attention 0.99, BaseConv 0.15".
      plot: draws the result into the PNG file it is given, if there is something to see.
    """

    figures: Mapping[str, float]
    holds: bool
    headline: str
    plot: Callable[[Path], None] | None = None

    def __post_init__(self):
        for name, value in self.figures.items():
            if not math.isfinite(value):
                raise ValueError(f"figure {name!r} of the measurement is {value}: it must be finite")


@dataclass(frozen=True)
class Result:
    """A measurement and how it was made: the share of the experiment, the seed, and the seconds it took."""

    measurement: Measurement
    budget: float
    seed: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The result without its plot, ready for JSON."""
        return {
            "holds": bool(self.measurement.holds),
            "headline": self.measurement.headline,
            "figures": {name: float(value) for name, value in self.measurement.figures.items()},
            "budget": self.budget,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Claim:
    """One claim of one paper.

    Attributes:
      paper: number of the paper, three digits.
      title: what is shown, in a few words.
      statement: the inequality that should hold, for people to read.
      code: the modules that the claim speaks about, as dotted paths; a package stands for all that it contains.
      run: ``run(budget, seed, progress)`` does the experiment.
    """

    paper: str
    title: str
    statement: str
    code: tuple[str, ...]
    run: Callable[[float, int, Callable[[str], None]], Measurement]


def claim_files() -> dict[str, Path]:
    """The files of all claims by the number of their paper."""
    return {path.name[:3]: path for path in sorted(CLAIMS.glob("[0-9][0-9][0-9]_*.py"))}


def load_claim(path: Path) -> Claim:
    """Import the claim in ``path``; ValueError if the file and the corpus do not agree on what paper it belongs to."""
    claim = getattr(importlib.import_module(f"{__package__}.{path.stem}"), "CLAIM", None)
    if not isinstance(claim, Claim):
        raise ValueError(f"{path.name} defines no CLAIM = Claim(...)")
    paper = find_paper(claim.paper)
    expected = f"{claim.paper}_{paper.name.replace('-', '_')}"
    if path.stem != expected:
        raise ValueError(f"{path.name}: the claim of paper {claim.paper!r} belongs into {expected}.py")
    return claim


def measure(claim: Claim, *, budget: float = 1.0, seed: int = 0, progress: Callable[[str], None]) -> Result:
    """Do the experiment of a claim, or the share ``budget`` of it: above 0 and at most 1, else ValueError."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, got {budget}")
    start = time.monotonic()
    measurement = claim.run(budget, seed, progress)
    return Result(measurement, budget=budget, seed=seed, seconds=time.monotonic() - start)


def record(path: Path, claim: Claim, result: Result) -> None:
    """Write a result beside the claim file ``path``: JSON and, if it has a plot, PNG."""
    if result.budget != 1:
        raise ValueError(f"only a result of the full experiment is recorded; its budget must be 1, got {result.budget}")
    if result.measurement.plot:
        result.measurement.plot(path.with_suffix(".png"))
    source = {"source": fingerprint(path, claim.code)}
    write_json(path.with_suffix(".json"), {"paper": claim.paper, **result.as_json(), **environment(), **source})


def load_record(path: Path) -> dict[str, Any] | None:
    """The recorded result of the claim file ``path``, or None if there is none."""
    file = path.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def claim_status(path: Path, claim: Claim) -> str:
    """Where a claim stands: "open" (no record), "does not hold here", "stale" (the code changed since), or "works"."""
    result = load_record(path)
    if result is None:
        return "open"
    if not result["holds"]:
        return "does not hold here"
    return "works" if result["source"] == fingerprint(path, claim.code) else "stale"


def fingerprint(path: Path, code: tuple[str, ...]) -> str:
    """SHA-256 over the syntax of a claim file and of the modules ``code``, without comments, docstrings and layout."""
    digest = hashlib.sha256()
    for file in [path, *(file for name in sorted(code) for file in _sources(name))]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        digest.update(f"{file.name}\n{_syntax(tree)}\n".encode())
    return digest.hexdigest()


def _sources(module: str) -> Iterator[Path]:
    """The source files of a module, or of everything in a package."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        raise ValueError(f"the code of a claim names {module!r}, and there is no such module")
    file = Path(spec.origin)
    return iter(sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file])


def _syntax(node: Any) -> str:
    """A syntax tree as text, without the strings that stand alone as docstrings do.

    Unlike that of ``ast.dump`` the text is the same in all versions of Python, because it leaves out what is empty.
    """
    if isinstance(node, list):
        return f"[{','.join(_syntax(child) for child in node if not _is_docstring(child))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    present = (f"{name}={_syntax(child)}" for name, child in ast.iter_fields(node) if child is not None and child != [])
    return f"{type(node).__name__}({','.join(present)})"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
