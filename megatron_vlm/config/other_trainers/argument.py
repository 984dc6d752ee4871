"""One argument of other trainers, and the words that say what it is here."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from typing import Dict, Mapping, Optional, Tuple

PREPARE, BUILD = "scripts/data/prepare.py", "scripts/convert/build_llava_jp.py"
DEFAULT = "that is the default here; leave it out"
_NOT_OFFERED = "not offered, because "
_NEVER = "it is never on here; leave it out"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "")


@dataclass(frozen=True)
class Argument:
    """One argument of other trainers.

    Attributes:
        names: its spellings, separated by spaces, with underscores, in lower case.
        here: what it is here. ``{value}`` is the value that was given; ``{folder}`` and ``{name}`` are the
            parts of a path.
        values: what single values are here, by their lower case; ``true`` and ``false`` stand for all
            spellings of these.
    """

    names: str
    here: str
    values: Mapping[str, str] = field(default_factory=dict)

    def answer(self, value: Optional[str]) -> Tuple[str, bool]:
        """Return the answer to a value, None where there is none, and whether it is that value's alone."""
        if value is not None:
            given = value.strip().lower()
            for key in (given, "true" if given in _TRUE else "false" if given in _FALSE else given):
                if key in self.values:
                    return filled(self.values[key], value), True
            if given in _FALSE and self.here.startswith(_NOT_OFFERED):
                return _NEVER, True
        return filled(self.here, value), False


def here(flags: str, note: str = "") -> str:
    """Return the answer to an argument that has flags here."""
    return f"here it is {flags}" + (f", {note}" if note else "")


def always(what: str) -> str:
    """Return the answer to an argument whose value can't be another here."""
    return f"always so here: {what}; leave it out"


def not_offered(because: str, use: str = "") -> str:
    """Return the answer to an argument that has no flag here."""
    return f"{_NOT_OFFERED}{because}; " + (f"use {use}" if use else "leave it out")


def switch(flags: str, note: str = "") -> Dict[str, str]:
    """Return the values of a switch that is off by default, here as there."""
    return {"true": here(flags, note), "false": DEFAULT}


def filled(text: str, value: Optional[str]) -> str:
    """Return an answer with a value in its place, as a shell takes it; without one, its name."""
    if value is None:
        text = re.sub(r"(?<=[\w-]) \{value\}", "", text)
        return text.replace("{value}", "X").replace("{folder}", "<folder>").replace("{name}", "<name>")
    folder, name = os.path.split(value.rstrip("/") or value)
    words = {"value": value, "folder": folder or ".", "name": name or "<name>"}
    return re.sub(r"\{(value|folder|name)\}", lambda match: shlex.quote(words[match[1]]), text)
