"""The allocations of a training step, by torch's profiler, which is told of every allocation and release.

Independent of :mod:`megatron_vlm.plan.memory`, which predicts it: nothing here knows what a layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.media.base import Media
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models.loss import find_trained
from megatron_vlm.models.modalities.table import modalities_of, place_media
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.plan.pipeline import layers_per_stage
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.freezing import set_trainable
from megatron_vlm.training.step import prepare_for_schedules, train_step

_LAST_STEP = "the step that is measured"


@dataclass(frozen=True)
class Measured:
    """Bytes on a rank at the moment of a step when they are the most.

    Attributes:
        rank: pipeline rank.
        activations: all that is neither weight, gradient nor optimizer state.
    """

    rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int


def measure(flags: Sequence[str], model: ModelConfig) -> Measured:
    """Train for a step on random samples that fill ``--seq-length``; a collective call on a CPU."""
    config = RunConfig.from_flags(flags)
    layout = parallel.initialize(config.parallel.tp, config.parallel.pp, vpp=config.parallel.vpp)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        models, optimizer = _build(config, model, layout)
        # The optimizer's state is made at the end of the first step, which may as well be a small one.
        small = 1, model.image_tokens + 16
        full = config.training.micro_batch_size, config.data.seq_length
        rates = [config.optimizer.lr] * len(config.trained)
        train_step(models, optimizer, _batch(config, model, layout, *small), layout, rates)
        batch = _batch(config, model, layout, *full)
        with record_function(_LAST_STEP):
            train_step(models, optimizer, batch, layout, rates)
    weights = _storages(p.data for m in models for p in m.parameters())
    gradients = _storages(p.main_grad for m in models for p in m.parameters() if p.requires_grad)
    state = _storages(_tensors_of(optimizer))
    for others in (weights, gradients):
        state = {address: size for address, size in state.items() if address not in others}
    known = [sum(part.values()) for part in (weights, gradients, state)]
    return Measured(
        layout.pp_rank,
        weights=known[0],
        gradients=known[1],
        optimizer=known[2],
        activations=_peak(profiler) - sum(known),
    )


def _build(config: RunConfig, model: ModelConfig, layout: parallel.Layout) -> tuple[list[Any], Optimizer]:
    """Build a model as the trainer does, with random weights."""
    chunks = build_model(
        model,
        layout,
        ModelOptions(
            dtype=_dtype(config),
            sequence_parallel=config.parallel.sequence_parallel,
            vocab_divisible_by=config.model.make_vocab_size_divisible_by,
            layers_per_stage=layers_per_stage(config, model),
            recompute=config.parallel.recompute,
            recompute_num_layers=config.parallel.recompute_num_layers,
        ),
    )
    set_trainable(chunks, config.trained, layout)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.normal_(0.0, 0.02)
    models = wrap_model(
        chunks, config.parallel.dist_optim, config.parallel.overlap_grad_reduce and layout.dp > 1
    )
    prepare_for_schedules(models)
    return models, Optimizer(models, 0.1, 0.9, 0.999, 1e-8, 1.0, entries=len(config.trained))


def _batch(
    config: RunConfig, model: ModelConfig, layout: parallel.Layout, size: int, length: int
) -> GlobalBatch:
    """Samples of one image and text, of which all is trained, in micro batches of ``size``."""
    microbatches = []
    shape = size, length
    vision = model.vision
    for _ in range(config.num_microbatches(layout.world_size)):
        ids = torch.randint(0, model.image_token_id, shape)
        ids[:, : model.image_tokens] = model.image_token_id
        pixels = torch.randn(shape[0], vision.num_channels, vision.image_size, vision.image_size)
        images = Media(
            IMAGE.name, {"pixel_values": pixels.to(_dtype(config))}, torch.zeros(size, 2, dtype=torch.int64)
        )
        media = place_media(ids, {IMAGE.name: images}, modalities_of(model))
        loss_mask = ids != model.image_token_id
        microbatches.append(
            Batch(
                input_ids=ids,
                labels=torch.randint(0, model.image_token_id, shape),
                loss_mask=loss_mask,
                trained=find_trained(loss_mask),
                media=media if layout.is_first_stage else {},
            )
        )
    return GlobalBatch(microbatches, length)


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def _tensors_of(optimizer: Optimizer) -> Iterable[Tensor]:
    for inner in optimizer.inner:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                state = inner.optimizer.state[parameter].values()
                yield from (value for value in state if torch.is_tensor(value))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the size of each storage, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _peak(profiler: profile) -> int:
    """Most bytes at once during the last step, of all that was allocated since profiling began.

    The profiler is not told when a thread of gloo's is the last to hold a tensor. It shows when the
    memory is given out again: until then it counts as in use.
    """
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    started = next(event.start_ns() for event in results.events() if event.name() == _LAST_STEP)
    live: dict[int, int] = {}
    total = peak = 0
    for at, address, size in sorted(_allocations(results.experimental_event_tree())):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        if at >= started:
            peak = max(peak, total)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and size of each allocation; of a release the size is negative."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)
