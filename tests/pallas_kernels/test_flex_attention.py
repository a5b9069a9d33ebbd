import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from flex_cases import COLUMNS, ROWS, call, check, compiled, dense, draw, slopes
from numerics import assert_accurate, assert_close, each

from manyheads.pallas_kernels import BlockMask, create_block_mask, flex_attention
from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow

pytestmark = pytest.mark.usefixtures("small_tiles")


def squash(score, b, h, q, k):
    return score * (1 + score * score / 9) ** -0.5


def taylor(score, b, h, q, k, params):
    shifted = score + params[h]
    return 1 + shifted + shifted * shifted / 2


def sigmoid(score, b, h, q, k):
    return 1 / (1 + np.e ** (h - score))


# A mask, the broadcast axes of a bias, a score function with its parameters or not, a normalizer, sinks.
CASES = {
    "dense": (None, None, None, "softmax", False),
    "causal": (Causal(5), "BHTS", None, "softmax", False),
    "later queries": (Causal(-7), "BHS", slopes, "softmax", False),
    "window": (Causal(3) & SlidingWindow(6, 3), "HTS", squash, "softmax", True),
    "sink keys": ((Causal() & SlidingWindow(3)) | FirstKeys(2), "BTS", slopes, "softmax", True),
    "by head": (lambda b, h, q, k: (k < 12 * (h + 1)) & (q % 5 != h), "HS", None, "softmax", False),
    "by row": (lambda b, h, q, k: k < 20 * (b + 1), "TS", slopes, "softmax", False),
    "empty rows": (lambda b, h, q, k: (q % 3 != b) & (k > h), "BS", squash, "softmax", False),
    "nothing": (lambda b, h, q, k: (k < 0) & (q >= 0), "S", slopes, "softmax", False),
    "nothing but sinks": (lambda b, h, q, k: (q > 9) & (k >= 0), None, slopes, "softmax", True),
    "divided by the sum": (Causal(), None, taylor, "sum", False),
    "weights": (Causal(4) & SlidingWindow(9, 4), None, sigmoid, "none", False),
    "weights and bias": (lambda b, h, q, k: q % 4 != h, "HTS", taylor, "none", False),
    "sum of nothing": (lambda b, h, q, k: (q % 4 != h) & (k < 30), None, sigmoid, "sum", False),
}


@pytest.mark.parametrize("name", CASES)
def test_random_shapes(name, rng):
    mask, bias_axes, score_mod, normalizer, sinks = CASES[name]
    B, G, repeats = (int(n) for n in rng.integers(1, 4, 3))
    T, S, K, V = (int(rng.integers(*ends)) for ends in ((5, 30), (17, 60), (1, 7), (1, 7)))
    H, extra = G * repeats, {}
    print(f"{B=} {T=} {S=} {H=} {G=} {K=} {V=}")
    if bias_axes:
        extra["bias"] = tuple(n if axis in bias_axes else 1 for axis, n in zip("BHTS", (B, H, T, S)))
    if sinks:
        extra["sinks"] = (H,)
    if score_mod in (slopes, taylor):
        extra["params"] = (H,)
    draws = draw(rng, B=B, T=T, S=S, H=H, G=G, K=K, V=V, **extra)
    if normalizer != "softmax" and bias_axes:
        for arrays, _ in draws:
            arrays["bias"] = jnp.square(arrays["bias"])  # weights are not negative
    allowed = np.broadcast_to(True if mask is None else dense(mask, B, H, T, S), (B, H, T, S))
    options = {"score_mod": score_mod, "normalizer": normalizer, "scale": float(rng.uniform(0.2, 2))}
    got = check(functools.partial(call, mask=mask, **options), draws, allowed=allowed, **options)
    empty = ~allowed.any(-1).swapaxes(1, 2)
    assert not np.any(got["out"][:, empty]) and not np.any(got["d query"][:, empty])
    if not sinks:
        assert np.all(got["lse"][:, empty] == -np.inf)


@pytest.mark.parametrize("maps", [(2, 1), (1, 4), (2, 4)])
def test_blocks(maps, rng):
    block_map = rng.random((*maps, 3, 3)) < 0.5
    block_map[0, 0, 1] = False  # a row of blocks without keys
    mask_mod = [None, Causal(11), lambda b, h, q, k: (q + k + h + b) % 3 != 0][rng.integers(3)]
    allowed = block_map.repeat(ROWS, 2).repeat(COLUMNS, 3)[:, :, :19, :37]
    if mask_mod is not None:
        allowed = allowed & dense(mask_mod, 2, 4, 19, 37)
    mask = BlockMask.from_blocks(block_map, (ROWS, COLUMNS), mask_mod)
    check(functools.partial(call, mask=mask), draw(rng, bias=(2, 4, 19, 37)), allowed=allowed)


