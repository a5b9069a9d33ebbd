import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manyheads.architectures.language import Decoder, DecoderConfig
from manyheads.architectures.language.checkpoint import save_decoder
from manyheads.architectures.language.llama import save_llama
from manyheads.experiments.cli import main
from manyheads.experiments.commands.generate import Completion
from manyheads.experiments.data.tokenizers import BPETokenizer, ByteTokenizer
from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.pretrained.loading import load_model

TINY = DecoderConfig(d_model=16, num_layers=2, num_heads=2, hidden=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved decoder over bytes."""
    path = tmp_path_factory.mktemp("model")
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    save_decoder(jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, model), path)
    return path


@pytest.fixture
def command(folder, capsys):
    """Run ``manyheads generate`` on that decoder; its output, after it ended well."""

    def run(*arguments):
        assert main(["generate", "--model", str(folder), *arguments]) == 0
        return capsys.readouterr().out

    return run


SAMPLED = ("--temperature", "1.0", "--seed", "7", "--tokens", "40")


def test_json_holds_the_completions(command, folder):
    rows = json.loads(command("--prompt", "Hello", "wörld", "--prompt", "x", "--tokens", "20", "--json"))
    assert [row["prompt"] for row in rows] == ["Hello", "wörld", "x"]
    prompts = [ByteTokenizer().encode(row["prompt"]) for row in rows]
    expected = generate(load_model(folder).model, prompts, max_new_tokens=20)
    for row, tokens in zip(rows, expected.tokens):
        assert row["completion"] == ByteTokenizer().decode(tokens)
        assert (row["tokens"], row["stopped"]) == (20, False)


def test_the_text_is_that_of_json(command):
    row, *_ = json.loads(command("--prompt", "Hello", "--json", *SAMPLED))
    assert command("--prompt", "Hello", *SAMPLED) == row["completion"] + "\n"
    assert "\ufffd" in row["completion"]  # random bytes: the case in which characters are held back


def test_several_prompts_are_headed(command):
    one, two = json.loads(command("--prompt", "Hello", "you", "--json", "--tokens", "5"))
    expected = f"> Hello\n{one['completion']}\n> you\n{two['completion']}\n"
    assert command("--prompt", "Hello", "--prompt", "you", "--tokens", "5") == expected


def test_stop_texts_end_the_completion(command):
    (free,) = json.loads(command("--prompt", "Hello", "--json", *SAMPLED))
    text = free["completion"]
    start = next(i for i in range(5, len(text)) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[start : start + 2]
    (row,) = json.loads(command("--prompt", "Hello", "--json", "--stop", "never", stop, *SAMPLED))
    assert row["completion"] == text[:start]
    assert row["stopped"]
    assert command("--prompt", "Hello", "--stop", stop, *SAMPLED) == text[:start] + "\n"


def test_the_seed_decides(command):
    first = command("--prompt", "Hello", *SAMPLED)
    assert first == command("--prompt", "Hello", *SAMPLED)
    assert first != command("--prompt", "Hello", "--temperature", "1.0", "--seed", "8", "--tokens", "40")
    assert command("--prompt", "Hello", *SAMPLED, "--top-k", "1") == command("--prompt", "Hello", "--tokens", "40")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prompt is missing"),
        (["--prompt"], "prompt is empty, it takes texts of at least one character"),
        (["--prompt", "x", ""], "prompt is empty"),
        (["--prompt", "x", "--stop", ""], "stop is empty"),
        (["--prompt", "x", "--tokens", "0"], "tokens=0 must be at least 1"),
        (["--prompt", "x", "--tokens", "many"], "--tokens takes int, got 'many'"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be a number from 0 up"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--prompt", "x", "--top_k", "0"], "top_k=0 must be at least 1"),
        (["--prompt", "x", "--temprature", "1"], "unknown field '--temprature'. Did you mean '--temperature'?"),
        (
            ["--prompt", "x", "--model", "smolm2"],
            "unknown model 'smolm2'. Did you mean 'smollm2'? Allowed: smollm2, or",
        ),
        (["--prompt", "x", "--chat"], "was not trained to answer, it continues texts only"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, capsys):
    assert main(["generate", "--model", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("manyheads: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_text_comes_while_it_is_generated(folder):
    """The first characters are there while the command still runs, also in a pipe."""
    command = [sys.executable, "-m", "manyheads.experiments.cli", "generate", "--model", folder, "--prompt", "Hello"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([*command, "--tokens", "50000"], stdout=subprocess.PIPE, env=environment)
    first = os.read(process.stdout.fileno(), 1)
    running = process.poll() is None
    process.kill()
    process.communicate()
    assert first
    assert running


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None)
@given(text=texts, stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
@example("xé", [])
@example("aaab", ["aab"])
@example("abab", ["abx", "b"])
def test_what_is_shown_is_never_taken_back(text, stops):
    row, shown, ended = Completion(ByteTokenizer(), stops), "", False
    for byte in text.encode():
        new, ended = row.add(byte)
        shown += new
        assert row.text.startswith(shown)
        if ended:
            break
    ends = [text.index(stop) for stop in stops if stop in text]
    assert ended == bool(ends)
    assert shown + row.held == row.text
    if ended:
        assert not any(stop in row.text for stop in stops)
        assert text.startswith(row.text)
    else:
        assert row.text == text


def test_load_model_finds_the_tokenizer(tmp_path, capsys):
    tokenizer = BPETokenizer.train(["the quick brown fox jumps over the lazy dog " * 9], vocab_size=280)
    config = DecoderConfig(vocab_size=280, d_model=16, num_layers=1, num_heads=2, hidden=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    save_decoder(model, tmp_path / "ours")
    save_llama(model, tmp_path / "llama")
    fields = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**fields, "eos_token_id": [3, 5]}))
    for name, stop_tokens in (("ours", ()), ("llama", (3, 5))):
        tokenizer.save(tmp_path / name / "tokenizer.json")
        loaded = load_model(tmp_path / name)
        assert loaded.stop_tokens == stop_tokens
        assert loaded.chat is None
        assert loaded.tokenizer.encode("the fox").tolist() == tokenizer.encode("the fox").tolist()
        np.testing.assert_array_equal(loaded.model.embedding.table[...], model.embedding.table[...])
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**fields, "eos_token_id": "end"}))
    with pytest.raises(ValueError, match="eos_token_id=\\['end'\\] is neither a token nor a list of tokens"):
        load_model(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").unlink()
    assert main(["generate", "--model", str(tmp_path / "llama"), "--prompt", "x"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_training_run(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    small = ["--model.d-model", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--model.hidden", "16"]
    data = ["--data.path", str(tmp_path / "text.txt"), "--data.seq-len", "16", "--data.batch-size", "2"]
    run = tmp_path / "run"
    bpe = ["--data.tokenizer", "bpe", "--data.vocab-size", "270"]
    assert main(["train", "text", "--steps", "2", "--out", str(run), *data, *bpe, *small, "--sample-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", str(run), "--prompt", "the quick", "--tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == 3
    loaded = load_model(run)
    assert loaded.tokenizer.vocab_size == loaded.model.config.vocab_size == 270
    description = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**description, "task": "mqar"}))
    with pytest.raises(ValueError, match="task='mqar' of this run is not 'text'"):
        load_model(run)
