"""Trained language models by name or folder."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from manyheads.architectures.language import Decoder
from manyheads.architectures.language.checkpoint import decoder_config, load_decoder
from manyheads.architectures.language.llama import load_llama
from manyheads.architectures.model_files import CONFIG, read_json
from manyheads.experiments.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from manyheads.experiments.pretrained.smollm2 import STOP_TOKENS, chat_prompt, load_smollm2
from manyheads.experiments.training.trainer import load_description, restore_model
from manyheads.layers.mixer import unknown_name

__all__ = ["TextModel", "load_model"]

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class TextModel:
    """A model and what it takes to generate text with it.

    Attributes:
      model: the decoder.
      tokenizer: of its text.
      stop_tokens: tokens with which its texts end.
      chat: the prompt that asks for an answer to a text; None for a model that was not trained to answer.
    """

    model: Decoder
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...] = ()
    chat: Callable[[str], str] | None = None


def load_model(name: str | Path) -> TextModel:
    """Load "smollm2", or the model in a folder: a Llama checkpoint, one of ``save_decoder``, or a training run on text.

    The first two kinds of folder hold ``tokenizer.json`` as well, unless the tokens are bytes.

    Raises:
      ValueError: an unknown name, or a folder without a whole model that can generate text.
    """
    if str(name) == "smollm2":
        model, tokenizer = load_smollm2()
        stop_tokens = tuple(int(tokenizer.encode(token)[0]) for token in STOP_TOKENS)
        return TextModel(model, tokenizer, stop_tokens, chat_prompt)
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{unknown_name('model', str(name), ['smollm2'])}, or a folder with a model")
    if (folder / "checkpoints").is_dir():
        return _load_run(folder)
    fields = read_json(folder / CONFIG)
    if "architectures" in fields:
        _, model = load_llama(folder)
        return TextModel(model, _LlamaTokenizer.load(folder / TOKENIZER), _end_tokens(fields, folder / CONFIG))
    model = load_decoder(folder)
    return TextModel(model, _tokenizer(folder, "bpe" if (folder / TOKENIZER).exists() else "byte"))


def _load_run(folder: Path) -> TextModel:
    description = load_description(folder)
    if description.get("task") != "text":
        raise ValueError(f"{folder}: task={description.get('task')!r} of this run is not 'text': it has no tokenizer")
    tokenizer = _tokenizer(folder, description["data"]["tokenizer"])
    config = decoder_config(description["model"], source=folder / CONFIG)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return TextModel(restore_model(folder, Decoder(config, rngs=nnx.Rngs(0))), tokenizer)


def _tokenizer(folder: Path, kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else BPETokenizer.load(folder / TOKENIZER)


def _end_tokens(fields: dict[str, Any], source: Path) -> tuple[int, ...]:
    tokens = fields.get("eos_token_id")
    tokens = [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"{source}: eos_token_id={tokens!r} is neither a token nor a list of tokens")
    return tuple(tokens)


class _LlamaTokenizer(BPETokenizer):
    """The tokenizer of a Llama checkpoint: any vocabulary, and a token at the beginning of a text where it asks for it."""

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Token ids of ``text``: int32."""
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)
