import itertools
from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

from manyheads.experiments.tasks.mqar import IGNORE, MQARData, mqar_batch, mqar_batch_jax


def draw_jax(seed: int, batch: int, **options) -> dict[str, np.ndarray]:
    drawn = jax.jit(partial(mqar_batch_jax, batch=batch, **options))(jax.random.key(seed))
    return {name: np.asarray(array) for name, array in drawn.items()}


FORMS = pytest.mark.parametrize("draw", [mqar_batch, draw_jax], ids=["numpy", "jax"])
SIZES = [(256, 64, 8), (128, 32, 8), (33, 32, 1), (17, 16, 4), (18, 17, 2)]


def query_slots(batch: dict[str, np.ndarray], pairs: int) -> np.ndarray:
    """Slot of the query of each pair, in the order of the pairs: [B, K]."""
    inputs, tail = batch["inputs"], batch["inputs"][:, 2 * pairs :]
    keys = inputs[:, 0 : 2 * pairs : 2]
    return (tail[:, None, :] == keys[:, :, None]).argmax(axis=2) // 2


@FORMS
@pytest.mark.parametrize(("vocab_size", "length", "pairs"), SIZES)
@pytest.mark.parametrize("random_non_queries", [False, True])
def test_every_sequence_is_as_specified(draw, vocab_size, length, pairs, random_non_queries, seed):
    options = {"vocab_size": vocab_size, "length": length, "pairs": pairs, "random_non_queries": random_non_queries}
    batch = draw(seed, 100, **options)
    for name in ("inputs", "labels"):
        assert batch[name].shape == (100, length) and batch[name].dtype == np.int32
    noise = []
    for inputs, labels in zip(batch["inputs"], batch["labels"]):
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < vocab_size // 2
        assert values.min() >= vocab_size // 2 and values.max() < vocab_size
        (asked,) = np.nonzero(labels != IGNORE)
        assert len(asked) == pairs and asked.min() >= 2 * pairs and (asked % 2 == 0).all()
        assert sorted(inputs[asked]) == sorted(keys)
        memory = dict(zip(keys, values))
        assert [memory[key] for key in inputs[asked]] == labels[asked].tolist()
        noise.append(np.delete(inputs, [*range(2 * pairs), *asked]))
    noise = np.concatenate(noise)
    if random_non_queries:
        assert noise.min() >= 0 and noise.max() < vocab_size and len(set(noise)) > vocab_size / 2
    else:
        assert (noise == 0).all()


@FORMS
@pytest.mark.parametrize("power", [0.01, 0.6, 1.0])
def test_gaps_follow_the_power_law_without_replacement(draw, power, seed):
    # (16 - 4) / 2 = 6 slots for two pairs: the exact probability of every ordered pair of slots is p_i p_j / (1 - p_i).
    count = 20_000
    slots = query_slots(draw(seed, count, vocab_size=32, length=16, pairs=2, power=power), 2)
    outcomes = list(itertools.permutations(range(6), 2))
    observed = [np.count_nonzero((slots == outcome).all(axis=1)) for outcome in outcomes]
    assert sum(observed) == count

    def p_value(power: float) -> float:
        p = power * np.arange(1, 7) ** (power - 1.0)
        p /= p.sum()
        expected = [count * p[i] * p[j] / (1 - p[i]) for i, j in outcomes]
        return stats.chisquare(observed, expected).pvalue

    assert p_value(power) > 1e-6
    assert p_value(power + 0.2) < 1e-6  # The test sees a wrong power.


@FORMS
@pytest.mark.parametrize(("part", "low", "high"), [(0, 1, 8), (1, 8, 17)], ids=["keys", "values"])
def test_keys_and_values_are_uniform(draw, part, low, high, seed):
    count = 20_000
    drawn = draw(seed, count, vocab_size=17, length=16, pairs=2)["inputs"][:, part : part + 3 : 2]
    outcomes = list(itertools.permutations(range(low, high), 2))
    observed = [np.count_nonzero((drawn == outcome).all(axis=1)) for outcome in outcomes]
    assert sum(observed) == count
    assert stats.chisquare(observed).pvalue > 1e-6


@FORMS
def test_batches_are_a_function_of_the_seed(draw, seed):
    np.testing.assert_array_equal(draw(seed, 8)["inputs"], draw(seed, 8)["inputs"])
    assert (draw(seed, 8)["inputs"] != draw(seed + 1, 8)["inputs"]).any()


@FORMS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs=0 must be positive"),
        ({"pairs": 17}, "pairs=17 is more than a quarter of length=64"),
        ({"vocab_size": 64}, "vocab_size=64 must be greater than length=64"),
        ({"power": 0.0}, "power=0.0 must be positive"),
    ],
)
def test_sizes_that_do_not_fit(draw, options, message):
    with pytest.raises(ValueError, match=message):
        draw(0, 4, **options)
    with pytest.raises(ValueError, match=message):
        MQARData(**options)


def test_data_is_a_fixed_set_in_a_new_order_every_epoch(seed):
    data = MQARData(train_examples=40, test_examples=35, batch_size=10)
    dataset = data.train(seed)
    rows = [tuple(row) for step in range(8) for row in np.hstack([*dataset[step].values()])]
    first, second = rows[:40], rows[40:]
    assert first != second
    assert set(first) == set(second) and len(set(first)) == 40
    assert (data.train(seed + 1)[0]["inputs"] != dataset[0]["inputs"]).any()
    np.testing.assert_array_equal(data.train(seed)[7]["labels"], dataset[7]["labels"])


def test_test_set_is_fixed_and_not_in_the_training_set(seed):
    data = MQARData(train_examples=400, test_examples=35, batch_size=10)
    test = data.test()
    assert [batch["inputs"].shape for batch in test] == [(10, 64)] * 3
    np.testing.assert_array_equal(data.test()[2]["inputs"], test[2]["inputs"])
    for train_seed in (0, seed):
        trained = {tuple(row) for step in range(40) for row in data.train(train_seed)[step]["inputs"]}
        assert not trained & {tuple(row) for batch in test for row in batch["inputs"]}


def test_data_shards(seed):
    data = MQARData(train_examples=40, batch_size=10)
    shards = [data.train(seed, shard_index=i, shard_count=2)[0]["inputs"] for i in range(2)]
    np.testing.assert_array_equal(np.stack(shards, axis=1).reshape(10, 64), data.train(seed)[0]["inputs"])


@pytest.mark.parametrize("field", ["train_examples", "test_examples", "batch_size"])
def test_data_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be positive"):
        MQARData(**{field: 0})


def test_negative_seed():
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        MQARData().train(-1)
