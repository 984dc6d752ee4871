"""The lines and metrics of a run's log."""

from __future__ import annotations

from dataclasses import asdict

from megatron_vlm.training.batch import GlobalBatch
from megatron_vlm.training.context import Parts, RunContext
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.hooks.meter import Meter
from megatron_vlm.training.step import StepResult


class Log(Hook):
    """The hook that measures every iteration, and tells of one in ``--log-interval`` and of the last."""

    def __init__(self, run: RunContext, parts: Parts) -> None:
        self.run = run
        self.parts = parts
        self.meter = Meter(
            run.layout,
            run.model,
            trains=parts.regime.trained.__contains__,
            peak=run.config.logging.peak_tflops,
            fp8=run.config.training.fp8,
            state=run.state,
            total_iterations=run.total_iterations,
        )

    def before_iteration(self) -> None:
        """Start the clock."""
        self.meter.start()

    def before_step(self, batch: GlobalBatch) -> None:
        """Take the time that the data took."""
        self.meter.batch_arrived()

    def after_step(self, batch: GlobalBatch, result: StepResult) -> None:
        """Stop the clock, and log the iteration if it is due; then a collective call."""
        run, parts = self.run, self.parts
        self.meter.stop()
        if not run.every(run.config.logging.log_interval):
            return
        metrics = self.meter.measure(
            batch,
            result,
            lr=parts.schedule.at(run.state.iteration),
            sequences=run.config.training.global_batch_size,
            seen=parts.loader.counts if parts.loader is not None else None,
        )
        rates = self._rates_of_parts()
        by_part = {f"lr/{part}": rate for part, rate in rates.items()}
        by_source = parts.sources.take() if parts.sources is not None else {}
        run.sinks.log(metrics.iteration, {**asdict(metrics), **by_part, **by_source})
        rank = "GPU" if run.layout.device.type == "cuda" else "process"
        run.say(metrics.line(run.total_iterations, rates, rank))

    def _rates_of_parts(self) -> dict[str, float]:
        """Return the learning rates of the last update, if a part has one of its own."""
        entries = self.parts.regime.entries
        if all(entry.lr is None for entry in entries):
            return {}
        rates = self.parts.rates(self.run.state.iteration)
        return {entry.name: rate for entry, rate in zip(entries, rates, strict=True)}
