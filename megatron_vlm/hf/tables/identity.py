"""The table of the connector identity."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.hf.tables.table import Carry, Entries

KIND = "identity"


def why_not_classic(projector: ProjectorConfig) -> str:
    """Return why Megatron-LM's LLaVA can't hold it."""
    return "Megatron-LM's LLaVA has no model without a projector"


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    """Yield nothing that is trained; transformers' LLaVA stores the identity as two linears."""
    for name in ("linear_1", "linear_2"):
        yield identity(name, c, model)


def identity(name: str, c: ProjectorConfig, model: ModelConfig) -> Carry:
    """Return a linear that transformers' LLaVA has and that changes nothing, by its name there."""
    size, start = model.language.hidden_size, "{projector}" + name
    tensors = [(start + ".weight", (size, size)), *([(start + ".bias", (size,))] if c.bias else [])]
    return Carry(tuple(tensors), "the identity", check=partial(_check_identity, c.kind), value=_identity)


def _identity(shape: Shape) -> Tensor:
    return torch.eye(shape[0]) if len(shape) == 2 else torch.zeros(shape)


def _check_identity(kind: str, name: str, tensor: Tensor) -> None:
    if not torch.equal(tensor.float(), _identity(tuple(tensor.shape))):
        raise ValueError(
            f"{name} is not the identity (zero for a bias), as mm_projector_type {kind!r} in config.json "
            "promises; remove that key if the projector has two trained layers"
        )
