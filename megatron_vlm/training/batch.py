"""Global batches: read by one rank of each model copy, handed to the others, put on the device.

A whole global batch is read before its forward pass begins. Handing out microbatches one by one
inside a pipeline schedule would deadlock: a stage waits for its neighbour's activations while that
neighbour waits for it to take part in the broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch, to_device
from megatron_vlm.data.images import normalize
from megatron_vlm.data.processing import Processing
from megatron_vlm.models.loss import LossParts, find_trained
from megatron_vlm.models.packing import boundaries
from megatron_vlm.models.tiles import FeatureIndex, index_features
from megatron_vlm.models.vlm import find_image_positions
from megatron_vlm.parallel import Layout
from megatron_vlm.plan.flops import causal_pairs
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
    pixel_values: Tensor | None = None  # [tiles, c, h, w], normalised; first stage only
    image_positions: Tensor | None = None  # int64 [2, features]; first stage only
    packed_seq_params: PackedSeqParams | None = None  # where b is 1 and the row holds several samples
    feature_index: FeatureIndex | None = None  # where images are cut into tiles; first stage only
    loss_parts: LossParts | None = None  # of a mixture; last stage only


@dataclass(frozen=True)
class GlobalBatch:
    """This data parallel rank's share of a global batch."""

    microbatches: list[Batch]
    sequence_length: int  # of the longest microbatch; of each, where there are pipeline stages
    # On the rank that reads; elsewhere empty.
    tokens: int = 0  # positions, padding left out
    positions: int = 0  # with padding
    attention_pairs: int = 0  # pairs of a query and a key that it sees
    images: int = 0
    tiles: int = 0  # of the images, through the tower one by one
    keys: list[list[str]] = field(default_factory=list)  # sample keys of each microbatch


def sample_names(microbatches: list[int], batch: GlobalBatch, layout: Layout) -> list[str]:
    """Names of the samples in some of the ranks' microbatches; a collective call, since only the ranks
    that read know them.

    Args:
        microbatches: indices of this data parallel rank's.
    """
    own = [key for index in microbatches if batch.keys for key in batch.keys[index]]
    everyones: list[list[str]] = [[] for _ in range(layout.world_size)]
    dist.all_gather_object(everyones, own)
    return [key for keys in everyones for key in keys]


