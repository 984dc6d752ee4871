"""Hugging Face LLaVA folder to megatron-core checkpoint, and back, bit for bit.

Tensors stream: a thread writes one Megatron tensor, or its Hugging Face parts, while the next is read.
Either side gets a manifest with shape, dtype and hash of every tensor: ``manifest.json`` of a
checkpoint, ``conversion.json`` of a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, RELEASE, appearing_folder
from megatron_vlm.hf.build.random_weights import RandomWeights
from megatron_vlm.hf.build.tokenizer import take_tokenizer, tokenizer_files
from megatron_vlm.hf.formats.classic import ClassicLayout
from megatron_vlm.hf.formats.folder import (
    CONVERSION,
    SAFETENSORS_INDEX,
    Cast,
    HFFolder,
    TensorInfo,
    WeightsWriter,
    cast,
    copy_small_files,
    split_into_shards,
    write_dtype,
    write_index,
)
from megatron_vlm.hf.formats.streaming import (
    HASH,
    Background,
    Meter,
    Progress,
    ahead,
    check_finite,
    check_free_space,
    describe,
    digest,
    dtype_name,
    tool_versions,
)
from megatron_vlm.hf.formats.writer import CheckpointWriter, appearing_checkpoint
from megatron_vlm.hf.megatron import (
    WEIGHTS,
    MegatronCheckpoint,
    Source,
    and_more,
    check_written,
    write_carried,
    write_hf_files,
)
from megatron_vlm.hf.tables.model import build_table, check_classic, check_exported
from megatron_vlm.hf.tables.table import Carry, Row, Table, detect_prefixes
from megatron_vlm.hf.target import check_apart, check_apart_from, check_root, check_target

PathLike = str | os.PathLike[str]


def import_hf(
    hf_dir: PathLike,
    megatron_dir: PathLike,
    tp: int,
    pp: int,
    force: bool = False,
    progress: Progress | None = None,
    random_seed: int | None = None,
    verify: bool = False,
    classic: ClassicLayout | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Convert a Hugging Face LLaVA folder to the checkpoint ``<megatron_dir>/release``.

    Tensors keep their dtypes. The checkpoint can be loaded at any layout; it is cut so that ranks of
    the layout given read only their own parts, and its vocabulary is padded to a multiple of 128 * tp.

    Args:
        hf_dir: a folder with ``config.json`` and weights.
        megatron_dir: the root to make; must not hold anything unless ``force``.
        tp: tensor-parallel size.
        pp: pipeline-parallel size, checked only.
        progress: called with the bytes done and in all.
        random_seed: initialise the weights with it, as transformers does, instead of reading them.
        verify: convert every tensor back, read it back from the files written, and compare.
        classic: write Megatron-LM's classic format, for this layout only.
        dtype: of all weights; None: as stored.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the model is not supported or cannot be cut so, a tensor is missing, unknown,
            misshapen or not finite, the disk is too full, or the output is there already.
        Difference: what was read back is not what was read.
    """
    source, root = Path(hf_dir), Path(megatron_dir)
    model = ModelConfig.from_hf_dir(str(source))
    model.check_layout(tp, pp)
    if classic is not None:
        check_classic(model)
    check_apart(source, root)
    check_root(root, force)
    folder: Source = HFFolder(source) if random_seed is None else RandomWeights(source, random_seed)
    if dtype is not None:
        folder, model = Cast(folder, dtype), dataclasses.replace(model, dtype=dtype_name(dtype))
    prefixes = detect_prefixes(folder.tensors)
    table = build_table(model, padded_vocab_size(model.language.vocab_size, tp), prefixes)
    carried = _check_import(source, table, folder.tensors)
    size = sum(info.nbytes for info in folder.tensors.values())
    check_free_space(root, size)
    meter = Meter(size, progress)
    written: dict[str, Any] = {}

    with appearing_checkpoint(root, force) as output:
        write_hf_files(output / HF_FOLDER, folder, source, table, prefixes)
        if dtype is not None:
            write_dtype(output / HF_FOLDER, dtype)
        if random_seed is not None:  # an index is of other weights, if there is one
            (output / HF_FOLDER / SAFETENSORS_INDEX).unlink(missing_ok=True)
        dtypes = {row.native: _widest(folder.tensors[name].dtype for name, _ in row.hf) for row in table.rows}
        writer = CheckpointWriter(output, model, table, dtypes, tp, classic, folder.read)

        def write(row: Row, hashes: list[str], tensor: Tensor) -> None:
            writer.write(row, tensor)
            written[row.native] = describe(tensor)
            if verify:
                checking.call(tensor.nbytes, check, row, hashes, tensor)

        def check(row: Row, hashes: list[str], tensor: Tensor) -> None:
            for (name, _), before, back in zip(row.hf, hashes, row.op.to_hf(tensor), strict=True):
                check_written(before == digest(back.to(folder.tensors[name].dtype)), name)
            check_written(writer.holds(row, tensor), row.native)

        with Background() as checking, Background() as writing:
            read = ((row, [folder.read(name) for name, _ in row.hf]) for row in table.rows)
            for row, parts in ahead(read):
                for (name, _), part in zip(row.hf, parts, strict=True):
                    check_finite(name, part)
                hashes = [digest(part) for part in parts] if verify else []
                tensor = row.op.to_native(parts)
                writing.call(tensor.nbytes, write, row, hashes, tensor)
                meter.add(*parts)
        beside = write_carried(output / HF_FOLDER, folder, carried, meter.add, verify)
        writer.close(model.to_dict(), pp, written, beside)
    return root / RELEASE


