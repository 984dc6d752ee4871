"""The module of a bottleneck."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "bottleneck"
NARROW = 8


class Bottleneck(MegatronModule):
    def __init__(self, projector: ProjectorConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        common = dict(config=config, init_method=config.init_method, bias=projector.bias, skip_bias_add=False)
        self.down = ColumnParallelLinear(projector.input_size, NARROW, gather_output=False, **common)
        self.up = RowParallelLinear(NARROW, config.hidden_size, input_is_parallel=True, **common)

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        narrow, _ = self.down(features)
        return self.up(self.config.activation_func(narrow))[0], None


def build(projector: ProjectorConfig, config: TransformerConfig, impl: str) -> nn.Module:
    return Bottleneck(projector, config)
