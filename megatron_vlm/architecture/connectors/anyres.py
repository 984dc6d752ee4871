"""Images cut into tiles at their own aspect ratio, as LLaVA-1.6 and LLaVA-OneVision do.

An image is resized, padded to one of some resolutions, and cut into tiles of the tower's size; a small copy
of the whole comes first. The tiles' features, put together as the tiles lay, lose what is padding and get a
trained vector, ``image_newline``, at the end of each row.

Source: transformers ``modeling_llava_next``, ``modeling_llava_onevision`` and their image processors. Sizes
are ``(height, width)``, as there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

ASPECT_RATIOS = ("square", "pad", "anyres")  # what may become of a dataset's images, by LLaVA's names
NO_TILES = "image_aspect_ratio anyres: the model cuts no images into tiles; write square or pad"

Size = Tuple[int, int]
UNCUT: Size = (0, 0)  # stands for the size of an image that is one tile, whatever its own size


@dataclass(frozen=True)
class AnyRes:
    """The way in which a model cuts images.

    Attributes:
        grid_pinpoints: resolutions that an image may be padded to, in pixels; multiples of a tile's side.
        max_tiles: an image whose features are more than those of 1.21 times this many tiles gets them
            interpolated down to those of this many (``anyres_max_9``); None: all are kept.
        several_uncut: where a sample has several images, each is one tile.
    """

    grid_pinpoints: Tuple[Size, ...]
    max_tiles: Optional[int] = None
    several_uncut: bool = False

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> AnyRes:
        """Build the value from plain JSON values."""
        return cls(**{**values, "grid_pinpoints": tuple(map(tuple, values["grid_pinpoints"]))})


def read_tiles(config: Mapping[str, Any], tile_size: int) -> AnyRes:
    """Return how a model cuts images, all features of all tiles kept.

    Args:
        config: a ``config.json`` with its family's defaults filled in.
        tile_size: pixels along a tile.

    Raises:
        ValueError: ``image_grid_pinpoints`` are no sizes, or not of whole tiles.
    """
    pinpoints = config["image_grid_pinpoints"]
    sides = [side for size in pinpoints for side in size]
    if not sides or len(sides) != 2 * len(pinpoints) or any(n < tile_size or n % tile_size for n in sides):
        raise ValueError(
            f"config.json: image_grid_pinpoints is {pinpoints}; supported: multiples of the {tile_size} "
            "pixels of a tile"
        )
    return AnyRes(tuple((int(height), int(width)) for height, width in pinpoints))


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image, and what becomes of their features.

    Attributes:
        side: patches along a tile.
        grid: rows and columns of tiles beside the one of the whole image.
        start: row and column of patches in the whole grid where the image begins; before it is padding.
        kept: rows and columns of patches from there.
        resized: rows and columns to which these are interpolated; as ``kept`` where they aren't.
    """

    side: int
    grid: Size
    start: Size
    kept: Size
    resized: Size

    @property
    def tiles(self) -> int:
        """The number of tiles, the whole image's included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """The language model's tokens: those of the whole image's tile, then row by row, each with a
        newline."""
        rows, columns = self.resized
        return self.side**2 + rows * (columns + 1)


def tile(size: Size, anyres: AnyRes, tile_size: int, side: int) -> Tiling:
    """Return how an image is cut.

    Args:
        size: of the image in pixels, or :data:`UNCUT`.
        tile_size: pixels along a tile.
        side: patches along a tile.
    """
    if size == UNCUT:
        return Tiling(side, (0, 0), (0, 0), (1, 0), (1, 0))  # a row of nothing, and its newline
    height, width = best_resolution(size, anyres.grid_pinpoints)
    grid = height // tile_size, width // tile_size
    rows, columns = grid[0] * side, grid[1] * side
    top = left = 0
    if size[1] / size[0] > columns / rows:
        top = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
    else:
        left = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    kept = rows - 2 * top, columns - 2 * left
    return Tiling(side, grid, (top, left), kept, _resized(kept, anyres.max_tiles, side))


def best_resolution(size: Size, resolutions: Tuple[Size, ...]) -> Size:
    """Return the resolution that shows most of an image, and of equals the one with the least padding.

    The first of those that tie, as transformers ``select_best_resolution`` has it; LLaVA's own code compares
    in another order of width and height.
    """
    height, width = size
    best, most, least_wasted = resolutions[0], 0, math.inf
    for resolution in resolutions:
        scale = min(resolution[1] / width, resolution[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = resolution[0] * resolution[1] - shown
        if shown > most or (shown == most and wasted < least_wasted):
            best, most, least_wasted = resolution, shown, wasted
    return best


@functools.cache
def extremes(anyres: AnyRes, tile_size: int, side: int) -> Tuple[int, int, int]:
    """Return the fewest and the most tokens, and the most tiles, that an image may come to."""
    possible = list(_tilings(anyres, tile_size, side))
    tokens = [tiling.tokens for tiling in possible]
    return min(tokens), max(tokens), max(tiling.tiles for tiling in possible)


def _tilings(anyres: AnyRes, tile_size: int, side: int) -> Iterator[Tiling]:
    """Yield every tiling that an image of any size may have, and perhaps some that none has."""
    if anyres.several_uncut:
        yield tile(UNCUT, anyres, tile_size, side)
    for height, width in anyres.grid_pinpoints:
        grid = height // tile_size, width // tile_size
        rows, columns = grid[0] * side, grid[1] * side
        starts = [(top, 0) for top in range(rows // 2 + 1)] + [(0, left) for left in range(columns // 2 + 1)]
        for start in starts:
            kept = rows - 2 * start[0], columns - 2 * start[1]
            yield Tiling(side, grid, start, kept, _resized(kept, anyres.max_tiles, side))


def _resized(kept: Size, max_tiles: Optional[int], side: int) -> Size:
    if max_tiles is None:
        return kept
    ratio = math.sqrt(kept[0] * kept[1] / (max_tiles * side**2))
    return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept
