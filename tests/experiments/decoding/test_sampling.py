import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from manyheads.experiments.decoding.sampling import check_sampling, greedy, keep_top_k, keep_top_p, sample


def softmax(x):
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    return y / y.sum(axis=-1, keepdims=True)


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """What ``sample`` draws from, for one row, from the definition."""
    probabilities = softmax(np.asarray(logits, np.float64) / temperature)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    if top_p is not None and top_p < 1:
        total, kept = sum(probabilities[order]), []
        while sum(probabilities[kept]) < top_p * total:
            kept.append(order[len(kept)])
        order = kept
    kept = np.zeros(len(logits))
    kept[order] = probabilities[order]
    return kept / kept.sum()


def test_greedy_takes_the_lower_of_equal_tokens():
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-jnp.inf, -5.0, -7.0, -5.0]])
    assert greedy(logits).tolist() == [1, 1]
    assert greedy(logits).dtype == jnp.int32


def test_top_k_keeps_k_with_ties_by_id(rng):
    logits = rng.integers(4, size=(50, 30)).astype(np.float32)  # long runs of equal values
    for k in (1, 2, 7, 29, 30, 31, 1000):
        kept = np.asarray(keep_top_k(jnp.asarray(logits), k))
        for row, result in zip(logits, kept):
            expected = np.sort(np.lexsort((np.arange(30), -row))[:k])
            np.testing.assert_array_equal(np.flatnonzero(np.isfinite(result)), expected)
            np.testing.assert_array_equal(result[expected], row[expected])


def test_top_p_keeps_the_fewest(rng):
    logits = rng.normal(size=(50, 30)).astype(np.float32) * 3
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        kept = np.asarray(keep_top_p(jnp.asarray(logits), p))
        for row, result in zip(logits, kept):
            np.testing.assert_array_equal(np.isfinite(result), distribution(row, top_p=p) > 0)
            np.testing.assert_array_equal(result[np.isfinite(result)], row[np.isfinite(result)])


def test_top_p_of_equal_tokens_keeps_the_lower_ids():
    logits = jnp.zeros((1, 8))
    assert np.isfinite(keep_top_p(logits, 0.5)).tolist() == [[True] * 4 + [False] * 4]
    assert np.isfinite(keep_top_p(logits, 0.51)).tolist() == [[True] * 5 + [False] * 3]


def test_top_p_of_one_keeps_everything():
    logits = jnp.linspace(0, -80, 50_000)[None]  # in float32 the probabilities sum to 1 long before the end
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)
    np.testing.assert_array_equal(keep_top_p(logits, jnp.float32(1.0)), logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
        {"temperature": 0.7, "top_p": 0.9},
    ],
    ids=str,
)
def test_the_distribution(options, seed, rng):
    logits = rng.normal(size=8).astype(np.float32) * 1.5
    draws = 20_000
    tokens = sample(jax.random.key(seed), jnp.tile(logits, (draws, 1)), **options)
    expected = distribution(logits, **options) * draws
    counts = np.bincount(tokens, minlength=8)
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-7


def test_the_order_is_temperature_then_top_k_then_top_p(seed):
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    rows = jnp.tile(logits, (500, 1))
    key = jax.random.key(seed)
    # Of the first two, renormalised, 0.4 / 0.7 < 0.6: both stay. Of all four, the first two have 0.7 as well, but with
    # p = 0.55 the first has 0.57 of two and 0.4 of four.
    assert set(sample(key, rows, top_k=2, top_p=0.6).tolist()) == {0, 1}
    assert set(sample(key, rows, top_k=2, top_p=0.55).tolist()) == {0}
    assert set(sample(key, rows, top_p=0.55).tolist()) == {0, 1}
    # A temperature of 1/4 gives the first 0.74, more than p.
    assert set(sample(key, rows, temperature=0.25, top_p=0.7).tolist()) == {0}


def test_rows_are_independent_and_keys_decide(seed):
    logits = jnp.zeros((64, 100))
    one, two = (sample(jax.random.key(s), logits).tolist() for s in (seed, seed + 1))
    assert one == sample(jax.random.key(seed), logits).tolist()
    assert one != two
    assert len(set(one)) > 10


def test_temperature_zero_is_greedy(rng, seed):
    logits = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)
    assert sample(jax.random.key(seed), logits, temperature=0.0, top_p=0.5).tolist() == greedy(logits).tolist()
    assert sample(jax.random.key(seed), logits, top_k=1).tolist() == greedy(logits).tolist()


def test_options_may_be_traced(rng, seed):
    logits = jnp.asarray(rng.normal(size=(64, 11)), jnp.float32)
    traced = jax.jit(lambda t, p: sample(jax.random.key(seed), logits, temperature=t, top_k=5, top_p=p))
    for temperature, p in ((0.5, 0.7), (2.0, 1.0)):
        plain = sample(jax.random.key(seed), logits, temperature=temperature, top_k=5, top_p=p)
        assert traced(temperature, p).tolist() == plain.tolist()
    assert traced._cache_size() == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ((-0.1, None, None), "temperature=-0.1 must be a number from 0 up"),
        ((float("nan"), None, None), "temperature=nan"),
        ((float("inf"), None, None), "temperature=inf"),
        ((1.0, 0, None), "top_k=0 must be at least 1"),
        ((1.0, None, 0.0), "top_p=0.0 must be above 0 and at most 1"),
        ((1.0, None, 1.1), "top_p=1.1 must be above 0 and at most 1"),
        ((1.0, None, float("nan")), "top_p=nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(*options)
    with pytest.raises(ValueError, match=message):
        sample(jax.random.key(0), jnp.zeros((1, 3)), temperature=options[0], top_k=options[1], top_p=options[2])
