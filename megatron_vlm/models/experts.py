"""A mixture of experts, Mixtral's, from megatron-core's router and its experts.

megatron-core's own ``MoELayer`` shards tokens over ranks: without sequence parallelism each tensor parallel
rank would do all tokens' work as often as there are ranks, so it refuses to train. Here there are no expert
parallel ranks: each tensor parallel rank holds its columns of every expert, and the exchanges around all
experts are those around a dense MLP. Parameters are named as in ``MoELayer`` with ``SequentialMLP``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, permute, unpermute
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class MixtureOfExperts(MegatronModule):
    """The mixture of experts in the place of a layer's MLP: ``moe_router_topk`` of its experts work on each
    token.

    A token's weights are the softmax over the logits of its experts, in float32, and no token is dropped.
    There is no loss that balances the experts: transformers' LLaVA has none either.

    Source: transformers ``MixtralSparseMoeBlock``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        groups = get_default_pg_collection()
        self.group = groups.tp
        self.router = _Router(config, groups)
        self.experts = _Experts(
            config.num_moe_experts,
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            groups,
        )

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Map ``[s, b, hidden]`` (``s / tp`` with sequence parallelism) to the same shape; return it and
        no bias."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.group)
        tokens = hidden_states.flatten(0, 1)
        weights, chosen = self.router(hidden_states)  # [tokens, experts]; zero and False where not chosen
        if not self.config.sequence_parallel:
            tokens = copy_to_tensor_model_parallel_region(tokens, self.group)
        permuted, weights, order = permute(tokens, chosen, weights)
        if not self.config.sequence_parallel:
            # A rank's columns give a part of the gradient, and the router is to get the whole one. With
            # sequence parallelism the parts of the router's gradient are summed, as those of a norm are.
            weights = copy_to_tensor_model_parallel_region(weights, self.group)
        outputs, _ = self.experts(permuted, chosen.sum(dim=0), weights)
        output = unpermute(outputs, order, tokens.shape).view(hidden_states.shape)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.group), None
        return reduce_from_tensor_model_parallel_region(output, self.group), None


class _Router(TopKRouter):
    """The router: logits in the model's precision, all else in float32, as transformers'
    ``MixtralTopKRouter``.

    megatron-core's own product needs Transformer Engine (0.16.1: a name that isn't defined without it).
    """

    def gating(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight).float()


class _Experts(SequentialMLP):
    """Experts that are saved one by one, under the names of their parameters: no checkpoint tensor holds
    them all."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        return {
            name: entry
            for number, expert in enumerate(self.local_experts)
            for name, entry in expert.sharded_state_dict(
                f"{prefix}local_experts.{number}.", sharded_offsets, metadata
            ).items()
        }
