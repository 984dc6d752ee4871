"""The work of ranks with a make-believe Transformer Engine, for :class:`tests.distributed.Pool`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.models import scaling, vlm
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.scaling import load_scaling_state, scaling_state
from megatron_vlm.models.weights import load_weights, sharded_weights
from megatron_vlm.parallel import sharded_files
from tests.te import fake

Shapes = dict[str, list[int]]


def with_engine(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on a machine that seems to have Transformer Engine, and uses it."""
    with (
        fake.installed(),
        mock.patch.object(vlm, "choose_transformer_impl", lambda *arguments: "transformer_engine"),
    ):
        return function(*args)


def keys(model: dict[str, Any], tp: int) -> list[tuple[Shapes, list[str], Shapes]]:
    """With the engine and with local layers, of a model's state dict on this rank: the tensors' shapes and
    the extra state; and the whole shapes of its checkpoint's tensors."""
    layout = parallel.initialize(tp)
    return [with_engine(_keys, model, layout), _keys(model, layout)]


def _keys(model: dict[str, Any], layout: parallel.Layout) -> tuple[Shapes, list[str], Shapes]:
    (chunk,) = vlm.build_model(ModelConfig.from_dict(model), layout, ModelOptions(vocab_divisible_by=8))
    state = chunk.state_dict()
    tensors = {name: list(t.shape) for name, t in state.items() if not name.endswith("_extra_state")}
    saved = {}
    for entry in sharded_weights([chunk]).values():
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            saved[part.key] = list(part.global_shape)
    return tensors, [name for name in state if name not in tensors], saved


def save_again(source: str, target: str, tp: int) -> None:
    """Load a checkpoint and write its weights to another folder, as a run does."""
    layout = parallel.initialize(tp)
    model = ModelConfig.from_dict(read_manifest(source)["model"])
    chunks = vlm.build_model(model, layout)
    load_weights(Path(source), chunks)
    if layout.rank == 0:
        Path(target).mkdir()
        shutil.copy(Path(source) / "manifest.json", target)
        shutil.copytree(Path(source) / "hf", Path(target) / "hf")
    dist.barrier()
    sharded_files.save({"model": sharded_weights(chunks)}, target)


def scale_and_save(source: str, target: str, tp: int, history: int) -> None:
    """Write a checkpoint of linears that have been scaled with a delay, each differently."""
    layout = parallel.initialize(tp)
    chunks = in_fp8(source, layout, history)
    load_weights(Path(source), chunks)
    assert scaling_state(chunks, layout) == {}  # before the first iteration
    for base, linear in scaling._linears(chunks):
        linear.start_scaling(fake.DelayedScaling(history))
        for name, tensor in scaling._kept(linear).items():
            tensor.copy_(number(base, name, tensor.shape))
    with scaling.unmoved(chunks):  # as an evaluation is
        for _, linear in scaling._linears(chunks):
            for tensor in scaling._kept(linear).values():
                tensor.zero_()
    if layout.rank == 0:
        Path(target).mkdir()
        shutil.copy(Path(source) / "manifest.json", target)
        shutil.copytree(Path(source) / "hf", Path(target) / "hf")
    dist.barrier()
    sharded_files.save({"model": sharded_weights(chunks), "scaling": scaling_state(chunks, layout)}, target)


def load_scaled(source: str, tp: int, history: int, recipe: str) -> tuple[bool, int]:
    """Return whether a checkpoint's scaling is the model's, and how many linears have what they had,
    exactly."""
    layout = parallel.initialize(tp)
    chunks = in_fp8(source, layout, history)
    chunks[0].config.fp8_recipe = recipe
    load_weights(Path(source), chunks)
    given = lambda config: fake.DelayedScaling(config.fp8_amax_history_len)  # noqa: E731
    with mock.patch("megatron.core.fp8_utils.get_fp8_recipe", given):
        fits = load_scaling_state(Path(source), chunks)
    found = 0
    for base, linear in scaling._linears(chunks):
        kept = scaling._kept(linear)
        for name, tensor in kept.items():
            assert torch.equal(tensor, number(base, name, tensor.shape))
        found += bool(kept)
    return fits, found


def in_fp8(source: str, layout: parallel.Layout, history: int) -> Any:
    """A model whose linears would be scaled with a delay, in no iteration yet."""
    model = ModelConfig.from_dict(read_manifest(source)["model"])
    chunks = vlm.build_model(model, layout)
    config = chunks[0].config
    config.fp8, config.fp8_recipe, config.fp8_amax_history_len = "hybrid", "delayed", history
    return chunks


def number(base: str, name: str, shape: torch.Size) -> torch.Tensor:
    """Return the number that a tensor of a linear's scaling is set to, to be known again."""
    generator = torch.Generator().manual_seed(sum(f"{base}{name}".encode()))
    return torch.rand(shape, generator=generator)
