import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manyheads.layers import make_mixer, mixer_info, mixer_names
from manyheads.layers.attention import SoftmaxAttention
from manyheads.layers.mixer import parse_mixer, register_mixer


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("softmax", "softmax", {}),
        (" lightning() ", "lightning", {}),
        ("softmax(window=64, sinks=True)", "softmax", {"window": 64, "sinks": True}),
        ("softmax(window=None,softcap=5,position='alibi')", "softmax", {"window": None, "softcap": 5, "position": "alibi"}),
        ("lightning(depth=0.5)", "lightning", {"depth": 0.5}),
    ],
)  # fmt: skip
def test_specs(spec, name, options):
    assert parse_mixer(spec) == (name, options)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("sofmax", r"unknown mixer 'sofmax'\. Did you mean 'softmax'\? Allowed: .*lightning"),
        ("qwertyuiop", r"unknown mixer 'qwertyuiop'\. Allowed: "),
        ("softmax(windw=3)", r"unknown option of mixer 'softmax' 'windw'\. Did you mean 'window'\? Allowed: .*num_heads"),
        ("softmax(rngs=3)", r"unknown option of mixer 'softmax' 'rngs'"),
        ("softmax(d_model=3)", r"unknown option of mixer 'softmax' 'd_model'"),
        ("softmax(window='64')", r"option window='64' of mixer 'softmax' must be int \| None"),
        ("softmax(window=2.5)", r"option window=2.5 of mixer 'softmax' must be int \| None"),
        ("softmax(position=1)", r"option position=1 of mixer 'softmax' must be str"),
        *[
            (spec, "is not of the form name or name")
            for spec in (
                "", "softmax(", "softmax(64)", "softmax(*x)", "softmax(**{'window': 3})", "softmax(window=size)",
                "softmax(window=1+1)", "softmax(window=1, window=2)", "softmax(window={[]: 1})", "softmax(window=1)()",
                "layers.softmax", "'softmax'", "softmax lightning", "softmax\nlightning", "softmax(window=3\0)", "3",
            )
        ],
    ],
)  # fmt: skip
def test_mistakes_in_specs_are_one_line(spec, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse_mixer(spec)
    assert "\n" not in str(error.value)


def test_make_mixer_prefers_the_spec_to_the_model_and_the_model_to_the_mixer():
    defaults = {"num_heads": 2, "window": 7, "depth": 0.5}
    mixer = make_mixer("softmax(window=3)", 8, defaults=defaults, rngs=nnx.Rngs(0))
    assert isinstance(mixer, SoftmaxAttention)
    assert (mixer.num_heads, mixer.window, mixer.position) == (2, 3, "rope")


@pytest.mark.parametrize("name", mixer_names())
def test_options_are_annotated_so_that_specs_can_be_checked(name):
    info = mixer_info(name)
    assert "rngs" not in info.options
    for variant in info.variants:
        spec = f"{name}({', '.join(f'{option}={value!r}' for option, value in variant.items())})"
        assert parse_mixer(spec) == (name, dict(variant))
    for option in info.options:  # an annotation that isinstance cannot check raises TypeError
        with pytest.raises(ValueError, match=f"option {option}=b'bytes' of mixer '{name}' must be "):
            parse_mixer(f"{name}({option}=b'bytes')")


def test_a_name_is_registered_once():
    before = mixer_names()
    with pytest.raises(ValueError, match="mixer 'softmax' is registered twice"):
        register_mixer("softmax", title="Again", year=2026)(SoftmaxAttention)
    assert mixer_names() == before


@pytest.mark.parametrize(
    ("spec", "capacity", "numbers"),
    [  # numbers that a row's decode state holds, by the formulas of the docstrings, with D = 24
        ("softmax(num_heads=4)", 50, 2 * 4 * 6 * 50),
        ("softmax(num_heads=4, num_kv_heads=2, head_dim=10)", 50, 2 * 2 * 10 * 50),
        ("softmax(num_heads=4, window=7)", 50, 2 * 4 * 6 * 7),
        ("softmax(num_heads=4, window=7, first_tokens=3)", 50, 2 * 4 * 6 * (7 + 3)),
        ("linear(num_heads=4)", 50, 4 * 6 * (6 + 1)),
        ("lightning(num_heads=4)", 50, 4 * 6**2),
        ("lightning(num_heads=3, head_dim=5)", 50, 3 * 5**2),
        ("short_conv(kernel_size=5)", 50, (5 - 1) * 24),
        ("base_conv(kernel_size=5)", 50, (5 - 1) * 24),
        ("base_conv(filter='long', max_length=64)", 50, 50 * 24),
        ("base_conv(filter='implicit', max_length=64)", 50, 50 * 24),
    ],
)
def test_decode_states_are_as_large_as_the_docstrings_say(spec, capacity, numbers):
    state = make_mixer(spec, 24, rngs=nnx.Rngs(0)).init_state(3, capacity)
    held = [leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, np.floating)]
    assert sum(held) == 3 * numbers


@pytest.mark.parametrize("name", [name for name in mixer_names() if "implementation" in mixer_info(name).options])
def test_implementations_are_chosen_by_name(name):
    mixer = make_mixer(f"{name}(implementation='fortran')", 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="implementation='fortran' is not one of reference, xla"):
        mixer(jnp.zeros((1, 4, 8)))
