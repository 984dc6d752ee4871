"""The projector: vision features to language-model embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.connectors import BUILD_CONNECTOR
from megatron_vlm.models.connectors.tiles import FeatureIndex


class Projector(MegatronModule):
    """A connector of any kind, a norm before it if there is one, and ``image_newline`` where images are cut.

    Equals transformers' ``LlavaMultiModalProjector`` and, with a norm, ``VipLlavaMultiModalProjector``.
    Parameters are named as in megatron-core's ``MultimodalProjector``.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, impl: str) -> None:
        super().__init__(config=config)
        projector = model.projector
        if model.anyres is not None:
            newline = torch.zeros(config.hidden_size, dtype=config.params_dtype)
            self.image_newline = torch.nn.Parameter(newline)
        self.norm: torch.nn.Module = torch.nn.Identity()
        if projector.norm_epsilon is not None:
            self.norm = torch.nn.LayerNorm(
                projector.input_size, projector.norm_epsilon, dtype=config.params_dtype
            )
        self.encoder = BUILD_CONNECTOR[projector.kind](projector, config, impl)

    def forward(self, features: Tensor, index: FeatureIndex | None = None) -> Tensor:
        """Project features to embeddings.

        Args:
            features: ``[tiles, tokens, input_size]``.
            index: how tiles become images, where images are cut.

        Returns:
            ``[features, language hidden_size]``.
        """
        in_fp8, shape = self.config.fp8 is not None, features.shape[:2]
        features = self.norm(features)
        if in_fp8:
            # Rows of zeros scale nothing, and what becomes of them is cut off, so that it has no gradient.
            missing = -shape.numel() % get_fp8_align_size(self.config.fp8_recipe)
            features = F.pad(features.flatten(0, 1), (0, 0, 0, missing))
        with get_fp8_context(self.config):  # megatron-core enters it for the layers of a block alone
            output, bias = self.encoder(features)
        output = output if bias is None else output + bias
        if in_fp8:
            output = output[: shape.numel()].unflatten(0, shape)
        return output.flatten(0, 1) if index is None else index.gather(output, self.image_newline)
