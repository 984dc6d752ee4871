"""One start of a run: its folder, where it begins, the training, and the exit code that says how it ended."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from megatron_vlm.models.weights import check_state_files
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.plan.start import Start, check_restart
from megatron_vlm.system.exit_codes import DONE
from megatron_vlm.training import run_folder
from megatron_vlm.training.build import begin, build, make_hooks
from megatron_vlm.training.hooks.guards import Watchdog
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.trainer import train


def run(config: RunConfig, layout: parallel.Layout, stop: StopRequest | None = None) -> int:
    """Train as ``config`` says, from the start or from where an earlier start of the run ended.

    Args:
        stop: asks the run to end before its end.

    Returns:
        The exit code, see :mod:`megatron_vlm.system.exit_codes`.

    Raises:
        ValueError: see :func:`run_folder.choose_start`, :func:`begin`, :func:`build` and :func:`train`.
    """
    folder = Path(config.checkpoint.run_dir)
    held = []

    def prepare() -> Start:
        held.append(run_folder.lock(folder))
        if config.checkpoint.restart:
            check_restart(config, folder)
            run_folder.move_aside(folder)
        start = run_folder.choose_start(config, folder)
        check_state_files(start.checkpoint, start.resumes)
        print(start.message, flush=True)
        print(layout, flush=True)
        return start

    start = parallel.on_first_rank(prepare)
    stop = stop or StopRequest()
    with (
        Watchdog(folder, layout.rank, config.logging.watchdog_minutes) as watchdog,
        Sinks() as sinks,
    ):
        context = begin(config, layout, start, sinks, watchdog, stop)
        if context.done:
            context.say(context.why_finished())
            return DONE
        with closing(build(context)) as parts:
            hooks = make_hooks(context, parts)
            if layout.rank == 0:
                context.config.save(str(folder / run_folder.CONFIG))
            code = train(context, parts, hooks)
    if code != DONE:
        stop.leave()
    return code
