import json
import sys
import time

import pytest

from manyheads.experiments import benchmarks, cli
from manyheads.experiments.benchmarks import harness
from manyheads.experiments.benchmarks.harness import BENCHMARKS, benchmark_names, interleave, load_benchmark, timeit

BENCHMARK = """from manyheads.experiments.benchmarks.harness import Benchmark

def run(quick, progress):
    progress("racing")
    return {"headline": "2 x", "ratio": 2.0, "steps": 1 if quick else 10}

BENCHMARK = Benchmark("race", "a hare and a tortoise", run)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one benchmark and one module that is none, in place of the real ones."""
    monkeypatch.setattr(harness, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(benchmarks, "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, f"{benchmarks.__name__}.race", None)
    monkeypatch.delitem(sys.modules, f"{benchmarks.__name__}.race")
    (tmp_path / "race.py").write_text(BENCHMARK)
    (tmp_path / "helper.py").write_text("raise AssertionError('not a benchmark')\n")
    return tmp_path


def test_every_benchmark_loads_and_results_belong_to_one():
    for name in benchmark_names():
        assert load_benchmark(name).description
    assert {file.stem for file in (BENCHMARKS / "results").glob("*.json")} <= set(benchmark_names())


def test_full_run_is_recorded_and_listed(folder, capsys):
    assert cli.main(["bench", "race"]) == 0
    out, err = capsys.readouterr()
    assert "ratio = 2\n" in out and "steps = 10\n" in out and "racing" in err
    recorded = json.loads((folder / "results" / "race.json").read_text())
    assert recorded["figures"] == {"ratio": 2.0, "steps": 10} and recorded["headline"] == "2 x"
    assert {"device", "versions", "date"} < set(recorded)
    assert cli.main(["bench"]) == 0
    assert "race\ta hare and a tortoise\t2 x\t" in capsys.readouterr().out


def test_quick_run_is_not_recorded(folder, capsys):
    assert cli.main(["bench", "race", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert not (folder / "results").exists()


def test_result_that_json_cannot_hold_keeps_the_old_record(folder, capsys):
    assert cli.main(["bench", "race"]) == 0
    before = (folder / "results" / "race.json").read_bytes()
    with pytest.raises(ValueError):
        harness.record(load_benchmark("race"), {"headline": "broken", "ratio": float("nan")})
    assert (folder / "results" / "race.json").read_bytes() == before


def test_unknown_benchmark_is_one_line(folder, capsys):
    assert cli.main(["bench", "rase"]) == 2
    expected = "manyheads: error: unknown benchmark 'rase'. Did you mean 'race'? Allowed: race\n"
    assert capsys.readouterr().err == expected


def test_name_and_headline_are_required(folder, capsys):
    (folder / "race.py").write_text(BENCHMARK.replace('"race"', '"rally"').replace('"headline": "2 x", ', ""))
    with pytest.raises(ValueError, match="named 'rally', and must be named as its module"):
        load_benchmark("race")
    benchmark = sys.modules[f"{benchmarks.__name__}.race"].BENCHMARK
    with pytest.raises(ValueError, match="must have a headline"):
        harness.measure(benchmark, quick=True, progress=print)


def test_competitors_take_turns_and_warmup_is_not_timed():
    calls = []

    def competitor(name, seconds):
        def fn():
            time.sleep(0.2 if name not in calls else seconds)  # the first call stands for a compilation
            calls.append(name)

        return fn

    times = interleave({"a": competitor("a", 0.02), "b": competitor("b", 0.04)}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert 0.02 <= times["a"] < 0.2 and 0.04 <= times["b"] < 0.2


def test_timeit_waits_for_the_result_and_reduces():
    class Late:
        def block_until_ready(self):
            time.sleep(next(delays))
            return self

    delays = iter([0.0, 0.02, 0.04, 0.0, 0.02, 0.04])
    assert timeit(lambda x: x, Late(), repeats=2, reduce=min) >= 0.02
    assert timeit(lambda x: x, Late(), repeats=2, reduce=max) >= 0.04


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timeit(lambda: None, repeats=0)
