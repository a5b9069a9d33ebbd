import json
import math
import sys

import pytest

from manyheads.experiments import claims, cli
from manyheads.experiments.claims import harness
from manyheads.experiments.claims.harness import (
    CLAIMS,
    Measurement,
    claim_files,
    claim_status,
    fingerprint,
    load_claim,
    load_record,
    measure,
)

TINY = 0.002
CLAIM = '''"""A claim that counts."""
from manyheads.experiments.claims.harness import Claim, Measurement

def run(budget, seed, progress):
    """Counts."""
    progress("counting")  # a comment
    plot = lambda path: path.write_bytes(b"picture")
    return Measurement({"count": 100 * budget + seed}, holds=seed < 10, headline=f"count {seed}", plot=plot)

CLAIM = Claim("039", "Counting", "count < 110", ("piece",), run)
'''
PIECE = '"""A piece."""\n\ndef double(x):\n    """Twice x."""\n    return 2 * x\n'


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with one claim and the module that it speaks about, in place of the real claims."""
    monkeypatch.setattr(harness, "CLAIMS", tmp_path)
    monkeypatch.setattr(claims, "__path__", [str(tmp_path)])
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("piece", f"{claims.__name__}.039_zoology"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "piece.py").write_text(PIECE)
    (tmp_path / "039_zoology.py").write_text(CLAIM)
    return tmp_path


def test_every_file_in_the_folder_is_the_claim_of_its_paper():
    assert len(claim_files()) == len(list(CLAIMS.glob("[0-9]*.py")))
    for number, path in claim_files().items():
        assert load_claim(path).paper == number


@pytest.mark.parametrize("path", claim_files().values(), ids=lambda path: path.stem)
def test_claim_runs_and_its_record_belongs_to_the_code(path, seed):
    claim, recorded = load_claim(path), load_record(path)
    measurement = measure(claim, budget=TINY, seed=seed, progress=print).measurement
    assert measurement.figures and measurement.headline
    if recorded:
        assert set(measurement.figures) == set(recorded["figures"])
        assert recorded["budget"] == 1
        assert recorded["source"] == fingerprint(path, claim.code), (
            f"the code changed: run manyheads claims {claim.paper}"
        )


def test_full_run_is_recorded_with_all_that_it_depends_on(workspace, capsys):
    assert cli.main(["claims", "39", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert "count = 103" in out and "holds: count 3" in out and "counting" in err
    recorded = json.loads((workspace / "039_zoology.json").read_text())
    assert recorded["figures"] == {"count": 103.0} and recorded["holds"] is True and recorded["seed"] == 3
    assert set(recorded["versions"]) == {"python", "jax", "flax"}
    assert {"headline", "budget", "device", "date", "seconds", "source"} < set(recorded)
    assert (workspace / "039_zoology.png").read_bytes() == b"picture"
    assert sorted(path.name for path in workspace.glob(".*")) == []


@pytest.mark.parametrize("options", [["--budget", "0.05"], ["--no-record"]])
def test_other_runs_are_not_recorded(options, workspace, capsys):
    assert cli.main(["claims", "039", "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recorded"] is False and result["figures"]["count"] == pytest.approx(100 * result["budget"])
    assert not list(workspace.glob("*.json")) and not list(workspace.glob("*.png"))


def test_a_partial_result_cannot_be_recorded(workspace):
    path = claim_files()["039"]
    claim = load_claim(path)
    with pytest.raises(ValueError, match="its budget must be 1"):
        harness.record(path, claim, measure(claim, budget=0.5, progress=print))
    assert load_record(path) is None


def test_a_claim_that_does_not_hold_is_a_result(workspace, capsys):
    assert cli.main(["claims", "039", "--seed", "20"]) == 0
    assert "does not hold: count 20" in capsys.readouterr().out
    assert cli.main(["claims"]) == 0
    assert "039\tdoes not hold here\tCounting\tcount 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, old, new, expected",
    [
        ("piece.py", "Twice x", "Double of x", "works"),
        ("piece.py", "    return 2 * x", "\n    # why\n    return (2 *\n        x)", "works"),
        ("piece.py", "2 * x", "3 * x", "stale"),
        ("039_zoology.py", "# a comment", "# another comment", "works"),
        ("039_zoology.py", "seed < 10", "seed < 11", "stale"),
    ],
)
def test_record_goes_stale_with_the_code_but_not_with_its_prose(file, old, new, expected, workspace):
    path = claim_files()["039"]
    claim = load_claim(path)
    assert claim_status(path, claim) == "open"
    harness.record(path, claim, measure(claim, progress=print))
    assert claim_status(path, claim) == "works"
    text = (workspace / file).read_text()
    assert old in text
    (workspace / file).write_text(text.replace(old, new))
    assert claim_status(path, claim) == expected


def test_a_package_stands_for_all_of_its_modules(workspace):
    package = workspace / "pieces"
    (package / "inner").mkdir(parents=True)
    for file in ("__init__.py", "inner/__init__.py", "inner/part.py"):
        (package / file).write_text("x = 1\n")
    path = claim_files()["039"]
    before = fingerprint(path, ("pieces",))
    (package / "inner" / "part.py").write_text("x = 2\n")
    assert fingerprint(path, ("pieces",)) != before


def test_failed_write_leaves_the_old_record(workspace, monkeypatch):
    assert cli.main(["claims", "039"]) == 0
    before = (workspace / "039_zoology.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cli.main(["claims", "039", "--seed", "1"]) == 2
    assert (workspace / "039_zoology.json").read_bytes() == before
    assert sorted(path.name for path in workspace.glob(".*")) == []


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan"])
def test_budget_out_of_range(budget, workspace, capsys):
    assert cli.main(["claims", "039", "--budget", budget]) == 2
    assert "budget must be above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_are_finite(value):
    with pytest.raises(ValueError, match="figure 'loss' of the measurement is"):
        Measurement({"loss": value}, holds=False, headline="")


@pytest.mark.parametrize(
    "number, message",
    [("999", "unknown paper '999'"), ("040", "paper 040 (aaren) has no claim yet. Allowed: 039")],
)
def test_paper_without_a_claim(number, message, workspace, capsys):
    assert cli.main(["claims", number]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"manyheads: error: {message}") and err.count("\n") == 1


def test_claim_under_a_wrong_name(workspace):
    path = workspace / "040_zoology.py"
    (workspace / "039_zoology.py").rename(path)
    with pytest.raises(ValueError, match=r"paper '039' belongs into 039_zoology.py"):
        load_claim(path)


def test_code_that_does_not_exist(workspace):
    with pytest.raises(ValueError, match=r"'piece.missing', and there is no such module"):
        fingerprint(claim_files()["039"], ("piece.missing",))
