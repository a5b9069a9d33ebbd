"""Choice of an implementation by name or by device. A named one that cannot run raises; nothing falls back silently."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")

logger = logging.getLogger("manyheads")


@functools.cache
def _log_choice(primitive: str, implementation: str, device: str) -> None:
    logger.info("%s: implementation %r chosen for %s", primitive, implementation, device)


def choose(primitive: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """The function for ``implementation``, or the best available one for the default device if it is None.

    Args:
      primitive: name for messages.
      implementation: one of ``IMPLEMENTATIONS`` or None.
      available: the implementations that this primitive has.

    Raises:
      ValueError: for an unknown name, or one that this primitive or this device does not have.
    """
    device = jax.default_backend()
    if implementation is None:
        native = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(device, "xla")
        implementation = native if native in available else "xla"
        _log_choice(primitive, implementation, device)
        return available[implementation]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{primitive}: implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation not in available:
        raise ValueError(
            f"{primitive}: implementation={implementation!r} does not exist for it; it has {', '.join(available)}"
        )
    return available[implementation]
