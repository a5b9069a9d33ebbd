import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from manyheads.architectures.language.decoder import Decoder, DecoderConfig
from manyheads.experiments.training.checkpoint import named_leaves
from manyheads.experiments.training.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer


@pytest.mark.parametrize(
    "field, wrong",
    [
        *(("learning_rate", wrong) for wrong in (0.0, -1.0, float("nan"))),
        *(("clip_norm", wrong) for wrong in (0.0, -1.0, float("nan"))),
        *(("warmup_steps", -1), ("weight_decay", -0.1), ("weight_decay", float("nan"))),
        *(("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", float("nan"))),
        *(("final_fraction", 1.1), ("final_fraction", -0.1)),
        ("schedule", "linear"),
    ],
)
def test_wrong_setting_is_named_with_its_value(field, wrong):
    with pytest.raises(ValueError, match=f"^{field}={wrong!r} (must|is not one of)"):
        OptimizerConfig(**{field: wrong})


def test_cosine_schedule_rises_to_its_peak_and_falls_to_its_last_fraction(rng):
    warmup, steps = int(rng.integers(1, 50)), int(rng.integers(100, 1000))
    peak, fraction = rng.uniform(1e-4, 1e-2), rng.uniform(0, 1)
    rate = learning_rate(OptimizerConfig(peak, warmup, "cosine", fraction), steps)
    t = np.arange(steps + 1)
    falling = fraction + (1 - fraction) * (1 + np.cos(np.pi * (t - warmup) / (steps - warmup))) / 2
    expected = peak * np.where(t < warmup, t / warmup, falling)
    np.testing.assert_allclose(jax.vmap(rate)(t), expected, rtol=1e-4, atol=1e-6 * peak)


def test_constant_schedule_stays_at_its_peak():
    rate = learning_rate(OptimizerConfig(0.5, warmup_steps=2, schedule="constant"), 10)
    np.testing.assert_allclose(jax.vmap(rate)(np.arange(10)), [0, 0.25, *[0.5] * 8])
    assert learning_rate(OptimizerConfig(0.5, warmup_steps=0, schedule="constant"), 10)(0) == 0.5


@pytest.mark.parametrize("steps", [1, 5])
def test_run_may_be_shorter_than_its_warmup(steps):
    rates = jax.vmap(learning_rate(OptimizerConfig(1.0, warmup_steps=10), steps))(np.arange(steps + 1))
    np.testing.assert_allclose(rates, np.arange(steps + 1) / 10, rtol=1e-6)


def test_gradients_are_clipped_by_their_common_norm(rng):
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    small = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    small = jax.tree.map(lambda g: g / optax.tree.norm(small), small)
    transform = make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=1.0, weight_decay=0.0), 10)

    def moments(grads):
        _, state = jax.jit(transform.update)(grads, transform.init(params), params)
        return optax.tree.get(state, "mu")

    scaled = jax.tree.map(lambda g: 1000 * g, small)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), moments(scaled), moments(small))
    half = jax.tree.map(lambda g: g / 2, small)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-5), moments(half), moments(small))


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_without_gradient_only_what_decays_moves(decay_vectors):
    config = OptimizerConfig(0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, decay_vectors=decay_vectors)
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(())}
    transform = make_optimizer(config, 10)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    for name in ("bias", "scale"):
        np.testing.assert_allclose(updates[name], -0.05 * decay_vectors, rtol=1e-6)


def test_decay_is_the_same_whether_layers_are_stacked_or_not():
    config = DecoderConfig(d_model=8, num_layers=4, num_heads=2, norm="layer", mixers=("softmax", "lightning"))
    stacked = Decoder(config, rngs=nnx.Rngs(0))

    for model in (stacked, stacked.unrolled()):
        chosen = named_leaves(decays(nnx.state(model, nnx.Param)))
        kinds = {(name.split(".")[-2], decay) for name, decay in chosen.items()}
        assert kinds == {("kernel", True), ("table", True), ("weight", False), ("bias", False)}
