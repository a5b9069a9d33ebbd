"""Eight virtual CPU devices, a persistent compilation cache, strict settings, and a fresh printed seed for every test."""

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
