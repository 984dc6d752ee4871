"""The table of SigLIP's vision tower."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig, VisionConfig
from megatron_vlm.hf.tables.table import Carry, Entries, Row
from megatron_vlm.hf.tables.vit import blocks, position_ids, positions, post_layernorm

KIND = "siglip"


def entries(c: VisionConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``SiglipVisionModel`` and megatron-core's ``CLIPViTModel``, subtype
    siglip."""
    h, f, p = c.hidden_size, c.ffn_hidden_size, c.patch_size
    m, t = "vision_model.", "{tower}"
    yield Row(m + "conv1.weight", ((t + "embeddings.patch_embedding.weight", (h, c.num_channels, p, p)),))
    yield Row(m + "conv1.bias", ((t + "embeddings.patch_embedding.bias", (h,)),))
    yield Row(m + "position_embeddings.weight", (positions(c),))
    yield from blocks(c, model.num_vision_layers_run)
    yield post_layernorm(c)
    head = {
        "probe": (1, 1, h),
        "attention.in_proj_weight": (3 * h, h),
        "attention.in_proj_bias": (3 * h,),
        "attention.out_proj.weight": (h, h),
        "attention.out_proj.bias": (h,),
        "layernorm.weight": (h,),
        "layernorm.bias": (h,),
        "mlp.fc1.weight": (f, h),
        "mlp.fc1.bias": (f,),
        "mlp.fc2.weight": (h, f),
        "mlp.fc2.bias": (h,),
    }
    yield Carry(
        tuple((t + f"head.{name}", shape) for name, shape in head.items()),
        "LLaVA takes the patches' features, not the pooled one",
        optional=True,  # vision_use_head
    )
    yield position_ids(c)
