"""Hugging Face LLaVA folder to megatron-core checkpoint, and back, bit for bit.

Tensors stream: one Megatron tensor and its Hugging Face parts are in memory at a time. What the
Hugging Face folder holds beside trained weights travels in the checkpoint's ``hf/`` folder:

    every small file        byte for byte
    carried.safetensors     the tensors that training never runs, under their own names
    weights.json            names, dtypes, shapes and order of the tensors in each file
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_vlm
from megatron_vlm.config.checkpoint import (
    HF_FOLDER,
    RELEASE,
    appearing_folder,
    check_absent,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
    write_tracker,
)
from megatron_vlm.config.model import ModelConfig, padded_vocab_size
from megatron_vlm.hf.folder import (
    DTYPES,
    SAFETENSORS_INDEX,
    HFFolder,
    SafetensorsFile,
    TensorInfo,
    WeightsWriter,
    copy_small_files,
    same_bits,
    split_into_shards,
    write_index,
)
from megatron_vlm.hf.lora import find_adapters, merged
from megatron_vlm.hf.mapping import Carry, Table, build_table, detect_prefixes
from megatron_vlm.hf.native import LayeredReader, NativeWriter, open_weights
from megatron_vlm.hf.ops import Shape
from megatron_vlm.hf.random_weights import RandomWeights

CARRIED = "carried.safetensors"
WEIGHTS = "weights.json"
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_MODEL_PREFIXES = ("vision_model.", "vision_projection.", "language_model.")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)

Progress = Callable[[int, int], None]  # bytes done, bytes in all
PathLike = str | os.PathLike[str]


def import_hf(
    hf_dir: PathLike,
    megatron_dir: PathLike,
    tp: int,
    pp: int,
    force: bool = False,
    progress: Progress | None = None,
    random_seed: int | None = None,
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

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the model is not supported or cannot be cut so, a tensor is missing, unknown,
            misshapen or not finite, or the output is there already.
    """
    source, root = Path(hf_dir), Path(megatron_dir)
    model = ModelConfig.from_hf_dir(str(source))
    model.check_layout(tp, pp)
    _check_apart(source, root)
    if not force:
        check_absent(root)
    folder = HFFolder(source) if random_seed is None else RandomWeights(source, random_seed)
    found = folder.tensors
    prefixes = detect_prefixes(found)
    table = build_table(model, padded_vocab_size(model.language.vocab_size, tp), prefixes)
    carried = _check_import(source, table, found)
    meter = _Meter(sum(info.nbytes for info in found.values()), progress)

    with appearing_folder(root / RELEASE, replace=force) as output:
        written = {}
        writer = NativeWriter(output)
        for row in table.rows:
            parts = [folder.read(name) for name, _ in row.hf]
            for (name, _), part in zip(row.hf, parts, strict=True):
                _check_finite(name, part)
            tensor = row.op.to_native(parts)
            writer.write(row.native, tensor, row.shard.chunks(tuple(tensor.shape), tp))
            written[row.native] = {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype)}
            meter.add(*parts)
        writer.close()

        hf = output / HF_FOLDER
        hf.mkdir()
        copy_small_files(source, hf)
        if random_seed is not None:  # an index is of other weights, if there is one
            (hf / SAFETENSORS_INDEX).unlink(missing_ok=True)
        _write_carried(hf, folder, carried, meter)
        for alias in table.aliases:
            if alias.name in found and not same_bits(folder.read(alias.name), folder.read(alias.of)):
                raise ValueError(
                    f"{source}: {alias.name} differs from {alias.of}, but config.json ties them; "
                    "set tie_word_embeddings to false"
                )
        _write_weights_json(hf, folder, prefixes)
        manifest = {
            "format": "torch_dist",
            "iteration": 0,
            "consumed_samples": 0,
            "has_optimizer": False,
            "model": model.to_dict(),
            "layout": {"tp": tp, "pp": pp, "dp": 1},
            "tensors": written,
            "versions": {"megatron_vlm": megatron_vlm.__version__, "torch": torch.__version__},
        }
        write_manifest(output, manifest)
    write_tracker(root, RELEASE)
    return root / RELEASE


