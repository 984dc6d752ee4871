"""ViP-LLaVA: features of several layers of the tower, behind a LayerNorm.

Source: transformers ``VipLlavaConfig`` and ``VipLlavaForConditionalGeneration``, which takes no account of a
strategy or of a projector's bias in its config.
"""

from megatron_vlm.architecture.families.family import LLAVA_DEFAULTS, Family

KIND = "vipllava"
FAMILY = Family(
    "VipLlava",
    {**LLAVA_DEFAULTS, "vision_feature_layer": [-2, -5, -8, -11, 6], "projector_layernorm_eps": 1e-5},
    fixed={"vision_feature_select_strategy": "default", "multimodal_projector_bias": True},
    renamed={"vision_feature_layers": "vision_feature_layer"},
    projector_norm=True,
)
