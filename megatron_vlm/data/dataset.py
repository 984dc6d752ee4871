"""Datasets that ``energon prepare`` has prepared.

Their samples are conversations, ``key.json`` with ``messages`` and ``images`` beside ``key.0.jpg``,
``key.1.png``, ..., or a question and its answer: ``key.jpg``, ``key.json`` and ``key.txt``, or as a field map
says.
"""

from __future__ import annotations

import os
import sqlite3
import tarfile
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Sequence, Tuple
from urllib.parse import quote

from megatron.energon import Cooker, CrudeWebdataset, Sample, WorkerConfig, stateless
from megatron.energon.epathlib import EPath
from megatron.energon.metadataset.loader_interface import LoadedDataset

from megatron_vlm.artifacts.dataset import (
    PreparedShard,
    Shard,
    not_prepared,
    prepare_command,
    prepared_shards,
    samples_end,
    shard_counts,
    shards_fingerprint,
)
from megatron_vlm.data.conversations import read_conversation, read_json
from megatron_vlm.data.field_maps import FieldMap, read_field_map
from megatron_vlm.data.shards import ShardReader
from megatron_vlm.data.templates import Turn
from megatron_vlm.system.files import reading

_SHOWN = 200  # characters of what energon says


@dataclass
class RawSample(Sample):
    """A sample's files, not decoded, as they wait in the shuffle buffer."""

    parts: Dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedDataset:
    """One split of a prepared dataset.

    Attributes:
        path: the folder that holds ``.nv-meta``.
        split: ``train``, ``val`` or ``test``.
        shards: in the split's order, all there and whole when it was opened.
        field_map: which file holds what, from ``.nv-meta/dataset.yaml``; None where that has no field map,
            and a sample's JSON tells what it is.
        fingerprint: changes with the shards and with a new ``energon prepare``.
    """

    path: str
    split: str
    shards: Tuple[Shard, ...]
    field_map: FieldMap | None
    fingerprint: str

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def open(cls, path: str, split: str = "train") -> PreparedDataset:
        """Open one split and check that its shards are there and whole.

        Raises:
            ValueError: the folder is missing, not prepared or damaged, or the split is empty; the
                message says what to run.
        """
        meta = os.path.join(path, ".nv-meta")
        if not os.path.isfile(os.path.join(meta, ".info.json")):
            if os.path.isdir(meta):
                raise ValueError(
                    f"--data-path {path}: `energon prepare` did not finish there, as it does not with a "
                    f"truncated or empty tar; mend the shards, then run: {prepare_command(path)}"
                )
            raise ValueError(not_prepared(path))
        counts = shard_counts(path)
        names = _split_shards(path, split)
        if not names:
            raise ValueError(
                f"--data-path {path}: its {split} split is empty ({len(counts)} shards; energon splits by "
                "whole shards); write more shards, or prepare again: "
                + prepare_command(path, "1,0,0" if split == "train" else "9,1,0")
            )
        prepared = prepared_shards(path)
        shards = tuple(_checked_shard(path, name, counts[name], prepared.get(name)) for name in names)
        _check_last_samples(path, names, list(counts))
        return cls(path, split, shards, read_field_map(path), shards_fingerprint(path, split, shards))

    @staticmethod
    def lacks(path: str, split: str) -> bool:
        """Return whether a folder is prepared and has no samples in a split."""
        prepared = os.path.isfile(os.path.join(path, ".nv-meta", ".info.json"))
        return prepared and not _split_shards(path, split)

    def load(self, worker_config: WorkerConfig, **kwargs: Any) -> LoadedDataset:
        """Return the split for a task encoder's ``build_train_datasets`` or ``build_val_datasets``.

        Every sample arrives as its raw files, whatever sample type the folder was prepared for: images
        stay encoded until they have left the shuffle buffer, and a sample may lack one.
        """
        names = self.field_map.files if self.field_map is not None else None
        dataset = _Crude(
            EPath(self.path),
            split_part=self.split,
            training=self.split == "train",
            worker_config=worker_config,
            decoder=None,
            part_filter=lambda part: names is None or part in names,
            **kwargs,
        )
        return LoadedDataset(dataset=dataset)

    def pick(self, which: Sequence[int] | Sequence[str]) -> Iterator[RawSample]:
        """Yield single samples: by their numbers in the split, or by their names, in whatever split they are.

        Raises:
            ValueError: there is none of a name, or what finds them is damaged.
        """
        from megatron.energon.flavors.webdataset.itar_reader import (
            ShardInfosITarReader,
            SqliteITarEntryReader,
        )
        from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

        path = EPath(self.path)
        numbers = all(isinstance(one, int) for one in which)
        shards = WebdatasetMeta.from_config(path, split_part=self.split).shards if numbers else []
        read_from = self.path if numbers else _index(self.path)
        way_on = f"run: {prepare_command(self.path)}"
        with reading(read_from, way_on):
            reader = ShardInfosITarReader(path, shards) if numbers else SqliteITarEntryReader(path)
        for one in which:
            with reading(read_from, way_on):
                try:
                    crude: Any = reader[one]
                except KeyError:
                    crude = None
            if crude is None:
                raise ValueError(f"--data-path {self.path}: there is no sample {one}")
            yield _cook(crude)

    def read(self, sample: RawSample) -> Tuple[List[Turn], Dict[str, List[bytes]]]:
        """Return the turns of a sample, and the files of its media by kind.

        Raises:
            SampleError: a file is missing or malformed (``corrupt``), or a conversation marks more or fewer
                places than it has files of a kind (``dropped``).
        """
        parts = sample.parts
        if self.field_map is None and "json" in parts:
            loaded = read_json(parts["json"])
            if isinstance(loaded, dict) and "messages" in loaded:
                return read_conversation(loaded, parts)
        return (self.field_map or FieldMap()).read(sample.__key__, parts)


