"""LLaVA's ``identity`` projector."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "identity"


class Identity(nn.Module):
    """Leaves features as they are."""

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Return the features, and no bias."""
        return features, None


def build(projector: ProjectorConfig, config: TransformerConfig, impl: str) -> nn.Module:
    """Return a module without parameters."""
    return Identity()
