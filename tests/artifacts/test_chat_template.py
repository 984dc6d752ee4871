"""A folder's chat template against what transformers loads from the same files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_vlm.artifacts.chat_template import chat_template

SEVERAL = {"default": "several's default", "rag": "several's rag"}
NAMED = [{"name": name, "template": text} for name, text in SEVERAL.items()]
# Of each place what may lie there, None for nothing.
PLACES: dict[str, list[Any]] = {
    "processor_config.json": [None, "processor's", "", SEVERAL, {"rag": "no default"}],
    "chat_template.json": [None, "legacy", "", SEVERAL],
    "chat_template.jinja": [None, "raw", ""],
    "additional_chat_templates": [None, {"rag": "extra rag"}, {"default": "extra default"}],
    "tokenizer_config.json": [None, "tokenizer's", NAMED, [NAMED[1]], SEVERAL],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a processor without any template."""
    from tests.data.tiny_data import make_processor

    processor = make_processor("llava")
    processor.chat_template = processor.tokenizer.chat_template = None
    path = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(path)
    return path


def put(folder: Path, place: str, value: Any) -> None:
    if place == "additional_chat_templates":
        shutil.rmtree(folder / place, ignore_errors=True)
        for name, text in (value or {}).items():
            (folder / place).mkdir(exist_ok=True)
            (folder / place / f"{name}.jinja").write_text(text)
        return
    path = folder / place
    if place.endswith("_config.json"):
        values = json.loads(path.read_text())
        values.pop("chat_template", None)
        path.write_text(json.dumps({**values, **({} if value is None else {"chat_template": value})}))
    elif value is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(value if place.endswith(".jinja") else json.dumps({"chat_template": value}))


def chosen(loaded: Any) -> str | None:
    """What transformers applies where it is not told which, by its own rule; None where it refuses."""
    resolve = getattr(loaded, "_resolve_chat_template", None) or loaded.get_chat_template
    try:
        return resolve(None)
    except ValueError:
        return None


def theirs(folder: Path) -> str | None:
    """The processor's choice, or the tokenizer's where the processor has nothing at all."""
    processor = transformers.LlavaProcessor.from_pretrained(folder)
    return chosen(processor if processor.chat_template is not None else processor.tokenizer)


def combinations() -> list[tuple[Any, ...]]:
    return [
        values
        for values in itertools.product(*PLACES.values())
        # transformers refuses these two beside each other.
        if values[1] is None or values[3] is None
    ]


def test_every_combination_of_files(folder: Path) -> None:
    differ = []
    for values in combinations():
        for place, value in zip(PLACES, values, strict=True):
            put(folder, place, value)
        expected, found = theirs(folder), chat_template(folder)
        if found != expected:
            differ.append((values, found, expected))
    assert differ == []


@pytest.mark.parametrize("raw", [None, "raw"])
@pytest.mark.parametrize("value", PLACES["tokenizer_config.json"])
@pytest.mark.parametrize("extra", PLACES["additional_chat_templates"][:2])
def test_a_tokenizer_alone(folder: Path, tmp_path: Path, raw: Any, value: Any, extra: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    put(tmp_path, "chat_template.jinja", raw)
    put(tmp_path, "additional_chat_templates", extra)
    put(tmp_path, "tokenizer_config.json", value)
    assert chat_template(tmp_path) == chosen(transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_what_is_no_template(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its chat template cannot be read \(.*_config.json"):
        chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: holds no JSON object"):
        chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: 'utf-8' codec"):
        chat_template(tmp_path)
