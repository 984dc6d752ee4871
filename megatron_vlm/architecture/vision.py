"""Vision towers, read from the ``vision_config`` of a ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict

from megatron_vlm.architecture.encoders import ENCODERS
from megatron_vlm.architecture.families.known import (
    TOWER_KINDS,
    TOWERS,
    UNNAMED_TOWER,
    check_choice,
    check_tower,
)

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower. ``num_layers`` counts all blocks of the tower, run or not."""

    family: str  # its kind, a file in encoders
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    activation: str
    norm_epsilon: float

    @property
    def prefix_tokens(self) -> int:
        """Positions in front of the patches, of a class token or registers."""
        return int(ENCODERS[self.family].PREFIX_TOKENS)

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sequence_length(self) -> int:
        """Positions per image inside the tower."""
        return self.num_patches + self.prefix_tokens


def vision_config(raw: Dict[str, Any]) -> VisionConfig:
    """Read a tower's config.

    Args:
        raw: ``vision_config`` of a ``config.json``.

    Raises:
        ValueError: the tower is of a kind that is not supported.
    """
    kind = raw.get("model_type", UNNAMED_TOWER)
    check_tower(raw)
    get = {**TOWERS[kind], **raw}
    check_choice("vision_config.hidden_act", get["hidden_act"], ACTIVATIONS)
    image_size = _square("vision_config.image_size", get["image_size"])
    patch_size = _square("vision_config.patch_size", get["patch_size"])
    return VisionConfig(
        family=TOWER_KINDS[kind],
        hidden_size=get["hidden_size"],
        ffn_hidden_size=get["intermediate_size"],
        num_layers=get["num_hidden_layers"],
        num_attention_heads=get["num_attention_heads"],
        num_channels=get["num_channels"],
        image_size=image_size,
        patch_size=patch_size,
        activation=get["hidden_act"],
        norm_epsilon=get["layer_norm_eps"],
    )


def _square(key: str, value: Any) -> int:
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"config.json: {key} {value} is not square; supported: one number")
        value = value[0]
    return int(value)