class _Crude(CrudeWebdataset):
    """energon's crude dataset with a quicker reader, and the length of its subset, by which a blend weighs
    it."""

    def build(self, worker_rotation_offset: int = 0) -> Any:
        built: Any = super().build(worker_rotation_offset)
        samples = built.dataset
        (reader,) = samples.join_readers
        samples.join_readers = [
            ShardReader(
                self.path,
                self.shards,
                part_filter=self.part_filter,
                sample_filter=self.sample_filter,
                itar_cache_size=reader.itar_cache_size,
            )
        ]
        return built

    def __len__(self) -> int:
        total = super().__len__()
        start, end = self.subset.compute_subset(total) if self.subset is not None else (0, total)
        return int(end - start)


@stateless
def _cook(crude: Dict[str, Any]) -> RawSample:
    parts = {name: value for name, value in crude.items() if isinstance(value, bytes)}
    return RawSample(
        __key__=crude["__key__"],
        __restore_key__=crude["__restore_key__"],
        __subflavors__=crude.get("__subflavors__"),
        __sources__=crude.get("__sources__"),
        parts=parts,
    )


RAW_COOKER = Cooker(_cook)


def _split_shards(path: str, split: str) -> List[str]:
    """Return the shards of a split, as energon reads them."""
    from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
    from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

    try:
        return [shard.name for shard in WebdatasetMeta.from_config(EPath(path), split_part=split).shards]
    except EmptyDatasetError:
        return []
    except Exception as error:  # of any kind, where split.yaml was edited and is no YAML any more
        if "Invalid split part" in str(error):  # energon's words where it was prepared without one
            return []
        reason = (str(error) or type(error).__name__).splitlines()[0][:_SHOWN]
        raise ValueError(
            f"--data-path {path}: the split in .nv-meta can't be read ({reason}); mend split.yaml, or run: "
            + prepare_command(path)
        ) from None


def _checked_shard(path: str, name: str, samples: int, prepared: PreparedShard | None) -> Shard:
    """Check that a shard is there, reaches as far as the index beside it, and is the one that was
    prepared."""
    file_name = os.path.join(path, name)
    try:
        size = os.path.getsize(file_name)
    except OSError:
        raise ValueError(
            f"--data-path {path}: shard {name} is missing; restore it, or run: {prepare_command(path)}"
        ) from None
    end = samples_end(file_name, samples)
    if end is None:
        raise ValueError(
            f"--data-path {path}: {name}.idx, the shard's index, is missing or damaged; restore it, or run: "
            + prepare_command(path)
        )
    if size < end:
        raise ValueError(
            f"--data-path {path}: shard {name} is truncated ({size} bytes; its samples reach to {end}); "
            f"restore it, or run: {prepare_command(path)}"
        )
    difference = prepared.difference(file_name) if prepared is not None else ""
    if difference:
        raise ValueError(
            f"--data-path {path}: shard {name} is not the one that was prepared ({difference}); restore it. "
            f"scripts/data/prepare.py --check {path} names all that is wrong"
        )
    return Shard(name, samples, size)


def _check_last_samples(path: str, names: Sequence[str], indexed: Sequence[str]) -> None:
    """Check that each shard's last sample stands where energon's index has it; another file has another
    there."""
    numbers = {name: number for number, name in enumerate(indexed)}
    query = (
        "select sample_key, byte_offset from samples where tar_file_id = ? order by sample_index desc limit 1"
    )
    rows = index_rows(path, query, [(numbers[name],) for name in names])
    for name, found in zip(names, rows, strict=False):
        with reading(_index(path), f"run: {prepare_command(path)}"):
            stands = not found or _stands_at(os.path.join(path, name), *found[0])
        if not stands:
            raise ValueError(
                f"--data-path {path}: shard {name} is not the one that was prepared (its last sample was "
                f"{found[0][0]}); restore it. scripts/data/prepare.py --check {path} names all that is wrong"
            )


def _stands_at(shard: str, key: str, offset: int) -> bool:
    """Return whether a file of a sample begins at a byte of a tar."""
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            with tarfile.TarFile(fileobj=file) as tar:
                first = tar.next()
                return first is not None and first.name.startswith(f"{key}.")
    except tarfile.TarError:
        return False


def _index(path: str) -> str:
    return os.path.join(path, ".nv-meta", "index.sqlite")


def index_rows(path: str, query: str, values: Sequence[Tuple[Any, ...]]) -> List[List[Tuple[Any, ...]]]:
    """Return the rows of energon's index, a list for each of ``values``; none where the folder has no
    index."""
    index = os.path.abspath(_index(path))
    try:
        # Read without locks, of which a shared file system may have none.
        with closing(sqlite3.connect(f"file:{quote(index)}?mode=ro&immutable=1", uri=True)) as connection:
            return [list(connection.execute(query, value)) for value in values]
    except sqlite3.Error:
        return []
