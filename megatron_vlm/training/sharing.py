"""The sharing of microbatches, which one rank of a model copy has read, with the others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.data.batch import Microbatch, to_device
from megatron_vlm.data.media.base import Media
from megatron_vlm.parallel import Layout

_LENGTH = 8  # bytes in which the header's length is written


@dataclass(frozen=True)
class Shared:
    """The part of a microbatch that every rank of a model copy knows, before it is padded and moved.

    Attributes:
        input_ids, labels: int64 ``[b, s]``, on the CPU.
        packed: lengths of the samples that share a row; empty where each has its own.
        sources: of each sample, its dataset in the mixture.
        media: by kind; their tensors on the first stage only.
    """

    input_ids: Tensor
    labels: Tensor
    packed: list[int]
    sources: list[int]
    media: dict[str, Media]

    @classmethod
    def of(cls, microbatch: Microbatch) -> Shared:
        """Return the part of a microbatch that all ranks are to know."""
        packed = microbatch.lengths.tolist() if microbatch.packed else []
        return cls(microbatch.input_ids, microbatch.labels, packed, microbatch.sources, microbatch.media)

    @property
    def form(self) -> list[Any]:
        """Return the shapes of all its tensors, as JSON values."""
        media = [
            [kind, own.sizes.shape, [[name, _name(t), t.shape] for name, t in own.tensors.items()]]
            for kind, own in self.media.items()
        ]
        return [self.input_ids.shape, len(self.packed), len(self.sources), media]

    @property
    def numbers(self) -> list[Tensor]:
        """Return the numbers that every rank has to know, int64 and one-dimensional."""
        lists = (torch.tensor(numbers, dtype=torch.int64) for numbers in (self.packed, self.sources))
        sizes = (own.sizes.flatten() for own in self.media.values())
        return [self.input_ids.flatten(), self.labels.flatten(), *lists, *sizes]

    @classmethod
    def from_form(cls, form: Sequence[Any], numbers: _Pieces, tensors: _Pieces | None) -> Shared:
        """Return the microbatch of a form, taken from the front of the pieces.

        Args:
            numbers: of int64.
            tensors: bytes; None on ranks that don't get them.
        """
        shape, packed, sources, media = form
        return cls(
            numbers.take(shape),
            numbers.take(shape),
            numbers.take([packed]).tolist(),
            numbers.take([sources]).tolist(),
            {
                kind: Media(
                    kind,
                    {} if tensors is None else {name: tensors.take(*about) for name, *about in named},
                    numbers.take(sizes),
                )
                for kind, sizes, named in media
            },
        )


class _Pieces:
    """A flat tensor that is taken apart from its front."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.at = 0

    def take(self, *about: Any) -> Tensor:
        """Return the next piece: of a shape, or of bytes that are of a type and a shape."""
        *dtype, shape = about
        size = math.prod(shape)
        if dtype:
            size *= getattr(torch, dtype[0]).itemsize
            self.at = _aligned(self.at, dtype[0])
        piece = self.flat[self.at : self.at + size]
        self.at += size
        return (piece.view(getattr(torch, dtype[0])) if dtype else piece).view(shape)


class Sharer:
    """A sharer of microbatches, from the rank of a model copy that reads them to the others.

    One broadcast says what comes, one has all numbers that every rank has to know, and one to the first stage
    has the media's tensors.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._capacity = 1 << 10  # bytes of a header that is told in one broadcast

    def share(self, read: Sequence[Microbatch]) -> list[Shared]:
        """Return the microbatches that one rank read, on every rank of its model copy; a collective call.

        Args:
            read: empty on the ranks that read nothing.
        """
        own = [Shared.of(microbatch) for microbatch in read]
        if dist.get_world_size(self.layout.model_group) == 1:
            return own
        forms = self._tell([part.form for part in own])
        numbers = torch.cat([flat for part in own for flat in part.numbers]) if own else None
        received = self._broadcast(
            numbers, sum(map(_count_numbers, forms)), torch.int64, self.layout.model_group
        )
        tensors, size = None, _count_bytes(forms)
        if self.layout.is_first_stage and size:
            flat = _bytes([t for part in own for m in part.media.values() for t in m.tensors.values()])
            tensors = _Pieces(self._broadcast(flat, size, torch.uint8, self.layout.tp_group))
        pieces = _Pieces(received.cpu() if numbers is None else numbers)
        no_bytes = _Pieces(torch.empty(0, dtype=torch.uint8)) if self.layout.is_first_stage else None
        return [Shared.from_form(form, pieces, tensors or no_bytes) for form in forms]

    def _tell(self, forms: list[Any]) -> list[Any]:
        """Return the forms, on every rank.

        A header that is longer than ever before takes a second broadcast.
        """
        header = json.dumps(forms, separators=(",", ":")).encode() if forms else b""
        size, told = _LENGTH + len(header), None
        if forms:
            told = torch.zeros(max(size, self._capacity), dtype=torch.uint8)
            told[:size] = torch.frombuffer(
                bytearray(len(header).to_bytes(_LENGTH, "little") + header), dtype=torch.uint8
            )
        group, capacity = self.layout.model_group, self._capacity
        first = None if told is None else told[:capacity]
        came = self._broadcast(first, capacity, torch.uint8, group).cpu().numpy().tobytes()
        length = int.from_bytes(came[:_LENGTH], "little")
        if _LENGTH + length > capacity:
            self._capacity = 2 * (_LENGTH + length)
            rest = None if told is None else told[capacity:]
            size = _LENGTH + length - capacity
            came += self._broadcast(rest, size, torch.uint8, group).cpu().numpy().tobytes()
        found: list[Any] = json.loads(came[_LENGTH : _LENGTH + length])
        return found

    def _broadcast(
        self, own: Tensor | None, size: int, dtype: torch.dtype, group: dist.ProcessGroup
    ) -> Tensor:
        """Return one rank's flat tensor, on the device of every rank of a group.

        Args:
            own: None on the ranks that receive it.
        """
        device = self.layout.device
        tensor = torch.empty(size, dtype=dtype, device=device) if own is None else to_device(own, device)
        dist.broadcast(tensor, self.layout.model_src, group=group)
        return tensor


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _aligned(at: int, dtype: str) -> int:
    """Return where a tensor may begin: a view of bytes as another type needs a multiple of its size."""
    size: int = getattr(torch, dtype).itemsize
    return -(-at // size) * size


def _count_numbers(form: Sequence[Any]) -> int:
    shape, packed, sources, media = form
    return int(2 * math.prod(shape) + packed + sources + sum(math.prod(sizes) for _, sizes, _ in media))


def _count_bytes(forms: Sequence[Any]) -> int:
    end = 0
    for *_, media in forms:
        for _, _, named in media:
            for _, dtype, shape in named:
                end = _aligned(end, dtype) + math.prod(shape) * getattr(torch, dtype).itemsize
    return end


def _bytes(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the tensors' bytes one after the other, each where it may begin; None for none."""
    pieces: list[Tensor] = []
    end = 0
    for tensor in tensors:
        missing = _aligned(end, _name(tensor)) - end
        pieces += [torch.zeros(missing, dtype=torch.uint8)] if missing else []
        pieces.append(tensor.flatten().view(torch.uint8))
        end += missing + len(pieces[-1])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else None
