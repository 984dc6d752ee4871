"""The layers of LLaVA's ``linear`` projector."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, Layer, Linear
from megatron_vlm.architecture.model import ModelConfig

KIND = "linear"


def connector_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the projector's one linear."""
    projector, hidden = model.projector, model.language.hidden_size
    yield Linear("encoder", projector.input_size, hidden, COLUMN, projector.bias)
