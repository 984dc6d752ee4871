"""What ranks do in tests, for :class:`tests.distributed.Pool`; nothing here imports transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_vlm import parallel
from megatron_vlm.config.checkpoint import read_manifest
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.train_modules import parse_train_modules
from megatron_vlm.models.vlm import build_model, find_image_positions
from megatron_vlm.models.weights import load_weights, named_parameters, sharded_weights
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training import trainer
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.regimes import set_trainable, table
from megatron_vlm.training.schedule import Schedule
from megatron_vlm.training.step import compute_gradients, prepare_for_schedules, train_step


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout under test."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        switches = ["sp"] * self.sequence_parallel + ["do"] * self.distributed_optimizer
        return "-".join([f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", *switches])


def global_batch(
    microbatches: list[dict[str, torch.Tensor]], model: ModelConfig, multiple: int
) -> GlobalBatch:
    """Microbatches of ``input_ids``, ``labels`` and ``pixel_values``, as the model takes them."""
    length = -(-max(m["input_ids"].shape[1] for m in microbatches) // multiple) * multiple
    batches = []
    for m in microbatches:
        missing = length - m["input_ids"].shape[1]
        ids = torch.nn.functional.pad(m["input_ids"], (0, missing))
        labels = torch.nn.functional.pad(m["labels"], (0, missing), value=-100)
        pixels = m["pixel_values"]
        batches.append(
            Batch(
                input_ids=ids,
                labels=labels.clamp(min=0),
                loss_mask=labels != -100,
                pixel_values=pixels if len(pixels) else None,
                image_positions=find_image_positions(ids, len(pixels), model) if len(pixels) else None,
            )
        )
    return GlobalBatch(batches, length)


def logits_and_gradients(
    checkpoint: str, microbatches: list[dict[str, torch.Tensor]], sizes: Layout
) -> tuple[float, list[torch.Tensor] | None, list[tuple[str, Any, Any, torch.Tensor]]]:
    """Loss, this rank's part of the logits, and the pieces of every gradient.

    Returns:
        loss; logits of each microbatch on the last stage; ``(name, shape, offset, piece)`` for each
        parameter piece that this rank holds.
    """
    layout = parallel.initialize(sizes.tp, sizes.pp)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout, sequence_parallel=sizes.sequence_parallel)
    set_trainable(chunks, parse_train_modules("all"), layout)
    load_weights(Path(checkpoint), chunks)
    models = wrap_model(chunks, sizes.distributed_optimizer, overlap=False)
    prepare_for_schedules(models)
    batch = global_batch(microbatches, model, sizes.tp if sizes.sequence_parallel else 1)
    loss, _ = compute_gradients(models, batch, layout, len(microbatches[0]["input_ids"]))

    pieces = []
    entries = sharded_weights(chunks)
    for name, parameter in named_parameters(chunks):
        entry = replace(entries[name], data=parameter.main_grad.detach().clone())
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            pieces.append((part.key, part.global_shape, part.global_offset, part.data))

    logits = None
    if sizes.pp == 1:
        with torch.no_grad():
            logits = [
                chunks[0](b.input_ids, b.pixel_values, b.image_positions).clone() for b in batch.microbatches
            ]
    else:
        logits = _pipeline_logits(models, batch, layout, len(microbatches[0]["input_ids"]))
    return loss, logits, pieces


def _pipeline_logits(models: Any, batch: GlobalBatch, layout: Any, micro_batch_size: int) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Any, model: Any) -> Any:
        b = next(batches)
        output = model(input_ids=b.input_ids, pixel_values=b.pixel_values, image_positions=b.image_positions)
        return output, lambda logits: (logits.sum(), torch.tensor(1), logits.detach().clone())

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batch.microbatches) for _ in models],
        model=models,
        num_microbatches=len(batch.microbatches),
        seq_length=batch.sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
    )


def train(argv: list[str]) -> None:
    """Train as ``python -m megatron_vlm.training`` does."""
    config = RunConfig.from_flags(argv)
    sections = config.parallel
    layout = parallel.initialize(sections.tp, sections.pp, config.training.seed, sections.device)
    trainer.run(config, layout)


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
    chunks = build_model(model, layout, sequence_parallel=sizes.sequence_parallel)
    regime = set_trainable(chunks, parse_train_modules(train_modules), layout)
    load_weights(Path(checkpoint), chunks)
    models = wrap_model(chunks, sizes.distributed_optimizer, overlap=False)
    prepare_for_schedules(models)
    updates = Optimizer(models, entries=len(regime.entries), **optimizer)
    schedules = [schedule.scaled_to(entry.lr or schedule.lr) for entry in regime.entries]
    losses = []
    for iteration, microbatches in enumerate(global_batches, start=1):
        own = microbatches[layout.dp_rank :: layout.dp]
        batch = global_batch(own, model, sizes.tp if sizes.sequence_parallel else 1)
        rates = [curve.at(iteration) for curve in schedules]
        losses.append(train_step(models, updates, batch, layout, len(own[0]["input_ids"]), rates).loss)
    return losses, table(regime, [curve.lr for curve in schedules], optimizer["weight_decay"])
