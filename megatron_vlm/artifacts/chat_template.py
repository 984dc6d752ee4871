"""The chat template that a model folder carries; of several the one that transformers chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

from megatron_vlm.system.files import check_readable, read_json

PROCESSOR_CONFIG = "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
RAW = "chat_template.jinja"
LEGACY = "chat_template.json"  # of processors of older releases
EXTRAS = "additional_chat_templates"  # a folder of RAW's like, each called by its template's name
KEY = "chat_template"
DEFAULT = "default"  # the name of the one that is used, where there are several


def chat_template(folder: Path) -> Optional[str]:
    """Return a folder's chat template: the processor's, or the tokenizer's where the processor has none.

    Of several with names it is the default one.

    Source: transformers ``ProcessorMixin.get_processor_dict``, and ``_from_pretrained`` of its tokenizers.

    Returns:
        None: there is none, or there are several and none is the default.

    Raises:
        ValueError: a file that may hold it is damaged.
    """
    try:
        found = _of_processor(folder)
        found = _of_tokenizer(folder) if found is None else found
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: its chat template cannot be read ({error})") from None
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get(DEFAULT)
    return found if isinstance(found, str) else None


def _of_processor(folder: Path) -> Any:
    own = _key(folder / PROCESSOR_CONFIG)
    if own is not None:
        return own
    if (folder / LEGACY).is_file():
        return _key(folder / LEGACY) or None  # an empty one counts as none
    templates = _extras(folder)
    if (folder / RAW).is_file():
        templates[DEFAULT] = _text(folder / RAW)
    return _single(templates) or None


def _of_tokenizer(folder: Path) -> Any:
    templates = {DEFAULT: _text(folder / RAW)} if (folder / RAW).is_file() else {}
    templates.update(_extras(folder))
    return _single(templates) if templates else _key(folder / TOKENIZER_CONFIG)


def _extras(folder: Path) -> Dict[str, str]:
    return {path.stem: _text(path) for path in sorted(folder.glob(f"{EXTRAS}/*.jinja")) if path.is_file()}


def _single(templates: Dict[str, str]) -> Any:
    return templates[DEFAULT] if set(templates) == {DEFAULT} else templates


def _key(path: Path) -> Any:
    check_readable(path)
    if not path.is_file():
        return None
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return values.get(KEY)


def _text(path: Path) -> str:
    check_readable(path)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
