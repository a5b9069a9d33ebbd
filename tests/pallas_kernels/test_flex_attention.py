import functools
import itertools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from numerics import assert_accurate, assert_close, quick_jit

from manyheads.pallas_kernels import BlockMask, create_block_mask, flex_attention, softmax_combine
from manyheads.pallas_kernels.flex_attention import tuning
from manyheads.pallas_kernels.masks import Causal, FirstKeys, SlidingWindow

ROWS, COLUMNS = 8, 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that tiny inputs have many of them, whole and cut."""
    monkeypatch.setattr(tuning, "XLA_BLOCK", (ROWS, COLUMNS))
    monkeypatch.setattr(tuning, "XLA_SINGLE_TILE", ROWS * COLUMNS)
    monkeypatch.setattr(tuning, "XLA_DECODE_QUERIES", 2)


def draw(rng, *, B=2, T=19, S=37, H=4, G=2, K=5, V=3, dtype=jnp.float32, **extra):
    """Arrays of a call and cotangents of its results; ``extra`` gives the shapes of bias, sinks and params."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    arrays = {"query": normal(B, T, H, K), "key": normal(B, S, G, K), "value": normal(B, S, G, V)}
    arrays |= {name: normal(*shape) for name, shape in extra.items()}
    lse_dtype = jnp.promote_types(dtype, jnp.float32)
    return arrays, (normal(B, T, H, V), normal(B, T, H).astype(lse_dtype))


def call(arrays, implementation=None, **options):
    """Output and log-sum-exp."""
    arrays = dict(arrays)
    inputs = [arrays.pop(name) for name in ("query", "key", "value")]
    if "params" in arrays:
        arrays["score_params"] = arrays.pop("params")
    return flex_attention(*inputs, **arrays, return_lse=True, implementation=implementation, **options)


def with_gradients(function, arrays, cotangents):
    """Results of ``function(arrays) -> (out, lse)``, and the gradients of all arrays."""
    (out, lse), pullback = jax.vjp(function, arrays)
    (gradients,) = pullback(cotangents)
    return {"out": out, "lse": lse, **{f"d {name}": gradient for name, gradient in gradients.items()}}


def compiled(implementation, jit=quick_jit, **options):
    """One jitted function of arrays and cotangents to results and gradients."""
    return jit(functools.partial(with_gradients, functools.partial(call, implementation=implementation, **options)))


def check(arrays, cotangents, allowed=True, score_mod=None, normalizer="softmax", scale=None, **options):
    """The tiles keep the bar on everything; ``options`` and those by name are what ``flex_attention`` takes."""
    options |= {"score_mod": score_mod, "normalizer": normalizer, "scale": scale}
    got, reference = (
        compiled(implementation, **options)(arrays, cotangents) for implementation in ("xla", "reference")
    )
    truth = numerics.attention(
        arrays, cotangents, allowed=allowed, score_mod=score_mod, normalizer=normalizer, scale=scale
    )
    assert_accurate(got, reference, truth)
    return got


def dense(mask, B, H, T, S):
    """A mask function of operators on all pairs at once."""
    return np.asarray(mask(*np.ogrid[:B, :H, :T, :S]))


def slopes(score, b, h, q, k, params):
    return score + params[h] * (q - k)


def squash(score, b, h, q, k):
    return score * (1 + score * score / 9) ** -0.5


def square(score, b, h, q, k, params):
    return (score + params[h]) ** 2


def sigmoid(score, b, h, q, k):
    return 1 / (1 + np.e ** (h - score))


# A mask, the broadcast axes of a bias, a score function with its parameters or not, a normalizer, sinks.
CASES = {
    "dense": (None, None, None, "softmax", False),
    "causal": (Causal(5), "BHTS", None, "softmax", False),
    "later queries": (Causal(-7), "BHS", slopes, "softmax", False),
    "window": (Causal(3) & SlidingWindow(6, 3), "HTS", squash, "softmax", True),
    "sink keys": ((Causal() & SlidingWindow(3)) | FirstKeys(2), "BTS", slopes, "softmax", True),
    "by head": (lambda b, h, q, k: (k + q) % (h + 2) != 0, "HS", None, "softmax", False),
    "by row": (lambda b, h, q, k: k >= 20 * b, "TS", slopes, "softmax", False),
    "empty rows": (lambda b, h, q, k: (q % 3 != b) & (k > h), "BS", squash, "softmax", False),
    "nothing": (lambda b, h, q, k: (k < 0) & (q >= 0), "S", slopes, "softmax", False),
    "nothing but sinks": (lambda b, h, q, k: (q > 9) & (k >= 0), None, slopes, "softmax", True),
    "divided by the sum": (Causal(), None, square, "sum", False),
    "weights": (Causal(4) & SlidingWindow(9, 4), None, sigmoid, "none", False),
    "weights and bias": (lambda b, h, q, k: q % 4 != h, "HTS", square, "none", False),
    "sum of nothing": (lambda b, h, q, k: (q % 4 != h) & (k < 30), None, sigmoid, "sum", False),
}


