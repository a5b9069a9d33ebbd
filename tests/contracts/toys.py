"""A small mixer that keeps every law, an acausal one, and mutants that break one law each."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from contracts import laws
from contracts.subject import Case
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from manyheads.layers import MixerInfo
from manyheads.layers.basic import Linear


@functools.partial(jax.tree_util.register_dataclass, data_fields=("total",), meta_fields=())
@dataclass(frozen=True)
class TotalState:
    """The sum so far, ``total: B D``."""

    total: Float[Array, "B D"]


class DecayedSum(nnx.Module):
    """``y_t = sum_{s <= t} 0.8^(t - s) W x_s``."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.value = Linear(d_model, d_model, rngs=rngs)

    def weights(self, n: int, dtype) -> Float[Array, "T T"]:
        lag = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        return jnp.where(lag >= 0, 0.8 ** jnp.abs(lag), 0).astype(dtype)

    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        weights = self.weights(x.shape[1], x.dtype)[None]
        if segment_ids is not None:
            weights = jnp.where(segment_ids[:, :, None] == segment_ids[:, None, :], weights, 0)
        return weights @ self.value(x)

    def init_state(self, batch: int, capacity: int) -> TotalState:
        return TotalState(jnp.zeros((batch, len(self.value.kernel)), self.value.kernel[...].dtype))

    def extend(
        self, x: Float[Array, "B n D"], state: TotalState, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B n D"], TotalState]:
        n = x.shape[1]
        steps = (0.8 ** jnp.arange(n + 1)).astype(x.dtype)
        y = self.weights(n, x.dtype)[None] @ self.value(x) + steps[None, 1:, None] * state.total[:, None]
        y_from_0 = jnp.concatenate([state.total[:, None], y], axis=1)
        last = jnp.full(len(x), n) if lengths is None else lengths
        return y, TotalState(jnp.take_along_axis(y_from_0, last[:, None, None], axis=1)[:, 0])


class SymmetricSum(nnx.Module):
    """``y_t = sum_s 0.8^|t - s| W x_s``, before and after t."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.value = Linear(d_model, d_model, rngs=rngs)

    def __call__(self, x, segment_ids=None):
        causal = DecayedSum.__call__
        flip = lambda t: None if t is None else jnp.flip(t, axis=1)
        return causal(self, x, segment_ids) + flip(causal(self, flip(x), flip(segment_ids))) - self.value(x)

    weights = DecayedSum.weights


class LeaksTheFuture(DecayedSum):
    def weights(self, n, dtype):
        return super().weights(n, dtype) + jnp.eye(n, k=1, dtype=dtype)


class ForgetsSegments(DecayedSum):
    def __call__(self, x, segment_ids=None):
        return super().__call__(x)


class LeaksGradients(DecayedSum):
    def __call__(self, x, segment_ids=None):
        mean = jnp.mean(x, axis=1, keepdims=True)
        return super().__call__(x, segment_ids) + mean - jax.lax.stop_gradient(mean)  # no value, but a gradient


class IgnoresLengths(DecayedSum):
    def extend(self, x, state, lengths=None):
        return super().extend(x, state)


class WaitingRowsDecay(DecayedSum):
    def extend(self, x, state, lengths=None):
        y, after = super().extend(x, state, lengths)
        return y, after if lengths is None else TotalState(after.total * (0.8 ** (lengths == 0))[:, None])


class ForgetsBetweenPieces(DecayedSum):
    def extend(self, x, state, lengths=None):
        return super().extend(x, TotalState(0 * state.total), lengths)


class StateOfTheCapacity(DecayedSum):
    def init_state(self, batch, capacity):
        return TotalState(jnp.zeros((batch, capacity)))


class StateGrows(DecayedSum):
    def extend(self, x, state, lengths=None):
        return x, TotalState(jnp.concatenate([state.total, x.sum(1).astype(state.total.dtype)], axis=-1))


class StatePromotes(DecayedSum):
    def extend(self, x, state, lengths=None):
        y, after = super().extend(x, state, lengths)
        return y, TotalState(after.total.astype(jnp.float32))


class DeadParameter(DecayedSum):
    def __init__(self, d_model, *, rngs):
        super().__init__(d_model, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(d_model))

    def __call__(self, x, segment_ids=None):
        return jax.lax.stop_gradient(self.gain[...]).astype(x.dtype)[None, None] * super().__call__(x, segment_ids)


class NanGradient(DecayedSum):
    def __call__(self, x, segment_ids=None):
        y = super().__call__(x, segment_ids)
        return y + jnp.sqrt(jnp.square(y - y))


class HiddenVariable(DecayedSum):
    def __init__(self, d_model, *, rngs):
        super().__init__(d_model, rngs=rngs)
        self.cache = nnx.Variable(jnp.zeros(d_model))


class CountsItsTraces(DecayedSum):
    traces = 0

    def __call__(self, x, segment_ids=None):
        CountsItsTraces.traces += 1
        return CountsItsTraces.traces * super().__call__(x, segment_ids)


class CentresTheBatch(DecayedSum):
    def __call__(self, x, segment_ids=None):
        return super().__call__(x - jnp.mean(x, axis=0, keepdims=True), segment_ids)


class LosesPrecision(DecayedSum):
    def __call__(self, x, segment_ids=None):
        y = super().__call__(x, segment_ids)
        return y.astype(jnp.float8_e4m3fn).astype(y.dtype) if y.dtype == jnp.bfloat16 else y


class ForgetsOtherShards(DecayedSum):
    def __call__(self, x, segment_ids=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return super().__call__(x, segment_ids)
        spec = PartitionSpec("data", "sequence")
        local = jax.shard_map(DecayedSum.__call__, in_specs=(PartitionSpec(), spec, spec), out_specs=spec)
        return local(self, x, segment_ids)


def toy(constructor: type, **info) -> Case:
    """A case of a mixer that is not in the registry."""
    return Case(MixerInfo(constructor.__name__, constructor, title="A toy", year=2026, **info))


SOUND = [toy(DecayedSum), toy(SymmetricSum, causal=False, decodes=False)]
BROKEN = [  # a mixer, the law that it breaks, and the complaint
    (toy(ForgetsBetweenPieces), laws.pieces_equal_the_whole, "pieces of"),
    (toy(IgnoresLengths), laws.rows_advance_by_their_lengths, "row . with lengths"),
    (toy(WaitingRowsDecay), laws.rows_advance_by_their_lengths, "row . with lengths"),
    (toy(StateOfTheCapacity), laws.the_state_has_the_registered_size, "a fixed state of 256 bytes"),
    (toy(StateGrows), laws.the_state_has_the_registered_size, "state float32"),
    (toy(StatePromotes), laws.the_state_has_the_registered_size, "state bfloat16"),
    (toy(LeaksTheFuture), laws.the_future_changes_nothing, "output up to"),
    (toy(LeaksGradients), laws.the_future_changes_nothing, "gradient .* by inputs after"),
    (toy(SymmetricSum, decodes=False), laws.the_future_changes_nothing, "output up to"),
    (toy(DecayedSum, causal=False, decodes=False), laws.the_future_changes_nothing, "registered as acausal"),
    (toy(ForgetsSegments), laws.documents_never_meet, "document of .* tokens"),
    (toy(LeaksGradients), laws.documents_never_meet, "gradients by other documents"),
    (toy(DeadParameter), laws.every_parameter_learns, ".gain is zero"),
    (toy(NanGradient), laws.every_parameter_learns, "not finite"),
    (toy(HiddenVariable), laws.every_parameter_learns, ".cache is a Variable"),
    (toy(CountsItsTraces), laws.transformations_agree, "eager output"),
    (toy(CentresTheBatch), laws.transformations_agree, "output of vmap"),
    (toy(LosesPrecision), laws.bfloat16_is_precise, "that of the reference"),
    (toy(ForgetsOtherShards), laws.sharding_changes_nothing, "sharded"),
]
UNTRUE = [  # a mixer whose registration lies, and the complaint
    (toy(DecayedSum, decodes=False), "do not go together"),
    (toy(SymmetricSum, causal=False), "do not go together"),
    (toy(DecayedSum, causal=False), "an acausal mixer cannot decode"),
    (toy(DecayedSum, state="capacity"), "the state grows under no option"),
    (toy(DecayedSum, paper="039"), "title"),
]