def test_segments(rng):
    T, S = 23, 41
    q_ids, k_ids = rng.integers(0, 8, (2, T)), np.sort(rng.integers(0, 6, (2, S)), axis=1)
    allowed = dense(Causal(S - T), 2, 4, T, S) & (q_ids[:, None, :, None] == k_ids[:, None, None, :])
    run = functools.partial(call, mask=Causal(S - T), segment_ids=(jnp.asarray(q_ids), jnp.asarray(k_ids)))
    check(run, draw(rng, T=T, S=S), allowed=allowed)


def test_an_offset_a_row(rng):
    offset = rng.permutation([rng.integers(-4, 4), rng.integers(16, 30)])
    allowed = np.concatenate([dense(Causal(n) & SlidingWindow(7, n), 1, 4, 19, 37) for n in offset])
    check(functools.partial(call, mask=Causal(offset) & SlidingWindow(7, offset)), draw(rng), allowed=allowed)


HARD = Causal(20) & SlidingWindow(30, 20)


@pytest.fixture(scope="module")
def hard_pair():
    """Both implementations with sinks and bias, compiled once for all hard scores."""
    return [compiled(functools.partial(call, mask=HARD, scale=1.0), name, jax.jit) for name in ("xla", "reference")]


@pytest.mark.parametrize("scores", ["normal", "+-80", "80 against -80", "equal", "runs of equal", "minus infinity"])
def test_hard_scores(scores, hard_pair, rng):
    draws = draw(rng, bias=(1, 4, 19, 37), sinks=(4,))
    for arrays, _ in draws:
        if scores == "+-80":
            arrays["bias"] = 80.0 * jnp.sign(arrays["bias"])
        elif scores == "80 against -80":
            arrays["key"] = arrays["key"].at[..., 0].set(80.0 * np.sign(rng.standard_normal((2, 37, 2))))
            arrays["query"] = arrays["query"].at[..., 0].set(1.0)
        elif scores == "equal":
            arrays |= {name: jnp.zeros_like(arrays[name]) for name in ("query", "bias", "sinks")}
        elif scores == "runs of equal":
            arrays["key"] = arrays["key"].at[:, 5:34].set(arrays["key"][:, 5:6])
            arrays["bias"] = jnp.round(arrays["bias"])
        elif scores == "minus infinity":
            arrays["bias"] = jnp.where(arrays["bias"] > 0, arrays["bias"], -jnp.inf).at[:, 0, 3].set(-jnp.inf)
            arrays["sinks"] = arrays["sinks"].at[0].set(-jnp.inf)
    definition = functools.partial(numerics.attention, allowed=dense(HARD, 2, 4, 19, 37), scale=1.0)
    assert_accurate(*(each(function, draws) for function in (*hard_pair, definition)))


@pytest.mark.parametrize("T, S", [(1, 1), (1, 200), (2, 150)])
def test_few_queries(T, S, rng):
    offset = [S - T, S // 3]
    allowed = np.concatenate([dense(Causal(n), 1, 4, T, S) for n in offset])
    check(functools.partial(call, mask=Causal(jnp.array(offset))), draw(rng, T=T, S=S, sinks=(4,)), allowed=allowed)


def test_bfloat16(rng):
    T, mask = 41, Causal()
    draws = draw(rng, T=T, S=T, K=16, V=16, dtype=jnp.bfloat16, bias=(1, 4, T, T), params=(4,))
    run = functools.partial(call, mask=mask, score_mod=slopes)
    check(run, draws, allowed=dense(mask, 2, 4, T, T), score_mod=slopes)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_float64_stays_float64(masked, implementation, rng):
    ids, allowed, options = rng.integers(0, 2, (2, 37)), True, {"score_mod": slopes}
    if masked:
        options |= {"mask": Causal(9), "segment_ids": (jnp.asarray(ids[:, :19]), jnp.asarray(ids))}
        allowed = dense(Causal(9), 2, 4, 19, 37) & (ids[:, None, :19, None] == ids[:, None, None, :])
    with jax.enable_x64(True):
        ((arrays, cotangents),) = draw(rng, n=1, dtype=jnp.float64, bias=(2, 1, 19, 37), sinks=(4,), params=(4,))
        got = compiled(functools.partial(call, **options), implementation)(arrays, cotangents)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float64)}
    assert_close(got, numerics.attention(arrays, cotangents, allowed=allowed, score_mod=slopes), 1e-13)


