import json
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from manyheads.architectures.language import Decoder, DecoderConfig
from manyheads.architectures.language.checkpoint import load_decoder, named_leaves, save_decoder

TINY = {"vocab_size": 19, "d_model": 8, "num_heads": 2, "hidden": 8}
CONFIGS = {
    "hybrid with a layer left over": DecoderConfig(**TINY, num_layers=5, mixers=("softmax(sinks=True)", "lightning")),
    "layers apart": DecoderConfig(**TINY, num_layers=2, scan_layers=False, feed_forward="plain", norm="layer"),
    "learned positions, untied": DecoderConfig(
        **TINY, num_layers=2, position="learned", max_length=7, tie_embeddings=False, norm_eps=1e-3
    ),
}
HYBRID = CONFIGS["hybrid with a layer left over"]


def assert_equal(a, b):
    assert a.config == b.config
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), y in zip(named_leaves(a).items(), jax.tree.leaves(b)):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def saved(tmp_path, seed):
    """A model and the folder it was saved to."""
    model = Decoder(HYBRID, rngs=nnx.Rngs(seed))
    save_decoder(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(config, dtype, seed, tmp_path):
    model = jax.tree.map(lambda x: x.astype(dtype), Decoder(config, rngs=nnx.Rngs(seed)))
    save_decoder(model, tmp_path / "new" / "folder")
    assert_equal(load_decoder(tmp_path / "new" / "folder"), model)


def test_names_are_paths(saved):
    names = load_file(saved[1] / "model.safetensors").keys()
    assert {"embedding.table", "norm.weight", "repeats.0.mixer.query.kernel", "rest.0.mixer.sinks"} <= names
    assert {"repeats.1.mixer.log_decay", "repeats.1.feed_forward.down.kernel"} <= names


def test_saving_replaces(saved, seed):
    _, folder = saved
    other = Decoder(CONFIGS["layers apart"], rngs=nnx.Rngs(seed + 1))
    save_decoder(other, folder)
    assert_equal(load_decoder(folder), other)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_without_a_field_takes_the_default(saved):
    model, folder = saved
    fields = json.loads((folder / "config.json").read_text())
    del fields["activation"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert_equal(load_decoder(folder), model)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object, but of type list"),
        ('{"d_modle": 8}', "unknown field 'd_modle'. Did you mean 'd_model'?"),
        ('{"d_model": "8"}', "d_model='8' is not of type int"),
        ('{"d_model": true}', "d_model=True is not of type int"),
        ('{"norm_eps": "x"}', "norm_eps='x' is not of type float | None"),
        ('{"mixers": "softmax"}', "mixers='softmax' is not of type tuple[str, ...]"),
        ('{"mixers": ["sofmax"]}', "unknown mixer 'sofmax'. Did you mean 'softmax'?"),
        ('{"norm": "batch"}', "norm='batch' is not of type"),
        ('{"num_layers": 0}', "num_layers=0 must be at least 1"),
    ],
)
def test_bad_config_is_one_line(saved, text, message):
    path = saved[1] / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_decoder(saved[1])
    assert message in one_line(error)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("norm.weight"), "tensor 'norm.weight' of shape [8] is missing in"),
        (lambda t: t.update({"norm.wieght": np.ones(8)}), "'norm.wieght' does not belong to the model; nearest: norm"),
        (lambda t: t.update({"norm.weight": np.ones(9)}), "tensor 'norm.weight' has shape [9], expected [8]"),
        (lambda t: t.update({"norm.weight": np.ones(8, int)}), "tensor 'norm.weight' is I64, allowed: F64, F32"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    path = saved[1] / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_decoder(saved[1])
    assert message in one_line(error)
    assert str(path) in str(error.value)


def test_missing_tensors_file(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: No such file"):
        load_decoder(saved[1])


def test_no_truncation_goes_unseen(saved, rng):
    path = saved[1] / "model.safetensors"
    whole = path.read_bytes()
    for size in [0, 7, 8, len(whole) - 1, *rng.integers(len(whole), size=20)]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            load_decoder(saved[1])


def test_no_flipped_bit_changes_the_model(saved, rng):
    model, folder = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.integers(8, header, size=20), *rng.integers(header, len(whole), size=20)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = load_decoder(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            assert place < header or "is damaged: its CRC-32" in str(error)
        else:  # a bit of the header that says nothing about the arrays
            assert place < header
            assert_equal(loaded, model)


def test_a_full_disk_leaves_the_old_model(saved, seed):
    model, folder = saved
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(OSError) as error:
            save_decoder(Decoder(HYBRID, rngs=nnx.Rngs(seed + 1)), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "model.safetensors cannot be written" in one_line(error)
    assert_equal(load_decoder(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path, seed):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_decoder(Decoder(HYBRID, rngs=nnx.Rngs(seed)), tmp_path / "file")


SAVE_FOREVER = """
import sys, dataclasses, jax, jax.numpy as jnp
from manyheads.architectures.language.checkpoint import load_decoder, save_decoder
model = load_decoder(sys.argv[1])
for i in range(10**6):
    save_decoder(jax.tree.map(lambda x: jnp.full_like(x, i), model), sys.argv[1])
    print(i, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_model(saved, rng):
    _, folder = saved
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, folder], stdout=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    last = [int(line) for line in process.communicate()[0].split()]
    assert process.returncode == -signal.SIGKILL
    values = {float(np.unique(np.asarray(leaf)).item()) for leaf in jax.tree.leaves(load_decoder(folder))}
    assert len(values) == 1
    assert values <= ({*last[-1:], last[-1] + 1} if last else {2, 3})
