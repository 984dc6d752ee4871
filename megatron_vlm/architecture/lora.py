"""LoRA: which projections get adapters, and of what size (Hu et al., https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Tuple

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_VISION = "vision."
VISION_TARGETS = tuple(_VISION + name for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))
TARGET_GROUPS = {"all-linear": LANGUAGE_TARGETS, "vision.all-linear": VISION_TARGETS}


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters of a model. A part of its architecture: checkpoints carry it."""

    rank: int
    alpha: int
    dropout: float
    targets: Tuple[str, ...]  # of LANGUAGE_TARGETS and VISION_TARGETS, in their order
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of ``B A x``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def language_targets(self) -> Tuple[str, ...]:
        """Names of the language model's projections with adapters."""
        return tuple(name for name in self.targets if name in LANGUAGE_TARGETS)

    @property
    def vision_targets(self) -> Tuple[str, ...]:
        """Names of the tower's projections with adapters, without the prefix."""
        return tuple(name[len(_VISION) :] for name in self.targets if name in VISION_TARGETS)

    def fits(self, other: LoRAConfig) -> bool:
        """Return whether adapters of one can go on as the other's: all but the dropout is the same."""
        return self._identity == other._identity

    @property
    def _identity(self) -> Tuple[object, ...]:
        return self.rank, self.alpha, self.targets, self.rslora

    def flags(self) -> str:
        """Return the flags that ask for such adapters."""
        text = f"--lora-rank {self.rank} --lora-alpha {self.alpha} --lora-targets {' '.join(self.targets)}"
        return text + (" --use-rslora" if self.rslora else "")
