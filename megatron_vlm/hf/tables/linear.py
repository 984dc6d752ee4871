"""The table of the connector linear."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig, ProjectorConfig
from megatron_vlm.hf.tables.ops import COLUMN, COPY, Shape
from megatron_vlm.hf.tables.table import Carry, Entries, Row

KIND = "linear"
MM_PROJECTOR = {"": "linear_1"}  # LLaVA's name of a layer behind "mm_projector.", and transformers'


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    """Yield one affine map; transformers stores it with the identity behind it (see ``ProjectorConfig``)."""
    m, t, hidden_size = "vision_projection.encoder.", "{projector}", model.language.hidden_size
    yield Row(m + "weight", ((t + "linear_1.weight", (hidden_size, c.input_size)),), COPY, COLUMN)
    identity: list[tuple[str, Shape]] = [(t + "linear_2.weight", (hidden_size, hidden_size))]
    if c.bias:
        yield Row(m + "bias", ((t + "linear_1.bias", (hidden_size,)),), COPY, COLUMN)
        identity.append((t + "linear_2.bias", (hidden_size,)))
    yield Carry(tuple(identity), "the identity", check=_check_identity, value=_identity)


def _identity(shape: Shape) -> Tensor:
    return torch.eye(shape[0]) if len(shape) == 2 else torch.zeros(shape)


def _check_identity(name: str, tensor: Tensor) -> None:
    if not torch.equal(tensor.float(), _identity(tuple(tensor.shape))):
        raise ValueError(
            f"{name} is not the identity (zero for a bias), as mm_projector_type 'linear' in config.json "
            "promises; remove that key if the projector has two trained layers"
        )
