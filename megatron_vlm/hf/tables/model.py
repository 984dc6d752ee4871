"""The table of a whole model, of the tables of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.tables import connector_extras, language
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.hf.tables.table import Alias, Carry, Entries, Row, Table
from megatron_vlm.system.registry import registry

# The tables of encoders and connectors, by their kind: what the files of this folder define as ``entries``.
TABLES: dict[str, Callable[[Any, ModelConfig], Entries]] = registry("megatron_vlm.hf.tables", "entries")
# By a connector's kind, LLaVA's names of its layers behind "mm_projector.", and transformers'.
MM_PROJECTORS: dict[str, dict[str, str]] = registry("megatron_vlm.hf.tables", "MM_PROJECTOR", optional=True)


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
