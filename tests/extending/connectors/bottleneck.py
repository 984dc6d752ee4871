"""A projector of two linears with few features between them."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Layer, Linear
from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "bottleneck"
NARROW = 8


def in_fp8(kind: str) -> bool:
    """Return whether Transformer Engine multiplies it."""
    return False


def problem(projector: ProjectorConfig, hidden_size: int) -> str:
    """Return what is wrong with it, or empty."""
    return "" if hidden_size > NARROW else f"needs a hidden_size above {NARROW}"


def connector_layers(projector: ProjectorConfig, hidden_size: int) -> Iterator[Layer]:
    """Yield its two linears."""
    yield Linear("encoder.down", projector.input_size, NARROW, COLUMN, projector.bias)
    yield Linear("encoder.up", NARROW, hidden_size, ROW, projector.bias)
