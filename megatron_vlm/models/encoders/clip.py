"""CLIP's vision tower."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.encoders.vit import VisionTower

KIND = "clip"


def build(model: ModelConfig, config: TransformerConfig, impl: str) -> VisionTower:
    """Return the tower, with a class token and a norm before the first block, and patches without a bias."""
    return VisionTower(model, config, impl, like=KIND)