def export_hf(
    checkpoint: PathLike,
    hf_dir: PathLike,
    tokenizer_dir: PathLike | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    base: PathLike | None = None,
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

    Returns:
        ``hf_dir``.

    Raises:
        ValueError: there is no such checkpoint, a tensor is missing, unknown, misshapen or not
            finite, or the output is there already.
    """
    source, target = resolve_checkpoint(checkpoint), Path(hf_dir)
    lora = ModelConfig.from_dict(read_manifest(source)["model"]).lora
    _check_apart(source, target)
    if not force:
        check_absent(target)
    elif target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(f"{target} is no Hugging Face folder; --force doesn't replace it")
    hf = source / HF_FOLDER
    model = ModelConfig.from_hf_dir(str(hf))
    files, metadata, prefixes = _read_weights_json(hf, max_shard_bytes)
    infos = {info.name: info for tensors in files.values() for info in tensors}
    reader = open_weights(source, base)
    table = build_table(model, _padded_size(reader, model), prefixes)
    adapters = find_adapters(table, lora)
    _check_export(source, table, reader, infos, {n for a in adapters.values() for n in a.tensors(1)})
    tokenizer_files = _tokenizer_files(tokenizer_dir)
    meter = _Meter(sum(info.nbytes for info in infos.values()), progress)

    with appearing_folder(target, replace=force) as output:
        copy_small_files(hf, output)
        (output / WEIGHTS).unlink()
        for path in tokenizer_files:
            shutil.copyfile(path, output / path.name)
        with WeightsWriter(output, files, metadata) as writer:
            copies = {alias.of: alias.name for alias in table.aliases if alias.name in infos}

            def write(name: str, tensor: Tensor) -> None:
                writer.write(name, tensor)
                meter.add(tensor)
                if name in copies:
                    write(copies[name], tensor)

            for row in table.rows:
                native = reader.read(row.native)
                _check_finite(row.native, native)
                for (name, _), tensor in zip(row.hf, row.op.to_hf(native), strict=True):
                    if lora is not None and name in adapters:
                        tensor = merged(tensor, adapters[name], lora, reader)
                    write(name, tensor)
            with _open_carried(hf) as carried:
                for carry in table.carries:
                    for name, _ in carry.hf:
                        if name in infos:
                            write(name, carried.get_tensor(name))
        if len(files) == 1:
            (output / SAFETENSORS_INDEX).unlink(missing_ok=True)
        elif not (output / SAFETENSORS_INDEX).exists() or max_shard_bytes is not None:
            write_index(output, files)
    return target


def _check_apart(source: Path, target: Path) -> None:
    """Check that what is written can neither be read as input nor replace it."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{target} and {source} lie in each other; give another output")


def _check_import(source: Path, table: Table, found: dict[str, TensorInfo]) -> list[Carry]:
    """Check that the table and the folder name the same tensors; the carries that are there."""
    covered: dict[str, Shape] = {}
    carried = []
    for row in table.rows:
        covered.update(row.hf)
    for carry in table.carries:
        if not carry.optional or any(name in found for name, _ in carry.hf):
            carried.append(carry)
            covered.update(carry.hf)
    missing = [name for name in covered if name not in found]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing{_and_more(missing)}")
    covered.update({alias.name: alias.shape for alias in table.aliases})
    unknown = [name for name in found if name not in covered]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is no part of the model that config.json describes{_and_more(unknown)}"
        )
    for name, info in found.items():
        if info.shape != covered[name]:
            raise ValueError(
                f"{source}: {name} has shape {list(info.shape)}; config.json implies {list(covered[name])}"
            )
    for row in table.rows:
        for name, _ in row.hf:
            if not found[name].dtype.is_floating_point:
                raise ValueError(f"{source}: {name} is {_dtype_name(found[name].dtype)}, not floating point")
    return carried


def _check_export(
    source: Path, table: Table, reader: LayeredReader, infos: dict[str, TensorInfo], adapters: set[str]
) -> None:
    """Check that the checkpoint holds the tensors of table and adapters, and no others of the model."""
    stored = set(reader.names)
    expected = {row.native: row for row in table.rows}
    missing = [name for name in (*expected, *sorted(adapters)) if name not in stored]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing{_and_more(missing)}")
    known_here = expected.keys() | adapters
    unknown = [n for n in sorted(stored) if n.startswith(_MODEL_PREFIXES) and n not in known_here]
    if unknown:
        raise ValueError(f"{source}: {unknown[0]} has no row in the tables{_and_more(unknown)}")
    for name, row in expected.items():
        if reader.shape(name) != row.native_shape:
            raise ValueError(
                f"{source}: {name} has shape {list(reader.shape(name))}; "
                f"{HF_FOLDER}/config.json implies {list(row.native_shape)}"
            )
    required = {name for row in table.rows for name, _ in row.hf}
    known = required | {name for carry in table.carries for name, _ in carry.hf}
    known |= {alias.name for alias in table.aliases}
    for name in sorted(infos.keys() - known) or sorted(required - infos.keys()):
        raise ValueError(f"{source}: {HF_FOLDER}/{WEIGHTS} does not fit {HF_FOLDER}/config.json: {name}")


