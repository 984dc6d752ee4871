"""Views and microbatches as text, for a terminal and for a run's log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch
from megatron_vlm.data.preview.views import Picture, View, token_texts
from megatron_vlm.system.units import count_text


def terminal(view: View, colored: bool, with_ids: bool = False) -> str:
    """Return a view as text: trained tokens in green, or between ``⟦`` and ``⟧`` where there are no
    colours."""

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


def describe(microbatch: Microbatch, tokenizer: Any, image_token_id: int) -> str:
    """Return the first sample of a loader's micro batch as text, for the log of a run.

    Trained tokens stand between ``⟦`` and ``⟧``; a run of image tokens is shown once, with its count.
    """
    end = int(microbatch.lengths[0])
    ids = microbatch.input_ids[0, :end].tolist()
    trained = [False] + (microbatch.labels[0, : end - 1] != IGNORE_INDEX).tolist()
    texts = token_texts(ids, tokenizer, image_token_id)
    pieces = [f"{microbatch.keys[0]} ({end} tokens, {sum(trained)} trained): "]
    kinds = [(is_trained, token == image_token_id) for is_trained, token in zip(trained, ids, strict=True)]
    for (is_trained, is_image), run in itertools.groupby(range(end), kinds.__getitem__):
        places = list(run)
        text = "".join(texts[place] for place in places)
        if is_image:
            text = f"{tokenizer.decode([image_token_id])}×{len(places)}"
        pieces.append(f"⟦{visible(text)}⟧" if is_trained else visible(text))
    return "".join(pieces)


def summary(view: View) -> str:
    """Return how many tokens a view has, and of which kinds, in a few words."""
    images = len(view.pictures)
    parts = [f"{view.num_tokens} tokens", f"{view.num_trained} trained"]
    if images:
        parts.append(f"{view.num_image_tokens} of {count_text(images, 'image')}")
    if view.sample is not None and view.sample.truncated:
        parts.append("cut off at --seq-length")
    return ", ".join(parts)


def picture_text(number: int, picture: Picture) -> str:
    """Return what became of an image, in a few words."""
    height, width = picture.tiles[0].shape[1:]
    rows, columns = picture.grid
    tiles = f" and {rows}×{columns} tiles" if rows * columns else ""
    return (
        f"image {number + 1}: {picture.tokens} tokens, "
        f"{picture.width}×{picture.height} → {width}×{height}{tiles}"
    )


def visible(text: str) -> str:
    """Return text with pictures of its control characters, which a terminal would obey; newlines and tabs
    stay."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate({**pictures, 127: 0x2421})


def _token_lines(view: View) -> Iterator[str]:
    """Yield position, id and text of every token, trained ones with a star; an image's tokens in one line."""
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
