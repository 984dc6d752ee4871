"""LLaVA's ``linear`` projector."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "linear"


def build(projector: ProjectorConfig, config: TransformerConfig, impl: str) -> nn.Module:
    """Return one linear, whose output is gathered.

    megatron-core's ``MultimodalProjector`` can't be used for it: with tensor parallelism it adds one shard of
    the bias to the gathered output.
    """
    return ColumnParallelLinear(
        projector.input_size,
        config.hidden_size,
        config=config,
        init_method=config.init_method,
        bias=projector.bias,
        gather_output=True,
    )
