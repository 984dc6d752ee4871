"""The meter of an iteration: time, memory, throughput and utilisation, over all ranks."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.observe.metrics import IterationMetrics
from megatron_vlm.parallel import Layout
from megatron_vlm.plan.flops import Work, peak_tflops, training_flops
from megatron_vlm.training.batch import GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.step import StepResult

_COUNTS = ("seen", "truncated", "dropped", "corrupt")


class Meter:
    """A meter of iterations, on every rank alike.

    Args:
        trains: whether a parameter is trained, by its name in checkpoints.
        peak: of one device in TFLOP/s; None for what its name says, and no utilisation if that is unknown.
        state: how far the run is; the time that the devices are used is added there.
        total_iterations: of the run.
        fp8: it computes in FP8, so that the device's peak is that of FP8.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelConfig,
        trains: Callable[[str], bool],
        peak: float | None,
        state: RunState,
        total_iterations: int,
        fp8: bool = False,
    ) -> None:
        self.layout = layout
        self.model = model
        self.trains = trains
        if peak is None and layout.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(layout.device), fp8)
        self.peak = peak
        self.state = state
        self.first_iteration = state.iteration
        self.total_iterations = total_iterations
        self.created = self.counted_until = time.perf_counter()

    def start(self) -> None:
        """Start the clock of an iteration."""
        self.started = time.perf_counter()

    def batch_arrived(self) -> None:
        """Note that the iteration has its data."""
        self.data_seconds = time.perf_counter() - self.started

    def stop(self) -> None:
        """Stop the clock of an iteration; also count the time since the last one, of a checkpoint for one."""
        now = time.perf_counter()
        self.seconds = now - self.started
        self.state.gpu_seconds += self.layout.world_size * (now - self.counted_until)
        self.counted_until = now

    def measure(
        self,
        batch: GlobalBatch,
        result: StepResult,
        lr: float,
        sequences: int,
        seen: Mapping[str, int] | None,
    ) -> IterationMetrics:
        """Return the metrics of the iteration that was stopped last; a collective call.

        Args:
            batch: this rank's share of it.
            sequences: in the whole of it.
            seen: what this rank's loader has counted so far; None where there is no loader.
        """
        own = [seen[name] if seen is not None else 0 for name in _COUNTS]
        samples = sum(len(keys) for keys in batch.keys)
        images, tiles = batch.items.get(IMAGE.name, 0), batch.rows.get(IMAGE.name, 0)
        work = [samples, batch.tokens, batch.positions, images, tiles, batch.attention_pairs]
        sums = torch.tensor([*work, *own], device=self.layout.device)
        dist.all_reduce(sums)
        highest = torch.tensor([self.data_seconds, _peak_memory(self.layout)], device=self.layout.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        samples, tokens, positions, images, tiles, pairs, counted, truncated, dropped, corrupt = sums.tolist()
        data_seconds, memory = highest.tolist()

        flops = training_flops(self.model, Work(tokens, result.trained_tokens, pairs, tiles), self.trains)
        rank_seconds = self.seconds * self.layout.world_size
        tflops, without_vision = (n / rank_seconds / 1e12 for n in (flops.total, flops.without_vision))
        now, done = time.perf_counter(), self.state.iteration - self.first_iteration
        left = (now - self.created) / done * (self.total_iterations - self.state.iteration)
        return IterationMetrics(
            iteration=self.state.iteration,
            loss=result.loss if math.isfinite(result.loss) else None,
            lr=lr,
            grad_norm=result.gradient_norm if math.isfinite(result.gradient_norm) else None,
            tokens=tokens,
            trained_tokens=result.trained_tokens,
            samples=samples,
            samples_per_sequence=samples / sequences,
            consumed_samples=counted - dropped - corrupt,
            padding=1 - tokens / positions,
            images=images,
            tokens_per_second=tokens / self.seconds,
            images_per_second=images / self.seconds,
            tflops_per_gpu=tflops,
            tflops_per_gpu_without_vision=without_vision,
            mfu=tflops / self.peak if self.peak else None,
            mfu_without_vision=without_vision / self.peak if self.peak else None,
            peak_memory_gib=memory,
            iteration_seconds=self.seconds,
            data_seconds=data_seconds,
            seconds_left=left,
            gpu_hours=self.state.gpu_seconds / 3600,
            skipped=self.state.skipped,
            not_finite=self.state.not_finite,
            spikes=self.state.spikes,
            truncated=truncated,
            dropped=dropped,
            corrupt=corrupt,
        )


def _peak_memory(layout: Layout) -> float:
    """Return the GiB that this rank has used at most: of the device, or without one of the process."""
    if layout.device.type == "cuda":
        return torch.cuda.max_memory_allocated(layout.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