def _padded_size(reader: LayeredReader, model: ModelConfig) -> int:
    vocab_size = model.language.vocab_size
    rows = reader.shape(_EMBEDDING)[0] if _EMBEDDING in reader.names else vocab_size
    if rows < vocab_size:
        raise ValueError(f"{reader.path}: {_EMBEDDING} has {rows} rows; the vocabulary has {vocab_size}")
    return rows


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # aminmax passes NaN on and needs one pass and no memory, unlike isfinite().all().
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise ValueError(f"{name} holds NaN or infinite values")


def _write_carried(hf: Path, folder: HFFolder | RandomWeights, carries: list[Carry], meter: _Meter) -> None:
    infos = [folder.tensors[name] for carry in carries for name, _ in carry.hf]
    if not infos:
        return
    file = SafetensorsFile(hf / CARRIED, infos, {"format": "pt"})
    for carry in carries:
        for name, _ in carry.hf:
            tensor = folder.read(name)
            _check_finite(name, tensor)
            if carry.check is not None:
                carry.check(name, tensor)
            file.write(name, tensor)
            meter.add(tensor)
    file.close()


def _open_carried(hf: Path) -> Any:
    from safetensors import safe_open

    return safe_open(hf / CARRIED, "pt") if (hf / CARRIED).exists() else nullcontext()


def _write_weights_json(hf: Path, folder: HFFolder | RandomWeights, prefixes: dict[str, str]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    files = {
        file: {
            "metadata": folder.metadata.get(file, {"format": "pt"}),
            "tensors": [[info.name, codes[info.dtype], list(info.shape)] for info in infos],
        }
        for file, infos in folder.files.items()
    }
    text = json.dumps({"prefixes": prefixes, "files": files}, indent=None)
    (hf / WEIGHTS).write_text(text + "\n", encoding="utf-8")


def _read_weights_json(
    hf: Path, max_shard_bytes: int | None
) -> tuple[dict[str, list[TensorInfo]], dict[str, dict[str, str]], dict[str, str]]:
    """The files to write, their metadata, and the names' prefixes."""
    try:
        content = json.loads((hf / WEIGHTS).read_text(encoding="utf-8"))
        files = {
            os.path.basename(file): [
                TensorInfo(name, DTYPES[code], tuple(shape)) for name, code, shape in entry["tensors"]
            ]
            for file, entry in content["files"].items()
        }
        metadata = {file: entry["metadata"] for file, entry in content["files"].items()}
        prefixes = content["prefixes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{hf / WEIGHTS}: cannot be read ({error!r})") from None
    if max_shard_bytes is not None:
        files = split_into_shards([info for infos in files.values() for info in infos], max_shard_bytes)
        metadata = {file: {"format": "pt"} for file in files}
    elif not all(file.endswith(".safetensors") for file in files):
        # Came from .bin files: the same tensors in the same number of files, as transformers names them.
        renamed = {file: _safetensors_name(file) for file in files}
        files = {renamed[file]: infos for file, infos in files.items()}
        metadata = {renamed[file]: entry for file, entry in metadata.items()}
    return files, metadata, prefixes


def _safetensors_name(bin_name: str) -> str:
    return bin_name.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def _tokenizer_files(directory: PathLike | None) -> list[Path]:
    if directory is None:
        return []
    patterns = _TOKENIZER_FILES
    found = [path for pattern in patterns for path in sorted(Path(directory).glob(pattern)) if path.is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json") for path in found):
        raise ValueError(
            f"{directory}: no tokenizer (tokenizer.json, tokenizer.model, tokenizer_config.json)"
        )
    return found


class _Meter:
    """Counts bytes for a progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self.add()

    def add(self, *tensors: Tensor) -> None:
        self._done += sum(tensor.nbytes for tensor in tensors)
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
