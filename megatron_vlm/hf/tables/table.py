"""The entries of tables: rows, tensors that are carried, and the prefixes of names on disk.

One table serves both directions. Each row names the Megatron tensor, the Hugging Face
tensors with their shapes, the op between them, and the tensor-parallel cut. A Hugging Face tensor
that training never runs has a row too, without a Megatron name but with the reason: it travels
beside the weights, untouched.

Hugging Face names start with a placeholder, ``{tower}``, ``{projector}``, ``{newline}``, ``{text}`` or
``{head}``, since the prefixes on disk depend on the release that wrote them (:func:`detect_prefixes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_vlm.architecture import layers as layers_module
from megatron_vlm.architecture.layers import Layer
from megatron_vlm.hf.tables.ops import (
    COLUMN,
    COPY,
    REPLICATED,
    ROW,
    Op,
    Shape,
    ShardRule,
)

# First what hub checkpoints and save_pretrained write (transformers 5 drops the tower's level), then
# the names inside the running model, which trainers that save a bare state dict write. The first
# prefix that some name starts with is taken, so a longer one stands before its own beginning.
PREFIXES = {
    "tower": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    ),
    "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
    "newline": ("image_newline", "model.image_newline"),  # the whole name
    "text": ("language_model.model.", "model.language_model."),
    "head": ("language_model.lm_head.", "lm_head."),
}

# The names that LLaVA checkpoints of the hub have, which every release of transformers reads.
ON_THE_HUB = {part: choices[0] for part, choices in PREFIXES.items()}
# Those inside the running model of transformers 5, by which PEFT names modules.
IN_MODEL = {part: choices[-1] for part, choices in PREFIXES.items()}


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    native: str
    hf: tuple[tuple[str, Shape], ...]
    op: Op = COPY
    shard: ShardRule = REPLICATED

    @property
    def native_shape(self) -> Shape:
        """Global shape of the Megatron tensor."""
        return self.op.native_shape([shape for _, shape in self.hf])


@dataclass(frozen=True)
class Carry:
    """Hugging Face tensors that training doesn't run.

    All of them are there, or, if ``optional``, none. ``value`` returns what one of a shape holds in every
    model, where that is so; ``check`` raises ValueError for values that make it wrong to leave them out.
    """

    hf: tuple[tuple[str, Shape], ...]
    reason: str
    optional: bool = False
    check: Callable[[str, Tensor], None] | None = None
    value: Callable[[Shape], Tensor] | None = None


@dataclass(frozen=True)
class Alias:
    """A Hugging Face tensor that repeats another one, where the writer didn't leave it out."""

    name: str
    of: str
    shape: Shape


Entries = Iterator[Row | Carry | Alias]


@dataclass(frozen=True)
class Merged:
    """Several Hugging Face tensors that are one Megatron tensor.

    Attributes:
        rows: of each along the first dimension, by its name.
    """

    rows: Mapping[str, int]
    op: Op
    shard: ShardRule = COLUMN


def described(layers: Iterable[Layer], native: str, names: Mapping[str, str | Merged]) -> Iterator[Row]:
    """Yield the rows of layers whose shapes and cuts their description gives.

    Args:
        native: begins the Megatron names.
        names: how Hugging Face names begin where the description's do; what comes behind is the same on both
            sides, as ``.weight`` is.

    Raises:
        ValueError: a tensor has no name.
    """
    for layer in layers:
        cut = COLUMN if getattr(layer, "cut", None) == layers_module.COLUMN else ROW
        for weight in layer.weights():
            begun = [start for start in names if weight.name.startswith(start)]
            if not begun:
                raise ValueError(f"the table has no name for {native}{weight.name}")
            start = max(begun, key=len)
            rest, theirs = weight.name[len(start) :], names[start]
            if isinstance(theirs, Merged):
                hf = tuple((name + rest, (rows, *weight.shape[1:])) for name, rows in theirs.rows.items())
                yield Row(native + weight.name, hf, theirs.op, theirs.shard)
            else:
                hf = ((theirs + rest, weight.shape),)
                yield Row(native + weight.name, hf, COPY, cut if weight.cut else REPLICATED)


@dataclass(frozen=True)
class Table:
    """All rows of a model."""

    rows: tuple[Row, ...]
    carries: tuple[Carry, ...]
    aliases: tuple[Alias, ...]

    @property
    def required(self) -> dict[str, Shape]:
        """Hugging Face tensors that every folder of the model holds."""
        entries: list[Row | Carry] = [*self.rows, *(carry for carry in self.carries if not carry.optional)]
        return {name: shape for entry in entries for name, shape in entry.hf}

    @property
    def shapes(self) -> dict[str, Shape]:
        """All Hugging Face tensors that a folder of the model may hold."""
        carried = {name: shape for carry in self.carries for name, shape in carry.hf}
        return {**self.required, **carried, **{alias.name: alias.shape for alias in self.aliases}}


def fixed_tensors(table: Table) -> dict[str, Callable[[], Tensor]]:
    """Return makers of the tensors that are the same in every model of these shapes, by Hugging Face name."""
    return {
        name: functools.partial(carry.value, shape)
        for carry in table.carries
        if carry.value is not None
        for name, shape in carry.hf
    }


def detect_prefixes(names: Collection[str]) -> dict[str, str]:
    """Return the prefixes of a checkpoint, by part; a part that it lacks gets the first of :data:`PREFIXES`.

    Raises:
        ValueError: the names are of a state dict that ``save_pretrained`` would take apart.
    """
    for name in names:
        if name.endswith(".mlp.experts.gate_up_proj"):
            raise ValueError(
                f"{name} holds all experts, as the running model does; supported: expert by expert, "
                "block_sparse_moe.experts.0.w1.weight and so on, as save_pretrained writes them"
            )
    return {
        part: next((p for p in choices if any(n.startswith(p) for n in names)), choices[0])
        for part, choices in PREFIXES.items()
    }
