import flex_cases
import pytest

from manyheads.pallas_kernels.flex_attention import tuning


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of flex attention so small that tiny inputs have many of them, whole and cut."""
    monkeypatch.setattr(tuning, "XLA_BLOCK", (flex_cases.ROWS, flex_cases.COLUMNS))
    monkeypatch.setattr(tuning, "XLA_SINGLE_TILE", flex_cases.ROWS * flex_cases.COLUMNS)
    monkeypatch.setattr(tuning, "XLA_DECODE_QUERIES", 2)
