"""The work of ranks in tests, for :class:`tests.distributed.Pool`; nothing here imports transformers."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm import parallel
from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import parse_train_modules
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.config.generation import SamplingSection
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.loading.loader import build_train_loader
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.inference.generator import Prompt, load_generator
from megatron_vlm.models.lora import LANGUAGE_PROJECTIONS, add_adapters
from megatron_vlm.models.lora_weights import start_adapters
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.specs import layer_spec
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import load_weights, named_parameters, sharded_weights
from megatron_vlm.parallel import optimizer as optimizer_module
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.plan.pipeline import StageCosts, deal_layers, layers_per_stage
from megatron_vlm.training import build
from megatron_vlm.training.batch import Batch, BatchReader, GlobalBatch
from megatron_vlm.training.freezing import set_trainable, table
from megatron_vlm.training.run import run
from megatron_vlm.training.schedule import Schedule
from megatron_vlm.training.step import compute_gradients, prepare_for_schedules, train_step
from tests.media import image_media, pixels


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout under test."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    vpp: int = 1
    first: int | None = None  # layers of the first pipeline rank
    recompute: str = "none"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        switches = ["sp"] * self.sequence_parallel + ["do"] * self.distributed_optimizer
        switches += [f"vpp{self.vpp}"] * (self.vpp > 1) + [f"first{self.first}"] * (self.first is not None)
        switches += [self.recompute] * (self.recompute != "none")
        return "-".join([f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", *switches])


class _Finished:
    """Stands for a reader of media that come as the encoder takes them."""

    @staticmethod
    def finish(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return tensors


def global_batch(
    microbatches: list[dict[str, torch.Tensor]], model: ModelConfig, multiple: int, layout: parallel.Layout
) -> GlobalBatch:
    """Read microbatches of ``input_ids``, ``labels`` and ``pixel_values`` as a run does; a collective call.

    One with ``lengths`` is a single row of samples that long.
    """
    read = []
    for m in microbatches:
        rows, length = m["input_ids"].shape
        lengths = m.get("lengths")
        read.append(
            Microbatch(
                input_ids=m["input_ids"],
                labels=m["labels"],
                lengths=torch.full((rows,), length) if lengths is None else lengths,
                media=image_media(m["pixel_values"], m.get("image_sizes"), "pixel_values"),
                keys=[""] * rows,
                packed=lengths is not None,
            )
        )
    processing: Any = SimpleNamespace(readers={"image": _Finished}, pad_token_id=0)
    source = iter(read) if layout.loads_data else None
    return BatchReader(source, layout, model, processing, len(read), torch.float32, multiple).next()


def logits_and_gradients(
    checkpoint: str, microbatches: list[dict[str, torch.Tensor]], sizes: Layout
) -> tuple[float, list[torch.Tensor] | None, list[tuple[str, Any, Any, torch.Tensor]]]:
    """Loss, this rank's part of the logits, and the pieces of every gradient.

    Returns:
        loss; logits of each microbatch on the last stage; ``(name, shape, offset, piece)`` for each
        parameter piece that this rank holds.
    """
    layout = parallel.initialize(sizes.tp, sizes.pp, vpp=sizes.vpp)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    layers = deal_layers(model.language.num_layers, StageCosts(layer=1), sizes.pp, sizes.vpp, sizes.first)
    options = ModelOptions(
        sequence_parallel=sizes.sequence_parallel, layers_per_stage=layers, recompute=sizes.recompute
    )
    chunks = build_model(model, layout, options)
    set_trainable(chunks, parse_train_modules("all"), layout)
    load_weights(Path(checkpoint), chunks)
    models = wrap_model(chunks, sizes.distributed_optimizer, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    batch = global_batch(microbatches, model, sizes.tp if sizes.sequence_parallel else 1, layout)
    loss, _ = compute_gradients(models, batch, layout)

    pieces = []
    entries = sharded_weights(chunks)
    for name, parameter in named_parameters(chunks):
        entry = replace(entries[name], data=parameter.main_grad.detach().clone())
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            pieces.append((part.key, part.global_shape, part.global_offset, part.data))

    logits = None
    if sizes.pp == 1:
        with torch.no_grad():
            logits = [_logits(chunks[0], b).clone() for b in batch.microbatches]
    else:
        logits = _pipeline_logits(models, batch)
    return loss, logits, pieces


def logits_of(checkpoint: str, microbatch: dict[str, torch.Tensor], sizes: Layout) -> torch.Tensor:
    """This tensor parallel rank's part of the logits of a checkpoint, adapters included."""
    layout = parallel.initialize(sizes.tp, sizes.pp)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout)
    load_weights(Path(checkpoint), chunks)
    (batch,) = global_batch([microbatch], model, 1, layout).microbatches
    with torch.no_grad():
        return _logits(chunks[0].eval(), batch).clone()


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    return model(
        input_ids=batch.input_ids,
        media=batch.media,
        packed_seq_params=batch.packed_seq_params,
    )


