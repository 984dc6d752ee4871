"""The layers of a CLIP vision tower."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.encoders.blocks import block_layers, patch_embedding
from megatron_vlm.architecture.layers import Layer, norm, vector
from megatron_vlm.architecture.model import ModelConfig

__all__ = ["KIND", "block_layers", "embedding_layers"]

KIND = "clip"


def embedding_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the layers that turn pixels into the first block's input."""
    vision = model.vision
    yield patch_embedding(vision, bias=False)
    yield vector("class_token", 1, 1, vision.hidden_size)
    yield vector("position_embeddings.weight", vision.sequence_length, vision.hidden_size)
    yield norm("ln_pre.", vision.hidden_size, bias=True)
