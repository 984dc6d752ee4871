"""A CLIP with another activation and a register token behind the class token."""

from __future__ import annotations

from typing import Any, Dict, Iterator

from megatron_vlm.architecture.encoders import clip
from megatron_vlm.architecture.encoders.blocks import block_layers
from megatron_vlm.architecture.layers import Layer, vector
from megatron_vlm.architecture.vision import VisionConfig

__all__ = ["DEFAULTS", "KIND", "MODEL_TYPE", "PREFIX_TOKENS", "block_layers", "embedding_layers"]

KIND = "registers"
MODEL_TYPE = "registers_vision_model"
DEFAULTS: Dict[str, Any] = {**clip.DEFAULTS, "hidden_act": "gelu_pytorch_tanh"}
PREFIX_TOKENS = 2  # class token and register


def embedding_layers(vision: VisionConfig) -> Iterator[Layer]:
    """Yield CLIP's, and the register."""
    yield from clip.embedding_layers(vision)
    yield vector("register_token", vision.hidden_size)
