"""The laws of ``layers/mixer.py``: functions that raise AssertionError for a mixer that breaks them.

Each takes a case and a NumPy generator, and draws a fresh mixer and fresh inputs. All share the compiled functions and
the sizes of ``contracts.subject``, which is what keeps the suite fast.
"""

import jax
import jax.numpy as jnp
import numpy as np
from contracts.subject import (
    BATCH,
    FEATURES,
    LENGTH,
    Case,
    assert_close,
    cast,
    documents,
    extend,
    forward,
    pull,
    rms,
    tokens,
    variables,
)
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from manyheads.experiments.papers import find_paper
from manyheads.layers import MixerInfo, SequenceMixer
from manyheads.layers.basic import Constant
from manyheads.tpu import make_mesh

TOLERANCE = 1e-5  # of float32 results, relative to the largest entry of an array


def pieces_equal_the_whole(case: Case, rng: np.random.Generator) -> None:
    """However a sequence is split, ``extend`` on the pieces gives what one parallel call gives."""
    mixer, x = case.build(rng), tokens(rng)
    whole, _ = pull(mixer, x, None, x)
    sizes = [1, int(rng.integers(2, LENGTH // 2))]
    for n in sizes:  # of the first piece; the others follow at random
        state, outputs, start = mixer.init_state(BATCH, LENGTH), [], 0
        while start < LENGTH:
            y, state = extend(mixer, x[:, start : start + n], state)
            outputs.append(y)
            start += n
            n = rng.choice([size for size in sizes if start + size <= LENGTH] or [1])
        assert_close(np.concatenate(outputs, axis=1), whole, TOLERANCE, f"pieces of {[y.shape[1] for y in outputs]}")


def rows_advance_by_their_lengths(case: Case, rng: np.random.Generator) -> None:
    """With ``lengths``, what is not there leaves no trace: each row goes on from its own real tokens alone."""
    mixer, x, n = case.build(rng), tokens(rng), LENGTH // 3
    whole, _ = pull(mixer, x, None, x)
    # The first row fills its capacity and stops, the second waits, starts, waits again and goes on.
    lengths = np.concatenate([[[n, 0], [n, n - 1], [n, 0], [0, n]], rng.integers(0, n - 1, (4, BATCH - 2))], axis=1)
    state, start = mixer.init_state(BATCH, LENGTH), np.zeros(BATCH, int)
    for now in lengths.astype(np.int32):
        piece = 100 * tokens(rng, length=n)  # what is not there is garbage
        for row in range(BATCH):
            piece[row, : now[row]] = x[row, start[row] : start[row] + now[row]]
        y, state = extend(mixer, piece, state, now)
        for row in range(BATCH):
            real, desired = y[row, : now[row]], whole[row, start[row] : start[row] + now[row]]
            assert_close(real, desired, 2 * TOLERANCE, f"row {row} with lengths {lengths[:, row]}")
        start += now


def the_future_changes_nothing(case: Case, rng: np.random.Generator) -> None:
    """A causal mixer's output up to t, and its gradient, do not know the inputs after t; an acausal mixer's do."""
    mixer, x, noise = case.build(rng), tokens(rng), tokens(rng)
    t = int(rng.integers(1, LENGTH - 1))
    changed, cotangent = np.array(x), tokens(rng)
    changed[:, t:] += noise[:, t:]
    cotangent[:, t:] = 0
    for segment_ids in (None, documents(rng)):
        y, (_, dx) = pull(mixer, x, segment_ids, cotangent)
        y_changed, _ = pull(mixer, changed, segment_ids, cotangent)
        if not case.info.causal:
            assert np.abs(y - y_changed)[:, :t].max() > 1e-3, "registered as acausal, and does not read the future"
            return
        assert_close(y_changed[:, :t], y[:, :t], 1e-6, f"output up to {t} of inputs changed after it")
        leak = np.abs(dx[:, t:]).max()
        if leak and "fft[" in str(jax.make_jaxpr(mixer)(x, segment_ids)):
            leak -= 1e-6 * np.abs(dx).max()  # a Fourier transform spreads the rounding of every input over all outputs
        assert leak <= 0, f"gradient {leak:.3g} by inputs after {t}"
    assert_close(forward(mixer, x[:, :1]), y[:, :1], TOLERANCE, "the first token alone")


def documents_never_meet(case: Case, rng: np.random.Generator) -> None:
    """A packed document is what it is alone: nothing crosses its borders, in values or gradients."""
    mixer, x, segment_ids = case.build(rng), tokens(rng), documents(rng)
    packed, _ = pull(mixer, x, segment_ids, x)
    row = int(rng.integers(BATCH))
    for document in np.unique(segment_ids[row]):
        inside = segment_ids[row] == document
        start, size = np.argmax(inside), np.sum(inside)
        if case.info.causal:  # what follows the document cannot matter: one compiled length for all
            alone, _ = pull(mixer, np.roll(x, -start, axis=1), None, x)
        else:
            alone, _ = pull(mixer, x[:, inside], None, x[:, inside])
        assert_close(packed[row, inside], alone[row, :size], 2 * TOLERANCE, f"document of {size} tokens at {start}")

        others, cotangent = np.array(x), tokens(rng)
        others[row, ~inside] = 100 * tokens(rng)[row, ~inside]  # as padding might be
        cotangent[row, ~inside] = 0
        y, (_, dx) = pull(mixer, others, segment_ids, cotangent)
        assert_close(y[row, inside], packed[row, inside], 1e-6, f"document at {start} beside other neighbours")
        assert not np.any(dx[row, ~inside]), f"the document at {start} has gradients by other documents"


def every_parameter_learns(case: Case, rng: np.random.Generator) -> None:
    """Whatever a mixer owns is an ``nnx.Param`` with a finite gradient that is not zero, or a ``Constant``."""
    mixer = case.build(rng)
    _, (gradients, _) = pull(mixer, tokens(rng), None, tokens(rng))
    owned = dict(variables(mixer))
    for path, variable in owned.items():
        assert isinstance(variable, nnx.Param | Constant), f"{path} is a {type(variable).__name__}"
    gradients = {path: gradient[...] for path, gradient in variables(gradients) if isinstance(owned[path], nnx.Param)}
    assert gradients, "there is nothing to learn"
    for path, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), f"the gradient by {path} is not finite"
        assert np.any(gradient), f"the gradient by {path} is zero"


@jax.jit
def _rows_in_checkpoint(mixer, x, cotangent):
    """As ``pull``, with one row at a time under ``jax.vmap``, recomputed in the backward pass."""
    rows = lambda mixer, x: jax.vmap(lambda row: mixer(row[None])[0])(x)
    y, pullback = jax.vjp(jax.checkpoint(rows), mixer, x)
    return y, pullback(cotangent)


def transformations_agree(case: Case, rng: np.random.Generator) -> None:
    """Eager and compiled, a batch and its rows under ``jax.vmap``, with and without ``jax.checkpoint``: all the same."""
    mixer, x, cotangent = case.build(rng), tokens(rng), tokens(rng)
    y, gradients = pull(mixer, x, None, cotangent)
    assert_close(mixer(x), y, TOLERANCE, "eager output")
    y_rows, row_gradients = _rows_in_checkpoint(mixer, x, cotangent)
    assert_close(y_rows, y, TOLERANCE, "output of vmap")
    assert_close(row_gradients, gradients, 2 * TOLERANCE, "gradient of vmap in checkpoint")


def bfloat16_is_precise(case: Case, rng: np.random.Generator) -> None:
    """In bfloat16 the error against float64 is at most twice that of the "reference" implementation in bfloat16.

    A mixer without that option has to stay within twice the error that rounding its inputs and parameters to bfloat16
    makes in exact arithmetic: computing in bfloat16 then costs no more than what storing in bfloat16 costs.
    """
    has_reference = "implementation" in case.info.options
    options = {"implementation": "reference"} if has_reference else {}
    errors, bounds = [], []
    for seed in rng.integers(2**31, size=5):
        mixer, reference = (case.build(np.random.default_rng(seed), **each) for each in ({}, options))
        low, low_reference = cast(mixer, jnp.bfloat16), cast(reference, jnp.bfloat16)
        x = tokens(rng)
        low_x = jnp.asarray(x, jnp.bfloat16)
        y = forward(low, low_x)
        with jax.enable_x64(True):
            truth = forward(cast(low_reference, jnp.float64), jnp.asarray(low_x, jnp.float64))
            if not has_reference:
                yardstick = forward(cast(mixer, jnp.float64), jnp.asarray(x, jnp.float64))
        if has_reference:
            yardstick = forward(low_reference, low_x)
        assert y.dtype == jnp.bfloat16 and truth.dtype == jnp.float64, f"the outputs are {y.dtype} and {truth.dtype}"
        errors.append(y - truth)
        bounds.append(yardstick - truth)
    assert rms(errors) <= 2 * rms(bounds), f"error {rms(errors):.3g}, that of the reference is {rms(bounds):.3g}"


def sharding_changes_nothing(case: Case, rng: np.random.Generator) -> None:
    """On a mesh of data x sequence x tensor = 2 x 2 x 2 value and gradient are those of one device."""
    mixer, inputs = case.build(rng), (tokens(rng), documents(rng), tokens(rng))
    desired = pull(mixer, *inputs)
    mesh = make_mesh(data=2, sequence=2, tensor=2)

    def spread(p):
        divisible = p.ndim > 1 and p.shape[0] % mesh.shape["tensor"] == 0
        return jax.device_put(p, NamedSharding(mesh, PartitionSpec("tensor" if divisible else None)))

    with jax.set_mesh(mesh):
        mixer = jax.tree.map(spread, mixer)
        inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data", "sequence")))
        sharded = pull(mixer, *inputs)
    assert_close(sharded, desired, 2 * TOLERANCE, "sharded")


def the_state_has_the_registered_size(case: Case, rng: np.random.Generator) -> None:
    """The decode state is as large as ``MixerInfo.state`` says, and ``extend`` keeps its structure, shapes and dtypes."""
    mixer = case.build(rng)

    def state(capacity: int, dtype=jnp.float32):
        return jax.eval_shape(lambda mixer: cast(mixer, dtype).init_state(BATCH, capacity), mixer)

    small, large = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state(c))) for c in (16, 64))
    if case.info.state == "fixed":
        assert small == large, f"a fixed state of {small} bytes for 16 tokens has {large} for 64"
    assert small <= large <= 4 * small, f"{small} bytes for 16 tokens, {large} for 64: not proportional"
    lengths = np.full(BATCH, 2, np.int32)
    for dtype, n, now in ((jnp.float32, 1, None), (jnp.float32, 7, lengths), (jnp.bfloat16, 1, lengths)):
        x = jax.ShapeDtypeStruct((BATCH, n, FEATURES), dtype)
        before = state(LENGTH, dtype)
        y, after = jax.eval_shape(lambda m, *a: cast(m, dtype).extend(*a), mixer, x, before, now)  # noqa: B023
        assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{n} tokens {x.dtype}{x.shape} give {y.dtype}{y.shape}"
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"state {b.dtype}{b.shape} becomes {a.dtype}{a.shape}"


