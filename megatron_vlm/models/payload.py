"""The payload that travels between pipeline stages."""

from __future__ import annotations


def payload_rows(sequence_length: int) -> int:
    """Return the rows of a microbatch's payload, before sequence parallelism shares them out.

    Schedules, evaluation and generation ask here: today a row for each position.
    """
    return sequence_length
