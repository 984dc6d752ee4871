"""The kinds of media that a sample may hold, as datasets write them; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict


@dataclass(frozen=True)
class Kind:
    """One kind of media in a dataset.

    Attributes:
        name: what messages call an item, and tables the kind.
        field: the key of a conversation's JSON that lists the items' files.
        marker: stands in a text where an item goes, whatever the tokenizer calls the token.
    """

    name: str
    field: str
    marker: str


IMAGE = Kind("image", field="images", marker="<image>")
KINDS: Dict[str, Kind] = {IMAGE.name: IMAGE}
