"""Hashes of what a checkpoint holds: written beside a save, and compared before it is loaded.

A conversion has every tensor whole, and writes its hash. In training a tensor is cut over ranks, so the
manifest has hashes of the files' bytes instead, cut where ``.metadata`` says that tensors begin::

    "files": {"__0_0.distcp": {"bytes": 8192, "xxh3_128": {"0": "<hash>", "4096": "<hash>"}}, ...}

A part ends where the next begins, so that no byte is in none, and a tensor can be compared alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.artifacts.checkpoint import FILES, read_manifest
from megatron_vlm.hf.formats.native import NativeReader, Part, promised_parts, read_metadata
from megatron_vlm.hf.formats.stored import stored_hash
from megatron_vlm.hf.formats.streaming import HASH, describe

_OPTIMIZER = "optimizer."  # what names of tensors that only a run that goes on reads begin with


@dataclass(frozen=True)
class Check:
    """A file or a part of one that can be compared with its hash.

    Attributes:
        file: where it lies.
        tensor: it is a part of; empty for other files.
        nbytes: that are read for it.
        holds: whether it is what was written.
    """

    file: Path
    tensor: str
    nbytes: int
    holds: Callable[[], bool]

    @property
    def damage(self) -> str | None:
        """Return what is wrong with the file; None if it holds what was written."""
        try:
            if self.holds():
                return None
        except ValueError as error:  # cut off, or not readable as a tensor
            return str(error)
        except OSError as error:
            return f"{self.file}: {error.strerror}"
        return f"{self.file} is not what was written" + (f" ({self.tensor})" if self.tensor else "")


def tensors_by_place(folder: Path) -> dict[str, dict[int, str]]:
    """Return the names of each file's tensors by the byte at which their part begins.

    Raises:
        ValueError: ``.metadata`` is damaged.
    """
    places: dict[str, dict[int, str]] = {}
    for index, info in (read_metadata(folder).storage_data or {}).items():
        places.setdefault(info.relative_path, {})[info.offset] = index.fqn
    return places


def hash_file(folder: Path, file: str, starts: Iterable[int] = ()) -> dict[str, Any]:
    """Return a file's entry in a manifest, in parts that begin at ``starts``."""
    path = folder / file
    size = path.stat().st_size
    cuts = sorted({0, *starts})
    ends = [*cuts[1:], size]
    hashes = {
        str(start): stored_hash(path, start, end - start) for start, end in zip(cuts, ends, strict=True)
    }
    return {"bytes": size, HASH: hashes}


def checks(folder: Path, weights_only: bool) -> list[Check] | None:
    """Return everything in a checkpoint that has a hash; None if nothing has.

    Args:
        weights_only: leave out what only a run that goes on reads: the optimizer's tensors.

    Raises:
        ValueError: manifest or ``.metadata`` is damaged.
    """
    manifest = read_manifest(folder)
    if FILES in manifest:
        return _of_files(folder, manifest, weights_only)
    tensors = manifest["tensors"]
    if manifest["format"] != "torch_dist" or not all(HASH in entry for entry in tensors.values()):
        return None
    reader = NativeReader(folder)
    for name in tensors:
        if name not in reader.names:
            raise ValueError(f"{folder}: {name} is missing")

    def check(name: str, entry: Mapping[str, Any]) -> Check:
        size = reader.dtype(name).itemsize * math.prod(reader.shape(name))
        return Check(folder, name, size, lambda: describe(reader.read(name)) == entry)

    return [check(name, entry) for name, entry in tensors.items()]


def _of_files(folder: Path, manifest: Mapping[str, Any], weights_only: bool) -> list[Check]:
    places = tensors_by_place(folder)
    found = []
    for file, parts in promised_parts(folder, manifest).items():
        found.append(_of_size(folder / file, sum(part.length for part in parts)))
        for part in parts:
            tensor = places.get(file, {}).get(part.start, "")
            if not (weights_only and tensor.startswith(_OPTIMIZER)):
                found.append(_of_part(folder / file, tensor, part))
    return found


def _of_size(path: Path, size: int) -> Check:
    return Check(path, "", 0, lambda: path.stat().st_size == size)


def _of_part(path: Path, tensor: str, part: Part) -> Check:
    return Check(path, tensor, part.length, lambda: part.is_in(path))


def share(found: list[Check], rank: int, count: int) -> list[Check]:
    """Return a rank's part of what is to be compared: as many bytes as any other's, nearly, file by file."""
    by_size = sorted(found, key=lambda check: -check.nbytes)
    return sorted(by_size[rank::count], key=lambda check: check.file)
