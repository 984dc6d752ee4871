"""LLaVA-OneVision: a SigLIP tower, and images cut into tiles, their features interpolated to at most so many.

Source: transformers ``LlavaOnevisionConfig``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Mapping

from megatron_vlm.architecture.connectors import anyres
from megatron_vlm.architecture.families.family import Family


def _read_tiles(config: Mapping[str, Any], tile_size: int) -> anyres.AnyRes:
    """Read the sizes, and the most tiles from a ``vision_aspect_ratio`` such as ``anyres_max_9``."""
    tiles = anyres.read_tiles(config, tile_size)
    ratio = re.fullmatch(r"anyres_max_([1-9]\d*)", config["vision_aspect_ratio"])
    if ratio is None:
        raise ValueError(
            f"config.json: vision_aspect_ratio is {config['vision_aspect_ratio']!r}; supported: "
            "'anyres_max_9' and other numbers"
        )
    return dataclasses.replace(tiles, max_tiles=int(ratio[1]), several_uncut=True)


KIND = "llava_onevision"
FAMILY = Family(
    "LlavaOnevision",
    {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 384,
        },
        "text_config": {"model_type": "qwen2"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": 151646,
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "vision_aspect_ratio": "anyres_max_9",
    },
    read_tiles=_read_tiles,
)
