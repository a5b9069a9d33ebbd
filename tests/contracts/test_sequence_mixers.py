"""Every registered mixer keeps every law, under its defaults and each of its variants."""

import pytest
from contracts.laws import laws_of, the_registration_is_true
from contracts.subject import CASES

from manyheads.layers import mixer_info, mixer_names


@pytest.mark.parametrize(
    ("law", "case"),
    [pytest.param(law, case, id=f"{law.__name__}-{case}") for case in CASES for law in laws_of(case.info)],
)
def test_law(law, case, rng):
    law(case, rng)


@pytest.mark.parametrize("name", mixer_names())
def test_registration(name, rng):
    the_registration_is_true(mixer_info(name), rng)
