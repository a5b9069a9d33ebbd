"""Device meshes with the five axes that every sharding rule of this workspace speaks about."""

import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "sequence", "expert")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1) -> Mesh:
    """A mesh over all devices with the axes data, fsdp, tensor, sequence and expert.

    Args:
      data, fsdp, tensor, sequence, expert: devices along each axis. One of them may be -1: it takes the devices
        that the others leave. Axes of size 1 cost nothing.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence, expert)))
    devices = jax.device_count()
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"make_mesh: at most one axis may be -1, got {', '.join(free)}")
    if any(size < 1 for axis, size in sizes.items() if axis not in free):
        raise ValueError(f"make_mesh: sizes must be positive (or one of them -1), got {sizes}")
    known = math.prod(size for axis, size in sizes.items() if axis not in free)
    if devices % known or (not free and known != devices):
        raise ValueError(f"make_mesh: {sizes} does not fit {devices} devices")
    if free:
        sizes[free[0]] = devices // known
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
