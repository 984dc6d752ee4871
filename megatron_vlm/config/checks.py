"""Rules that several sections of a config share; each raises a ``ValueError`` that names the flag."""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.flags import flag_name


def nearest_multiples(name: str, value: int, step: int) -> str:
    """Return ``use --global-batch-size 24 or 32``: the multiples of ``step`` on both sides of ``value``."""
    below = value // step * step
    return f"use {name} {below} or {below + step}" if below else f"use {name} {step}"


def positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise ValueError(f"{flag_name(name)} {value}: must be above 0")


def not_negative(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            raise ValueError(f"{flag_name(name)} {value}: must be 0 or more")


def needs(section: Any, name: str, other: str) -> None:
    if getattr(section, name) and getattr(section, other) is None:
        raise ValueError(f"{flag_name(name)} does nothing without {flag_name(other)}; give both or neither")


def between(section: Any, name: str, low: float, high: float) -> None:
    if not low <= getattr(section, name) <= high:
        raise ValueError(f"{flag_name(name)} {getattr(section, name)}: must be between {low:g} and {high:g}")
