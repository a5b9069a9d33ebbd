"""Plain text from the user's own files."""

from pathlib import Path

__all__ = ["load_text_folder"]

_VALIDATION_FRACTION = 0.1


def load_text_folder(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Training and validation texts by file name: of each file, the last tenth of the characters is validation.

    A cut inside each file, at the same place in equal files, keeps a copy under a second name from leaking into the
    validation text.

    Args:
      path: a UTF-8 text file, or a folder whose ``.txt`` files are read, subfolders included, in sorted order.

    Raises:
      FileNotFoundError: if ``path`` does not exist.
      ValueError: if there is no text in it, or a file is not UTF-8.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist; give a text file or a folder of .txt files")
    files = sorted(file for file in root.rglob("*.txt") if file.is_file()) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"path={str(path)!r} holds no .txt file")
    train, validation = {}, {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"path={str(path)!r}: {file} is not UTF-8 (byte {error.start}); convert it") from None
        if text.strip():
            name = str(file.relative_to(root)) if root.is_dir() else file.name
            cut = int(len(text) * (1 - _VALIDATION_FRACTION))
            train[name], validation[name] = text[:cut], text[cut:]
    if not train:
        raise ValueError(f"path={str(path)!r} is empty: no text in {len(files)} file(s)")
    return train, validation
