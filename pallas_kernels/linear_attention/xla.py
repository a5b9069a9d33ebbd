"""Linear attention in chunks: quadratic inside a chunk, one state between chunks, memory O(T).

With ``D_ij = sum of log_decay over j < m <= i`` inside a chunk that begins with state S::

    o_i = sum_{j <= i} exp(D_ij) (q_i . k_j) v_j + exp(D_i0) q_i S       D_i0: the decay from before the chunk to i
    S'  = exp(D_C0) S + sum_j exp(D_Cj) k_j v_j^T

Every D is a sum of non-positive numbers, never a difference of two cumulative sums: long chunks with extreme decays keep
full precision, and nothing overflows. The backward pass recomputes each chunk from the state before it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manyheads.pallas_kernels.linear_attention.combine import decay_combine

Chunk = dict[str, Array | None]


def _pair_log_decay(log_decay: Float[Array, "b h c *K"]) -> Float[Array, "b h i j *K"]:
    """``D_ij`` for j <= i, zero above the diagonal."""
    c = log_decay.shape[2]
    ones = jnp.ones((c, c), log_decay.dtype)
    after = jnp.tril(ones, -1).reshape(1, 1, c, c, *[1] * (log_decay.ndim - 3))  # m > j
    steps = jnp.expand_dims(log_decay, 3) * after
    return jnp.einsum("im,bhmj...->bhij...", jnp.tril(ones), steps, precision="highest")


def _uniform_log_decay(per_head: Float[Array, "H"], c: int) -> tuple[Array, Array, Array]:
    """The three decays of a chunk for a fixed decay per head: D_ij, D_i0 and D_Cj."""
    steps = jnp.arange(c, dtype=per_head.dtype)
    between = jnp.maximum(steps[:, None] - steps[None, :], 0)
    rate = per_head.reshape(1, -1, 1)
    return rate[..., None] * between[None, None], rate * (steps + 1)[None, None], rate * (c - 1 - steps)[None, None]


def _token_log_decay(log_decay: Float[Array, "b h c *K"]) -> tuple[Array, Array, Array]:
    """The same three for a decay per token: D_ij ``b h i j *K``, D_i0 ``b h i *K`` and D_Cj ``b h j *K``."""
    pairs = _pair_log_decay(log_decay)
    # D_i0 is the sum after token 0, and that of token 0 itself.
    return pairs, pairs[:, :, :, 0] + log_decay[:, :, :1], pairs[:, :, -1]


def _exp(log: Array | None, allowed: Array | None) -> Array:
    """exp(log), and 0 where not allowed."""
    factor = jnp.ones((1, 1, 1)) if log is None else jnp.exp(log)
    if allowed is None:
        return factor
    allowed = allowed.reshape(allowed.shape + (1,) * (factor.ndim - allowed.ndim))
    return jnp.where(allowed, factor, 0)


def _chunk(uniform: tuple[Array, Array, Array] | None, state: Array, x: Chunk) -> tuple[Array, Array]:
    """One chunk of tokens ``b c h ...``: (state after it, output ``b c h V``).

    Heads move to the front here, chunk by chunk: moved for the whole sequence, they would leave the cache.
    """
    dtype = state.dtype
    q, k, v, log_decay = (
        None if x[name] is None else jnp.swapaxes(x[name], 1, 2).astype(dtype)
        for name in ("query", "key", "value", "log_decay")
    )
    heads, c = q.shape[1:3]
    k, v = (jnp.repeat(t, heads // t.shape[1], axis=1) for t in (k, v))
    pairs, into, out_of = uniform if log_decay is None else _token_log_decay(log_decay)

    causal = jnp.tril(jnp.ones((1, 1, c, c), bool))
    from_start = to_end = None
    if x["resets"] is not None:
        resets = x["resets"][:, None]  # resets inside the chunk up to each token
        causal = causal & (resets[..., :, None] == resets[..., None, :])
        from_start, to_end = resets == 0, resets == resets[..., -1:]

    per_feature = pairs is not None and pairs.ndim == 5
    if per_feature:
        scores = jnp.einsum("bhik,bhjk,bhijk->bhij", q, k, _exp(pairs, causal))
    else:
        scores = jnp.einsum("bhik,bhjk->bhij", q, k)
        scores = jnp.where(causal, scores, 0) if pairs is None else scores * _exp(pairs, causal)
    column = (lambda t: t) if per_feature else (lambda t: t[..., None])
    out = jnp.einsum("bhij,bhjv->bhiv", scores, v)
    out = out + jnp.einsum("bhik,bhkv->bhiv", q * column(_exp(into, from_start)), state)

    added = jnp.einsum("bhjk,bhjv->bhkv", k * column(_exp(out_of, to_end)), v)
    last = None if into is None else into[:, :, -1:]
    decay = column(_exp(last, None if from_start is None else from_start[..., -1:]))[:, :, 0]
    ones = jnp.ones((1, 1, 1), dtype)
    _, state = decay_combine((ones, state), (decay, added))
    return state, jnp.swapaxes(out, 1, 2)


@functools.partial(jax.jit, static_argnames="chunk_size")
def linear_attention_xla(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G V"],
    log_decay: Array | None,
    state: Float[Array, "B H K V"],
    segment_ids: Array | None,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Output ``B T H V`` without the scale, and the final state. T need not be a multiple of ``chunk_size``."""
    T = query.shape[1]
    c = min(chunk_size, T)
    per_head = None
    if log_decay is not None and log_decay.ndim == 1:
        per_head, log_decay = log_decay.astype(state.dtype), None
    x = {"query": query, "key": key, "value": value, "log_decay": log_decay, "resets": None}
    if segment_ids is not None:
        x["resets"] = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))

    def stretch(start: int, stop: int, size: int) -> Chunk:
        """The tokens start..stop as chunks of ``size``: axes N b c ..."""

        def split(t: Array) -> Array:
            return jnp.moveaxis(t[:, start:stop].reshape(t.shape[0], -1, size, *t.shape[2:]), 1, 0)

        chunks = {name: None if t is None else split(t) for name, t in x.items()}
        if chunks["resets"] is not None:
            chunks["resets"] = jnp.cumsum(chunks["resets"], axis=-1, dtype=jnp.int32)
        return chunks

    def body(size: int) -> Callable[[Array, Chunk], tuple[Array, Array]]:
        uniform = (None, None, None) if per_head is None else _uniform_log_decay(per_head, size)
        return jax.checkpoint(functools.partial(_chunk, uniform))

    n, outputs = T // c, []
    if n > 1:
        state, out = jax.lax.scan(body(c), state, stretch(0, n * c, c))
        outputs.append(jnp.moveaxis(out, 0, 1).reshape(out.shape[1], n * c, *out.shape[3:]))
    elif n == 1:
        state, out = body(c)(state, jax.tree.map(lambda t: t[0], stretch(0, c, c)))
        outputs.append(out)
    if T % c:
        state, out = body(T % c)(state, jax.tree.map(lambda t: t[0], stretch(n * c, T, T % c)))
        outputs.append(out)
    return (outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)), state
