"""Command lines for frozen dataclasses: tyro parses and prints the help, and every mistake is one line.

A nested field is written ``--model.d_model 64`` (``-`` and ``_`` are the same), a field of several values takes them
one after the other (``--model.mixers softmax "softmax(window=64)"``), a boolean is ``--resume`` or ``--no-resume``.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

__all__ = ["parse"]

T = TypeVar("T")


def parse(type: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse ``argv`` into an instance of the dataclass ``type``.

    Args:
      type: a dataclass; its fields may be dataclasses. A field marked ``tyro.conf.Positional`` is set without its name.
      argv: the arguments after the command's own name.
      prog: the command as the user typed it, for the help.
      description: the first paragraph of the help.
      default: values of the fields that ``argv`` does not set, instead of those that ``type`` declares.

    Raises:
      ValueError: an unknown field; a value that is missing, of the wrong type or not among the choices; a required
        field that is not set; an argument that belongs to no field; or what ``__post_init__`` raises. Always one line.
      SystemExit: after ``--help``.
    """
    options: dict[str, Any] = {"args": argv, "prog": prog, "description": description}
    if default is not None:
        options["default"] = default
    if "-h" in argv or "--help" in argv:
        tyro.cli(type, **options)
    flags = dict(_flags(type, required=default is None))
    _check_names(argv, flags)
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            value, extra = tyro.cli(type, return_unknown_args=True, **options)
    except SystemExit as stop:
        raise _condense(stop, console.getvalue(), argv, flags) from None
    sys.stderr.write(console.getvalue())
    if extra:
        raise _unexpected(extra[0], argv, flags)
    return value


class _Flag(NamedTuple):
    """A field as the command line sees it."""

    annotation: Any
    required: bool


def _flags(type: Any, *, required: bool, prefix: str = "") -> Iterator[tuple[str, _Flag]]:
    """The flags of a dataclass and of those nested in it. What lies inside a field with a default is not required."""
    hints = get_type_hints(type, include_extras=True)
    for field in dataclasses.fields(type):
        annotation, marks = hints[field.name], []
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
        if not field.init or tyro.conf.Positional in marks:
            continue
        name = field.name.replace("_", "-")
        missing = required and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(annotation):
            yield from _flags(annotation, required=missing, prefix=f"{prefix}{name}.")
            continue
        yield f"--{prefix}{name}", _Flag(annotation, missing)
        if annotation is bool:
            yield f"--{prefix}no-{name}", _Flag(annotation, False)


def _flag_of(argument: str) -> str | None:
    """The flag that ``argument`` names, spelled as in the help; None if it is a value."""
    return argument.split("=")[0].replace("_", "-") if argument.startswith("--") else None


def _check_names(argv: Sequence[str], flags: Mapping[str, _Flag]) -> None:
    """Raise ValueError for a flag that does not exist, and for a required one that is not given."""
    given = [flag for flag in map(_flag_of, argv) if flag]
    for flag in given:
        if flag not in flags:
            raise _unknown_name("field", flag, flags)
    for flag, field in flags.items():
        if field.required and flag not in given:
            raise ValueError(f"{flag} is missing: it takes {_describe(field.annotation)} and has no default")


def _unexpected(argument: str, argv: Sequence[str], flags: Mapping[str, _Flag]) -> ValueError:
    """The error for an argument that belongs to no field."""
    before = _flag_of(argv[argv.index(argument) - 1]) if argument in argv[1:] else None
    if before in flags and flags[before].annotation is bool:
        return ValueError(f"{before} takes no value, got {argument!r}")
    return ValueError(f"unexpected argument {argument!r}: a field is set by its name, as in --name value")


def _condense(stop: SystemExit, console: str, argv: Sequence[str], flags: Mapping[str, _Flag]) -> ValueError:
    """The one line for what tyro printed in a box before it stopped.

    The box says which flag has a wrong value; it is read without blanks and frame, since lines break anywhere. If it
    names none, a dataclass refused its values, and that error is in the context of ``stop``.
    """
    text = re.sub(r"[\s│]", "", console)
    match = re.search(r"(?:Errorparsing|argument')(--[\w.-]+)", text)
    if match and match[1] in flags:
        flag, annotation = match[1], flags[match[1]].annotation
        values = _values(flag, argv)
        if get_origin(annotation) is Literal and values:
            return _unknown_name(flag, values[0], map(str, get_args(annotation)))
        got = repr(" ".join(values)) if values else "nothing"
        return ValueError(f"{flag} takes {_describe(annotation)}, got {got}")
    cause: BaseException | None = stop
    while cause and not isinstance(cause, ValueError):
        cause = cause.__context__
    return ValueError(" ".join((str(cause) if cause else console).split()))


def _values(flag: str, argv: Sequence[str]) -> list[str]:
    """The values that ``argv`` gives to ``flag``: those of its last occurrence, which counts."""
    position = max(index for index, argument in enumerate(argv) if _flag_of(argument) == flag)
    following = itertools.takewhile(lambda argument: not argument.startswith("--"), argv[position + 1 :])
    return [*argv[position].split("=", 1)[1:], *following]


def _describe(annotation: Any) -> str:
    """An annotation in the words of the help: ``int``, ``float | None``, ``rms | layer``, ``str ...``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_describe, arguments))
    if origin is tuple:
        return " ".join(map(_describe, arguments))
    names = {type(None): "None", ...: "..."}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _unknown_name(kind: str, name: str, allowed: Any) -> ValueError:
    """``unknown_name`` of the layers, imported here: they bring jax, which a correct command line can do without."""
    from manyheads.layers.mixer import unknown_name

    return unknown_name(kind, name, allowed)
