"""The tables of what stands before and behind a connector of any kind."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.tables.table import Entries, Row


def entries(model: ModelConfig) -> Entries:
    """Yield the vector behind each row of features, where images are cut into tiles, and ViP-LLaVA's norm."""
    if model.projector.norm_epsilon is not None:
        for name in ("weight", "bias"):
            norm = (f"{{projector}}projector_layernorm.{name}", (model.projector.input_size,))
            yield Row(f"vision_projection.norm.{name}", (norm,))
    if model.anyres is not None:
        yield Row("vision_projection.image_newline", (("{newline}", (model.language.hidden_size,)),))
