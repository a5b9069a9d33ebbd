"""What README says can be done can be done."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_continuous_integration_runs_the_second_command():
    first, second, *_ = _blocks("bash")
    assert "manyheads train text" in first and first.count("\n") == 1
    assert "pytest" in second and second.count("\n") == 1
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_python_example_runs():
    (example,) = _blocks("python")
    assert len(example.splitlines()) <= 10
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert abs(names["y"][:, :60] - names["start"]).max() < 1e-4
    assert abs(names["y"][:, 60:61] - names["token"]).max() < 1e-4


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_commands_exist():
    from manyheads.experiments.cli import COMMANDS

    used = set(re.findall(r"^manyheads (\w+)", "\n".join(_blocks("bash")), re.MULTILINE))
    assert used and used <= set(COMMANDS)
