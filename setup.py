"""Lists the packages: each top-level folder ``X`` of the repository is installed as ``manyheads.X``."""

from setuptools import find_packages, setup

FLOORS = ("layers", "architectures", "pallas_kernels", "experiments", "tpu")

setup(
    packages=[
        f"manyheads.{name}" for floor in FLOORS for name in (floor, *(f"{floor}.{p}" for p in find_packages(floor)))
    ]
)
