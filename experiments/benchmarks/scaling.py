"""Whether time and memory of the primitives grow linearly with the length, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from manyheads.experiments.benchmarks.harness import Benchmark, interleave
from manyheads.pallas_kernels import flex_attention, linear_attention
from manyheads.pallas_kernels.masks import Causal, SlidingWindow

HEADS, FEATURES, WINDOW = 4, 64, 256


def _linear(log_decay: jax.Array | None) -> Callable[..., jax.Array]:
    return lambda q, k, v: linear_attention(q, k, v, log_decay=log_decay, implementation="xla")[0]


def _window(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return flex_attention(q, k, v, mask=Causal() & SlidingWindow(WINDOW), implementation="xla")


MIXERS = {
    "linear_attention": _linear(None),
    "linear_attention_decay": _linear(-jnp.array([0.5, 0.1, 0.02, 0.004])),
    "window_attention": _window,
}


def run(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Times at the longest length over those at the shortest; memory is what the compiler allocates beside arguments."""
    lengths = (256, 1024) if quick else (2048, 8192, 32768)
    figures: dict[str, Any] = {"lengths": list(lengths), "heads": HEADS, "features": FEATURES, "window": WINDOW}
    worst: dict[str, float] = {"time": 0.0, "memory": 0.0}
    for name, mixer in MIXERS.items():
        progress(name)
        calls, memory = {}, {}
        for length in lengths:
            inputs = [jax.random.normal(jax.random.key(i), (1, length, HEADS, FEATURES)) for i in range(3)]
            loss = lambda *x: jnp.sum(jnp.square(mixer(*x)))  # noqa: B023
            for kind, fn in (("forward", mixer), ("both", jax.grad(loss, argnums=(0, 1, 2)))):
                compiled = jax.jit(fn).lower(*inputs).compile()
                calls[kind, length] = lambda compiled=compiled, inputs=inputs: compiled(*inputs)
                memory[kind, length] = compiled.memory_analysis().temp_size_in_bytes
        seconds = interleave(calls, repeats=2 if quick else 9, warmup=2, reduce=min)
        short, long = lengths[0], lengths[-1]
        for kind in ("forward", "both"):
            times = {"time": seconds[kind, long] / seconds[kind, short]}
            # A short input may need nothing beside its arguments: memory is compared per token of the longest.
            times["memory"] = memory[kind, long] / max(memory[kind, short], 1)
            figures[f"{name}.{kind}"] = {
                "time_ratio": round(times["time"], 2),
                "memory_ratio": round(times["memory"], 2),
                "seconds": {str(t): round(seconds[kind, t], 5) for t in lengths},
                "bytes": {str(t): memory[kind, t] for t in lengths},
            }
            worst = {key: max(worst[key], times[key]) for key in worst}
    figures["ratio_of_lengths"] = lengths[-1] / lengths[0]
    figures["headline"] = (
        f"T x {lengths[-1] // lengths[0]}: time x {worst['time']:.1f} at most, memory x {worst['memory']:.1f} at most"
    )
    return figures


BENCHMARK = Benchmark("scaling", "time and memory of linear and window attention against the length", run)
