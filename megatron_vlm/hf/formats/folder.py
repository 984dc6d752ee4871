"""Hugging Face model folders: lazy readers and a streaming writer."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vlm.hf.formats.stored import Stored, reason, saved_tensors, stored_hash, write_at
from megatron_vlm.hf.formats.streaming import check_finite, dtype_name
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.system.files import check_readable, read_json

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
CONVERSION = "conversion.json"  # the manifest of a folder that a conversion wrote
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # of a file of weights, where nothing else is said
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a tensor in a file: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


class HFFolder:
    """The weights of a Hugging Face folder, read tensor by tensor.

    Reads ``model.safetensors`` or its shards with an index, or ``pytorch_model.bin`` or its shards
    (tensors only: a pickle that holds anything else is refused).

    Raises:
        ValueError: there are no weights, or a file or an index is damaged; the message names it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        if (self.path / "adapter_config.json").exists():
            raise ValueError(
                f"{self.path}: adapter_config.json makes transformers load a PEFT adapter here; merge it "
                "into the weights, or move it away"
            )
        names, index = self._weight_files()
        self.files: dict[str, list[TensorInfo]] = {}  # in the order of the data on disk
        self.metadata: dict[str, dict[str, str]] = {}  # what safetensors files say of themselves
        self._of: dict[str, tuple[str, TensorInfo]] = {}
        self._stored: dict[str, Stored | Tensor] = {}
        for file in names:
            for info in self._scan(file):
                if info.name in self._of:
                    raise ValueError(f"{self.path}: {info.name} is in {self._of[info.name][0]} and in {file}")
                self._of[info.name] = (file, info)
        if index is not None:
            self._compare_with(index)

    @property
    def is_safetensors(self) -> bool:
        """Return whether the weights are safetensors files rather than pickles."""
        return all(file.endswith(".safetensors") for file in self.files)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for name, (_, info) in self._of.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return _read(self._stored[name])

    def _weight_files(self) -> tuple[list[str], dict[str, str] | None]:
        """Return the files of weights, and the index's map from tensor to file where there is one."""
        for single, index_name in (
            ("model.safetensors", SAFETENSORS_INDEX),
            ("pytorch_model.bin", BIN_INDEX),
        ):
            check_readable(self.path / single)
            check_readable(self.path / index_name)
            if (self.path / single).is_file():
                return [single], None
            if (self.path / index_name).is_file():
                index = _read_index(self.path / index_name)
                return sorted(set(index.values())), index
        raise ValueError(
            f"{self.path}: no weights (model.safetensors, pytorch_model.bin, or shards with an index)"
        )

    def _scan(self, file: str) -> list[TensorInfo]:
        path = self.path / file
        check_readable(path)
        if not path.is_file():
            raise ValueError(f"{self.path}: {file}, which the index names, is not there")
        if file.endswith(".safetensors"):
            found, self.metadata[file] = _safetensors_file(path)
        else:
            found = _bin_file(path)
        self._stored.update(found)
        infos = self.files[file] = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in found.items()]
        return infos

    def _compare_with(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            if name not in self._of or self._of[name][0] != file:
                raise ValueError(f"{self.path}: the index promises {name} in {file}, which does not hold it")
        for name, (file, _) in self._of.items():
            if name not in index:
                raise ValueError(f"{self.path}: {file} holds {name}, which the index does not list")


def _safetensors_file(path: Path) -> tuple[dict[str, Stored | Tensor], dict[str, str]]:
    """Return a file's tensors, in the order of the data, and its metadata; safetensors itself checks the
    file."""
    found: dict[str, Stored | Tensor] = {}
    try:
        # In this order: to safetensors a file that may not be read is one that isn't there.
        with open(path, "rb") as data, safe_open(path, "pt") as file:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
            metadata = dict(file.metadata() or {})
            for name in file.offset_keys():
                part = file.get_slice(name)
                _check_dtype(path, name, part.get_dtype())
                dtype, shape = DTYPES[part.get_dtype()], tuple(part.get_shape())
                start = 8 + length + header[name]["data_offsets"][0]
                found[name] = Stored(path, start, dtype, shape, torch.empty(shape, device="meta").stride())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return found, metadata


def _bin_file(path: Path) -> dict[str, Stored | Tensor]:
    """Return a ``.bin`` file's tensors: nothing else is unpickled.

    A file of torch 1.5 or older is read whole.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            loaded = saved_tensors(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for what is not a file of weights
        raise ValueError(f"{path}: not a file of weights ({reason(error)})") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Stored | Tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path}: not a file of weights (holds something else than named tensors)")
    for name, tensor in loaded.items():
        _check_dtype(path, name, CODES.get(tensor.dtype, str(tensor.dtype)))
    return loaded


def open_weights_file(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Return the names in a ``.safetensors`` file or one of ``torch.save``, and how a tensor of it is read.

    Raises:
        ValueError: it isn't there, is damaged, or holds anything but named tensors.
    """
    tensors = _safetensors_file(path)[0] if path.suffix == ".safetensors" else _bin_file(path)
    return list(tensors), lambda name: _read(tensors[name])


def _read(tensor: Stored | Tensor) -> Tensor:
    return tensor.read() if isinstance(tensor, Stored) else tensor


class Cast:
    """A folder's tensors in another dtype, those of integers as they are; read like ``HFFolder``.

    Args:
        source: the folder, or what is read like one.
        dtype: a floating-point dtype.
    """

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        self._source = source
        self.path, self.metadata = source.path, source.metadata
        self.files = cast_infos(source.files, dtype)
        self.tensors = {info.name: info for infos in self.files.values() for info in infos}

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ValueError: it holds NaN, or a value that the dtype cannot hold.
        """
        tensor: Tensor = self._source.read(name)
        check_finite(name, tensor)
        return cast(name, tensor, self.tensors[name].dtype)


def cast_infos(files: dict[str, list[TensorInfo]], dtype: torch.dtype) -> dict[str, list[TensorInfo]]:
    """Return the tensors of each file, with ``dtype`` for those of floating point."""
    return {
        file: [replace(info, dtype=dtype) if info.dtype.is_floating_point else info for info in infos]
        for file, infos in files.items()
    }


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a finite tensor in another dtype.

    Raises:
        ValueError: a value is too large for it.
    """
    result = tensor.to(dtype)
    try:
        check_finite(name, result)
    except ValueError:
        largest = f"{torch.finfo(dtype).max:g}"
        raise ValueError(f"{name} has values beyond {largest}, {dtype_name(dtype)}'s largest") from None
    return result


def write_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let a folder's ``config.json`` say that its weights have this dtype. Its index goes, which says how
    many bytes they were."""
    (folder / SAFETENSORS_INDEX).unlink(missing_ok=True)
    path = folder / "config.json"
    config = read_json(path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if part and key in part:
                part[key] = dtype_name(dtype)
    if "torch_dtype" not in config:
        config["dtype"] = dtype_name(dtype)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_dtype(path: Path, name: str, code: str) -> None:
    if code not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {code}; supported: {', '.join(DTYPES)}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = read_json(path)["weight_map"]
        names = set(index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of weights ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"{path}: names {name!r}, which is not a file in this folder")
    return index


class SafetensorsFile:
    """The writer of one safetensors file, its tensors in any order, each straight to its place.

    The layout is fixed by the first call: header, then the data in the order of ``tensors``. Given
    the tensors in the order of an existing file, the bytes are those that ``safetensors`` wrote.
    """

    def __init__(self, path: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        self._at: dict[str, tuple[int, TensorInfo]] = {}
        self._written: dict[str, tuple[int, TensorInfo]] = {}
        position = 0
        for info in tensors:
            end = position + info.nbytes
            header[info.name] = {
                "dtype": CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, end],
            }
            self._at[info.name] = (position, info)
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file: IO[bytes] = open(path, "wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + position)
        self.path = path

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, converted to the dtype announced for it; each exactly once."""
        position, info = self._written[name] = self._at.pop(name)
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)} instead of {list(info.shape)}")
        write_at(self._file, self._data + position, tensor.to(info.dtype))

    def hash(self, name: str) -> str:
        """Return the hash of what the file holds of a tensor that was written."""
        position, info = self._written[name]
        return stored_hash(self.path, self._data + position, info.nbytes)

    def close(self) -> None:
        """Close the file.

        Raises:
            RuntimeError: a tensor that was announced was not written.
        """
        self._file.close()
        if self._at:
            raise RuntimeError(f"{self.path}: {next(iter(self._at))} was not written")


