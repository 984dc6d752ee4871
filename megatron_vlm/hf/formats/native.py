"""megatron-core's ``torch_dist`` checkpoints, written and read by one process without megatron-core.

The format is that of ``torch.distributed.checkpoint``: ``.metadata``, a pickle that says for every
tensor its global shape, its chunks, and in which ``.distcp`` file each chunk lies; the chunks, each
as ``torch.save`` writes it; and megatron-core's ``metadata.json`` and ``common.pt``. Chunks of any
grid are put together again, so a checkpoint may come from any layout.

Source: torch ``distributed/checkpoint/filesystem.py``; megatron-core
``dist_checkpointing/strategies/torch.py``.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_vlm.artifacts.checkpoint import BASE, FILES, MANIFEST, checkpoint_layers, read_manifest
from megatron_vlm.artifacts.torch_dist import METADATA, check_shards, load_metadata
from megatron_vlm.hf.formats.stored import Stored, read_into, reason, saved_tensors, send_to_disk, stored_hash
from megatron_vlm.hf.formats.streaming import HASH, as_bytes, digest
from megatron_vlm.hf.tables.ops import Chunk, Shape
from megatron_vlm.system.files import check_readable

_BYTES_PER_FILE = 4 << 30
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# What torch and megatron-core put into .metadata. Each is plain data; none can be called to any effect.
_ADMITTED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
        planner.SavePlan,
        planner.WriteItem,
        planner.WriteItemType,
        planner.TensorWriteData,
        planner.BytesIOWriteData,
        torch.Size,
    )
}
_ADMITTED["torch.serialization", "_get_layout"] = torch.serialization._get_layout
_ADMITTED["collections", "OrderedDict"] = dict
for _path in ("pathlib", "pathlib._local"):  # the second is what Python 3.13 writes
    _ADMITTED[_path, "PosixPath"] = pathlib.PurePosixPath
for _name, _value in vars(torch).items():
    if isinstance(_value, torch.dtype):
        _ADMITTED["torch", _name] = _value


def _enum_member(kind: Any, name: Any) -> Any:
    """Return a member of an enum: in place of ``getattr``, with which Python 3.11.0 to 3.11.3 pickle one."""
    if kind not in (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType):
        raise pickle.UnpicklingError(f"asks for an attribute of {kind!r}")
    return kind[name]


_ADMITTED["builtins", "getattr"] = _enum_member


def _admitted(module: str, name: str) -> Any:
    try:
        return _ADMITTED[module, name]
    except KeyError:
        raise pickle.UnpicklingError(f"asks for {module}.{name}") from None


def read_metadata(folder: str | os.PathLike[str]) -> metadata.Metadata:
    """Read ``.metadata`` of a ``torch_dist`` checkpoint without running anything that it holds.

    Raises:
        ValueError: the file is missing or damaged, or holds anything but metadata.
    """
    path, loaded = Path(folder) / METADATA, load_metadata(Path(folder), _admitted)
    if not isinstance(loaded, metadata.Metadata):
        raise ValueError(f"{path}: refused, holds a {type(loaded).__name__} instead of metadata")
    for info in (loaded.storage_data or {}).values():
        if os.path.basename(info.relative_path) != info.relative_path:
            raise ValueError(f"{path}: refused, names {info.relative_path!r}, not a file of the checkpoint")
    return loaded


def check_before_loading(folder: str | os.PathLike[str]) -> None:
    """Check a folder before ``dist_checkpointing.load``: nothing in it is executed, and no file is missing or
    cut off.

    torch unpickles without restraint both ``.metadata`` and what ``.metadata`` calls bytes, so a
    checkpoint may hold tensors only, which are read with ``weights_only``.

    Raises:
        ValueError: the message names the file.
    """
    loaded = read_metadata(folder)
    for name, entry in loaded.state_dict_metadata.items():
        if type(entry) is not metadata.TensorStorageMetadata:
            raise ValueError(f"{Path(folder) / METADATA}: refused, {name} is not a tensor")
    check_shards(Path(folder), loaded)
    common = Path(folder) / "common.pt"
    check_readable(common)
    try:
        torch.load(common, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{common}: refused or damaged ({reason(error)})") from None


@dataclass(frozen=True)
class Part:
    """Bytes of a file, and the hash that a manifest promises of them."""

    start: int
    length: int
    hash: str

    def is_in(self, path: Path) -> bool:
        """Return whether the file holds the bytes that were written.

        Raises:
            ValueError: the file ends before it, or is a pipe.
        """
        check_readable(path)
        return stored_hash(path, self.start, self.length) == self.hash


def promised_parts(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[Part]]:
    """Return the parts that the manifest of a trained checkpoint has hashes of, by file: every byte of each.

    Raises:
        ValueError: the manifest is damaged.
    """
    parts = {}
    for file, entry in manifest.get(FILES, {}).items():
        try:
            hashes = {int(start): str(value) for start, value in entry[HASH].items()}
            ends = [*list(hashes)[1:], int(entry["bytes"])]
            own = [Part(start, end - start, hashes[start]) for start, end in zip(hashes, ends, strict=True)]
            if min(hashes) != 0 or any(part.length < 0 for part in own):
                raise ValueError("a byte is in no part")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{folder / MANIFEST}: {FILES} is damaged at {file}") from None
        parts[file] = own
    return parts


class NativeReader:
    """The reader of a ``torch_dist`` checkpoint's tensors: each whole, whatever grid it was cut into.

    Where training wrote it, each chunk is compared with its hash.

    Args:
        folder: the checkpoint's folder.
        loaded: what its ``.metadata`` holds, where that is known already.

    Raises:
        ValueError: the checkpoint is damaged; the message names the file or the tensor.
    """

    def __init__(self, folder: str | os.PathLike[str], loaded: metadata.Metadata | None = None) -> None:
        self.path = Path(folder)
        loaded = loaded or read_metadata(folder)
        self._tensors = {
            name: entry
            for name, entry in loaded.state_dict_metadata.items()
            if isinstance(entry, metadata.TensorStorageMetadata)
        }
        self._where = {
            (index.fqn, tuple(index.offset)): info
            for index, info in (loaded.storage_data or {}).items()
            if index.offset is not None
        }
        manifest = read_manifest(folder) if (self.path / MANIFEST).is_file() else {}
        parts = promised_parts(self.path, manifest)
        self._parts = {(file, part.start): part for file in parts for part in parts[file]}

    @property
    def names(self) -> list[str]:
        """All tensors of the checkpoint, those of the optimizer too."""
        return list(self._tensors)

    def shape(self, name: str) -> Shape:
        """Return the global shape of a tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, in its stored dtype.

        Raises:
            ValueError: a chunk is missing, damaged, or its shape is not what the metadata says.
        """
        entry = self._tensors[name]
        chunks = [Chunk(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
        whole = tuple(entry.size)
        # Of chunks that don't overlap, the sizes tell whether one is missing.
        covered = sum(chunk.numel for chunk in chunks) == math.prod(whole)
        overlap = any(one.overlaps(other) for one, other in itertools.combinations(chunks, 2))
        if not covered or overlap or not all(chunk.is_in(whole) for chunk in chunks):
            raise ValueError(f"{self.path}: {name}: the chunks don't cover the tensor of {list(whole)}")
        result = torch.empty(whole, dtype=entry.properties.dtype)
        for chunk in chunks:
            self._read_chunk(name, chunk, chunk.of(result))
        return result

    def first_bytes(self, name: str, elements: int) -> bytes:
        """Return the first elements as they are stored, without reading the whole tensor.

        Raises:
            ValueError: as :meth:`read`.
        """
        stored = self._stored(name, (0,) * len(self._tensors[name].size))
        result = torch.empty(min(elements, math.prod(stored.shape)), dtype=stored.dtype)
        read_into(stored.path, stored.start, result)
        return bytes(as_bytes(result))

    def check_all(self) -> None:
        """Check that every chunk is where the metadata says, as far as its beginning tells.

        Raises:
            ValueError: as :meth:`read`.
        """
        for name, offset in self._where:
            self._stored(name, offset)

    def _read_chunk(self, name: str, chunk: Chunk, out: Tensor) -> None:
        self._check_hash(name, chunk.offset)
        stored = self._stored(name, chunk.offset)
        if stored.shape != chunk.shape or stored.dtype != out.dtype:
            raise ValueError(
                f"{stored.path}: {name} is not the chunk of {list(chunk.shape)} that is promised"
            )
        stored.read(out)

    def _check_hash(self, name: str, offset: Shape) -> None:
        where = self._where.get((name, offset))
        part = None if where is None else self._parts.get((where.relative_path, where.offset))
        if where is not None and part is not None:
            path = self.path / where.relative_path
            if path.exists() and not part.is_in(path):
                raise ValueError(f"{path} is not what was written ({name}); copy the checkpoint again")

    def _stored(self, name: str, offset: Shape) -> Stored:
        """Return the place of the chunk at ``offset``."""
        try:
            where = self._where[name, offset]
        except KeyError:
            raise ValueError(f"{self.path}: {name}: the chunk at {list(offset)} is not stored") from None
        path = self.path / where.relative_path
        check_readable(path)
        try:
            stored = saved_tensors(path, where.offset, where.length)
        except Exception as error:  # torch raises many types for damaged files
            raise ValueError(f"{path}: {name} cannot be read ({reason(error)})") from None
        if not isinstance(stored, Stored):
            raise ValueError(f"{path}: {name} is no tensor")
        return stored


class LayeredReader:
    """The reader of a checkpoint that may hold trained weights only; the others come from the one below it.

    Args:
        folders: of :func:`~megatron_vlm.artifacts.checkpoint.checkpoint_layers`, the one with all weights
            first.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.path = folders[-1]
        self._readers = {name: reader for reader in map(NativeReader, folders) for name in reader.names}

    @property
    def names(self) -> list[str]:
        """All tensors, those of the optimizer too."""
        return list(self._readers)

    def folder(self, name: str) -> Path:
        """Return the folder that a tensor is read from."""
        return self._readers[name].path

    def shape(self, name: str) -> Shape:
        """Return the global shape of a tensor."""
        return self._readers[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._readers[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, in its stored dtype."""
        return self._readers[name].read(name)

    def fingerprint(self) -> str:
        """Return a hash that tells these weights from others, wherever they lie and however they were cut.

        It is SHA-256 over the name and the first eight elements of every tensor of the model.
        """
        digest = hashlib.sha256()
        for name in sorted(name for name in self.names if not name.startswith("optimizer.")):
            digest.update(name.encode() + b"\0" + self._readers[name].first_bytes(name, 8))
        return digest.hexdigest()


def open_weights(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> LayeredReader:
    """Return the weights of a checkpoint, over those that it was trained from if it holds trained weights
    only.

    Args:
        path: a checkpoint folder, a root, or a run folder.
        base: where the checkpoint with all weights is, if it has moved.

    Raises:
        ValueError: it isn't there, or holds other weights than it did.
    """
    folders = checkpoint_layers(path, base)
    for number, folder in enumerate(folders[1:], start=1):
        below = LayeredReader(folders[:number])
        if below.fingerprint() != read_manifest(folder)[BASE].get("fingerprint"):
            raise ValueError(
                f"{folder} was trained from other weights than {below.path} holds; say with --base where "
                "those are"
            )
    return LayeredReader(folders)


class NativeWriter:
    """The writer of a ``torch_dist`` checkpoint, tensor by tensor; it holds one chunk at a time.

    Args:
        folder: an existing folder.
        common: what every rank loads, plain values only.
    """

    def __init__(self, folder: str | os.PathLike[str], common: dict[str, Any] | None = None) -> None:
        self.path = Path(folder)
        self._common = common or {}
        self._tensors: dict[str, metadata.STORAGE_TYPES] = {}
        self._where: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
        self._count = 0
        self._file: IO[bytes] | None = None

    def write(self, name: str, tensor: Tensor, chunks: Sequence[Chunk]) -> None:
        """Write a whole tensor, cut into ``chunks``, which must be a partition of it."""
        self._tensors[name] = metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=tensor.dtype),
            size=tensor.shape,
            chunks=[metadata.ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in chunks],
        )
        for number, chunk in enumerate(chunks):
            file = self._room()
            start = file.tell()
            with _without_checksums():
                torch.save(_with_own_storage(chunk.of(tensor)), file)
            file.flush()
            length = file.tell() - start
            send_to_disk(file, start, length)
            self._where[metadata.MetadataIndex(name, chunk.offset, number)] = filesystem._StorageInfo(
                os.path.basename(file.name), start, length
            )

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Return whether the files hold, chunk by chunk, the tensor that was written."""
        entry = self._tensors[name]
        assert isinstance(entry, metadata.TensorStorageMetadata)
        for number, stored in enumerate(entry.chunks):
            chunk = Chunk(tuple(stored.offsets), tuple(stored.sizes))
            where = self._where[metadata.MetadataIndex(name, chunk.offset, number)]
            stored = saved_tensors(self.path / where.relative_path, where.offset, where.length)
            part = chunk.of(tensor)
            if stored_hash(stored.path, stored.start, part.nbytes) != digest(part):
                return False
        return True

    def close(self) -> None:
        """Write everything but the tensors; without it the folder is no checkpoint."""
        if self._file is not None:
            self._file.close()
        torch.save(self._common, self.path / "common.pt")
        (self.path / "metadata.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        content = metadata.Metadata(
            state_dict_metadata=self._tensors,
            storage_data=self._where,
            storage_meta=metadata.StorageMeta(),
        )
        buffer = io.BytesIO()
        pickle.dump(content, buffer)
        (self.path / METADATA).write_bytes(buffer.getvalue())

    def _room(self) -> IO[bytes]:
        """Return the file for the next chunk; a new one once the last is large enough to be read in
        parallel."""
        if self._file is None or self._file.tell() >= _BYTES_PER_FILE:
            if self._file is not None:
                self._file.close()
            # As torch names them: __<rank>_<number>.distcp.
            self._file = open(self.path / f"__0_{self._count}.distcp", "wb")
            self._count += 1
        return self._file


def _with_own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor's elements alone in their storage, since ``torch.save`` writes all that is behind a
    view."""
    if not tensor.numel():
        return tensor.clone()
    return torch.frombuffer(as_bytes(tensor), dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Let ``torch.save`` write no CRC-32 within the block: ``torch.load`` doesn't look at it, and it takes
    as long as the rest. The manifest has better ones."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
