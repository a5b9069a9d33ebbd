"""The table of the corpus in WORKSPACE.md: paper, code, claim and measured figure, generated from what stands in the code.

A paper *works* if its claim has a recorded result that holds, the result belongs to the code as it is now, and that code
imports. It *does not hold here* if the recorded result says so. Every other paper is *open*.
"""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from manyheads.experiments.claims.harness import claim_files, claim_status, load_claim, load_record
from manyheads.experiments.papers import Paper, load_papers

__all__ = ["ROOT", "WORKSPACE", "render", "splice"]

ROOT = Path(__file__).parents[1]
WORKSPACE = ROOT / "WORKSPACE.md"
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"


def render() -> str:
    """The table of all papers as Markdown: one table a family."""
    rows = {paper: _row(paper) for paper in load_papers()}
    counts = Counter(status for status, _ in rows.values())
    summary = ", ".join(f"{counts[status]} {status}" for status in ("works", "does not hold here", "open"))
    parts = [f"{len(rows)} papers: {summary}."]
    for family, papers in groupby(rows, key=lambda paper: paper.family):
        parts.append(f"### {family}\n\n| paper | status | code | measured | date |\n|---|---|---|---|---|")
        parts[-1] += "".join(f"\n{rows[paper][1]}" for paper in papers)
    return "\n\n".join(parts)


def splice(document: str, table: str) -> str:
    """``document`` with ``table`` between its two markers; ValueError if it has not exactly one pair of them."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"the document must have one {BEGIN} and after it one {END}")
    head, tail = document.split(BEGIN)[0], document.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _row(paper: Paper) -> tuple[str, str]:
    """The status of a paper, and its row of the table."""
    status, cells = "open", ["open", "", "", ""]
    path = claim_files().get(paper.number)
    if path:
        claim, result = load_claim(path), load_record(path) or {}
        status = claim_status(path, claim)
        if status == "stale" or not all(map(_imports, claim.code)):
            status, result = "open", {}
        code = ", ".join(_code_link(module) for module in claim.code)
        measured = result.get("headline", "").replace("|", "\\|")
        picture = path.with_suffix(".png")
        if measured and picture.exists():
            measured = f"[{measured}]({_relative(picture)})"
        cells = [f"[{status}]({_relative(path)})", code, measured, result.get("date", "")]
    title = paper.title.replace("|", "\\|")
    return status, f"| {paper.number} {title} | {' | '.join(cells)} |"