def _pipeline_logits(models: Any, batch: GlobalBatch) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Any, model: Any) -> Any:
        b = next(batches)
        output = _logits(model, b)
        return output, lambda logits: (logits.sum(), torch.tensor(1), logits.detach().clone())

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batch.microbatches) for _ in models],
        model=models,
        num_microbatches=len(batch.microbatches),
        seq_length=batch.payload_rows,
        micro_batch_size=len(batch.microbatches[0].input_ids),
        forward_only=True,
    )


def train(argv: list[str]) -> None:
    """Train as ``python -m megatron_vlm.training`` does."""
    config = RunConfig.from_flags(argv)
    sections = config.parallel
    layout = parallel.initialize(
        sections.tp, sections.pp, config.training.seed, sections.device, vpp=sections.vpp
    )
    run(config, layout)


def plain_and_for_fp8(argv: list[str]) -> list[tuple[float, dict[str, torch.Tensor], list[int]]]:
    """Loss and gradients of global batches without FP8, and of the same with all that FP8 changes but the
    arithmetic, which needs a GPU; and the tokens that the linears had at once, if they were for FP8."""
    config = RunConfig.from_flags([*argv, "--fp8"])
    layout = parallel.initialize(config.parallel.tp, config.parallel.pp, vpp=config.parallel.vpp)
    checkpoint = Path(str(config.model.megatron_load_dir)) / "release"
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    processing = build_processing(config, model)
    read: list[Microbatch] = []
    count = 2 * config.num_microbatches(layout.world_size)
    if layout.loads_data:
        with closing(build_train_loader(config, processing, layout.dp_rank, layout.dp)) as loader:
            read = [next(loader) for _ in range(count)]
    results = []
    for fp8, multiple in ((None, 1), (config.fp8, config.sequence_multiple)):
        chunks = build_model(
            model,
            layout,
            ModelOptions(
                sequence_parallel=config.parallel.sequence_parallel,
                layers_per_stage=layers_per_stage(config, model),
                impl="local",
                fp8=fp8,
            ),
        )
        set_trainable(chunks, parse_train_modules("all"), layout)
        load_weights(checkpoint, chunks)
        tokens: list[int] = []
        for chunk in chunks:
            parts = [chunk.language_model.decoder, getattr(chunk, "vision_projection", None)]
            for module in (m for part in parts if part is not None for m in part.modules()):
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    module.register_forward_pre_hook(
                        lambda _, args, tokens=tokens: tokens.append(args[0].shape[:-1].numel())
                    )
        models = wrap_model(chunks, config.parallel.dist_optim, overlap_grad_reduce=False)
        prepare_for_schedules(models)
        cut = layout.tp if config.parallel.sequence_parallel else 1
        reader = BatchReader(iter(read), layout, model, processing, count, torch.float32, max(multiple, cut))
        loss, _ = compute_gradients(models, reader.next(), layout)
        gradients = {name: p.main_grad.detach().clone() for name, p in named_parameters(chunks)}
        results.append((loss, gradients, tokens))
    return results


