"""Evaluations while a run trains."""

from __future__ import annotations

from megatron_vlm.models.scaling import unmoved
from megatron_vlm.training.context import Parts, RunContext
from megatron_vlm.training.evaluate import Evaluator, note_evaluation
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.hooks.saving import Saving


class Evaluation(Hook):
    """The hook that evaluates every ``--eval-interval`` iterations and at the end, and saves the best
    weights.

    Args:
        saving: None with ``--no-save``.
    """

    def __init__(self, run: RunContext, parts: Parts, evaluator: Evaluator, saving: Saving | None) -> None:
        self.run = run
        self.parts = parts
        self.evaluator = evaluator
        self.saving = saving

    def after_iteration(self) -> None:
        """Evaluate if it is due. If the ranks agree to stop in between, it stays due."""
        run, state = self.run, self.run.state
        if not state.evaluation_due or run.stop.agreed:
            return
        if state.evaluated_step == state.optimizer_steps:
            state.evaluation_due = False
            run.say(f"no evaluation at iteration {state.iteration}: no update since the last one")
            return
        with unmoved(self.parts.chunks):
            found = self.evaluator.evaluate(self.parts.models, run.watchdog.beat, run.stop)
        if found is None:
            return
        state.evaluation_due = False
        best = note_evaluation(state, found.loss, run.config.training.early_stopping_min_delta)
        run.sinks.log(state.iteration, found.metrics)
        run.say(f"{found} at iteration {state.iteration}" + (", the lowest so far" if best else ""))
        if best and self.saving is not None:
            self.saving.save_best(found.loss)
