"""``manyheads list mixers|architectures|papers``: what the workspace knows by name."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from manyheads.experiments.arguments import parse
from manyheads.experiments.commands.output import print_rows

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads list``."""

    kind: Annotated[str, Positional, arg(metavar="mixers|architectures|papers")] = ""
    """What to list."""
    json: bool = False
    """Print JSON."""


def run(argv: list[str]) -> int:
    """Print a list, as a table or as JSON."""
    arguments = parse(Arguments, argv, prog="manyheads list", description="List what the workspace knows by name.")
    if not arguments.kind:
        raise ValueError(f"name what to list: {', '.join(_LISTS)}")
    if arguments.kind not in _LISTS:
        from manyheads.layers.mixer import unknown_name  # brings jax, which a list of papers can do without

        raise unknown_name("list", arguments.kind, _LISTS)
    columns, rows = _LISTS[arguments.kind]
    print_rows(columns, rows(), as_json=arguments.json)
    return 0


def _mixers() -> list[dict[str, Any]]:
    from manyheads.layers.mixer import mixer_info, mixer_names

    infos = map(mixer_info, mixer_names())
    return [vars(info) | {"options": info.options, "state": info.state if info.decodes else None} for info in infos]


def _architectures() -> list[dict[str, Any]]:
    from manyheads.architectures.registry import architecture_info, architecture_names

    return [vars(info) for info in map(architecture_info, architecture_names())]


def _papers() -> list[dict[str, Any]]:
    from manyheads.experiments.papers import load_papers

    return [asdict(paper) for paper in load_papers()]


_LISTS = {
    "mixers": (("name", "paper", "year", "causal", "decodes", "state", "options", "title"), _mixers),
    "architectures": (("name", "paper", "year", "title"), _architectures),
    "papers": (("number", "name", "kind", "title", "family"), _papers),
}
