"""The training loop; :mod:`megatron_vlm.training.build` makes what it works with."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlm.artifacts.checkpoint import CHECKPOINTS, checkpoint_name
from megatron_vlm.system.exit_codes import CONTINUE, DONE, STOPPED
from megatron_vlm.training.batch import GlobalBatch
from megatron_vlm.training.context import Parts, RunContext
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.step import NonFiniteError, StepResult, train_step


def train(run: RunContext, parts: Parts, hooks: Sequence[Hook]) -> int:
    """Run to the last iteration, or until the ranks agree to stop; a collective call.

    Returns:
        The exit code, see :mod:`megatron_vlm.system.exit_codes`.

    Raises:
        ValueError: the data can't be read on, or a loss or gradient is not finite.
    """
    run.stop.hold()
    while not run.done and not run.stop.agreed:
        if run.state.evaluation_due:
            pass  # an earlier start was stopped between this iteration and its evaluation
        elif run.config.training.skips(run.state.iteration + 1):
            skip(run, parts)
        else:
            iterate(run, parts, hooks)
        for hook in hooks:
            hook.after_iteration()
    return end(run)


def iterate(run: RunContext, parts: Parts, hooks: Sequence[Hook]) -> None:
    """Train on the next global batch."""
    for hook in hooks:
        hook.before_iteration()
    batch = parts.reader.next()
    for hook in hooks:
        hook.before_step(batch)
    result = step(run, parts, hooks, batch)
    run.count_iteration()
    run.state.optimizer_steps += result.updated
    run.watchdog.beat()
    for hook in hooks:
        hook.after_step(batch, result)


def step(run: RunContext, parts: Parts, hooks: Sequence[Hook], batch: GlobalBatch) -> StepResult:
    """Compute the gradients of a global batch and update, unless the hooks leave the update out."""

    def inspect() -> None:
        for hook in hooks:
            hook.before_update()

    rates = parts.rates(run.state.iteration + 1)
    try:
        return train_step(parts.models, parts.optimizer, batch, run.layout, rates, inspect, run.stop)
    except NonFiniteError as error:
        for hook in hooks:
            hook.not_finite(error, batch)
        return error.result


def skip(run: RunContext, parts: Parts) -> None:
    """Pass over the next global batch, as if it were done."""
    parts.reader.skip()
    run.stop.agree(run.layout.device)
    run.count_iteration()
    run.state.skipped += 1
    run.watchdog.beat()
    run.say(f"iteration {run.state.iteration}/{run.total_iterations} skipped, as the flags say")


def end(run: RunContext) -> int:
    """Tell how the run has ended, and how it can go on; returns the exit code."""
    if run.done:
        if run.state.iteration < run.total_iterations:
            run.say(run.why_finished())
        return DONE
    flags = run.config.checkpoint
    stopped = f"stopped by a signal at iteration {run.state.iteration}/{run.total_iterations}"
    if flags.save_optim:
        run.say(f"{stopped}, which is saved; the same command goes on from there")
        return CONTINUE
    folder = run.folder / CHECKPOINTS / checkpoint_name(run.state.iteration)
    run.say(
        f"{stopped}. Without --save-optim the run can't go on; --megatron-load-dir {folder} and another "
        "--name begin a new one from its weights"
        if flags.save
        else f"{stopped}; with --no-save there is nothing to go on from"
    )
    return STOPPED
