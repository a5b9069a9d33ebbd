"""The contract that every sequence mixer keeps, and the registry that finds one by name.

A sequence mixer maps ``x: B T D`` to ``y: B T D`` in two forms that agree::

    y = mixer(x, segment_ids=None)                   # parallel form, for training
    state = mixer.init_state(batch, capacity)        # a frozen dataclass and pytree: explicit, never hidden
    y, state = mixer.extend(x, state, lengths=None)  # the next n tokens, any n >= 1: prefill, chunk or decode step

What holds for every registered mixer (``tests/contracts`` checks each of these):

- splitting a sequence anywhere and calling ``extend`` on the pieces equals one parallel call;
- with ``lengths: B`` only the first ``lengths[b]`` tokens of row ``b`` enter the state, so a batch of prompts of unequal
  length is one call; outputs past a row's length are undefined;
- a causal mixer's output at t does not depend on inputs after t;
- tokens with different ``segment_ids: B T`` never meet. The ids of a packed row are constant within a document and
  change at its border; an id is not used again later in the row. Padding is a segment like any other;
- the size of the state is what ``MixerInfo.state`` says.

A mixer is built as ``Mixer(d_model, *, ..., rngs)``: explicit keyword options, each annotated with a class or a union of
classes, and ``rngs: nnx.Rngs`` last. Options named ``num_heads``, ``num_kv_heads``, ``head_dim`` and ``position`` mean the
same everywhere, so that a model can set them once for all of its mixers.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int

__all__ = ["MixerInfo", "SequenceMixer", "make_mixer", "mixer_info", "mixer_names", "register_mixer", "unknown_name"]


@runtime_checkable
class SequenceMixer(Protocol):
    """What a sequence mixer does; see the module docstring for the laws."""

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Mix whole sequences in parallel."""

    def init_state(self, batch: int, capacity: int) -> Any:
        """The state before the first token, with room for ``capacity`` tokens where the state grows."""

    def extend(
        self, x: Float[Array, "B n D"], state: Any, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], Any]:
        """Mix the next n tokens and return the state after them."""


@dataclass(frozen=True)
class MixerInfo:
    """What the registry knows about a mixer.

    Attributes:
      name: the name in patterns and on the command line.
      constructor: ``constructor(d_model, *, ..., rngs)``.
      title: the title of the paper that proposed it.
      year: the year of that paper.
      paper: its number in the corpus, or None.
      causal: whether the output at t depends on inputs up to t only.
      decodes: whether ``init_state`` and ``extend`` exist.
      state: "fixed" if the decode state never grows with the capacity, "capacity" if under some options it does.
      variants: options under which the contract suite runs the mixer besides its defaults.
    """

    name: str
    constructor: Callable[..., nnx.Module]
    title: str
    year: int
    paper: str | None = None
    causal: bool = True
    decodes: bool = True
    state: Literal["fixed", "capacity"] = "fixed"
    variants: tuple[Mapping[str, Any], ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that the constructor takes, without ``rngs``."""
        # Of __init__, since Flax gives its classes a call without a signature; self and d_model are no options.
        names = list(inspect.signature(self.constructor.__init__).parameters)[2:]
        return tuple(name for name in names if name != "rngs")


_REGISTRY: dict[str, MixerInfo] = {}


def register_mixer(name: str, **info: Any) -> Callable[[type], type]:
    """Class decorator that registers a mixer under ``name``; ``info`` holds the fields of ``MixerInfo``."""

    def register(constructor: type) -> type:
        if name in _REGISTRY:
            raise ValueError(f"mixer {name!r} is registered twice")
        _REGISTRY[name] = MixerInfo(name=name, constructor=constructor, **info)
        return constructor

    return register


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> ValueError:
    """The one error for a name that is not in a list: what came, the nearest name, what is allowed."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed)}")


def mixer_names() -> tuple[str, ...]:
    """Names of all registered mixers, sorted."""
    return tuple(sorted(_REGISTRY))


def mixer_info(name: str) -> MixerInfo:
    """The registration of mixer ``name``; ValueError with the nearest name if there is none."""
    if name not in _REGISTRY:
        raise unknown_name("mixer", name, _REGISTRY)
    return _REGISTRY[name]


def parse_mixer(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name"`` or ``"name(option=value, ...)"`` into the name and its options, both checked.

    Values are Python literals of the annotated type: ``softmax(window=64, sinks=True)``.
    """
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            name, options = node.id, {}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            name = node.func.id
            options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            if None in options or len(options) < len(node.keywords):
                raise ValueError("** and repeated options are not allowed")
        else:
            raise ValueError("neither a name nor a call")
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"mixer {spec!r} is not of the form name or name(option=value, ...)") from None
    info = mixer_info(name)
    for option, value in options.items():
        if option not in info.options:
            raise unknown_name(f"option of mixer {name!r}", option, info.options)
        kind = info.constructor.__init__.__annotations__[option]
        if not isinstance(value, kind) and not (isinstance(value, int) and isinstance(1.0, kind)):
            raise ValueError(f"option {option}={value!r} of mixer {name!r} must be {inspect.formatannotation(kind)}")
    return name, options


def make_mixer(spec: str, d_model: int, *, defaults: Mapping[str, Any] | None = None, rngs: nnx.Rngs) -> nnx.Module:
    """Build a mixer from its name or ``"name(option=value, ...)"``.

    Args:
      spec: the mixer and its options.
      d_model: model features D.
      defaults: options of the surrounding model; each is passed on if the mixer has it and ``spec`` does not set it.
      rngs: source of the initial parameters.
    """
    name, options = parse_mixer(spec)
    info = mixer_info(name)
    inherited = {key: value for key, value in (defaults or {}).items() if key in info.options}
    return info.constructor(d_model, **{**inherited, **options}, rngs=rngs)
