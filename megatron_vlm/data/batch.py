"""Samples and microbatches, which the data pipeline hands to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.data.media.base import Media, join

IGNORE_INDEX = -100  # a label that carries no loss; torch's cross_entropy has the same default


@dataclass
class Sample:
    """One tokenised sample. Placeholders are expanded; labels are already shifted."""

    key: str
    input_ids: List[int]
    labels: List[int]
    media: Dict[str, Media] = field(default_factory=dict)  # by kind; of kinds that it has
    truncated: bool = False
    source: int = 0  # index of its dataset in the mixture


@dataclass
class Microbatch:
    """Samples padded on the right to the longest of them, or ``packed``: one after the other in one row.

    Attributes:
        input_ids: int64 ``[b, s]``; each item of its media is as many placeholders as its reader counts.
        labels: int64 ``[b, s]``; ``labels[:, t]`` is the token to predict at position ``t``,
            ``IGNORE_INDEX`` where there is no loss.
        lengths: int64 ``[b]``; positions of each sample, padding left out.
        keys: the samples' names, for messages.
        media: by kind, as the readers made them, of kinds that a sample has; sample by sample.
        counts: samples ``seen``, ``truncated``, ``dropped`` and ``corrupt`` on the way from the same
            worker's previous microbatch to this one.
        worker: global id of the loader worker that made it.
        sources: of each sample, the index of its dataset in the mixture.
        packed: ``b`` is 1, and the row holds all samples, as long as ``lengths`` says, without padding.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    keys: List[str]
    media: Dict[str, Media] = field(default_factory=dict)
    counts: Dict[str, int] = field(default_factory=dict)
    worker: int = 0
    sources: List[int] = field(default_factory=list)
    packed: bool = False

    def __reduce__(self) -> Tuple[Any, ...]:
        """Pickle the tensors as bytes in a pipe between processes: torch would open shared memory for each
        of them, which takes three times as long for some pictures."""
        values = {
            name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        values["media"] = {kind: media.map(Tensor.numpy) for kind, media in self.media.items()}
        return _from_arrays, (values,)

    def pin_memory(self) -> Microbatch:
        """Return the microbatch with its tensors in page-locked memory; torch's DataLoader calls this."""
        self.input_ids = self.input_ids.pin_memory()
        self.labels = self.labels.pin_memory()
        self.media = {
            kind: replace(media, tensors={name: t.pin_memory() for name, t in media.tensors.items()})
            for kind, media in self.media.items()
        }
        return self


def _from_arrays(values: Dict[str, Any]) -> Microbatch:
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    media = {
        kind: Media.of(kind, {name: torch.from_numpy(array) for name, array in of_kind.items()})
        for kind, of_kind in values["media"].items()
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Microbatch(**{**values, **tensors, "media": media})


def collate(samples: Sequence[Sample], pad_token_id: int) -> Microbatch:
    """Stack samples, padded on the right to the longest.

    Args:
        samples: at least one.
        pad_token_id: fills ``input_ids``; its labels are ``IGNORE_INDEX``.
    """
    length = max(len(sample.input_ids) for sample in samples)
    # numpy reads a list in a seventh of the time that torch takes.
    input_ids = np.full((len(samples), length), pad_token_id, dtype=np.int64)
    labels = np.full((len(samples), length), IGNORE_INDEX, dtype=np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = sample.input_ids
        labels[row, : len(sample.labels)] = sample.labels
    return Microbatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        lengths=torch.tensor([len(sample.input_ids) for sample in samples]),
        keys=[sample.key for sample in samples],
        media=join(sample.media for sample in samples),
        sources=[sample.source for sample in samples],
    )


def collate_packed(samples: Sequence[Sample], pad_token_id: int) -> Microbatch:
    """Join samples as :func:`collate` does, but one after the other in one row, without padding."""
    row = Sample(
        key="",
        input_ids=[token for sample in samples for token in sample.input_ids],
        labels=[label for sample in samples for label in sample.labels],
        media=join(sample.media for sample in samples),
    )
    return replace(
        collate([row], pad_token_id),
        lengths=torch.tensor([len(sample.input_ids) for sample in samples]),
        keys=[sample.key for sample in samples],
        sources=[sample.source for sample in samples],
        packed=True,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor without waiting for the copy: to a GPU that is possible from page-locked memory only."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fill_up(microbatch: Microbatch | None, rows: int, pad_token_id: int) -> Microbatch:
    """Add rows of padding, which carry no loss, to a microbatch, up to ``rows`` rows.

    Args:
        microbatch: None for nothing but one token of padding per row.
    """
    if microbatch is None:
        blank = Sample(key="", input_ids=[pad_token_id], labels=[IGNORE_INDEX])
        return replace(collate([blank] * rows, pad_token_id), keys=[], sources=[])
    missing = rows - len(microbatch.input_ids)
    return replace(
        microbatch,
        input_ids=F.pad(microbatch.input_ids, (0, 0, 0, missing), value=pad_token_id),
        labels=F.pad(microbatch.labels, (0, 0, 0, missing), value=IGNORE_INDEX),
        lengths=F.pad(microbatch.lengths, (0, missing)),
    )
