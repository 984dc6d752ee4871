"""Histograms that add up: how long and how large samples are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXACT = 8  # up to here every value has a bin of its own


class Histogram:
    """Values from 0 on, in bins of one up to 8 and of twice the width from there."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.total: int = state.get("total", 0)
        self.low: int | None = state.get("min")
        self.high: int | None = state.get("max")
        self.bins: dict[int, int] = {int(top): count for top, count in state.get("bins", {}).items()}
        self.sums: dict[int, int] = {int(top): value for top, value in state.get("sums", {}).items()}

    def add(self, value: int) -> None:
        """Count one value."""
        top = value if value <= _EXACT else 1 << (value - 1).bit_length()
        self.bins[top] = self.bins.get(top, 0) + 1
        self.sums[top] = self.sums.get(top, 0) + value
        self.total += value
        self.low = value if self.low is None else min(self.low, value)
        self.high = value if self.high is None else max(self.high, value)

    def merge(self, other: Histogram) -> None:
        """Add the values of another histogram."""
        for top, count in other.bins.items():
            self.bins[top] = self.bins.get(top, 0) + count
        for top, value in other.sums.items():
            self.sums[top] = self.sums.get(top, 0) + value
        self.total += other.total
        self.low = min((low for low in (self.low, other.low) if low is not None), default=None)
        self.high = max((high for high in (self.high, other.high) if high is not None), default=None)

    def state(self) -> dict[str, Any]:
        """Return the histogram as JSON: number, sum, smallest, largest, and the count at each bin's upper
        end, and the sum of its values, where all parts of it had that."""
        whole = sum(self.sums.values()) == self.total
        return {
            "count": sum(self.bins.values()),
            "total": self.total,
            "min": self.low,
            "max": self.high,
            "bins": {str(top): self.bins[top] for top in sorted(self.bins)},
            **({"sums": {str(top): self.sums[top] for top in sorted(self.sums)}} if whole else {}),
        }


def bin_label(top: int) -> str:
    """Return the label of a bin: ``9–16`` for the one that ends at 16."""
    return str(top) if top <= _EXACT else f"{top // 2 + 1}–{top}"
