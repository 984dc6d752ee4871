"""The table of a CLIP with a register."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.vision import VisionConfig
from megatron_vlm.hf.tables import clip
from megatron_vlm.hf.tables.table import Entries, Row

KIND = "registers"


def entries(c: VisionConfig, model: ModelConfig) -> Entries:
    yield from clip.entries(c, model)
    yield Row("vision_model.register_token", (("{tower}embeddings.register", (c.hidden_size,)),))
