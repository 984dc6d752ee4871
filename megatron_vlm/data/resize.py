"""PIL's ``Image.resize``, bit for bit, in less time.

Pillow resizes with weights of 22 binary digits: first along the width, then, from pixels rounded to uint8,
along the height (``src/libImaging/Resample.c``). torch sums weighted rows with the machine's vector
instructions (``embedding_bag``), in float32. The weights are split into two parts of 11 digits, whose sums
are whole numbers that float32 holds: so they are exact, whatever the machine and the order of summation.
"""

from __future__ import annotations

import functools
import math
from typing import Callable, Dict, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megatron_vlm.config.anyres import Size

_BITS = 22  # of Pillow's weights, behind the point
_LOW = 11  # of these, in the second part
# Both parts' sums have to stay below 2**24, and that of the second, with what is left of the first, too.
_MOST = 2**23

Box = Tuple[int, int, int, int]


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


# Reach and shape. Of the others Lanczos needs a sine, which C and numpy may round differently.
_FILTERS: Dict[int, Tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    Image.Resampling.BILINEAR: (1.0, _bilinear),
    Image.Resampling.BICUBIC: (2.0, _bicubic),
}


def resized(image: Image.Image, size: Size, resample: int, box: Box | None = None) -> Tensor | None:
    """A part of ``image.resize(...)``.

    Args:
        image: of mode RGB.
        size: height and width.
        resample: one of PIL's filters.
        box: top, left, bottom and right of the part of the new image; None for all.

    Returns:
        uint8 ``[3, bottom - top, right - left]``; None for what is left to PIL: other filters and modes, an
        image of which one side stays, one that Pillow resizes in another order, and one that is made so
        small that the sums are not exact.
    """
    (height, width), (new_height, new_width) = (image.height, image.width), size
    if image.mode != "RGB" or resample not in _FILTERS or new_height == height or new_width == width:
        return None
    # Pillow up to 12 begins with the height of an image a hundred times as high as wide, 13 of one whose
    # height shrinks by over twice as many pixels.
    if new_height < height and (height > 100 * width or height - new_height > 2 * (width - new_width)):
        return None
    top, left, bottom, right = box or (0, 0, *size)
    across = _weights(width, new_width, left, right, resample)
    down = _weights(height, new_height, top, bottom, resample, blocks=3)
    if across is None or down is None:
        return None
    # What is summed has to lie in rows: first one for each x, with the values of all y of the three colours,
    table = np.empty((width, 3, height), dtype=np.float32)
    for colour, band in enumerate(image.transpose(Image.Transpose.TRANSPOSE).split()):
        table[:, colour] = np.frombuffer(band.tobytes(), dtype=np.uint8).reshape(width, height)
    narrow = _sums(table.reshape(width, 3 * height), across)
    # then one for each colour and y.
    rows = torch.from_numpy(narrow).t().contiguous().numpy().astype(np.float32)
    return torch.from_numpy(_sums(rows, down)).view(3, bottom - top, right - left)


def _sums(table: np.ndarray, weights: Tuple[Tensor, Tensor]) -> np.ndarray:
    """Weighted sums of rows, rounded and clipped as Pillow does.

    Args:
        table: float32 ``[n, values]``, whole numbers.
        weights: of :func:`_weights`.

    Returns:
        uint8 ``[sums, values]``.
    """
    places, parts = weights
    sums = F.embedding_bag(places, torch.from_numpy(table), per_sample_weights=parts, mode="sum")
    high, low = np.split(sums.numpy(), 2)
    high += 0.5
    whole = np.floor(high)
    high -= whole
    high += low
    whole += np.floor(high, out=high)
    return np.clip(whole, 0, 255, out=whole).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _weights(
    size: int, new_size: int, start: int, end: int, resample: int, blocks: int = 1
) -> Tuple[Tensor, Tensor] | None:
    """Which rows are summed for new rows ``start`` to ``end``, and their weights, in two parts.

    Args:
        blocks: of ``size`` rows; each makes new rows of its own.

    Returns:
        int64 and float32 ``[2 * blocks * (end - start), rows]``: for the sums of the first parts, then of
        the second. None where float32 may not hold a sum.
    """
    reach, shape = _FILTERS[resample]
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(start, end) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)[:, None]
    last = np.minimum((centers + support + 0.5).astype(np.int64), size)[:, None]
    places = first + np.arange(math.ceil(support) * 2 + 1)
    values = shape((places - centers[:, None] + 0.5) * (1.0 / stretch))
    values[places >= last] = 0.0
    # One after the other, as Pillow adds them: numpy's own sum goes by pairs.
    values /= np.cumsum(values, axis=1)[:, -1:]
    fixed = np.trunc(values * (1 << _BITS) + np.copysign(0.5, values)).astype(np.int64)
    high = (fixed + (1 << (_LOW - 1))) >> _LOW
    low = fixed - (high << _LOW)
    if 255 * max(np.abs(part).sum(axis=1).max() for part in (high, low)) > _MOST:
        return None
    used = int(np.flatnonzero(fixed.any(axis=0))[-1]) + 1
    places = np.minimum(places, size - 1)[:, :used] + size * np.arange(blocks)[:, None, None]
    parts = [high / (1 << (_BITS - _LOW)), low / (1 << _BITS)]
    weights = np.repeat(np.stack(parts)[:, None, :, :used], blocks, axis=1).astype(np.float32)
    return torch.from_numpy(np.stack([places, places]).reshape(-1, used)), torch.from_numpy(weights).view(
        -1, used
    )
