"""The projector: vision features to language-model embeddings."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.models.specs import projector_submodules
from megatron_vlm.models.tiles import FeatureIndex


class Projector(MegatronModule):
    """``linear`` or ``mlp2x_gelu``, as LLaVA names them; with ``image_newline`` where images are cut.

    Equals transformers' ``LlavaMultiModalProjector`` and, with a norm, ``VipLlavaMultiModalProjector``.
    Parameters are named as in megatron-core's ``MultimodalProjector``, which can't be used for ``linear``:
    with tensor parallelism it adds one shard of the bias to the gathered output.
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
        if projector.kind == "linear":
            self.encoder = ColumnParallelLinear(
                projector.input_size,
                config.hidden_size,
                config=config,
                init_method=config.init_method,
                bias=projector.bias,
                gather_output=True,
            )
        else:
            self.encoder = MLP(
                config=config, submodules=projector_submodules(impl), input_size=projector.input_size
            )

    def forward(self, features: Tensor, index: FeatureIndex | None = None) -> Tensor:
        """Project.

        Args:
            features: ``[tiles, tokens, input_size]``.
            index: how tiles become images, where images are cut.

        Returns:
            ``[features, language hidden_size]``.
        """
        output, bias = self.encoder(self.norm(features))
        output = output if bias is None else output + bias
        return output.flatten(0, 1) if index is None else index.gather(output, self.image_newline)
