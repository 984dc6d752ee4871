"""LLaVA's ``identity`` projector: the encoder's features as they are.

Source: LLaVA ``multimodal_projector/builder.py``, ``IdentityMap``.
"""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import Layer
from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "identity"


def in_fp8(kind: str) -> bool:
    """Return whether Transformer Engine multiplies it: there is nothing to multiply."""
    return False


def problem(projector: ProjectorConfig, hidden_size: int) -> str:
    """Return what is wrong with such a projector, or empty."""
    if projector.input_size != hidden_size:
        return f"needs {hidden_size} features, the language model's hidden_size, not {projector.input_size}"
    if projector.activation != "linear":
        return f"needs projector_hidden_act 'linear', not {projector.activation!r}"
    return ""


def connector_layers(projector: ProjectorConfig, hidden_size: int) -> Iterator[Layer]:
    """Yield nothing: the projector has no layers."""
    return iter(())
