"""Checkpoints that are whole, or noticed not to be.

A checkpoint holds arrays by name, and a note in JSON: what else a run needs to go on, and a checksum of every array. The
checksum is a sum over the bits of the array, weighted by position, in integers modulo 2^32: exact, and the same however the
array is sharded. A checkpoint that cannot be read, or whose arrays have other checksums, is set aside, and the one before is
used.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

__all__ = ["Checkpoints", "named_leaves", "with_leaves"]

# Orbax reports every step of its work; what matters of it comes from here.
logging.getLogger("absl").setLevel(logging.ERROR)


def named_leaves(tree: Any) -> dict[str, Array]:
    """The leaves of a pytree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_leaves(tree: Any, leaves: Mapping[str, Array]) -> Any:
    """``tree`` with the leaves of the same paths from ``leaves``."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """For each array, the checksum of its bits and whether all of it is finite."""

    def one(x: Array) -> tuple[Array, Array]:
        finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}"))
        words = words.astype(jnp.uint32).ravel()
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)), finite

    return {name: one(x) for name, x in arrays.items()}


class Checkpoints:
    """The checkpoints of a run, newest last.

    Args:
      folder: where they are; made on the first save.
      keep: how many to keep, at least 2 so that one is left if the newest is damaged.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: one is left if the newest checkpoint is damaged")
        self.folder = folder.absolute()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def save(self, step: int, arrays: Mapping[str, Array], note: Mapping[str, Any]) -> None:
        """Write a checkpoint; when this returns it is whole on disk.

        Raises:
          ValueError: if an array is not finite; nothing is written.
          OSError: if it cannot be written; the checkpoints before are untouched.
        """
        sums = jax.device_get(_checksums(dict(arrays)))
        bad = [name for name, (_, finite) in sums.items() if not finite]
        if bad:
            raise ValueError(f"step {step}: {bad[0]} is not finite, so no checkpoint was written")
        note = {**note, "checksums": {name: int(total) for name, (total, _) in sums.items()}}
        try:
            if self._manager is None:
                self._manager = ocp.CheckpointManager(self.folder, options=self._options)
            self._manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(dict(arrays)), note=ocp.args.JsonSave(note)),
                force=True,
            )
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the storage layer raises: no space, no permission, no folder
            self._manager = None
            last = max((s for s in self.steps() if s != step), default=None)
            left = "there is none before it" if last is None else f"the one of step {last} is untouched"
            raise OSError(f"{self.folder}: no checkpoint of step {step} could be written ({error}); {left}") from error

    def restore(self, like: Mapping[str, Array]) -> tuple[int, dict[str, Array], dict[str, Any]] | None:
        """The newest whole checkpoint: (step, arrays, note); None if there is none at all.

        Damaged ones are reported and moved aside, into ``damaged`` beside the folder.

        Args:
          like: arrays, or their shapes, dtypes and shardings, by name. A checkpoint may hold more: it is not read.

        Raises:
          ValueError: if there are checkpoints and none can be read. They are left where they are.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                arrays, note = self._read(step, like)
            except Exception as error:  # damaged files fail in many ways
                problems[step] = " ".join(str(error).split())[:200] or type(error).__name__
                continue
            for damaged, problem in problems.items():
                aside = self.folder.parent / "damaged" / str(damaged)
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                shutil.move(self.folder / str(damaged), aside)
                logging.getLogger("manyheads").warning(
                    "checkpoint of step %d is damaged (%s) and moved to %s; using that of step %d",
                    damaged, problem, aside, step,
                )  # fmt: skip
            return step, arrays, note
        if problems:
            step, problem = next(iter(problems.items()))
            raise ValueError(
                f"{self.folder}: none of the {len(problems)} checkpoints can be read; step {step}: {problem}"
            )
        return None

    def _read(self, step: int, like: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
        folder = self.folder / str(step)
        note = json.loads((folder / "note" / "metadata").read_text(encoding="utf-8"))
        missing = like.keys() - note["checksums"].keys()
        if missing:
            raise ValueError(f"it has no array {min(missing)}")
        shapes = {name: ocp.utils.to_shape_dtype_struct(x) for name, x in like.items()}
        with ocp.PyTreeCheckpointer() as reader:
            arrays = reader.restore(
                folder / "arrays",
                args=ocp.args.PyTreeRestore(
                    item=shapes,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                    partial_restore=True,
                ),
            )
        for name, (total, _) in jax.device_get(_checksums(arrays)).items():
            if int(total) != note["checksums"][name]:
                raise ValueError(f"the checksum of {name} is {int(total)}, not {note['checksums'][name]}")
            if arrays[name].shape != like[name].shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, not {like[name].shape}")
        return arrays, note