@pytest.mark.parametrize("name", CASES)
def test_random_shapes(name, rng):
    mask, bias_axes, score_mod, normalizer, sinks = CASES[name]
    B, G, repeats = (int(n) for n in rng.integers(1, 4, 3))
    T, S, K, V = (int(rng.integers(1, n)) for n in (30, 50, 7, 7))
    H, extra = G * repeats, {}
    print(f"{B=} {T=} {S=} {H=} {G=} {K=} {V=}")
    if bias_axes:
        extra["bias"] = tuple(n if axis in bias_axes else 1 for axis, n in zip("BHTS", (B, H, T, S)))
    if sinks:
        extra["sinks"] = (H,)
    if score_mod in (slopes, square):
        extra["params"] = (H,)
    arrays, cotangents = draw(rng, B=B, T=T, S=S, H=H, G=G, K=K, V=V, **extra)
    if normalizer != "softmax" and bias_axes:
        arrays["bias"] = jnp.square(arrays["bias"])  # weights are not negative
    allowed = True if mask is None else dense(mask, B, H, T, S)
    got = check(arrays, cotangents, allowed, score_mod, normalizer, mask=mask, scale=float(rng.uniform(0.2, 2)))
    empty = ~np.broadcast_to(allowed, (B, H, T, S)).any(-1).swapaxes(1, 2)
    assert not np.any(got["out"][empty]) and not np.any(got["d query"][empty])
    if not sinks:
        assert np.all(got["lse"][empty] == -np.inf)


@pytest.mark.parametrize("maps", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_dynamic_blocks(maps, rng):
    arrays, cotangents = draw(rng, bias=(2, 4, 19, 37))
    block_map = rng.random((*maps, 3, 3)) < 0.5
    block_map[0, 0, 1] = False  # a row of blocks without keys
    mask_mod = [None, Causal(11), lambda b, h, q, k: (q + k + h + b) % 3 != 0][rng.integers(3)]
    allowed = block_map.repeat(ROWS, 2).repeat(COLUMNS, 3)[:, :, :19, :37]
    if mask_mod is not None:
        allowed = allowed & dense(mask_mod, 2, 4, 19, 37)

    def run(implementation, block_map):
        mask = BlockMask.from_blocks(block_map, (ROWS, COLUMNS), mask_mod)
        return with_gradients(functools.partial(call, implementation=implementation, mask=mask), arrays, cotangents)

    got, reference = (quick_jit(functools.partial(run, name))(block_map) for name in ("xla", "reference"))
    assert_accurate(got, reference, numerics.attention(arrays, cotangents, allowed=allowed))


@pytest.mark.parametrize("pair", [False, True], ids=["same", "pair"])
def test_segments(pair, rng):
    T, S = (23, 41) if pair else (37, 37)
    k_ids = np.sort(rng.integers(0, 6, (2, S)), axis=1)
    q_ids = rng.integers(0, 8, (2, T)) if pair else k_ids
    arrays, cotangents = draw(rng, T=T, S=S)
    allowed = dense(Causal(S - T), 2, 4, T, S) & (q_ids[:, None, :, None] == k_ids[:, None, None, :])
    ids = tuple(map(jnp.asarray, (q_ids, k_ids)))
    check(arrays, cotangents, allowed, mask=Causal(S - T), segment_ids=ids if pair else ids[0])


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_an_offset_a_row(of, rng):
    offset = rng.integers(-4, 30, 2)
    arrays, cotangents = draw(rng)
    mask = Causal(of(offset)) & SlidingWindow(7, of(offset))
    allowed = [dense(Causal(n) & SlidingWindow(7, n), 1, 4, 19, 37) for n in offset]
    check(arrays, cotangents, np.concatenate(allowed), mask=mask)


@pytest.fixture(scope="module")
def causal_pair():
    """Both implementations with sinks and bias, compiled once for all hard scores."""
    return [
        compiled(name, jax.jit, mask=Causal(20) & SlidingWindow(30, 20), scale=1.0) for name in ("xla", "reference")
    ]


@pytest.mark.parametrize("scores", ["normal", "+-80", "80 against -80", "equal", "runs of equal", "minus infinity"])
def test_hard_scores(scores, causal_pair, rng):
    arrays, cotangents = draw(rng, bias=(1, 4, 19, 37), sinks=(4,))
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
    xla, reference = causal_pair
    allowed = dense(Causal(20) & SlidingWindow(30, 20), 2, 4, 19, 37)
    truth = numerics.attention(arrays, cotangents, allowed=allowed, scale=1.0)
    assert_accurate(xla(arrays, cotangents), reference(arrays, cotangents), truth)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 200), (2, 150)])
