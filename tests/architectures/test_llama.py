import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from manyheads.architectures.language import DecoderConfig
from manyheads.architectures.language.checkpoint import abstract_decoder
from manyheads.architectures.language.llama import load_llama, save_llama

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def random_tensors(rng, settings):
    """A checkpoint with these settings, float32."""
    D, F, V = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    Q, G = (settings["head_dim"] * settings[name] for name in ("num_attention_heads", "num_key_value_heads"))
    kernels = {"q": (Q, D), "k": (G, D), "v": (G, D), "o": (D, Q)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in (f"model.layers.{i}." for i in range(settings["num_hidden_layers"])):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": shape for name, shape in kernels.items()}
        if settings.get("attention_bias"):
            shapes |= {f"{layer}self_attn.{name}_proj.bias": shape[:1] for name, shape in kernels.items()}
        shapes |= {f"{layer}mlp.gate_proj.weight": (F, D), f"{layer}mlp.up_proj.weight": (F, D)}
        shapes |= {f"{layer}mlp.down_proj.weight": (D, F), f"{layer}input_layernorm.weight": (D,)}
        shapes |= {f"{layer}post_attention_layernorm.weight": (D,)}
    if not settings.get("tie_word_embeddings"):
        shapes |= {"lm_head.weight": (V, D)}
    return {name: rng.standard_normal(shape, np.float32) / 2 for name, shape in shapes.items()}


def llama(settings, tensors, tokens):
    """Logits of one sequence in float64, one query at a time, from the definition."""
    t = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    K, H, G = (settings[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    silu = lambda x: x / (1 + np.exp(-x))
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2)
    act = {"silu": silu, "gelu": gelu}[settings["hidden_act"]]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + settings["rms_norm_eps"]) * weight

    def rope(x):  # T heads K; features i and i + K/2 as the parts of a complex number
        angle = np.arange(len(x))[:, None] * settings["rope_theta"] ** (-np.arange(0, K, 2) / K)
        z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    x = t["model.embed_tokens.weight"][tokens]
    for i in range(settings["num_hidden_layers"]):
        w = lambda name: t[f"model.layers.{i}.{name}.weight"]  # noqa: B023
        b = lambda name: t.get(f"model.layers.{i}.{name}.bias", 0)  # noqa: B023
        h = norm(x, w("input_layernorm"))
        q, k, v = (h @ w(f"self_attn.{n}_proj").T + b(f"self_attn.{n}_proj") for n in "qkv")
        q, k, v = rope(q.reshape(-1, H, K)), rope(k.reshape(-1, G, K)), v.reshape(-1, G, K)
        y = np.zeros_like(q)
        for at in range(len(x)):
            for head in range(H):
                group = head // (H // G)
                score = np.exp(k[: at + 1, group] @ q[at, head] / np.sqrt(K))
                y[at, head] = score @ v[: at + 1, group] / score.sum()
        x = x + y.reshape(len(x), -1) @ w("self_attn.o_proj").T + b("self_attn.o_proj")
        h = norm(x, w("post_attention_layernorm"))
        x = x + (act(h @ w("mlp.gate_proj").T) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, t["model.norm.weight"]) @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


def write(folder, settings, tensors, shards=1):
    """A folder in the layout of Llama checkpoints."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def checkpoint(rng, tmp_path):
    """Settings, tensors and folder of a checkpoint."""
    tensors = random_tensors(rng, SETTINGS)
    return SETTINGS, tensors, write(tmp_path, SETTINGS, tensors)


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


VARIANTS = {
    "untied": SETTINGS,
    "tied": {**SETTINGS, "tie_word_embeddings": True},
    "bias": {**SETTINGS, "attention_bias": True, "hidden_act": "gelu"},
    "one layer": {**SETTINGS, "num_hidden_layers": 1},
    "new rope": {**without(SETTINGS, "rope_theta"), "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "no rope_scaling": {**SETTINGS, "rope_scaling": None},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_the_definition(settings, rng, tmp_path):
    tensors = random_tensors(rng, settings)
    config, model = load_llama(write(tmp_path, settings, tensors, shards=3))
    assert model.config == config
    tokens = rng.integers(settings["vocab_size"], size=9, dtype=np.int32)
    expected = llama({**settings, "rope_theta": 50.0}, tensors, tokens)
    np.testing.assert_allclose(model(tokens[None])[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_defaults_of_absent_fields(rng, tmp_path):
    optional = ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    full = {**SETTINGS, "hidden_size": 16, "num_key_value_heads": 4, "head_dim": 4}
    full |= {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    tensors = random_tensors(rng, full)
    _, model = load_llama(write(tmp_path, without(full, *optional), tensors))
    tokens = rng.integers(SETTINGS["vocab_size"], size=5, dtype=np.int32)
    np.testing.assert_allclose(model(tokens[None])[0], llama(full, tensors, tokens), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_parameters_are_float32_unless_asked(dtype, rng, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(rng, SETTINGS).items()}
    write(tmp_path, SETTINGS, tensors)
    _, model = load_llama(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(model.norm.weight[...], tensors["model.norm.weight"].astype(np.float32))
    _, model = load_llama(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("unrolled", [False, True])
def test_save_writes_what_load_read(settings, unrolled, rng, tmp_path):
    tensors = random_tensors(rng, settings)
    config, model = load_llama(write(tmp_path / "a", settings, tensors))
    save_llama(model.unrolled() if unrolled else model, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert load_llama(tmp_path / "b")[0] == config


def test_tensors_that_older_files_hold_besides(checkpoint):
    settings, tensors, folder = checkpoint
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(3)}
    write(folder, {**settings, "tie_word_embeddings": True}, tensors | frequencies)
    config, _ = load_llama(folder)
    assert config.tie_embeddings


def fails(folder, *messages):
    with pytest.raises(ValueError) as error:
        load_llama(folder)
    assert "\n" not in str(error.value)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures=['MistralForCausalLM'] is not ['LlamaForCausalLM']"),
        ({"architectures": None}, "architectures=None is not"),
        ({"hidden_size": None}, "hidden_size=None is not of type int"),
        ({"hidden_size": "12"}, "hidden_size='12' is not of type int"),
        ({"hidden_size": 0}, "d_model=0 must be at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not of type int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not of type bool"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented, allowed: False"),
        ({"hidden_act": "swish2"}, "hidden_act='swish2' is not one of silu, gelu, gelu_pytorch_tanh, relu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear', 'factor': 2.0} is not"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "is not implemented, allowed: rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters={'rope_type': 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters={'partial_rotary_factor': 0.5} is not"),
        ({"rope_theta": "1e4"}, "rope_base='1e4' is not of type float"),
    ],
)
def test_settings_that_do_not_fit(checkpoint, change, message):
    settings, _, folder = checkpoint
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    fails(folder, str(folder / "config.json"), message)


def test_heads_that_do_not_fit(checkpoint):
    settings, _, folder = checkpoint
    (folder / "config.json").write_text(json.dumps({**settings, "num_key_value_heads": 3}))
    fails(folder, "num_kv_heads=3 must be a divisor of num_heads=4")


def test_no_config(checkpoint):
    (checkpoint[2] / "config.json").unlink()
    fails(checkpoint[2], "config.json cannot be read: No such file or directory")


def test_no_tensors(checkpoint):
    (checkpoint[2] / "model.safetensors").unlink()
    fails(checkpoint[2], f"{checkpoint[2]} has no *.safetensors file")


KERNEL = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(KERNEL), f"tensor '{KERNEL}' of shape [20, 12] is missing"),
        (lambda t: t.update({KERNEL: t[KERNEL].T.copy()}), f"tensor '{KERNEL}' has shape [12, 20], expected [20, 12]"),
        (lambda t: t.update({KERNEL: t[KERNEL].astype(np.int8)}), f"tensor '{KERNEL}' is I8, allowed: F64, F32"),
        (lambda t: t.update({f"{KERNEL}s": t[KERNEL]}), f"tensor '{KERNEL}s' does not belong to the model; nearest"),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    settings, tensors, folder = checkpoint
    change(tensors)
    write(folder, settings, tensors)
    fails(folder, str(folder / "model.safetensors"), message)


def test_a_tensor_in_two_files(checkpoint):
    folder = checkpoint[2]
    save_file({KERNEL: np.ones((20, 12), np.float32)}, folder / "more.safetensors")
    fails(folder, f"tensor '{KERNEL}' is in {folder / 'model.safetensors'} and again in {folder / 'more.safetensors'}")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_wrong_index(checkpoint, text):
    (checkpoint[2] / "model.safetensors.index.json").write_text(text)
    fails(checkpoint[2], "weight_map=", "does not map tensors to files")


def test_damaged_shards(checkpoint, rng):
    settings, tensors, folder = checkpoint
    (folder / "model.safetensors").unlink()
    write(folder, settings, tensors, shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    for size in rng.integers(len(whole), size=5):
        path.write_bytes(whole[:size])
        fails(folder, f"{path} cannot be read")
    path.unlink()
    fails(folder, f"{path} cannot be read: No such file")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mixers": ("lightning",)}, "mixers=('lightning',) are not of the Llama architecture: softmax or"),
        ({"mixers": ("softmax", "softmax(window=4)")}, "are not of the Llama architecture"),
        ({"position": "alibi"}, "position='alibi' is not of the Llama architecture: rope"),
        ({"feed_forward": "plain"}, "feed_forward='plain' is not"),
        ({"norm": "layer"}, "norm='layer' is not"),
        ({"activation": "relu2"}, "activation='relu2' is not"),
    ],
)
def test_only_llamas_are_saved_as_llamas(change, message, tmp_path):
    config = DecoderConfig(vocab_size=7, d_model=8, num_layers=2, num_heads=2, **change)
    with pytest.raises(ValueError) as error:
        save_llama(abstract_decoder(config), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
