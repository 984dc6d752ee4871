"""The way from the features of tiles to those of images, worked out on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vlm.architecture.connectors.anyres import Tiling
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import to_device


class FeatureIndex(NamedTuple):
    """The index by which the features of a batch's tiles become those of its images.

    First come the tiles' features that are kept as they are, then those that are interpolated between four of
    them, then a newline for each row.
    """

    kept: Tensor  # int64 [kept]: which of the tiles' features
    corners: Tensor  # int64 [4, interpolated]: likewise
    weights: Tensor  # float32 [4, interpolated]
    newlines: int
    places: Tensor  # int64 [features]: among the batch's image tokens, on the CPU

    def gather(self, features: Tensor, newline: Tensor) -> Tensor:
        """Return the images' features, ``[features, hidden]``, in the order of ``places``.

        Args:
            features: of the tiles, ``[tiles, ModelConfig.tile_tokens, hidden]``.
            newline: ``[hidden]``.
        """
        features = features.flatten(0, 1)
        parts = [features[self.kept]]
        if self.corners.numel():
            weighted = (
                features[corner] * weight.unsqueeze(1)
                for corner, weight in zip(self.corners, self.weights, strict=True)
            )
            parts.append(sum(weighted).to(features.dtype))
        parts.append(newline.to(features.dtype).expand(self.newlines, -1))
        return torch.cat(parts)

    def to(self, device: torch.device) -> FeatureIndex:
        """Return the index with the tensors of :meth:`gather` on a device."""
        kept, corners, weights = (to_device(x, device) for x in (self.kept, self.corners, self.weights))
        return self._replace(kept=kept, corners=corners, weights=weights)


def index_features(image_sizes: Tensor, model: ModelConfig) -> FeatureIndex | None:
    """Return where the features of a batch's images come from; None where an image is one tile, as it is.

    Equals ``pack_image_features`` of transformers' LLaVA-NeXT and LLaVA-OneVision, whose bilinear
    interpolation is ``F.interpolate``'s.

    Args:
        image_sizes: ``[images, 2]`` on the CPU, as ``Microbatch`` has them.
    """
    if model.anyres is None:
        return None
    kept, corners, weights = [], [torch.empty(4, 0, dtype=torch.int64)], [torch.empty(4, 0)]
    kept_places, interpolated_places, newline_places = [], [], []
    feature = place = 0  # the image's first
    for tiling in (model.tiling((height, width)) for height, width in image_sizes.tolist()):
        whole = torch.arange(model.tile_tokens)
        kept.append(feature + whole)
        kept_places.append(place + whole)
        grid = feature + _grid(tiling)
        rows, columns = tiling.resized
        places = place + model.tile_tokens + torch.arange(rows * (columns + 1)).view(rows, columns + 1)
        newline_places.append(places[:, -1])
        if tiling.resized == tiling.kept:
            kept.append(grid.flatten())
            kept_places.append(places[:, :-1].flatten())
        else:
            at, weight = _interpolation(tiling)
            corners.append(grid.flatten()[at])
            weights.append(weight)
            interpolated_places.append(places[:, :-1].flatten())
        feature += tiling.tiles * model.tile_tokens
        place += tiling.tokens
    newlines = sum(map(len, newline_places))
    empty = torch.empty(0, dtype=torch.int64)
    return FeatureIndex(
        torch.cat([empty, *kept]),
        torch.cat(corners, dim=1),
        torch.cat(weights, dim=1),
        newlines,
        torch.cat([empty, *kept_places, *interpolated_places, *newline_places]),
    )


def _grid(tiling: Tiling) -> Tensor:
    """Return which of an image's features are not padding, as the tiles lie: int64 ``[rows, columns]``."""
    (tile_rows, tile_columns), side = tiling.grid, tiling.side
    if not tile_rows:
        return torch.empty(tiling.kept, dtype=torch.int64)
    tiles = side**2 + torch.arange(tile_rows * tile_columns * side**2)  # after the whole image's tile
    by_rows = tiles.view(tile_rows, tile_columns, side, side).transpose(1, 2)
    grid = by_rows.reshape(tile_rows * side, tile_columns * side)
    (top, left), (rows, columns) = tiling.start, tiling.kept
    return grid[top : top + rows, left : left + columns]


def _interpolation(tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return the four features around each interpolated one, and their shares.

    Returns:
        int64 and float32 ``[4, rows * columns]``, the first as indices into the flattened grid that is kept.
    """
    (upper, lower, low), (left, right, rest) = map(_axis, tiling.kept, tiling.resized)
    pairs = [(upper, left), (upper, right), (lower, left), (lower, right)]
    at = [(row.unsqueeze(1) * tiling.kept[1] + column).flatten() for row, column in pairs]
    shares = [(1 - low, 1 - rest), (1 - low, rest), (low, 1 - rest), (low, rest)]
    return torch.stack(at), torch.stack([torch.outer(*pair).flatten() for pair in shares])


def _axis(size: int, resized: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the neighbours of each new point along one side, and the share of the second."""
    at = ((torch.arange(resized) + 0.5) * (size / resized) - 0.5).clamp(min=0)
    first = at.long()
    return first, (first + 1).clamp(max=size - 1), at - first
