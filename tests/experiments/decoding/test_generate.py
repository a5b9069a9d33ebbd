import dataclasses
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from manyheads.architectures.language import Decoder, DecoderConfig
from manyheads.experiments.decoding.generate import PADDING, generate
from manyheads.layers import mixer

generate_module = sys.modules["manyheads.experiments.decoding.generate"]

TINY = DecoderConfig(
    vocab_size=13, d_model=16, num_layers=2, num_heads=2, hidden=16, mixers=("softmax(num_kv_heads=1)", "lightning")
)
CONFIGS = {
    "hybrid": TINY,
    "scan with a layer left over": dataclasses.replace(
        TINY, mixers=("softmax(window=4, first_tokens=1)", "lightning"), num_layers=5
    ),
    "learned positions": dataclasses.replace(TINY, position="learned", max_length=24),
}
SAMPLED = {"temperature": 1.5, "top_p": 0.99, "stop_tokens": [5]}


def random_model(config, seed):
    """A decoder with parameters so large that its greedy tokens vary."""
    noise = np.random.default_rng(seed)
    larger = lambda x: x + 0.5 * noise.standard_normal(x.shape, np.float32) * (x.ndim > 1)
    graph, parameters, rest = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(larger, parameters), rest)


@pytest.fixture
def model(seed):
    return random_model(TINY, seed)


@pytest.fixture
def prompts(rng):
    """Four prompts of unequal length, one of a single token."""
    return [rng.integers(TINY.vocab_size, size=length) for length in (7, 1, 12, 4)]


_forward = jax.jit(lambda model, tokens: model(tokens))


def next_logits(model, tokens):
    """Logits after a sequence of at most 24 tokens, by the parallel form."""
    padded = np.zeros((1, 24), np.int32)  # what comes after does not matter
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model, padded)[0, len(tokens) - 1])


