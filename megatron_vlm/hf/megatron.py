"""A Megatron checkpoint read as if it were the Hugging Face folder that it converts to.

What such a folder holds beside trained weights travels in the checkpoint's ``hf/`` folder:

    every small file        byte for byte
    carried.safetensors     the tensors that training never runs, under their own names
    weights.json            names, dtypes, shapes and order of the tensors in each file
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import (
    HF_FOLDER,
    megatron_lms_folder,
    read_manifest,
    resolve_checkpoint,
)
from megatron_vlm.hf import Difference
from megatron_vlm.hf.adapters import find_adapters, merged
from megatron_vlm.hf.build.random_weights import RandomWeights
from megatron_vlm.hf.formats.classic import FORMAT, NOT_IN_LLAVA_MODEL, ClassicReader, check_arguments
from megatron_vlm.hf.formats.folder import (
    CODES,
    DTYPES,
    Cast,
    HFFolder,
    SafetensorsFile,
    TensorInfo,
    cast,
    cast_infos,
    copy_small_files,
    open_weights_file,
)
from megatron_vlm.hf.formats.native import LayeredReader, open_weights
from megatron_vlm.hf.formats.streaming import HASH, check_finite, describe, same_bits
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import PREFIXES, Carry, Row, Table, detect_prefixes
from megatron_vlm.system.files import check_readable, read_json

CARRIED = "carried.safetensors"
WEIGHTS = "weights.json"
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_MODEL_PREFIXES = ("vision_model.", "vision_projection.", "language_model.")

PathLike = str | os.PathLike[str]
Source = HFFolder | RandomWeights | Cast


class MegatronCheckpoint:
    """A checkpoint's tensors under their Hugging Face names; LoRA adapters are merged into them.

    Args:
        path: a checkpoint folder, a root, or a run folder.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.
        hf_config: the Hugging Face folder that training began with, for a checkpoint that Megatron-LM wrote.
            It gives what such a one lacks: architecture, small files, tensors that training never runs.

    Raises:
        ValueError: there is no such checkpoint, or a tensor is missing, unknown or misshapen.
    """

    def __init__(
        self, path: PathLike, base: PathLike | None = None, hf_config: PathLike | None = None
    ) -> None:
        self.path = find_checkpoint(path, hf_config)
        self.hf = Path(hf_config) if hf_config is not None else self.path / HF_FOLDER
        self.model = ModelConfig.from_hf_dir(str(self.hf))
        self.folder = HFFolder(self.hf) if hf_config is not None else None
        if self.folder is not None:
            prefixes = detect_prefixes(self.folder.tensors)
            self.files, self.metadata = _as_safetensors(self.folder.files, self.folder.metadata)
            self.manifest: dict[str, Any] = {"format": FORMAT, "model": self.model.to_dict()}
        else:
            self.files, self.metadata, prefixes = _read_weights_json(self.hf)
            self.manifest = read_manifest(self.path)
        self.tensors = {info.name: info for infos in self.files.values() for info in infos}
        self.prefixes = prefixes
        self.reader: LayeredReader | ClassicReader
        if self.manifest["format"] == FORMAT:
            table = build_table(self.model, self.model.language.vocab_size, prefixes)
            self.reader = ClassicReader(self.path, {row.native: row.shard for row in table.rows})
            check_arguments(self.path, self.reader.arguments, self.model)
        else:
            self.reader = open_weights(self.path, base)
        self.table = build_table(self.model, _padded_size(self.reader, self.model), prefixes)
        self._lora = ModelConfig.from_dict(self.manifest["model"]).lora
        self._adapters = find_adapters(self.table, self._lora)
        self._check({name for adapter in self._adapters.values() for name in adapter.tensors(1)})
        self._rows = {name: row for row in self.table.rows for name, _ in row.hf}
        self._aliases = {alias.name: alias.of for alias in self.table.aliases}
        self._last: tuple[Row | None, dict[str, Tensor]] = (None, {})

    @property
    def carried(self) -> list[str]:
        """The tensors that training never runs."""
        names = (name for carry in self.table.carries for name, _ in carry.hf)
        return [name for name in names if name in self.tensors]

    @property
    def names(self) -> list[str]:
        """All tensors, in the order that they are read in fastest."""
        aliases = {of: alias for alias, of in self._aliases.items()}
        ordered = (n for name in (*self._rows, *self.carried) for n in (name, aliases.get(name)))
        return [name for name in ordered if name in self.tensors]

    def read(self, name: str) -> Tensor:
        """Read a tensor in the dtype of the imported folder; weights trained in another are rounded once."""
        return cast(name, self.read_unrounded(name), self.tensors[name].dtype)

    def convert_to(self, dtype: torch.dtype) -> None:
        """Let :meth:`read` return this dtype instead, for tensors of floating point."""
        self.files = cast_infos(self.files, dtype)
        self.tensors = {info.name: info for infos in self.files.values() for info in infos}

    def read_unrounded(self, name: str) -> Tensor:
        """Read a tensor in the dtype that it is stored in, or float32 after adapters were merged into it.

        Raises:
            ValueError: it is damaged, or not finite.
        """
        name = self._aliases.get(name, name)
        if name not in self._rows:
            return self._read_carried(name)
        row = self._rows[name]
        if self._last[0] is not row:
            native = self.reader.read(row.native)
            check_finite(row.native, native)
            parts = dict(zip((name for name, _ in row.hf), row.op.to_hf(native), strict=True))
            self._last = row, parts
        tensor = self._last[1][name]
        if self._lora is not None and name in self._adapters:
            assert isinstance(self.reader, LayeredReader)  # adapters are trained here, in the native format
            return merged(tensor, self._adapters[name], self._lora, self.reader)
        return tensor

    def write_hf_files(self, output: Path, verify: bool) -> dict[str, Any]:
        """Make the ``hf/`` folder of another checkpoint of these weights; as :func:`write_carried`."""
        write_hf_files(output, self, self.hf, self.table, self.prefixes)
        carried = [carry for carry in self.table.carries if carry.hf[0][0] in self.tensors]
        return write_carried(output, self, carried, lambda tensor: None, verify)

    def _read_carried(self, name: str) -> Tensor:
        if self.folder is not None:
            tensor = self.folder.read(name)
            check_finite(name, tensor)
            return tensor
        path = self.hf / CARRIED
        check_readable(path)
        names, read = open_weights_file(path)
        if name not in names:
            raise ValueError(f"{path}: {name} is missing")
        tensor = read(name)
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, other than {WEIGHTS} says")
        check_finite(name, tensor)
        return tensor

    def _check(self, adapters: set[str]) -> None:
        """Check that the checkpoint holds the tensors of table and adapters, and no others of the model."""
        stored = set(self.reader.names)
        expected = {row.native: row for row in self.table.rows}
        missing = [name for name in (*expected, *sorted(adapters)) if name not in stored]
        if missing:
            why = "; Megatron-LM's LLaVAModel has none, so what it trained is another function"
            why = why if missing[0] in NOT_IN_LLAVA_MODEL and self.folder is not None else ""
            raise ValueError(f"{self.path}: {missing[0]} is missing{and_more(missing)}{why}")
        known_here = expected.keys() | adapters
        # Beside the model's tensors, which a manifest lists, there may be an optimizer's.
        models = {n for n in stored if n.startswith(_MODEL_PREFIXES) or n in self.manifest.get("tensors", {})}
        unknown = sorted(models - known_here)
        if unknown:
            raise ValueError(f"{self.path}: {unknown[0]} has no row in the tables{and_more(unknown)}")
        for name, row in expected.items():
            if self.reader.shape(name) != row.native_shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {list(self.reader.shape(name))}; "
                    f"{self._config} implies {list(row.native_shape)}"
                )
        shapes, required = self.table.shapes, set(self.table.required)
        wrong = [name for name, info in self.tensors.items() if shapes.get(name) != info.shape]
        for name in sorted(wrong) or sorted(required - self.tensors.keys()):
            weights = f"{HF_FOLDER}/{WEIGHTS}" if self.folder is None else self.hf
            raise ValueError(f"{self.path}: {weights} does not fit {self._config}: {name}")

    @property
    def _config(self) -> str:
        return f"{HF_FOLDER if self.folder is None else self.hf}/config.json"


def find_checkpoint(path: PathLike, hf_config: PathLike | None = None) -> Path:
    """Return the folder of a checkpoint; with ``hf_config`` of one that Megatron-LM itself wrote.

    Raises:
        ValueError: there is none.
    """
    return resolve_checkpoint(path) if hf_config is None else megatron_lms_folder(path)


def write_hf_files(
    hf: Path, source: Source | MegatronCheckpoint, small: Path, table: Table, prefixes: dict[str, str]
) -> None:
    """Make the ``hf/`` folder of a checkpoint, but for the tensors carried; ``small`` has the small files."""
    hf.mkdir()
    copy_small_files(small, hf)
    for alias in table.aliases:
        if alias.name in source.tensors and not same_bits(source.read(alias.name), source.read(alias.of)):
            raise ValueError(
                f"{source.path}: {alias.name} differs from {alias.of}, but config.json ties them; "
                "set tie_word_embeddings to false"
            )
    files = {
        file: {
            "metadata": source.metadata.get(file, {"format": "pt"}),
            "tensors": [[info.name, CODES[info.dtype], list(info.shape)] for info in infos],
        }
        for file, infos in source.files.items()
    }
    text = json.dumps({"prefixes": prefixes, "files": files})
    (hf / WEIGHTS).write_text(text + "\n", encoding="utf-8")


def write_carried(
    hf: Path,
    source: Source | MegatronCheckpoint,
    carries: list[Carry],
    wrote: Callable[[Tensor], None],
    verify: bool,
) -> dict[str, Any]:
    """Write the tensors that training doesn't run.

    Args:
        wrote: called with each of them.
        verify: read each back from the file.

    Returns:
        The manifest's entry of each.

    Raises:
        ValueError: one is not finite, or not what its table needs.
        Difference: what was read back is not what was written.
    """
    infos = [source.tensors[name] for carry in carries for name, _ in carry.hf]
    written: dict[str, Any] = {}
    if not infos:
        return written
    file = SafetensorsFile(hf / CARRIED, infos, {"format": "pt"})
    for carry in carries:
        for name, _ in carry.hf:
            tensor = source.read(name)
            check_finite(name, tensor)
            if carry.check is not None:
                carry.check(name, tensor)
            file.write(name, tensor)
            written[name] = describe(tensor)
            if verify:
                check_written(file.hash(name) == written[name][HASH], name)
            wrote(tensor)
    file.close()
    return written


def check_written(equal: bool, name: str) -> None:
    """Say that a file doesn't hold what was written to it.

    Raises:
        Difference: not ``equal``.
    """
    if not equal:
        raise Difference(f"{name} was written other than it was read; the disk or the memory is not reliable")


def and_more(names: list[str]) -> str:
    """Return `` (and 2 more)``, behind the first of three."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _padded_size(reader: LayeredReader | ClassicReader, model: ModelConfig) -> int:
    vocab_size = model.language.vocab_size
    rows = reader.shape(_EMBEDDING)[0] if _EMBEDDING in reader.names else vocab_size
    if rows < vocab_size:
        raise ValueError(f"{reader.path}: {_EMBEDDING} has {rows} rows; the vocabulary has {vocab_size}")
    return rows


