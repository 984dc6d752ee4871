"""The memory of delayed scaling for each FP8 linear, as tensors of a checkpoint.

Transformer Engine keeps, for the tensors of each matrix product, a scale and the largest magnitudes of the
last iterations (``amax``), and hands them out as ``_extra_state``: pickled bytes, which no checkpoint of this
project holds, since reading them would run whatever they say. Here they are tensors under their own names,

    optimizer.scaling.<linear>.scale_fwd            [3]             input, weight, output
    optimizer.scaling.<linear>.amax_history_fwd     [history, 3]
    optimizer.scaling.<linear>.scale_bwd            [2]             gradient of output and input
    optimizer.scaling.<linear>.amax_history_bwd     [history, 2]

beside the optimizer's, which only a run that goes on needs too. Transformer Engine reduces the magnitudes
over all ranks that share a layer, so that each has the same, and they load at any layout. The other recipes
remember nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import Module

from megatron_vlm.hf.formats.native import read_metadata
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.models.weights import load_sharded, saved_name, sharded_weights
from megatron_vlm.parallel import Layout

PREFIX = "optimizer.scaling"
# The tensors by the names that ``_extra_state`` has for them; where a module keeps them.
_KEPT_IN = {
    "scale_fwd": ("scaling_fwd", "scale"),
    "amax_history_fwd": ("scaling_fwd", "amax_history"),
    "scale_bwd": ("scaling_bwd", "scale"),
    "amax_history_bwd": ("scaling_bwd", "amax_history"),
}


def scaling_state(chunks: Sequence[VisionLanguageModel], layout: Layout) -> dict[str, ShardedTensor]:
    """Return checkpoint entries of this rank's linears; none where nothing is scaled with a delay, or not
    yet."""
    if not _is_delayed(chunks):
        return {}
    replica = (0, layout.tp_rank, layout.dp_rank)
    tensors = {
        f"{PREFIX}.{base}.{name}": tensor
        for base, linear in _linears(chunks)
        for name, tensor in _kept(linear).items()
    }
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        for key, tensor in tensors.items()
    }


def load_scaling_state(folder: Path, chunks: Sequence[VisionLanguageModel]) -> bool:
    """Give the linears the scales back that they remembered; a collective call.

    Returns:
        False if the model scales with a delay and the checkpoint is of a run that didn't, or that kept
        another number of iterations: then the history begins anew.
    """
    if not _is_delayed(chunks):
        return True
    config = chunks[0].config
    saved: Any = read_metadata(folder).state_dict_metadata
    request, found = {}, {}
    for base, linear in _linears(chunks):
        keys = {name: f"{PREFIX}.{base}.{name}" for name in _KEPT_IN}
        if all(key in saved for key in keys.values()):
            found[base] = linear, keys
            for key in keys.values():
                request[key] = ShardedTensor.from_rank_offsets(key, torch.empty(saved[key].size))
    # Where a rank has nothing to ask for, a first stage without linears for one, it asks for nothing.
    loaded = load_sharded(folder, {"scaling": request} if request else {}).get("scaling", {})
    fits = any(key.startswith(f"{PREFIX}.") for key in saved)
    for linear, keys in found.values():
        tensors = {name: loaded[key] for name, key in keys.items()}
        fits &= len(tensors["amax_history_fwd"]) == config.fp8_amax_history_len
        if fits:
            _give(linear, tensors, config)
    return fits


@contextmanager
def unmoved(chunks: Sequence[VisionLanguageModel]) -> Iterator[None]:
    """Keep the linears' memory free of traces of the block, such as an evaluation."""
    tensors = [tensor for _, linear in _linears(chunks) for tensor in _kept(linear).values()]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


def _is_delayed(chunks: Sequence[VisionLanguageModel]) -> bool:
    config = chunks[0].config
    return config.fp8 is not None and config.fp8_recipe == "delayed"


def _linears(chunks: Sequence[VisionLanguageModel]) -> Iterator[tuple[str, Module]]:
    """Yield the language model's linears of Transformer Engine, by their names in checkpoints."""
    weights = sharded_weights(chunks)
    for index, chunk in enumerate(chunks):
        for name, module in chunk.language_model.named_modules():
            weight = weights.get(f"{index}.language_model.{name}.weight")
            if weight is not None and hasattr(module, "fp8_meta"):
                yield saved_name(weight).removesuffix(".weight"), module


def _kept(linear: Module) -> dict[str, Tensor]:
    """Return a linear's tensors; none under another recipe, or before its first iteration."""
    meta: Any = linear.fp8_meta
    kept: dict[str, Any] = {
        name: getattr(meta.get(part), field, None) for name, (part, field) in _KEPT_IN.items()
    }
    return kept if all(isinstance(tensor, Tensor) for tensor in kept.values()) else {}


def _give(linear: Module, tensors: dict[str, Tensor], config: Any) -> None:
    """Hand the tensors over as Transformer Engine reads them, in bytes that were pickled right here."""
    from megatron.core.fp8_utils import get_fp8_recipe

    state = {name: tensor.cpu() for name, tensor in tensors.items()}
    content = {**state, "recipe": get_fp8_recipe(config), "extra_fp8_variables": {"num_gemms": 1}}
    linear.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8))
