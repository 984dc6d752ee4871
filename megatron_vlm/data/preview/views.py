"""A sample as the training encoder makes it, and what each of its tokens and images is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_vlm.data.batch import IGNORE_INDEX, Sample
from megatron_vlm.data.dataset import PreparedDataset, RawSample
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.processing import Processing
from megatron_vlm.data.templates import SampleError, Turn


@dataclass(frozen=True)
class Token:
    """One token, and the text that it adds to those before it."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind: text that is trained or not, or the placeholders of one image."""

    tokens: list[Token]
    picture: int | None = None  # whose placeholders they are

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def trained(self) -> bool:
        return self.tokens[0].trained


@dataclass(frozen=True)
class Picture:
    """One image: the size it had, and the tiles that the tower gets."""

    width: int
    height: int
    tiles: list[Tensor]  # uint8 [c, H, W] each: the whole image, then those of its grid row by row
    grid: tuple[int, int]  # rows and columns; none where it isn't cut
    tokens: int


@dataclass(frozen=True)
class View:
    """One sample. Without ``sample`` it can't be used; ``reason`` and ``state``, its counter, say why."""

    key: str
    shard: str
    state: str  # "used", "dropped" or "corrupt"
    reason: str = ""
    turns: list[Turn] = field(default_factory=list)
    written: str = ""  # its JSON, where that is no conversation to be used
    sample: Sample | None = None
    pieces: list[Piece] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def num_trained(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces if piece.trained)

    @property
    def num_image_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces if piece.picture is not None)


def look(dataset: PreparedDataset, processing: Processing, raw: RawSample) -> View:
    """Encode one sample as a loader's worker does, and keep what it would have skipped."""
    shard = raw.__sources__[0].shard_name if raw.__sources__ else ""
    turns: list[Turn] = []
    try:
        turns, files = dataset.read(raw)
        sample = processing.encode(raw.__key__, turns, files)
    except SampleError as error:
        written = "" if turns else raw.parts.get("json", b"").decode("utf-8", "replace")
        return View(raw.__key__, shard, error.kind, str(error), list(turns), written)
    pictures = _pictures(processing, sample, files.get(IMAGE.name, ()))
    return View(
        raw.__key__,
        shard,
        "used",
        turns=list(turns),
        sample=sample,
        pieces=list(_pieces(processing, sample, pictures)),
        pictures=pictures,
    )


def _pieces(processing: Processing, sample: Sample, pictures: Sequence[Picture]) -> Iterator[Piece]:
    ids = sample.input_ids
    trained = [False] + [label != IGNORE_INDEX for label in sample.labels[:-1]]
    texts = token_texts(ids, processing.tokenizer, processing.image_token_id)
    tokens = [Token(*token) for token in zip(ids, texts, trained, strict=True)]
    start = picture = 0
    while start < len(ids):
        stop = start + 1
        if ids[start] == processing.image_token_id:
            stop = start + pictures[picture].tokens
            yield Piece(tokens[start:stop], picture)
            picture += 1
        else:
            while (
                stop < len(ids) and trained[stop] == trained[start] and ids[stop] != processing.image_token_id
            ):
                stop += 1
            yield Piece(tokens[start:stop])
        start = stop


def token_texts(ids: Sequence[int], tokenizer: Any, image_token_id: int) -> list[str]:
    """Return the text that each token adds to those before it; a character of several tokens is the last
    one's."""

    def decode(begin: int, end: int) -> str:
        text: str = tokenizer.decode(
            ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    texts: list[str] = []
    context = shown = 0  # from where a token is decoded with those before it, and how far texts reach
    for end in range(1, len(ids) + 1):
        if ids[end - 1] == image_token_id:
            texts.append("")
            context, shown = end - 1, end
            continue
        before, after = decode(context, shown), decode(context, end)
        whole = not after.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(after[len(before) :] if whole or end == len(ids) else "")
        if whole:
            context, shown = shown, end
    return texts


def _pictures(processing: Processing, sample: Sample, images: Sequence[bytes]) -> list[Picture]:
    pictures: list[Picture] = []
    if not images:
        return pictures
    media, first = sample.media[IMAGE.name], 0
    for data, (tall, wide) in zip(images, media.sizes.tolist(), strict=True):
        size = (tall, wide)
        (image,) = processing.images.open([data])
        height, width = processing.images.size(image)
        model = processing.model
        rows, columns = (0, 0) if model.anyres is None else model.tiling(size).grid
        tiles = list(media.tensors["pixels"][first : first + 1 + rows * columns])
        pictures.append(Picture(width, height, tiles, (rows, columns), model.count_tokens(size)))
        first += len(tiles)
    return pictures
