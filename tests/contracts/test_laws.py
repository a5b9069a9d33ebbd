"""The laws themselves: a sound mixer keeps all of them, and each fails for a mixer that breaks it."""

import pytest
from contracts.laws import LAWS, laws_of, the_registration_is_true
from contracts.toys import BROKEN, SOUND, UNTRUE


@pytest.mark.parametrize(
    ("law", "case"),
    [pytest.param(law, case, id=f"{law.__name__}-{case}") for case in SOUND for law in laws_of(case.info)],
)
def test_a_sound_mixer_keeps_the_law(law, case, rng):
    law(case, rng)


@pytest.mark.parametrize(
    ("case", "law", "complaint"), [pytest.param(*row, id=f"{row[1].__name__}-{row[0]}") for row in BROKEN]
)
def test_a_broken_mixer_fails_the_law(case, law, complaint, rng):
    with pytest.raises(AssertionError, match=complaint):
        law(case, rng)


def test_every_law_can_fail():
    assert {law for _, law, _ in BROKEN} == set(LAWS)


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_true_registration_passes(case, rng):
    the_registration_is_true(case.info, rng)


@pytest.mark.parametrize(("case", "complaint"), UNTRUE, ids=[complaint for _, complaint in UNTRUE])
def test_an_untrue_registration_fails(case, complaint, rng):
    with pytest.raises(AssertionError, match=complaint):
        the_registration_is_true(case.info, rng)
