"""Views of samples as one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image
from torch import Tensor

from megatron_vlm.data.preview.text import picture_text, summary, visible
from megatron_vlm.data.preview.views import Picture, Piece, View

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2329; --soft: #68737d; --line: #dfe3e7; --page: #f5f6f8; --card: #fff;
  --trained: #c9efd3; --trained-ink: #0c4a22; --image: #e6ddfb; --image-ink: #47288f; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7ea; --soft: #97a1ab; --line: #343a41; --page: #15181b; --card: #1e2226;
    --trained: #1d4a2c; --trained-ink: #bff3cf; --image: #372a5c; --image-ink: #d9c9ff; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, "Hiragino Sans", "Noto Sans CJK JP", "Noto Sans JP", sans-serif;
}
h1 { font-size: 1.35rem; margin: 0 0 .75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; gap: .3rem 1.2rem; flex-wrap: wrap; margin: 1rem 0 1.5rem; color: var(--soft); }
.legend mark { padding: 0 .4em; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 1.25rem; }
article > header { display: flex; gap: .75rem; align-items: baseline; flex-wrap: wrap; padding: .7rem 1rem; }
h2 { font: 600 1rem ui-monospace, Menlo, Consolas, monospace; margin: 0; }
.of, .what { color: var(--soft); font-size: .88rem; }
.what { margin-left: auto; }
.bad .what { color: var(--bad); font-weight: 600; }
.bar { display: flex; height: 5px; background: var(--line); }
.bar .image { background: #8f6fe8; }
.bar .prompt { background: #9aa5b1; }
.bar .trained { background: #35a55a; }
.body { display: flex; gap: 1.1rem; padding: 1rem; flex-wrap: wrap; }
.pictures { display: flex; flex-direction: column; gap: .9rem; width: 17rem; max-width: 100%; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .8rem; }
figure img { display: block; width: 100%; border-radius: 6px; }
.tiles { display: grid; gap: 3px; margin-top: 3px; }
.tiles img { border-radius: 3px; }
.text {
  flex: 1 1 24rem; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13.5px/1.75 ui-monospace, Menlo, Consolas, "Noto Sans Mono CJK JP", "Noto Sans CJK JP", monospace;
}
mark { background: var(--trained); color: var(--trained-ink); border-radius: 3px; padding: .12em 0; }
.text mark { -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark.image { background: var(--image); color: var(--image-ink); padding: .12em .5em; border-radius: 9px; }
.text span:hover { outline: 1px solid var(--soft); border-radius: 2px; }
.nl { color: var(--soft); opacity: .7; }
.turn { margin: 0 0 .6rem; }
.turn b { color: var(--soft); }
details { padding: 0 1rem .8rem; color: var(--soft); font-size: .88rem; }
details div { font: 12px/1.6 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""


def page(views: Sequence[View], about: Mapping[str, str], seq_length: int, with_ids: bool) -> str:
    """Return the page.

    Args:
        about: lines for its head, name and value.
        seq_length: the whole width of a sample's bar.
        with_ids: list each sample's token ids too; a pointer on a token always shows its own.
    """
    head = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in about.items())
    samples = "\n".join(_sample(view, seq_length, with_ids) for view in views)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the model sees</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>What the model sees</h1><dl>{head}</dl>\n"
        '<div class="legend"><span><mark>trained</mark> carries loss</span>'
        '<span><mark class="image">image</mark> placeholders of one image</span>'
        "<span>all other text is read only</span><span>bar: images, other text and trained text of "
        f"{seq_length:,} tokens</span></div>\n{samples}\n</body></html>\n"
    )


def _sample(view: View, seq_length: int, with_ids: bool) -> str:
    title = f"<h2>{_text(view.key)}</h2>" + (
        f'<span class="of">{_text(view.shard)}</span>' if view.shard else ""
    )
    if view.sample is None:
        what = f'<span class="what">{view.state}: {_text(view.reason)}</span>'
        turns = "".join(
            f'<div class="turn"><b>{_text(turn.role)}</b> {_text(turn.text)}</div>' for turn in view.turns
        )
        said = turns or _text(view.written)
        body = f'<div class="body"><div class="text">{said}</div></div>' if said else ""
        return f'<article class="bad"><header>{title}{what}</header>{body}</article>'
    pictures = "".join(_figure(number, picture) for number, picture in enumerate(view.pictures))
    text = "".join(_piece(piece, view.pictures) for piece in view.pieces)
    ids = ""
    if with_ids:
        numbers = " ".join(map(_ids, view.pieces))
        ids = f"<details><summary>{view.num_tokens} token ids</summary><div>{numbers}</div></details>"
    return (
        f'<article><header>{title}<span class="what">{_text(summary(view))}</span></header>'
        f"{_bar(view, seq_length)}"
        f'<div class="body">{f"<div class=pictures>{pictures}</div>" if pictures else ""}'
        f'<div class="text">{text}</div></div>{ids}</article>'
    )


def _bar(view: View, seq_length: int) -> str:
    prompt = view.num_tokens - view.num_image_tokens - view.num_trained
    parts = (("image", view.num_image_tokens), ("prompt", prompt), ("trained", view.num_trained))
    width = max(seq_length, 1) / 100
    inner = "".join(f'<i class="{name}" style="width:{count / width:.2f}%"></i>' for name, count in parts)
    return f'<div class="bar">{inner}</div>'


def _figure(number: int, picture: Picture) -> str:
    whole, *cut = (f'<img alt="" src="{_data_uri(tile)}">' for tile in picture.tiles)
    columns = f"grid-template-columns: repeat({picture.grid[1]}, 1fr)"
    grid = f'<div class="tiles" style="{columns}">{"".join(cut)}</div>' if cut else ""
    return f"<figure>{whole}{grid}<figcaption>{picture_text(number, picture)}</figcaption></figure>"


def _piece(piece: Piece, pictures: Sequence[Picture]) -> str:
    if piece.picture is not None:
        words = f"image {piece.picture + 1} · {pictures[piece.picture].tokens} tokens"
        return f'<mark class="image">{words}</mark>'
    tokens = "".join(_tokens(piece))
    return f"<mark>{tokens}</mark>" if piece.trained else tokens


def _ids(piece: Piece) -> str:
    if piece.picture is not None:
        return f'<mark class="image">{piece.tokens[0].id} × {len(piece.tokens)}</mark>'
    ids = " ".join(str(token.id) for token in piece.tokens)
    return f"<mark>{ids}</mark>" if piece.trained else ids


def _tokens(piece: Piece) -> Iterator[str]:
    for token in piece.tokens:
        shown = _text(token.text).replace("\n", '<span class="nl">↵</span>\n')
        yield f'<span title="{token.id}">{shown}</span>'


def _data_uri(tile: Tensor) -> str:
    """Return uint8 ``[c, H, W]`` as a PNG file inside of a page."""
    buffer = io.BytesIO()
    pixels = tile.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(text: str) -> str:
    return html.escape(visible(text))
