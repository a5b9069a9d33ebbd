"""Language modelling on text: a corpus, a tokenizer, and batches of windows of its token stream.

The documents of a split are joined, with a blank line between them, to one stream of uint8 or uint16 tokens. A training
epoch cuts the stream into windows that do not overlap, from an offset that changes with the epoch, and visits them in
random order: no token is predicted twice in an epoch, and over epochs a token is seen at every place of a window.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import grain
import numpy as np
from jaxtyping import Int

from manyheads.experiments.data.batching import Batch, fixed_batches, shuffled_indices
from manyheads.experiments.data.shakespeare import load_shakespeare, split_works
from manyheads.experiments.data.text_files import load_text_folder
from manyheads.experiments.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from manyheads.layers.mixer import unknown_name

__all__ = ["TextData", "pack"]

_SEPARATOR = "\n\n"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextData:
    """Text for a language model. Files are read and encoded on first use.

    Attributes:
      corpus: "shakespeare": 42 works, of which three plays are held out for validation.
      path: a text file or a folder of .txt files to use instead; the last tenth of each file is validation.
      tokenizer: "byte", or "bpe": byte-level byte-pair encoding learned from the training text.
      vocab_size: tokens of "bpe", from 256 to 65536.
      seq_len: tokens that are predicted in each window, T.
      batch_size: windows in a batch, B.
      validation_tokens: upper bound of the tokens that are predicted in ``validation``.
    """

    corpus: Literal["shakespeare"] = "shakespeare"
    path: str | None = None
    tokenizer: Literal["byte", "bpe"] = "byte"
    vocab_size: int = 4096
    seq_len: int = 256
    batch_size: int = 16
    validation_tokens: int = 65536

    def __post_init__(self):
        for field, allowed in (("corpus", ("shakespeare",)), ("tokenizer", ("byte", "bpe"))):
            if getattr(self, field) not in allowed:
                raise unknown_name(field, getattr(self, field), allowed)
        for field in ("seq_len", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.validation_tokens < self.seq_len:
            raise ValueError(f"validation_tokens={self.validation_tokens} is less than seq_len={self.seq_len}")

    def texts(self) -> tuple[dict[str, str], dict[str, str]]:
        """The documents of the training and of the validation split, by name."""
        return split_works(load_shakespeare()) if self.path is None else load_text_folder(self.path)

    @cached_property
    def _encoded(self) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
        """The tokenizer and the token streams of the two splits."""
        train, validation = self.texts()
        _logger.info("training text: %s; validation text: %s", ", ".join(train), ", ".join(validation))
        if self.tokenizer == "bpe":
            tokenizer = BPETokenizer.train(train.values(), vocab_size=self.vocab_size)
        else:
            tokenizer = ByteTokenizer()
        streams = []
        for split, documents in (("training", train), ("validation", validation)):
            stream = np.concatenate([tokenizer.encode(text + _SEPARATOR) for text in documents.values()])
            if len(stream) <= self.seq_len:
                raise ValueError(
                    f"seq_len={self.seq_len} needs at least {self.seq_len + 1} tokens, "
                    f"but the {split} text has {len(stream)}"
                )
            streams.append(stream)
        return tokenizer, *streams

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; its ``vocab_size`` is that of the model. The first call trains a BPE tokenizer."""
        return self._encoded[0]

    def train(self, seed: int, *, shard_index: int = 0, shard_count: int = 1) -> grain.MapDataset:
        """Endless training batches ``{"tokens": int32 [B, T+1]}``; inputs are ``[:, :-1]``, targets ``[:, 1:]``.

        Args:
          seed: seed of the orders and offsets; the same seed gives the same batches.
          shard_index, shard_count: take this part of every batch, see ``shuffled_indices``.

        Raises:
          ValueError: if the text is shorter than one window, or the shard is out of range.
        """
        stream = self._encoded[1]
        # Room for offsets of a whole window, where the stream is that long.
        count = max(1, (len(stream) - self.seq_len) // self.seq_len)
        offsets = len(stream) - count * self.seq_len

        def batch(draw: tuple[np.ndarray, np.ndarray]) -> Batch:
            epochs, windows = draw
            unique, inverse = np.unique(epochs, return_inverse=True)
            shifts = np.array([np.random.default_rng((seed, int(epoch), 1)).integers(offsets) for epoch in unique])
            return {"tokens": _windows(stream, windows * self.seq_len + shifts[inverse], self.seq_len)}

        indices = shuffled_indices(count, self.batch_size, seed=seed, shard_index=shard_index, shard_count=shard_count)
        return indices.map(batch)

    def validation(self) -> list[Batch]:
        """Batches like those of ``train``, the same in every call: windows evenly spread over the validation text.

        All batches have ``batch_size`` windows, unless there are fewer windows than that in all.
        """
        stream = self._encoded[2]
        available = (len(stream) - 1) // self.seq_len
        count = min(available, self.validation_tokens // self.seq_len)
        if count > self.batch_size:
            count -= count % self.batch_size
        starts = np.arange(count) * available // count * self.seq_len
        return fixed_batches({"tokens": _windows(stream, starts, self.seq_len)}, self.batch_size)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of the tokens that ``validation`` predicts: nats per byte = nats per token / bytes_per_token."""
        token_bytes = self.load_tokenizer().token_bytes
        return float(np.mean([token_bytes[batch["tokens"][:, 1:]].mean() for batch in self.validation()]))


def _windows(stream: np.ndarray, starts: np.ndarray, seq_len: int) -> Int[np.ndarray, "B T+1"]:
    """The ``seq_len + 1`` tokens from each start."""
    return stream[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def pack(documents: Sequence[np.ndarray], seq_len: int) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"]]:
    """Pack documents into rows of ``seq_len`` tokens: each goes, whole, to the first row with room for it.

    A document longer than a row is cut into pieces of ``seq_len``, each a document of its own.

    Args:
      documents: token ids of each document; empty ones are skipped.
      seq_len: tokens in a row, T.

    Returns:
      tokens and segment_ids, int32. Segments count from 1 in each row; padding has token 0 and segment 0.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be positive")
    pieces = [document[i : i + seq_len] for document in documents for i in range(0, len(document), seq_len)]
    used = np.zeros(len(pieces), np.int64)
    places = []
    for piece in pieces:
        row = int(np.argmax(used + len(piece) <= seq_len))
        places.append((row, slice(used[row], used[row] + len(piece))))
        used[row] += len(piece)
    tokens = np.zeros((np.count_nonzero(used), seq_len), np.int32)
    segment_ids = np.zeros_like(tokens)
    for piece, (row, span) in zip(pieces, places):
        tokens[row, span] = piece
        segment_ids[row, span] = segment_ids[row].max() + 1
    return tokens, segment_ids
