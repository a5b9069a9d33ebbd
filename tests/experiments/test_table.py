import re
import sys

import pytest

from manyheads.experiments import claims, cli, table
from manyheads.experiments.claims import harness
from manyheads.experiments.papers import load_papers
from manyheads.experiments.table import ROOT, WORKSPACE, render, splice

CLAIM = """from manyheads.experiments.claims.harness import Claim, Measurement

def run(budget, seed, progress):
    return Measurement({{"x": 1.0}}, holds={holds}, headline="x is 1 | 2")

CLAIM = Claim("039", "A claim", "x < 2", ({code!r},), run)
"""
HERE = "manyheads.experiments.table"


def test_workspace_holds_the_generated_table():
    document = WORKSPACE.read_text(encoding="utf-8")
    assert document == splice(document, render()), "run manyheads table"


def test_links_of_the_workspace_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", WORKSPACE.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_paper_has_one_row():
    rows = re.findall(r"^\| (\d{3}) \|", render(), re.MULTILINE)
    assert rows == [paper.number for paper in load_papers()]


@pytest.fixture
def row(tmp_path, monkeypatch):
    """Returns the row of paper 039 for a claim with the given outcome and code, recorded unless told otherwise."""
    monkeypatch.setattr(harness, "CLAIMS", tmp_path)
    monkeypatch.setattr(claims, "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, f"{claims.__name__}.039_zoology", None)
    monkeypatch.delitem(sys.modules, f"{claims.__name__}.039_zoology")

    def build(*, holds=True, code=HERE, recorded=True, change=""):
        path = tmp_path / "039_zoology.py"
        path.write_text(CLAIM.format(holds=holds, code=code))
        if recorded:
            claim = harness.load_claim(path)
            harness.record(path, claim, harness.measure(claim, progress=print))
        path.write_text(path.read_text() + change)
        text = render()
        return next(line for line in text.splitlines() if line.startswith("| 039 |")), text.splitlines()[0]

    return build


def test_row_of_a_claim_that_holds(row):
    line, totals = row()
    assert "| [works](experiments/claims/039_zoology.py) | [table](experiments/table.py) | x is 1 \\| 2 | 20" in line
    assert totals == "207 papers: 1 works, 0 does not hold here, 206 open."


def test_row_of_a_claim_that_does_not_hold(row):
    line, totals = row(holds=False)
    assert "| [does not hold here](" in line and "x is 1" in line
    assert totals == "207 papers: 0 works, 1 does not hold here, 206 open."


@pytest.mark.parametrize(
    "options", [{"recorded": False}, {"change": "x = 1\n"}, {"recorded": False, "code": "manyheads.layers.missing"}]
)
def test_row_without_a_record_of_this_code_is_open(options, row):
    line, totals = row(**options)
    assert "open" in line and "x is 1" not in line
    assert totals == "207 papers: 0 works, 0 does not hold here, 207 open."


def test_code_that_no_longer_imports_is_open(row, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    piece = tmp_path / "manyheads_piece.py"
    piece.write_text("x = 1\n")
    assert "works" in row(code="manyheads_piece")[0]
    monkeypatch.setitem(sys.modules, "manyheads_piece", None)  # what Python makes of a module that must not be imported
    assert "open" in next(line for line in render().splitlines() if line.startswith("| 039 |"))


def test_splice_replaces_only_what_is_between_the_markers():
    document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert splice(document, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    for broken in ("no markers", document + document, f"{table.END} {table.BEGIN}"):
        with pytest.raises(ValueError, match="must have one"):
            splice(broken, "new")


def test_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    from manyheads.experiments.commands import table as command

    document = tmp_path / "WORKSPACE.md"
    monkeypatch.setattr(command, "WORKSPACE", document)
    assert cli.main(["table"]) == 2
    assert "No such file" in capsys.readouterr().err
    document.write_text(f"# Map\n{table.BEGIN}\n{table.END}\n")
    assert cli.main(["table", "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert document.read_text() == f"# Map\n{table.BEGIN}\n{table.END}\n"
    assert cli.main(["table"]) == 0
    assert cli.main(["table", "--check"]) == 0
    assert document.read_text() == f"# Map\n{table.BEGIN}\n\n{render()}\n\n{table.END}\n"