def test_few_queries(T, S, rng):
    arrays, cotangents = draw(rng, T=T, S=S, sinks=(4,))
    offset = [S - T, S // 3]
    allowed = np.concatenate([dense(Causal(n), 1, 4, T, S) for n in offset])
    check(arrays, cotangents, allowed, mask=Causal(jnp.array(offset)))


def test_bfloat16(rng):
    arrays, cotangents = draw(rng, T=41, S=41, K=16, V=16, dtype=jnp.bfloat16, bias=(1, 4, 41, 41), params=(4,))
    check(arrays, cotangents, dense(Causal(), 2, 4, 41, 41), slopes, mask=Causal())


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64_stays_float64(implementation, rng):
    with jax.enable_x64(True):
        arrays, cotangents = draw(rng, dtype=jnp.float64, bias=(2, 1, 19, 37), sinks=(4,), params=(4,))
        ids = rng.integers(0, 2, 2 * 37).reshape(2, 37)
        segments = (jnp.asarray(ids[:, :19]), jnp.asarray(ids))
        got = compiled(implementation, mask=Causal(9), score_mod=slopes, segment_ids=segments)(arrays, cotangents)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float64)}
    allowed = dense(Causal(9), 2, 4, 19, 37) & (ids[:, None, :19, None] == ids[:, None, None, :])
    assert_close(got, numerics.attention(arrays, cotangents, allowed=allowed, score_mod=slopes), 1e-13)


def test_score_functions_meet_real_pairs_only(rng):
    """What a score function makes of the padding of a tile must not matter: here it would be NaN."""

    def score_mod(score, b, h, q, k, params):
        far = jnp.sqrt(18.0 - q) * jnp.sqrt(36.0 - k)
        return jnp.sqrt(score * score) + jnp.take(params, q) * far

    arrays, cotangents = draw(rng, params=(19,))
    xla, reference = (compiled(name, score_mod=score_mod)(arrays, cotangents) for name in ("xla", "reference"))
    for name in xla:
        np.testing.assert_allclose(xla[name], reference[name], rtol=1e-3, atol=1e-3)


def test_score_parameters_are_any_pytree(rng):
    arrays, cotangents = draw(rng)
    parameters = {"slopes": arrays["query"][0, 0, :, 0], "steps": np.arange(4), "pair": (0.5, None)}

    def loss(parameters, implementation):
        def score_mod(score, b, h, q, k, p):
            return score * p["pair"][0] + p["slopes"][h] * (q - k) * p["steps"][h]

        out, lse = call(arrays, implementation, score_mod=score_mod, score_params=parameters)
        return jnp.vdot(out, cotangents[0]) + jnp.vdot(lse, cotangents[1])

    gradient = quick_jit(jax.grad(loss, allow_int=True), static_argnums=1)
    got, expected = gradient(parameters, "xla"), gradient(parameters, "reference")
    for x, y in zip((got["slopes"], got["pair"][0]), (expected["slopes"], expected["pair"][0])):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert got["steps"].dtype == jax.dtypes.float0


def test_gradients_of_arrays_that_a_score_function_closes_over(rng):
    arrays, cotangents = draw(rng, params=(4,))

    def closing(implementation, arrays):
        arrays = dict(arrays)
        params = arrays.pop("params")
        return call(arrays, implementation, mask=Causal(9), score_mod=lambda *score: slopes(*score, params))

    got, reference = (
        quick_jit(functools.partial(with_gradients, functools.partial(closing, name)))(arrays, cotangents)
        for name in ("xla", "reference")
    )
    truth = numerics.attention(arrays, cotangents, allowed=dense(Causal(9), 2, 4, 19, 37), score_mod=slopes)
    assert_accurate(got, reference, truth)


def test_a_function_with_new_contents_is_not_mistaken_for_the_old_one(rng):
    arrays, _ = draw(rng)

    def one(offset, implementation):
        table = jnp.full(4, offset, jnp.float32)
        mask, score_mod = lambda b, h, q, k: k <= q + offset, lambda s, b, h, q, k: s * table[h]
        return call(arrays, implementation, mask=mask, score_mod=score_mod)[0]

    for offset in (0, 5):
        np.testing.assert_allclose(one(offset, "xla"), one(offset, "reference"), rtol=1e-5, atol=1e-5)


