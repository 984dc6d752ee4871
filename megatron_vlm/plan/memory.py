"""The memory that a run will take on each pipeline rank, told before the run starts.

    for stage in estimate(config, model, world_size=8):
        print(stage.rank, stage.total)

Counted is every tensor that exists at the moment of the peak: weights, gradients, optimizer state, and what
the passes hold. Not counted is what isn't a tensor, see :data:`OUTSIDE`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import EMBEDDING, Parameter, stage_parameters
from megatron_vlm.architecture.train_modules import assign
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.activations import Block, Shape, stage_block
from megatron_vlm.plan.pipeline import layers_per_stage

GIB = 2**30
# On a GPU, beside tensors: CUDA's context and kernels, cuBLAS' workspaces and NCCL's buffers. An assumption.
OUTSIDE = 3 * GIB
# Of all tensors, what the caching allocator loses between them. An assumption.
FRAGMENTATION = 0.05
_FP32 = 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage, at the moment when they are the most.

    Attributes:
        rank: pipeline rank.
        gradients: float32, of trained parameters.
        optimizer: Adam's moments, and float32 master weights where the weights are bfloat16.
        activations: all else: what the forward pass keeps, images and loss included, and what exists for a
            moment; of the micro batches that are on their way at once.
        in_flight: micro batches on their way at once, at most.
    """

    rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    in_flight: int

    @property
    def total(self) -> int:
        """The bytes of all tensors."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def with_allowance(self) -> int:
        """The bytes of all tensors, and what a GPU is assumed to need beside them."""
        return int(self.total * (1 + FRAGMENTATION)) + OUTSIDE


def estimate(
    config: RunConfig, model: ModelConfig, world_size: int, device: Optional[str] = None
) -> List[StageMemory]:
    """Return the memory of each pipeline rank, for samples of the largest image and text that fill
    ``--seq-length``.

    With ``--packing`` the tower is taken to have as many images as fit into the sequences, the output layer
    to have one image's tokens less than all.

    Args:
        device: "cuda" or "cpu"; None for what ``--device`` says, and "cuda" if it says nothing.

    Raises:
        ValueError: the layout does not fit the model or the number of ranks, or ``--train-modules`` names
            what the model lacks.
    """
    if model.lora is None and config.lora.adapters is not None:
        model = dataclasses.replace(model, lora=config.lora.adapters)
    pp, dp, microbatches = config.parallel.pp, config.dp(world_size), config.num_microbatches(world_size)
    layers = layers_per_stage(config, model)
    parameters = stage_parameters(
        model, config.parallel.tp, layers, config.model.make_vocab_size_divisible_by
    )
    names = {parameter.name: None for stage in parameters for parameter in stage}
    trained = assign(config.trained, model, names)
    shape = _shape(config, model, device or config.parallel.device or "cuda")

    starts = [sum(layers[:stage]) for stage in range(len(layers))]
    blocks = [
        stage_block(
            model,
            shape,
            range(start, start + count),
            first=stage == 0,
            last=stage == len(layers) - 1,
            trains=trained.__contains__,
        )
        for stage, (start, count) in enumerate(zip(starts, layers))
    ]
    stages = []
    for rank in range(pp):
        own = [parameter for stage in parameters[rank::pp] for parameter in stage]
        weights, gradients, optimizer = _state(own, trained, shape, dp if config.parallel.dist_optim else 1)
        weights += _fp8_copies(own, config.fp8, model)
        activations, in_flight = _peak(blocks[rank::pp], pp, rank, microbatches)
        if shape.device == "cpu" and config.parallel.dist_optim and dp > 1:
            # Gloo scatters sums of a copy, which is there until the backward pass has come to the embedding.
            last = sum(p.size for p in own if p.name in trained and p.name == EMBEDDING) * shape.element
            activations = max(activations, gradients + last)
        activations += _inputs(model, shape, microbatches, first=rank == 0) + _buffers(model, shape)
        stages.append(StageMemory(rank, weights, gradients, optimizer, activations, in_flight))
    return stages


def _shape(config: RunConfig, model: ModelConfig, device: str) -> Shape:
    precision = config.training.precision or model.precision
    default = "transformer_engine" if device == "cuda" and precision == "bf16" else "local"
    impl = config.parallel.transformer_impl or default
    multiple = config.sequence_multiple
    rows, length = config.training.micro_batch_size, config.data.seq_length
    images = rows
    if config.data.packing:
        images = rows * max(1, length // model.image_tokens)  # as many as there can be
        rows, length = 1, rows * length
    return Shape(
        batch=rows,
        sequence=-(-length // multiple) * multiple,
        images=images,
        tp=config.parallel.tp,
        sequence_parallel=config.parallel.sequence_parallel,
        element=2 if precision == "bf16" else _FP32,
        device=device,
        fused_norm=impl == "transformer_engine",
        recompute=config.parallel.recompute,
        recompute_layers=config.parallel.recompute_num_layers,
    )


def _state(
    parameters: Sequence[Parameter], trained: Mapping[str, object], shape: Shape, shards: int
) -> Tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state.

    Gradients are whole on every rank: ``--dist-optim`` shards the optimizer state alone.
    """
    count = sum(parameter.size for parameter in parameters)
    updated = sum(parameter.size for parameter in parameters if parameter.name in trained)
    per_parameter = 2 * _FP32 + (_FP32 if shape.element < _FP32 else 0)
    return count * shape.element, updated * _FP32, -(-updated // shards) * per_parameter


def _fp8_copies(parameters: Sequence[Parameter], fp8: Optional[Fp8Config], model: ModelConfig) -> int:
    """Return the bytes of weights in FP8, as they are and transposed, for the backward pass: made by an
    iteration's first micro batch, and kept. Weights that are FP8 themselves, and their transposes, take
    what bfloat16 took."""
    if fp8 is None or fp8.param_gather:
        return 0
    weights = set(fp8.weights(model.language.num_layers))
    return 2 * sum(parameter.size for parameter in parameters if parameter.name in weights)


def _inputs(model: ModelConfig, shape: Shape, microbatches: int, first: bool) -> int:
    """Return the bytes of a whole global batch on the device: tokens, labels, mask; on the first stage
    pixels too."""
    vision = model.vision
    tile = vision.num_channels * vision.image_size**2 * shape.element
    index = (2 + (model.anyres is not None)) * 8 * model.image_tokens
    pixels = model.image_tiles * tile + index
    return microbatches * (shape.tokens * (8 + 8 + 1) + shape.images * pixels * first)


def _buffers(model: ModelConfig, shape: Shape) -> int:
    """Return the bytes of the one buffer into which sequence parallelism gathers, and which stays."""
    if not shape.sequence_parallel:
        return 0
    return shape.tokens * model.language.hidden_size * shape.element


def _peak(blocks: Sequence[Block], pp: int, rank: int, microbatches: int) -> Tuple[int, int]:
    """Return the most that the micro batches on their way hold, and how many passes that are at most."""
    live = peak = passes = most = 0
    for chunk, is_forward in schedule(pp, rank, len(blocks), microbatches):
        block = blocks[chunk]
        if is_forward:
            peak = max(peak, live + block.forward)
            live += block.kept
            passes += 1
        else:
            live -= block.kept
            peak = max(peak, live + block.backward)
            passes -= 1
        most = max(most, passes)
    return peak, most


def schedule(pp: int, rank: int, vpp: int, microbatches: int) -> Iterator[Tuple[int, bool]]:
    """Yield the order of a pipeline rank's passes: the chunk's number, and whether it is a forward pass.

    Source: megatron-core ``pipeline_parallel/schedules.py``: without interleaving, and with it.
    """
    microbatches = min(microbatches, 4 * pp)  # what comes after repeats
    total = microbatches * vpp
    warmup = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp
    warmup = min(warmup, total)

    def chunk(index: int) -> int:
        return index % (pp * vpp) // pp

    for index in range(total):
        yield chunk(index), True
        if index >= warmup:
            yield vpp - 1 - chunk(index - warmup), False
    for index in range(total - warmup, total):
        yield vpp - 1 - chunk(index), False


def suggestions(
    config: RunConfig, model: ModelConfig, world_size: int, limit: int, device: Optional[str] = None
) -> List[str]:
    """Return what to change so that every rank stays within ``limit`` bytes, the allowance included.

    Args:
        limit: memory of one GPU, in bytes.

    Returns:
        A line for each single change that is enough, three at most and the least costly first; or one line
        with the changes that are enough together; or one that says that none are. Empty if the run fits.
    """
    before = _largest(config, model, world_size, device)
    if before <= limit:
        return []
    changes = _changes(config, world_size)
    enough: Dict[Tuple[str, ...], str] = {}
    for change in changes:
        size = _after([change], config, model, world_size, device)
        if size is not None and size <= limit:
            enough.setdefault(tuple(change[2]), f"{change[0]}: {size / GIB:.1f} GiB, which fits")
    if enough:
        return list(enough.values())[:3]
    taken: List[_Change] = []
    size = before
    for change in changes:
        after = _after([*_without(taken, change), change], config, model, world_size, device)
        if after is not None and after < 0.99 * size:
            taken, size = [*_without(taken, change), change], after
        if size <= limit:
            break
    for change in list(taken):  # an earlier one may be needless by now
        fewer = [other for other in taken if other is not change]
        after = _after(fewer, config, model, world_size, device)
        if after is not None and after <= limit:
            taken, size = fewer, after
    flags = " ".join(change[0] for change in taken)
    if size <= limit:
        return [f"{flags}: {size / GIB:.1f} GiB, which fits"]
    with_flags = f"even with {flags} it is {size / GIB:.1f} GiB; " if flags else ""
    return [f"{with_flags}use more GPUs, a shorter --seq-length, or --lora-rank"]


_Change = Tuple[str, str, Dict[str, Any]]  # the flags, the section, its new values


def _changes(config: RunConfig, world_size: int) -> List[_Change]:
    """Return the changes that lower memory, the least costly first."""
    parallel, micro = config.parallel, config.training.micro_batch_size
    changes: List[_Change] = []
    if not parallel.dist_optim and config.dp(world_size) > 1:
        changes.append(("--dist-optim", "parallel", {"dist_optim": True}))
    if parallel.tp > 1 and not parallel.sequence_parallel:
        changes.append(("--sequence-parallel", "parallel", {"sequence_parallel": True}))
    if parallel.recompute == "none":
        changes.append(("--recompute selective", "parallel", {"recompute": "selective"}))
    while micro > 1:
        micro = max(n for n in range(1, micro) if config.training.micro_batch_size % n == 0)
        changes.append((f"--micro-batch-size {micro}", "training", {"micro_batch_size": micro}))
    if parallel.recompute != "full" or parallel.recompute_num_layers is not None:
        values = {"recompute": "full", "recompute_num_layers": None}
        changes.append(("--recompute full", "parallel", values))
    for tp in (2, 4, 8):
        if tp > parallel.tp:
            flags = f"--tp {tp} --sequence-parallel"
            changes.append((flags, "parallel", {"tp": tp, "sequence_parallel": True}))
    for pp in (2, 4, 8, 16):
        if pp > parallel.pp:
            changes.append((f"--pp {pp}", "parallel", {"pp": pp}))
    return changes


def _without(taken: Sequence[_Change], change: _Change) -> List[_Change]:
    """Return the changes so far that the new one does not take back."""
    return [other for other in taken if not set(other[2]) & set(change[2])]


def _after(
    changes: Sequence[_Change], config: RunConfig, model: ModelConfig, world_size: int, device: Optional[str]
) -> Optional[int]:
    """Return the bytes of the largest rank after the changes; None where they can't be made."""
    try:
        for _, section, values in changes:
            changed = dataclasses.replace(getattr(config, section), **values)
            config = dataclasses.replace(config, **{section: changed})
        model.check_layout(config.parallel.tp, config.parallel.pp)
        return _largest(config, model, world_size, device)
    except ValueError:
        return None


def _largest(config: RunConfig, model: ModelConfig, world_size: int, device: Optional[str]) -> int:
    return max(stage.with_allowance for stage in estimate(config, model, world_size, device))
