"""The table of the connectors mlp2x_gelu and mlpNx_gelu."""

from __future__ import annotations

from megatron_vlm.architecture.connectors.mlp import depth
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parts import connector
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.hf.tables.identity import identity
from megatron_vlm.hf.tables.table import Entries, described

KIND = "mlpNx_gelu"


def llava_layers(kind: str) -> dict[str, str]:
    """Return the layers of LLaVA's projector files, behind ``mm_projector.``, with their names here."""
    count = depth(kind)
    places = [str(2 * number) for number in range(count)]  # activations have the others
    return {place: f"linear_{n}" if count <= 2 else place for n, place in enumerate(places, start=1)}


def why_not_exported(projector: ProjectorConfig) -> str:
    """Return why transformers' LLaVA can't hold the projector, or empty."""
    count = depth(projector.kind)
    return f"it has {count} linear layers, and transformers' LLaVA two" if count > 2 else ""


def why_not_classic(projector: ProjectorConfig) -> str:
    """Return why Megatron-LM's LLaVA can't hold it, or empty."""
    count = depth(projector.kind)
    return f"it has {count} linear layers, and Megatron-LM's mlp two" if count != 2 else ""


def entries(c: ProjectorConfig, model: ModelConfig) -> Entries:
    """Yield the rows of transformers' ``LlavaMultiModalProjector`` and megatron-core's
    ``MultimodalProjector``.

    Of one linear, the identity stands behind it, as behind ``linear``. transformers has none of more than
    two, whose names are those of LLaVA's own files, ``0``, ``2``, ``4`` and so on.
    """
    theirs = enumerate(llava_layers(c.kind).values(), start=1)
    names = {f"encoder.linear_fc{number}": "{projector}" + name for number, name in theirs}
    rows = list(described(connector(model), "vision_projection.", names))
    yield from sorted(rows, key=lambda row: row.native.endswith(".bias"))  # the order that checkpoints have
    if depth(c.kind) == 1:
        yield identity("linear_2", c, model)
