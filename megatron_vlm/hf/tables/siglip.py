"""The table of SigLIP's vision tower."""

from __future__ import annotations

from megatron_vlm.architecture.encoders import siglip
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.vision import VisionConfig
from megatron_vlm.hf.tables.table import Carry, Entries, described
from megatron_vlm.hf.tables.vit import EMBEDDING, blocks, position_ids, post_layernorm

KIND = "siglip"
HAS_CLASSIC_POST_NORM = True  # Megatron-LM's SigLIP has one norm more than LLaVA runs


def entries(c: VisionConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``SiglipVisionModel`` and megatron-core's ``CLIPViTModel``, subtype
    siglip."""
    h, f = c.hidden_size, c.ffn_hidden_size
    t = "{tower}"
    yield from described(siglip.embedding_layers(c), "vision_model.", EMBEDDING)
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
