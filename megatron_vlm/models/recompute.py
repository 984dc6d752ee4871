"""Changes of a model for activations that are recomputed."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Module


def ask_for_gradient(x: Tensor, module: Module) -> Tensor:
    """Return ``x``, the input of ``module``'s layers, asking for a gradient if they are recomputed and
    trained.

    megatron-core's checkpoint is a function of the layer's input alone: where the input needs no gradient,
    because all before it is frozen, the layer's weights would silently get none.
    """
    recompute = module.config.recompute_granularity is not None  # type: ignore[union-attr]
    if recompute and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        x.requires_grad_()
    return x


def let_mlps_be_recomputed(model: Module) -> None:
    """Keep the bias that an MLP returns beside its output, for its layer to add, apart from the parameter.

    A checkpointed function that returns a parameter makes it its own result, and the backward pass runs in a
    circle: with megatron-core alone, MLPs with biases can't be recomputed.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            module.register_forward_hook(_alias_bias)


def _alias_bias(
    mlp: Module, arguments: Any, result: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    output, bias = result
    return output, None if bias is None else bias.view_as(bias)
