"""The energon task encoder: raw samples to microbatches, and what happens to the ones that can't be used."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Callable, List

from megatron.energon import SkipSample, TaskEncoder, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError

from megatron_vlm.data.batch import Microbatch, Sample, collate
from megatron_vlm.data.dataset import RAW_COOKER, PreparedDataset, RawSample
from megatron_vlm.data.processing import Processing
from megatron_vlm.data.templates import SampleError

logger = logging.getLogger(__name__)

MIN_SEEN_FOR_RATE = 100  # samples per worker before a rate of corrupt ones means anything
MAX_UNUSABLE_IN_A_ROW = 1000  # a worker that finds nothing to train on must not search for ever
MESSAGES_PER_WORKER = 20

STOPPED = "[data] "  # begins the message of an error that ends the run, also after a worker's traceback


class VisionLanguageEncoder(TaskEncoder[RawSample, Sample, Microbatch, Microbatch]):
    """Encodes, counts and batches in a loader worker; each worker has its own copy after the fork.

    No method draws random numbers, so that the loader's state needs none of the global generators'.

    Args:
        dataset: reads a raw sample's fields.
        processing: encodes them.
        max_corrupt_rate: share of unreadable samples above which the run stops, 0 to 1.
    """

    decoder = None
    cookers = (RAW_COOKER,)

    def __init__(self, dataset: PreparedDataset, processing: Processing, max_corrupt_rate: float) -> None:
        self._dataset = dataset
        self._processing = processing
        self._max_corrupt_rate = max_corrupt_rate
        self._counts: Counter[str] = Counter()  # since this worker's last microbatch
        self._totals: Counter[str] = Counter()  # since this worker started
        self._unusable_in_a_row = 0

    @stateless
    def encode_sample(self, sample: RawSample) -> Sample:
        """Tokenise and decode.

        Raises:
            SkipSample: it can't be used; it is counted and its reason logged.
            FatalSampleError: too many can't.
        """
        self._count("seen")
        try:
            turns, images = self._dataset.read(sample)
            encoded = self._processing.encode(sample.__key__, turns, images)
        except SampleError as error:
            self._count(error.kind)
            self._report(sample, error)
            self._check_rates(error)
            raise SkipSample() from None
        except Exception as error:  # not foreseen: stops the run, and says where
            raise RuntimeError(f"encoding {_name(sample)} failed") from error
        if encoded.truncated:
            self._count("truncated")
        self._unusable_in_a_row = 0
        return encoded

    @stateless
    def batch(self, samples: List[Sample]) -> Microbatch:
        """Collate, and hand over the counts since the previous microbatch."""
        microbatch = collate(samples, self._processing.pad_token_id, self._processing.images.shape)
        microbatch.counts = dict(self._counts)
        microbatch.worker = _worker_config().global_worker_id()
        self._counts.clear()
        return microbatch

    def _count(self, name: str) -> None:
        self._counts[name] += 1
        self._totals[name] += 1

    def _report(self, sample: RawSample, error: SampleError) -> None:
        reported = self._totals["corrupt"] + self._totals["dropped"]
        log: Callable[..., None] = logger.warning if reported <= MESSAGES_PER_WORKER else logger.debug
        log("%s is skipped (%s): %s", _name(sample), error.kind, error)
        if reported == MESSAGES_PER_WORKER:
            logger.warning("this loader worker goes on counting, without a message for each")

    def _check_rates(self, error: SampleError) -> None:
        self._unusable_in_a_row += 1
        seen, corrupt = self._totals["seen"], self._totals["corrupt"]
        if seen >= MIN_SEEN_FOR_RATE and corrupt > self._max_corrupt_rate * seen:
            raise FatalSampleError(
                f"{STOPPED}{corrupt} of {seen} samples are corrupt, more than --max-corrupt-rate "
                f"{self._max_corrupt_rate:g} allows; the last one: {error}"
            )
        if self._unusable_in_a_row >= MAX_UNUSABLE_IN_A_ROW:
            raise FatalSampleError(
                f"{STOPPED}{self._unusable_in_a_row} samples in a row can't be used; the last one: {error}"
            )


def _name(sample: RawSample) -> str:
    shard = sample.__sources__[0].shard_name if sample.__sources__ else "unknown shard"
    return f"sample {sample.__key__} of {shard}"


def _worker_config() -> WorkerConfig:
    config = WorkerConfig.active_worker_config
    assert config is not None, "the encoder runs inside a loader"
    return config
