"""Pure functions between Hugging Face tensors and Megatron tensors, and between whole tensors and shards.

An *op* maps the Hugging Face tensors of a table row to one Megatron tensor and back, exactly. A
*shard rule* says how tensor parallelism cuts a Megatron tensor. Both know nothing of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Op:
    """The copy of one tensor; the base of the other operations."""

    def native_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the Megatron tensor, from the shapes of the Hugging Face tensors."""
        (shape,) = shapes
        return shape

    def to_native(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Megatron tensor. Where dtypes differ, the widest; going back restores them."""
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors; inverse of :meth:`to_native`."""
        return [tensor]


@dataclass(frozen=True)
class Unsqueeze(Op):
    """``[...]`` to ``[1, ..., 1, ...]`` with ``count`` leading ones: Megatron's class token."""

    count: int

    def native_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return (1,) * self.count + shape

    def to_native(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor.reshape(self.native_shape([tuple(tensor.shape)]))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(tensor.shape[self.count :])]


@dataclass(frozen=True)
class MergeQKV(Op):
    """Query, key and value rows, interleaved by key-value group.

    ``[heads * d, ...], [groups * d, ...], [groups * d, ...]`` to ``[(heads + 2 * groups) * d, ...]``
    whose rows are, group after group, ``heads / groups`` queries, the key, the value. So a cut of
    dimension 0 into equal parts gives each tensor-parallel rank whole groups.

    Source: megatron-core ``SelfAttention.get_query_key_value_tensors``.
    """

    num_heads: int
    num_groups: int

    def native_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def to_native(self, tensors: Sequence[Tensor]) -> Tensor:
        by_group = [t.reshape(self.num_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        queries = self.num_heads // self.num_groups
        head_dim = tensor.shape[0] // (self.num_groups * (queries + 2))
        by_group = tensor.reshape(self.num_groups, -1, *tensor.shape[1:])
        parts = by_group.split([queries * head_dim, head_dim, head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Concatenate(Op):
    """``count`` equal tensors one after the other on dimension 0: the gated MLP's ``[gate; up]``."""

    count: int

    def native_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def to_native(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(self.count))


@dataclass(frozen=True)
class PadVocabulary(Op):
    """``[vocab_size, ...]`` to ``[padded_size, ...]`` with rows of zeros."""

    vocab_size: int
    padded_size: int

    def native_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return (self.padded_size, *shape[1:])

    def to_native(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        if self.padded_size == self.vocab_size:
            return tensor
        padded = tensor.new_zeros(self.padded_size, *tensor.shape[1:])
        padded[: self.vocab_size] = tensor
        return padded

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.vocab_size]]


@dataclass(frozen=True)
class ShardRule:
    """The rule by which tensor parallelism cuts a tensor.

    Dimension ``dim`` (None: every rank has the whole tensor) consists of ``blocks`` equal blocks;
    each block is cut into equal parts, and a rank has its part of every block, one after the other.
    """

    dim: int | None = None
    blocks: int = 1

    def chunks(self, shape: Shape, size: int) -> list[Chunk]:
        """Return the pieces of a tensor that one of ``size`` ranks holds, in the order of the tensor.

        Raises:
            ValueError: the dimension cannot be cut into equal parts.
        """
        if self.dim is None:
            return [Chunk((0,) * len(shape), shape, 0)]
        parts = self.blocks * size
        if shape[self.dim] % parts:
            raise ValueError(f"dimension {self.dim} of {list(shape)} cannot be cut into {parts} equal parts")
        length = shape[self.dim] // parts
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        zeros_before, zeros_after = (0,) * len(before), (0,) * len(after)
        return [
            Chunk((*zeros_before, i * length, *zeros_after), (*before, length, *after), i % size)
            for i in range(parts)
        ]

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of the whole tensor that ``rank`` of ``size`` ranks holds."""
        if self.dim is None:
            return tensor
        pieces = [c.of(tensor) for c in self.chunks(tuple(tensor.shape), size) if c.rank == rank]
        return torch.cat(pieces, self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from the shards of all ranks, in rank order; inverse of :meth:`shard`."""
        if self.dim is None:
            return shards[0]
        blocks = zip(*(shard.chunk(self.blocks, self.dim) for shard in shards), strict=True)
        return torch.cat([part for block in blocks for part in block], self.dim)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, its shape, and the rank that holds it."""

    offset: Shape
    shape: Shape
    rank: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def is_in(self, shape: Shape) -> bool:
        """Return whether a tensor of this shape has such a box."""
        return len(self.offset) == len(self.shape) == len(shape) and all(
            0 <= start <= start + length <= size
            for start, length, size in zip(self.offset, self.shape, shape, strict=True)
        )

    def overlaps(self, other: Chunk) -> bool:
        """Return whether some element is in both."""
        sides = zip(self.offset, self.shape, other.offset, other.shape, strict=False)
        return all(max(a, b) < min(a + m, b + n) for a, m, b, n in sides)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this box of ``tensor``, as a view."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


COPY = Op()
REPLICATED = ShardRule()
COLUMN = ShardRule(dim=0)  # output features, vocabulary rows, key-value groups
ROW = ShardRule(dim=1)  # input features
GATED = ShardRule(dim=0, blocks=2)  # gate and up, each cut on its own
