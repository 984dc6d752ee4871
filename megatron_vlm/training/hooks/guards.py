"""The guards of a run: losses that aren't finite, losses that jump, and ranks that hang."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_vlm.config.sections import LoggingSection
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.parallel import Layout
from megatron_vlm.training.batch import GlobalBatch, sample_names
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.step import NonFiniteError, StepResult

STACKS = "logs/stacks"
HUNG = 3  # exit code of a rank that the watchdog ends
_NOT_FINITE_AT_MOST = 10  # iterations in a row: beyond, it isn't the data
_WINDOW, _FEWEST = 100, 10  # losses that a jump is measured against
_GRACE_SECONDS = 5.0  # for the other ranks to write their stacks


class LossGuard(Hook):
    """A hook that decides about losses and gradients that aren't finite, and tells of losses that jump.

    All ranks see the same losses and decide alike.

    Args:
        state: of the run; counts what happened.
        sinks: get the alerts.
        find_not_finite: names a weight that isn't finite, if there is one; a collective call.
    """

    def __init__(
        self,
        flags: LoggingSection,
        layout: Layout,
        state: RunState,
        sinks: Sinks,
        find_not_finite: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.flags = flags
        self.layout = layout
        self.state = state
        self.sinks = sinks
        self._find_not_finite = find_not_finite

    def not_finite(self, error: NonFiniteError, batch: GlobalBatch) -> None:
        """Leave an update out, where ``--nan-policy`` is ``skip``; a collective call.

        Raises:
            ValueError: it is ``stop``, it was the tenth iteration in a row, or the weights aren't finite
                either, whatever the data.
        """
        iteration = self.state.iteration + 1
        broken = self._find_not_finite()
        if broken is not None:
            raise ValueError(
                f"iteration {iteration}: the {error} is not finite, since {broken} holds NaN or infinite "
                "values, whatever the data; lower --lr, or go on from an earlier checkpoint"
            )
        names = sample_names(error.microbatches, batch, self.layout)
        what = f"iteration {iteration}: the {error} is not finite"
        where = f"It arose in a micro batch of these samples: {', '.join(names)}. " if names else ""
        advice = "Look at the data, lower --lr, or go on from an earlier checkpoint"
        if self.flags.nan_policy == "stop":
            raise ValueError(f"{what}; stopped before the weights changed. {where}{advice}")
        self.state.not_finite += 1
        self.state.not_finite_in_a_row += 1
        if self.state.not_finite_in_a_row == _NOT_FINITE_AT_MOST:
            raise ValueError(
                f"{what}, like those of the {_NOT_FINITE_AT_MOST - 1} before it; none of them changed the "
                f"weights. {where}{advice}"
            )
        self._tell(iteration, "not finite", f"{what}; it changes nothing. {where}".rstrip())

    def after_step(self, batch: GlobalBatch, result: StepResult) -> None:
        """Take an update's loss."""
        if result.updated:
            self.watch(result)

    def watch(self, result: StepResult) -> None:
        """Tell of a loss above ``--spike-threshold`` times the median of the last 100, once until it
        is below again."""
        self.state.not_finite_in_a_row = 0
        iteration, loss, recent = self.state.iteration, result.loss, self.state.recent_losses
        if self.flags.alert_spike and len(recent) >= _FEWEST:
            usual = statistics.median(recent)
            jumps = loss > self.flags.spike_threshold * usual
            if jumps and not self.state.jumped:
                self.state.spikes += 1
                text = (
                    f"iteration {iteration}: the loss {loss:.4f} is above {self.flags.spike_threshold:g} x "
                    f"{usual:.4f}, the median of the last {len(recent)}"
                )
                self._tell(iteration, "loss spike", text)
            self.state.jumped = jumps
        recent.append(loss)
        del recent[:-_WINDOW]

    def _tell(self, iteration: int, title: str, text: str) -> None:
        if self.layout.rank == 0:
            print(f"alert: {text}", flush=True)
        self.sinks.alert(iteration, title, text)


class Watchdog:
    """A thread that ends a rank that is stuck, after writing where.

    A thread of each rank: a collective that waits and Python code that waits both let it run. When there
    was no :meth:`beat` for the time given, it writes the Python stacks of all threads to
    ``<run>/logs/stacks/rank_<n>.txt``. The ranks that wait for the stuck one do the same at the same
    time, and then all of them end with exit code 3. Should even Python be stuck, a thread of the
    interpreter writes the stacks to stderr and ends the rank a little later.

    The process group's timeout has to be longer, or a rank that only waits would end the run before
    the stuck one has told its stack.

    Args:
        minutes: 0 for no watchdog.
    """

    def __init__(self, run: Path, rank: int, minutes: float) -> None:
        self.file = run / STACKS / f"rank_{rank}.txt"
        self.rank = rank
        self.minutes = minutes
        self.seconds = 60 * minutes
        self.done = threading.Event()
        self.last_beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.minutes > 0:
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        if self.minutes > 0:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Note that the run goes on."""
        self.last_beat = time.monotonic()
        if self.minutes > 0:
            faulthandler.dump_traceback_later(self.seconds + 4 * _GRACE_SECONDS, exit=True)

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() - self.last_beat > self.seconds:
                self._write_stacks()
                time.sleep(_GRACE_SECONDS)
                os._exit(HUNG)

    def _write_stacks(self) -> None:
        what = f"rank {self.rank}: no iteration has ended for {self.minutes:g} minutes (--watchdog-minutes)"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}; process {os.getpid()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            where = f"the stacks of all its threads are in {self.file}"
        except OSError as error:  # full, or what hangs
            faulthandler.dump_traceback()
            where = f"the stacks of all its threads are above ({self.file}: {error.strerror})"
        print(f"{what}; {where}; ending the run", file=sys.stderr, flush=True)
