"""LLaVA 1.5: one tower, one projector, one tile for each image.

Source: transformers ``LlavaConfig``.
"""

from megatron_vlm.architecture.families.family import LLAVA_DEFAULTS, Family

KIND = "llava"
FAMILY = Family("Llava", LLAVA_DEFAULTS, built=True)
