"""Decoders in folders: ``config.json`` holds the fields of ``DecoderConfig``, ``model.safetensors`` every array.

An array is named by its path in the model: ``embedding.table``, ``repeats.0.mixer.query.kernel`` (stacked over the
repeats), ``rest.2.feed_forward.up.kernel``.
"""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from flax import nnx

from manyheads.architectures.language.decoder import Decoder, DecoderConfig
from manyheads.architectures.model_files import CONFIG, TENSORS, read_json, read_tensors, write_model
from manyheads.layers.mixer import unknown_name

__all__ = ["abstract_decoder", "decoder_config", "load_decoder", "named_leaves", "save_decoder", "with_leaves"]


def save_decoder(model: Decoder, folder: str | Path) -> None:
    """Write a decoder to ``config.json`` and ``model.safetensors``; a model already there is replaced.

    Raises:
      OSError: if the folder cannot be written. What it held before stays as it was.
    """
    write_model(Path(folder), dataclasses.asdict(model.config), named_leaves(model))


def load_decoder(folder: str | Path) -> Decoder:
    """Read a decoder that ``save_decoder`` wrote.

    Raises:
      ValueError: a file that is missing or damaged, a setting that is not allowed, or a tensor that is missing,
        unexpected or of another shape than the settings ask for.
    """
    folder = Path(folder)
    model = abstract_decoder(decoder_config(read_json(folder / CONFIG), source=folder / CONFIG))
    expected = {name: leaf.shape for name, leaf in named_leaves(model).items()}
    return with_leaves(model, read_tensors([folder / TENSORS], expected))


def decoder_config(fields: Mapping[str, Any], *, source: object) -> DecoderConfig:
    """The settings of a decoder from a mapping as JSON gives it; a field that is absent has its default.

    Args:
      fields: values of the fields of ``DecoderConfig`` by name.
      source: where they come from, for the errors.

    Raises:
      ValueError: for an unknown field, or a value that is not allowed.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    hints = get_type_hints(DecoderConfig)
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"{source}: {unknown_name('field', name, hints)}")
        if not _is(value, hints[name]):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"{source}: {name}={value!r} is not of type {kind}")
    try:
        return DecoderConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _is(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(item, arguments[0]) for item in value)
    if origin is Literal:
        return value in arguments
    if isinstance(value, bool):  # which Python takes for an int
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """A decoder whose leaves have shapes and dtypes but no values."""
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def named_leaves(model: nnx.Module) -> dict[str, Any]:
    """Every array of a model by the path to it, in the order of the leaves."""
    paths = jax.tree_util.tree_leaves_with_path(model)  # each ends with the value inside the Variable
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf for path, leaf in paths}


def with_leaves(model: Decoder, arrays: Mapping[str, Any]) -> Decoder:
    """The model with the given arrays as its leaves, one for each name in ``named_leaves(model)``."""
    return jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(arrays[name]) for name in named_leaves(model)])
