"""Sizes and numbers as people read them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Return the bytes as ``13.2 GiB``, or as ``4.0 MiB`` or ``0.5 KiB`` where they are less than a tenth
    of a unit."""
    for shift, unit in ((30, "GiB"), (20, "MiB")):
        if size >= (1 << shift) / 10:
            return f"{size / (1 << shift):,.1f} {unit}"
    return f"{size / (1 << 10):,.1f} KiB"


def count_text(number: int, noun: str) -> str:
    """Return a count with its noun: ``1 sample``, ``12,000 samples``, ``2 processes``, ``3 passes``, ``2
    copies``."""
    if number == 1:
        return f"1 {noun}"
    plural = noun + "es" if noun.endswith("s") else noun[:-1] + "ies" if noun.endswith("py") else noun + "s"
    return f"{number:,} {plural}"


def times_text(number: int) -> str:
    """Return ``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")
