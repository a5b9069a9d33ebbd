import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_training import train_toy


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed; to be read only."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_toy(out).finished
    return out


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the library says to its user while the test runs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("manyheads")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., tuple[Path, Callable[[str], None]]]]:
    """Mounts a disk of so many megabytes: gives a folder on it, and a function that mounts it again with other options."""
    disk = tmp_path / "disk"

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a disk cannot be mounted here: {result.stderr.strip()}")

    def make(megabytes: float) -> tuple[Path, Callable[[str], None]]:
        disk.mkdir()
        mount(f"size={round(megabytes * 1024)}k")
        return disk / "run", lambda option: mount("remount", option)

    yield make
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
