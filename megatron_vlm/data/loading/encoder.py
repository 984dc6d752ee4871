"""The energon task encoder: raw samples to microbatches; samples that can't be used are skipped and
counted."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List

from megatron import energon
from megatron.energon import SkipSample, TaskEncoder, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError

from megatron_vlm.data.batch import Microbatch, Sample, collate, collate_packed, fill_up
from megatron_vlm.data.conversations import identity_of, read_json
from megatron_vlm.data.dataset import RAW_COOKER, RawSample
from megatron_vlm.data.loading.shuffle import EpochShuffle
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.processing import Opened, Processing
from megatron_vlm.data.templates import SampleError
from megatron_vlm.plan.grouping import LengthGroups, Packing

logger = logging.getLogger(__name__)

MIN_SEEN_FOR_RATE = 100  # samples per worker before a rate of corrupt ones means anything
MAX_UNUSABLE_IN_A_ROW = 1000  # a worker that finds nothing to train on must not search for ever
MESSAGES_PER_WORKER = 20
_MOST_OF_ID = 200  # characters

STOPPED = "[data] "  # begins the message of an error that ends the run, also after a worker's traceback


@dataclass
class Tokenized(energon.Sample):
    """A sample whose media are not decoded yet, as it waits in the buffer from which groups are chosen."""

    sample: Sample
    opened: Opened
    record: bytes  # the sample's JSON, for its name in messages


class VisionLanguageEncoder(TaskEncoder[RawSample, Any, Microbatch, Microbatch]):
    """The encoder of a loader worker: it encodes, counts and batches.

    Each worker has its own copy after the fork.

    No method draws from a global random generator, so that the loader's state needs none of their states.

    Args:
        mixture: reads a raw sample's fields, and says how its dataset's samples are encoded.
        processing: how they are, where it doesn't say.
        max_corrupt_rate: share of unreadable samples above which the run stops, 0 to 1.
        grouping: which samples of a buffer come together; None for those that follow each other.
        shuffle_buffer_size: samples of a dataset, still encoded, that a worker draws from; 0: in order.
    """

    decoder = None
    cookers = (RAW_COOKER,)

    def __init__(
        self,
        mixture: Mixture,
        processing: Processing,
        max_corrupt_rate: float,
        grouping: Packing | LengthGroups | None = None,
        shuffle_buffer_size: int = 0,
    ) -> None:
        self._mixture = mixture
        self._processings = mixture.processings(processing)
        self._processing = processing
        self._max_corrupt_rate = max_corrupt_rate
        self._grouping = grouping
        self._shuffle_buffer_size = shuffle_buffer_size
        self._counts: Counter[str] = Counter()  # since this worker's last microbatch
        self._totals: Counter[str] = Counter()  # since this worker started
        self._unusable_in_a_row: Counter[str] = Counter()  # by what was done to them

    @stateless
    def preencode_sample(self, sample: RawSample) -> Tokenized:
        """Read and tokenise a sample.

        Raises:
            SkipSample: it can't be used; it is counted and its reason logged.
            FatalSampleError: too many can't.
        """
        self._totals["seen"] += 1
        source = self._mixture.source_of(sample)
        with self._usable(sample, "tokenizing"):
            turns, files = self._mixture.sources[source].dataset.read(sample)
            opened = self._processing.open(files)
            tokenized = self._processings[source].tokenize(sample.__key__, turns, opened)
        tokenized.source = source
        return Tokenized.derive_from(sample, sample=tokenized, opened=opened, record=_record(sample))

    @stateless
    def postencode_sample(self, sample: Tokenized) -> Sample:
        """Decode the media of a sample.

        Raises:
            as :meth:`preencode_sample`.
        """
        with self._usable(sample, "decoding"):
            decoded = self._processings[sample.sample.source].decode(sample.sample, sample.opened)
        # Counted here, since a buffer of tokenised samples is made again on a restore.
        self._counts["seen"] += 1
        self._counts["truncated"] += decoded.truncated
        return decoded

    def select_samples_to_pack(self, samples: List[Tokenized]) -> List[List[Tokenized]]:
        """Share a full buffer out into groups."""
        assert self._grouping is not None
        groups = self._grouping.select(
            [len(sample.sample.input_ids) for sample in samples],
            [bool(sample.sample.media) for sample in samples],
            # How many buffers this worker has had, whatever number of workers its rank has.
            self.current_sample_index // max(1, _worker_config().num_workers),
        )
        return [[samples[index] for index in group] for group in groups]

    @stateless
    def pack_selected_samples(self, samples: List[Sample]) -> List[Sample]:
        """Return a group, less those of its samples that could not be decoded.

        Raises:
            SkipSample: that is all of them.
        """
        if not samples:
            raise SkipSample()
        return samples

    @stateless
    def batch(self, samples: List[Any]) -> Microbatch:
        """Collate samples, and hand over the counts since the previous microbatch.

        Args:
            samples: groups of samples where there is a grouping.
        """
        pad = self._processing.pad_token_id
        if self._grouping is None:
            microbatch = collate(samples, pad)
        elif isinstance(self._grouping, Packing):
            microbatch = collate_packed([sample for group in samples for sample in group], pad)
        else:
            (group,) = samples
            microbatch = fill_up(collate(group, pad), self._grouping.size, pad)
        microbatch.counts = {name: count for name, count in self._counts.items() if count}
        microbatch.worker = _worker_config().global_worker_id()
        self._counts.clear()
        return microbatch

    def build_cook_crude_sample(self, dataset: Any, *, worker_config: WorkerConfig, **options: Any) -> Any:
        """Build the dataset that reads samples as energon does, shuffled: here a dataset is not repeated
        yet, nor mixed with others."""
        cooked = super().build_cook_crude_sample(dataset, worker_config=worker_config, **options)
        if self._shuffle_buffer_size <= 1:
            return cooked
        return EpochShuffle(cooked, self._shuffle_buffer_size, worker_config=worker_config)

    def build_batch(self, dataset: Any, *, packing_buffer_size: int | None = None, **options: Any) -> Any:
        """Build the dataset that batches as energon does, without a progress bar for each worker."""
        built = super().build_batch(dataset, packing_buffer_size=packing_buffer_size, **options)
        if packing_buffer_size is not None:
            fill = built.dataset._fill_reading_buffer
            built.dataset._fill_reading_buffer = lambda source, log_progress=False: fill(source)
        return built

    @contextlib.contextmanager
    def _usable(self, sample: RawSample | Tokenized, what: str) -> Iterator[None]:
        """Skip and count the sample if it can't be used."""
        try:
            yield
        except SampleError as error:
            for name in ("seen", error.kind):
                self._counts[name] += 1
            self._totals[error.kind] += 1
            self._report(sample, error)
            self._check_rates(sample, error, what)
            raise SkipSample() from None
        except Exception as error:  # not foreseen: stops the run, and says where
            raise RuntimeError(f"{what} {_name(sample)} failed") from error
        self._unusable_in_a_row[what] = 0

    def _report(self, sample: RawSample | Tokenized, error: SampleError) -> None:
        reported = self._totals["corrupt"] + self._totals["dropped"]
        log: Callable[..., None] = logger.warning if reported <= MESSAGES_PER_WORKER else logger.debug
        log("%s is skipped (%s): %s", _name(sample), error.kind, error)
        if reported == MESSAGES_PER_WORKER:
            logger.warning("this loader worker goes on counting, without a message for each")

    def _check_rates(self, sample: RawSample | Tokenized, error: SampleError, what: str) -> None:
        self._unusable_in_a_row[what] += 1
        seen, corrupt = self._totals["seen"], self._totals["corrupt"]
        if seen >= MIN_SEEN_FOR_RATE and corrupt > self._max_corrupt_rate * seen:
            raise FatalSampleError(
                f"{STOPPED}{corrupt} of {seen} samples are corrupt, more than --max-corrupt-rate "
                f"{self._max_corrupt_rate:g} allows; the last one: {_name(sample)}: {error}"
            )
        if self._unusable_in_a_row[what] >= MAX_UNUSABLE_IN_A_ROW:
            raise FatalSampleError(
                f"{STOPPED}{MAX_UNUSABLE_IN_A_ROW} samples in a row can't be used; the last one: "
                f"{_name(sample)}: {error}"
            )


def _name(sample: RawSample | Tokenized) -> str:
    """Name a sample by its key and shard, and by its owner's id; its JSON is parsed for messages alone."""
    shard = sample.__sources__[0].shard_name if sample.__sources__ else "unknown shard"
    record = _record(sample) if isinstance(sample, RawSample) else sample.record
    try:
        identity = identity_of(read_json(record))
    except (SampleError, AttributeError):  # no JSON, or no object
        identity = None
    own = "" if identity is None else f" (id {' '.join(str(identity).split())[:_MOST_OF_ID]})"
    return f"sample {sample.__key__} of {shard}{own}"


def _record(sample: RawSample) -> bytes:
    return next((part for name, part in sample.parts.items() if name.endswith("json")), b"")


def _worker_config() -> WorkerConfig:
    config = WorkerConfig.active_worker_config
    assert config is not None, "the encoder runs inside a loader"
    return config
