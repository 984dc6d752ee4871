"""Conversations as datasets write them: turns read from JSON, and the rules for unusual ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.data.media.kinds import KINDS
from megatron_vlm.data.templates import SampleError, Turn

ROLES = ("system", "user", "assistant")
_ID_KEYS = ("id", "uid", "uuid", "sample_id", "question_id", "qid", "idx", "index")


class UntrainableError(SampleError):
    """A conversation that nothing can be trained on. ``reason`` is what a report counts it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_conversation(
    sample: Mapping[str, Any], parts: Mapping[str, bytes]
) -> tuple[list[Turn], dict[str, list[bytes]]]:
    """Return the turns and media of a sample whose JSON holds ``messages`` and, for one, ``images``.

    Args:
        sample: the parsed JSON, ``{"messages": [{"role": ..., "content": ...}], "images": ["0.jpg"]}``, with
            a list of files for each kind of media that it has; other keys are left alone.
        parts: the sample's files, by what follows its key.

    Returns:
        the turns, and the files of each kind.

    Raises:
        SampleError: it is malformed or lacks a file (``corrupt``), or marks more or fewer places than it has
            files of a kind (``dropped``).
    """
    messages = sample["messages"]
    if not isinstance(messages, list):
        raise SampleError("its messages are no list", kind="corrupt")
    listed = {name: sample.get(kind.field, []) for name, kind in KINDS.items()}
    for name, files in listed.items():
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise SampleError(f"its {KINDS[name].field} are no list of file names", kind="corrupt")
    turns = [_turn(number, message) for number, message in enumerate(messages)]
    for name, files in listed.items():
        for file in files:
            if file not in parts:
                raise SampleError(f"its {name} {file} is missing", kind="corrupt")
        marked = sum(turn.text.count(KINDS[name].marker) for turn in turns)
        if marked != len(files):
            raise SampleError(
                f"its text has {marked} {name} markers, but {len(files)} {KINDS[name].field} belong to it"
            )
    return turns, {name: [parts[file] for file in files] for name, files in listed.items() if files}


def identity_of(fields: Mapping[str, Any]) -> Any:
    """Find what a record's owner calls it, for messages; None where it has no name."""
    found = (fields.get(key) for key in _ID_KEYS)
    return next((one for one in found if one == one and one not in (None, "", [], {})), None)


def read_json(data: bytes) -> Any:
    """Return parsed JSON.

    Raises:
        SampleError: it is none; of kind ``corrupt``.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"{type(error).__name__}: {error}"
        raise SampleError(f"its json can't be read ({message})", kind="corrupt") from None


def checked_text(value: Any, what: str) -> str:
    """Return a text that can be tokenised.

    Args:
        what: names it in messages.

    Raises:
        SampleError: it is no text, or holds half of a surrogate pair, as JSON can spell; of kind ``corrupt``.
    """
    if not isinstance(value, str):
        raise SampleError(f"{what} is no text", kind="corrupt")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError(f"{what} holds half of a character", kind="corrupt") from None
    return value


def trainable_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns that a model is trained on, by LLaVA's rules where it has any.

    prepare.py and the loader both ask here: what the one keeps, the other trains on.

    What the assistant says before the user's first turn is left out, for nothing asks for it. Turns after
    the last answer stay, and carry no loss.

    Returns:
        at most one system turn, then turns of which the first is the user's.

    Raises:
        UntrainableError: a system turn stands behind others, media belong to another turn than the
            user's, or there is no answer to train.
    """
    system = list(turns[:1]) if turns and turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    if any(turn.role == "system" for turn in rest):
        raise UntrainableError("system turn not first", "a system turn stands behind other turns")
    while rest and rest[0].role == "assistant":
        rest.pop(0)
    for kind in KINDS.values():
        if any(turn.role != "user" and kind.marker in turn.text for turn in turns):
            raise UntrainableError(
                "marker outside a question",
                f"{kind.marker} stands in a turn that isn't the user's, where no {kind.name} can go",
            )
    if not any(turn.role == "assistant" and turn.loss for turn in rest):
        raise UntrainableError("no answer", "none of its turns is an answer to train")
    return system + rest


def _turn(number: int, message: Any) -> Turn:
    where = f"its messages[{number}]"
    if not isinstance(message, dict):
        raise SampleError(f"{where} is no object", kind="corrupt")
    role, text, loss = message.get("role"), message.get("content"), message.get("loss", True)
    if role not in ROLES:
        raise SampleError(f"{where} has the role {role!r}, not one of {', '.join(ROLES)}", kind="corrupt")
    if not isinstance(loss, bool):
        raise SampleError(f"{where} has the loss {loss!r}, not true or false", kind="corrupt")
    return Turn(role, checked_text(text, f"the content of {where}"), loss)
