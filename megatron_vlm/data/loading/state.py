"""The data loader's state as JSON.

energon saves its state as nested dataclasses and expects them to be pickled. Reading a pickle runs
whatever it says, so the state is kept as JSON values, and only the classes listed here are built again.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any, Dict

from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState

_CLASSES: Dict[str, Any] = {SliceState.__name__: SliceState}


def to_json(value: Any) -> Any:
    """Return energon's state as JSON values; :func:`from_json` is the inverse.

    Raises:
        TypeError: the state holds a class that is not known here.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is FlexState and all(isinstance(key, str) for key in value):
        return {"FlexState": {key: to_json(item) for key, item in value.items()}}
    name = type(value).__name__
    if _CLASSES.get(name) is type(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(_CLASSES[name])}
        return {name: {key: to_json(item) for key, item in fields.items()}}
    raise TypeError(f"energon's state holds a {type(value)}, which has no JSON form here")


def from_json(value: Any) -> Any:
    """Return energon's state from the JSON values that :func:`to_json` gave.

    Raises:
        ValueError: it is not such a value.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((name, inner),) = value.items()
        if name == "tuple" and isinstance(inner, list):
            return tuple(from_json(item) for item in inner)
        if name == "bytes" and isinstance(inner, str):
            return base64.b64decode(inner, validate=True)
        if name == "FlexState" and isinstance(inner, dict):
            return FlexState({key: from_json(item) for key, item in inner.items()})
        if name in _CLASSES and isinstance(inner, dict):
            try:
                return _CLASSES[name](**{key: from_json(item) for key, item in inner.items()})
            except TypeError as error:
                raise ValueError(f"data loader state: {error}; was it saved with another energon?") from None
    raise ValueError(f"data loader state: unexpected {str(value)[:60]!r}; was it saved with another energon?")
