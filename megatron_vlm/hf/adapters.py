"""LoRA adapters: merged into the weights that they stand beside, or as a PEFT adapter, read and written.

PEFT keeps A and B per Hugging Face projection, as checkpoints here do, so a tensor is only renamed.
The projector, which trains in full beside the adapters, is PEFT's ``modules_to_save``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import (
    HF_FOLDER,
    RUN_CONFIG,
    appearing_folder,
    check_replaceable,
    read_model,
    resolve_checkpoint,
)
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.formats.folder import SafetensorsFile, TensorInfo, open_weights_file
from megatron_vlm.hf.formats.native import LayeredReader, open_weights
from megatron_vlm.hf.formats.streaming import check_finite
from megatron_vlm.hf.peft_config import ADAPTER_CONFIG, MERGE, PeftAdapter, read_peft_config
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.hf.tables.table import IN_MODEL, Carry, Row, Table, detect_prefixes
from megatron_vlm.system.files import check_readable

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PICKLE = "adapter_model.bin"
_PEFT = "base_model.model."
_IN_ADAPTER = ("lora", "projector")  # entries of --train-modules
_PROJECTOR_MODULE = "multi_modal_projector"
_LINEAR = re.compile(r"(language|vision)_model\.decoder\.layers\.\d+\..*\.linear_(qkv|proj|fc1|fc2)\.weight")


@dataclass(frozen=True)
class Adapter:
    """A and B beside one Hugging Face weight.

    Attributes:
        weight: name of that weight, ``[out, in]``.
        native: what their native names begin with: ``...linear_qkv.adapters.q_proj.``.
        shape: of the weight.
    """

    weight: str
    native: str
    shape: Shape

    def tensors(self, rank: int) -> dict[str, Shape]:
        """Return the native name and shape of A and B."""
        out_size, in_size = self.shape
        return {
            f"{self.native}lora_A.weight": (rank, in_size),
            f"{self.native}lora_B.weight": (out_size, rank),
        }


def find_adapters(table: Table, lora: LoRAConfig | None) -> dict[str, Adapter]:
    """Return the adapters of a model, by the Hugging Face name of their weight; none without ``lora``."""
    if lora is None:
        return {}
    found = {}
    for row in table.rows:
        match = _LINEAR.fullmatch(row.native)
        targets = () if match is None else getattr(lora, f"{match[1]}_targets")
        if not targets:
            continue
        for name, shape in row.hf:
            projection = name.split(".")[-2]
            if projection in targets:
                native = row.native.removesuffix("weight") + f"adapters.{projection}."
                found[name] = Adapter(name, native, shape)
    return found


def merged(weight: Tensor, adapter: Adapter, lora: LoRAConfig, reader: LayeredReader) -> Tensor:
    """Return ``W + scale * B A`` in float32."""
    a, b = (_read_finite(reader, name).float() for name in adapter.tensors(lora.rank))
    return weight.float() + lora.scale * (b @ a)


def export_adapter(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    force: bool,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the adapters of a run's checkpoint as a PEFT adapter, with the projector beside them.

    Args:
        checkpoint: a checkpoint folder, a root, or a run folder.
        folder: the folder to make; must not hold anything unless ``force``.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.

    Returns:
        ``folder``. Its base model is the one that the run began with.

    Raises:
        ValueError: the checkpoint has no adapters, is damaged, or the output is there already.
    """
    source, target = resolve_checkpoint(checkpoint), Path(folder)
    lora = read_model(source).lora
    if lora is None:
        raise ValueError(f"{source} has no adapters; leave --adapter-only out to convert the whole model")
    trained = [entry.name for entry in RunConfig.load(str(source / RUN_CONFIG)).trained]
    model = ModelConfig.from_hf_dir(str(source / HF_FOLDER))
    others = [name for name in trained if name not in _IN_ADAPTER]
    if model.anyres is not None and "projector" in trained:
        others.append("image_newline")  # a parameter of the model itself, where PEFT saves modules
    if others:
        raise ValueError(
            f"{source}: {', '.join(others)} was trained too, which no adapter holds; leave --adapter-only out"
        )
    if force:
        check_replaceable(target, (ADAPTER_CONFIG,), "PEFT adapter")
    reader = open_weights(source, base)
    table = build_table(model, model.language.vocab_size, IN_MODEL)
    adapters = find_adapters(table, lora)
    tensors = dict(_peft_tensors(table, adapters, lora))
    projector = [row for row in table.rows if _is_projector(row)]
    missing = [n for n in (*tensors, *(row.native for row in projector)) if n not in reader.names]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing")
    infos = [TensorInfo(name, reader.dtype(native), shape) for native, (name, shape) in tensors.items()]
    for row in projector:
        infos += [TensorInfo(_PEFT + name, reader.dtype(row.native), shape) for name, shape in row.hf]
    for carry in table.carries:
        if _is_projector(carry):
            infos += [TensorInfo(_PEFT + name, infos[-1].dtype, shape) for name, shape in carry.hf]

    with appearing_folder(target, replace=force) as output:
        file = SafetensorsFile(
            output / ADAPTER_WEIGHTS, sorted(infos, key=lambda info: info.name), {"format": "pt"}
        )
        for native, (name, _) in tensors.items():
            file.write(name, _read_finite(reader, native))
        for row in projector:
            parts = row.op.to_hf(_read_finite(reader, row.native))
            for (name, _), tensor in zip(row.hf, parts, strict=True):
                file.write(_PEFT + name, tensor)
        for carry in table.carries:
            if _is_projector(carry):
                assert carry.value is not None  # the identity behind a linear projector
                for name, shape in carry.hf:
                    file.write(_PEFT + name, carry.value(shape))
        file.close()
        text = json.dumps(_peft_config(lora, model), indent=2, sort_keys=True)
        (output / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return target


def read_adapter(
    folder: str | os.PathLike[str],
    model: ModelConfig,
    base: LayeredReader | None = None,
    wanted: Set[str] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Tensor]:
    """Return the tensors of a PEFT adapter by native name, the projector's too where it holds one.

    What a run makes of them is what ``PeftModel.from_pretrained`` makes of the folder. PiSSA and OLoRA, which
    take their start out of the base weights, become a plain LoRA of twice the rank, as PEFT itself converts
    them (``subtract_mutated_init``): ``W + s B A - s B0 A0``.

    Args:
        model: with the adapters that are wanted.
        base: the weights that the adapter lies over; only PiSSA and OLoRA need them.
        wanted: native names; None: all.
        say: told what is left out.

    Raises:
        ValueError: it isn't a LoRA adapter, or not of this rank, scale, these targets or this model.
    """
    lora = model.lora
    assert lora is not None
    config = read_peft_config(Path(folder))
    config.check_fits(lora)
    path = _weights_file(Path(folder))
    names, read = open_weights_file(path)
    table = build_table(model, model.language.vocab_size, _prefixes(names))
    adapters = find_adapters(table, lora)
    entries: list[Row | Carry] = [*table.rows, *table.carries]
    saved = {name for entry in entries for name, _ in entry.hf if config.is_saved(name)}
    projector = [row for row in table.rows if row.hf[0][0] in saved]
    for entry in entries:
        if entry.hf[0][0] in saved and not _is_projector(entry):
            raise ValueError(
                f"{config.path}: modules_to_save has {entry.hf[0][0]} trained in full; supported: "
                f"{_PROJECTOR_MODULE}; {MERGE}"
            )
    pairs = {_PEFT + name: shape for name, shape in _pairs(adapters, config.rank)}
    known = {*pairs, *(_PEFT + name for name in saved)}
    optional = {_PEFT + name for c in table.carries if _is_projector(c) for name, _ in c.hf}
    unused = {_PEFT + name for c in table.carries for name in _names_beside(c)}
    for name in sorted(known - optional - set(names)):
        raise ValueError(f"{path}: {name} is missing; see --lora-targets")
    for name in sorted(set(names) - known - optional - unused):
        raise ValueError(
            f"{path}: {name} belongs to no projection that has adapters here; see --lora-targets"
        )
    for weight in adapters:
        if not config.has_adapter(weight.removesuffix(".weight")):
            raise ValueError(
                f"{path}: {weight} has adapters, but is not of target_modules in {config.path.name}; PEFT "
                "wouldn't use them"
            )
    left_out = sorted(unused.intersection(names))
    if left_out:
        say(f"{path}: {len(left_out)} tensors are left out, of layers that don't run, such as {left_out[0]}")

    def checked(name: str, shape: Shape) -> Tensor:
        tensor = read(_PEFT + name)
        check_finite(f"{path}: {_PEFT + name}", tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {_PEFT + name} is {list(tensor.shape)}, not {list(shape)}")
        return tensor

    found: dict[str, Tensor] = {}
    for row in table.rows:
        beside = [adapters[name] for name, _ in row.hf if name in adapters]
        own = [adapter for adapter in beside if wanted is None or adapter.tensors(1).keys() <= wanted]
        weights = _base_weights(row, config, base) if own else {}
        for adapter in beside:
            a, b = (checked(name, shape) for name, shape in _pairs({"": adapter}, config.rank))
            if adapter not in own:  # checked all the same, so that all ranks find the same fault
                continue
            if config.start is not None:
                start_a, start_b = _start(config, weights[adapter.weight])
                a, b = torch.cat([a.float(), start_a]), torch.cat([b.float(), -start_b], dim=1)
            if config.scale != lora.scale:
                b = b.float() * (config.scale / lora.scale)
            found.update(zip(adapter.tensors(lora.rank), (a, b), strict=True))
    for row in projector:
        found[row.native] = row.op.to_native([checked(name, shape) for name, shape in row.hf])
    return found


def _weights_file(folder: Path) -> Path:
    """Return the file of an adapter's tensors. As for PEFT, safetensors go first."""
    for name in (ADAPTER_WEIGHTS, _ADAPTER_PICKLE):
        check_readable(folder / name)
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS} and no {_ADAPTER_PICKLE}")


def _prefixes(names: Collection[str]) -> dict[str, str]:
    """Return the prefixes of the parts' names in an adapter, whatever release of transformers the model
    was of."""
    own = [name.removeprefix(_PEFT) for name in names]
    found = detect_prefixes(own)
    return {
        part: prefix if any(name.startswith(prefix) for name in own) else IN_MODEL[part]
        for part, prefix in found.items()
    }


def _names_beside(carry: Carry) -> Iterator[str]:
    """Yield the names of adapters beside weights that the model doesn't run."""
    for name, _ in carry.hf:
        for part in ("lora_A", "lora_B"):
            yield f"{name.removesuffix('weight')}{part}.weight"


def _base_weights(row: Row, config: PeftAdapter, base: LayeredReader | None) -> dict[str, Tensor]:
    """Return the weights that a start is computed from, by Hugging Face name; none for a plain one."""
    if config.start is None:
        return {}
    if base is None:
        raise ValueError(
            f"{config.path}: init_lora_weights is {config.start}, which needs the base's weights"
        )
    parts = row.op.to_hf(_read_finite(base, row.native))
    return {name: part for (name, _), part in zip(row.hf, parts, strict=True)}


def _start(config: PeftAdapter, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT's ``pissa_init`` or ``olora_init`` sets them beside a weight, which then
    loses their product."""
    rank = config.rank
    if config.start == "olora":
        q, r = torch.linalg.qr(weight.float())
        return r[:rank], q[:, :rank]
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[:rank] / config.scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _read_finite(reader: LayeredReader, name: str) -> Tensor:
    tensor = reader.read(name)
    check_finite(name, tensor)
    return tensor


def _is_projector(entry: Row | Carry) -> bool:
    return _PROJECTOR_MODULE in entry.hf[0][0].split(".")


def _pairs(adapters: dict[str, Adapter], rank: int) -> Iterator[tuple[str, Shape]]:
    """Yield the Hugging Face name and shape of each A and B."""
    for adapter in adapters.values():
        for native, shape in adapter.tensors(rank).items():
            yield adapter.weight.removesuffix("weight") + native.removeprefix(adapter.native), shape


def _peft_tensors(
    table: Table, adapters: dict[str, Adapter], lora: LoRAConfig
) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """Yield the native name of each A and B; PEFT's name and the shape."""
    natives = [native for adapter in adapters.values() for native in adapter.tensors(lora.rank)]
    for native, (name, shape) in zip(natives, _pairs(adapters, lora.rank), strict=True):
        yield native, (_PEFT + name, shape)


def _peft_config(lora: LoRAConfig, model: ModelConfig) -> dict[str, Any]:
    """Return ``adapter_config.json``; keys that it leaves out have PEFT's defaults."""
    patterns = []
    if lora.language_targets:
        patterns.append(rf".*language_model\..*\.({'|'.join(lora.language_targets)})")
    if lora.vision_targets:
        blocks = "|".join(str(i) for i in range(model.num_vision_layers_run))
        patterns.append(rf".*vision_tower\..*layers\.({blocks})\..*\.({'|'.join(lora.vision_targets)})")
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        # A regular expression: the tower has a q_proj, too.
        "target_modules": "|".join(patterns),
        "modules_to_save": [_PROJECTOR_MODULE],
        "bias": "none",
        "inference_mode": True,
    }
