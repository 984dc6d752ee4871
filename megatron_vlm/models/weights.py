"""A model's weights as entries of a sharded checkpoint, and loading them at any layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import verify_checkpoint_and_load_strategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import checkpoint_layers, latest_resumable, read_manifest
from megatron_vlm.hf.formats.native import NativeReader, check_before_loading, open_weights
from megatron_vlm.hf.hashes import checks, share
from megatron_vlm.models.lora import is_adapter
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel import first_told, on_first_rank
from megatron_vlm.system.files import reading

_FORMAT = "metadata.json"  # of a checkpoint: megatron-core's name of its format, and the version
# Each layer is saved under its own number, as its parameters are named.
_SHARDING = {"non_homogeneous_layers": True}


def load_weights(
    folder: Path, chunks: Sequence[VisionLanguageModel], base: str | os.PathLike[str] | None = None
) -> None:
    """Load a checkpoint's weights into this rank's chunks, at any layout; a collective call.

    Adapters of the model are left as they are where the checkpoint has none.

    Args:
        folder: may hold trained weights only; the others are those that it was trained from.
        base: where these are, if they have moved.

    Raises:
        ValueError: the checkpoint is damaged, or its tensors are not the model's; the message names
            the first one.
    """
    weights = sharded_weights(chunks)
    if not has_adapters(folder):
        weights = {name: entry for name, entry in weights.items() if not is_adapter(name)}
    layers = on_first_rank(lambda: _folders(folder, base))
    _check_tensors(folder, layers, weights, chunks[0].model_config)
    loaded: dict[str, Any] = {}
    for layer in dict.fromkeys(layers.values()):
        own = {name: entry for name, entry in weights.items() if layers[saved_name(entry)] == layer}
        # Where a rank wants nothing it has to ask for nothing, not for an empty part.
        loaded.update(load_sharded(layer, {"model": own} if own else {}).get("model", {}))
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            if name in loaded:
                parameter.copy_(loaded[name])
                if hasattr(parameter, "get_high_precision_init_val"):
                    # An FP8 weight: from this the optimizer makes its master weight.
                    parameter.get_high_precision_init_val().copy_(loaded[name])


def check_unchanged(
    folder: Path,
    base: str | os.PathLike[str] | None,
    weights_only: bool,
    say: Callable[[str], None],
    resumes: bool = False,
) -> None:
    """Check that a checkpoint holds what was written, each rank a share of it; a collective call.

    Args:
        base: as for :func:`load_weights`; what lies under trained weights is checked too.
        weights_only: leave the optimizer's state out.
        say: told of checkpoints without hashes, which are loaded as they are.
        resumes: it is the run's own, which goes on from an earlier one if this one is gone.

    Raises:
        ValueError: it doesn't; every rank names the same file.
    """
    layers = on_first_rank(lambda: checkpoint_layers(folder, base))
    found = []
    for layer in layers:
        of_layer = checks(layer, weights_only or layer != layers[-1])
        if of_layer is None:
            say(f"{layer} has no hashes, since an earlier version wrote it: damage in it isn't found")
        found += of_layer or []
    rank, world = dist.get_rank(), dist.get_world_size()
    damage = next(filter(None, (check.damage for check in share(found, rank, world))), None)
    damage = first_told(damage)
    if damage is not None:
        raise ValueError(f"{damage}; {_way_on(layers[-1], resumes)}")


def check_state_files(folder: Path, resumes: bool) -> None:
    """Check the small files that say how far a run was, before anything is made of what they say.

    Raises:
        ValueError: one isn't what was written.
    """
    for check in checks(folder, weights_only=True) or []:
        if check.file.suffix == ".json" and check.damage is not None:
            raise ValueError(f"{check.damage}; {_way_on(folder, resumes)}")


def _way_on(folder: Path, resumes: bool) -> str:
    earlier = latest_resumable(folder.parent, before=folder)
    if not resumes or earlier is None:
        return "copy or convert the checkpoint again" + (
            f", or take {earlier}" if earlier is not None else ""
        )
    return f"copy the checkpoint again, or move {folder} away, and the run goes on from {earlier.name}"


def has_adapters(folder: Path) -> bool:
    """Return whether a checkpoint holds LoRA adapters."""
    return read_manifest(folder)["model"].get("lora") is not None


def _folders(folder: Path, base: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Return the folder in which each tensor lies."""
    reader = open_weights(folder, base)
    return {name: reader.folder(name) for name in reader.names}


def named_parameters(chunks: Sequence[VisionLanguageModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters.

    Each chunk counts its layers from 0, so names begin with the chunk's number.
    """
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            yield f"{index}.{name}", parameter


def sharded_weights(chunks: Sequence[VisionLanguageModel]) -> dict[str, Any]:
    """Return sharded tensors by name as in :func:`named_parameters`.

    ``_extra_state``, which holds FP8 scales, is left out: it would tie a checkpoint to the layer spec
    that wrote it.
    """
    return {
        f"{index}.{name}": entry
        for index, chunk in enumerate(chunks)
        for name, entry in chunk.sharded_state_dict(metadata=dict(_SHARDING)).items()
        if not name.endswith("_extra_state")
    }


def load_sharded(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load as ``dist_checkpointing.load`` does, a folder that holds nothing but tensors; a collective call.

    Raises:
        ValueError: it holds something else, or is damaged.
    """
    check_before_loading(folder)
    with reading(folder / _FORMAT, "copy or convert the checkpoint again"):
        verify_checkpoint_and_load_strategy(str(folder))
    try:
        return dist_checkpointing.load(request, str(folder), validate_access_integrity=False)
    except CheckpointException:  # on every rank, with the tracebacks of some in its text
        NativeReader(folder).check_all()
        raise


def _check_tensors(
    folder: Path, layers: dict[str, Path], weights: dict[str, Any], model: ModelConfig
) -> None:
    manifests = {layer: read_manifest(layer)["tensors"] for layer in set(layers.values())}
    for key, wanted in describe(weights).items():
        if key not in layers or key not in manifests[layers[key]]:
            raise ValueError(f"{folder}: {key} is missing; it is a checkpoint of another model")
        shape, expected = manifests[layers[key]][key]["shape"], wanted["shape"]
        if is_padded(key):
            fits = shape[0] >= model.language.vocab_size and shape[1:] == expected[1:]
        else:
            fits = shape == expected
        if not fits:
            raise ValueError(f"{folder}: {key} is {shape}, the model's is {expected}; it is of another model")


def is_padded(name: str) -> bool:
    """Return whether a tensor has a row for each token, and so is padded differently at each TP."""
    return "word_embeddings" in name or "output_layer" in name


def saved_name(entry: ShardedTensor | ShardedTensorFactory) -> str:
    """Return the name that checkpoints have for a parameter: with the layer's number in the whole model,
    and the same whatever layer spec it is of."""
    return (entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry).key


def describe(weights: dict[str, ShardedTensor | ShardedTensorFactory]) -> dict[str, dict[str, Any]]:
    """Return ``{saved name: {"shape": whole tensor's, "dtype": ...}}``, as a manifest lists them."""
    described = {}
    for entry in weights.values():
        part = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
        described[part.key] = {
            "shape": list(part.global_shape),
            "dtype": str(part.dtype).removeprefix("torch."),
        }
    return described
