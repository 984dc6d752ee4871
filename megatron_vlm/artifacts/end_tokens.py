"""The token that ends an answer, and the tokens that generation stops at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, Mapping, Optional


def find_end_token(suffix: str, tokens: Mapping[str, bool], eos: Optional[str]) -> str:
    """Return the token that ends an answer, or an empty text.

    It is the first special token that a chat template writes behind an answer. A token that was added
    without being flagged special, as ChatML's often are by hand, counts where there is no other. Of two that
    begin at one place it is the longer.

    Args:
        suffix: what the template writes behind an answer.
        tokens: texts of the tokens that the tokenizer never splits, and whether they are flagged special.
        eos: the tokenizer's end token, if it has one; it counts as special.
    """
    known = {**tokens, **({eos: True} if eos else {})}
    found = [
        (not special, suffix.index(token), -len(token), token)
        for token, special in known.items()
        if token.strip() and token in suffix  # runs of spaces may be added tokens, too
    ]
    return min(found)[-1] if found else ""


def end_tokens(folder: Path, default: Optional[int] = None) -> List[int]:
    """Return the ids that end an answer in a model folder: those that transformers stops at, else
    ``default``.

    Raises:
        ValueError: the file that names them is damaged.
    """
    for name, key in (
        ("generation_config.json", None),
        ("config.json", None),
        ("config.json", "text_config"),
    ):
        file = folder / name
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            ids = (values.get(key) or {} if key else values).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
        if ids is not None:
            found = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in found):
                raise ValueError(
                    f"{file}: its eos_token_id is {ids!r}; it has to be a token's number, or a list of them"
                )
            return [number for number in found if number >= 0]  # -1 says that there is none
    return [] if default is None else [default]


def with_end_token(ends: List[int], end_token_id: Optional[int]) -> List[int]:
    """Return the tokens that an exported model stops at: those that its folder names, and the one that
    training taught."""
    return list(ends) if end_token_id is None or end_token_id in ends else [*ends, end_token_id]
