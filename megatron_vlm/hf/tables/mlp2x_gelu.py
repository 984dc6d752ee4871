"""The table of the connector mlp2x_gelu."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig, ProjectorConfig
from megatron_vlm.hf.tables.ops import COLUMN, COPY, ROW
from megatron_vlm.hf.tables.table import Entries, Row

KIND = "mlp2x_gelu"
MM_PROJECTOR = {"0": "linear_1", "2": "linear_2"}  # LLaVA's names of layers in its Sequential


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``LlavaMultiModalProjector`` and megatron-core's
    ``MultimodalProjector``."""
    m, t, hidden_size = "vision_projection.encoder.", "{projector}", model.language.hidden_size
    yield Row(m + "linear_fc1.weight", ((t + "linear_1.weight", (hidden_size, c.input_size)),), COPY, COLUMN)
    yield Row(m + "linear_fc2.weight", ((t + "linear_2.weight", (hidden_size, hidden_size)),), COPY, ROW)
    if c.bias:
        yield Row(m + "linear_fc1.bias", ((t + "linear_1.bias", (hidden_size,)),), COPY, COLUMN)
        yield Row(m + "linear_fc2.bias", ((t + "linear_2.bias", (hidden_size,)),))
