"""LLaVA's ``linear`` projector: one affine map."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, Layer, Linear
from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "linear"


def in_fp8(kind: str) -> bool:
    """Return whether Transformer Engine multiplies it: the one linear is not Transformer Engine's."""
    return False


def problem(projector: ProjectorConfig, hidden_size: int) -> str:
    """Return what is wrong with such a projector, or empty."""
    if projector.activation != "linear":
        return f"needs projector_hidden_act 'linear', not {projector.activation!r}"
    return ""


def connector_layers(projector: ProjectorConfig, hidden_size: int) -> Iterator[Layer]:
    """Yield the projector's one linear."""
    yield Linear("encoder", projector.input_size, hidden_size, COLUMN, projector.bias)
