"""The table of the connector linear."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parts import connector
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.hf.tables.identity import identity
from megatron_vlm.hf.tables.table import Entries, described

KIND = "linear"


def llava_layers(kind: str) -> dict[str, str]:
    """Return the layers of LLaVA's projector files, behind ``mm_projector.``, with their names here."""
    return {"": "linear_1"}


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    """Yield one affine map; transformers' LLaVA stores it as ``linear_1`` with the identity behind it."""
    yield from described(connector(model), "vision_projection.", {"encoder": "{projector}linear_1"})
    yield identity("linear_2", c, model)