def test_vmap(rng):
    """Over everything, the offset of the mask and the block map included."""
    drawn = [draw(rng, params=(4,)) for _ in range(3)]
    offsets, maps = np.array([-3, 8, 30]), rng.random((3, 1, 1, 3, 3)) < 0.7
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)

    def run(implementation, offset, block_map, arrays, cotangents):
        mask = BlockMask.from_blocks(block_map, (ROWS, COLUMNS), Causal(offset))
        function = functools.partial(call, implementation=implementation, mask=mask, score_mod=slopes)
        return with_gradients(function, arrays, cotangents)

    got, reference = (
        quick_jit(jax.vmap(functools.partial(run, name)))(offsets, maps, *stacked) for name in ("xla", "reference")
    )
    for i, (arrays, cotangents) in enumerate(drawn):
        allowed = maps[i].repeat(ROWS, 2).repeat(COLUMNS, 3)[:, :, :19, :37] & dense(Causal(offsets[i]), 2, 4, 19, 37)
        truth = numerics.attention(arrays, cotangents, allowed=allowed, score_mod=slopes)
        assert_accurate(*({name: x[i] for name, x in results.items()} for results in (got, reference)), truth)


def test_queries_in_pieces_inside_scan_and_checkpoint(rng):
    """A scan over pieces of the queries, each with the traced offset of its mask, is the whole."""
    n, pieces = 11, 3
    arrays, cotangents = draw(rng, T=n * pieces, S=n * pieces + 4, params=(4,))

    def in_pieces(implementation, arrays):
        query = jnp.moveaxis(arrays["query"].reshape(2, pieces, n, 4, 5), 1, 0)

        @jax.checkpoint
        def piece(offset, query):
            params = arrays["params"]  # closed over, inside the scan and the checkpoint
            inputs = {"query": query, "key": arrays["key"], "value": arrays["value"]}
            mod = lambda s, b, h, q, k: slopes(s, b, h, q + offset, k, params)
            return offset + n, call(
                inputs, implementation, mask=Causal(offset) & SlidingWindow(20, offset), score_mod=mod
            )

        results = jax.lax.scan(piece, jnp.int32(0), query)[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(2, n * pieces, *x.shape[3:]), results)

    got, reference = (
        quick_jit(functools.partial(with_gradients, functools.partial(in_pieces, name)))(arrays, cotangents)
        for name in ("xla", "reference")
    )
    allowed = dense(Causal() & SlidingWindow(20), 2, 4, n * pieces, n * pieces + 4)
    assert_accurate(got, reference, numerics.attention(arrays, cotangents, allowed=allowed, score_mod=slopes))


def test_any_split_of_the_keys_is_the_whole(rng):
    arrays, cotangents = draw(rng)
    cuts = [0, *sorted(rng.choice(np.arange(1, 37), 3, replace=False)), 37]

    def in_parts(arrays):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            part = {"query": arrays["query"], **{name: arrays[name][:, start:stop] for name in ("key", "value")}}
            out, lse = call(part, "xla", mask=Causal(-int(start)))  # later parts have queries without keys
            parts.append((lse, jnp.ones_like(lse), out))
        order = np.random.default_rng(0).permutation(len(parts))
        m, l, o = functools.reduce(softmax_combine, [parts[i] for i in order])
        return o / l[..., None], m + jnp.log(l)

    got = quick_jit(functools.partial(with_gradients, in_parts))(arrays, cotangents)
    truth = numerics.attention(arrays, cotangents, allowed=dense(Causal(), 2, 4, 19, 37))
    assert_close(got, truth, 3e-6)


def test_softmax_combine_is_a_commutative_monoid(rng):
    def part():
        m = np.where(rng.random(50) < 0.2, -np.inf, rng.uniform(-100, 100, 50))
        empty = m == -np.inf
        return tuple(
            jnp.asarray(x, jnp.float32)
            for x in (m, np.where(empty, 0, rng.uniform(1, 9, 50)), np.where(empty, 0, rng.standard_normal((3, 50))).T)
        )

    a, b, c = part(), part(), part()
    identity = (jnp.full(50, -jnp.inf), jnp.zeros(50), jnp.zeros((50, 3)))
    for x, y in (
        (softmax_combine(a, identity), a),
        (softmax_combine(identity, a), a),
        (softmax_combine(a, b), softmax_combine(b, a)),
    ):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    left, right = softmax_combine(softmax_combine(a, b), c), softmax_combine(a, softmax_combine(b, c))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), left, right)


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
