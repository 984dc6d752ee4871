"""LoRA: which projections get adapters, and of what size (Hu et al., https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Optional, Tuple

from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import LORA

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_VISION = "vision."
VISION_TARGETS = tuple(_VISION + name for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))
_GROUPS = {"all-linear": LANGUAGE_TARGETS, "vision.all-linear": VISION_TARGETS}


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
        """What ``B A x`` is multiplied with."""
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
        """Whether adapters of one can go on as the other's: all but the dropout is the same."""
        return self._identity == other._identity

    @property
    def _identity(self) -> Tuple[object, ...]:
        return self.rank, self.alpha, self.targets, self.rslora

    def flags(self) -> str:
        """The flags that ask for such adapters."""
        text = f"--lora-rank {self.rank} --lora-alpha {self.alpha} --lora-targets {' '.join(self.targets)}"
        return text + (" --use-rslora" if self.rslora else "")


@dataclass(frozen=True)
class LoraSection:
    """Small trained matrices beside frozen weights."""

    lora_rank: Optional[int] = flag(
        LORA,
        None,
        "train adapters of this rank and freeze the weights that they stand beside",
        shown_default="no adapters",
    )
    lora_alpha: Optional[int] = flag(
        LORA, None, "adapters are scaled by this over the rank", shown_default="twice the rank"
    )
    lora_dropout: float = flag(LORA, 0.0, "part of an adapter's input that is zeroed in training")
    lora_targets: Tuple[str, ...] = flag(
        LORA,
        (),
        "projections with adapters, by their Hugging Face names: q_proj ... down_proj; vision.q_proj ... "
        "vision.fc2 of the tower; all-linear and vision.all-linear are all of a part",
        shown_default="all-linear",
    )
    use_rslora: bool = flag(LORA, False, "scale by the square root of the rank instead of the rank")
    lora_load_dir: Optional[str] = flag(
        LORA, None, "PEFT adapter to start from", shown_default="random A, zero B"
    )

    def __post_init__(self) -> None:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "use_rslora", "lora_load_dir"):
                if getattr(self, name):
                    raise ValueError(f"{flag_name(name)} needs --lora-rank; give it, or leave both out")
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{flag_name(name)} {value}: must be above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"--lora-dropout {self.lora_dropout}: must be at least 0 and below 1")
        for target in self.lora_targets:
            known = (*LANGUAGE_TARGETS, *VISION_TARGETS, *_GROUPS)
            if target not in known:
                near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)  # fc1 is close to vision.fc1
                raise ValueError(
                    f"--lora-targets {target}: {f'did you mean {near[0]}? ' if near else ''}choose from "
                    f"{', '.join(LANGUAGE_TARGETS)}, {', '.join(VISION_TARGETS)}, {' and '.join(_GROUPS)}"
                )

    @property
    def adapters(self) -> Optional[LoRAConfig]:
        """What the flags ask for; None without ``--lora-rank``."""
        if self.lora_rank is None:
            return None
        wanted = {name for t in self.lora_targets or ("all-linear",) for name in _GROUPS.get(t, (t,))}
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2 * self.lora_rank,
            dropout=self.lora_dropout,
            targets=tuple(name for name in (*LANGUAGE_TARGETS, *VISION_TARGETS) if name in wanted),
            rslora=self.use_rslora,
        )
