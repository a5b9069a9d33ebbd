"""Models in the Llama layout against ``transformers``: logits, and the gradient of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.helpers import oracle
from safetensors.numpy import load_file

from manyheads.architectures.language import Decoder, DecoderConfig
from manyheads.architectures.language.llama import load_llama, save_llama

pytestmark = pytest.mark.oracle

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "bias": {"attention_bias": True, "head_dim": 10, "hidden_act": "gelu"},
    "one layer": {"num_hidden_layers": 1, "num_key_value_heads": 1},
}


def close(ours, theirs, name=""):
    """Equal to 1e-4 of each number, and to 1e-5 of the largest one where it is small."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


def cross_entropy(model, tokens):
    """Mean loss of the next token, which gives every parameter a gradient."""
    logits = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_transformers(variant, seed, rng, tmp_path):
    torch, transformers = oracle("torch"), oracle("transformers")
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **variant}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    config, ours = load_llama(tmp_path)

    tokens = rng.integers(config.vocab_size, size=(2, 17), dtype=np.int32)
    logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    close(ours(tokens), logits)

    targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    gradient = jax.grad(cross_entropy)(ours, tokens)
    save_llama(gradient, tmp_path / "gradient")  # it has the structure of the model, so it has its names
    gradient = load_file(tmp_path / "gradient" / "model.safetensors")
    parameters = dict(theirs.named_parameters())
    assert gradient.keys() == parameters.keys()
    for name, parameter in parameters.items():
        close(gradient[name], parameter.grad, name)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_saved(tied, seed, rng, tmp_path):
    torch, transformers = oracle("torch"), oracle("transformers")
    config = DecoderConfig(
        vocab_size=50,
        d_model=24,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        hidden=40,
        rope_base=700.0,
        norm_eps=1e-3,
        tie_embeddings=tied,
    )
    ours = Decoder(config, rngs=nnx.Rngs(seed))
    ours = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), ours)
    save_llama(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = rng.integers(config.vocab_size, size=(2, 11), dtype=np.int32)
    close(ours(tokens), theirs(torch.tensor(tokens, dtype=torch.long)).logits)