def export_hf(
    checkpoint: PathLike,
    hf_dir: PathLike,
    tokenizer_dir: PathLike | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    base: PathLike | None = None,
    verify: bool = False,
    dtype: torch.dtype | None = None,
    hf_config: PathLike | None = None,
) -> Path:
    """Convert a checkpoint, as :func:`import_hf` or training wrote it, to a Hugging Face folder.

    Tensors have the names and dtypes of the folder that was imported; weights trained in another
    dtype are rounded to it, once, after adapters were merged into them in float32.

    Args:
        checkpoint: a checkpoint folder, a root, or a run folder.
        hf_dir: the folder to make; must not hold anything unless ``force``.
        tokenizer_dir: take tokenizer and chat template from this folder, not from the checkpoint.
        max_shard_bytes: largest file of weights; None: as imported.
        progress: called with the bytes done and in all.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.
        verify: read every tensor back from the files written, and compare.
        dtype: of all weights; None: as imported.
        hf_config: the Hugging Face folder of the model, for a checkpoint that Megatron-LM itself wrote.

    Returns:
        ``hf_dir``.

    Raises:
        ValueError: there is no such checkpoint, a tensor is missing, unknown, misshapen or not
            finite, the disk is too full, or the output is there already.
        Difference: what was read back is not what was written.
    """
    target = Path(hf_dir)
    check_apart_from(checkpoint, base, hf_config, target)
    check_target(target, force)
    source = MegatronCheckpoint(checkpoint, base, hf_config)
    check_exported(source.model)
    if dtype is not None:
        source.convert_to(dtype)
    files, metadata = source.files, source.metadata
    if max_shard_bytes is not None:
        files = split_into_shards([info for infos in files.values() for info in infos], max_shard_bytes)
        metadata = {file: {"format": "pt"} for file in files}
    if tokenizer_dir is not None:
        tokenizer_files(Path(tokenizer_dir))
    size = sum(info.nbytes for info in source.tensors.values())
    check_free_space(target, size)
    meter = Meter(size, progress)

    with appearing_folder(target, replace=force) as output:
        copy_small_files(source.hf, output)
        (output / WEIGHTS).unlink(missing_ok=True)
        if dtype is not None:
            write_dtype(output, dtype)
        if tokenizer_dir is not None:
            take_tokenizer(output, Path(tokenizer_dir))

        if max_shard_bytes is not None:
            (output / SAFETENSORS_INDEX).unlink(missing_ok=True)
        about = {"source": str(source.path)}
        write_weights(output, files, metadata, source.names, source.read, meter, verify, about)
    return target


