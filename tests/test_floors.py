"""The shape of the repository, read from its files: floors, imports, folders, sizes, and what no file may contain."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("pallas_kernels", "tpu", "layers", "architectures", "experiments")  # from the ground up
FOLDERS = {*FLOORS, "tests", "docs", ".ci"}
IGNORED = (".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()))


def files(folder: Path = ROOT) -> Iterator[Path]:
    """All files of the repository, without what .gitignore names."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from files(path)
        else:
            yield path


FILES = list(files())
SOURCES = [path for path in FILES if path.suffix == ".py"]


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(source: str) -> Iterator[tuple[str, int]]:
    """Dotted names that a source imports, each with its line. A relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def faults(floor: str, source: str) -> list[str]:
    """What the imports of a source on ``floor`` do that they must not."""
    found = []
    for name, line in imports(source):
        package, *rest = name.split(".")
        if package == "":
            found.append(f"{line}: relative import {name}")
        elif package == "tyro" and floor != "experiments":
            found.append(f"{line}: only experiments/ imports tyro")
        elif package == "manyheads" and rest[:1] and rest[0] not in FLOORS[: FLOORS.index(floor) + 1]:
            found.append(f"{line}: {floor}/ must not import {name}")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor):
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in SOURCES
        if floor_of(path) == floor
        for fault in faults(floor, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "floor, source, fault",
    [
        ("layers", "from manyheads.architectures.language import decoder", "must not import"),
        ("layers", "def f():\n    import manyheads.experiments.cli", "must not import"),
        ("pallas_kernels", "from manyheads import tpu", "must not import"),
        ("architectures", "import tyro.conf", "only experiments/"),
        ("tpu", "from . import mesh", "relative import"),
        ("experiments", "import tyro\nfrom manyheads.pallas_kernels import flex_attention", None),
        ("tpu", "from manyheads.tpu.mesh import make_mesh\nimport jax", None),
    ],
)
def test_the_check_of_imports_sees_what_it_should(floor, source, fault):
    found = faults(floor, source)
    assert fault in found[0] if fault else not found


def test_top_level_folders():
    present = {floor_of(path) for path in FILES if path.parent != ROOT}
    assert present <= FOLDERS, f"folders that do not belong here: {sorted(present - FOLDERS)}"


def test_every_package_folder_has_an_init():
    folders = {path.parent for path in SOURCES if floor_of(path) in FLOORS}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_source_is_longer_than_400_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


# Written in pieces, so that this file does not contain what it forbids.
FORBIDDEN = {
    "path of one machine": re.compile(r"(?<![\w.~-])/(?:" + "|".join(["root", "work", "home"]) + r")/"),
    "package index": re.compile(
        "|".join(
            [r"pypi\." + "org", "pythonhosted" + r"\.org", "npmjs" + r"\.", r"anaconda\." + "org", "index" + "-url"]
        )
    ),
}


def test_no_file_names_a_machine_or_a_package_index():
    found = []
    for path in FILES:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for what, pattern in FORBIDDEN.items():
            found += [f"{path.relative_to(ROOT)}: {what} {match[0]!r}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, what", [("open('/ro" + "ot/x')", "path of one machine"), ("https://py" + "pi.org/simple", "package index")]
)
def test_the_check_of_contents_sees_what_it_should(text, what):
    assert FORBIDDEN[what].search(text)
    assert not any(pattern.search("a/work/b and home/root/x") for pattern in FORBIDDEN.values())
