"""The bar for numbers, and the primitives once more in NumPy float64 with gradients by hand: the truth of the tests."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["assert_accurate", "assert_close", "attention", "each", "linear_attention", "quick_jit"]

Arrays = Mapping[str, Any]

# For functions that run once: machine code without optimisation, by the emitter that is fastest to compile.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
)


def _error(got: Any, truth: np.ndarray) -> float:
    """Largest deviation from ``truth`` relative to its largest entry, each the mean over draws, which the first axis counts.

    Infinite where one is not finite as the other. Entries so small that they underflow count as if they just did not.
    """
    limits, finite = jnp.finfo(got.dtype), np.isfinite(truth)
    got = np.asarray(got).astype(np.float64)
    if (
        got.shape != truth.shape
        or not np.array_equal(got[~finite], truth[~finite])
        or not np.isfinite(got[finite]).all()
    ):
        return np.inf
    got, truth = (np.where(finite, x, 0).reshape(len(x), -1) for x in (got, truth))
    deviation, size = (np.abs(x).max(axis=1).mean() for x in (got - truth, truth))
    return deviation / max(size, float(limits.tiny) / float(limits.eps))


def assert_accurate(got: Arrays, reference: Arrays, truth: Arrays) -> None:
    """Each of ``got`` is off the float64 ``truth`` at most twice as much as ``reference``, of the same dtype, is.

    The first axis of all counts draws: errors are in the maximum norm, and their mean over draws is compared. Two units
    in the last place are free; of bfloat16, in which results are stored but not computed, half a one.
    """
    assert set(got) == set(reference) == set(truth)
    for name in truth:
        dtype = got[name].dtype
        assert dtype == reference[name].dtype, f"{name}: {dtype} is not {reference[name].dtype}"
        error, bar = _error(got[name], truth[name]), _error(reference[name], truth[name])
        free = (0.5 if dtype == jnp.bfloat16 else 2) * float(jnp.finfo(dtype).eps)
        assert error <= 2 * bar + free, f"{name}: error {error:.2e} against float64, the reference has {bar:.2e}"


def assert_close(got: Arrays, truth: Arrays, limit: float) -> None:
    """Each of ``got`` is off ``truth`` at most ``limit`` in the maximum norm, relative to the largest entry."""
    assert set(got) == set(truth)
    for name in truth:
        error = _error(got[name][None], truth[name][None])
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


def each(function: Callable[..., Arrays], draws: Iterable[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """What ``function`` makes of every draw, stacked."""
    results = [function(*draw) for draw in draws]
    return {name: np.stack([np.asarray(result[name]) for result in results]) for name in results[0]}


def _double(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: np.asarray(array).astype(np.float64) for name, array in arrays.items()}


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of ``shape`` was broadcast."""
    return array.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)


