"""Comparison of two checkpoints, of whatever format, and of one with the hashes of what was written.

Tensors are compared bit by bit, under the names that they have in a Hugging Face folder; the two
generations of such names count as one. How tensors are cut, merged, padded or spread over files doesn't.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.artifacts.checkpoint import (
    FILES,
    is_checkpoint,
    is_megatron_lms,
    read_manifest,
    resolve_checkpoint,
)
from megatron_vlm.hf import Difference
from megatron_vlm.hf.formats.folder import CONVERSION, SAFETENSORS_INDEX, HFFolder, TensorInfo, small_files
from megatron_vlm.hf.formats.native import read_metadata
from megatron_vlm.hf.formats.streaming import HASH, Meter, Progress, describe, dtype_name, same_bits
from megatron_vlm.hf.hashes import checks
from megatron_vlm.hf.megatron import WEIGHTS, MegatronCheckpoint, and_more
from megatron_vlm.hf.tables.table import detect_prefixes
from megatron_vlm.system.files import check_readable, read_json

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Content:
    """A checkpoint under names that don't depend on who wrote it."""

    path: Path
    names: dict[str, str]  # to the source's own, in the order that it is read in fastest
    read: Callable[[str], Tensor]  # by the source's own name
    nbytes: int
    files: Path  # the folder of the small files


def verify(
    left: PathLike,
    right: PathLike,
    weights_only: bool = False,
    progress: Progress | None = None,
    hf_config: PathLike | None = None,
) -> int:
    """Compare two checkpoints by content: every tensor's bits, every small file's bytes.

    A tensor that training stores in a wider dtype than it was imported in counts as equal if rounding
    it back loses nothing. Optimizer state is not compared.

    Args:
        left: a Hugging Face folder, a checkpoint folder, a root, or a run folder.
        right: the same.
        weights_only: leave out the small files: config, tokenizer, processor.
        hf_config: the Hugging Face folder of the model, for checkpoints that Megatron-LM itself wrote.

    Returns:
        The number of tensors compared.

    Raises:
        Difference: they differ; the message names the first difference and counts the others.
        ValueError: one of them is no checkpoint, or is damaged.
    """
    a, b = _open(left, hf_config), _open(right, hf_config)
    for here, there in ((a, b), (b, a)):
        lacking = [own for name, own in here.names.items() if name not in there.names]
        if lacking:
            raise Difference(f"{lacking[0]}{and_more(lacking)} is in {here.path} but not in {there.path}")
    first, count = "", 0
    meter = Meter(a.nbytes, progress)
    # A checkpoint's parts of one Megatron tensor are read together, so its order is the one to keep.
    for name in (b if (b.files != b.path) else a).names:
        one, two = a.read(a.names[name]), b.read(b.names[name])
        if not same_bits(one, two):
            first, count = first or _difference(a.names[name], one, two, a.path, b.path), count + 1
        meter.add(one)
    if count:
        raise Difference(f"{first}; {count} of {len(a.names)} tensors differ")
    if not weights_only:
        _compare_files(a, b)
    return len(a.names)


def check_manifest(path: PathLike) -> int:
    """Compare a checkpoint with the manifest that its conversion wrote.

    Returns:
        The number of tensors compared.

    Raises:
        Difference: a tensor is not what it was; the message names the first and counts the others.
        ValueError: it has no hashes, or is damaged.
    """
    read: Callable[[str], Tensor]
    if is_checkpoint(path) and FILES in read_manifest(path):
        return _check_files(resolve_checkpoint(path))
    if is_checkpoint(path):
        manifest, checkpoint = read_manifest(path), MegatronCheckpoint(path)
        reader, carried = checkpoint.reader, checkpoint.carried if "carried" in manifest else []
        promised = {**manifest["tensors"], **manifest.get("carried", {})}
        present = {*reader.names, *carried}

        def read(name: str) -> Tensor:
            return checkpoint.read_unrounded(name) if name in carried else reader.read(name)
    else:
        source = HFFolder(path)
        check_readable(source.path / CONVERSION)
        try:
            promised = read_json(source.path / CONVERSION)["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source.path}: no {CONVERSION} to compare with ({error!r})") from None
        present, read = set(source.tensors), source.read
    entries = promised.values() if isinstance(promised, dict) else [promised]
    if not all(isinstance(entry, dict) and HASH in entry for entry in entries):
        raise ValueError(f"{path}: its manifest has no hashes; give a second checkpoint to compare with")
    for name in promised:
        if name not in present:
            raise Difference(f"{name} is missing in {path}")
    extra = [name for name in sorted(present) if name not in promised]
    if extra:
        raise Difference(f"{extra[0]}{and_more(extra)} in {path} was not written there")
    changed = [name for name in promised if describe(read(name)) != promised[name]]
    if changed:
        count = f"{len(changed)} of {len(promised)} tensors differ"
        raise Difference(f"{changed[0]} in {path} is not what was written; {count}")
    return len(promised)


