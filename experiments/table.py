"""The table of the corpus in WORKSPACE.md, generated from the claims and their records.

A paper *works* if its claim has a recorded result that holds, the result belongs to the code as it is now, and that
code imports. It *does not hold here* if the recorded result says so. Every other paper is *open*.
"""

import importlib
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from manyheads.experiments.claims.harness import Claim, claim_files, claim_status, load_claim, load_record
from manyheads.experiments.papers import Paper, load_papers

__all__ = ["ROOT", "WORKSPACE", "render", "splice"]

ROOT = Path(__file__).parents[1]
WORKSPACE = ROOT / "WORKSPACE.md"
STATUSES = ("works", "does not hold here", "open")
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"


def render() -> str:
    """The table as Markdown: a line of totals, then one table a family."""
    files = claim_files()
    standings = {paper: _standing(files.get(paper.number)) for paper in load_papers()}
    totals = Counter(standing.status for standing in standings.values())
    parts = [f"{len(standings)} papers: " + ", ".join(f"{totals[status]} {status}" for status in STATUSES) + "."]
    for family, papers in groupby(standings, key=lambda paper: paper.family):
        head = ["| paper | title | status | code | measured | date |", "|---|---|---|---|---|---|"]
        parts.append("\n".join([f"### {family}", "", *head, *(_row(paper, standings[paper]) for paper in papers)]))
    return "\n\n".join(parts)


def splice(document: str, table: str) -> str:
    """``document`` with ``table`` between its two markers; ValueError if it has not exactly one pair of them."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"the document must have one {BEGIN} and after it one {END}")
    head, tail = document.split(BEGIN)[0], document.split(END)[1]
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


class _Standing(NamedTuple):
    """What is known about a paper: its status, the links to claim and code, the measured figure and its date."""

    status: str = "open"
    claim: str = ""
    code: str = ""
    measured: str = ""
    date: str = ""


def _standing(file: Path | None) -> _Standing:
    """The standing of the paper whose claim is in ``file``."""
    claim = _load(file) if file else None
    if claim is None:
        return _Standing()
    folder = "experiments/claims"
    links = {"claim": f"{folder}/{file.name}", "code": ", ".join(map(_code_link, claim.code))}
    status, result = claim_status(file, claim), load_record(file)
    if status not in ("works", "does not hold here"):
        return _Standing(**links)
    picture = file.with_suffix(".png")
    measured = f"[{result['headline']}]({folder}/{picture.name})" if picture.exists() else result["headline"]
    return _Standing(status, **links, measured=measured, date=result["date"])


def _row(paper: Paper, standing: _Standing) -> str:
    """The row of a paper."""
    status = f"[{standing.status}]({standing.claim})" if standing.claim else standing.status
    cells = (paper.number, paper.title, status, standing.code, standing.measured, standing.date)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _load(file: Path) -> Claim | None:
    """The claim in ``file`` if it and the code it speaks about can be imported."""
    try:
        claim = load_claim(file)
        for module in claim.code:
            importlib.import_module(module)
    except ImportError:
        return None
    return claim


def _code_link(module: str) -> str:
    """A link to the file, or to the folder, of the module ``manyheads.X.Y``."""
    path = "/".join(module.split(".")[1:])
    return f"[{module.split('.')[-1]}]({path if (ROOT / path).is_dir() else path + '.py'})"