def naive(model, prompt, count):
    """Greedy tokens, each from all tokens before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(next_logits(model, tokens))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_equals_the_naive_loop(config, seed, prompts):
    model = random_model(config, seed)
    result = generate(model, prompts, max_new_tokens=12)
    assert result.tokens.shape == (4, 12)
    assert result.lengths.tolist() == [12] * 4
    assert not result.stopped.any()
    for prompt, row in zip(prompts, result.tokens):
        assert row.tolist() == naive(model, prompt, 12)


def test_a_row_does_not_depend_on_the_batch(model, prompts):
    together = generate(model, prompts, max_new_tokens=9)
    for prompt, row in zip(prompts, together.tokens):
        alone = generate(model, [prompt], max_new_tokens=9, capacity=21)  # exactly what the longest needs
        np.testing.assert_array_equal(alone.tokens[0], row)


def test_an_array_and_an_unrolled_model(seed, rng):
    model = random_model(CONFIGS["scan with a layer left over"], seed)
    prompts = rng.integers(TINY.vocab_size, size=(4, 6))
    result = generate(model, prompts, max_new_tokens=5)
    again = generate(model.unrolled(), [list(row) for row in prompts], max_new_tokens=5, capacity=64)
    np.testing.assert_array_equal(result.tokens, again.tokens)


def test_stop_tokens_end_rows(model, prompts):
    free = generate(model, prompts, max_new_tokens=12).tokens
    stops = {int(free[0, 3]), int(free[2, 8])}
    result = generate(model, prompts, max_new_tokens=12, stop_tokens=stops)
    for row, tokens, length, stopped in zip(free, result.tokens, result.lengths, result.stopped):
        ends = np.flatnonzero(np.isin(row, list(stops)))
        expected = ends[0] if len(ends) else 12
        assert (length, stopped) == (expected, bool(len(ends)))
        np.testing.assert_array_equal(tokens[:expected], row[:expected])
        assert (tokens[expected:] == PADDING).all()


def test_decoding_ends_with_the_last_row(model, monkeypatch):
    calls = []
    decode = generate_module._decode
    monkeypatch.setattr(generate_module, "_decode", lambda *args: calls.append(decode(*args)) or calls[-1])
    free = generate(model, [[1, 2, 3]], max_new_tokens=6).tokens[0]
    calls.clear()
    result = generate(model, [[1, 2, 3]], max_new_tokens=50, stop_tokens=[int(free[5])])
    assert result.stopped[0]
    steps = int(calls[-1].step) if calls else 1  # the prefill gives the first token
    assert steps == result.lengths[0] + 1 <= 6


@pytest.mark.parametrize("budget", [1, 7, 8, 9, 20])
def test_on_token_sees_every_token_in_order(model, prompts, budget):
    seen = [[] for _ in prompts]
    result = generate(
        model, prompts, max_new_tokens=budget, on_token=lambda row, token: seen[row].append(token), **SAMPLED
    )
    for row, length, tokens in zip(result.tokens, result.lengths, seen):
        assert row[:length].tolist() == tokens
    np.testing.assert_array_equal(result.tokens, generate(model, prompts, max_new_tokens=budget, **SAMPLED).tokens)


def test_on_token_ends_a_row(model, prompts):
    free = generate(model, prompts, max_new_tokens=30).tokens
    counts = [0] * 4

    def on_token(row, token):
        counts[row] += 1
        return row in (1, 3) and counts[row] == 3 * row

    result = generate(model, prompts, max_new_tokens=30, on_token=on_token)
    assert result.lengths.tolist() == counts == [30, 3, 30, 9]
    assert result.stopped.tolist() == [False, True, False, True]
    for row, tokens, length in zip(free, result.tokens, counts):
        assert tokens.tolist() == row[:length].tolist() + [PADDING] * (30 - length)


def test_the_seed_decides(model, prompts):
    tokens = [generate(model, prompts, max_new_tokens=15, seed=s, **SAMPLED).tokens.tolist() for s in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_tokens_follow_the_distribution_of_the_model(model, seed):
    rows, prompt = 2000, [3, 1, 4]
    tokens = generate(model, np.tile(prompt, (rows, 1)), max_new_tokens=2, temperature=3.0, top_k=6, seed=seed).tokens
    likely = np.bincount(tokens[:, 0]).argmax()
    second = tokens[tokens[:, 0] == likely, 1]
    for context, drawn, tolerance in ((prompt, tokens[:, 0], 0.08), ([*prompt, likely], second, 0.2)):
        logits = next_logits(model, context).astype(np.float64) / 3
        logits[np.argsort(logits)[:-6]] = -np.inf
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        frequencies = np.bincount(drawn, minlength=TINY.vocab_size) / len(drawn)
        assert frequencies[expected == 0].sum() == 0
        np.testing.assert_allclose(frequencies, expected, atol=tolerance)


def test_settings_of_a_call_do_not_recompile(model, prompts, rng):
    def sizes():
        return generate_module._prefill._cache_size(), generate_module._decode._cache_size()

    generate(model, prompts, max_new_tokens=10, **SAMPLED)
    before = sizes()
    for length, budget, temperature, stop in ((3, 20, 0.5, 1), (30, 11, 2.0, 12)):
        options = {"temperature": temperature, "top_p": 0.5, "stop_tokens": [stop], "seed": length}
        generate(model, rng.integers(13, size=(4, length)), max_new_tokens=budget, **options)
    assert sizes() == before


def test_the_cache_is_updated_in_place(model, monkeypatch):
    class Captured(Exception):
        pass

    def capture(*args):
        raise Captured(args)

    decode = generate_module._decode
    monkeypatch.setattr(generate_module, "_decode", capture)
    with pytest.raises(Captured) as captured:
        generate(model, [[1, 2]] * 4, max_new_tokens=3, capacity=1024)
    memory = decode.lower(*captured.value.args[0]).compile().memory_analysis()
    cache = 2 * 4 * 1024 * 8 * 4  # keys and values, rows, tokens, features, bytes
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompts[1] is empty"),
        ([[[1, 2]]], {}, "prompts[0] has shape [1, 2]"),
        ([[1.0]], {}, "prompts[0] has dtype float64"),
        ([[0], [12, 13]], {}, "prompts[1] holds token 13, allowed: 0 to 12"),
        ([[-1]], {}, "prompts[0] holds token -1, allowed: 0 to 12"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1] * 9], {"capacity": 8}, "prompts[0] has 9 tokens and max_new_tokens=4, together more than capacity=8"),
        (
            [[1], [1] * 6],
            {"capacity": 8},
            "prompts[1] has 6 tokens and max_new_tokens=4, together more than capacity=8",
        ),
        ([[1]], {"stop_tokens": [13]}, "stop_tokens holds token 13, allowed: 0 to 12"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 2.0}, "top_p=2.0"),
    ],
)
def test_wrong_arguments_are_one_line(model, prompts, options, message):
    with pytest.raises(ValueError) as error:
        generate(model, prompts, **{"max_new_tokens": 4, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_position_beyond_the_learned_ones(seed):
    model = random_model(CONFIGS["learned positions"], seed)
    generate(model, [[1] * 20], max_new_tokens=4)
    with pytest.raises(ValueError, match="21 tokens and max_new_tokens=4, together more than max_length=24"):
        generate(model, [[1] * 21], max_new_tokens=4)


def test_a_mixer_that_does_not_decode(model, monkeypatch):
    info = dataclasses.replace(mixer.mixer_info("lightning"), decodes=False)
    monkeypatch.setitem(mixer._REGISTRY, "lightning", info)
    with pytest.raises(ValueError, match="mixers: 'lightning' does not decode"):
        generate(model, [[1]], max_new_tokens=1)
