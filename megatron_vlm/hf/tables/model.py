"""The table of a whole model, of the tables of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.hf.tables import connector_extras, language
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.hf.tables.table import Alias, Carry, Entries, Row, Table
from megatron_vlm.system.registry import Registry

# The tables of encoders and connectors, by their kind: what the files of this folder define as ``entries``.
TABLES: Mapping[str, Callable[[Any, ModelConfig], Entries]] = Registry("megatron_vlm.hf.tables", "entries")
# By a connector's kind: the layers of LLaVA's projector files, and why transformers' LLaVA can't hold it.
LLAVA_LAYERS: Mapping[str, Callable[[str], dict[str, str]]] = Registry(
    "megatron_vlm.hf.tables", "llava_layers", optional=True
)
WHY_NOT_EXPORTED: Mapping[str, Callable[[ProjectorConfig], str]] = Registry(
    "megatron_vlm.hf.tables", "why_not_exported", optional=True
)

WHY_NOT_CLASSIC: Mapping[str, Callable[[ProjectorConfig], str]] = Registry(
    "megatron_vlm.hf.tables", "why_not_classic", optional=True
)


def why_not_exported(model: ModelConfig) -> str:
    """Return why transformers' class for a model can't hold it, or empty."""
    kind = model.projector.kind
    return WHY_NOT_EXPORTED[kind](model.projector) if kind in WHY_NOT_EXPORTED else ""


def check_exported(model: ModelConfig) -> None:
    """Check that transformers' class for a model can hold it.

    Raises:
        ValueError: it can't; the line names what it can't hold, and what would work.
    """
    kind, why = model.projector.kind, why_not_exported(model)
    if why:
        raise ValueError(
            f"the projector is {kind}, which can't be exported to Hugging Face: {why}; write it alone, as "
            "LLaVA does, with scripts/convert/projector.py export"
        )


def check_classic(model: ModelConfig) -> None:
    """Check that Megatron-LM's LLaVA can hold a model.

    Raises:
        ValueError: it can't; the line names what it can't hold, and what would work.
    """
    kind = model.projector.kind
    why = WHY_NOT_CLASSIC[kind](model.projector) if kind in WHY_NOT_CLASSIC else ""
    if why:
        raise ValueError(f"--format classic: the projector is {kind}: {why}; use the native format")


def build_table(model: ModelConfig, padded_vocab_size: int, prefixes: dict[str, str]) -> Table:
    """Return the table of a model, with Hugging Face names as they are on disk.

    Args:
        model: the architecture.
        padded_vocab_size: rows of the Megatron embedding.
        prefixes: as :func:`~megatron_vlm.hf.tables.table.detect_prefixes` returns.
    """
    parts = [
        *TABLES[model.vision.family](model.vision, model),
        *TABLES[model.projector.kind](model.projector, model),
        *connector_extras.entries(model),
        *language.entries(model.language, padded_vocab_size),
    ]

    def on_disk(hf: tuple[tuple[str, Shape], ...]) -> tuple[tuple[str, Shape], ...]:
        return tuple((name.format(**prefixes), shape) for name, shape in hf)

    return Table(
        rows=tuple(replace(e, hf=on_disk(e.hf)) for e in parts if isinstance(e, Row)),
        carries=tuple(replace(e, hf=on_disk(e.hf)) for e in parts if isinstance(e, Carry)),
        aliases=tuple(
            replace(e, name=e.name.format(**prefixes), of=e.of.format(**prefixes))
            for e in parts
            if isinstance(e, Alias)
        ),
    )
