"""The loss on held-out samples while a run trains, and what the run decides by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import Microbatch, fill_up
from megatron_vlm.data.loading.loader import ValidationLoader
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.processing import Processing
from megatron_vlm.parallel import Layout, on_first_rank
from megatron_vlm.plan.data_order import check_held_out
from megatron_vlm.training.batch import BatchReader, sample_names
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.sources import SourceTotals
from megatron_vlm.training.step import NonFiniteError, sum_losses


@dataclass(frozen=True)
class Validation:
    """The findings of an evaluation, equal on every rank."""

    loss: float  # mean over the trained tokens
    trained_tokens: int
    samples: int  # those that could be used
    seconds: float
    by_source: dict[str, float | None] = field(default_factory=dict)  # as SourceTotals gives it

    @property
    def metrics(self) -> dict[str, float | None]:
        """Return the metrics by the names that TensorBoard has."""
        values = asdict(self)
        values |= values.pop("by_source")
        return {f"validation/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        return f"validation loss {self.loss:.4f} on {self.samples:,} samples in {self.seconds:.1f} s"


class Evaluator:
    """The evaluator on the first samples of the dataset's ``val`` split, each time the same.

    Neither the training data nor any random generator moves by it. The data-parallel ranks share the
    samples out, each taken once; rows and microbatches of padding without loss make all microbatches of
    one size and all ranks' microbatches of one number, as pipeline schedules want them.

    Args:
        dtype, sequence_multiple: as :class:`BatchReader` takes them.
        before: :attr:`identity` of the run's earlier evaluations; None if there were none.

    Raises:
        ValueError: there is no such split, it can't be read, or it has other samples than before.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        model: ModelConfig,
        processing: Processing,
        dtype: torch.dtype,
        sequence_multiple: int,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        training = config.training
        assert training.eval_interval is not None
        self.interval = training.eval_interval
        dataset = on_first_rank(lambda: _held_out(str(config.data.data_path)))
        self.identity: dict[str, Any] = {"data": dataset.fingerprint, "mixture": dataset.description}
        if before is not None:
            check_held_out(before, self.identity)
        self.layout = layout
        self.micro_batch_size = training.micro_batch_size
        self.processing = processing
        wanted = training.eval_iters * training.global_batch_size or dataset.num_samples
        self.max_samples = min(wanted, dataset.num_samples)
        self.where = f"the first {self.max_samples} samples of the val split of {dataset.path}"
        # As many microbatches at once as in a training iteration, or somewhat fewer in equal rounds.
        count = -(-self.max_samples // (layout.dp * self.micro_batch_size))
        self.rounds = -(-count // config.num_microbatches(layout.world_size))
        num_microbatches = -(-count // self.rounds)
        num_microbatches = -(-num_microbatches // layout.pp) * layout.pp  # what interleaved stages ask for
        self.loader: ValidationLoader | None = None
        if layout.loads_data:
            self.loader = ValidationLoader(
                dataset,
                processing,
                dp_rank=layout.dp_rank,
                dp_size=layout.dp,
                micro_batch_size=self.micro_batch_size,
                max_samples=self.max_samples,
            )
            self.loader.start()
        self.sources = SourceTotals(dataset.names, layout) if dataset.names else None
        self.reader = BatchReader(
            None, layout, model, processing, num_microbatches, dtype, sequence_multiple, self.sources
        )

    def evaluate(
        self, models: list[DistributedDataParallel], beat: Callable[[], None], stop: StopRequest
    ) -> Validation | None:
        """Make one pass over the samples; a collective call.

        Args:
            beat: called now and then, to say that it goes on.

        Returns:
            None if the ranks agreed to stop in between; there can be no further pass then.

        Raises:
            ValueError: none of the samples can be used, or the loss is not finite.
        """
        started = time.perf_counter()
        if self.sources is not None:
            self.sources.reset()
        if self.loader is not None:
            self.reader.source = self._equal_microbatches(self.loader)
        sums = torch.zeros(3, dtype=torch.float64, device=self.layout.device)
        with _evaluating(models):
            for _ in range(self.rounds):
                batch = self.reader.next()
                try:
                    loss, trained = sum_losses(models, batch, self.layout, forward_only=True, stop=stop)
                except NonFiniteError as error:
                    names = ", ".join(sample_names(error.microbatches, batch, self.layout))
                    raise ValueError(
                        f"the validation loss is not finite, in a micro batch of these samples: {names}. "
                        "Look at them, or lower --lr and go on from an earlier checkpoint"
                    ) from None
                samples = sum(len(keys) for keys in batch.keys)
                beat()
                sums += torch.tensor([loss, trained, samples], dtype=torch.float64, device=sums.device)
                if stop.agreed:
                    return None
        if self.reader.source is not None:
            left = next(self.reader.source, None)  # without asking, the loader's pass would not end
            assert left is None
        dist.all_reduce(sums[2:])
        # What follows may stop the run: no rank may decide by another last bit than the others.
        dist.broadcast(sums, 0)
        loss, trained, samples = sums.tolist()
        if trained == 0:
            raise ValueError(f"--eval-interval: none of {self.where} can be used; see the log for why")
        by_source = self.sources.take() if self.sources is not None else {}
        return Validation(
            loss / trained, int(trained), int(samples), time.perf_counter() - started, by_source
        )

    def close(self) -> None:
        """End the loader's worker."""
        if self.loader is not None:
            self.loader.close()

    def _equal_microbatches(self, microbatches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        rows, pad = self.micro_batch_size, self.processing.pad_token_id
        missing = self.rounds * self.reader.num_microbatches
        for microbatch in microbatches:
            yield fill_up(microbatch, rows, pad)
            missing -= 1
        for _ in range(missing):
            yield fill_up(None, rows, pad)


def _held_out(path: str) -> Mixture:
    try:
        return Mixture.open(path, "val")
    except ValueError as error:
        raise ValueError(f"--eval-interval needs held-out samples. {error}") from None


@contextmanager
def _evaluating(models: list[DistributedDataParallel]) -> Iterator[None]:
    """Run the block without gradients and dropout; every module ends in the mode in which it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def note_evaluation(state: RunState, loss: float, min_delta: float) -> bool:
    """Take an evaluation's loss into ``state``; return whether it is the lowest so far.

    Args:
        min_delta: how far the loss has to fall to be an improvement for :func:`stops_early`.
    """
    state.evaluated_step = state.optimizer_steps
    if state.improved_loss is None or (
        loss < state.improved_loss and state.improved_loss - loss >= min_delta
    ):
        state.improved_loss, state.evaluations_without_improvement = loss, 0
    else:
        state.evaluations_without_improvement += 1
    if state.best_loss is not None and loss >= state.best_loss:
        return False
    state.best_loss, state.best_iteration = loss, state.iteration
    return True


def without_evaluations(state: RunState) -> RunState:
    """Return a state for a new run that goes on from another's: it has no best checkpoint of its own yet."""
    return replace(
        state,
        best_loss=None,
        best_iteration=0,
        improved_loss=None,
        evaluations_without_improvement=0,
        evaluated_step=None,
        held_out=None,
    )


def stops_early(state: RunState, patience: int | None) -> bool:
    """Return whether ``--early-stopping-patience`` ends the run here."""
    return patience is not None and state.evaluations_without_improvement >= patience