def _sum_groups(array: np.ndarray, groups: int) -> np.ndarray:
    """``B S H K -> B S G K``: the sum over the query heads that share a key head."""
    B, S, H, K = array.shape
    return array.reshape(B, S, groups, H // groups, K).sum(3)


def attention(
    arrays: Arrays,
    cotangents: tuple[Any, Any],
    *,
    allowed: Any = True,
    score_mod: Callable[..., Any] | None = None,
    scale: float | None = None,
    normalizer: str = "softmax",
) -> dict[str, np.ndarray]:
    """``flex_attention`` and its gradients.

    Args:
      arrays: query, key, value, and optionally bias, sinks and params (one array, for ``score_mod``).
      cotangents: of the output ``B T H V`` and of the log-sum-exp ``B T H``.
      allowed: which pairs may meet; broadcasts to ``B H T S``.
      score_mod: ``(score, b, h, q, k[, params])`` of arithmetic operators only, so that it takes complex arrays.

    Returns:
      out, lse, and under "d name" the gradient of each of ``arrays``.
    """
    x = _double(arrays)
    query, (B, T, H, K), (S, G) = x["query"], x["query"].shape, x["key"].shape[1:3]
    key, value = (np.repeat(x[name], H // G, axis=2) for name in ("key", "value"))
    dout, dlse = (np.asarray(c).astype(np.float64) for c in cotangents)
    dlse = dlse.swapaxes(1, 2)[..., None]
    index, scale = np.ogrid[:B, :H, :T, :S], K**-0.5 if scale is None else scale
    params = x.get("params")

    def modify(raw: np.ndarray, params: np.ndarray | None) -> np.ndarray:
        if score_mod is None:
            return raw
        return score_mod(raw, *index) if params is None else score_mod(raw, *index, params)

    raw = scale * np.einsum("bthk,bshk->bhts", query, key)
    scores = modify(raw, params) + x.get("bias", 0.0)
    allowed = np.broadcast_to(allowed, scores.shape)
    sink = x.get("sinks", np.full(H, -np.inf))[None, :, None, None]
    if normalizer == "softmax":
        scores = np.where(allowed, scores, -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), sink)
        top = np.where(np.isfinite(top), top, 0)
        weights = slope = np.exp(scores - top)
    else:
        top, weights, slope = 0.0, np.where(allowed, scores, 0), allowed
    total = weights.sum(-1, keepdims=True) + np.exp(sink - top)
    safe = np.where(total == 0, 1, total)
    norm = 1.0 if normalizer == "none" else 1 / safe
    dweights = np.einsum("bthv,bshv->bhts", dout, value)
    mean = 0.0 if normalizer == "none" else np.sum(norm * weights * dweights, -1, keepdims=True)
    dscores = slope * (norm * (dweights - mean) + np.where(total == 0, 0, dlse / safe))
    # The score function is differentiated by a complex step, exact to rounding.
    draw = scale * dscores * modify(raw + 1e-30j, params).imag / 1e-30
    gradients = {
        "query": np.einsum("bhts,bshk->bthk", draw, key),
        "key": _sum_groups(np.einsum("bhts,bthk->bshk", draw, query), G),
        "value": _sum_groups(np.einsum("bhts,bthv->bshv", norm * weights, dout), G),
    }
    if "bias" in x:
        gradients["bias"] = _sum_to(dscores, x["bias"].shape)
    if "sinks" in x:
        gradients["sinks"] = np.sum(np.exp(sink - top) / safe * (dlse - mean), (0, 2, 3))
    if params is not None:
        steps = 1e-30j * np.eye(params.size).reshape(-1, *params.shape)
        slopes = [np.broadcast_to(modify(raw, params + step).imag / 1e-30, raw.shape) for step in steps]
        gradients["params"] = np.array([np.sum(dscores * slope) for slope in slopes]).reshape(params.shape)
    return {
        "out": np.einsum("bhts,bshv->bthv", norm * weights, value),
        "lse": np.where(total == 0, -np.inf, top + np.log(safe))[..., 0].swapaxes(1, 2),
        **{f"d {name}": gradient for name, gradient in gradients.items()},
    }


def linear_attention(
    arrays: Arrays, cotangents: tuple[Any, Any], *, scale: float = 1.0, segment_ids: Any = None
) -> dict[str, np.ndarray]:
    """``linear_attention`` and its gradients, token by token.

    Args:
      arrays: query, key, value, and optionally log_decay (any of its forms) and initial_state.
      cotangents: of the output ``B T H V`` and of the final state ``B H K V``.

    Returns:
      out, state, and under "d name" the gradient of each of ``arrays``.
    """
    x = _double(arrays)
    query, (B, T, H, K), (G, V) = x["query"], x["query"].shape, x["value"].shape[2:]
    key, value = (np.repeat(x[name], H // G, axis=2) for name in ("key", "value"))
    log_decay = x.get("log_decay", np.zeros(H))
    form = {1: (1, 1, H, 1), 3: (B, T, H, 1), 4: (B, T, H, K)}[log_decay.ndim]
    decay = np.broadcast_to(np.exp(log_decay.reshape(form)), (B, T, H, K)).copy()
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        decay[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0
    dout, dstate = (np.asarray(c).astype(np.float64) for c in cotangents)

    states = [x.get("initial_state", np.zeros((B, H, K, V)))]
    for t in range(T):
        states.append(decay[:, t, :, :, None] * states[-1] + key[:, t, :, :, None] * value[:, t, :, None, :])
    out = np.stack([scale * np.einsum("bhk,bhkv->bhv", query[:, t], states[t + 1]) for t in range(T)], 1)

    dquery, dkey, dvalue, ddecay = (np.zeros_like(a) for a in (query, key, value, decay))
    for t in reversed(range(T)):
        dstate = dstate + scale * query[:, t, :, :, None] * dout[:, t, :, None, :]
        dquery[:, t] = scale * np.einsum("bhv,bhkv->bhk", dout[:, t], states[t + 1])
        dkey[:, t] = np.einsum("bhv,bhkv->bhk", value[:, t], dstate)
        dvalue[:, t] = np.einsum("bhk,bhkv->bhv", key[:, t], dstate)
        ddecay[:, t] = decay[:, t] * np.sum(dstate * states[t], -1)
        dstate = decay[:, t, :, :, None] * dstate
    gradients = {"query": dquery, "key": _sum_groups(dkey, G), "value": _sum_groups(dvalue, G)}
    if "log_decay" in x:
        gradients["log_decay"] = _sum_to(ddecay, form).reshape(log_decay.shape)
    if "initial_state" in x:
        gradients["initial_state"] = dstate
    return {"out": out, "state": states[-1], **{f"d {name}": gradient for name, gradient in gradients.items()}}
