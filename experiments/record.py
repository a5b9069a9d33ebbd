"""Records of measurements: where and with what something was measured, and files that are whole or not there at all."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["environment", "write_json", "write_text"]


def environment() -> dict[str, Any]:
    """What a measurement depends on: ``versions`` of Python, jax and flax, ``device``, and ``date`` (UTC, ISO day)."""
    import jax

    device = jax.devices()[0]
    name = f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("jax", "flax")},
        },
        "device": name if jax.device_count() == 1 else f"{jax.device_count()} x {name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step: a reader, also after a crash, sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON in one step; ValueError, and no file touched, if it holds a NaN or an infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
