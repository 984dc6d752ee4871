"""Hooks beside a run's updates, listed in order by :func:`megatron_vlm.training.build.make_hooks`."""

from __future__ import annotations

from megatron_vlm.training.batch import GlobalBatch
from megatron_vlm.training.step import NonFiniteError, StepResult


class Hook:
    """A part in iterations, at some of these moments, at each of them in the order of the list.

    Every rank has the same hooks, so that any method may be a collective call. A hook that raises ends
    the run.
    """

    def before_iteration(self) -> None:
        """Begin an iteration that trains; its batch is not read yet."""

    def before_step(self, batch: GlobalBatch) -> None:
        """Look at the batch; the step comes next."""

    def before_update(self) -> None:
        """Look at the gradients; the weights are as before the step."""

    def not_finite(self, error: NonFiniteError, batch: GlobalBatch) -> None:
        """Decide about a step whose loss or gradient is not finite; the weights are as before it."""

    def after_step(self, batch: GlobalBatch, result: StepResult) -> None:
        """Take what the step did; its iteration is counted. Iterations that are skipped have no step."""

    def after_iteration(self) -> None:
        """Do what is due after an iteration, a skipped one too; or after the one that an earlier start ended
        with, whose evaluation is still due."""
