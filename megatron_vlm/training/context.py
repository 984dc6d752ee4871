"""The context of a run: a light part that every start has, and the parts that cost time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import BEST, HF_FOLDER
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.processing import Processing
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.optimizer import Optimizer
from megatron_vlm.plan.start import Start
from megatron_vlm.training import checkpoint
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.evaluate import Evaluator, stops_early
from megatron_vlm.training.freezing import Regime
from megatron_vlm.training.hooks.guards import Watchdog
from megatron_vlm.training.schedule import Schedule
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.sources import SourceTotals


@dataclass(frozen=True)
class RunContext:
    """A run on one rank, before anything large is loaded: what it is, how far it is, and who is told.

    Attributes:
        config: resolved; nothing is left to checkpoint or data.
        start: where the run begins.
        state: how far it is; the only part that changes.
        sinks: take metrics; closed by the caller.
        watchdog: hears of all that goes on.
        stop: asks the run to end before its end.
    """

    config: RunConfig
    layout: Layout
    start: Start
    model: ModelConfig
    state: RunState
    sinks: Sinks
    watchdog: Watchdog
    stop: StopRequest

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(self.config.checkpoint.run_dir)

    @property
    def hf_source(self) -> Path:
        """The Hugging Face files that the run's checkpoints carry on."""
        return self.start.checkpoint / HF_FOLDER

    @property
    def total_iterations(self) -> int:
        """The length of the run."""
        return self.config.train_iterations

    @property
    def finished(self) -> bool:
        """Return whether no iteration is left: by the run's length, or early."""
        patience = self.config.training.early_stopping_patience
        return self.state.iteration >= self.total_iterations or stops_early(self.state, patience)

    @property
    def done(self) -> bool:
        """Return whether nothing is left to do."""
        return self.finished and not self.state.evaluation_due

    def every(self, interval: int) -> bool:
        """Tell whether something that happens every ``interval`` iterations, and at the end, is due."""
        return self.state.iteration % interval == 0 or self.finished

    def count_iteration(self) -> None:
        """Count an iteration as done, or passed over."""
        self.state.iteration += 1
        self.state.consumed_samples += self.config.training.global_batch_size
        if self.config.training.eval_interval is not None:
            self.state.evaluation_due = self.every(self.config.training.eval_interval)

    def say(self, message: str) -> None:
        """Print a message, on rank 0."""
        if self.layout.rank == 0:
            print(message, flush=True)

    def why_finished(self) -> str:
        """Return one line, for a run that stopped early or had ended before this start of it."""
        done, total, state = self.state.iteration, self.total_iterations, self.state
        resumable = self.config.checkpoint.save_optim
        if done >= total:
            return (
                f"{done} iterations are done and the run has {total}: nothing left to do; give a larger "
                "--train-iters, or --epochs, to go on"
            )
        return (
            f"stopped early at iteration {done}, after {state.evaluations_without_improvement} evaluations "
            f"without an improvement; the lowest validation loss was {state.best_loss:.4f}, at iteration "
            f"{state.best_iteration}"
            + (f" ({self.folder / BEST})" if self.config.checkpoint.save else "")
            + (". To go on, give a larger --early-stopping-patience" if resumable else "")
        )


@dataclass(frozen=True)
class Parts:
    """The parts that the iterations of a run work with, on one rank.

    Attributes:
        loader: of the training data; None on ranks that don't load any.
        reader: yields global batches.
        sources: sums of a mixture's datasets; None for a single one.
        evaluator: None without ``--eval-interval``.
        chunks: of the model; ``models`` are the same, wrapped.
        base: what the run's checkpoints lie over; None if they hold all weights.
        regime: which parameters are trained.
        schedule: of the learning rate; ``schedules`` are those of the entries of ``--train-modules``.
    """

    processing: Processing
    loader: TrainLoader | None
    reader: BatchReader
    sources: SourceTotals | None
    evaluator: Evaluator | None
    chunks: list[VisionLanguageModel]
    models: list[DistributedDataParallel]
    optimizer: Optimizer
    regime: Regime
    base: dict[str, str] | None
    schedule: Schedule
    schedules: list[Schedule]

    def rates(self, iteration: int) -> list[float]:
        """Return each entry's learning rate in the update that ends an iteration."""
        return [schedule.at(iteration) for schedule in self.schedules]

    def find_not_finite(self, layout: Layout) -> str | None:
        """Name a weight that holds NaN or infinite values, if there is one; a collective call."""
        return checkpoint.find_not_finite(self.chunks, self.optimizer, layout)

    def close(self) -> None:
        """End the data loaders' workers."""
        if self.loader is not None:
            self.loader.close()
        if self.evaluator is not None:
            self.evaluator.close()