def reshard(
    checkpoint: PathLike,
    megatron_dir: PathLike,
    tp: int,
    pp: int,
    force: bool = False,
    progress: Progress | None = None,
    base: PathLike | None = None,
    verify: bool = False,
    classic: ClassicLayout | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    hf_config: PathLike | None = None,
) -> Path:
    """Write a checkpoint's weights as ``<megatron_dir>/release`` in another format or for another layout.

    The vocabulary is padded anew, with zeros. Optimizer state is left behind.

    Args:
        checkpoint: a checkpoint folder, a root, or a run folder.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.
        dtype: of all weights; None: as stored.
        hf_config: the Hugging Face folder of the model, for a checkpoint that Megatron-LM itself wrote.
        replaced: tensors that take the place of the checkpoint's, by their Hugging Face names.

    Others, returns and raises: as :func:`import_hf`; besides, a checkpoint with LoRA adapters is refused.
    """
    root = Path(megatron_dir)
    check_apart_from(checkpoint, base, hf_config, root)
    check_root(root, force)
    source = MegatronCheckpoint(checkpoint, base, hf_config)
    model = source.model
    if dtype is not None:
        source.convert_to(dtype)
        model = dataclasses.replace(model, dtype=dtype_name(dtype))
    if ModelConfig.from_dict(source.manifest["model"]).lora is not None:
        raise ValueError(
            f"{source.path} has adapters; merge them with scripts/convert/convert_megatron_to_hf.py"
        )
    model.check_layout(tp, pp)
    if classic is not None:
        check_classic(model)
    table = build_table(model, padded_vocab_size(model.language.vocab_size, tp), source.prefixes)
    dtypes = {row.native: dtype or source.reader.dtype(row.native) for row in table.rows}
    size = sum(math.prod(row.native_shape) * dtypes[row.native].itemsize for row in table.rows)
    check_free_space(root, size)
    meter = Meter(size, progress)
    written: dict[str, Any] = {}

    with appearing_checkpoint(root, force) as output:
        beside = source.write_hf_files(output / HF_FOLDER, verify)
        if dtype is not None:
            write_dtype(output / HF_FOLDER, dtype)
        writer = CheckpointWriter(output, model, table, dtypes, tp, classic, source.read)

        def write(row: Row, tensor: Tensor) -> None:
            writer.write(row, tensor)
            written[row.native] = describe(tensor)
            if verify:
                checking.call(tensor.nbytes, check, row, tensor)

        def check(row: Row, tensor: Tensor) -> None:
            check_written(writer.holds(row, tensor), row.native)

        with Background() as checking, Background() as writing:
            rows = zip(source.table.rows, table.rows, strict=True)
            for before, row, tensor in ahead((a, b, source.reader.read(a.native)) for a, b in rows):
                check_finite(row.native, tensor)
                tensor = cast(row.native, tensor, dtypes[row.native])
                if replaced and row.hf[0][0] in replaced:
                    parts = [replaced[name] for name, _ in row.hf]
                    tensor = cast(row.native, before.op.to_native(parts), tensor.dtype)
                if before.op != row.op:  # the vocabulary's padding
                    tensor = row.op.to_native(before.op.to_hf(tensor))
                writing.call(tensor.nbytes, write, row, tensor)
                meter.add(tensor)
        writer.close(model.to_dict(), pp, written, beside)
    return root / RELEASE


def write_weights(
    output: Path,
    files: dict[str, list[TensorInfo]],
    metadata: dict[str, dict[str, str]],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    meter: Meter,
    verify: bool,
    about: dict[str, Any],
) -> None:
    """Write the weights of a Hugging Face folder whose small files are there, and its manifest.

    One tensor is written while the next is read. An index that is there is kept, if there are several files.

    Args:
        names: all tensors of ``files``, in the order that they are read in fastest.
        about: what the manifest says beside the tensors.

    Raises:
        Difference: with ``verify``, what was read back is not what was written.
    """
    written: dict[str, Any] = {}
    with WeightsWriter(output, files, metadata) as writer:

        def write(name: str, tensor: Tensor) -> None:
            writer.write(name, tensor)
            written[name] = describe(tensor)
            if verify:
                checking.call(0, check, name)

        def check(name: str) -> None:
            check_written(writer.hash(name) == written[name][HASH], name)

        with Background() as checking, Background() as writing:
            for name, tensor in ahead((name, read(name)) for name in names):
                writing.call(tensor.nbytes, write, name, tensor)
                meter.add(tensor)
    if len(files) == 1:
        (output / SAFETENSORS_INDEX).unlink(missing_ok=True)
    elif not (output / SAFETENSORS_INDEX).exists():
        write_index(output, files)
    HFFolder(output)  # as safetensors reads it, it is whole
    manifest = {**about, "tensors": written, "versions": tool_versions()}
    (output / CONVERSION).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that torch.cat makes of tensors of these dtypes."""
    return functools.reduce(torch.promote_types, dtypes)


def _check_import(source: Path, table: Table, found: dict[str, TensorInfo]) -> list[Carry]:
    """Check that the table and the folder name the same tensors; the carries that are there."""
    carried = [
        carry for carry in table.carries if not carry.optional or any(name in found for name, _ in carry.hf)
    ]
    wanted = [*table.required, *(name for carry in carried for name, _ in carry.hf)]
    missing = [name for name in dict.fromkeys(wanted) if name not in found]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing{and_more(missing)}")
    shapes = table.shapes
    unknown = [name for name in found if name not in shapes]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is no part of the model that config.json describes{and_more(unknown)}"
        )
    for name, info in found.items():
        if info.shape != shapes[name]:
            raise ValueError(
                f"{source}: {name} has shape {list(info.shape)}; config.json implies {list(shapes[name])}"
            )
    for row in table.rows:
        for name, _ in row.hf:
            if not found[name].dtype.is_floating_point:
                raise ValueError(f"{source}: {name} is {dtype_name(found[name].dtype)}, not floating point")
    return carried
