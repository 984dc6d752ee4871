"""The table of CLIP's vision tower."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig, VisionConfig
from megatron_vlm.hf.tables.ops import Unsqueeze
from megatron_vlm.hf.tables.table import Entries, Row
from megatron_vlm.hf.tables.vit import blocks, position_ids, positions, post_layernorm

KIND = "clip"


def entries(c: VisionConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``CLIPVisionModel`` and megatron-core's ``CLIPViTModel``."""
    h, p = c.hidden_size, c.patch_size
    m, t = "vision_model.", "{tower}"
    yield Row(m + "class_token", ((t + "embeddings.class_embedding", (h,)),), Unsqueeze(2))
    yield Row(m + "conv1.weight", ((t + "embeddings.patch_embedding.weight", (h, c.num_channels, p, p)),))
    yield Row(m + "position_embeddings.weight", (positions(c),))
    for name in ("weight", "bias"):
        # transformers spells it so.
        yield Row(m + f"ln_pre.{name}", ((t + f"pre_layrnorm.{name}", (h,)),))
    yield from blocks(c, model.num_vision_layers_run)
    yield post_layernorm(c)
    yield position_ids(c)
