"""Decoders in the files of Llama checkpoints, as the library ``transformers`` lays them out.

A folder holds ``config.json`` and one or several ``*.safetensors``, with an index or without. Every layer has softmax
attention with half-split rotary positions and a gated feed-forward layer, each behind an RMS norm (LLaMA: Open and
Efficient Foundation Language Models, 2023). Kernels are [out, in] on both sides, so tensors differ in name alone, and in
that repeated layers of a ``Decoder`` are stacked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from manyheads.architectures.language.checkpoint import abstract_decoder, decoder_config, named_leaves, with_leaves
from manyheads.architectures.language.decoder import Decoder, DecoderConfig
from manyheads.architectures.model_files import CONFIG, TENSORS, read_json, read_tensors, write_model

__all__ = ["llama_config", "llama_decoder", "load_llama", "save_llama"]

ARCHITECTURE = "LlamaForCausalLM"
INDEX = f"{TENSORS}.index.json"
MIXER, MIXER_WITH_BIAS = "softmax", "softmax(use_bias=True)"

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

MODEL = {
    "embedding.table": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "out.kernel": "lm_head.weight",
}
LAYER = {
    "mixer_norm": "input_layernorm",
    "mixer.query": "self_attn.q_proj",
    "mixer.key": "self_attn.k_proj",
    "mixer.value": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
PARAMETER = {"kernel": "weight", "weight": "weight", "bias": "bias"}


def load_llama(folder: str | Path, *, dtype: DTypeLike = jnp.float32) -> tuple[DecoderConfig, Decoder]:
    """Read a model of the Llama architecture.

    Args:
      folder: holds ``config.json`` and the ``*.safetensors``.
      dtype: of the parameters, whatever that of the files.

    Raises:
      ValueError: a file that is missing or damaged, another architecture, a setting that ``Decoder`` does not implement,
        or a tensor that is missing, unexpected or misshapen.
    """
    folder = Path(folder)
    config = llama_config(read_json(folder / CONFIG), source=folder / CONFIG)
    shapes = {}
    for name, leaf in named_leaves(abstract_decoder(config)).items():
        shape = leaf.shape[1:] if _is_stacked(name) else leaf.shape
        shapes |= dict.fromkeys(_tensor_names(name, config), shape)
    # Older files hold the rotary frequencies as well, and some hold tied embeddings twice.
    ignored = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)}
    if config.tie_embeddings:
        ignored.add(MODEL["out.kernel"])
    return config, llama_decoder(config, read_tensors(_tensor_files(folder), shapes, ignored), dtype=dtype)


def save_llama(model: Decoder, folder: str | Path) -> None:
    """Write a decoder in the layout that ``load_llama`` and ``transformers`` read.

    Raises:
      ValueError: if the model is not of the Llama architecture.
      OSError: if the folder cannot be written.
    """
    config, tensors = _to_llama_config(model), {}
    for name, leaf in named_leaves(model).items():
        parts = np.asarray(leaf) if _is_stacked(name) else [leaf]
        tensors |= zip(_tensor_names(name, model.config), parts)
    write_model(Path(folder), config, tensors)


def llama_decoder(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, dtype: DTypeLike = jnp.float32
) -> Decoder:
    """The decoder with the tensors of a Llama checkpoint, which has them all in the right shape."""
    arrays = {}
    model = abstract_decoder(config)
    for name in named_leaves(model):
        parts = [tensors[tensor] for tensor in _tensor_names(name, config)]
        arrays[name] = jnp.asarray(np.stack(parts) if _is_stacked(name) else parts[0], dtype)
    return with_leaves(model, arrays)


def _is_stacked(leaf: str) -> bool:
    return leaf.startswith("repeats.")


def _tensor_names(leaf: str, config: DecoderConfig) -> list[str]:
    """The tensors behind a leaf of the decoder: one, or one a layer if it is stacked."""
    if leaf in MODEL:
        return [MODEL[leaf]]
    _, index, rest = leaf.split(".", 2)
    module, parameter = rest.rsplit(".", 1)
    layers = range(config.num_layers) if _is_stacked(leaf) else [int(index)]
    return [f"model.layers.{layer}.{LAYER[module]}.{PARAMETER[parameter]}" for layer in layers]


def _tensor_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} has no *.safetensors file")
        return paths
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: weight_map={weight_map!r} does not map tensors to files")
    return [folder / name for name in sorted(set(weight_map.values()))]


def llama_config(fields: Mapping[str, Any], *, source: object) -> DecoderConfig:
    """The settings of a decoder from the ``config.json`` of a Llama model.

    Args:
      fields: the object in ``config.json``.
      source: its path, for the errors.

    Raises:
      ValueError: another architecture, or a field that is missing, of the wrong type or not implemented.
    """

    def get(name: str, kind: type, *default: Any) -> Any:
        value = fields.get(name)
        if value is None and default:
            return default[0]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{source}: {name}={value!r} is not of type {kind.__name__}")
        return value

    if fields.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"{source}: architectures={fields.get('architectures')!r} is not ['{ARCHITECTURE}']")
    activation = get("hidden_act", str, "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: hidden_act={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if get("mlp_bias", bool, False):
        raise ValueError(f"{source}: mlp_bias=True is not implemented, allowed: False")
    settings = {
        "vocab_size": get("vocab_size", int),
        "d_model": get("hidden_size", int),
        "num_layers": get("num_hidden_layers", int),
        "mixers": (MIXER_WITH_BIAS if get("attention_bias", bool, False) else MIXER,),
        "num_heads": get("num_attention_heads", int),
        "num_kv_heads": get("num_key_value_heads", int, None),
        "head_dim": get("head_dim", int, None),
        "max_length": get("max_position_embeddings", int, 2048),
        "rope_base": _rope_base(fields, source),
        "hidden": get("intermediate_size", int),
        "activation": ACTIVATIONS[activation],
        "norm_eps": get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": get("tie_word_embeddings", bool, False),
    }
    return decoder_config(settings, source=source)


def _rope_base(fields: Mapping[str, Any], source: object) -> float:
    """The base of the rotary frequencies: a field of its own in older files, one of ``rope_parameters`` in newer ones."""
    base = fields.get("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        options = fields.get(name) or {}
        plain = isinstance(options, dict) and options.get("partial_rotary_factor", 1.0) == 1.0
        if not plain or options.get("rope_type", options.get("type", "default")) != "default":
            raise ValueError(f"{source}: {name}={options!r} is not implemented, allowed: rope_type 'default'")
        base = options.get("rope_theta", base)
    return base


def _to_llama_config(model: Decoder) -> dict[str, Any]:
    config = model.config
    required = {"position": ("rope",), "feed_forward": ("gated",), "norm": ("rms",), "activation": ACTIVATIONS.values()}
    for field, allowed in required.items():
        if getattr(config, field) not in allowed:
            raise ValueError(
                f"{field}={getattr(config, field)!r} is not of the Llama architecture: {', '.join(allowed)}"
            )
    if set(config.mixers) not in ({MIXER}, {MIXER_WITH_BIAS}):
        raise ValueError(f"mixers={config.mixers} are not of the Llama architecture: {MIXER} or {MIXER_WITH_BIAS}")
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "attention_bias": config.mixers[0] == MIXER_WITH_BIAS,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim or config.d_model // config.num_heads,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_base,
        "intermediate_size": config.hidden_size,
        "hidden_act": activation,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
