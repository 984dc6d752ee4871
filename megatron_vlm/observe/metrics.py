"""The metrics of a run: ``metrics.jsonl`` and one console line per logged iteration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

from megatron_vlm.system.files import write_whole

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"  # one object per evaluation


@dataclass(frozen=True)
class IterationMetrics:
    """The metrics of an iteration, a line of ``metrics.jsonl``. Sums are over all data parallel ranks."""

    iteration: int
    loss: float | None  # mean per trained token of the global batch; None if it is not finite
    lr: float  # on the curve of --lr
    grad_norm: float | None  # L2, before clipping; None if it is not finite
    tokens: int  # positions in this iteration, padding left out, image tokens included
    trained_tokens: int  # of these, the ones that carry loss
    samples: int  # in this iteration
    samples_per_sequence: float  # 1, or more with --packing
    consumed_samples: int  # since the first iteration of the run
    padding: float  # part of the positions that the model computed and that hold no token
    images: int  # in this iteration
    tokens_per_second: float
    images_per_second: float
    tflops_per_gpu: float  # of the model's products, see plan/flops.py; a rank is a GPU, on CPUs too
    tflops_per_gpu_without_vision: float  # the tower's left out
    mfu: float | None  # of the device's peak; None where that is not known
    mfu_without_vision: float | None
    peak_memory_gib: float  # so far, on the rank that has used most
    iteration_seconds: float
    data_seconds: float  # of these, spent waiting for the batch on the rank that waited longest
    seconds_left: float  # of the run, at the pace of this start so far
    gpu_hours: float  # ranks x time in iterations and between them, over all starts of the run
    skipped: int  # iterations skipped so far
    not_finite: int  # iterations so far that changed nothing since a loss or gradient was not finite
    spikes: int  # times so far that the loss jumped, with --alert-spike
    truncated: int  # samples cut to --seq-length so far
    dropped: int  # samples left out so far, too long or malformed
    corrupt: int  # samples left out so far, unreadable

    def line(self, total_iterations: int, rates: Mapping[str, float], rank: str = "GPU") -> str:
        """Return ``iteration 12/700 (1.7%) | loss ... | 0:00:31 left``, for the console.

        Args:
            rates: learning rates by part, where parts have rates of their own.
            rank: what a rank is, ``process`` on CPUs.
        """
        utilisation = "" if self.mfu is None else f" ({self.mfu:.1%} MFU)"
        lr = ", ".join(f"{part} {rate:.2e}" for part, rate in rates.items()) or f"{self.lr:.2e}"
        return (
            f"iteration {self.iteration}/{total_iterations} ({self.iteration / total_iterations:.1%}) | "
            f"loss {_number(self.loss, '.4f')} | lr {lr} | "
            f"grad norm {_number(self.grad_norm, '.3f')} | "
            f"{self.tokens_per_second:,.0f} tokens/s | {self.images_per_second:,.1f} images/s | "
            f"{self.tflops_per_gpu:.3g} TFLOP/s per {rank}{utilisation} | {self.peak_memory_gib:.1f} GiB | "
            f"{self.iteration_seconds:.3f} s/iteration, {self.data_seconds:.3f} for data | "
            f"{self.gpu_hours:.1f} {rank} hours, {timedelta(seconds=round(self.seconds_left))} left"
        )


def superseded(name: str) -> str:
    """Return the name of superseded lines: ``metrics.jsonl`` -> ``metrics.superseded.jsonl``."""
    return name.replace(".jsonl", ".superseded.jsonl")


LOGS = tuple(log for name in (METRICS, VALIDATION) for log in (name, superseded(name)))


class MetricsLog:
    """The writer of a run's ``metrics.jsonl`` or ``validation.jsonl``; the first line makes the file.

    Args:
        run_folder: where the file lies.
        last_iteration: the run goes on after this one. Lines beyond it, written by a process that was
            killed before its next checkpoint, are moved to ``metrics.superseded.jsonl``.
        name: of the file.
    """

    def __init__(self, run_folder: Path, last_iteration: int, name: str = METRICS) -> None:
        self.path = run_folder / name
        if self.path.exists():
            self._move_aside(last_iteration)
        self.file: IO[str] | None = None

    def _move_aside(self, last_iteration: int) -> None:
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in self.path.read_bytes().splitlines():
            try:
                keep = json.loads(line)["iteration"] <= last_iteration
            except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a kill, or damaged
                keep = False
            (kept if keep else moved).append(line)
        if not moved:
            return
        with open(self.path.with_name(superseded(self.path.name)), "ab") as file:
            file.writelines(line + b"\n" for line in moved)
        write_whole(self.path, b"".join(line + b"\n" for line in kept))

    def write(self, iteration: int, values: Mapping[str, float | None]) -> None:
        """Append one line; it survives a kill of this process at once."""
        if self.file is None:
            self.file = open(self.path, "a", encoding="utf-8")
        try:
            self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was told then
                self.file.close()


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
