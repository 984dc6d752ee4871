"""The module of a CLIP with a register."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.encoders.vit import VisionTower

KIND = "registers"


class RegisterTower(VisionTower):
    def __init__(self, model: ModelConfig, config: TransformerConfig, impl: str) -> None:
        super().__init__(model, config, impl, like="clip")
        size = model.vision.hidden_size
        self.class_token = torch.nn.Parameter(self.class_token.new_zeros(1, 1, size))
        self.register_token = torch.nn.Parameter(self.class_token.new_zeros(size))

    def add_prefix(self, patches: Tensor) -> Tensor:
        register = self.register_token.expand(patches.shape[0], 1, -1)
        return torch.cat([self.class_token.expand_as(register), register, patches], dim=1)


def build(model: ModelConfig, config: TransformerConfig, impl: str) -> VisionTower:
    return RegisterTower(model, config, impl)
