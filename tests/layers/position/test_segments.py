import jax.numpy as jnp
import numpy as np

from manyheads.layers.position import segment_positions


def test_positions_restart_where_the_id_changes(rng):
    sizes = [rng.multinomial(40 - 6, np.ones(6) / 6) + 1 for _ in range(3)]
    ids = np.array([np.repeat(rng.permutation(50)[:6] - 20, row) for row in sizes])
    desired = np.array([np.concatenate([np.arange(n) for n in row]) for row in sizes])
    np.testing.assert_array_equal(segment_positions(jnp.asarray(ids)), desired)
