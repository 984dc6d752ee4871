"""The way of each tensor through a conversion: checked, hashed, counted, and written beside the reading.

The hash is XXH3-128 over the elements as they lie in memory, row by row, little-endian: what a
safetensors file holds of the tensor. It guards against damage and mistakes, not against an attacker;
it is taken since it runs at 31 GB/s on one core, where SHA-256 runs at 1.9 and BLAKE2b at 1.3.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

import megatron_vlm
from megatron_vlm.system.units import size_text

HASH = "xxh3_128"  # its key in manifests
MAX_WAITING = 256 << 20  # bytes that are read but not yet written
_MARGIN = 64 << 20  # free space left beside the weights: for tokenizers, headers and the file system

_M_MMAP_THRESHOLD = -3  # malloc.h

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Item = TypeVar("Item")


def digest(tensor: Tensor) -> str:
    """Return the hash of a tensor's elements, as 32 hexadecimal digits."""
    return xxhash.xxh3_128(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a tensor, row by row; of a contiguous one without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every bit (so a NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor's entry in a manifest."""
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype), HASH: digest(tensor)}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def tool_versions() -> dict[str, str]:
    """Return the versions that a manifest names of the software that wrote it."""
    return {
        "megatron_vlm": megatron_vlm.__version__,
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "xxhash": xxhash.VERSION,
        "python": platform.python_version(),
    }


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds no NaN and no infinite value.

    Raises:
        ValueError: it does.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # aminmax passes NaN on and needs one pass and no memory, unlike isfinite().all().
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise ValueError(f"{name} holds NaN or infinite values")


def check_free_space(target: Path, needed: int) -> None:
    """Check that ``needed`` bytes, and some for small files, can be written beside what is there.

    Raises:
        ValueError: the file system of ``target`` has less left.
    """
    folder = Path(os.path.abspath(target))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise ValueError(
            f"{target}: needs {size_text(needed + _MARGIN)}, but its file system has {size_text(free)} left; "
            "make room, or write elsewhere"
        )


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items, each made in a thread while the one before it is in use: read, for one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = executor.submit(next, iterator, None)
            yield item


class Background:
    """A thread that makes calls one after the other, so that a tensor is written while the next is read.

    A call's error comes out of a later call, or at the end of the block. Within it torch computes with one
    thread, in this thread and in those that begin: OpenMP's others would spin and take the writer's core.
    """

    def __init__(self) -> None:
        _give_freed_memory_back()
        self._threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def call(self, nbytes: int, function: Callable[..., None], *args: Any) -> None:
        """Make a call that keeps ``nbytes`` of memory, as soon as there is room for them."""
        while self._waiting and self._bytes + nbytes > MAX_WAITING:
            self._finish_oldest()
        self._waiting.append((nbytes, self._executor.submit(function, *args)))
        self._bytes += nbytes

    def _finish_oldest(self) -> None:
        nbytes, future = self._waiting.popleft()
        future.result()
        self._bytes -= nbytes

    def __enter__(self) -> Background:
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._waiting and kind is None:
                self._finish_oldest()
        finally:
            self._executor.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)


def _give_freed_memory_back() -> None:
    """Let memory of large tensors go back to the system when they are freed. glibc keeps, for each thread,
    what lies below a threshold, and raises that to 32 MiB as it goes."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


class Meter:
    """A counter of bytes for a progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self.add()

    def add(self, *tensors: Tensor) -> None:
        """Count tensors as done."""
        self._done += sum(tensor.nbytes for tensor in tensors)
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)
