"""Global batches: read by one rank of each model copy, handed to the others, put on the device.

A whole global batch is read before its forward pass begins. Handing out microbatches one by one
inside a pipeline schedule would deadlock: a stage waits for its neighbour's activations while that
neighbour waits for it to take part in the broadcast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch, to_device
from megatron_vlm.data.media.base import Media
from megatron_vlm.data.processing import Processing
from megatron_vlm.models.loss import LossParts, find_trained
from megatron_vlm.models.modalities.base import Placed
from megatron_vlm.models.modalities.table import modalities_of, place_media
from megatron_vlm.models.packing import boundaries
from megatron_vlm.models.payload import payload_rows
from megatron_vlm.parallel import Layout
from megatron_vlm.plan.flops import causal_pairs
from megatron_vlm.training.sharing import Shared, Sharer
from megatron_vlm.training.sources import SourceTotals, token_sources

# Lengths are padded up to a multiple of this. cuDNN's attention is planned anew for every shape that it
# meets, and the allocator keeps memory for each: of 2048 lengths, 32 are left.
LENGTH_STEP = {"cpu": 1, "cuda": 64}


@dataclass(frozen=True)
class Batch:
    """A microbatch on this rank's device."""

    input_ids: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s], within the vocabulary
    loss_mask: Tensor  # bool [b, s], True where a token is trained
    trained: Tensor  # int64 [trained tokens], the same as positions: of find_trained
    media: Mapping[str, Placed] = field(default_factory=dict)  # by kind; first stage only
    packed_seq_params: PackedSeqParams | None = None  # where b is 1 and the row holds several samples
    loss_parts: LossParts | None = None  # of a mixture; last stage only
    position_ids: Tensor | None = None  # int64 [b, s] or [3, b, s]; None: indices in the sample
    taps: Mapping[str, Tensor] | None = None  # what later layers take beside the hidden states


@dataclass(frozen=True)
class GlobalBatch:
    """This data parallel rank's share of a global batch."""

    microbatches: list[Batch]
    sequence_length: int  # of the longest microbatch; of each, where there are pipeline stages
    # On the rank that reads; elsewhere empty.
    tokens: int = 0  # positions, padding left out
    positions: int = 0  # with padding
    attention_pairs: int = 0  # pairs of a query and a key that it sees
    items: Mapping[str, int] = field(default_factory=dict)  # of the media, by kind
    rows: Mapping[str, int] = field(default_factory=dict)  # that the encoders take of them, by kind
    keys: list[list[str]] = field(default_factory=list)  # sample keys of each microbatch

    @property
    def payload_rows(self) -> int:
        """The rows of the payload that a pipeline stage sends to the next for a microbatch."""
        return payload_rows(self.sequence_length)


def sample_names(microbatches: list[int], batch: GlobalBatch, layout: Layout) -> list[str]:
    """Return the names of the samples in some of the ranks' microbatches.

    A collective call: only the ranks that read know them.

    Args:
        microbatches: indices of this data parallel rank's.
    """
    own = [key for index in microbatches if batch.keys for key in batch.keys[index]]
    everyones: list[list[str]] = [[] for _ in range(layout.world_size)]
    dist.all_gather_object(everyones, own)
    return [key for keys in everyones for key in keys]


