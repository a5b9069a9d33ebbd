import json

import numpy as np
import pytest

from manyheads.experiments.data.text import TextData, pack
from manyheads.experiments.data.tokenizers import BPETokenizer


@pytest.fixture
def text(rng) -> str:
    """Random letters: every window of a dozen is found at one place only."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz \n"), 3000))


@pytest.fixture
def path(tmp_path, text) -> str:
    file = tmp_path / "book.txt"
    file.write_text(text)
    return str(file)


def starts(stream: str, windows: np.ndarray) -> list[int]:
    """Place of each window in the stream; fails if it is not there."""
    return [stream.index(bytes(window.tolist()).decode()) for window in windows]


def test_training_windows_tile_the_stream_from_a_new_offset_in_every_epoch(path, text, seed):
    data = TextData(path=path, seq_len=50, batch_size=4)
    stream = text[:2700] + "\n\n"
    count = (len(stream) - 50) // 50
    dataset = data.train(seed)
    batches = [dataset[step]["tokens"] for step in range(3 * count)]
    assert all(batch.shape == (4, 51) and batch.dtype == np.int32 for batch in batches)
    epochs = np.array(starts(stream, np.concatenate(batches))).reshape(12, count)
    for epoch in epochs:
        assert (np.diff(np.sort(epoch)) == 50).all()  # No token is a target twice.
        assert (np.diff(epoch) != 50).any()
    assert len(set(epochs.min(axis=1))) > 3


def test_windows_start_everywhere(tmp_path, seed):
    text = "abcdefghijklmnopqrstuvwxyz0123"
    (tmp_path / "book.txt").write_text(text)
    dataset = TextData(path=str(tmp_path), seq_len=4, batch_size=6).train(seed)
    stream = text[:27] + "\n\n"
    places = starts(stream, np.concatenate([dataset[step]["tokens"] for step in range(300)]))
    assert set(places) == set(range(len(stream) - 4))


def test_training_is_a_function_of_the_seed(path, seed):
    data = TextData(path=path, seq_len=50, batch_size=4)
    a, b, c = data.train(seed), TextData(path=path, seq_len=50, batch_size=4).train(seed), data.train(seed + 1)
    for step in range(30):
        np.testing.assert_array_equal(a[step]["tokens"], b[step]["tokens"])
    assert any((a[step]["tokens"] != c[step]["tokens"]).any() for step in range(3))


def test_iterator_resumes_from_its_saved_state(path, seed):
    data = TextData(path=path, seq_len=50, batch_size=4)
    running = iter(data.train(seed).to_iter_dataset())
    for _ in range(20):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    expected = [next(running)["tokens"] for _ in range(20)]
    resumed = iter(data.train(seed).to_iter_dataset())
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed)["tokens"] for _ in range(20)], expected)


def test_shards_together_are_the_whole_batch(path, seed):
    data = TextData(path=path, seq_len=50, batch_size=4)
    shards = [data.train(seed, shard_index=i, shard_count=2) for i in range(2)]
    for step in range(30):
        parts = np.stack([shard[step]["tokens"] for shard in shards], axis=1)
        np.testing.assert_array_equal(parts.reshape(4, 51), data.train(seed)[step]["tokens"])


def test_validation_is_spread_over_the_held_out_text(path, text):
    stream = text[2700:] + "\n\n"
    everything = TextData(path=path, seq_len=10, batch_size=5).validation()
    assert [batch["tokens"].shape for batch in everything] == [(5, 11)] * 6
    assert starts(stream, np.concatenate([b["tokens"] for b in everything])) == list(range(0, 300, 10))
    (some,) = TextData(path=path, seq_len=10, batch_size=16, validation_tokens=49).validation()
    assert starts(stream, some["tokens"]) == [0, 70, 150, 220]
    (whole,) = TextData(path=path, seq_len=10, batch_size=16).validation()  # 30 windows: room for one whole batch.
    assert starts(stream, whole["tokens"]) == [30 * i // 16 * 10 for i in range(16)]


def test_shakespeare_splits():
    data = TextData()
    train, validation = data.texts()
    assert list(validation) == ["john", "macbeth", "tempest"] and len(train) == 39
    stream = "".join(text + "\n\n" for text in validation.values())
    batches = data.validation()
    assert [batch["tokens"].shape for batch in batches] == [(16, 257)] * 16
    places = starts(stream, np.concatenate([batch["tokens"] for batch in batches]))
    assert places[0] == 0 and places[-1] > 0.99 * len(stream)
    assert data.load_tokenizer().vocab_size == 256 and data.bytes_per_token == 1.0


def test_bpe_is_learned_from_the_training_text_alone(path, text):
    data = TextData(path=path, seq_len=50, tokenizer="bpe", vocab_size=400)
    expected = BPETokenizer.train([text[:2700]], vocab_size=400)
    tokenizer = data.load_tokenizer()
    np.testing.assert_array_equal(tokenizer.encode(text), expected.encode(text))
    other = BPETokenizer.train([text], vocab_size=400)
    assert not np.array_equal(tokenizer.encode(text), other.encode(text))
    targets = np.concatenate([batch["tokens"][:, 1:].ravel() for batch in data.validation()])
    assert data.bytes_per_token == pytest.approx(len(tokenizer.decode(targets)) / len(targets))
    assert data.bytes_per_token > 1


def test_text_shorter_than_a_window(path):
    with pytest.raises(ValueError, match="seq_len=302 needs at least 303 tokens, but the validation text has 302"):
        TextData(path=path, seq_len=302).validation()
    with pytest.raises(ValueError, match="but the training text has 2702"):
        TextData(path=path, seq_len=2702).train(0)
    assert TextData(path=path, seq_len=301).validation()[0]["tokens"].shape == (1, 302)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": "shakespear"}, "unknown corpus 'shakespear'. Did you mean 'shakespeare'"),
        ({"tokenizer": "bytes"}, "unknown tokenizer 'bytes'. Did you mean 'byte'"),
        ({"seq_len": 0}, "seq_len=0 must be positive"),
        ({"batch_size": -1}, "batch_size=-1 must be positive"),
        ({"validation_tokens": 255}, "validation_tokens=255 is less than seq_len=256"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextData(**arguments)


def test_pack_keeps_every_document_whole(rng):
    seq_len = int(rng.integers(1, 20))
    documents = [rng.integers(1, 100, size=n) for n in rng.integers(0, 2 * seq_len + 2, size=60)]
    tokens, segment_ids = pack(documents, seq_len)
    assert tokens.shape == segment_ids.shape and tokens.shape[1] == seq_len
    assert tokens.dtype == segment_ids.dtype == np.int32
    expected = sorted(tuple(d[i : i + seq_len]) for d in documents for i in range(0, len(d), seq_len))
    packed = []
    for row, ids in zip(tokens, segment_ids):
        used = np.count_nonzero(ids)
        assert (np.diff(ids[:used]) >= 0).all() and (ids[used:] == 0).all() and (row[used:] == 0).all()
        assert sorted(set(ids[:used])) == list(range(1, ids.max() + 1))
        packed += [tuple(row[ids == i]) for i in range(1, ids.max() + 1)]
    assert sorted(packed) == expected


def test_pack_is_greedy():
    a, b, c, d = (np.full(n, n) for n in (4, 3, 2, 1))
    tokens, segment_ids = pack([a, b, c, d], 6)
    assert tokens.tolist() == [[4, 4, 4, 4, 2, 2], [3, 3, 3, 1, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 0, 0]]
    assert pack([], 6)[0].shape == (0, 6)
    with pytest.raises(ValueError, match="seq_len=0 must be positive"):
        pack([a], 0)
