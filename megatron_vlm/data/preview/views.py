"""What the model will see of samples: the training encoder's own output, made readable."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, checkpoint_layers, read_model
from megatron_vlm.config.preview import PreviewConfig, PreviewSection
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch, Sample
from megatron_vlm.data.dataset import PreparedDataset, RawSample
from megatron_vlm.data.kinds import IMAGE
from megatron_vlm.data.mixture import Mixture, Source
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.data.templates import SampleError, Turn
from megatron_vlm.plan.start import first_image_rule
from megatron_vlm.system.files import write_whole
from megatron_vlm.system.units import count_text


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
    """One image: what it was, and what the tower gets."""

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


def show(config: PreviewConfig) -> int:
    """Print the samples that the flags choose, or write the page; returns the exit code.

    Raises:
        ValueError: dataset, model or tokenizer can't be used; the message names the flag.
    """
    from megatron_vlm.data.preview.page import page

    if config.run.data.data_path is None:
        raise ValueError("--data-path is missing: a folder prepared by energon")
    model, hf_dir = _model(config.run)
    data = config.run.data.with_image_rule(first_image_rule(config.run))
    processing = build_processing(dataclasses.replace(config.run, data=data), model, hf_dir)
    mixture = Mixture.open(config.run.data.data_path, config.preview.split)
    processings = mixture.processings(processing)
    views = []
    for number, raw in _chosen(mixture, config.preview, config.run.training.seed):
        source = mixture.sources[number]
        view = look(source.dataset, processings[number], raw)
        views.append(dataclasses.replace(view, shard=os.path.join(source.name, view.shard)))
    about = _about(config.run, processings, views)
    if config.preview.html is not None:
        write_whole(
            Path(config.preview.html), page(views, about, config.run.data.seq_length, config.preview.ids)
        )
        print(f"{config.preview.html}: {about['samples']}", file=sys.stderr)
    if config.preview.json:
        values = {**about, "views": [to_json(view) for view in views]}
        print(json.dumps(values, ensure_ascii=False, indent=2))
    elif config.preview.html is None:
        colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for view in views:
            print(terminal(view, colored, config.preview.ids), end="\n\n")
        print("\n".join(f"{name}: {value}" for name, value in about.items()))
    return 0


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


def describe(microbatch: Microbatch, tokenizer: Any, image_token_id: int) -> str:
    """The first sample of a loader's micro batch, for the log of a run.

    Trained tokens stand between ``⟦`` and ``⟧``; a run of image tokens is shown once, with its count.
    """
    end = int(microbatch.lengths[0])
    ids = microbatch.input_ids[0, :end].tolist()
    trained = [False] + (microbatch.labels[0, : end - 1] != IGNORE_INDEX).tolist()
    texts = _texts(ids, tokenizer, image_token_id)
    pieces = [f"{microbatch.keys[0]} ({end} tokens, {sum(trained)} trained): "]
    kinds = [(is_trained, token == image_token_id) for is_trained, token in zip(trained, ids, strict=True)]
    for (is_trained, is_image), run in itertools.groupby(range(end), kinds.__getitem__):
        places = list(run)
        text = "".join(texts[place] for place in places)
        if is_image:
            text = f"{tokenizer.decode([image_token_id])}×{len(places)}"
        pieces.append(f"⟦{visible(text)}⟧" if is_trained else visible(text))
    return "".join(pieces)


def to_json(view: View) -> dict[str, Any]:
    """A view as JSON values; pixels are left out."""
    return {
        "key": view.key,
        "shard": view.shard,
        "state": view.state,
        "reason": view.reason,
        "turns": [dataclasses.asdict(turn) for turn in view.turns],
        "written": view.written,
        "text": "".join(piece.text for piece in view.pieces),
        "pieces": [
            {
                "text": piece.text,
                "tokens": len(piece.tokens),
                "trained": piece.trained,
                "image": piece.picture,
            }
            for piece in view.pieces
        ],
        "images": [
            {
                "size": [picture.width, picture.height],
                "tokens": picture.tokens,
                "grid": list(picture.grid),
                "fed": [list(tile.shape) for tile in picture.tiles],
            }
            for picture in view.pictures
        ],
        "tokens": view.num_tokens,
        "trained_tokens": view.num_trained,
        "image_tokens": view.num_image_tokens,
        "truncated": view.sample is not None and view.sample.truncated,
        "input_ids": view.sample.input_ids if view.sample else [],
        "labels": view.sample.labels if view.sample else [],
    }


def terminal(view: View, colored: bool, with_ids: bool = False) -> str:
    """A view as text: trained tokens in green, or between ``⟦`` and ``⟧`` where there are no colours."""

    def paint(text: str, code: str) -> str:
        text = visible(text)
        # Line by line: a pager or a narrow terminal forgets colours at a line's end.
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if colored else text

    title = paint(view.key, "1") + (f" of {view.shard}" if view.shard else "")
    if view.sample is None:
        lines = [f"{title}: {paint(f'{view.state}: {view.reason}', '31')}"]
        lines += [paint(f"{turn.role}: {turn.text}", "2") for turn in view.turns]
        return "\n".join([*lines, *([paint(view.written, "2")] if view.written else [])])
    lines = [f"{title}: {summary(view)}"]
    text: list[str] = []
    for piece in view.pieces:
        if piece.picture is not None:
            text.append(paint(f"[{picture_text(piece.picture, view.pictures[piece.picture])}]", "35"))
        elif piece.trained:
            text.append(paint(piece.text, "30;42") if colored else f"⟦{visible(piece.text)}⟧")
        else:
            text.append(visible(piece.text))
    lines.append("".join(text))
    if with_ids:
        lines += _token_lines(view)
    return "\n".join(lines)


def visible(text: str) -> str:
    """Text with pictures of its control characters, which a terminal would obey; newlines and tabs stay."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate({**pictures, 127: 0x2421})


