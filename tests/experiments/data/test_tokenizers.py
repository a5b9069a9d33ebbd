import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.experiments.data.tokenizers import BPETokenizer, ByteTokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n\nthe end of the fox\n" * 20
BYTES = ByteTokenizer()
BPE = BPETokenizer.train([TEXT], vocab_size=290)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@BOTH
@settings(deadline=None)
@given(text=any_text)
def test_lossless_on_any_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.ndim == 1
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


@BOTH
def test_every_token_is_counted(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.encode(TEXT).max() < tokenizer.vocab_size


@BOTH
def test_decode_replaces_what_is_not_utf8(tokenizer):
    tokens = tokenizer.encode("aé")
    cut = tokens[:-1]  # The last byte of the two of é is missing.
    assert tokenizer.decode(cut) == "a\ufffd"


def test_streams_are_small():
    assert BYTES.encode("abc").dtype == np.uint8
    assert BPE.encode("abc").dtype == BPE.encode("").dtype == np.uint16


def test_bpe_merges():
    assert BPE.vocab_size == 290
    assert len(BPE.encode(TEXT)) < len(TEXT) / 2


def test_bpe_of_a_short_text_stops_early():
    assert BPETokenizer.train(["ab"], vocab_size=1000).vocab_size == 257


def test_bpe_pieces_do_not_change_the_tokens(rng):
    lines = ["the fox\n", "  indented\n", "\n", "\n\n", "end \n", "\t\n", "'s dog\n", "é\n"]
    text = "".join(rng.choice(lines, 60_000))
    assert len(text) > 3 * 65536
    whole = BPE._tokenizer.encode(text).ids
    np.testing.assert_array_equal(BPE.encode(text), whole)


def test_bpe_training_depends_on_the_text_alone(tmp_path):
    program = (
        "import sys\nfrom manyheads.experiments.data.tokenizers import BPETokenizer\n"
        "BPETokenizer.train([sys.stdin.read()], vocab_size=400).save(sys.argv[1])"
    )
    text = TEXT + "a b c d e f g h aa bb cc dd ee ff gg hh\n" * 3  # Many pairs of equal frequency.
    for name, parallel in (("one", "true"), ("two", "false")):
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / name],
            input=text.encode(),
            env={**os.environ, "TOKENIZERS_PARALLELISM": parallel},
            check=True,
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bpe_save_and_load(tmp_path):
    BPE.save(tmp_path / "bpe.json")
    loaded = BPETokenizer.load(tmp_path / "bpe.json")
    np.testing.assert_array_equal(loaded.encode(TEXT), BPE.encode(TEXT))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "bpe.json").read_bytes()


def test_bpe_load_of_a_damaged_file(tmp_path):
    path = tmp_path / "bpe.json"
    BPE.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"bpe\.json cannot be read: .*") as error:
        BPETokenizer.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("vocab_size", [255, 65537])
def test_bpe_vocab_size_out_of_range(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is not from 256 to 65536"):
        BPETokenizer.train([TEXT], vocab_size=vocab_size)
