"""Tokenizers: bytes, and byte-pair encoding of bytes.

Byte-pair encoding (Neural Machine Translation of Rare Words with Subword Units, 2016) starts from the 256 bytes and
merges the most frequent pair of neighbouring tokens until the vocabulary is full.

Both are lossless on any text. ``token_bytes`` is the length of every token in bytes: it turns a loss in nats per token
into nats per byte, which is comparable between tokenizers.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

__all__ = ["BPETokenizer", "ByteTokenizer", "Tokenizer"]

MIN_VOCAB_SIZE = 256  # Every byte is a token, so that no text is unknown.
MAX_VOCAB_SIZE = 2**16  # Token streams are uint16.

# At least 65536 characters, up to a line break that is a token of its own (no other white space beside it): encoding
# piece by piece gives the tokens of the whole text, in bounded memory.
_PIECE = re.compile(r".{65536}.*?\S\n(?=\S)|.+", re.DOTALL)


class Tokenizer(Protocol):
    """A lossless map between text and token ids below ``vocab_size``."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """Length of each token in bytes of UTF-8."""

    def encode(self, text: str) -> UInt[np.ndarray, "T"]:
        """Token ids of ``text``, in the smallest unsigned type that holds them."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
    """One token for each byte of UTF-8."""

    vocab_size = 256

    @property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """One byte each."""
        return np.ones(self.vocab_size, np.int64)

    def encode(self, text: str) -> UInt[np.ndarray, "T"]:
        """The bytes of ``text``: uint8."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in tokens).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding; build one with ``train`` or ``load``."""

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "BPETokenizer":
        """Learn merges from ``texts``; the result depends on nothing else.

        Args:
          texts: the training documents.
          vocab_size: tokens to learn, from 256 to 65536. A short text may have fewer pairs to merge and give fewer.

        Raises:
          ValueError: if ``vocab_size`` is out of range.
        """
        if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size={vocab_size} is not from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a tokenizer that ``save`` wrote; ValueError if the file is damaged."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls(HuggingFaceTokenizer.from_str(text))
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"tokenizer file {path} cannot be read: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, the same bytes for the same tokenizer."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    @property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """Length of each token in bytes; the library spells a token with one character for each byte."""
        return np.array([len(self._tokenizer.id_to_token(token)) for token in range(self.vocab_size)])

    def encode(self, text: str) -> UInt[np.ndarray, "T"]:
        """Token ids of ``text``: uint16."""
        pieces = (self._tokenizer.encode(piece).ids for piece in _PIECE.findall(text))
        return np.concatenate([np.empty(0, np.uint16), *(np.asarray(ids, np.uint16) for ids in pieces)])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)
