"""LLaVA's ``mlp2x_gelu`` projector, and those of any other number of linears."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.architecture.connectors.mlp import depth
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.models.specs import projector_submodules

KIND = "mlpNx_gelu"


class DeepMLP(MegatronModule):
    """Linears with an activation between each two, as a ``Sequential`` of them computes.

    They are cut along output and input features in turns, so that every second one sums over the ranks.
    """

    def __init__(self, projector: ProjectorConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.depth = depth(projector.kind)
        inputs, hidden = projector.input_size, config.hidden_size
        for number in range(1, self.depth + 1):
            common = dict(
                config=config, init_method=config.init_method, bias=projector.bias, skip_bias_add=False
            )
            linear: nn.Module
            if number % 2:
                linear = ColumnParallelLinear(inputs, hidden, gather_output=number == self.depth, **common)
            else:
                linear = RowParallelLinear(inputs, hidden, input_is_parallel=True, **common)
            self.add_module(f"linear_fc{number}", linear)
            inputs = hidden

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Return what the last linear makes, its bias added."""
        for number in range(1, self.depth + 1):
            features, _ = self.get_submodule(f"linear_fc{number}")(features)
            if number < self.depth:
                features = self.config.activation_func(features)
        return features, None


def build(projector: ProjectorConfig, config: TransformerConfig, impl: str) -> nn.Module:
    """Return megatron-core's MLP for two linears, which Transformer Engine knows; else :class:`DeepMLP`."""
    if depth(projector.kind) == 2:
        return MLP(config=config, submodules=projector_submodules(impl), input_size=projector.input_size)
    return DeepMLP(projector, config)
