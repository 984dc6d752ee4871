"""The log of records that are not trained on: each is named in a file, by reason, and none goes silently.

Both passes write a log beside what they make; the last step joins the logs to ``dropped.jsonl``.
"""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

DUPLICATE = "duplicate id"
UNTRAINED = "kept, but training leaves it out"
_EXAMPLES = 10  # of each reason, in the report
_SHOWN = 200  # characters of an id or a detail


class RejectionLog:
    """A log that is there when it is whole; used with ``with``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path + ".tmp", "wb")

    def add(self, reason: str, place: int, identity: Any, detail: str) -> None:
        """Note one record: where it stands in the input or its unit, its id, and what is wrong with it."""
        shown = identity if identity is None else " ".join(str(identity).split())[:_SHOWN]
        line = json.dumps([reason, place, shown, " ".join(detail.split())[:_SHOWN]], ensure_ascii=False)
        self._file.write(line.encode(errors="replace") + b"\n")

    def __enter__(self) -> RejectionLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if error[0] is None:
            os.replace(self._path + ".tmp", self._path)


class Places:
    """The places of samples in the files that people gave.

    Args:
        paths: of the units, in order; those of one file follow each other.
        bases: places before each unit, and behind the last one.
    """

    def __init__(self, paths: Sequence[str], bases: Sequence[int]) -> None:
        self._paths, self._bases = paths, bases

    def __call__(self, place: int) -> tuple[str, int]:
        """Return the file, and the line, element or row there, of a place in the whole input; both from 1
        on."""
        path = self._paths[bisect.bisect_left(self._bases, place) - 1]
        return path, place - self._bases[self._paths.index(path)]


class Rejections:
    """The counts of rejections, and the first few names, by reason; of the dropped also counts by file."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.by_file: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, rejection: dict[str, Any]) -> None:
        """Count one entry of :func:`read_logs`."""
        reason = rejection["reason"]
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.by_file[rejection["file"]] += reason != UNTRAINED
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            identity = "" if rejection["id"] is None else f" (id {rejection['id']})"
            detail = f": {rejection['detail']}" if rejection["detail"] else ""
            examples.append(f"{rejection['file']}:{rejection['position']}{identity}{detail}")

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON, the most frequent reason first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in ordered}

    @property
    def example(self) -> str:
        """The first record of the most frequent reason; empty without one."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return self.examples[ordered[0][0]][0] if ordered else ""

    def __str__(self) -> str:
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return "; ".join(f"{count} dropped: {reason}" for reason, count in ordered[:5]) or "no records"


def read_logs(logs: Iterable[tuple[str, int]], places: Places) -> Iterator[dict[str, Any]]:
    """Yield the entries of logs, in their order.

    Args:
        logs: paths, and how many places of the input come before what each counts from.
    """
    for path, base in logs:
        with open(path, encoding="utf-8") as file:
            for line in file:
                reason, place, identity, detail = json.loads(line)
                file_name, position = places(base + place)
                yield {
                    "reason": reason,
                    "file": file_name,
                    "position": position,
                    "id": identity,
                    "detail": detail,
                }
