"""One training step: forward, backward, check, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.optimizer import Optimizer
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.signals import StopRequest


@dataclass(frozen=True)
class StepResult:
    """The result of a step, equal on every rank."""

    loss: float  # mean over the trained tokens of the global batch
    trained_tokens: int  # of the global batch
    gradient_norm: float  # before clipping
    updated: bool = True  # the weights have changed


class NonFiniteError(Exception):
    """The error of a loss or gradient that is NaN or infinite; nothing was updated.

    Attributes:
        microbatches: indices of this data parallel rank's microbatches whose loss is not finite.
        result: what the step did up to there.
    """

    def __init__(self, what: str, microbatches: list[int], result: StepResult) -> None:
        super().__init__(what)
        self.microbatches = microbatches
        self.result = result


def token_loss(loss_mask: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss that megatron-core's schedules divide by the trained tokens of the global batch, and
    report.

    Args:
        loss_mask: ``[b, s]``, True where a token is trained.
        loss: summed over the trained tokens of the microbatch.

    Returns:
        The loss, the number of trained tokens, and the loss again for the report.
    """
    return loss, loss_mask.sum().int(), loss.detach()


def forward_step(batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, object]:
    """Pass one microbatch forward through one model chunk, in the form megatron-core's schedules call."""
    batch = next(batches)
    output = model(
        input_ids=batch.input_ids,
        media=batch.media,
        labels=batch.labels,
        trained=batch.trained,
        packed_seq_params=batch.packed_seq_params,
        loss_parts=batch.loss_parts,
        position_ids=batch.position_ids,
        taps=batch.taps,
    )
    return output, partial(token_loss, batch.loss_mask)


def compute_gradients(
    models: list[DistributedDataParallel],
    global_batch: GlobalBatch,
    layout: Layout,
    stop: StopRequest | None = None,
) -> tuple[float, int]:
    """Pass forward and backward over a global batch; gradients end reduced and divided by trained tokens.

    Returns:
        Mean loss and number of trained tokens of the global batch, on every rank.

    Raises:
        NonFiniteError: on every rank, if any microbatch's loss is NaN or infinite.
        ValueError: a trained parameter gets no gradient while reduction overlaps the backward pass.
    """
    loss_sum, trained = sum_losses(models, global_batch, layout, forward_only=False, stop=stop)
    return loss_sum / max(trained, 1), trained


def sum_losses(
    models: list[DistributedDataParallel],
    global_batch: GlobalBatch,
    layout: Layout,
    forward_only: bool,
    stop: StopRequest | None = None,
) -> tuple[float, int]:
    """Pass forward over a global batch, and backward unless ``forward_only``; sum the losses.

    Args:
        stop: where given, the ranks agree on it.

    Returns:
        Sum of the trained tokens' losses and their number, of the global batch, on every rank.

    Raises:
        NonFiniteError: as :func:`compute_gradients`.
    """
    try:
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(global_batch.microbatches) for _ in models],
            model=models,
            num_microbatches=len(global_batch.microbatches),
            seq_length=global_batch.payload_rows,
            micro_batch_size=len(global_batch.microbatches[0].input_ids),
            forward_only=forward_only,
        )
    except AssertionError as error:
        if "overlap_grad_reduce" not in str(error):
            raise
        raise ValueError(
            "a trained parameter gets no gradient (a bias whose weight is frozen, for one), and overlapped "
            "reduction would wait for it; leave it out of --train-modules, or add --no-overlap-grad-reduce"
        ) from None
    count = len(global_batch.microbatches)
    # Every stage learns the microbatches' losses: the rank that knows the samples' names is on the first.
    report = torch.zeros(count + 1, dtype=torch.float64, device=layout.device)
    if layout.is_last_stage:
        report[:count] = torch.stack(list(losses))
        report[count] = sum(batch.loss_mask.sum() for batch in global_batch.microbatches)
    if layout.pp > 1:
        dist.broadcast(report, dist.get_global_rank(layout.pp_group, layout.pp - 1), group=layout.pp_group)
    # One rank of each model copy speaks for it. Over all ranks, since any of them may be asked to stop.
    totals = torch.zeros(3, dtype=torch.float64, device=layout.device)
    if layout.is_last_stage and layout.tp_rank == 0:
        totals[0], totals[1] = report[:count].sum(), report[count]
    totals[2] = stop is not None and stop.asked
    dist.all_reduce(totals)
    loss_sum, trained, asked = totals.tolist()
    if stop is not None and asked:
        stop.agreed = True
    if not math.isfinite(loss_sum):
        bad = [index for index, loss in enumerate(report[:count].tolist()) if not math.isfinite(loss)]
        raise NonFiniteError("loss", bad, StepResult(loss_sum, int(trained), math.nan, updated=False))
    return loss_sum, int(trained)


def train_step(
    models: list[DistributedDataParallel],
    optimizer: Optimizer,
    global_batch: GlobalBatch,
    layout: Layout,
    rates: Sequence[float],
    inspect: Callable[[], None] | None = None,
    stop: StopRequest | None = None,
) -> StepResult:
    """Make one update, with each entry's learning rate; a collective call.

    Args:
        inspect: called when the gradients are there and the weights still as before.
        stop: as :func:`sum_losses` takes it.

    Raises:
        NonFiniteError: a loss or the gradient norm is NaN or infinite; the weights are as before.
    """
    optimizer.zero_grad()
    loss, trained = compute_gradients(models, global_batch, layout, stop)
    norm = optimizer.gradient_norm()
    if inspect is not None:
        inspect()
    if not math.isfinite(norm):
        raise NonFiniteError("gradient norm", [], StepResult(loss, trained, norm, updated=False))
    optimizer.step(rates, norm)
    return StepResult(loss=loss, trained_tokens=trained, gradient_norm=norm)


def prepare_for_schedules(models: list[DistributedDataParallel]) -> None:
    """Give megatron-core's schedules the functions they call between microbatches."""
    config = models[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = None
    if models[0].ddp_config.overlap_grad_reduce:
        no_syncs = [model.no_sync for model in models]
        config.no_sync_func = no_syncs if len(models) > 1 else no_syncs[0]