def _read_weights_json(
    hf: Path,
) -> tuple[dict[str, list[TensorInfo]], dict[str, dict[str, str]], dict[str, str]]:
    """Return the files that were imported, their metadata, and the names' prefixes."""
    check_readable(hf / WEIGHTS)
    try:
        content = read_json(hf / WEIGHTS)
        files = {
            os.path.basename(file): [
                TensorInfo(str(name), DTYPES[code], tuple(shape)) for name, code, shape in entry["tensors"]
            ]
            for file, entry in content["files"].items()
        }
        metadata: dict[str, Any] = {file: dict(entry["metadata"]) for file, entry in content["files"].items()}
        prefixes = {part: str(content["prefixes"][part]) for part in PREFIXES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{hf / WEIGHTS}: cannot be read ({error!r})") from None
    return *_as_safetensors(files, metadata), prefixes


def _as_safetensors(
    files: dict[str, list[TensorInfo]], metadata: dict[str, dict[str, str]]
) -> tuple[dict[str, list[TensorInfo]], dict[str, dict[str, str]]]:
    """Return .bin files' tensors in the same number of safetensors files, as transformers names them."""
    names = {file: file if file.endswith(".safetensors") else _safetensors_name(file) for file in files}
    return (
        {names[file]: infos for file, infos in files.items()},
        {names[file]: metadata.get(file, {"format": "pt"}) for file in files},
    )


def _safetensors_name(bin_name: str) -> str:
    return bin_name.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"
