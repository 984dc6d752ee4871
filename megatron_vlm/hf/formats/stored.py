"""Tensors where they lie in a file: read to a place in memory, written in place, hashed without memory.

All by read() and write() into memory that is used again. A mapped file costs a page fault for each 4 KiB,
which took 13 times as long here, with the file in the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.utils import _ReaderView

from megatron_vlm.hf.formats.streaming import as_bytes
from megatron_vlm.hf.tables.ops import Shape

_PIECE = 4 << 20  # bytes that are hashed at once
_STAYS = 512 << 20  # bytes of a file before the last that is written; what is to be verified is among them


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        start: of its storage, in bytes.
        stride: in elements.
        offset: of the tensor in its storage, in elements.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: Shape
    stride: Shape
    offset: int = 0

    def read(self, out: Tensor | None = None) -> Tensor:
        """Read the tensor.

        Args:
            out: a tensor of its shape and dtype to read into, or a part of one.

        Raises:
            ValueError: the file ends before it.
        """
        if out is not None and out.is_contiguous() and self._is_contiguous:
            read_into(self.path, self._first_byte, out)
            return out
        result = self._read()
        return result if out is None else out.copy_(result)

    def write(self, tensor: Tensor) -> None:
        """Write the tensor; the file has room for it already."""
        assert self._is_contiguous
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)
        with open(self.path, "r+b", buffering=0) as file:
            write_at(file, self._first_byte, tensor)

    @property
    def _first_byte(self) -> int:
        return self.start + self.offset * self.dtype.itemsize

    @property
    def _is_contiguous(self) -> bool:
        return torch.empty(self.shape, device="meta").as_strided(self.shape, self.stride).is_contiguous()

    @property
    def _extent(self) -> int:
        """The number of elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def _read(self) -> Tensor:
        if self._is_contiguous:
            return self.read(torch.empty(self.shape, dtype=self.dtype))
        storage = torch.empty(self._extent, dtype=self.dtype)
        read_into(self.path, self._first_byte, storage)
        return storage.as_strided(self.shape, self.stride)


def saved_tensors(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return the content of a file of ``torch.save``, or of a part of one, with :class:`Stored` for tensors.

    Nothing but tensors and plain values is unpickled; see ``torch.serialization.safe_globals`` for more.

    Raises:
        Exception: of many types, for what isn't such a file or holds something else.
    """
    with open(path, "rb") as file, FakeTensorMode():
        file.seek(start)
        if file.read(2) != b"PK":
            raise ValueError("not a zip archive, which torch.save has written since torch 1.6")
        file.seek(start)
        view: Any = file if length is None else _ReaderView(file, start, length)
        loaded = torch.load(view, map_location="cpu", weights_only=True)
    end = path.stat().st_size if length is None else start + length
    return _places(loaded, path, start, end)


def reason(error: Exception) -> str:
    """Return why ``torch.load`` refused a file, in a line.

    Its own first one advises to unpickle it nonetheless.
    """
    _, of_the_pickle, why = str(error).partition("WeightsUnpickler error:")
    line = (why if of_the_pickle else str(error)).strip().split("\n")[0].split(". ")[0]
    return line or "not what torch.save writes"


def _places(value: Any, path: Path, start: int, end: int) -> Any:
    if isinstance(value, dict):
        return {key: _places(item, path, start, end) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    storage: Any = value.untyped_storage()
    begin, shape, offset = start + storage._checkpoint_offset, tuple(value.shape), int(value.storage_offset())
    stored = Stored(path, begin, value.dtype, shape, value.stride(), offset)
    size = (offset + stored._extent) * value.dtype.itemsize
    if size > storage.nbytes() or begin + size > end:
        raise ValueError("a tensor ends behind the file or its storage")
    return stored


def read_into(path: Path, start: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with bytes of a file.

    Raises:
        ValueError: the file ends before that.
    """
    data = as_bytes(tensor)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while data:
            count = file.readinto(data)
            if not count:
                raise ValueError(f"{path}: cut off")
            data = data[count:]
        _let_go(file, start, tensor.nbytes)


def write_at(file: IO[bytes], start: int, tensor: Tensor) -> None:
    """Write a tensor's elements to an unbuffered file, and let them be on their way to the disk."""
    data = as_bytes(tensor)
    length = len(data)
    file.seek(start)
    while data:
        data = data[file.write(data) :]
    send_to_disk(file, start, length)


def send_to_disk(file: IO[bytes], start: int, length: int) -> None:
    """Start writing what was written to a file to the disk too, without waiting for it.

    Else the kernel gathers gigabytes before it begins, and the disk idles meanwhile.
    """
    _let_go(file, start, length)
    if start > _STAYS:
        _let_go(file, 0, start - _STAYS)


def _let_go(file: IO[bytes], start: int, length: int) -> None:
    """Let a part of a file leave the page cache. What isn't on the disk yet stays there, and begins to be
    written.

    The next tensor then takes the same pages. New ones for each would push out what others have cached, and
    cost more time than all the rest together where the host of a virtual machine has to find them.
    """
    os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def stored_hash(path: Path, start: int, length: int) -> str:
    """Return the :func:`~megatron_vlm.hf.formats.streaming.digest` of a part of a file.

    Raises:
        ValueError: the file ends before that.
    """
    state = xxhash.xxh3_128()
    for piece in _pieces(path, start, length):
        state.update(piece)
    return state.hexdigest()


def _pieces(path: Path, start: int, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(length, _PIECE)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while length:
            count = file.readinto(buffer[:length])
            if not count:
                raise ValueError(f"{path}: cut off")
            yield buffer[:count]
            length -= count
