"""The readers of media, by kind."""

from __future__ import annotations

from typing import Dict, Type

from megatron_vlm.data.media.base import MediaReader, ReaderSettings
from megatron_vlm.data.media.images import ImageReader
from megatron_vlm.data.media.kinds import IMAGE

READERS: Dict[str, Type[MediaReader]] = {IMAGE.name: ImageReader}


def load_readers(settings: ReaderSettings) -> Dict[str, MediaReader]:
    """Return the readers of the kinds that a model takes.

    Raises:
        ValueError: the model's folders don't fit it; one line that says what would work.
    """
    loaded = {name: reader.load(settings) for name, reader in READERS.items()}
    return {name: reader for name, reader in loaded.items() if reader is not None}
