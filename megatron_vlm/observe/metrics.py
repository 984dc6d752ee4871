"""What a run reports of itself: ``metrics.jsonl`` and one console line per logged iteration."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

METRICS = "metrics.jsonl"
SUPERSEDED = "metrics.superseded.jsonl"


@dataclass(frozen=True)
class IterationMetrics:
    """One line of ``metrics.jsonl``. Sums are over all data parallel ranks."""

    iteration: int
    loss: float  # mean per trained token of the global batch
    lr: float
    grad_norm: float  # L2, before clipping
    tokens: int  # positions in this iteration, padding left out, image tokens included
    trained_tokens: int  # of these, the ones that carry loss
    samples: int  # in this iteration
    consumed_samples: int  # since the first iteration of the run
    images: int  # in this iteration
    tokens_per_second: float
    iteration_seconds: float
    data_seconds: float  # of these, spent waiting for the batch on rank 0
    skipped: int  # iterations skipped so far
    truncated: int  # samples cut to --seq-length so far
    dropped: int  # samples left out so far, too long or malformed
    corrupt: int  # samples left out so far, unreadable


class MetricsLog:
    """Appends to a run's ``metrics.jsonl``.

    Args:
        run_folder: where the file lies.
        last_iteration: the run goes on after this one. Lines beyond it, written by a process that was
            killed before its next checkpoint, are moved to ``metrics.superseded.jsonl``.
    """

    def __init__(self, run_folder: Path, last_iteration: int) -> None:
        self.path = run_folder / METRICS
        if self.path.exists():
            self._move_aside(last_iteration)
        self.file: IO[str] = open(self.path, "a", encoding="utf-8")

    def _move_aside(self, last_iteration: int) -> None:
        kept: list[str] = []
        superseded: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                keep = json.loads(line)["iteration"] <= last_iteration
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off
                keep = False
            (kept if keep else superseded).append(line)
        if not superseded:
            return
        with open(self.path.with_name(SUPERSEDED), "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in superseded)
        temporary = self.path.with_name(f".{METRICS}.incomplete")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line; it survives a kill of this process at once."""
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Progress:
    """Formats console lines with the time left.

    Args:
        start_iteration: iterations done before this process.
        total_iterations: iterations of the whole run.
    """

    def __init__(self, start_iteration: int, total_iterations: int) -> None:
        self.start_iteration = start_iteration
        self.total_iterations = total_iterations
        self.start_time = time.perf_counter()

    def line(self, metrics: IterationMetrics) -> str:
        """``iteration 12/700 (1.7%) | loss ... | 0:00:31 left``."""
        elapsed = time.perf_counter() - self.start_time
        done = metrics.iteration - self.start_iteration
        left = elapsed / max(done, 1) * (self.total_iterations - metrics.iteration)
        return (
            f"iteration {metrics.iteration}/{self.total_iterations} "
            f"({metrics.iteration / self.total_iterations:.1%}) | loss {metrics.loss:.4f} | "
            f"lr {metrics.lr:.2e} | grad norm {metrics.grad_norm:.3f} | "
            f"{metrics.tokens_per_second:,.0f} tokens/s | {metrics.iteration_seconds:.3f} s/iteration | "
            f"{timedelta(seconds=round(elapsed))} elapsed, {timedelta(seconds=round(left))} left"
        )
