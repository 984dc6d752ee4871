"""Which samples of a buffer come together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.plan.grouping import LengthGroups, Packing

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 5))
def test_sequences_hold_every_sample_once_within_the_capacity(lengths: list[int], number: int) -> None:
    sequences = Packing(len(lengths), 100).select(lengths, [False] * len(lengths), number)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert max(sums) <= 100
    assert sum(length <= 50 for length in sums) <= 1  # of two such, one would have been put into the other


def test_best_fit() -> None:
    """Worked by hand: 7, 6 and 5 begin sequences of ten; 4 goes to the 6, 3 to the 7, 2 to the 5."""
    sequences = Packing(6, 10).select([2, 3, 4, 5, 6, 7], [False] * 6, 0)
    assert sorted(sequences) == [[0, 3], [1, 5], [2, 4]]


def test_the_order_is_another_for_each_buffer_and_the_same_again() -> None:
    lengths = list(range(1, 60))
    orders = [Packing(59, 100).select(lengths, [True] * 59, number) for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens is longer than a sequence of 10"):
        Packing(2, 10).select([1, 11], [False, False], 0)


def test_micro_batches_by_length_and_modality() -> None:
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    has_image = [True, False, True, False, True, False, True, False]
    groups = LengthGroups(8, size=2, in_a_row=2)
    batches = groups.select(lengths, has_image, 0)
    # Two micro batches in a row are of one kind; within it, from short to long.
    in_words = [[lengths[index] for index in batch] for batch in batches]
    assert in_words in ([[1, 2], [3, 4], [6, 7], [8, 9]], [[6, 7], [8, 9], [1, 2], [3, 4]])
    orders = {str(groups.select(lengths, has_image, number)) for number in range(8)}
    assert len(orders) == 2


def test_buffers_are_within_a_workers_share() -> None:
    assert Packing(500, 100).buffer_within(80) == 80
    assert Packing(50, 100).buffer_within(80) == 50
    assert LengthGroups(500, size=4, in_a_row=3).buffer_within(80) == 72
    assert LengthGroups(500, size=4, in_a_row=3).buffer_within(5) == 12


def test_a_worker_without_samples_has_a_buffer_all_the_same() -> None:
    """Else what fills one up again and again, as the estimate of the plan does, never ends."""
    assert [Packing(4, 8).buffer_within(share) for share in (0, 1, 9)] == [1, 1, 4]
