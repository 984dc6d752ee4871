"""Samples of indexed shards, each in one read.

energon reads through one ``tarfile`` object for each shard, which keeps a record of every file that was ever
read from it: memory that grows with the epochs, and that the garbage collector looks through.
"""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from bisect import bisect_right
from collections import OrderedDict
from typing import Any, BinaryIO, Dict, Iterator, List, Tuple

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.source_info import SourceInfo

_BLOCK = 512  # bytes; of headers, and what files are filled up to


class ShardReader(ShardInfosITarReader):
    """The reader of a split's shards: the same samples as energon's, by their numbers in the split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._files: OrderedDict[int, Tuple[BinaryIO, array[int]]] = OrderedDict()  # the last used at the end

    def __getitem__(self, idx: int) -> Any:
        """Return a sample as energon's ``FilteredSample``; None if the split excludes it.

        Raises:
            ValueError: the shard is no tar there, or ends before the sample does, or its files don't belong
                together.
            OSError: the shard or its index can't be read.
        """
        number = bisect_right(self.shard_count_cumsum, idx) - 1
        shard = self.shard_infos[number].name
        file, offsets = self._open(number)
        within = idx - self.shard_count_cumsum[number]
        if within + 1 >= len(offsets):
            raise ValueError(f"the index of {shard} has no sample {within}")
        start, end = offsets[within], offsets[within + 1]
        data = os.pread(file.fileno(), end - start, start)
        if len(data) < end - start:
            raise ValueError(f"Unexpected end of tar file: {shard}")
        key, names, parts = "", [], {}
        for name, content in self._members(data, shard, within):
            matched = split_name_re.match(name)
            if skip_meta_re.match(name) or not matched:
                continue
            base, extension = matched.groups()
            if key and base != key:
                raise ValueError(f"Inconsistent sample base name: {key} vs {base}")
            key = base
            if self.part_filter is None or self.part_filter(extension):
                parts[extension] = content
                names.append(name)
        if not key:
            raise ValueError(f"No valid files found in sample {idx} of {shard}")
        if self.sample_filter is not None and not self.sample_filter(f"{shard}/{key}"):
            return None
        source = SourceInfo(dataset_path=self.base_path, index=idx, shard_name=shard, file_names=tuple(names))
        found: Dict[str, Any] = {"__key__": key, "__shard__": shard, "__sources__": (source,), **parts}
        return {**found, "__restore_key__": ("Webdataset", idx)}

    @staticmethod
    def _members(data: bytes, shard: str, number: int) -> List[Tuple[str, bytes]]:
        try:
            return members(data)
        except tarfile.TarError as error:
            raise ValueError(f"{shard} is damaged at its sample {number} ({error})") from None

    def _open(self, number: int) -> Tuple[BinaryIO, array[int]]:
        """Open a shard; return it, and where in it the samples begin and the last one ends."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        path = str(self.shard_infos[number].path.local_path())
        self._files[number] = open(path, "rb", buffering=0), read_index(path)
        if len(self._files) > self.itar_cache_size:
            _, (oldest, _) = self._files.popitem(last=False)
            oldest.close()
        return self._files[number]


def read_index(shard: str) -> array[int]:
    """Return where in a shard the samples begin and the last one ends, by the index that energon wrote beside
    it.

    Raises:
        OSError: it can't be read.
        ValueError: it is cut off.
    """
    offsets = array("Q")
    with open(shard + ".idx", "rb") as index:
        offsets.frombytes(index.read())
    return offsets


def members(data: bytes) -> List[Tuple[str, bytes]]:
    """Return names and contents of the files in a piece of a tar, as ``tarfile`` gives them.

    Raises:
        tarfile.TarError: it is no such piece.
    """
    found: List[Tuple[str, bytes]] = []
    start = 0
    while start < len(data):
        header = data[start : start + _BLOCK]
        size = header[124:135]
        # Anything but a plain file with a short name: long names, links, folders, more than 8 GiB, damage.
        if header[156:157] not in (b"0", b"\0") or not size.isdigit() or not _is_sound(header):
            return list(_by_tarfile(data))
        name, prefix = (text.partition(b"\0")[0] for text in (header[:100], header[345:500]))
        if prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        content = start + _BLOCK
        end = content + int(size, 8)
        found.append((name.decode("utf-8", "surrogateescape"), data[content:end]))
        start = end + -end % _BLOCK
    return found


def _is_sound(header: bytes) -> bool:
    """Return whether a header has the checksum that it says."""
    said = header[148:156].strip(b" \0")
    return said.isdigit() and int(said, 8) == sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


def _by_tarfile(data: bytes) -> Iterator[Tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()
        if tar.offset < len(data):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset} of it")
