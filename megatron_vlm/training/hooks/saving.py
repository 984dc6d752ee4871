"""Checkpoints of a run: the newest, and the one with the lowest loss on held-out samples."""

from __future__ import annotations

from pathlib import Path

from megatron_vlm.artifacts.checkpoint import BEST, CHECKPOINTS, keep_last, latest_resumable, write_best
from megatron_vlm.training import checkpoint
from megatron_vlm.training.context import Parts, RunContext
from megatron_vlm.training.hooks import Hook


class Saving(Hook):
    """The hook that saves every ``--save-interval`` iterations, at the end, and where the ranks agree to
    stop."""

    def __init__(self, run: RunContext, parts: Parts) -> None:
        self.run = run
        self.parts = parts

    def after_iteration(self) -> None:
        """Save if it is due, and hear of a request to stop in between: the save itself takes long."""
        run = self.run
        if run.every(run.config.checkpoint.save_interval) or run.stop.agreed:
            self.save()
            run.stop.agree(run.layout.device)  # a signal in the save needs no other

    def save(self) -> None:
        """Write a checkpoint, and delete those that are too many; a collective call."""
        run = self.run
        root, keep = run.folder / CHECKPOINTS, run.config.checkpoint.keep_checkpoints
        self._write(root, with_state=run.config.checkpoint.save_optim)
        if keep is not None and run.layout.rank == 0:
            keep_last(root, keep, also=[run.start.checkpoint])

    def save_best(self, loss: float) -> None:
        """Write the weights as the best so far, in place of those before; a collective call.

        Args:
            loss: of the held-out samples.
        """
        root = self.run.folder / BEST
        self._write(root, with_state=False)
        if self.run.layout.rank == 0:
            write_best(root, self.run.state.iteration, loss)
            keep_last(root, 1)

    def _write(self, root: Path, with_state: bool) -> None:
        run, parts = self.run, self.parts
        parts.optimizer.gather_weights()
        broken = parts.find_not_finite(run.layout)
        if broken is not None:
            raise ValueError(
                f"iteration {run.state.iteration}: {broken} holds NaN or infinite values, and is not saved; "
                f"lower --lr, and {self._where_to_go_on()}"
            )
        folder = checkpoint.save_checkpoint(
            root,
            parts.chunks,
            parts.optimizer if with_state else None,
            run.layout,
            run.state,
            run.config,
            run.hf_source,
            parts.loader.state_dict if parts.loader is not None else None,
            parts.base,
            parts.processing.template,
        )
        run.watchdog.beat()
        run.say(f"saved {folder}" + ("" if with_state else " (weights only)"))

    def _where_to_go_on(self) -> str:
        last = latest_resumable(self.run.folder / CHECKPOINTS)
        return "begin again" if last is None else f"the run goes on from {last.name}"
