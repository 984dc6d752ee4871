"""LoRA adapters: merged into the weights that they stand beside, or as a PEFT adapter, read and written.

PEFT keeps A and B per Hugging Face projection, as checkpoints here do, so a tensor is only renamed.
The projector, which trains in full beside the adapters, is PEFT's ``modules_to_save``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vlm.config.checkpoint import (
    HF_FOLDER,
    RUN_CONFIG,
    appearing_folder,
    check_replaceable,
    read_manifest,
    resolve_checkpoint,
)
from megatron_vlm.config.files import check_readable
from megatron_vlm.config.lora import LoRAConfig
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.folder import SafetensorsFile, TensorInfo
from megatron_vlm.hf.mapping import Carry, Row, Table, build_table
from megatron_vlm.hf.native import LayeredReader, open_weights
from megatron_vlm.hf.ops import Shape
from megatron_vlm.hf.streaming import check_finite

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# PEFT names modules as they are called in the running model of transformers 5.
_IN_MODEL = {
    "tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "text": "model.language_model.",
    "head": "lm_head.",
}
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
        """Native name and shape of A and B."""
        out_size, in_size = self.shape
        return {
            f"{self.native}lora_A.weight": (rank, in_size),
            f"{self.native}lora_B.weight": (out_size, rank),
        }


def find_adapters(table: Table, lora: LoRAConfig | None) -> dict[str, Adapter]:
    """The adapters of a model, by the Hugging Face name of their weight; none without ``lora``."""
    if lora is None:
        return {}
    found = {}
    for row in table.rows:
        match = _LINEAR.fullmatch(row.native)
        targets = () if match is None else getattr(lora, f"{match[1]}_targets")
        for name, shape in row.hf:
            projection = name.split(".")[-2]
            if projection in targets:
                native = row.native.removesuffix("weight") + f"adapters.{projection}."
                found[name] = Adapter(name, native, shape)
    return found


def merged(weight: Tensor, adapter: Adapter, lora: LoRAConfig, reader: LayeredReader) -> Tensor:
    """``W + scale * B A`` in float32."""
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
    lora = ModelConfig.from_dict(read_manifest(source)["model"]).lora
    if lora is None:
        raise ValueError(f"{source} has no adapters; leave --adapter-only out to convert the whole model")
    others = [e.name for e in RunConfig.load(str(source / RUN_CONFIG)).trained if e.name not in _IN_ADAPTER]
    if others:
        raise ValueError(
            f"{source}: {', '.join(others)} was trained too, which no adapter holds; leave --adapter-only out"
        )
    if force:
        check_replaceable(target, (ADAPTER_CONFIG,), "PEFT adapter")
    model = ModelConfig.from_hf_dir(str(source / HF_FOLDER))
    reader = open_weights(source, base)
    table = build_table(model, model.language.vocab_size, _IN_MODEL)
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
            if _is_projector(carry):  # the identity behind a linear projector, see linear_table
                for name, shape in carry.hf:
                    file.write(_PEFT + name, torch.eye(shape[0]) if len(shape) == 2 else torch.zeros(shape))
        file.close()
        text = json.dumps(_peft_config(lora, model), indent=2, sort_keys=True)
        (output / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return target


def read_adapter(folder: str | os.PathLike[str], model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter by native name, the projector's too where it holds one.

    Args:
        model: with the adapters that are wanted.

    Raises:
        ValueError: it isn't a LoRA adapter, or not of this rank, scale, these targets or this model.
    """
    lora, path = model.lora, Path(folder)
    assert lora is not None
    _check_config(path, lora)
    table = build_table(model, model.language.vocab_size, _IN_MODEL)
    wanted = dict(_peft_tensors(table, find_adapters(table, lora), lora))
    found = {}
    check_readable(path / ADAPTER_WEIGHTS)
    try:
        with safe_open(path / ADAPTER_WEIGHTS, "pt") as file:
            names = set(file.keys())
            projector = [row for row in table.rows if _is_projector(row) and _PEFT + row.hf[0][0] in names]
            known = {name for name, _ in wanted.values()}
            known |= {_PEFT + name for row in projector for name, _ in row.hf}
            known |= {_PEFT + name for c in table.carries if _is_projector(c) for name, _ in c.hf}
            for name in sorted(known ^ names):
                if name not in names and any(_PEFT + n == name for c in table.carries for n, _ in c.hf):
                    continue
                problem = "is missing" if name in known else "belongs to no projection that has adapters here"
                raise ValueError(f"{path / ADAPTER_WEIGHTS}: {name} {problem}; see --lora-targets")
            for native, (name, shape) in wanted.items():
                found[native] = file.get_tensor(name)
                check_finite(f"{path / ADAPTER_WEIGHTS}: {name}", found[native])
                if found[native].shape != shape:
                    raise ValueError(
                        f"{path / ADAPTER_WEIGHTS}: {name} is {list(found[native].shape)}, not {list(shape)}"
                    )
            for row in projector:
                found[row.native] = row.op.to_native([file.get_tensor(_PEFT + n) for n, _ in row.hf])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / ADAPTER_WEIGHTS}: cannot be read ({error})") from None
    return found


def _read_finite(reader: LayeredReader, name: str) -> Tensor:
    tensor = reader.read(name)
    check_finite(name, tensor)
    return tensor


def _is_projector(entry: Row | Carry) -> bool:
    return entry.hf[0][0].startswith(_IN_MODEL["projector"])


def _peft_tensors(
    table: Table, adapters: dict[str, Adapter], lora: LoRAConfig
) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """Native name of each A and B; PEFT's name and the shape."""
    for weight, adapter in adapters.items():
        for native, shape in adapter.tensors(lora.rank).items():
            part = native.removeprefix(adapter.native)
            yield native, (_PEFT + weight.removesuffix("weight") + part, shape)


def _peft_config(lora: LoRAConfig, model: ModelConfig) -> dict[str, Any]:
    """``adapter_config.json``; what it leaves out has PEFT's default."""
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


def _check_config(folder: Path, lora: LoRAConfig) -> None:
    check_readable(folder / ADAPTER_CONFIG)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no PEFT adapter ({error!r})") from None
    if kind != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: not a plain LoRA (peft_type {kind}, use_dora or bias); supported: LORA")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{folder}: {key} is set; supported: one rank and alpha for all projections")
    for key, flag, wanted in (
        ("r", "--lora-rank", lora.rank),
        ("lora_alpha", "--lora-alpha", lora.alpha),
        ("use_rslora", "--use-rslora", lora.rslora),
    ):
        if config.get(key, False) != wanted:
            raise ValueError(f"{folder}: {key} is {config.get(key)}, but {flag} is {wanted}; give the same")
