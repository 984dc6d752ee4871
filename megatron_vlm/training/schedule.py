"""The learning rate as a pure function of the iteration, so that resuming restores it by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from zero, then decay to ``min_lr``.

    Equals Megatron-LM's ``OptimizerParamScheduler`` counted in iterations: the first update is done
    with the rate of step 0.

    Args:
        lr: the highest rate.
        min_lr: the rate after ``decay_iters``.
        warmup_iters: iterations of warmup.
        decay_iters: iteration at which the decay ends, warmup included.
        style: ``"cosine"``, ``"linear"`` or ``"constant"``.
    """

    lr: float
    min_lr: float
    warmup_iters: int
    decay_iters: int
    style: str = "cosine"

    def scaled_to(self, lr: float) -> Schedule:
        """Return the same curve with its peak at ``lr``; ``min_lr`` keeps its ratio to the peak, as it
        does for torch's ``LambdaLR`` over several parameter groups."""
        return replace(self, lr=lr, min_lr=self.min_lr * lr / self.lr if self.lr else 0.0)

    def at(self, iteration: int) -> float:
        """Return the rate of the update that ends ``iteration`` (1 is the first)."""
        step = iteration - 1
        if self.warmup_iters > 0 and step <= self.warmup_iters:
            return self.lr * step / self.warmup_iters
        if self.style == "constant":
            return self.lr
        if step > self.decay_iters:
            return self.min_lr
        progress = (step - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        if self.style == "linear":
            share = 1.0 - progress
        elif self.style == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            raise ValueError(f"--lr-decay-style {self.style}; supported: cosine, linear, constant")
        return self.min_lr + share * (self.lr - self.min_lr)
