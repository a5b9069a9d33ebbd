"""Checkpoints that are whole, or noticed not to be.

A checkpoint holds arrays by name, and a note in JSON: what else a run needs to go on, and a checksum of every array. The
checksum is a sum over the words of the array, each mixed with its position, in integers modulo 2^32: exact, and the same
however the array is sharded. A checkpoint that cannot be read, or that has other checksums, is passed over for the one
before; it is set aside when a run writes again.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import Array

__all__ = ["Checkpoints", "checksums", "named_leaves", "with_leaves"]

# Orbax logs every step of its work, and every failure with its stack; failures arrive here as exceptions as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logger = logging.getLogger("manyheads")


def named_leaves(tree: Any) -> dict[str, Array]:
    """The leaves of a pytree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_leaves(tree: Any, leaves: Mapping[str, Array]) -> Any:
    """``tree`` with the leaves of the same paths from ``leaves``."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """For each array, the checksum of its bits and whether all of it is finite."""

    def one(x: Array) -> tuple[Array, Array]:
        finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        if jnp.iscomplexobj(x):
            x = jnp.stack([x.real, x.imag])
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}"))
        words = words.astype(jnp.uint32).ravel()
        # Every step is one to one in the word, so one changed bit always shows, and sums of mixed words (the finalizer of
        # MurmurHash3) show exchanged words and flipped signs, which plain weights can miss.
        words ^= jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
        words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32), finite

    return {name: one(x) for name, x in arrays.items()}


def _checksum_of_note(note: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


class Checkpoints:
    """The checkpoints of a run, newest last.

    Args:
      folder: where they are; made on the first save.
      keep: how many to keep, at least 2 so that one is left if the newest is damaged.

    Attributes:
      last: the step of the newest one that is known to be whole; None before any is saved or restored.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: one is left if the newest checkpoint is damaged")
        self.folder = folder.absolute()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: list[int] = []
        self.last: int | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def save(self, step: int, arrays: Mapping[str, Array], note: Mapping[str, Any]) -> None:
        """Write a checkpoint; when this returns it is whole on disk.

        Checkpoints that ``restore`` found damaged are moved into ``damaged`` beside the folder before.

        Raises:
          ValueError: if an array is not finite; nothing is written.
          OSError: if it cannot be written; the checkpoints before are untouched.
        """
        sums = jax.device_get(checksums(dict(arrays)))
        bad = [name for name, (_, finite) in sums.items() if not finite]
        if bad:
            raise ValueError(f"step {step}: {bad[0]} is not finite, so no checkpoint was written")
        note = {**note, "checksums": {name: int(total) for name, (total, _) in sums.items()}}
        note = {"note": note, "checksum": _checksum_of_note(note)}
        try:
            self._set_damaged_aside()
            if self._manager is None:
                self._manager = ocp.CheckpointManager(self.folder, options=self._options)
            self._check_room(sum(x.nbytes for x in arrays.values()))
            self._manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(dict(arrays)), note=ocp.args.JsonSave(note)),
                force=True,
            )
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the storage layer raises: no space, no permission, no folder
            self._manager = None
            for part in self.folder.glob(f"{step}.*"):  # what was written of it takes up space
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"no checkpoint of step {step} could be written: {_reason(error)}") from error
        self.last = step

    def restore(self, like: Mapping[str, Array]) -> tuple[int, dict[str, Array], dict[str, Any]] | None:
        """The newest whole checkpoint: (step, arrays, note); None if there is none at all.

        Damaged ones are reported. This only reads: a run may be writing while others look at it.

        Args:
          like: arrays, or their shapes, dtypes and shardings, by name. A checkpoint may hold more: it is not read.

        Raises:
          ValueError: if there are checkpoints and none can be read.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                arrays, note = self._read(step, like)
            except Exception as error:  # damaged files fail in many ways
                problems[step] = _reason(error)
                continue
            for damaged, problem in problems.items():
                logger.warning("checkpoint of step %d is damaged (%s); using that of step %d", damaged, problem, step)
            self._damaged, self.last = list(problems), step
            return step, arrays, note
        if problems:
            step, problem = next(iter(problems.items()))
            raise ValueError(
                f"{self.folder}: none of the {len(problems)} checkpoints can be read; step {step}: {problem}"
            )
        return None

    def _check_room(self, size: int) -> None:
        """Raise OSError if there may be no room for arrays of ``size`` bytes and what describes them.

        Orbax notices, too, but its threads print their stacks then.
        """
        free, needed = shutil.disk_usage(self.folder).free, 2 * size + 2**20
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free:,} bytes are free, {needed:,} are needed")

    def _set_damaged_aside(self) -> None:
        for step in self._damaged:
            aside = self.folder.parent / "damaged" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
            logger.warning("moved the damaged checkpoint of step %d to %s", step, aside)
        self._damaged = []

    def _read(self, step: int, like: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
        folder = self.folder / str(step)
        written = json.loads((folder / "note" / "metadata").read_text(encoding="utf-8"))
        note = written["note"]
        if _checksum_of_note(note) != written["checksum"]:
            raise ValueError("the checksum of the note is wrong")
        missing = like.keys() - note["checksums"].keys()
        if missing:
            raise ValueError(f"it has no array {min(missing)}")
        arrays = {name: _read_array(folder / "arrays", name, x) for name, x in like.items()}
        for name, (total, _) in jax.device_get(checksums(arrays)).items():
            if int(total) != note["checksums"][name]:
                raise ValueError(f"the checksum of {name} is {int(total)}, not {note['checksums'][name]}")
        return arrays, note


def _read_array(folder: Path, name: str, like: Array) -> Array:
    """An array that Orbax wrote, with the shape, dtype and sharding of ``like``; every process reads its own part.

    Orbax reads all arrays at once, and if one fails the others complain on stderr long after the error was raised. So this
    goes to the storage below it.
    """
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    store = tensorstore.open({"driver": "zarr", "kvstore": files}).result()
    if store.shape != like.shape or store.dtype != like.dtype:
        raise ValueError(f"{name} is {store.dtype.name} {store.shape}, not {like.dtype} {like.shape}")
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: store[index].read().result())


def _reason(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-110:]}"
