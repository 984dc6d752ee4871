"""The layers of LLaVA's ``mlp2x_gelu`` projector."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Layer, Linear
from megatron_vlm.architecture.model import ModelConfig

KIND = "mlp2x_gelu"


def connector_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the projector's two linears."""
    projector, hidden = model.projector, model.language.hidden_size
    yield Linear("encoder.linear_fc1", projector.input_size, hidden, COLUMN, projector.bias)
    yield Linear("encoder.linear_fc2", hidden, hidden, ROW, projector.bias)
