"""Small files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from typing import Any


def write_json(path: str, value: Any, indent: int | None = None) -> None:
    """Write a JSON file under another name first."""
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="replace") + b"\n")


def write_bytes(path: str, data: bytes) -> None:
    """Write a file under another name first."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str) -> Any:
    """A JSON file's value; None if there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
