"""The section of a run config that says how weights are moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import REQUIRED, flag, flag_name
from megatron_vlm.config.headings import (
    OPTIMIZER,
)


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW and the learning-rate schedule."""

    lr: float = flag(
        OPTIMIZER,
        REQUIRED,
        "peak learning rate",
        shown_default="1e-3 in --stage 1, 2e-4 with --lora-rank, else 2e-5",
    )
    min_lr: float = flag(
        OPTIMIZER, REQUIRED, "learning rate at the end of the decay", shown_default="1e-8, or --lr if smaller"
    )
    lr_warmup_fraction: Optional[float] = flag(
        OPTIMIZER,
        REQUIRED,
        "part of the decay's iterations in which the learning rate rises",
        shown_default="0.03, unless --lr-warmup-iters is given",
    )
    lr_warmup_iters: Optional[int] = flag(
        OPTIMIZER, None, "iterations in which the learning rate rises, in place of --lr-warmup-fraction"
    )
    lr_decay_style: str = flag(
        OPTIMIZER,
        "cosine",
        "shape of the decay",
        choices=("constant", "linear", "cosine"),
    )
    lr_decay_iters: Optional[int] = flag(
        OPTIMIZER, None, "iterations until --min-lr is reached", shown_default="all"
    )
    weight_decay: float = flag(OPTIMIZER, 0.1, "AdamW's weight decay; none on biases and norms")
    adam_beta1: float = flag(OPTIMIZER, 0.9, "decay of the mean of the gradients")
    adam_beta2: float = flag(OPTIMIZER, 0.999, "decay of the mean of their squares")
    adam_eps: float = flag(OPTIMIZER, 1e-8, "added to the denominator of AdamW")
    clip_grad: float = flag(OPTIMIZER, 1.0, "largest global gradient norm; 0 does not clip")

    def __post_init__(self) -> None:
        positive(self, "lr_decay_iters", "adam_eps")
        not_negative(self, "lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower --min-lr or raise --lr")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters is not None:
                raise ValueError("--lr-warmup-iters and --lr-warmup-fraction both set the warmup; give one")
            if not 0.0 <= self.lr_warmup_fraction < 1.0:
                raise ValueError(
                    f"--lr-warmup-fraction {self.lr_warmup_fraction}: must be at least 0 and below 1"
                )