def test_score_functions_meet_real_pairs_only(rng):
    """What a score function makes of the padding of a tile must not matter: here it would be NaN."""

    def score_mod(score, b, h, q, k, params):
        far = jnp.sqrt(18.0 - q) * jnp.sqrt(36.0 - k)
        return jnp.sqrt(score * score) + jnp.take(params, q) * far

    ((arrays, cotangents),) = draw(rng, n=1, params=(19,))
    run = functools.partial(call, score_mod=score_mod)
    xla, reference = (compiled(run, name)(arrays, cotangents) for name in ("xla", "reference"))
    for name in xla:
        np.testing.assert_allclose(xla[name], reference[name], rtol=1e-3, atol=1e-3)


Q, KEY, VALUE = jnp.ones((2, 6, 4, 3)), jnp.ones((2, 9, 2, 3)), jnp.ones((2, 9, 2, 5))
BLOCKS = create_block_mask(Causal(), None, None, 6, 9, (4, 4))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": Q[0]}, r"query: shape \[6, 4, 3\] must have four axes"),
        ({"key": KEY[0]}, "key: shape .* must have four axes"),
        ({"value": VALUE[0]}, "value: shape .* must have four axes"),
        ({"key": KEY[:1]}, r"key: shape \[1, 9, 2, 3\] does not fit query"),
        ({"key": KEY[..., :2]}, "key: shape .* does not fit query"),
        ({"value": VALUE[:, :8]}, "value: shape .* does not fit key"),
        ({"value": VALUE[:, :, :1]}, "value: shape .* does not fit key"),
        ({"query": Q[:, :, :3]}, "query: 3 heads are not a multiple of the 2 heads of key"),
        ({"bias": jnp.ones((2, 4, 6))}, r"bias: shape \[2, 4, 6\] must be \[2|1, 4|1, 6|1, 9\]"),
        ({"bias": jnp.ones((2, 4, 6, 1))}, "bias: shape"),
        ({"bias": jnp.ones((2, 2, 6, 9))}, "bias: shape"),
        ({"sinks": jnp.ones(2)}, r"sinks: shape \[2\] must be \[4\]"),
        (
            {"sinks": jnp.ones(4), "normalizer": "sum"},
            "sinks: only normalizer='softmax' has them, got normalizer='sum'",
        ),
        ({"normalizer": "softmin"}, "normalizer='softmin' is not one of softmax, sum, none"),
        ({"score_params": jnp.ones(4)}, "score_params: given without a score_mod"),
        ({"score_mod": lambda s, b, h, q, k: jnp.stack([s, s])}, "score_mod must return one scalar"),
        ({"mask": lambda b, h, q, k: (k <= q, k > 0)}, "mask_mod and score_mod must return one scalar"),
        ({"segment_ids": jnp.ones((2, 6), int)}, r"segment_ids: shapes .* must be \[\[2, 6\], \[2, 9\]\]"),
        ({"segment_ids": (jnp.ones((2, 6), int),) * 3}, "segment_ids: shapes"),
        ({"mask": create_block_mask(Causal(), None, None, 6, 8, (4, 4))}, "mask: a BlockMask .* 6 queries and 9 keys"),
        ({"mask": create_block_mask(Causal(), None, None, 9, 9, (4, 4))}, "mask: a BlockMask .* 6 queries and 9 keys"),
        (
            {"mask": create_block_mask(Causal(), 3, None, 6, 9, (4, 4))},
            "mask: a BlockMask for B=3, H=1 does not fit B=2",
        ),
        ({"mask": create_block_mask(Causal(), None, 2, 6, 9, (4, 4))}, "mask: a BlockMask for B=1, H=2 does not fit"),
        ({"implementation": "cuda"}, "implementation='cuda' is not one of reference, xla"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {"query": Q, "key": KEY, "value": VALUE, "mask": BLOCKS} | changes
    with pytest.raises(ValueError, match=message) as error:
        flex_attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
    assert "\n" not in str(error.value)
