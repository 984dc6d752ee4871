"""The regime of a run: which parameters it trains, at which learning rate, and how many they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import LANGUAGE, PROJECTOR, VISION, TrainEntry, assign
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.models.weights import describe, is_padded, named_parameters, saved_name, sharded_weights
from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.optimizer import is_decayed

MODULES = {"vision tower": VISION, "projector": PROJECTOR, "language model": LANGUAGE}


@dataclass(frozen=True)
class Regime:
    """The regime of a model: the parameters that are trained, as every rank knows them.

    Attributes:
        entries: of ``--train-modules``, in their order. Each is a group of the optimizer.
        shapes: of every parameter of the whole model by its name in checkpoints, in the order of the
            model; tied weights once, the vocabulary without its padding.
        trained: number of the entry that trains a parameter; those not in it are frozen.
        own: this rank's parameters, or its parts of them, with their names.
        experts: how many of how many experts work on a token; None where there are none.
    """

    entries: tuple[TrainEntry, ...]
    shapes: dict[str, list[int]]
    trained: dict[str, int]
    own: list[tuple[str, torch.nn.Parameter]]
    experts: tuple[int, int] | None = None

    def size(self, name: str) -> int:
        """Return the number of elements of a whole parameter."""
        return math.prod(self.shapes[name])


def set_trainable(
    chunks: Sequence[VisionLanguageModel], entries: tuple[TrainEntry, ...], layout: Layout
) -> Regime:
    """Freeze the parameters that no entry names and number the rest for the optimizer; a collective call.

    Sets ``requires_grad`` of every parameter, and ``train_entry``, the number of its entry, of those
    that are trained.

    Raises:
        ValueError: an entry has no parameter on any rank.
    """
    model = chunks[0].model_config
    weights = sharded_weights(chunks)
    own = [(saved_name(weights[name]), parameter) for name, parameter in named_parameters(chunks)]
    shapes = _whole_model(describe(weights), model, layout)
    assigned = assign(entries, model, shapes)
    trained = {name: entries.index(entry) for name, entry in assigned.items()}
    for name, parameter in own:
        parameter.requires_grad = name in trained
        if name in trained:
            parameter.train_entry = trained[name]  # type: ignore[attr-defined]
    chosen, experts = model.language.experts_per_token, model.language.num_experts
    return Regime(entries, shapes, trained, own, (chosen, experts) if chosen and experts else None)


def table(regime: Regime, rates: Sequence[float], weight_decay: float) -> str:
    """Return the numbers of trained and all parameters of each module of the whole model, as aligned text.

    A module that several entries train has a line for each. TP shards are summed, tied weights and
    replicas counted once, and the vocabulary is the real one.

    Args:
        rates: peak learning rate of each entry.
        weight_decay: of the parameters that are decayed.
    """
    lines = [("module", "trained by", "trained", "parameters", "peak lr", "weight decay")]
    for module, prefix in MODULES.items():
        names = [name for name in regime.shapes if name.startswith(prefix)]
        total = f"{sum(regime.size(name) for name in names):,}"
        used = sorted({regime.trained[name] for name in names if name in regime.trained})
        for entry in used:
            of_entry = [name for name in names if regime.trained.get(name) == entry]
            free = sum(regime.size(name) for name in of_entry if not is_decayed(name, regime.shapes[name]))
            decay = f"{weight_decay:g}" + (f", none on {free:,}" if weight_decay and free else "")
            count = f"{sum(regime.size(name) for name in of_entry):,}"
            lines.append((module, regime.entries[entry].name, count, total, f"{rates[entry]:g}", decay))
        if not used:
            lines.append((module, "frozen", "0", total, "-", "-"))
    count = f"{sum(map(regime.size, regime.trained)):,}"
    total = f"{sum(map(regime.size, regime.shapes)):,}"
    lines.append(("total", "", count, total, "", ""))
    if regime.experts is not None:
        count, total = (f"{_active(regime, names):,}" for names in (regime.trained, regime.shapes))
        lines.append(("at work on a token", "", count, total, "", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numbers = (2, 3, 4)  # columns of numbers are aligned on the right
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _active(regime: Regime, names: Iterable[str]) -> int:
    """Return the number of parameters that a token meets: of its own experts only."""
    assert regime.experts is not None
    chosen, experts = regime.experts
    sizes = [(regime.size(name), ".mlp.experts." in name) for name in names]
    return sum(size for size, of_one in sizes if not of_one) + (
        sum(size for size, of_one in sizes if of_one) * chosen // experts
    )


def _whole_model(own: dict[str, dict[str, Any]], model: ModelConfig, layout: Layout) -> dict[str, list[int]]:
    """Return the shapes of all ranks' parameters, by name; a collective call."""
    everyones: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(layout.model_group))]
    dist.all_gather_object(everyones, own, group=layout.model_group)
    shapes = {name: list(about["shape"]) for part in everyones for name, about in part.items()}
    for name, shape in shapes.items():
        if is_padded(name):
            shape[0] = model.language.vocab_size
    return shapes
