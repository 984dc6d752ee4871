"""Datasets drawn from together: by energon's blend, in the proportions of a mixture's file."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Dict, List, Tuple

from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.structs import DatasetSubset
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset

from megatron_vlm.artifacts.mixture import MixtureConfig, SourceConfig, Subset, check_shares, is_mixture
from megatron_vlm.data.dataset import PreparedDataset, RawSample
from megatron_vlm.data.processing import Processing
from megatron_vlm.plan.data_order import mixture_fingerprint

_SOURCE = "source"  # the subflavor that says which of the datasets a sample is from


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture. ``config`` is None for a folder that is all there is."""

    dataset: PreparedDataset
    config: SourceConfig | None
    start: int
    end: int  # exclusive
    epochs: int = 1

    @property
    def name(self) -> str:
        return self.config.name if self.config is not None else ""

    @property
    def num_samples(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Mixture:
    """One split of one or more prepared datasets.

    Attributes:
        path: what ``--data-path`` names.
        sources: in the file's order.
        weighted: samples come by the datasets' weights, without end; else each dataset comes for its number
            of epochs, mixed evenly.
    """

    path: str
    split: str
    sources: Tuple[Source, ...]
    weighted: bool = False

    @classmethod
    def open(cls, path: str, split: str = "train") -> Mixture:
        """Open one split of a prepared folder, or of all datasets of a mixture's file.

        For ``val`` and ``test``, datasets of a mixture without such a split are left out, as long as one has
        it, and each of the others comes once.

        Raises:
            ValueError: a dataset can't be read, a subset isn't there, or nothing is left; one line.
        """
        if not is_mixture(path):
            return cls.of(PreparedDataset.open(path, split))
        config = MixtureConfig.load(path)
        sources = []
        for source in config.of_split(split):
            try:
                if split != "train" and PreparedDataset.lacks(source.path, split):
                    continue
                dataset = PreparedDataset.open(source.path, split)
                subset, epochs = (source.subset, source.passes) if split == "train" else (Subset(), 1)
                sources.append(Source(dataset, source, *subset.bounds(dataset.num_samples), epochs))
            except ValueError as error:
                reason = str(error).replace(f"--data-path {source.path}: ", f"{source.path}: ", 1)
                raise ValueError(f"--data-path {path}: dataset {source.name}: {reason}") from None
        if not sources:
            raise ValueError(
                f"--data-path {path}: none of its datasets has a {split} split with samples; prepare one anew"
            )
        return cls(path, split, tuple(sources), config.weighted and split == "train")

    @classmethod
    def of(cls, dataset: PreparedDataset) -> Mixture:
        """Return the mixture that is a single dataset, all of it."""
        return cls(dataset.path, dataset.split, (Source(dataset, None, 0, dataset.num_samples),))

    @property
    def names(self) -> Tuple[str, ...]:
        """The datasets' names; empty for a single folder."""
        return tuple(source.name for source in self.sources if source.config is not None)

    @property
    def num_samples(self) -> int:
        """The number of samples of one pass: every sample of each dataset, as often as its epochs say.

        With weights, as many draws as there are samples, whatever their datasets.
        """
        return sum(source.num_samples * source.epochs for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """A string that changes with the datasets and their parts, not with :attr:`description`."""
        return mixture_fingerprint({source.name: source.dataset.fingerprint for source in self.sources})

    @property
    def description(self) -> Dict[str, str]:
        """The file's words for each dataset; empty for a single folder."""
        return {source.name: str(source.config) for source in self.sources if source.config is not None}

    @property
    def blend_mode(self) -> DatasetBlendMode:
        """The way in which energon draws from the datasets that :meth:`load` gives."""
        if self.weighted:
            return DatasetBlendMode.DATASET_WEIGHT
        return DatasetBlendMode.SAMPLE_REPETITIONS if self.names else DatasetBlendMode.NONE

    def load(
        self, worker_config: WorkerConfig, limits: Tuple[int, ...] | None = None, **kwargs: Any
    ) -> List[LoadedDataset]:
        """Return the datasets for a task encoder's ``build_train_datasets`` or ``build_val_datasets``.

        Args:
            limits: how many samples of each are read, the first ones.
            kwargs: for energon's dataset.
        """
        loaded = []
        for number, source in enumerate(self.sources):
            end = source.end if limits is None else source.start + limits[number]
            if end == source.start:
                continue
            entry = source.dataset.load(
                worker_config,
                subset=DatasetSubset(absolute_range=(source.start, end)),
                subflavors={_SOURCE: number},
                **kwargs,
            )
            if self.weighted:
                entry.weight = source.config.weight if source.config is not None else None
            else:
                entry.repetitions = source.epochs
            loaded.append(entry)
        return loaded

    def first_samples(self, count: int) -> Tuple[int, ...]:
        """Return how many of ``count`` samples each dataset has, in proportion to their sizes.

        The shares are rounded so that they add up to ``count``, or to all there are.
        """
        total = self.num_samples
        count = min(count, total)
        ends = list(accumulate((source.num_samples for source in self.sources), initial=0))
        return tuple(after * count // total - before * count // total for before, after in pairwise(ends))

    def check_shares(self, data_workers: int) -> None:
        """Check that every worker has samples: of each dataset where weights say how many come from it.

        Raises:
            ValueError: there are fewer samples than workers.
        """
        shares = {f"--data-path {self.path}": self.num_samples}
        if self.weighted:
            shares = {
                f"--data-path {self.path}: dataset {source.name}": source.num_samples
                for source in self.sources
            }
        check_shares(shares, self.split, data_workers)

    def source_of(self, sample: RawSample) -> int:
        """Return the index of the dataset that a sample of :meth:`load` is from."""
        return int((sample.__subflavors__ or {}).get(_SOURCE, 0))

    def processings(self, processing: Processing) -> Tuple[Processing, ...]:
        """Return the processing of each dataset's samples.

        Args:
            processing: as the run's flags say; a mixture's file may say otherwise.

        Raises:
            ValueError: a template doesn't fit the tokenizer.
        """
        found = []
        for source in self.sources:
            options = source.config.options if source.config is not None else {}
            try:
                found.append(processing.varied(**options))
            except ValueError as error:
                raise ValueError(f"--data-path {self.path}: dataset {source.name}: {error}") from None
        return tuple(found)
