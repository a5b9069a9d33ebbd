import json

import grain
import numpy as np
import pytest

from manyheads.experiments.data.batching import fixed_batches, shuffled_indices


def take(dataset: grain.MapDataset, steps: int) -> tuple[np.ndarray, np.ndarray]:
    epochs, indices = zip(*(dataset[step] for step in range(steps)))
    return np.concatenate(epochs), np.concatenate(indices)


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_visits_every_example_once(seed, length, batch_size):
    epochs, indices = take(shuffled_indices(length, batch_size, seed=seed), 3 * length)
    assert len(epochs) == 3 * length * batch_size
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(length))
    assert (np.diff(epochs) >= 0).all()


def test_orders_differ_between_epochs_and_seeds_only(seed):
    def orders(seed):
        return take(shuffled_indices(50, 10, seed=seed), 10)[1].reshape(2, 50)

    first, second = orders(seed)
    assert (first != second).any()
    np.testing.assert_array_equal(orders(seed), (first, second))
    assert (orders(seed + 1)[0] != first).any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_together_are_the_whole_batch(seed, count):
    whole = shuffled_indices(10, 8, seed=seed)
    shards = [shuffled_indices(10, 8, seed=seed, shard_index=i, shard_count=count) for i in range(count)]
    for step in range(5):
        parts = [shard[step][1] for shard in shards]
        assert {len(part) for part in parts} == {8 // count}
        np.testing.assert_array_equal(np.stack(parts, axis=1).ravel(), whole[step][1])


def test_iterator_resumes_from_its_saved_state(seed):
    def iterator():
        return iter(shuffled_indices(10, 4, seed=seed).to_iter_dataset())

    running = iterator()
    for _ in range(7):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    expected = [next(running)[1] for _ in range(5)]
    resumed = iterator()
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed)[1] for _ in range(5)], expected)
    assert len(json.dumps(state)) < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index=2 is not from 0 to shard_count-1=1"),
        ({"shard_count": 0}, "shard_index=0 is not from 0"),
        ({"shard_count": 3}, "batch_size=8 is not a multiple of shard_count=3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        shuffled_indices(10, **{"batch_size": 8, "seed": 0, **arguments})


def test_fixed_batches_have_one_size():
    examples = {"x": np.arange(10), "y": -np.arange(10)}
    batches = fixed_batches(examples, 4)
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all((batch["y"] == -batch["x"]).all() for batch in batches)
    (short,) = fixed_batches(examples, 16)
    np.testing.assert_array_equal(short["x"], np.arange(10))
