"""Named architectures: a name -> preset mapping, as thin as that of the mixers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manyheads.layers.mixer import unknown_name

__all__ = ["ArchitectureInfo", "architecture_info", "architecture_names", "register_architecture"]


@dataclass(frozen=True)
class ArchitectureInfo:
    """What the registry knows about an architecture.

    Attributes:
      name: the name on the command line.
      preset: ``preset() -> config``, the frozen dataclass that builds it.
      title: the title of the paper that proposed it.
      year: the year of that paper.
      paper: its number in the corpus, or None.
    """

    name: str
    preset: Callable[[], Any]
    title: str
    year: int
    paper: str | None = None


_REGISTRY: dict[str, ArchitectureInfo] = {}


def register_architecture(name: str, **info: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Function decorator that registers a preset under ``name``; ``info`` holds the fields of ``ArchitectureInfo``."""

    def register(preset: Callable[[], Any]) -> Callable[[], Any]:
        if name in _REGISTRY:
            raise ValueError(f"architecture {name!r} is registered twice")
        _REGISTRY[name] = ArchitectureInfo(name=name, preset=preset, **info)
        return preset

    return register


def architecture_names() -> tuple[str, ...]:
    """Names of all registered architectures, sorted."""
    return tuple(sorted(_REGISTRY))


def architecture_info(name: str) -> ArchitectureInfo:
    """The registration of architecture ``name``; ValueError with the nearest name if there is none."""
    if name not in _REGISTRY:
        raise unknown_name("architecture", name, _REGISTRY)
    return _REGISTRY[name]
