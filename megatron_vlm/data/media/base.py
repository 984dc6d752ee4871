"""The media that a sample holds beside its text: images, and any other kind that has a reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Dict, Iterable, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.kinds import Kind

if TYPE_CHECKING:
    from megatron_vlm.artifacts.image_rule import ImageRule

# What tells without decoding it how many tokens an item takes, and where they go; for an image its height and
# width. All items of a kind have as many numbers.
ItemSize = Tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """The items of one kind in a sample, a microbatch or a prompt, in the order of their placeholders.

    Attributes:
        kind: the modality's name, such as ``image``.
        tensors: what the reader makes of the items, by name; item after item along the first dimension. Empty
            until they are decoded.
        sizes: int64 ``[items, numbers]``, on the CPU; the reader says what the numbers are.
    """

    kind: str
    tensors: Dict[str, Tensor]
    sizes: Tensor

    @property
    def items(self) -> int:
        """The number of items."""
        return len(self.sizes)

    @property
    def rows(self) -> int:
        """The number of rows that the encoder takes, such as the tiles of images."""
        return max(map(len, self.tensors.values()), default=0)

    def map(self, change: Callable[[Tensor], Any]) -> Dict[str, Any]:
        """Return all tensors by name, changed, with the sizes as ``sizes``."""
        return {name: change(tensor) for name, tensor in (*self.tensors.items(), ("sizes", self.sizes))}

    @classmethod
    def of(cls, kind: str, changed: Mapping[str, Tensor]) -> Media:
        """Return the media that :meth:`map` gave, with the tensors that stand there now."""
        tensors = dict(changed)
        sizes = tensors.pop("sizes")
        return cls(kind, tensors, sizes)


def join(parts: Iterable[Mapping[str, Media]]) -> Dict[str, Media]:
    """Return the media of several samples one after the other; kinds without an item are left out."""
    by_kind: Dict[str, List[Media]] = {}
    for part in parts:
        for kind, media in part.items():
            if media.items:
                by_kind.setdefault(kind, []).append(media)
    return {
        kind: found[0]
        if len(found) == 1
        else Media(
            kind,
            {name: torch.cat([media.tensors[name] for media in found]) for name in found[0].tensors},
            torch.cat([media.sizes for media in found]),
        )
        for kind, found in sorted(by_kind.items())
    }


class MediaReader(ABC):
    """The reader of one kind of media; it tells how many tokens the items take, too. Holds no state.

    Attributes:
        kind: how datasets write it.
        token_id, token: the placeholder that a feature takes the place of, and its text.
    """

    kind: ClassVar[Kind]
    token_id: int
    token: str

    @classmethod
    @abstractmethod
    def load(cls, settings: ReaderSettings) -> MediaReader | None:
        """Read what the model's folders say of the kind; None where the model doesn't take it.

        Raises:
            ValueError: the folders don't fit the model; one line that says what would work.
        """

    @abstractmethod
    def open(self, files: Sequence[bytes | Path]) -> List[Any]:
        """Read as much of a sample's items as their sizes need.

        Args:
            files: encoded, or the files that hold them.

        Raises:
            SampleError: one can't be read; of kind ``corrupt``.
        """

    @abstractmethod
    def sizes(self, opened: Sequence[Any]) -> List[ItemSize]:
        """Return the size of each opened item of a sample."""

    @abstractmethod
    def count_tokens(self, size: ItemSize) -> int:
        """Return how many placeholders stand for an item of a size."""

    @abstractmethod
    def decode(self, opened: Sequence[Any]) -> Dict[str, Tensor]:
        """Return the items of a sample as tensors, by name, in the form in which they travel.

        Args:
            opened: at least one.

        Raises:
            SampleError: one can't be decoded; of kind ``corrupt``.
        """

    @abstractmethod
    def finish(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Dict[str, Tensor]:
        """Return the tensors that the encoder takes, from those that :meth:`decode` made, on whatever
        device they are."""

    def write(self, text: str) -> str:
        """Return a user's text with placeholders in place of markers, one for each item."""
        return text.replace(self.kind.marker, self.token)

    def varied(self, **options: str) -> MediaReader:
        """Return the reader with a dataset's own options, of which those of other kinds change nothing."""
        return self

    def media(self, opened: Sequence[Any]) -> Media:
        """Return a sample's opened items, not decoded."""
        sizes = self.sizes(opened)
        return Media(self.kind.name, {}, torch.tensor(sizes, dtype=torch.int64).view(len(sizes), -1))

    def decoded(self, media: Media, opened: Sequence[Any]) -> Media:
        """Return the media that :meth:`media` gave, with their tensors."""
        return replace(media, tensors=self.decode(opened)) if media.items else media


@dataclass(frozen=True)
class ReaderSettings:
    """The settings that readers are made from.

    Attributes:
        model: what is trained or asked.
        tokenizer: a transformers tokenizer.
        tokenizer_dir: its folder.
        processor_dir: the folder whose processors are read.
        image_rule: how image files are read.
        token_ids: override the model's placeholders, by kind.
    """

    model: ModelConfig
    tokenizer: Any
    tokenizer_dir: str
    processor_dir: str
    image_rule: ImageRule
    token_ids: Mapping[str, int]