def summary(view: View) -> str:
    """How many tokens a view has, and of which kinds."""
    images = len(view.pictures)
    parts = [f"{view.num_tokens} tokens", f"{view.num_trained} trained"]
    if images:
        parts.append(f"{view.num_image_tokens} of {count_text(images, 'image')}")
    if view.sample is not None and view.sample.truncated:
        parts.append("cut off at --seq-length")
    return ", ".join(parts)


def picture_text(number: int, picture: Picture) -> str:
    """What became of an image, in a few words."""
    height, width = picture.tiles[0].shape[1:]
    rows, columns = picture.grid
    tiles = f" and {rows}×{columns} tiles" if rows * columns else ""
    return (
        f"image {number + 1}: {picture.tokens} tokens, "
        f"{picture.width}×{picture.height} → {width}×{height}{tiles}"
    )


def _token_lines(view: View) -> Iterator[str]:
    """Position, id and text of every token, trained ones with a star; an image's in one line."""
    position = 0
    for piece in view.pieces:
        end = position + len(piece.tokens)
        if piece.picture is not None:
            yield f"  {f'{position}-{end - 1}':>11} {piece.tokens[0].id:>8}   image {piece.picture + 1}"
        else:
            for offset, token in enumerate(piece.tokens):
                star, text = "*" if token.trained else " ", json.dumps(token.text, ensure_ascii=False)
                yield f"  {position + offset:>11} {token.id:>8} {star} {text}"
        position = end


def _pieces(processing: Processing, sample: Sample, pictures: Sequence[Picture]) -> Iterator[Piece]:
    ids = sample.input_ids
    trained = [False] + [label != IGNORE_INDEX for label in sample.labels[:-1]]
    texts = _texts(ids, processing.tokenizer, processing.image_token_id)
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


def _texts(ids: Sequence[int], tokenizer: Any, image_token_id: int) -> list[str]:
    """What each token adds to the text before it; a character of several tokens is its last one's."""

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


def _chosen(mixture: Mixture, choice: PreviewSection, seed: int) -> Iterator[tuple[int, RawSample]]:
    """Samples, of each dataset as many as the flags say, and the dataset's number."""
    for key in choice.keys:
        found = [
            (number, raw) for number, source in enumerate(mixture.sources) for raw in _named(source, key)
        ]
        if not found:
            raise ValueError(f"--data-path {mixture.path}: there is no sample {key}")
        yield from found
    for number, source in enumerate(mixture.sources) if not choice.keys else ():
        numbers = list(range(source.start, source.end))
        if choice.shuffle:
            random.Random(seed).shuffle(numbers)
        chosen = numbers[choice.skip : choice.skip + choice.samples]
        if not chosen:
            where = f" of {source.name}" if source.name else ""
            raise ValueError(
                f"--skip {choice.skip}: the {choice.split} split{where} has {source.num_samples} samples"
            )
        for raw in source.dataset.pick(chosen):
            yield number, raw


def _named(source: Source, key: str) -> Sequence[RawSample]:
    try:
        return list(source.dataset.pick([key]))
    except ValueError:
        return ()


def _model(config: RunConfig) -> tuple[ModelConfig, str | None]:
    """The model that is trained, and the Hugging Face files that its checkpoint carries."""
    if config.model.megatron_load_dir is not None:
        folder = checkpoint_layers(config.model.megatron_load_dir, config.model.base, "--megatron-load-dir")[
            -1
        ]
        return read_model(folder), str(folder / HF_FOLDER)
    if config.model.tokenizer_load_dir is None:
        raise ValueError(
            "--tokenizer-load-dir is missing: the Hugging Face folder of the model, or a checkpoint"
        )
    return ModelConfig.from_hf_dir(config.model.tokenizer_load_dir, "--tokenizer-load-dir"), None


def _about(config: RunConfig, processings: Sequence[Processing], views: Sequence[View]) -> dict[str, str]:
    """What was looked at, and what came of it; one line each."""
    states = Counter(view.state for view in views)
    used = [view for view in views if view.sample is not None]
    cut = sum(view.sample is not None and view.sample.truncated for view in used)
    tokens, trained = sum(view.num_tokens for view in used), sum(view.num_trained for view in used)
    images = sum(view.num_image_tokens for view in used)
    counts = [f"{states['used']} used" + (f" ({cut} cut off)" if cut else "")]
    counts += [f"{states[name]} {name}" for name in ("dropped", "corrupt") if states[name]]
    return {
        "samples": f"{len(views)}: {', '.join(counts)}",
        "tokens": f"{tokens:,}: {trained:,} trained, {images:,} of images",
        "template": ", ".join(dict.fromkeys(each.template.name for each in processings)),
        "tokenizer": processings[0].tokenizer.name_or_path,
        "data": str(config.data.data_path),
        "images": str(processings[0].images.rule),
        "--seq-length": f"{config.data.seq_length}",
    }
