import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.architectures.language.decoder import Decoder, DecoderConfig
from manyheads.layers.linear import lightning_log_decay

BATCH, LENGTH, VOCAB = 3, 14, 19
SMALL = DecoderConfig(vocab_size=VOCAB, d_model=16, num_heads=2, hidden=24, max_length=32, num_layers=2)
HYBRID = dataclasses.replace(SMALL, mixers=("lightning", "softmax"), num_layers=4)
REMAINDER = dataclasses.replace(HYBRID, num_layers=5)
MODELS = {
    "softmax": SMALL,
    "lightning": dataclasses.replace(SMALL, mixers=("lightning",)),
    "hybrid": HYBRID,
    "remainder": REMAINDER,
    "learned positions": dataclasses.replace(SMALL, position="learned"),
    "all else": dataclasses.replace(
        SMALL, position="alibi", norm="layer", feed_forward="plain", activation="gelu", tie_embeddings=False,
        num_kv_heads=1, mixers=("softmax(window=4, position='rope')", "softmax", "short_conv"), num_layers=3,
    ),
    "mixers alone": dataclasses.replace(SMALL, feed_forward="none", scan_layers=False),
}  # fmt: skip
MODEL = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)

parallel = jax.jit(lambda model, tokens, segment_ids=None: model(tokens, segment_ids))
extend = jax.jit(
    lambda model, tokens, state, lengths=None, last_only=False: model.extend(
        tokens, state, lengths, last_only=last_only
    ),
    static_argnums=4,
)
gradient = jax.jit(jax.grad(lambda model, tokens: jnp.sum(jnp.sin(model(tokens)))))


def build(config, rng):
    return Decoder(config, rngs=nnx.Rngs(int(rng.integers(2**31))))


def draw(rng, length=LENGTH):
    return rng.integers(0, VOCAB, (BATCH, length)).astype(np.int32)


def assert_close(actual, desired, tolerance=2e-5):
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert np.abs(actual - desired).max() <= tolerance * np.abs(desired).max()


@MODEL
def test_pieces_equal_the_whole(config, rng):
    model, tokens = build(config, rng), draw(rng)
    whole = parallel(model, tokens)
    assert whole.shape == (BATCH, LENGTH, VOCAB) and whole.dtype == jnp.float32
    state, logits = model.init_state(BATCH, LENGTH), []
    for piece in np.split(tokens, [6, 12, 13], axis=1):
        y, state = extend(model, piece, state)
        logits.append(y)
    assert_close(np.concatenate(logits, axis=1), whole)
    np.testing.assert_array_equal(state.length, [LENGTH] * BATCH)


@pytest.mark.parametrize("name", ["hybrid", "learned positions"])
def test_prompts_of_unequal_length_are_one_call(name, rng):
    model, tokens = build(MODELS[name], rng), draw(rng)
    whole = np.asarray(parallel(model, tokens))
    lengths = np.array([1, 8, int(rng.integers(2, 8))], np.int32)
    rows = np.arange(BATCH)
    prompts = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], VOCAB - 1)
    logits, state = extend(model, prompts, model.init_state(BATCH, LENGTH), lengths, True)
    assert logits.shape == (BATCH, 1, VOCAB)
    assert_close(logits[:, 0], whole[rows, lengths - 1])
    np.testing.assert_array_equal(state.length, lengths)
    for step in range(3):
        at = lengths + step
        logits, state = extend(model, tokens[rows, at][:, None], state)
        assert_close(logits[:, 0], whole[rows, at])
    logits, _ = extend(model, draw(rng, 4), state, None, True)
    assert logits.shape == (BATCH, 1, VOCAB)


@pytest.mark.parametrize("name", ["hybrid", "learned positions"])
def test_packed_documents_are_what_they_are_alone(name, rng):
    model, tokens = build(MODELS[name], rng), draw(rng)
    border = int(rng.integers(2, LENGTH - 2))
    segment_ids = np.broadcast_to(np.where(np.arange(LENGTH) < border, 3, 1), (BATCH, LENGTH))
    packed = np.asarray(parallel(model, tokens, segment_ids))
    assert_close(packed[:, :border], parallel(model, tokens)[:, :border])
    assert_close(packed[:, border:], parallel(model, np.roll(tokens, -border, axis=1))[:, : LENGTH - border])


def test_logits_do_not_know_later_tokens(rng):
    model, tokens = build(HYBRID, rng), draw(rng)
    t = int(rng.integers(1, LENGTH))
    changed = tokens.copy()
    changed[:, t:] = (changed[:, t:] + 1) % VOCAB
    logits, logits_changed = np.asarray(parallel(model, tokens)), np.asarray(parallel(model, changed))
    np.testing.assert_array_equal(logits[:, :t], logits_changed[:, :t])
    assert np.all(logits[:, t:] != logits_changed[:, t:])


