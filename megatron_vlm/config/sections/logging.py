"""The section of a run config that says what is told of a run, and what stops it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import (
    DISTRIBUTED,
    LOGGING,
    TRAINING,
)


@dataclass(frozen=True)
class LoggingSection:
    """The flags that say where numbers go, and what watches over them.

    ``metrics.jsonl`` in the run folder is always written.
    """

    log_interval: int = flag(LOGGING, 1, "iterations between two lines of the log")
    peak_tflops: Optional[float] = flag(
        LOGGING,
        None,
        "what one device could do in TFLOP/s, for the model FLOPs utilisation (MFU)",
        shown_default="bfloat16's, or FP8's with --fp8, by the GPU's name; no MFU on CPUs",
    )
    alert_spike: bool = flag(
        LOGGING, False, "tell when the loss jumps: a line of the log, and a message by Weights & Biases"
    )
    spike_threshold: float = flag(
        LOGGING, 2.0, "a loss jumps when it is this many times the median of the last 100"
    )
    nan_policy: str = flag(
        TRAINING,
        "stop",
        "what happens when a loss or gradient is not finite: the run stops before the weights change, or "
        "this one update is left out, 10 times in a row at most",
        choices=("stop", "skip"),
    )
    watchdog_minutes: float = flag(
        DISTRIBUTED,
        20.0,
        "end the run when no iteration has ended for so long, and write each rank's stacks to "
        "<run>/logs/stacks; 0 does not",
    )
    tensorboard: bool = flag(LOGGING, False, "log to TensorBoard: event files in <run>/tensorboard")
    wandb: bool = flag(LOGGING, False, "log to Weights & Biases")
    wandb_mode: Optional[str] = flag(
        LOGGING,
        None,
        "send to its server, or write files to <run>/wandb that `wandb sync` uploads later",
        choices=("online", "offline"),
        shown_default="WANDB_MODE, else online",
    )
    wandb_project: Optional[str] = flag(
        LOGGING, None, "its project", shown_default="WANDB_PROJECT, else megatron-vlm"
    )
    wandb_entity: Optional[str] = flag(
        LOGGING, None, "its team or user", shown_default="WANDB_ENTITY, else the one logged in"
    )
    wandb_name: Optional[str] = flag(LOGGING, None, "name of the run there", shown_default="--name")

    def __post_init__(self) -> None:
        positive(self, "log_interval", "peak_tflops")
        not_negative(self, "watchdog_minutes")
        if self.spike_threshold <= 1:
            raise ValueError(f"--spike-threshold {self.spike_threshold:g}: must be above 1")
        if self.spike_threshold != type(self).spike_threshold and not self.alert_spike:
            raise ValueError("--spike-threshold does nothing without --alert-spike; give both or neither")
        for name in ("wandb_mode", "wandb_project", "wandb_entity", "wandb_name"):
            if getattr(self, name) is not None and not self.wandb:
                raise ValueError(
                    f"{flag_name(name)} does nothing without --wandb; add it, or leave the flag out"
                )
