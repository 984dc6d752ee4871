"""The kinds of media that models take, and a microbatch's media with their places."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.base import Media
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models.modalities.base import Modality, Placed
from megatron_vlm.models.modalities.images import Images

MODALITIES: dict[str, type[Modality]] = {IMAGE.name: Images}


def modalities_of(model: ModelConfig) -> dict[str, Modality]:
    """Return the modalities that a model takes, by kind, in the order of its modules."""
    found = {kind: modality.of(model) for kind, modality in MODALITIES.items()}
    return {kind: modality for kind, modality in found.items() if modality is not None}


def place_media(
    input_ids: Tensor, media: Mapping[str, Media], modalities: Mapping[str, Modality]
) -> dict[str, Placed]:
    """Return the media of a microbatch with their places in its text.

    Args:
        input_ids: ``[b, s]``, best on the CPU.
        media: by kind, their tensors as the encoders take them.

    Raises:
        ValueError: placeholders and features of a kind differ in number, also where there is nothing of the
            kind; or the model doesn't take a kind.
    """
    unknown = sorted(kind for kind in media if kind not in modalities)
    if unknown:
        raise ValueError(f"the model takes no {unknown[0]}; it takes {', '.join(modalities)}")
    placed = {}
    for kind, modality in modalities.items():
        own = media.get(kind)
        sizes = input_ids.new_empty((0, 0), device="cpu") if own is None else own.sizes
        found = modality.place(input_ids, sizes, None if own is None else own.tensors)
        if own is not None and own.items:
            placed[kind] = found
    return placed
