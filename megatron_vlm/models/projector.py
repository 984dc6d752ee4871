"""The projector: vision features to language-model embeddings."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.model import ProjectorConfig
from megatron_vlm.models.specs import projector_submodules


class Projector(MegatronModule):
    """``linear`` or ``mlp2x_gelu``, as LLaVA names them.

    Equals transformers' ``LlavaMultiModalProjector``. Parameters are named as in megatron-core's
    ``MultimodalProjector``, which can't be used for ``linear``: with tensor parallelism it adds one
    shard of the bias to the gathered output.
    """

    def __init__(self, projector: ProjectorConfig, config: TransformerConfig, impl: str) -> None:
        super().__init__(config=config)
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

    def forward(self, features: Tensor) -> Tensor:
        """Project.

        Args:
            features: ``[images, tokens, input_size]``.

        Returns:
            ``[images, tokens, language hidden_size]``.
        """
        output, bias = self.encoder(features)
        return output if bias is None else output + bias
