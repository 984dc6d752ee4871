"""The layers of the projector: LLaVA's ``linear`` and ``mlp2x_gelu``."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Layer, Linear, norm, vector
from megatron_vlm.architecture.model import ModelConfig


def projector_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the projector's layers, the vector behind each row of features of a cut image included."""
    projector, hidden = model.projector, model.language.hidden_size
    if projector.norm_epsilon is not None:
        yield norm("norm.", projector.input_size, bias=True)
    if projector.kind == "linear":
        yield Linear("encoder", projector.input_size, hidden, COLUMN, projector.bias)
    else:
        yield Linear("encoder.linear_fc1", projector.input_size, hidden, COLUMN, projector.bias)
        yield Linear("encoder.linear_fc2", hidden, hidden, ROW, projector.bias)
    if model.anyres is not None:
        yield vector("image_newline", hidden)