class WeightsWriter:
    """The writer of a folder's shards, tensors in any order.

    Args:
        directory: an existing folder.
        files: the tensors of each file, in order.
        metadata: of each file.
    """

    def __init__(
        self,
        directory: Path,
        files: dict[str, list[TensorInfo]],
        metadata: dict[str, dict[str, str]],
    ) -> None:
        self._files = {
            name: SafetensorsFile(directory / name, infos, metadata.get(name, {}))
            for name, infos in files.items()
        }
        self._of = {info.name: name for name, infos in files.items() for info in infos}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its file."""
        self._files[self._of[name]].write(name, tensor)

    def hash(self, name: str) -> str:
        """Return the hash of a tensor that was written, as its file holds it."""
        return self._files[self._of[name]].hash(name)

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            if kind is None:
                file.close()
            else:
                file._file.close()


def split_into_shards(tensors: list[TensorInfo], max_bytes: int) -> dict[str, list[TensorInfo]]:
    """Distribute tensors to files of at most ``max_bytes`` of data each (one tensor may be more)."""
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in tensors:
        if not shards or info.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(info)
        room -= info.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(directory: Path, files: dict[str, list[TensorInfo]]) -> None:
    """Write the index of several safetensors files, as transformers does."""
    infos = [(info, file) for file, infos in files.items() for info in infos]
    index = {
        "metadata": {"total_size": sum(info.nbytes for info, _ in infos)},
        "weight_map": {info.name: file for info, file in sorted(infos, key=lambda pair: pair[0].name)},
    }
    (directory / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def small_files(directory: Path) -> Iterator[Path]:
    """Yield the files of a model folder that are not weights or of a conversion, relative to it; hidden
    folders are left out.

    Raises:
        ValueError: one is a pipe, a device or a link to nothing.
    """
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.endswith(_WEIGHT_SUFFIXES) and name not in (BIN_INDEX, CONVERSION):
                path = Path(folder) / name
                check_readable(path)
                yield path.relative_to(directory)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy :func:`small_files` byte for byte."""
    for file in small_files(source):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
