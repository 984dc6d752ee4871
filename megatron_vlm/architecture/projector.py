"""Projectors, read from the ``config.json`` of a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.families.known import check_choice

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "linear")
LLAVAS = "mlp2x_gelu"  # what transformers' LLaVA has


@dataclass(frozen=True)
class ProjectorConfig:
    """The map from tower features to language-model embeddings.

    transformers' LLaVA has ``mlp2x_gelu`` alone; ``mm_projector_type`` in ``config.json`` names another kind.
    """

    kind: str  # a file in connectors
    input_size: int
    activation: str
    bias: bool
    norm_epsilon: Optional[float] = None  # of a LayerNorm before it, as ViP-LLaVA has it; None: there is none


def projector_config(
    config: Mapping[str, Any], input_size: int, hidden_size: int, norm: bool
) -> ProjectorConfig:
    """Read what a whole model's config says of its projector.

    Args:
        config: a ``config.json`` with its family's defaults filled in.
        input_size: features of the tower at each position.
        hidden_size: of the language model.
        norm: a LayerNorm stands before it.

    Raises:
        ValueError: the projector is of a kind that is not supported, or contradicts the rest.
    """
    activation = config.get("projector_hidden_act", "gelu")
    check_choice("projector_hidden_act", activation, ACTIVATIONS)
    kind = config.get("mm_projector_type", LLAVAS)
    if not CONNECTORS.knows(kind):
        kinds = ", ".join(CONNECTORS)
        raise ValueError(f"config.json: mm_projector_type is {kind!r}; supported: {kinds} (N linear layers)")
    projector = ProjectorConfig(
        kind=kind,
        input_size=input_size,
        activation=activation,
        bias=config.get("multimodal_projector_bias", True),
        norm_epsilon=config["projector_layernorm_eps"] if norm else None,
    )
    problem = CONNECTORS[kind].problem(projector, hidden_size)
    if problem:
        raise ValueError(f"config.json: mm_projector_type {kind!r} {problem}")
    return projector


def usual_activation(kind: str) -> str:
    """Return the activation of a new projector: ``gelu`` where there is something to activate."""
    projectors = (ProjectorConfig(kind, 1, activation, True) for activation in ("gelu", "linear"))
    return next(p.activation for p in projectors if not CONNECTORS[kind].problem(p, hidden_size=1))
