"""Run a test function on several ranks: one pool of processes serves the whole session.

Starting a process costs seconds of imports; joining and leaving a process group costs milliseconds.
The ranks are on the CPU with gloo, or with ``DEVICE=cuda`` in the environment on a GPU each with NCCL.
"""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.patience import HANG, alive, cpu_seconds

DEVICE = os.environ.get("DEVICE", "cpu")  # of the pool's ranks: "cpu" or "cuda"
# How far fp32 results are apart beside those on a CPU: torch's fp32 attention on a GPU is three products in
# TF32, which leave out 2^-22, four times fp32's rounding.
ROUNDING = {"cpu": 1.0, "cuda": 4.0}[DEVICE]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Ranks that wait for each other in a collective use no CPU. However many others want it, a rank that can go
# on gets more than this within IDLE seconds.
IDLE, _IDLE_CPU = 120.0, 0.5


# Ranks on the CPU are forked off a process that has imported what they need, so that it is imported once and
# not by each of them. On GPUs each starts afresh: CUDA doesn't outlive a fork.
CONTEXT: Any = multiprocessing.get_context("forkserver" if DEVICE == "cpu" else "spawn")
if DEVICE == "cpu":
    CONTEXT.set_forkserver_preload(
        [
            "tests.workers",
            "megatron_vlm.hf.convert",
            "tqdm",
            # What transformers imports when it is first asked for it.
            "transformers.models.auto.tokenization_auto",
            "transformers.models.auto.image_processing_auto",
            "transformers.models.auto.processing_auto",
            "transformers.models.llama.tokenization_llama",
            "transformers.models.clip.image_processing_pil_clip",
        ]
    )
# Ranks look for garbage once in so many tasks, since it takes each of them a quarter of a second: gloo's
# threads end with the last reference to their group, of which most tasks leave none behind.
_TASKS_BETWEEN_COLLECTIONS = 10

# What gloo says where a connection is lost while ranks make a group, which happens now and then. Groups are
# made before a test's work begins, so the test can begin again.
_NOT_CONNECTED = "Gloo connectFullMesh failed"


class NotConnectedError(AssertionError):
    """Ranks that all live have not found each other."""


class _ByValue(pickle.Pickler):
    """Tensors leave the GPU."""

    def reducer_override(self, value: Any) -> Any:
        return value.cpu().__reduce_ex__(5) if getattr(value, "is_cuda", False) is True else NotImplemented


def _worker(rank: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Not a daemon, since data loaders start processes of their own; so it ends with its parent like this.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if DEVICE == "cuda":
        os.environ["LOCAL_RANK"] = str(rank)
    import torch
    import torch.distributed as dist

    from megatron_vlm import parallel

    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for number in itertools.count(1):
        task = tasks.get()
        if task is None:
            return
        function, args, world, store = task
        try:
            dist.init_process_group(
                "nccl" if DEVICE == "cuda" else "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=HANG),
            )
            # Pickled here: what can't be is this task's error, and tensors travel by value.
            answer = io.BytesIO()
            _ByValue(answer, protocol=5).dump(function(*args))
            results.put((rank, answer.getvalue(), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
        finally:
            parallel.finalize()
            if number % _TASKS_BETWEEN_COLLECTIONS == 0:
                gc.collect()


class Pool:
    """``size`` processes that wait for work.

    Functions and their arguments travel by pickle, so functions stand at the top of a module.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self._start()

    def _start(self) -> None:
        self.results = CONTEXT.Queue()
        self.tasks = [CONTEXT.Queue() for _ in range(self.size)]
        self.processes = [
            CONTEXT.Process(target=_worker, args=(rank, self.tasks[rank], self.results))
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.start()

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on ranks 0 to ``world - 1`` of a fresh process group.

        Skips the test where there are not as many GPUs as ranks: NCCL takes one rank for each.

        Returns:
            What each rank returned, by rank, with tensors on the CPU.
        """
        if world > self.size:
            pytest.skip(f"needs {world} ranks; {self.size} {'GPU is' if self.size == 1 else 'are'} here")
        try:
            return self._run(world, function, args)
        except NotConnectedError as error:
            print(f"asked once more, since the ranks did not connect: {error}", file=sys.stderr)
            return self._run(world, function, args)

    def _run(self, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self.count += 1
        store = os.path.join(self.folder.name, str(self.count))
        for rank in range(world):
            self.tasks[rank].put((function, args, world, store))
        answers: list[Any] = [None] * world
        missing = set(range(world))
        while missing:
            rank, answer, error = self._next(missing)
            if error is not None:
                self.stop()
                self._start()  # the other ranks may hang in a collective
                kind = NotConnectedError if _NOT_CONNECTED in error else AssertionError
                raise kind(f"rank {rank} of {world}: {error}")
            answers[rank] = pickle.loads(answer)
            missing.remove(rank)
        return answers

    def _next(self, missing: set[int]) -> tuple[int, bytes, str | None]:
        """Wait for a rank's answer, or a sign that none will come: a rank is gone, or all stand still."""
        seconds, since = -1.0, time.monotonic()
        while True:
            # Not is_alive(), which says yes of a process whose end somebody else has asked for.
            gone = [rank for rank in sorted(missing) if not alive(self.processes[rank].pid)]
            try:
                return self.results.get(timeout=1.0)
            except queue.Empty:
                pass
            if gone:
                return gone[0], b"", f"its process has ended, exit code {self.processes[gone[0]].exitcode}"
            now = cpu_seconds(self.processes[rank].pid for rank in missing)
            if now > seconds + _IDLE_CPU:
                seconds, since = now, time.monotonic()
            elif time.monotonic() > since + IDLE:
                return min(missing), b"", f"no rank has gone on for {IDLE:.0f} s"

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
