"""The plan of a dataset, which sample goes where: duplicates, the split, the order, the shards.

Only the seed decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")
DUPLICATES = ("content", "id", "keep")
ROW = np.dtype([("unit", "<i4"), ("ordinal", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("bytes", "<i8")])
_OVERHEAD = 2048  # bytes of a sample's headers and padding in a tar, about


@dataclass(frozen=True)
class ShardPlan:
    """A shard's name, and its samples (:data:`ROW`) in order."""

    name: str
    rows: np.ndarray


def sample_rows(units: Sequence[np.ndarray], positions: Sequence[int]) -> np.ndarray:
    """Return all units' samples as :data:`ROW`, numbered through in the order of the input.

    Args:
        units: each unit's index, see :data:`~megatron_vlm.data.prepare.stage.INDEX`.
        positions: how many places each unit has, for those that became no sample count too.
    """
    rows = np.empty(sum(map(len, units)), dtype=ROW)
    at = base = 0
    for number, (index, count) in enumerate(zip(units, positions, strict=True)):
        part = rows[at : at + len(index)]
        part["unit"], part["ordinal"] = number, base + index["position"]
        for name in ("offset", "length", "bytes"):
            part[name] = index[name]
        at, base = at + len(index), base + count
    return rows


def duplicates(ids: np.ndarray, contents: np.ndarray, kind: str) -> tuple[np.ndarray, int]:
    """Return which samples repeat an earlier one.

    Args:
        ids: hashes, uint64; 0 has no id, and is never a duplicate.
        contents: hashes, uint64.
        kind: ``content`` for the same id and content, ``id`` for the same id, ``keep`` for none.

    Returns:
        a bool for each sample, and how many of those that stay share their id with an earlier one.
    """
    order = np.lexsort((contents, ids))  # stable: of equal ones, the first of the input comes first
    repeats, same_id = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    equal_ids = (ids[order][1:] == ids[order][:-1]) & (ids[order][1:] != 0)
    if kind == "content":
        repeats[order[1:]] = equal_ids & (contents[order][1:] == contents[order][:-1])
        same_id[order[1:]] = equal_ids
    else:
        by_id = np.argsort(ids, kind="stable")
        same_id[by_id[1:]] = (ids[by_id][1:] == ids[by_id][:-1]) & (ids[by_id][1:] != 0)
        repeats = same_id.copy() if kind == "id" else repeats
    return repeats, int((same_id & ~repeats).sum())


def split_counts(samples: int, shares: Sequence[float]) -> list[int]:
    """Return the number of samples of each split: nearest to ``shares``, and at least one of each that has a
    share.

    Raises:
        ValueError: there are fewer samples than splits.
    """
    wanted = [samples * share / sum(shares) for share in shares]
    counts = [int(want) for want in wanted]
    rest = sorted(range(len(shares)), key=lambda i: counts[i] - wanted[i])
    for i in rest[: samples - sum(counts)]:
        counts[i] += 1
    empty = [i for i, share in enumerate(shares) if share and not counts[i]]
    for i in empty:
        largest = max(range(len(shares)), key=counts.__getitem__)
        if counts[largest] < 2:
            raise ValueError(
                f"--split: {samples} samples are too few for {len(shares)} splits; try --split 1"
            )
        counts[largest] -= 1
        counts[i] += 1
    return counts


def plan_shards(
    rows: np.ndarray, shares: Sequence[float], seed: int, shard_samples: int, shard_bytes: int
) -> list[ShardPlan]:
    """Shuffle all samples, split them, and cut each split into shards.

    Args:
        rows: :data:`ROW`, in the order of the input.
        shares: of train, val and test; those left out are 0.
        shard_samples, shard_bytes: the most that a shard holds; one sample may be more than ``shard_bytes``.
    """
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    plans, start = [], 0
    for split, count in zip(SPLITS, split_counts(len(rows), shares), strict=False):
        part = shuffled[start : start + count]
        start += count
        sizes = np.cumsum(part["bytes"] + part["length"] + _OVERHEAD)
        first, number = 0, 0
        while first < count:
            before = sizes[first - 1] if first else 0
            fits = int(np.searchsorted(sizes, before + shard_bytes, side="right"))
            end = min(count, first + shard_samples, max(fits, first + 1))
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", part[first:end]))
            first, number = end, number + 1
    return plans
