"""Tasks of the decoder: next-token prediction on text, and recall on MQAR.

Both train a ``Decoder``; they differ in their data and in what counts. A task is what ``experiments.training`` asks for:
model, batches, loss, and what to show at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from manyheads.architectures.language.decoder import Decoder, DecoderConfig
from manyheads.experiments.data.batching import Batch
from manyheads.experiments.data.text import TextData
from manyheads.experiments.data.tokenizers import BPETokenizer
from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.record import write_text
from manyheads.experiments.tasks.mqar import IGNORE, MQARData

__all__ = ["MQARTask", "TextTask", "cross_entropy"]


def cross_entropy(
    logits: Float[Array, "B T vocab"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean negative log-likelihood (nats) and accuracy over the labels that are not ``IGNORE``; float32."""
    counted = labels != IGNORE
    total = jnp.maximum(jnp.sum(counted), 1)
    picked = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    hits = jnp.argmax(logits, axis=-1) == labels
    return jnp.sum(jnp.where(counted, nll, 0)) / total, jnp.sum(hits & counted) / total


@dataclass(frozen=True)
class TextTask:
    """Language modelling on text.

    Attributes:
      model: settings of the decoder; its vocabulary becomes that of the tokenizer.
      data: the corpus and its batches.
      seed: of the order of the batches and of the sample.
      sample_prompt: what the text shown at the end begins with.
      sample_tokens: its length in tokens.
    """

    model: DecoderConfig
    data: TextData
    seed: int
    sample_prompt: str = "ROMEO.\n"
    sample_tokens: int = 400

    @cached_property
    def config(self) -> DecoderConfig:
        """The settings with the vocabulary of the tokenizer."""
        return replace(self.model, vocab_size=self.data.load_tokenizer().vocab_size)

    def init_model(self, rngs: nnx.Rngs) -> Decoder:
        """A decoder with fresh parameters."""
        return Decoder(self.config, rngs=rngs)

    def train_data(self) -> grain.MapDataset:
        """Endless batches of windows."""
        return self.data.train(self.seed)

    def eval_data(self) -> Sequence[Batch]:
        """Windows of the held-out text."""
        return self.data.validation()

    def loss(self, model: Decoder, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Nats per token; as an extra, nats per byte."""
        tokens = batch["tokens"]
        loss, _ = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return loss, {"nats_per_byte": loss / self.data.bytes_per_token}

    def tokens(self, batch: Batch) -> int:
        """Predicted tokens of a batch."""
        rows, columns = batch["tokens"].shape
        return rows * (columns - 1)

    def finish(self, model: Decoder, out: Path) -> None:
        """Write a sample of generated text to ``sample.txt`` and the tokenizer to ``tokenizer.json``, if it learned one."""
        tokenizer = self.data.load_tokenizer()
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(out / "tokenizer.json")
        prompt = np.asarray(tokenizer.encode(self.sample_prompt), np.int32)
        room = self.config.max_length if self.config.position == "learned" else prompt.size + self.sample_tokens
        sample = generate(
            model,
            [prompt],
            max_new_tokens=min(self.sample_tokens, room - prompt.size),
            temperature=0.7,
            top_p=0.95,
            seed=self.seed,
        )
        text = tokenizer.decode(np.asarray(sample.tokens[0]))
        write_text(out / "sample.txt", f"{self.sample_prompt}{text}\n")


@dataclass(frozen=True)
class MQARTask:
    """Multi-query associative recall (Zoology, 2023): the accuracy on the queries is what counts.

    Attributes:
      model: settings of the decoder; its vocabulary becomes that of the data.
      data: the sequences.
      seed: of the training sequences and their order.
    """

    model: DecoderConfig
    data: MQARData
    seed: int

    def init_model(self, rngs: nnx.Rngs) -> Decoder:
        """A decoder with fresh parameters."""
        return Decoder(replace(self.model, vocab_size=self.data.vocab_size), rngs=rngs)

    def train_data(self) -> grain.MapDataset:
        """Endless batches of training sequences."""
        return self.data.train(self.seed)

    def eval_data(self) -> Sequence[Batch]:
        """The test sequences."""
        return self.data.test()

    def loss(self, model: Decoder, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Nats per query; as an extra, the accuracy on the queries."""
        loss, accuracy = cross_entropy(model(batch["inputs"]), batch["labels"])
        return loss, {"accuracy": accuracy}

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch."""
        return batch["inputs"].size

    def finish(self, model: Decoder, out: Path) -> None:
        """Nothing to show beyond loss and accuracy."""
