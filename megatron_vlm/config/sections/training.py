"""The section of a run config that says how long, on how many samples at a time, and in which precision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import List, Optional, Tuple

from megatron_vlm.config.checks import nearest_multiples, needs, not_negative, positive
from megatron_vlm.config.flags import REQUIRED, flag, flag_name
from megatron_vlm.config.headings import (
    DEBUG,
    FP8,
    PARALLEL,
    SAVE_LOAD,
    TRAINING,
)


@dataclass(frozen=True)
class TrainingSection:
    """The flags that say how long, in which batches and in which precision is trained."""

    micro_batch_size: int = flag(
        PARALLEL,
        REQUIRED,
        "samples in one forward pass of a model copy",
        shown_default="16 in --stage 1, else 1",
    )
    global_batch_size: int = flag(
        PARALLEL,
        REQUIRED,
        "samples per iteration, over all ranks",
        shown_default="256 in --stage 1, else 128",
    )
    stage: Optional[int] = flag(
        TRAINING,
        None,
        "1 aligns the projector with everything else frozen, 2 trains the language model with it; "
        "sets the batch sizes, --lr and what is trained",
        choices=(1, 2),
    )
    train_iters: Optional[int] = flag(
        TRAINING, None, "iterations to train", shown_default="one pass over the training split"
    )
    train_samples: Optional[int] = flag(
        TRAINING, None, "samples to train on, in place of --train-iters; rounded down to whole iterations"
    )
    epochs: Optional[float] = flag(
        TRAINING,
        None,
        "passes over the training split, in place of --train-iters, such as 3 or 0.5; rounded down to whole "
        "iterations",
    )
    seed: int = flag(TRAINING, 1234, "seed of weights, dropout and data order")
    precision: Optional[str] = flag(
        TRAINING,
        None,
        "compute in bfloat16 with float32 master weights, or in float32",
        choices=("bf16", "fp32"),
        switches=True,
        shown_default="bf16 where the weights are stored so, else fp32",
    )
    skip_train_iteration_range: Tuple[str, ...] = flag(
        SAVE_LOAD,
        (),
        "iterations to leave out, first and last: 100-110 300-400; their batches are read and not trained on",
    )
    eval_interval: Optional[int] = flag(
        TRAINING,
        None,
        "iterations between evaluations on the dataset's val split; there is one more at the end",
        shown_default="no evaluation",
    )
    eval_iters: int = flag(
        TRAINING, 0, "global batches of val samples in an evaluation, the first ones; 0 is all of them"
    )
    early_stopping_patience: Optional[int] = flag(
        TRAINING,
        None,
        "stop after this many evaluations in a row without an improvement",
        shown_default="never",
    )
    early_stopping_min_delta: float = flag(
        TRAINING, 0.0, "how far below the last improvement's loss is an improvement"
    )
    fp8: bool = flag(
        FP8,
        False,
        "compute the language model's and the projector's matrix products in FP8, all else in bfloat16; "
        "needs Transformer Engine, and GPUs of compute capability 8.9 or more",
    )
    deterministic: bool = flag(
        DEBUG,
        False,
        "use only operations that give the same bits every time, at the cost of speed",
    )
    debug: bool = flag(
        DEBUG,
        False,
        "show each iteration's first sample, shapes and gradient norms, and where a NaN arises",
    )

    def __post_init__(self) -> None:
        positive(self, "micro_batch_size", "global_batch_size", "train_iters", "train_samples", "epochs")
        positive(self, "eval_interval", "early_stopping_patience")
        not_negative(self, "seed", "eval_iters", "early_stopping_min_delta")
        if self.seed >= 1 << 31:
            raise ValueError(f"--seed {self.seed}: must be below {1 << 31}")
        needs(self, "eval_iters", "eval_interval")
        needs(self, "early_stopping_patience", "eval_interval")
        needs(self, "early_stopping_min_delta", "early_stopping_patience")
        _ = self.skipped_ranges
        lengths = [
            name for name in ("train_iters", "train_samples", "epochs") if getattr(self, name) is not None
        ]
        if len(lengths) > 1:
            first, second = map(flag_name, lengths[:2])
            raise ValueError(f"{first} and {second} both say how long to train; give one")
        if self.global_batch_size % self.micro_batch_size:
            micro, batch = self.micro_batch_size, self.global_batch_size
            raise ValueError(
                f"--micro-batch-size {micro} does not divide --global-batch-size {batch}; "
                f"{nearest_multiples('--global-batch-size', batch, micro)}"
            )
        if self.train_samples is not None and self.train_samples < self.global_batch_size:
            raise ValueError(
                f"--train-samples {self.train_samples} is less than one iteration of "
                f"--global-batch-size {self.global_batch_size}; raise the former or lower the latter"
            )

    @property
    def iterations(self) -> Optional[int]:
        """Iterations of the whole run; None where that depends on the number of samples."""
        if self.train_samples is not None:
            return self.train_samples // self.global_batch_size
        return self.train_iters

    @property
    def skipped_ranges(self) -> Tuple[Tuple[int, int], ...]:
        """First and last iteration of each range to leave out; in order, disjoint."""
        merged: List[Tuple[int, int]] = []
        for first, last in sorted(map(_iteration_range, self.skip_train_iteration_range)):
            if merged and first <= merged[-1][1] + 1:
                first, last = merged[-1][0], max(last, merged.pop()[1])
            merged.append((first, last))
        return tuple(merged)

    def skips(self, iteration: int) -> bool:
        """Return whether the flags leave this iteration out (1 is the first)."""
        return any(first <= iteration <= last for first, last in self.skipped_ranges)


def _iteration_range(text: str) -> Tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text, re.ASCII)
    first, last = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"--skip-train-iteration-range {text}: not a range of iterations; write the first, from 1 on, "
            "and the last, such as 100-110"
        )
    return first, last
