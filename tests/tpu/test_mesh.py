import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from manyheads.tpu import AXES, make_mesh


def test_all_devices_are_data_by_default():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (8, 1, 1, 1, 1)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_types == (AxisType.Auto,) * 5


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"tensor": 2}, (4, 1, 2, 1, 1)),
        ({"data": 2, "sequence": 2, "tensor": 2}, (2, 1, 2, 2, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1, 1)),
        ({"data": 1, "expert": -1, "sequence": 4}, (1, 1, 1, 4, 2)),
        ({"data": 1, "fsdp": 8, "tensor": -1}, (1, 8, 1, 1, 1)),
    ],
)
def test_sizes(sizes, shape):
    assert make_mesh(**sizes).devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"tensor": 3}, r"'tensor': 3.* does not fit 8 devices"),
        ({"data": 2, "tensor": 2}, r"'data': 2.* does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices"),
        ({"fsdp": -1}, "at most one axis may be -1, got data, fsdp"),
        ({"tensor": 0}, r"must be positive .*'tensor': 0"),
        ({"data": 8, "sequence": -2}, r"must be positive .*'sequence': -2"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(sizes, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        make_mesh(**sizes)
    assert "\n" not in str(error.value)


def test_arrays_are_spread_over_the_mesh(rng):
    mesh = make_mesh(data=2, sequence=2, tensor=2)
    x = rng.standard_normal((4, 8, 6)).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor")))
    assert {shard.data.shape for shard in spread.addressable_shards} == {(2, 4, 3)}
    np.testing.assert_allclose(jax.jit(lambda x: jnp.sum(x, axis=1))(spread), x.sum(1), rtol=1e-5, atol=1e-5)
