"""Worker processes of both passes, and how far they are."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_vlm.data.prepare.shards import Measure, Rendering, write_shard
from megatron_vlm.data.prepare.stage import stage_unit
from megatron_vlm.system.processes import die_with_parent

_SECONDS = 0.2  # between two looks at how far they are


class Workers:
    """Processes that do the tasks of a pass side by side. Their number changes nothing of the result.

    Args:
        number: of processes.
        rendering: how tokens are counted for the report; None: they aren't.
    """

    def __init__(self, number: int, rendering: Rendering | None = None) -> None:
        self._others = multiprocessing.active_children()
        # Spawned, not forked: pyarrow and tokenizers have threads.
        context = multiprocessing.get_context("spawn")
        self._done = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(number, context, _start, (self._done, os.getpid(), rendering))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a function's result, from one of the processes."""
        with _without_interrupts():
            future = self._pool.submit(function, *arguments)
        return future.result()

    def stage(self, tasks: Sequence[tuple[Any, ...]], begun: int, total: int, progress: Any) -> None:
        """Run :func:`stage_unit` with each task's arguments; ``begun`` of ``total`` bytes are done
        already."""
        self._run(_stage, tasks, "reading", begun, total, progress)

    def write(self, tasks: Sequence[tuple[Any, ...]], begun: int, total: int, progress: Any) -> None:
        """Run :func:`write_shard` with each task's arguments; ``begun`` of ``total`` samples are done
        already."""
        self._run(_write, tasks, "writing", begun, total, progress)

    def _run(
        self,
        task: Callable[..., None],
        tasks: Sequence[Any],
        what: str,
        begun: int,
        total: int,
        progress: Any,
    ) -> None:
        self._done.value = begun
        with _without_interrupts():
            pending = {self._pool.submit(task, arguments) for arguments in tasks}
        try:
            while pending:
                finished, pending = wait(pending, _SECONDS, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                progress(what, min(self._done.value, total), total)
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, most often for want of memory; try fewer --workers. The same "
                "command goes on from here"
            ) from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            _end_children(self._others)
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that begin here never see Ctrl-C, which a terminal sends to all of them.

    This process gets it, behind the block, and ends them. They inherit the mask, which holds from their first
    instruction on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_children(others: Collection[Any]) -> None:
    """End this process's workers at once; a file that they were writing has another name until it is
    whole."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()


_counter: Any = None
_rendering: Rendering | None = None
_lengths: Measure | None = None


def _start(counter: Any, parent: int, rendering: Rendering | None) -> None:
    """Prepare a worker, before anything else runs in it."""
    global _counter, _rendering
    _counter, _rendering = counter, rendering
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def call_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a function's result, from a process of its own that ends with this one."""
    fork, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
    with ProcessPoolExecutor(1, fork, die_with_parent, (os.getpid(),)) as pool:
        try:
            with _without_interrupts():
                future = pool.submit(function, *arguments)
            return future.result()
        except KeyboardInterrupt:
            _end_children(others)
            raise


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount


def _stage(arguments: Any) -> None:
    unit, path, reading = arguments
    stage_unit(unit, path, reading, _advance)


def measure() -> Measure | None:
    """Return the counter of tokens in this worker; it is loaded once.

    Raises:
        ValueError: the model's folder can't be used.
    """
    global _lengths
    if _lengths is None and _rendering is not None:
        from megatron_vlm.data.prepare.lengths import Lengths

        _lengths = Lengths(_rendering)
    return _lengths


def check_measure() -> None:
    """Load the counter of tokens, to find out before anything is written whether that works."""
    measure()


def _write(arguments: Any) -> None:
    plan, folder, units, done, encoding = arguments
    write_shard(plan, folder, units, done, encoding, measure(), _advance)
