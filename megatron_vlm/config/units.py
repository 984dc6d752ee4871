"""Sizes as people read them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Bytes as ``13.2 GiB``, or as ``4.0 MiB`` or ``0.5 KiB`` where they are less than a tenth of a unit."""
    for shift, unit in ((30, "GiB"), (20, "MiB")):
        if size >= (1 << shift) / 10:
            return f"{size / (1 << shift):,.1f} {unit}"
    return f"{size / (1 << 10):,.1f} KiB"
