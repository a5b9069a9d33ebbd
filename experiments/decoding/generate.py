"""Generation: one prefill of all prompts, then a token of each row at a time.

The prompts of a batch, padded on the right to one length, are read by a single ``extend``. The decode steps run inside
one compiled loop that updates its state in place and ends when every row has stopped. Without sampling, what a row
generates does not depend on the other rows.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from manyheads.architectures.language import Decoder, DecoderState
from manyheads.experiments.decoding.sampling import check_sampling, greedy, sample
from manyheads.layers.mixer import mixer_info, parse_mixer

__all__ = ["PADDING", "Generated", "generate"]

PADDING = -1

# Shapes are rounded up to multiples of these, so that calls with prompts of similar length share compiled functions.
PROMPT_MULTIPLE = 32
CAPACITY_MULTIPLE = 64

STREAM_STEPS = 8  # Decode steps between two looks at the new tokens.


@dataclass(frozen=True)
class Generated:
    """What ``generate`` returns.

    Attributes:
      tokens: ``B n`` for n = max_new_tokens; ``PADDING`` after the end of a row. A stop token is not part of the row.
      lengths: ``B``, tokens of each row.
      stopped: ``B``, whether the row ended before its budget did.
    """

    tokens: Int[np.ndarray, "B n"]
    lengths: Int[np.ndarray, "B"]
    stopped: Bool[np.ndarray, "B"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "temperature", "top_p", "stop_tokens"),
    meta_fields=("top_k",),
)
@dataclass(frozen=True)
class _Rule:
    """How the next token is chosen (greedily if the temperature is None), and which ones end a row."""

    key: Array
    temperature: Float[Array, ""] | None
    top_k: int | None
    top_p: Float[Array, ""] | None
    stop_tokens: Int[Array, "S"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "last", "tokens", "lengths", "stopped", "step"),
    meta_fields=(),
)
@dataclass(frozen=True)
class _Progress:
    """What a decode step passes on: the state of the model before the token ``last``, and ``step`` columns of tokens."""

    state: DecoderState
    last: Int[Array, "B"]
    tokens: Int[Array, "B C"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    step: Int[Array, ""]

    def accept(self, logits: Float[Array, "B V"], rule: _Rule) -> "_Progress":
        """The progress after the token that ``rule`` chooses from ``logits``."""
        if rule.temperature is None:
            token = greedy(logits)
        else:
            key = jax.random.fold_in(rule.key, self.step)
            token = sample(key, logits, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
        stopped = self.stopped | (token[:, None] == rule.stop_tokens[None]).any(axis=-1)
        return replace(
            self,
            last=token,
            tokens=self.tokens.at[:, self.step].set(jnp.where(stopped, PADDING, token)),
            lengths=self.lengths + ~stopped,
            stopped=stopped,
            step=self.step + 1,
        )


@functools.partial(jax.jit, static_argnames="capacity")
def _prefill(
    model: Decoder, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], rule: _Rule, *, capacity: int
) -> _Progress:
    """Read the prompts and choose the first new tokens. The state is that of the unrolled model."""
    batch = len(prompts)
    logits, state = model.extend(prompts, model.init_state(batch, capacity), lengths, last_only=True)
    empty = _Progress(
        state=state.unrolled(),
        last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, capacity), PADDING, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        step=jnp.zeros((), jnp.int32),
    )
    return empty.accept(logits[:, 0], rule)


@functools.partial(jax.jit, donate_argnames="progress")
def _decode(model: Decoder, progress: _Progress, rule: _Rule, until: Int[Array, ""]) -> _Progress:
    """Decode until there are ``until`` new tokens, or every row has stopped."""

    def step(progress: _Progress) -> _Progress:
        logits, state = model.extend(progress.last[:, None], progress.state)
        return replace(progress, state=state).accept(logits[:, 0], rule)

    return jax.lax.while_loop(lambda p: (p.step < until) & ~p.stopped.all(), step, progress)


def generate(
    model: Decoder,
    prompts: Sequence[Int[np.ndarray, "_"]] | Int[np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    capacity: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> Generated:
    """Continue a batch of prompts.

    Args:
      model: any decoder whose mixers decode. One that is ``unrolled()`` already saves a copy of the weights a call, at
        the price of a longer compilation.
      prompts: token ids of each prompt, of any lengths from 1.
      max_new_tokens: budget n of new tokens for each row.
      temperature, top_k, top_p: see ``sampling.sample``; temperature 0 always takes the most probable token.
      stop_tokens: tokens that end a row.
      seed: of the sampling; the same seed gives the same tokens.
      capacity: tokens that the state has room for in each row; default what this call needs, rounded up.
      on_token: called with the row and the token for every new token, a few steps at a time; a true result ends the row.

    Raises:
      ValueError: a prompt that is empty, too long for the capacity or outside the vocabulary, or an option out of range.
    """
    check_sampling(temperature, top_k, top_p)
    prompts = [np.asarray(prompt) for prompt in prompts]
    _check(model, prompts, stop_tokens, max_new_tokens, capacity)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _round_up(lengths.max(), PROMPT_MULTIPLE)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    rule = _Rule(
        key=jax.random.key(seed),
        temperature=jnp.float32(temperature) if temperature else None,
        top_k=top_k,
        top_p=None if top_p is None else jnp.float32(top_p),
        stop_tokens=jnp.array(sorted(stop_tokens), jnp.int32),
    )
    capacity = capacity or _round_up(lengths.max() + max_new_tokens, CAPACITY_MULTIPLE)
    progress = _prefill(model, tokens, lengths, rule, capacity=capacity)
    model = model.unrolled()
    shown = 0
    while True:
        if on_token is not None:
            progress = _show(progress, shown, on_token)
        shown = int(progress.step)
        if shown == max_new_tokens or progress.stopped.all():
            break
        until = max_new_tokens if on_token is None else min(shown + STREAM_STEPS, max_new_tokens)
        progress = _decode(model, progress, rule, until)
    lengths = np.asarray(progress.lengths)
    columns = np.arange(max_new_tokens)
    tokens = np.where(columns[None] < lengths[:, None], np.asarray(progress.tokens)[:, :max_new_tokens], PADDING)
    return Generated(tokens, lengths, np.asarray(progress.stopped))


def _show(progress: _Progress, start: int, on_token: Callable[[int, int], bool | None]) -> _Progress:
    """Give the tokens from column ``start`` on to ``on_token``, and end the rows for which it returns true."""
    tokens, lengths, stopped = (np.array(x) for x in (progress.tokens, progress.lengths, progress.stopped))
    for column in range(start, int(progress.step)):
        for row in np.flatnonzero(column < lengths):
            if on_token(int(row), int(tokens[row, column])):
                lengths[row], stopped[row] = column + 1, True
    return replace(progress, lengths=jnp.asarray(lengths), stopped=jnp.asarray(stopped))


def _round_up(size: int, multiple: int) -> int:
    return -(-int(size) // multiple) * multiple


def _check(
    model: Decoder,
    prompts: Sequence[np.ndarray],
    stop_tokens: Collection[int],
    max_new_tokens: int,
    capacity: int | None,
) -> None:
    """ValueError unless the arguments of ``generate`` fit the model and one another."""
    config = model.config
    for mixer in config.mixers:
        if not mixer_info(parse_mixer(mixer)[0]).decodes:
            raise ValueError(f"mixers: {mixer!r} does not decode")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        raise ValueError("prompts is empty, at least one is needed")
    room = {"capacity": capacity, "max_length": config.max_length if config.position == "learned" else None}
    for i, prompt in enumerate(prompts):
        if prompt.ndim != 1:
            raise ValueError(f"prompts[{i}] has shape {list(prompt.shape)}, a prompt has one axis")
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty, a prompt has at least one token")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompts[{i}] has dtype {prompt.dtype}, tokens are integers")
        _check_tokens(f"prompts[{i}]", prompt, config.vocab_size)
        for name, limit in room.items():
            if limit is not None and len(prompt) + max_new_tokens > limit:
                needs = f"{len(prompt)} tokens and max_new_tokens={max_new_tokens}"
                raise ValueError(f"prompts[{i}] has {needs}, together more than {name}={limit}")
    _check_tokens("stop_tokens", np.array(list(stop_tokens), int), config.vocab_size)


def _check_tokens(name: str, tokens: Int[np.ndarray, "T"], vocab_size: int) -> None:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name} holds token {outside[0]}, allowed: 0 to {vocab_size - 1}")