class BatchReader:
    """Yields this rank's part of each global batch; a collective call over a model copy.

    Args:
        source: microbatches, on the rank of each model copy that loads data; None on the others.
        num_microbatches: microbatches per data parallel rank in a global batch.
        processing: says how pixels are normalised and which token fills sequences up.
        dtype: of the pixel values.
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
        self.model = model
        self.images = processing.images
        self.num_microbatches = num_microbatches
        self.pad_token_id = processing.pad_token_id
        self.dtype = dtype
        self.sequence_multiple = math.lcm(sequence_multiple, LENGTH_STEP[layout.device.type])
        self.totals = totals

    def next(self) -> GlobalBatch:
        """Read the next global batch.

        Raises:
            ValueError: image tokens and image features differ in number, on every rank alike.
        """
        read = self._read()
        if self.totals is not None:
            self.totals.count(read)
        shared = self._share(read)
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
            images=sum(len(m.image_sizes) for m in read),
            tiles=sum(len(m.pixels) for m in read),
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

    def _share(self, read: list[Microbatch]) -> list[_Shared]:
        """Hand what one rank read to all ranks of its model copy; images to the first stage only."""
        if dist.get_world_size(self.layout.model_group) == 1:
            return [
                _Shared(m.input_ids, m.labels, m.image_sizes, m.pixels, _packed(m), m.sources) for m in read
            ]
        src, group, device = self.layout.model_src, self.layout.model_group, self.layout.device
        sizes = torch.zeros(self.num_microbatches, 6, dtype=torch.int64)
        if read:
            sizes = torch.tensor(
                [
                    [*m.input_ids.shape, len(_packed(m)), len(m.image_sizes), len(m.pixels), len(m.sources)]
                    for m in read
                ]
            )
        sizes = sizes.to(device)
        dist.broadcast(sizes, src, group=group)
        shapes = sizes.tolist()

        own_text = torch.cat([numbers for m in read for numbers in _numbers(m)]) if read else None
        if own_text is not None:
            text = to_device(own_text, device)
        else:
            length = sum(
                2 * b * s + samples + 2 * images + sources for b, s, samples, images, _, sources in shapes
            )
            text = torch.empty(length, dtype=torch.int64, device=device)
        dist.broadcast(text, src, group=group)
        text = text.cpu() if own_text is None else own_text

        pixels = None
        num_tiles = sum(tiles for *_, tiles, _ in shapes)
        if self.layout.is_first_stage and num_tiles:
            if read:
                pixels = to_device(torch.cat([m.pixels for m in read]), device)
            else:
                vision = self.model.vision
                shape = (num_tiles, vision.num_channels, vision.image_size, vision.image_size)
                pixels = torch.empty(shape, dtype=torch.uint8, device=device)
            dist.broadcast(pixels, src, group=self.layout.tp_group)

        shared, at, tile_at = [], 0, 0
        for b, s, samples, images, tiles, sources in shapes:
            ids, labels = text[at : at + 2 * b * s].view(2, b, s)
            at += 2 * b * s
            packed = text[at : at + samples].tolist()
            at += samples
            image_sizes = text[at : at + 2 * images].view(images, 2)
            at += 2 * images
            own_sources = text[at : at + sources].tolist()
            at += sources
            own = None if pixels is None else pixels[tile_at : tile_at + tiles]
            tile_at += tiles
            shared.append(_Shared(ids, labels, image_sizes, own, packed, own_sources))
        return shared

    def _on_device(self, part: _Shared, length: int) -> Batch:
        index = index_features(part.image_sizes, self.model)
        positions = find_image_positions(part.input_ids, len(part.image_sizes), self.model, index)
        missing = length - part.input_ids.shape[1]
        ids = F.pad(part.input_ids, (0, missing), value=self.pad_token_id)
        labels = F.pad(part.labels, (0, missing), value=IGNORE_INDEX)
        device = self.layout.device
        # Places and counts are worked out here: asking the device for them would make the host wait for it.
        loss_mask = labels.ne(IGNORE_INDEX)
        pixel_values = None
        if part.pixels is not None and len(part.pixels):
            pixel_values = normalize(to_device(part.pixels, device), self.images, self.dtype)
        return Batch(
            input_ids=to_device(ids, device),
            labels=to_device(labels.clamp(min=0), device),
            loss_mask=to_device(loss_mask, device),
            trained=to_device(find_trained(loss_mask), device),
            pixel_values=pixel_values,
            image_positions=None if pixel_values is None else to_device(positions, device),
            packed_seq_params=boundaries(part.packed, length, device) if part.packed else None,
            feature_index=None if pixel_values is None or index is None else index.to(device),
            loss_parts=self._loss_parts(part, ids),
        )

    def _loss_parts(self, part: _Shared, ids: Tensor) -> LossParts | None:
        if self.totals is None or not self.layout.is_last_stage:
            return None
        sources = token_sources(part.sources, part.packed, *ids.shape)
        return self.totals.parts(to_device(sources.contiguous(), self.layout.device))


def _packed(microbatch: Microbatch) -> list[int]:
    """Lengths of the samples that share a row; empty where each has its own."""
    return microbatch.lengths.tolist() if microbatch.packed else []


def _numbers(microbatch: Microbatch) -> list[Tensor]:
    """What every rank has to know of a microbatch, one-dimensional."""
    packed = torch.tensor(_packed(microbatch), dtype=torch.int64)
    sizes = microbatch.image_sizes.flatten()
    sources = torch.tensor(microbatch.sources, dtype=torch.int64)
    return [microbatch.input_ids.flatten(), microbatch.labels.flatten(), packed, sizes, sources]


@dataclass(frozen=True)
class _Shared:
    """What every rank of a model copy knows of a microbatch, before it is padded and moved."""

    input_ids: Tensor  # int64 [b, s], on the CPU
    labels: Tensor  # int64 [b, s], on the CPU
    image_sizes: Tensor  # int64 [images, 2], on the CPU
    pixels: Tensor | None  # uint8 [tiles, c, h, w]; first stage only
    packed: list[int]  # lengths of the samples that share a row; empty where each has its own
    sources: list[int]  # of each sample, its dataset in the mixture
