"""The values in records: those that stand for nothing, lists, images; and the error of a rejected record."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NO_BASE64 = 512  # characters: a string without a scheme that is shorter is a path


class Rejected(Exception):
    """A record that becomes no sample. ``reason`` is what it is counted under, ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class TarPart:
    """Bytes that lie as they are in a tar file."""

    path: str
    offset: int
    size: int


Image = str | bytes | TarPart  # a path, an encoded image, or where one lies


def is_nothing(value: Any) -> bool:
    """Return whether a value says that there is none: null, pandas' NaN, empty, Arrow's struct of nulls."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_nothing, value))
    return isinstance(value, (bytes, bytearray)) and not value


def named_fields(record: Mapping[str, Any]) -> str:
    """Return a record's fields for a message, and the lengths of those that hold lists."""
    names = [
        f"{name} (a list of {len(value)})" if isinstance(value, (list, tuple)) else str(name)
        for name, value in record.items()
    ]
    return f"its fields are {', '.join(names) or 'none'}"[:200]


def as_list(value: Any) -> list[Any] | None:
    """Return a value as a list, also one that a table's column holds as JSON; None for a value that is
    none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def as_image(value: Any) -> Image:
    """Return an image that a record holds or names.

    Raises:
        Rejected: it is none, damaged, or a web address.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if not is_nothing(value.get(key))), None)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, TarPart):
        return value
    if not isinstance(value, str):
        raise Rejected("missing image", f"its image is {type(value).__name__}")
    if value.startswith("data:"):
        header, _, data = value.partition(",")
        if not header.endswith(";base64"):
            raise Rejected("corrupt image", "its data URI is not base64")
        return _base64(data)
    if value.startswith(("http://", "https://", "s3://", "gs://")):
        raise Rejected("remote image", value[:200])
    if len(value) > _NO_BASE64 and "." not in value:
        return _base64(value)
    return value.removeprefix("file://")


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Rejected("corrupt image", "its base64 is damaged") from None