def packed_and_apart(argv: list[str]) -> list[tuple[float, int, dict[str, torch.Tensor]]]:
    """Loss, trained tokens and gradients of a packed global batch, and of its samples each in its own row."""
    config = RunConfig.from_flags(argv)
    layout = parallel.initialize(config.parallel.tp, config.parallel.pp)
    checkpoint = Path(str(config.model.megatron_load_dir)) / "release"
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    processing = build_processing(config, model)
    chunks = build_model(
        model,
        layout,
        ModelOptions(
            sequence_parallel=config.parallel.sequence_parallel,
            layers_per_stage=layers_per_stage(config, model),
            recompute=config.parallel.recompute,
        ),
    )
    set_trainable(chunks, parse_train_modules("all"), layout)
    load_weights(checkpoint, chunks)
    models = wrap_model(chunks, config.parallel.dist_optim, overlap_grad_reduce=False)
    prepare_for_schedules(models)

    packed: list[Microbatch] = []
    if layout.loads_data:
        with closing(build_train_loader(config, processing, layout.dp_rank, layout.dp)) as loader:
            packed = [next(loader) for _ in range(config.num_microbatches(layout.world_size))]
    apart = [sample for microbatch in packed for sample in _apart(microbatch, processing)]
    results = []
    for microbatches in (packed, apart):
        counts: list[int] = [0] * dist.get_world_size(layout.model_group)
        dist.all_gather_object(counts, len(microbatches), group=layout.model_group)
        multiple = layout.tp if config.parallel.sequence_parallel else 1
        reader = BatchReader(
            iter(microbatches), layout, model, processing, max(counts), torch.float32, multiple
        )
        batch = reader.next()
        for chunk in models:
            chunk.zero_grad_buffer()
        loss, trained = compute_gradients(models, batch, layout)
        gradients = {name: p.main_grad.detach().clone() for name, p in named_parameters(chunks)}
        results.append((loss, trained, gradients))
    return results


def _apart(microbatch: Microbatch, processing: Processing) -> list[Microbatch]:
    lengths = microbatch.lengths.tolist()
    found, image = [], 0
    for number, (ids, labels) in enumerate(
        zip(microbatch.input_ids.split(lengths, 1), microbatch.labels.split(lengths, 1), strict=True)
    ):
        images = int((ids == processing.image_token_id).sum()) // processing.model.image_tokens
        media = image_media(pixels(microbatch)[image : image + images])
        image += images
        found.append(Microbatch(ids, labels, torch.tensor([lengths[number]]), ["one"], media))
    return found


