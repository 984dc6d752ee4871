"""Images as microbatches, prompts and batches carry them; nothing here imports transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlm.data.batch import Microbatch, Sample
from megatron_vlm.data.media.base import Media


def image_media(
    tensor: Tensor, sizes: Sequence[Sequence[int]] | Tensor | None = None, name: str = "pixels"
) -> dict[str, Media]:
    """Images' tiles as media; none where there are none.

    Args:
        tensor: ``[tiles, c, h, w]``.
        sizes: None for images that aren't cut.
        name: ``pixels``, or ``pixel_values`` where they are normalised.
    """
    if not len(tensor):
        return {}
    found = torch.as_tensor([[0, 0]] * len(tensor) if sizes is None else sizes, dtype=torch.int64).view(-1, 2)
    return {"image": Media("image", {name: tensor}, found)}


def pixels(of: Sample | Microbatch) -> Tensor:
    """The tiles of its images, ``[tiles, c, h, w]``."""
    return of.media["image"].tensors["pixels"] if of.media else torch.empty(0)


def image_sizes(of: Sample | Microbatch) -> list[tuple[int, int]]:
    """The sizes of its images."""
    return [(height, width) for height, width in of.media["image"].sizes.tolist()] if of.media else []
