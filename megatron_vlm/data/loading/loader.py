"""Training and validation loaders: worker processes, data order, exact resume.

The sequence of microbatches is made by N loader workers, numbered over all data-parallel ranks; each rank
runs its share of them and takes from them in turn. So what a global batch holds doesn't depend on the
data-parallel size, as long as N stays.

Workers are forked at the first ``peek()`` or ``next()``, from the thread that calls it, which has to live as
long as they shall. Fork them before starting threads and, where possible, before touching CUDA: a forked
process can use neither.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, Iterator, Mapping

from megatron.energon import WorkerConfig
from megatron.energon.errors import reraise_exception

from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.encoder import VisionLanguageEncoder
from megatron_vlm.data.loading.workers import Taken, Workers
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.processing import Processing
from megatron_vlm.plan.data_order import check_same_data, grouping
from megatron_vlm.plan.grouping import LengthGroups, Packing

if TYPE_CHECKING:
    from megatron_vlm.config.run import RunConfig

SAMPLES_PER_SLICE = 100  # consecutive samples that are read in one go, before the shuffle buffer
STATE_SECONDS = 1.0  # a worker tells its state this often: the most that a restore has to repeat
TIMEOUT_SECONDS = 600.0


class TrainLoader(Iterator[Microbatch]):
    """The training loader: an endless stream of microbatches for one data-parallel rank.

    Args:
        dataset: the training split, of one folder or of a mixture.
        processing: encodes samples.
        dp_rank, dp_size: this rank among the data-parallel ranks.
        data_workers: N, loader workers over all ranks; a multiple of ``dp_size``.
        micro_batch_size: samples per microbatch; sequences with packing.
        shuffle_buffer_size: samples of a dataset, still encoded, that each worker draws from.
        grouping: which samples come together, of a buffer in each worker; None for those that follow each
            other.
        seed: of the order of samples.
        max_corrupt_rate: share of corrupt samples above which the run stops.
        timeout: seconds to wait for a microbatch.

    Raises:
        ValueError: the split is too small, or ``dp_size`` does not divide ``data_workers``.
    """

    def __init__(
        self,
        dataset: PreparedDataset | Mixture,
        processing: Processing,
        *,
        dp_rank: int,
        dp_size: int,
        data_workers: int,
        micro_batch_size: int,
        shuffle_buffer_size: int = 1000,
        grouping: Packing | LengthGroups | None = None,
        seed: int = 0,
        max_corrupt_rate: float = 0.01,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        if data_workers < 1 or data_workers % dp_size:
            raise ValueError(
                f"--data-workers {data_workers} can't be shared by {dp_size} data-parallel ranks; "
                f"try {max(1, data_workers // dp_size) * dp_size}"
            )
        mixture = dataset if isinstance(dataset, Mixture) else Mixture.of(dataset)
        mixture.check_shares(data_workers)
        per_rank = data_workers // dp_size
        self._worker_ids = range(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        # What must be the same for a saved state to mean the same samples.
        self._identity: Dict[str, Any] = {
            "data": mixture.fingerprint,
            "mixture": mixture.description,
            "data_workers": data_workers,
            "micro_batch_size": micro_batch_size,
            "shuffle_buffer_size": shuffle_buffer_size,
            "grouping": str(grouping or ""),
        }
        worker_config = WorkerConfig(
            rank=dp_rank,
            world_size=dp_size,
            num_workers=per_rank,
            seed_offset=seed,
            global_error_handler=reraise_exception,  # what is not foreseen stops the run, and is not skipped
        )
        encoder = VisionLanguageEncoder(mixture, processing, max_corrupt_rate, grouping, shuffle_buffer_size)
        share = mixture.num_samples // data_workers
        self._workers = Workers(
            encoder.build_train_datasets(
                datasets=mixture.load(worker_config, max_samples_per_sequence=SAMPLES_PER_SLICE),
                blend_mode=mixture.blend_mode,
                worker_config=worker_config,
                batch_size=1 if isinstance(grouping, LengthGroups) else micro_batch_size,
                packing_buffer_size=grouping and grouping.buffer_within(share),
            ),
            dataset.path,
            timeout,
            STATE_SECONDS,
        )
        self._peeked: Taken | None = None
        self._states: Dict[int, Any] = {worker: self._fresh_state() for worker in self._worker_ids}

    @property
    def counts(self) -> Dict[str, int]:
        """The numbers of samples ``seen``, ``truncated``, ``dropped`` and ``corrupt`` on this rank, over
        all resumes."""
        totals: Counter[str] = Counter(seen=0, truncated=0, dropped=0, corrupt=0)
        for state in self._states.values():
            totals.update(state["counts"])
        return dict(totals)

    def peek(self) -> Microbatch:
        """Return the microbatch that ``next()`` will give, without taking it. Forks the workers if need be.

        Raises:
            as ``next()``.
        """
        if self._peeked is None:
            self._peeked = self._workers.take()
        return self._peeked[0]

    def __next__(self) -> Microbatch:
        """Return the next microbatch.

        Raises:
            ValueError: the data can't be read further; one line that says why.
            RuntimeError: a worker died, or gave nothing for ``timeout`` seconds.
        """
        (microbatch, position), self._peeked = self._peeked or self._workers.take(), None
        state = self._states[microbatch.worker]
        state["microbatches"] += 1
        state["counts"] = dict(Counter(state["counts"]) + Counter(microbatch.counts))
        state["since"] += 1
        if position is not None:
            state["position"], state["since"] = position, 0
        return microbatch

    def state_dict(self) -> Dict[int, Any]:
        """Return the place of this loader's consumer, not how far its workers have read ahead.

        Asks no worker: their positions have come with the microbatches.

        Returns:
            one JSON value per global worker id of this rank.
        """
        return {worker: dict(state) for worker, state in self._states.items()}

    def load_state_dict(self, states: Mapping[Any, Any]) -> None:
        """Go on where ``states`` were taken. Must come before the first ``next()``.

        Args:
            states: the values of all N workers, from all ranks' :meth:`state_dict`; keys may be strings.

        Raises:
            ValueError: they are of other data, another number of workers or another version of this code,
                or can't be shared out over this many ranks.
        """
        if self._workers.started:
            raise RuntimeError("load_state_dict comes before the first next()")
        by_worker = {int(worker): state for worker, state in states.items()}
        for state in by_worker.values():
            _check_fields(state, self._fresh_state())
            _check_fields(state["identity"], self._identity)
            check_same_data(state["identity"], self._identity)
        if set(by_worker) != set(range(self._identity["data_workers"])):
            raise ValueError(
                f"the data loader state has {len(by_worker)} of {self._identity['data_workers']} workers; "
                "it is incomplete"
            )
        own = {worker: dict(by_worker[worker]) for worker in self._worker_ids}
        taken = [state["microbatches"] for state in own.values()]
        next_worker = sum(count > taken[-1] for count in taken)
        if taken != [taken[-1] + 1] * next_worker + [taken[-1]] * (len(taken) - next_worker):
            raise ValueError(
                "the data loader state was saved within a global batch, at another data-parallel size; "
                "go on at that size, or from another checkpoint"
            )
        if any(taken):
            self._workers.start_at([(s["position"], s["since"]) for s in own.values()], next_worker)
        self._states = own

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        self._workers.close()

    def _fresh_state(self) -> Dict[str, Any]:
        # A position is what Workers.take() gives along with a microbatch; `since` counts those after it.
        return {
            "identity": self._identity,
            "microbatches": 0,
            "counts": {},
            "position": None,
            "since": 0,
        }


def _check_fields(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a state has this version's fields; others would mean something else."""
    differing = ", ".join(sorted(saved.keys() ^ own.keys()))
    if differing:
        raise ValueError(
            f"the data loader's state was saved by another version of this code (it differs in {differing}); "
            "go on with that version, or start a new run from the checkpoint's weights"
        )


