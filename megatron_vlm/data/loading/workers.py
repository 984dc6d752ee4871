"""Loader workers: forked processes that run an energon dataset, and say where they are in it.

energon's own loader asks a worker for its state when it is wanted. The worker answers between two
microbatches, or later where it has much to do. Here the state comes along with a microbatch every now and
then, so that nobody has to wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import select
import signal
import threading
import time
import warnings
from types import FrameType
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import torch
from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.errors import FatalSampleError
from megatron.energon.state import FlexState
from megatron.energon.wrappers.gc_dataset import gc_init_worker
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.loading.encoder import STOPPED
from megatron_vlm.data.loading.state import from_json, to_json
from megatron_vlm.system.processes import die_with_parent

# What next() gives: a microbatch and, every now and then, the worker's state right after it, as JSON.
Taken = Tuple[Microbatch, "str | None"]
# Where a worker starts: at a state (None: the very beginning) less some microbatches that come after it.
Start = Tuple["str | None", int]


class Workers(DataLoader[Any]):
    """The loader workers of one rank, from which microbatches are taken in turn.

    Workers are forked at the first :meth:`take`, and die with the process that forked them.

    Args:
        dataset: what each worker has a copy of; its ``worker_config`` says how many there are.
        path: what ``--data-path`` names, for messages.
        timeout: seconds to wait for a microbatch.
        state_seconds: a worker's state comes with its first microbatch, and then this often; None for never.
    """

    _iterator: Any

    def __init__(
        self,
        dataset: SavableDataset[Microbatch],
        path: str,
        timeout: float,
        state_seconds: float | None = None,
    ) -> None:
        self._share = _Share(dataset, state_seconds)
        with _no_worker_number_warning():
            super().__init__(
                self._share,
                batch_size=None,
                num_workers=dataset.worker_config.num_workers,
                # energon's watchdog would be a thread in the worker, which a hung C call stops as well;
                # torch's own timeout is in this process.
                timeout=timeout,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=True,
                multiprocessing_context="fork",
                worker_init_fn=functools.partial(_init_worker, os.getpid()),
                generator=torch.Generator(),  # else torch draws a seed from the global one
            )
        self.started = False
        self._path = path
        self._pass: Iterator[Taken] | None = None

    def start_at(self, starts: Sequence[Start], next_worker: int) -> None:
        """Set the states that the workers start from, and which worker comes first.

        Before the first :meth:`take`.

        Raises:
            ValueError: a state is not such a thing.
        """
        self._share.starts = {
            worker: (state and from_json(json.loads(state)), skip)
            for worker, (state, skip) in enumerate(starts)
        }
        self._share.next_worker = next_worker

    def take(self) -> Taken:
        """Return the next microbatch; the first call forks the workers.

        Raises:
            StopIteration: the dataset is at its end; the next call begins anew.
            ValueError: the data can't be read further; one line that says why.
            RuntimeError: a worker died, or gave nothing for ``timeout`` seconds.
        """
        if self.started:
            return self._next()
        self.started = True
        atexit.register(self.close)
        # What exists now is no concern of the workers' garbage collectors, which would look at all of it,
        # and so copy it, time and again: a start takes a tenth of the time.
        already_frozen = gc.get_freeze_count()
        gc.freeze()
        try:
            with _no_worker_number_warning():
                return self._next()
        finally:
            if not already_frozen:
                gc.unfreeze()

    def _next(self) -> Taken:
        """Call ``next``, and raise an error of a worker process as one line."""
        try:
            with _dead_workers_raise():
                if self._pass is None:
                    self._pass = iter(self)
                    _hold_torchs_handler()
                    reader = self._iterator._worker_result_queue._reader
                    reader._recv = functools.partial(_read, reader.fileno(), self.timeout)
                taken: Taken = next(self._pass)
                return taken
        except StopIteration:
            self._pass = None
            raise
        except (FatalSampleError, ValueError, OSError) as error:
            # torch raises a worker's error again; its message is the worker's whole traceback.
            lines = str(error).strip().splitlines()
            if not lines or "DataLoader worker process" not in lines[0]:
                raise RuntimeError(f"a data loader worker died ({type(error).__name__})") from None
            stopped = [line.partition(STOPPED)[2] for line in lines if STOPPED in line]
            message = stopped[-1] if stopped else lines[-1].partition(": ")[2]
            raise ValueError(f"--data-path {self._path}: {message}") from None
        except (EOFError, RuntimeError) as error:
            reason = str(error).strip().rstrip(".")
            raise RuntimeError(f"a data loader worker died or hangs ({reason})") from None

    def close(self) -> None:
        """End the workers, in good order if they answer, by force if not."""
        atexit.unregister(self.close)
        iterator, self._iterator, self._pass = self._iterator, None, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():  # they ignore the SIGTERM that torch tried
                    worker.kill()
                    worker.join()


_taking = False  # a microbatch, in this process


@contextlib.contextmanager
def _dead_workers_raise() -> Iterator[None]:
    """Raise an error at a worker's death within the block, and only there."""
    global _taking
    _taking = True
    try:
        _error_if_any_worker_fails()  # since the last time
        yield
    finally:
        _taking = False


