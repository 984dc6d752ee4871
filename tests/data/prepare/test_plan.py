"""Duplicates, split sizes, order and shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.prepare.histogram import Histogram, bin_label
from megatron_vlm.data.prepare.plan import ROW, duplicates, plan_shards, sample_rows, split_counts
from megatron_vlm.data.prepare.rejections import Places, RejectionLog, Rejections, read_logs
from megatron_vlm.data.prepare.stage import INDEX


def some_rows(count: int, size: int = 100) -> np.ndarray:
    rows = np.zeros(count, dtype=ROW)
    rows["ordinal"], rows["bytes"] = np.arange(count), size
    return rows


@pytest.mark.parametrize(
    "samples, shares, counts",
    [
        (1000, (0.98, 0.01, 0.01), [980, 10, 10]),
        (1000, (9, 1, 0), [900, 100, 0]),
        (10, (1, 1, 1), [4, 3, 3]),
        (7, (1,), [7]),
        (5, (0.98, 0.01, 0.01), [3, 1, 1]),  # a share is at least a sample
        (2, (0.98, 0.02), [1, 1]),
    ],
)
def test_split_counts(samples: int, shares: tuple[float, ...], counts: list[int]) -> None:
    assert split_counts(samples, shares) == counts


@given(st.integers(3, 10**7), st.lists(st.floats(0.001, 10), min_size=1, max_size=3))
def test_split_counts_are_exact(samples: int, shares: list[float]) -> None:
    counts = split_counts(samples, shares)
    assert sum(counts) == samples and min(counts) >= 1
    assert all(abs(c - samples * s / sum(shares)) < 3 for c, s in zip(counts, shares, strict=True))


def test_too_few_samples_for_a_split() -> None:
    with pytest.raises(ValueError, match="2 samples are too few for 3 splits; try --split 1"):
        split_counts(2, (0.98, 0.01, 0.01))


def test_shards_hold_every_sample_once_within_their_bounds() -> None:
    plans = plan_shards(some_rows(1000), (0.8, 0.1, 0.1), 0, 300, 10**9)
    assert [(plan.name, len(plan.rows)) for plan in plans] == [
        ("train-000000.tar", 300),
        ("train-000001.tar", 300),
        ("train-000002.tar", 200),
        ("val-000000.tar", 100),
        ("test-000000.tar", 100),
    ]
    order = np.concatenate([plan.rows["ordinal"] for plan in plans])
    assert sorted(order) == list(range(1000))
    # Shuffled: neighbours are as far apart as those of a random order, a third of the whole.
    assert 250 < np.abs(np.diff(order)).mean() < 420
    again = plan_shards(some_rows(1000), (0.8, 0.1, 0.1), 0, 300, 10**9)
    assert all((a.rows == b.rows).all() for a, b in zip(plans, again, strict=True))
    other = plan_shards(some_rows(1000), (0.8, 0.1, 0.1), 1, 300, 10**9)
    assert (other[0].rows != plans[0].rows).any()


def test_shards_are_bounded_by_size() -> None:
    plans = plan_shards(some_rows(10, size=1_000_000), (1,), 0, 5000, 3_500_000)
    assert [len(plan.rows) for plan in plans] == [3, 3, 3, 1]
    assert [len(plan.rows) for plan in plan_shards(some_rows(3, size=10), (1,), 0, 5000, 1)] == [1, 1, 1]


def test_duplicates() -> None:
    ids = np.array([5, 7, 5, 0, 5, 0, 7], dtype=np.uint64)
    contents = np.array([1, 2, 1, 3, 9, 3, 2], dtype=np.uint64)
    for kind, expected, same_id in (
        ("content", [0, 0, 1, 0, 0, 0, 1], 1),
        ("id", [0, 0, 1, 0, 1, 0, 1], 0),
        ("keep", [0] * 7, 3),
    ):
        repeats, left = duplicates(ids, contents, kind)
        assert (repeats.astype(int).tolist(), left) == (expected, same_id), kind
    assert duplicates(np.array([], np.uint64), np.array([], np.uint64), "content")[1] == 0


def test_rows_are_numbered_through() -> None:
    first, second = np.zeros(2, dtype=INDEX), np.zeros(1, dtype=INDEX)
    first["position"], second["position"] = [2, 5], [1]
    rows = sample_rows([first, second], [6, 3])
    assert rows["ordinal"].tolist() == [2, 5, 7]
    assert rows["unit"].tolist() == [0, 0, 1]


def test_losses_are_named_by_file_and_position(tmp_path: Path) -> None:
    for name, places in (("0", (2, 9)), ("1", (1,)), ("2", (4,))):
        with RejectionLog(str(tmp_path / name)) as log:
            for place in places:
                log.add("reason", place, "half \ud83d", "detail \udc80" if place == 1 else "")
    places_of = Places(["a.json", "a.json", "b.json"], [0, 10, 30, 40])
    logs = [(str(tmp_path / name), base) for name, base in (("0", 0), ("1", 10), ("2", 30))]
    rejections = Rejections()
    for loss in read_logs(logs, places_of):
        json.dumps(loss, ensure_ascii=False).encode()
        rejections.add(loss)
    assert rejections.state() == {
        "reason": {
            "count": 4,
            "examples": [
                "a.json:2 (id half ?)",
                "a.json:9 (id half ?)",
                "a.json:11 (id half ?): detail ?",
                "b.json:4 (id half ?)",
            ],
        }
    }


@given(st.lists(st.integers(0, 5000), min_size=1), st.integers(0, 50))
def test_histograms_merge(values: list[int], cut: int) -> None:
    parts = Histogram(), Histogram()
    for i, value in enumerate(values):
        parts[i >= cut].add(value)
    merged = Histogram()
    for part in parts:
        merged.merge(Histogram(part.state()))
    state = merged.state()
    assert (state["count"], state["total"]) == (len(values), sum(values))
    assert (state["min"], state["max"]) == (min(values), max(values))
    for top, count in state["bins"].items():
        low, _, high = bin_label(int(top)).partition("–")
        assert count == sum(int(low) <= value <= int(high or low) for value in values)