def build_train_loader(config: RunConfig, processing: Processing, dp_rank: int, dp_size: int) -> TrainLoader:
    """Build the training loader of one data-parallel rank, as the run's flags say.

    Raises:
        ValueError: as :meth:`Mixture.open`, ``RunConfig.data_workers`` and :class:`TrainLoader`.
    """
    if config.data.data_path is None:
        raise ValueError("no training data: give --data-path, a folder prepared by energon, or a mixture")
    workers = config.data_workers(dp_size * config.parallel.tp * config.parallel.pp)
    return TrainLoader(
        Mixture.open(config.data.data_path, "train"),
        processing,
        dp_rank=dp_rank,
        dp_size=dp_size,
        data_workers=workers,
        micro_batch_size=config.training.micro_batch_size,
        shuffle_buffer_size=config.data.shuffle_buffer_size,
        grouping=grouping(config, workers),
        seed=config.training.seed,
        max_corrupt_rate=config.data.max_corrupt_rate,
    )


class ValidationLoader:
    """The validation loader: passes over a split's first samples, each time the same, for one data-parallel
    rank.

    The ranks' shares are disjoint and make up the whole; they differ by one sample at most. A share is read
    by one worker of its own, which draws nothing from this process's random generators.

    Args:
        dataset: usually ``Mixture.open(path, "val")``.
        processing: encodes samples.
        dp_rank, dp_size: this rank among the data-parallel ranks.
        micro_batch_size: samples per microbatch; the last one of a pass may have fewer.
        max_samples: samples of the split that are used, over all ranks; None for all. The datasets of a
            mixture share them by their sizes.
        timeout: seconds to wait for a microbatch.
    """

    def __init__(
        self,
        dataset: PreparedDataset | Mixture,
        processing: Processing,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        max_samples: int | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.num_samples = min(dataset.num_samples, max_samples or dataset.num_samples)
        self.max_microbatches = -(-self.num_samples // (dp_size * micro_batch_size))
        """Of any rank, in one pass; samples that can't be used make them fewer."""
        worker_config = WorkerConfig(
            rank=dp_rank, world_size=dp_size, num_workers=1, global_error_handler=reraise_exception
        )
        mixture = dataset if isinstance(dataset, Mixture) else Mixture.of(dataset)
        encoder = VisionLanguageEncoder(mixture, processing, max_corrupt_rate=1.0)
        self._workers = Workers(
            encoder.build_val_datasets(
                datasets=mixture.load(worker_config, mixture.first_samples(self.num_samples)),
                worker_config=worker_config,
                batch_size=micro_batch_size,
            ),
            dataset.path,
            timeout,
        )
        self._peeked: Microbatch | None = None

    def start(self) -> None:
        """Fork the worker and begin the first pass. Comes before this process uses CUDA.

        Raises:
            as :meth:`__iter__`.
        """
        with contextlib.suppress(StopIteration):
            self._peeked = self._workers.take()[0]

    def __iter__(self) -> Iterator[Microbatch]:
        """Yield one pass, in the split's order. The one before must have been read to its end.

        Raises:
            ValueError: the data can't be read; one line that says why.
            RuntimeError: the worker died, or gave nothing for ``timeout`` seconds.
        """
        peeked, self._peeked = self._peeked, None
        if peeked is not None:
            yield peeked
        while True:
            try:
                microbatch, _ = self._workers.take()
            except StopIteration:
                return
            yield microbatch

    def close(self) -> None:
        """End the worker. Safe to call twice."""
        self._workers.close()