class BatchReader:
    """The reader of this rank's part of each global batch; a collective call over a model copy.

    Args:
        source: microbatches, on the rank of each model copy that loads data; None on the others.
        num_microbatches: microbatches per data parallel rank in a global batch.
        processing: says how media become what encoders take, and which token fills sequences up.
        dtype: of what they take.
        sequence_multiple: sequence lengths are padded up to a multiple of this (sequence
            parallelism cuts them into equal parts).
        totals: of a mixture's datasets; takes what is read, and the losses.
    """

    def __init__(
        self,
        source: Iterator[Microbatch] | None,
        layout: Layout,
        model: ModelConfig,
        processing: Processing,
        num_microbatches: int,
        dtype: torch.dtype,
        sequence_multiple: int = 1,
        totals: SourceTotals | None = None,
    ) -> None:
        self.source = source
        self.layout = layout
        self.sharer = Sharer(layout)
        self.modalities = modalities_of(model)
        self.readers = processing.readers
        self.num_microbatches = num_microbatches
        self.pad_token_id = processing.pad_token_id
        self.dtype = dtype
        self.sequence_multiple = math.lcm(sequence_multiple, LENGTH_STEP[layout.device.type])
        self.totals = totals

    def next(self) -> GlobalBatch:
        """Read the next global batch.

        Raises:
            ValueError: placeholders and features differ in number, on every rank alike.
        """
        read = self._read()
        if self.totals is not None:
            self.totals.count(read)
        shared = self.sharer.share(read)
        multiple = self.sequence_multiple
        lengths = [-(-part.input_ids.shape[1] // multiple) * multiple for part in shared]
        if self.layout.pp > 1:  # the schedules exchange activations of one shape
            lengths = [max(lengths)] * len(lengths)
        return GlobalBatch(
            microbatches=[
                self._on_device(part, length) for part, length in zip(shared, lengths, strict=True)
            ],
            sequence_length=max(lengths),
            tokens=sum(int(m.lengths.sum()) for m in read),
            positions=sum(len(m.input_ids) * length for m, length in zip(read, lengths, strict=False)),
            attention_pairs=sum(causal_pairs(m.lengths.tolist()) for m in read),
            items=_count(read, lambda media: media.items),
            rows=_count(read, lambda media: media.rows),
            keys=[m.keys for m in read],
        )

    def skip(self) -> None:
        """Pass over the next global batch; not a collective call."""
        self._read()

    def _read(self) -> list[Microbatch]:
        if not self.layout.loads_data:
            return []
        assert self.source is not None
        return [next(self.source) for _ in range(self.num_microbatches)]

    def _on_device(self, part: Shared, length: int) -> Batch:
        device = self.layout.device
        missing = length - part.input_ids.shape[1]
        ids = F.pad(part.input_ids, (0, missing), value=self.pad_token_id)
        labels = F.pad(part.labels, (0, missing), value=IGNORE_INDEX)
        # Places and counts are worked out here: asking the device for them would make the host wait for it.
        loss_mask = labels.ne(IGNORE_INDEX)
        media = {kind: self._finished(own) for kind, own in part.media.items()}
        placed = place_media(part.input_ids, media, self.modalities)
        return Batch(
            input_ids=to_device(ids, device),
            labels=to_device(labels.clamp(min=0), device),
            loss_mask=to_device(loss_mask, device),
            trained=to_device(find_trained(loss_mask), device),
            media={kind: own.to(device) for kind, own in placed.items() if own.inputs},
            packed_seq_params=boundaries(part.packed, length, device) if part.packed else None,
            loss_parts=self._loss_parts(part, ids),
        )

    def _finished(self, media: Media) -> Media:
        """Return the encoder's inputs, on the ranks that have the tensors; the others know the sizes
        alone."""
        if not media.tensors:
            return media
        tensors = {name: to_device(tensor, self.layout.device) for name, tensor in media.tensors.items()}
        return replace(media, tensors=self.readers[media.kind].finish(tensors, self.dtype))

    def _loss_parts(self, part: Shared, ids: Tensor) -> LossParts | None:
        if self.totals is None or not self.layout.is_last_stage:
            return None
        sources = token_sources(part.sources, part.packed, *ids.shape)
        return self.totals.parts(to_device(sources.contiguous(), self.layout.device))


def _count(read: list[Microbatch], number: Callable[[Media], int]) -> dict[str, int]:
    """Return a number of the microbatches' media, by kind."""
    counts: Counter[str] = Counter()
    for microbatch in read:
        counts.update({kind: number(media) for kind, media in microbatch.media.items()})
    return counts
