"""The grouping of a buffer's samples: which ones share a sequence, or a micro batch."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import List, Sequence, Tuple


@dataclass(frozen=True)
class Packing:
    """Several samples in a sequence: best fit decreasing.

    The longest sample comes first, each into the fullest sequence that has room for it, or into a new one.
    That takes at most 11/9 of the fewest possible sequences and 4 more (Johnson et al., Worst-case
    performance bounds for simple one-dimensional packing algorithms, 1974).

    Attributes:
        buffer_size: samples from which they are chosen.
        capacity: tokens of a sequence.
    """

    buffer_size: int
    capacity: int

    def __str__(self) -> str:
        return f"--packing --packing-buffer-size {self.buffer_size} --seq-length {self.capacity}"

    def buffer_within(self, share: int) -> int:
        """Return the size of the buffer of a loader worker that has ``share`` samples."""
        return max(1, min(self.buffer_size, share))

    def select(self, lengths: Sequence[int], has_image: Sequence[bool], round_number: int) -> List[List[int]]:
        """Share a buffer of samples out.

        Args:
            lengths, has_image: of the samples; tokens include those of images.
            round_number: of the buffer; says in which order the groups come, which their samples' lengths
                don't.

        Returns:
            Indices of the samples of each group, every sample once.

        Raises:
            ValueError: a sample is longer than a sequence.
        """
        sequences: List[List[int]] = []
        rooms: List[Tuple[int, int]] = []  # of each sequence that has some, with its number, in order
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            length = lengths[index]
            if length > self.capacity:
                raise ValueError(f"a sample of {length} tokens is longer than a sequence of {self.capacity}")
            place = bisect_left(rooms, (length, 0))
            if place == len(rooms):
                room, number = self.capacity, len(sequences)
                sequences.append([])
            else:
                room, number = rooms.pop(place)
            sequences[number].append(index)
            if room > length:
                insort(rooms, (room - length, number))
        random.Random(round_number).shuffle(sequences)
        return [sorted(sequence) for sequence in sequences]


@dataclass(frozen=True)
class LengthGroups:
    """Micro batches of samples of like length, with images or without; at most one of a buffer has both.

    Micro batches that are read for one iteration are of like length too, since ranks and pipeline stages
    wait for the longest. Source: LLaVA's ``group_by_modality_length``, which does with an epoch what this
    does with a buffer.

    Attributes:
        buffer_size: samples from which they are chosen; rounded to whole iterations.
        size: samples of a micro batch.
        in_a_row: micro batches that a loader worker has in an iteration.
    """

    buffer_size: int
    size: int
    in_a_row: int = 1

    def __str__(self) -> str:
        return (
            f"--group-by-length --packing-buffer-size {self.buffer_size} and {self.in_a_row} micro batches "
            "of each loader worker in an iteration"
        )

    def buffer_within(self, share: int) -> int:
        """Return the same as :meth:`Packing.buffer_within`."""
        step = self.size * self.in_a_row
        return max(1, min(self.buffer_size, share) // step) * step

    def select(self, lengths: Sequence[int], has_image: Sequence[bool], round_number: int) -> List[List[int]]:
        """Select as :meth:`Packing.select`. Workers with the same round number take the lengths in the same
        order, so that their parts of an iteration are alike."""
        order = sorted(range(len(lengths)), key=lambda index: (has_image[index], lengths[index]))
        step = self.size * self.in_a_row
        parts = [order[start : start + step] for start in range(0, len(order), step)]
        random.Random(round_number).shuffle(parts)
        return [part[start : start + self.size] for part in parts for start in range(0, len(part), self.size)]