def train_on(
    checkpoint: str,
    global_batches: list[list[dict[str, torch.Tensor]]],
    train_modules: str,
    schedule: Schedule,
    sizes: Layout,
    optimizer: dict[str, float],
) -> tuple[list[float], str]:
    """Train on given batches, an iteration each; losses and the table of what is trained."""
    layout = parallel.initialize(sizes.tp, sizes.pp)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout, ModelOptions(sequence_parallel=sizes.sequence_parallel))
    regime = set_trainable(chunks, parse_train_modules(train_modules), layout)
    load_weights(Path(checkpoint), chunks)
    models = wrap_model(chunks, sizes.distributed_optimizer, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    updates = Optimizer(models, entries=len(regime.entries), **optimizer)
    schedules = [schedule.scaled_to(entry.lr or schedule.lr) for entry in regime.entries]
    losses = []
    for iteration, microbatches in enumerate(global_batches, start=1):
        own = microbatches[layout.dp_rank :: layout.dp]
        batch = global_batch(own, model, sizes.tp if sizes.sequence_parallel else 1, layout)
        rates = [curve.at(iteration) for curve in schedules]
        losses.append(train_step(models, updates, batch, layout, rates).loss)
    return losses, table(regime, [curve.lr for curve in schedules], optimizer["weight_decay"])


def train_adapters(
    checkpoint: str,
    adapter: str,
    lora: LoRAConfig,
    batches: list[list[dict[str, torch.Tensor]]],
    sizes: Layout,
    iterations: int,
    hyperparameters: tuple[float, float, float],
) -> list[float]:
    """Losses of training a PEFT adapter and the projector; each global batch is dealt to the DP ranks."""
    lr, weight_decay, clip_grad = hyperparameters
    layout = parallel.initialize(sizes.tp, sizes.pp)
    model = replace(ModelConfig.from_dict(read_manifest(checkpoint)["model"]), lora=lora)
    chunks = build_model(model, layout, ModelOptions(sequence_parallel=sizes.sequence_parallel))
    set_trainable(chunks, parse_train_modules("projector|lora"), layout)
    load_weights(Path(checkpoint), chunks)
    start_adapters(Path(checkpoint), chunks, seed=0, peft_adapter=adapter)
    models = wrap_model(chunks, sizes.distributed_optimizer, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    optimizer = Optimizer(models, weight_decay, 0.9, 0.999, 1e-8, clip_grad, entries=2)
    losses = []
    for iteration in range(iterations):
        mine = batches[iteration % len(batches)][layout.dp_rank :: layout.dp]
        batch = global_batch(mine, model, sizes.tp if sizes.sequence_parallel else 1, layout)
        result = train_step(models, optimizer, batch, layout, [lr, lr])
        losses.append(result.loss)
    return losses


def adapters_behind_a_fused_norm(place: str, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a linear with adapters that answers as Transformer Engine's LayerNormLinear, and what it
    has to be."""
    layout = parallel.initialize()

    class FusedNorm(ColumnParallelLinear):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.te_return_bias = options["skip_bias_add"] and options["bias"]
            self.return_layernorm_output = False

        def forward(self, x: torch.Tensor) -> Any:
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
            output, added = super().forward(normed)
            if self.te_return_bias:
                return (output, added, normed) if self.return_layernorm_output else (output, added)
            return ((output, normed) if self.return_layernorm_output else output), None

    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=("k_proj", "up_proj"))
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24
    )
    spec = layer_spec("local", causal=True, output_bias=False)
    parts = (
        spec.submodules.self_attention.submodules if place == "linear_qkv" else spec.submodules.mlp.submodules
    )
    setattr(parts, place, FusedNorm)
    add_adapters([spec], {place: LANGUAGE_PROJECTIONS[place]}, lora.targets, lora)
    size = 4 * 4 + 2 * 2 * 4 if place == "linear_qkv" else 2 * 24
    linear = getattr(parts, place)(
        16,
        size,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=bias,
        skip_bias_add=place == "linear_fc1",
        gather_output=False,
        tp_group=layout.tp_group,
    )
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 2, 16, device=layout.device)
    output, added = linear(x)
    (adapter,) = linear.adapters.values()
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
    delta = 2.0 * normed @ adapter.lora_A.weight.t() @ adapter.lora_B.weight.t()
    expected = normed @ linear.weight.t() + (linear.bias if bias and added is None else 0.0)
    if place == "linear_fc1":
        expected[..., 24:] += delta
        assert (added is not None) == bias
    else:  # a group is two queries, a key and a value of 4 numbers each
        expected.unflatten(-1, (2, 16))[..., 8:12] += delta.unflatten(-1, (2, 4))
    return output.detach(), expected.detach()


def train_in_small_buckets(argv: list[str]) -> None:
    """Train as :func:`train` does, with every parameter in a bucket of its own, as only large models have
    them."""
    make = optimizer_module.DistributedDataParallelConfig
    optimizer_module.DistributedDataParallelConfig = partial(make, bucket_size=1)
    try:
        train(argv)
    finally:
        optimizer_module.DistributedDataParallelConfig = make


def arguments_of_build_model(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of :func:`build_model` that a run's flags come to; nothing is trained."""
    found: dict[str, Any] = {}

    def record(model: Any, layout: Any, options: ModelOptions) -> Any:
        found.update(vars(options))
        raise InterruptedError

    make, build.build_model = build.build_model, record
    try:
        train(argv)
    except InterruptedError:
        pass
    finally:
        build.build_model = make
    return found


def generate(
    checkpoint: str, prompts: list[Prompt], calls: list[tuple[SamplingSection, list[int]]], sizes: Layout
) -> list[list[list[int]]]:
    """The answers to a batch of prompts, for each way of sampling and its end tokens."""
    layout = parallel.initialize(sizes.tp, sizes.pp)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    generator = load_generator(Path(checkpoint), model, layout, None, [])
    answers = []
    for sampling, end_tokens in calls:
        generator.end_tokens = frozenset(end_tokens)
        answers.append(generator.generate(prompts, sampling))
    return answers
