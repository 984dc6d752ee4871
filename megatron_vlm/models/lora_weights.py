"""The first values of adapters: PEFT's random numbers, or a PEFT adapter."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_vlm.hf.adapters import read_adapter
from megatron_vlm.hf.formats.native import open_weights
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.models.lora import is_adapter
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.models.weights import has_adapters, sharded_weights


def start_adapters(
    checkpoint: Path,
    chunks: Sequence[VisionLanguageModel],
    seed: int,
    peft_adapter: str | None,
    base: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Give adapters that the checkpoint lacks their first values, the same at every layout.

    Args:
        checkpoint: what the other weights were loaded from.
        seed: of the random numbers.
        peft_adapter: folder of an adapter to take them from, and the projector that it may hold.
        base: as for :func:`~megatron_vlm.models.weights.load_weights`.
        say: told what of the adapter is left out.

    Raises:
        ValueError: the folder is no adapter of this model.
    """
    model = chunks[0].model_config
    if model.lora is None or has_adapters(checkpoint):
        return
    if peft_adapter is None:
        _fill(chunks, lambda name, shape: _initial(name, shape, seed) if is_adapter(name) else None)
    else:
        own = {entry.key for entry in sharded_weights(chunks).values() if isinstance(entry, ShardedTensor)}
        tensors = read_adapter(peft_adapter, model, open_weights(checkpoint, base), own, say)
        _fill(chunks, lambda name, shape: tensors.get(name))


def _initial(name: str, shape: Shape, seed: int) -> Tensor:
    """Return ``kaiming_uniform(sqrt(5))`` for A and zero for B, as PEFT's ``reset_lora_parameters`` has it.

    A generator is seeded for each A from its name, so that neither layout nor other targets matter.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _fill(chunks: Sequence[VisionLanguageModel], whole: Callable[[str, Shape], Tensor | None]) -> None:
    """Set weights from whole tensors by their names in checkpoints, each cut as its checkpoint entry is."""
    with torch.no_grad():
        for entry in sharded_weights(chunks).values():
            # Others, gate and up in one, are neither adapters nor the projector.
            if isinstance(entry, ShardedTensor):
                tensor = whole(entry.key, tuple(entry.global_shape))
                if tensor is not None:
                    for dim, start in enumerate(entry.global_offset):
                        tensor = tensor.narrow(dim, start, entry.local_shape[dim])
                    entry.data.copy_(tensor)
