"""Eight virtual CPU devices, a persistent compilation cache, strict settings, a fresh printed seed for every test.

A test that is skipped fails the run, unless its reason is on the list below.
"""

import os
import secrets
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


# Reasons for which a test may be skipped: the beginning of the message, and why that is right.
ALLOWED_SKIPS: dict[str, str] = {}

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what was skipped, or expected to fail, for a reason that is not on the list."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        if not any(reason.removeprefix("Skipped: ").startswith(allowed) for allowed in ALLOWED_SKIPS):
            _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip that is not allowed fails the run."""
    if _skipped and exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips are not allowed."""
    for line in _skipped:
        terminalreporter.write_line(f"skipped without leave (tests/conftest.py): {line}", red=True)


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed so that a failure can be repeated with MANYHEADS_TEST_SEED."""
    value = int(os.environ.get("MANYHEADS_TEST_SEED", secrets.randbits(31)))
    print(f"MANYHEADS_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator on the fresh seed."""
    return np.random.default_rng(seed)
