"""``manyheads claims``: list the claims, or measure one and record the result."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from manyheads.experiments.arguments import parse
from manyheads.experiments.claims.harness import (
    claim_files,
    claim_status,
    load_claim,
    load_record,
    measure,
    record,
)
from manyheads.experiments.commands.output import print_json, print_rows, report_progress
from manyheads.experiments.papers import find_paper

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads claims``."""

    paper: Annotated[str, Positional, arg(metavar="[PAPER]")] = ""
    """Number of the paper whose claim to measure; without it, all claims are listed."""
    budget: float = 1.0
    """Share of the full experiment, above 0 and at most 1. Only the full one is recorded."""
    seed: int = 0
    """Seed of the data and of the initial parameters."""
    json: bool = False
    """Print JSON."""
    record: bool = True
    """Record the result of a full run beside the claim."""


def run(argv: list[str]) -> int:
    """List the claims, or measure one. A claim that does not hold is a result: the exit code is 0 either way."""
    description = "Measure the claim of a paper, or list all claims."
    arguments = parse(Arguments, argv, prog="manyheads claims", description=description)
    if arguments.paper:
        _measure(arguments)
    else:
        _list(arguments.json)
    return 0


def _list(as_json: bool) -> None:
    rows = []
    for path in claim_files().values():
        claim, result = load_claim(path), load_record(path) or {}
        measured = {key: result.get(key) for key in ("headline", "date")}
        rows.append({"paper": claim.paper, "status": claim_status(path, claim), "title": claim.title, **measured})
    print_rows(("paper", "status", "title", "headline", "date"), rows, as_json=as_json)


def _measure(arguments: Arguments) -> None:
    paper = find_paper(arguments.paper)
    files = claim_files()
    if paper.number not in files:
        raise ValueError(f"paper {paper.number} ({paper.name}) has no claim yet. Allowed: {', '.join(files) or 'none'}")
    path = files[paper.number]
    claim = load_claim(path)
    with report_progress() as progress:
        result = measure(claim, budget=arguments.budget, seed=arguments.seed, progress=progress)
    recorded = arguments.record and result.budget == 1
    if recorded:
        record(path, claim, result)
    if arguments.json:
        print_json({"paper": claim.paper, "statement": claim.statement, **result.as_json(), "recorded": recorded})
        return
    print(f"{claim.paper} {paper.title}\n{claim.title}: {claim.statement}")
    for name, value in result.measurement.figures.items():
        print(f"  {name} = {value:.6g}")
    verdict = "holds" if result.measurement.holds else "does not hold"
    share = "" if result.budget == 1 else f" at {result.budget:g} of the full experiment"
    print(f"{verdict}{share}: {result.measurement.headline}")
    if recorded:
        print(f"recorded in {path.with_suffix('.json')}")
