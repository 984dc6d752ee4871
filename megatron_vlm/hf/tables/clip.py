"""The table of CLIP's vision tower."""

from __future__ import annotations

from megatron_vlm.architecture.encoders import clip
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.vision import VisionConfig
from megatron_vlm.hf.tables.ops import Unsqueeze
from megatron_vlm.hf.tables.table import Entries, Row, described
from megatron_vlm.hf.tables.vit import EMBEDDING, blocks, position_ids, post_layernorm

KIND = "clip"
_NAMES = {**EMBEDDING, "ln_pre": "{tower}pre_layrnorm"}  # transformers spells it so


def entries(c: VisionConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``CLIPVisionModel`` and megatron-core's ``CLIPViTModel``."""
    m, t = "vision_model.", "{tower}"
    yield Row(m + "class_token", ((t + "embeddings.class_embedding", (c.hidden_size,)),), Unsqueeze(2))
    others = (layer for layer in clip.embedding_layers(c) if layer != clip.class_token(c))
    yield from described(others, m, _NAMES)
    yield from blocks(c, model.num_vision_layers_run)
    yield post_layernorm(c)
    yield position_ids(c)
