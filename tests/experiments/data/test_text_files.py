import pytest

from manyheads.experiments.data.text_files import load_text_folder


def test_last_tenth_of_each_file_is_validation(tmp_path):
    (tmp_path / "b.txt").write_text("0123456789" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("ä" * 20, encoding="utf-8")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("not text data")
    train, validation = load_text_folder(tmp_path)
    assert train == {"b.txt": "0123456789" * 9, "sub/a.txt": "ä" * 18}
    assert validation == {"b.txt": "0123456789", "sub/a.txt": "ää"}


def test_one_file_of_any_name(tmp_path):
    file = tmp_path / "book.md"
    file.write_text("x" * 90 + "y" * 10)
    assert load_text_folder(str(file)) == ({"book.md": "x" * 90}, {"book.md": "y" * 10})


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        load_text_folder(tmp_path / "nowhere")


def test_folder_without_text(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        load_text_folder(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is empty: no text"):
        load_text_folder(tmp_path / "a.txt")


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"x" * 20_000 + "é".encode("latin-1") + b"y")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 20000\)") as error:
        load_text_folder(tmp_path)
    assert "\n" not in str(error.value)
