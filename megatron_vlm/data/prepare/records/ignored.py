"""Fields of which nothing is trained: how many records have each, and one example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vlm.data.prepare.rejections import Places

_MOST_FIELDS = 200  # of a unit, by name; ids as field names would fill the memory
_OTHERS = "other fields"
_SHOWN = 60  # characters of an example


class IgnoredFields:
    """A count of a unit's fields.

    ``state`` is JSON: of each field the records, an example, its place and id.
    """

    def __init__(self) -> None:
        self.state: dict[str, list[Any]] = {}

    def add(self, ignored: Mapping[str, Any], place: int, identity: Any) -> None:
        """Count a record's fields.

        Args:
            ignored: values by fields.
            place: where the record stands in its unit.
            identity: its id, None without one.
        """
        names = set()
        for name, value in ignored.items():
            known = name if name in self.state or len(self.state) < _MOST_FIELDS else _OTHERS
            if known not in self.state:
                self.state[known] = [0, _shown(value), place, None if identity is None else _shown(identity)]
            names.add(known)
        for name in names:
            self.state[name][0] += 1


def merge(states: Iterable[tuple[Mapping[str, list[Any]], int]], places: Places) -> dict[str, dict[str, Any]]:
    """Merge all units' fields, the most frequent first.

    Args:
        states: of the units, in order, and how many places of the input come before each.
    """
    found: dict[str, dict[str, Any]] = {}
    for state, base in states:
        for name, (count, example, place, identity) in state.items():
            if name not in found:
                path, position = places(base + place)
                where = f"{path}:{position}" + ("" if identity is None else f" (id {identity})")
                found[name] = {"count": 0, "example": example, "where": where}
            found[name]["count"] += count
    return dict(sorted(found.items(), key=lambda item: (-item[1]["count"], item[0])))


def _shown(value: Any) -> str:
    text = value[: 2 * _SHOWN] if isinstance(value, (str, bytes)) else value
    line = " ".join((text if isinstance(text, str) else repr(text)).split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."
