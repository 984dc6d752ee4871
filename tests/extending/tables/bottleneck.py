"""The table of a bottleneck."""

from __future__ import annotations

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parts import connector
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.hf.tables.table import Entries, described

KIND = "bottleneck"


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    names = {"encoder.down": "{projector}down", "encoder.up": "{projector}up"}
    yield from described(connector(model), "vision_projection.", names)