DECODING = (pieces_equal_the_whole, rows_advance_by_their_lengths, the_state_has_the_registered_size)
LAWS = (
    *DECODING,
    the_future_changes_nothing,
    documents_never_meet,
    every_parameter_learns,
    transformations_agree,
    bfloat16_is_precise,
    sharding_changes_nothing,
)


def laws_of(info: MixerInfo) -> tuple:
    """The laws that a mixer with this registration has to keep."""
    return tuple(law for law in LAWS if info.decodes or law not in DECODING)


def the_registration_is_true(info: MixerInfo, rng: np.random.Generator) -> None:
    """What the registry says that no other law looks at: the forms, the growth of the state, and the paper."""
    for name in ("init_state", "extend"):
        assert hasattr(info.constructor, name) == info.decodes, f"decodes={info.decodes} and {name} do not go together"
    assert isinstance(Case(info).build(rng), SequenceMixer) == info.decodes
    assert info.causal or not info.decodes, "an acausal mixer cannot decode"
    if info.decodes and info.state == "capacity":
        mixers = [Case(info, options).build(rng) for options in ({}, *info.variants)]
        sizes = [[sum(a.size for a in jax.tree.leaves(m.init_state(1, c))) for c in (16, 64)] for m in mixers]
        assert any(small < large for small, large in sizes), "the state grows under no option"
    if info.paper is not None:
        title = find_paper(info.paper).title
        assert info.title == title, f"the title of paper {info.paper} is {title!r}"
