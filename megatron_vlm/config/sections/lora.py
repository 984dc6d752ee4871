"""The section of a run config that asks for LoRA adapters."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Optional, Tuple

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, TARGET_GROUPS, VISION_TARGETS, LoRAConfig
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import LORA


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
            known = (*LANGUAGE_TARGETS, *VISION_TARGETS, *TARGET_GROUPS)
            if target not in known:
                near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)  # fc1 is close to vision.fc1
                raise ValueError(
                    f"--lora-targets {target}: {f'did you mean {near[0]}? ' if near else ''}choose from "
                    f"{', '.join((*LANGUAGE_TARGETS, *VISION_TARGETS))}, {' and '.join(TARGET_GROUPS)}"
                )

    @property
    def adapters(self) -> Optional[LoRAConfig]:
        """The adapters that the flags ask for; None without ``--lora-rank``."""
        if self.lora_rank is None:
            return None
        wanted = {name for t in self.lora_targets or ("all-linear",) for name in TARGET_GROUPS.get(t, (t,))}
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2 * self.lora_rank,
            dropout=self.lora_dropout,
            targets=tuple(name for name in (*LANGUAGE_TARGETS, *VISION_TARGETS) if name in wanted),
            rslora=self.use_rslora,
        )