def _check_files(folder: Path) -> int:
    """Check all files of a checkpoint that training wrote, optimizer state too."""
    found = checks(folder, weights_only=False) or []
    damages = [damage for damage in (check.damage for check in found) if damage is not None]
    if damages:
        raise Difference(f"{damages[0]}; {len(damages)} of {len(found)} parts differ")
    return len(read_metadata(folder).state_dict_metadata)


def _open(path: PathLike, hf_config: PathLike | None) -> _Content:
    if (hf_config is not None and is_megatron_lms(path)) or is_checkpoint(path):
        checkpoint = MegatronCheckpoint(path, hf_config=hf_config if is_megatron_lms(path) else None)
        names, infos, files = checkpoint.names, checkpoint.tensors, checkpoint.hf
        return _Content(checkpoint.path, _canonical(names), _as_stored(checkpoint), _size(infos), files)
    folder = HFFolder(path)
    return _Content(folder.path, _canonical(folder.tensors), folder.read, _size(folder.tensors), folder.path)


def _size(infos: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in infos.values())


def _canonical(names: Iterable[str]) -> dict[str, str]:
    """Return the names with their prefixes replaced by the part's name, and the names themselves."""
    own = list(names)
    prefixes = detect_prefixes(own)
    found = {}
    for name in own:
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), None)
        found[name if part is None else f"{{{part}}}" + name.removeprefix(prefixes[part])] = name
    return found


def _as_stored(checkpoint: MegatronCheckpoint) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        stored = checkpoint.read_unrounded(name)
        rounded = stored.to(checkpoint.tensors[name].dtype)
        return rounded if same_bits(rounded.to(stored.dtype), stored) else stored

    return read


def _difference(name: str, a: Tensor, b: Tensor, left: Path, right: Path) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return (
            f"{name}: {dtype_name(a.dtype)} {list(a.shape)} in {left}, "
            f"{dtype_name(b.dtype)} {list(b.shape)} in {right}"
        )
    unequal = (
        a.contiguous().view(-1, 1).view(torch.uint8) != b.contiguous().view(-1, 1).view(torch.uint8)
    ).any(1)
    at = [int(i) for i in torch.unravel_index(unequal.nonzero()[0], a.shape)]
    x, y = (t[tuple(at)].item() for t in (a, b))
    return (
        f"{name} has other values in {left} than in {right}: {int(unequal.sum())} of {a.numel()}, "
        f"the first at {at}, {x} and {y}"
    )


def _compare_files(a: _Content, b: _Content) -> None:
    ignored = (SAFETENSORS_INDEX, WEIGHTS)
    files_a, files_b = (
        {file for file in small_files(content.files) if file.name not in ignored} for content in (a, b)
    )
    differ = [
        file
        for file in sorted(files_a | files_b)
        if file not in files_a
        or file not in files_b
        or (a.files / file).read_bytes() != (b.files / file).read_bytes()
    ]
    if differ:
        file, others = differ[0], f"; {len(differ)} files differ" if len(differ) > 1 else ""
        if file in files_a and file in files_b:
            raise Difference(f"{file} differs between {a.path} and {b.path}{others}")
        raise Difference(f"{file} is in {(a if file in files_a else b).path} only{others}")
