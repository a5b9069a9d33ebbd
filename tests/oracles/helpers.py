"""What the tests against third-party implementations share."""

import importlib
from types import ModuleType

import pytest


def oracle(name: str) -> ModuleType:
    """Import a package that is not a dependency of the project, or skip the test and name the package."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"oracle {name} is missing ({error}); the packages are in oracles.txt")
    if name == "torch":
        module.set_num_threads(2)
    return module
