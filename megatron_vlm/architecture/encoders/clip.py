"""The layers of a CLIP vision tower."""

from __future__ import annotations

from typing import Any, Dict, Iterator

from megatron_vlm.architecture.encoders.blocks import SIZES, block_layers, patch_embedding
from megatron_vlm.architecture.layers import Layer, norm, vector
from megatron_vlm.architecture.vision import VisionConfig

__all__ = ["DEFAULTS", "KIND", "MODEL_TYPE", "PREFIX_TOKENS", "block_layers", "embedding_layers"]

KIND = "clip"
MODEL_TYPE = "clip_vision_model"
DEFAULTS: Dict[str, Any] = {
    **SIZES,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PREFIX_TOKENS = 1  # the class token


def class_token(vision: VisionConfig) -> Layer:
    """Return the learned position in front of the patches."""
    return vector("class_token", 1, 1, vision.hidden_size)


def embedding_layers(vision: VisionConfig) -> Iterator[Layer]:
    """Yield the layers that turn pixels into the first block's input."""
    yield patch_embedding(vision, bias=False)
    yield class_token(vision)
    yield vector("position_embeddings.weight", vision.sequence_length, vision.hidden_size)
    yield norm("ln_pre.", vision.hidden_size, bias=True)