def _hold_torchs_handler() -> None:
    """Let torch's handler of SIGCHLD raise where a microbatch is taken. By itself it does wherever the main
    thread is when a worker dies: amid a save, or in a collective call that the other ranks wait in."""
    torchs: Any = signal.getsignal(signal.SIGCHLD)
    if torchs is _held or not callable(torchs) or threading.current_thread() is not threading.main_thread():
        return
    global _handler
    _handler = torchs
    signal.signal(signal.SIGCHLD, _held)


_handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler  # torch's, once there is one


def _held(number: int, frame: FrameType | None) -> None:
    if _taking:
        _handler(number, frame)


def _read(file: int, seconds: float, size: int) -> io.BytesIO:
    """Read as multiprocessing's ``Connection._recv`` does; don't wait for a worker that stops amid a
    microbatch.

    torch's timeout ends the wait for the first byte, and its handler of signals that for the dead.

    Raises:
        RuntimeError: nothing came for ``seconds``.
        EOFError: the other end is closed.
    """
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    data = io.BytesIO()
    while data.tell() < size:
        if not waiting.poll(seconds * 1e3):
            raise RuntimeError(f"it stopped amid a microbatch {seconds:g} s ago")
        piece = os.read(file, size - data.tell())
        if not piece:
            raise EOFError
        data.write(piece)
    return data


class _Share(IterableDataset[Taken]):
    """The share of the dataset that runs in a worker."""

    def __init__(self, dataset: SavableDataset[Microbatch], state_seconds: float | None) -> None:
        self.starts: Dict[int, Tuple[FlexState | None, int]] = {}
        self.next_worker = 0
        self._dataset = dataset
        self._state_seconds = state_seconds
        self._taken = 0

    def __iter__(self) -> Iterator[Taken]:
        config = self._dataset.worker_config
        WorkerConfig.worker_id_offset = self.next_worker
        state, to_skip = self.starts.pop(config.rank_worker_id(), (None, 0))
        if state is not None:
            self._dataset.restore_state(state["dataset"])
            self._taken = state["microbatches"]
        due = 0.0
        try:
            config.worker_activate(self._taken)
            for microbatch in self._dataset:
                config.worker_deactivate()
                self._taken += 1
                if to_skip:
                    to_skip -= 1
                elif self._state_seconds is None or time.monotonic() < due:
                    yield microbatch, None
                else:
                    yield microbatch, self._state()
                    due = time.monotonic() + self._state_seconds
                config.worker_activate(self._taken)
        finally:
            config.worker_deactivate()

    def _state(self) -> str:
        state = FlexState(dataset=self._dataset.save_state(), microbatches=self._taken)
        return json.dumps(to_json(state), separators=(",", ":"))


def _init_worker(parent: int, worker_id: int) -> None:
    """Prepare a forked worker, before anything else runs in it."""
    die_with_parent(parent)  # a rank that is killed takes its workers with it
    # Signals to the process group are for the trainer: it may still save, and needs its workers for that.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warns about the fork
    gc_init_worker(worker_id)  # CUDA's objects can't be freed here


@contextlib.contextmanager
def _no_worker_number_warning() -> Iterator[None]:
    """Hide torch's warning of more workers than cores: their number is part of the data order here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield
