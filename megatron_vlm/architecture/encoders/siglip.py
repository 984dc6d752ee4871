"""The layers of a SigLIP vision tower."""

from __future__ import annotations

from typing import Any, Dict, Iterator

from megatron_vlm.architecture.encoders.blocks import SIZES, block_layers, patch_embedding
from megatron_vlm.architecture.layers import Layer, vector
from megatron_vlm.architecture.vision import VisionConfig

__all__ = ["DEFAULTS", "KIND", "MODEL_TYPE", "PREFIX_TOKENS", "block_layers", "embedding_layers"]

KIND = "siglip"
MODEL_TYPE = "siglip_vision_model"  # of SigLIP 2's fixed-resolution checkpoints too
DEFAULTS: Dict[str, Any] = {
    **SIZES,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
PREFIX_TOKENS = 0


def embedding_layers(vision: VisionConfig) -> Iterator[Layer]:
    """Yield the layers that turn pixels into the first block's input."""
    yield patch_embedding(vision, bias=True)
    yield vector("position_embeddings.weight", vision.sequence_length, vision.hidden_size)