@pytest.mark.parametrize("config", [HYBRID, REMAINDER], ids=["hybrid", "remainder"])
def test_unrolled_is_the_same_model(config, rng):
    model, tokens = build(config, rng), draw(rng)
    assert len(model.rest) == config.num_layers % 2
    unrolled = model.unrolled()
    assert len(unrolled.rest) == config.num_layers and not unrolled.config.scan_layers
    assert hasattr(model, "repeats") and not hasattr(unrolled, "repeats")
    assert unrolled.unrolled() is unrolled
    assert_close(parallel(unrolled, tokens), parallel(model, tokens))
    logits, _ = extend(unrolled, tokens, unrolled.init_state(BATCH, LENGTH))
    assert_close(logits, parallel(model, tokens))
    # The structure is that of a model built without a scan, so its checkpoints fit.
    apart = build(dataclasses.replace(config, scan_layers=False), rng)
    assert jax.tree.structure(unrolled) == jax.tree.structure(apart)
    assert [leaf.shape for leaf in jax.tree.leaves(unrolled)] == [leaf.shape for leaf in jax.tree.leaves(apart)]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_layer_has_parameters_and_a_depth_of_its_own(scan_layers, rng):
    config = dataclasses.replace(REMAINDER, mixers=("lightning",), scan_layers=scan_layers)
    blocks = build(config, rng).unrolled().rest
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(block.mixer.log_decay[...], lightning_log_decay(2, i / 4), rtol=1e-3)
    kernels = np.array([block.mixer.query.kernel[...] for block in blocks])
    assert len(np.unique(kernels)) == kernels.size


def test_remat_changes_memory_and_nothing_else(rng):
    tokens, seed, results, saved = draw(rng), int(rng.integers(2**31)), {}, {}
    for remat in ("none", "dots", "full"):
        model = Decoder(dataclasses.replace(SMALL, remat=remat), rngs=nnx.Rngs(seed))
        results[remat] = jax.tree.leaves(gradient(model, tokens))
        kept = jax.eval_shape(lambda model: jax.vjp(lambda model: model(tokens), model)[1], model)
        saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(kept))
    for remat in ("dots", "full"):
        for actual, desired in zip(results[remat], results["none"]):
            assert_close(actual, desired)
    assert saved["none"] > saved["dots"] > saved["full"]


def test_the_program_does_not_grow_with_depth():
    def size(**options):
        config = dataclasses.replace(HYBRID, **options)
        model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        state = jax.eval_shape(lambda model: model.init_state(BATCH, LENGTH), model)
        lowered = gradient.lower(model, tokens), extend.lower(model, tokens, state)
        return [text.as_text().count(" = ") for text in lowered]

    assert size(num_layers=4) == size(num_layers=12)
    flat, deep = (size(num_layers=n, scan_layers=False) for n in (4, 12))
    assert all(large > 1.8 * small for small, large in zip(flat, deep))


def test_bfloat16_activations(rng):
    model, tokens = build(HYBRID, rng), draw(rng)
    low = Decoder(dataclasses.replace(HYBRID, dtype="bfloat16"), rngs=nnx.Rngs(0))
    low = jax.tree.unflatten(jax.tree.structure(low), jax.tree.leaves(model))
    assert jax.eval_shape(low.features, tokens).dtype == jnp.bfloat16
    logits, desired = parallel(low, tokens), parallel(model, tokens)
    assert logits.dtype == jnp.float32
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    assert 0 < rms(logits - desired) < 0.25 * rms(desired)


def test_pattern():
    config = dataclasses.replace(SMALL, mixers=("lightning", "lightning", "softmax"), num_layers=8)
    assert config.layers == ("lightning", "lightning", "softmax") * 2 + ("lightning", "lightning")
    assert config.period == 3
    assert dataclasses.replace(config, num_layers=2).period == 1
    assert dataclasses.replace(config, mixers=("softmax", "softmax")).period == 1
    assert dataclasses.replace(SMALL, hidden=None, d_model=24).hidden_size == 64
    assert dataclasses.replace(SMALL, hidden=None, d_model=24, feed_forward="plain").hidden_size == 96


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"vocab_size": -3}, "vocab_size=-3 must be at least 1"),
        ({"mixers": ()}, r"mixers=\(\) must name at least one mixer"),
        ({"mixers": ("sofmax",)}, r"unknown mixer 'sofmax'\. Did you mean 'softmax'\?"),
        ({"mixers": ("softmax", "softmax(windw=3)")}, "Did you mean 'window'"),
        ({"mixers": ("softmax(window='all')",)}, "option window='all' of mixer 'softmax' must be"),
        (
            {"position": "sinusoidal"},
            "position='sinusoidal' is not one of rope, rope_interleaved, alibi, learned, none",
        ),
        ({"feed_forward": "moe"}, "feed_forward='moe' is not one of gated, plain, none"),
        ({"remat": "some"}, "remat='some' is not one of none, full, dots"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(options, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        dataclasses.replace(SMALL, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must be a divisor of num_heads=2"),
        ({"norm": "batch"}, "norm='batch' is not one of rms, layer"),
        ({"activation": "swish"}, "activation='swish' is not one of"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(options, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        Decoder(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
