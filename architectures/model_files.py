"""A model in a folder: settings in ``config.json``, arrays in ``*.safetensors``.

The header of a file that is written here holds a CRC-32 of each array, so that damage is seen when it is read. Reading
checks all names, shapes and types before it reads the first array: a model comes back whole or not at all.
"""

import contextlib
import difflib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["CONFIG", "TENSORS", "read_json", "read_tensors", "write_model"]

CONFIG, TENSORS = "config.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object, but of type {type(value).__name__}")
    return value


def read_tensors(
    paths: Sequence[Path], expected: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Read exactly the expected tensors from safetensors files.

    Args:
      paths: the files that hold them together.
      expected: shapes of the tensors by name.
      ignored: names of tensors that may be there and are not read.

    Raises:
      ValueError: a file that is missing or damaged, or a tensor that is missing, unexpected, in two files, of another
        shape, or not of floating point.
    """
    with contextlib.ExitStack() as stack:
        home = {}  # name -> (path, file)
        for path in paths:
            with _readable(path):
                file = stack.enter_context(safe_open(path, "numpy"))
            for name in sorted(set(file.keys()) - set(ignored)):
                if name in home:
                    raise ValueError(f"tensor {name!r} is in {home[name][0]} and again in {path}")
                home[name] = path, file
        for name, shape in expected.items():
            if name not in home:
                raise ValueError(f"tensor {name!r} of shape {list(shape)} is missing in {', '.join(map(str, paths))}")
        for name, (path, file) in home.items():
            if name not in expected:
                nearest = difflib.get_close_matches(name, expected, n=1, cutoff=0)
                raise ValueError(f"{path}: tensor {name!r} does not belong to the model; nearest: {', '.join(nearest)}")
            view = file.get_slice(name)
            if list(view.get_shape()) != list(expected[name]):
                shapes = f"{list(view.get_shape())}, expected {list(expected[name])}"
                raise ValueError(f"{path}: tensor {name!r} has shape {shapes}")
            if view.get_dtype() not in FLOATS:
                raise ValueError(f"{path}: tensor {name!r} is {view.get_dtype()}, allowed: {', '.join(FLOATS)}")
        return {name: _read(*home[name], name) for name in expected}


def _read(path: Path, file: safe_open, name: str) -> np.ndarray:
    with _readable(path):
        array = file.get_tensor(name)
    checksum = (file.metadata() or {}).get(name)
    if checksum not in (None, _checksum(array)):
        raise ValueError(f"{path}: tensor {name!r} is damaged: its CRC-32 is {_checksum(array)}, expected {checksum}")
    return array


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``; both are complete on disk before they replace older ones.

    Raises:
      OSError: if the folder cannot be written. What it held before stays as it was.
    """
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / CONFIG) as config_file, _replacing(folder / TENSORS) as tensors_file:
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:  # transformers reads only files that name a format
            save_file(tensors, tensors_file, metadata={"format": "pt", **checksums})
        except SafetensorError as error:
            raise OSError(f"{folder / TENSORS} cannot be written: {error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; at the end that file takes the place of ``path`` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8)):08x}"
