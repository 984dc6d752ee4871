"""LLaVA's projector files, ``mm_projector.bin``: read, put into a checkpoint, and written from one.

    mlp2x_gelu   model.mm_projector.0.weight, .0.bias, .2.weight, .2.bias: Sequential(Linear, GELU, Linear)
    mlpNx_gelu   the same for any other number of linears
    linear       model.mm_projector.weight, .bias: Linear
    identity     nothing
    of a model that cuts images, besides: model.image_newline

Whatever stands before ``mm_projector`` is accepted: ``base_model.model.`` of files that LoRA runs write,
``module.`` of DeepSpeed's. A file without ``image_newline``, as LLaVA's own stage 1 writes it, leaves the
model's.

Source: LLaVA ``multimodal_projector/builder.py``, ``llava_arch.py``; ``train.py``,
``safe_save_model_for_hf_trainer``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.connectors.mlp import MOST
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import (
    appearing_folder,
    check_replaceable,
    is_checkpoint,
    read_manifest,
)
from megatron_vlm.hf.convert import reshard, write_weights
from megatron_vlm.hf.formats.folder import (
    SHARD_BYTES,
    HFFolder,
    SafetensorsFile,
    TensorInfo,
    cast,
    copy_small_files,
    open_weights_file,
    split_into_shards,
)
from megatron_vlm.hf.formats.streaming import Meter, Progress, check_finite, check_free_space
from megatron_vlm.hf.megatron import MegatronCheckpoint
from megatron_vlm.hf.tables.model import LLAVA_LAYERS, build_table
from megatron_vlm.hf.tables.ops import Shape
from megatron_vlm.hf.tables.table import detect_prefixes
from megatron_vlm.hf.target import check_apart, check_target
from megatron_vlm.system.files import read_json

FILE = "mm_projector"
_NAME = re.compile(r"(?:.*\.)?mm_projector\.(.+)")
_NEWLINE = re.compile(r"(?:.*\.)?image_newline")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class MMProjector:
    """The content of a projector file.

    Attributes:
        kind: as ``mm_projector_type`` in LLaVA's ``config.json``.
        tensors: by the names of Hugging Face folders behind the prefix, ``linear_1.weight`` and so on.
        newline: what stands behind each row of features where images are cut, if the file holds it.
        others: names in the file that are no projector's.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    newline: Tensor | None
    others: tuple[str, ...]

    def fit(self, model: ModelConfig) -> MMProjector:
        """Return the tensors of this file that a model takes.

        Raises:
            ValueError: it is of another kind or shape.
        """
        if self.kind != model.projector.kind:
            raise ValueError(
                f"{self.path}: a projector of type {self.kind}, the model's is {model.projector.kind}; build "
                "the model anew with scripts/convert/build_llava_jp.py --projector"
            )
        _check_activation(model)
        expected = _shapes(model)
        for name in sorted(expected.keys() ^ self.tensors.keys()):
            where = "the model has no such" if name in self.tensors else "the file lacks the"
            raise ValueError(f"{self.path}: {where} {_llava_name(self.kind, name)}")
        for name, shape in expected.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise ValueError(
                    f"{self.path}: {_llava_name(self.kind, name)} has shape {list(found)}, the model's "
                    f"{list(shape)}; it was trained with another tower or language model"
                )
        if self.newline is None:
            return self
        if model.anyres is None:
            return replace(self, newline=None, others=(*self.others, "image_newline"))
        size = [model.language.hidden_size]
        if list(self.newline.shape) != size:
            raise ValueError(
                f"{self.path}: image_newline has shape {list(self.newline.shape)}, the model's {size}"
            )
        return self

    def named(self, prefixes: dict[str, str]) -> dict[str, Tensor]:
        """Return the tensors by their Hugging Face names.

        Args:
            prefixes: as ``table.detect_prefixes`` returns.
        """
        named = {prefixes["projector"] + name: tensor for name, tensor in self.tensors.items()}
        if self.newline is not None:
            named[prefixes["newline"]] = self.newline
        return named


def read_projector(path: PathLike) -> MMProjector:
    """Read ``mm_projector.bin``, ``non_lora_trainables.bin``, a ``.safetensors`` file, or a folder with one.

    Raises:
        ValueError: it isn't there, isn't a file of weights, or holds no projector of a supported type.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / f"{FILE}{suffix}" for suffix in (".safetensors", ".bin")]
        path = next((file for file in found if file.is_file()), found[-1])
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    names, read = open_weights_file(path)
    own: dict[str, str] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match and own.setdefault(match[1], name) != name:
            raise ValueError(f"{path}: {name} and {own[match[1]]} are the same tensor of a projector")
    if not own:
        raise ValueError(
            f"{path}: holds no mm_projector; its first tensor is {next(iter(names), 'not there')}"
        )
    layers = {key.rpartition(".")[0] for key in own}
    kind = next((kind for kind in _kinds() if layers == LLAVA_LAYERS[kind](kind).keys()), None)
    strange = [key for key in own if not re.fullmatch(r"(\d+\.)?(weight|bias)", key)]
    if kind is None or strange:
        what = strange[0] if strange else f"the layers {', '.join(sorted(layers))}"
        raise ValueError(f"{path}: a projector with {what}; supported: {', '.join(LLAVA_LAYERS)}")
    newline = next((name for name in names if _NEWLINE.fullmatch(name)), None)
    held = {name: read(name) for name in (*own.values(), newline) if name is not None}
    for name, tensor in held.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, not floating point")
        check_finite(f"{path}: {name}", tensor)
    tensors = {}
    for key, name in own.items():
        layer, _, part = key.rpartition(".")
        tensors[f"{LLAVA_LAYERS[kind](kind)[layer]}.{part}"] = held[name]
    others = tuple(name for name in names if name not in held)
    return MMProjector(path, kind, tensors, held[newline] if newline else None, others)


def import_projector(
    projector: PathLike,
    checkpoint: PathLike,
    save_dir: PathLike,
    force: bool = False,
    progress: Progress | None = None,
    base: PathLike | None = None,
    verify: bool = False,
) -> MMProjector:
    """Write a checkpoint with another projector: a Hugging Face folder as a Hugging Face folder, a Megatron
    checkpoint in the native format, cut as the one given.

    Every other tensor keeps its bits; the projector's take the dtype of those that they replace.

    Args:
        projector: as :func:`read_projector` takes it.
        checkpoint: a Hugging Face folder, a checkpoint folder, a root, or a run folder.
        save_dir: the folder or root to make; must not hold anything unless ``force``.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.
        verify: read every tensor back from the files written, and compare.

    Returns:
        What was imported.

    Raises:
        ValueError: the file is no projector of this model, one of the two cannot be read, the disk is too
            full, or the output is there already.
        Difference: what was read back is not what was written.
    """
    file = read_projector(projector)
    if is_checkpoint(checkpoint):
        source = MegatronCheckpoint(checkpoint, base)
        file = file.fit(source.model)
        new = file.named(source.prefixes)
        layout = read_manifest(source.path)["layout"]
        tp, pp = layout["tp"], layout["pp"]
        reshard(checkpoint, save_dir, tp, pp, force, progress, base, verify, replaced=new)
        return file
    folder, target = HFFolder(checkpoint), Path(save_dir)
    file = file.fit(ModelConfig.from_hf_dir(str(checkpoint)))
    check_apart(folder.path, target)
    check_target(target, force)
    new = file.named(detect_prefixes(folder.tensors))

    def read(name: str) -> Tensor:
        if name in new:
            return cast(name, new[name], folder.tensors[name].dtype)
        tensor = folder.read(name)
        check_finite(name, tensor)
        return tensor

    files, metadata = folder.files, folder.metadata
    if not folder.is_safetensors:
        files = split_into_shards(list(folder.tensors.values()), SHARD_BYTES)
        metadata = {name: {"format": "pt"} for name in files}
    size = sum(info.nbytes for info in folder.tensors.values())
    check_free_space(target, size)
    with appearing_folder(target, replace=force) as output:
        copy_small_files(folder.path, output)
        names = [info.name for infos in files.values() for info in infos]
        about = {"source": str(folder.path), "projector": str(file.path)}
        write_weights(output, files, metadata, names, read, Meter(size, progress), verify, about)
    return file


def export_projector(
    checkpoint: PathLike,
    save_dir: PathLike,
    as_bin: bool = False,
    force: bool = False,
    base: PathLike | None = None,
) -> Path:
    """Write a checkpoint's projector as LLaVA does: ``mm_projector.safetensors`` and ``config.json``.

    Args:
        checkpoint: a Hugging Face folder, a checkpoint folder, a root, or a run folder.
        save_dir: the folder to make; must not hold anything unless ``force``.
        as_bin: ``mm_projector.bin``, which is what LLaVA itself reads.
        base: the checkpoint with all weights under one of trained weights only, if it has moved.

    Returns:
        The file.

    Raises:
        ValueError: there is no such checkpoint, its projector is not one that LLaVA has, or the output is
            there already.
    """
    read: Callable[[str], Tensor]
    if is_checkpoint(checkpoint):
        source = MegatronCheckpoint(checkpoint, base)
        config_dir, model, prefixes, read = source.hf, source.model, source.prefixes, source.read
    else:
        folder = HFFolder(checkpoint)
        config_dir, model, read = folder.path, ModelConfig.from_hf_dir(str(checkpoint)), folder.read
        prefixes = detect_prefixes(folder.tensors)
    _check_activation(model)
    for carry in build_table(model, model.language.vocab_size, prefixes).carries:
        if carry.check is not None:  # the identity behind a linear projector
            for name, _ in carry.hf:
                carry.check(name, read(name))
    tensors = {}
    for name in _shapes(model):
        tensor = read(prefixes["projector"] + name)
        check_finite(name, tensor)
        tensors[f"model.{_llava_name(model.projector.kind, name)}"] = tensor
    if model.anyres is not None:
        tensors["model.image_newline"] = read(prefixes["newline"])
        check_finite("image_newline", tensors["model.image_newline"])
    target = Path(save_dir)
    if force:
        check_replaceable(target, (f"{FILE}.*",), "projector's folder")
    with appearing_folder(target, replace=force) as output:
        if as_bin:
            # A view would take the whole storage behind it along.
            torch.save({name: tensor.clone() for name, tensor in tensors.items()}, output / f"{FILE}.bin")
        else:
            infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
            writer = SafetensorsFile(output / f"{FILE}.safetensors", infos, {"format": "pt"})
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
        text = json.dumps(_llava_config(config_dir, model), indent=2, ensure_ascii=False)
        (output / "config.json").write_text(text + "\n", encoding="utf-8")
    return target / f"{FILE}{'.bin' if as_bin else '.safetensors'}"


def _kinds() -> Iterator[str]:
    """Yield the kinds of LLaVA's projectors; where any number of linears makes one, with each number."""
    for kind in LLAVA_LAYERS:
        yield from (kind.replace("N", str(n)) for n in (range(1, MOST + 1) if "N" in kind else [0]))


def _shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the shapes of a model's projector, by transformers' names behind the prefix."""
    prefixes = detect_prefixes([])
    rows = build_table(model, model.language.vocab_size, prefixes).rows
    prefix = prefixes["projector"]
    return {n.removeprefix(prefix): s for row in rows for n, s in row.hf if n.startswith(prefix)}


def _llava_name(kind: str, name: str) -> str:
    """Return LLaVA's name of a tensor: ``mm_projector.0.weight`` for ``linear_1.weight``."""
    layer, _, part = name.partition(".")
    number = next((number for number, own in LLAVA_LAYERS[kind](kind).items() if own == layer), layer)
    return ".".join(filter(None, (FILE, number, part)))


def _check_activation(model: ModelConfig) -> None:
    if model.projector.norm_epsilon is not None:
        raise ValueError(
            f"config.json: projector_layernorm_eps is {model.projector.norm_epsilon}; LLaVA's mm_projector "
            "has no norm before it"
        )
    kind, activation = model.projector.kind, model.projector.activation
    if kind not in LLAVA_LAYERS:
        raise ValueError(
            f"the projector is {kind}, which LLaVA's mm_projector files don't hold; they hold "
            f"{', '.join(LLAVA_LAYERS)}"
        )
    if len(LLAVA_LAYERS[kind](kind)) > 1 and activation != "gelu":
        raise ValueError(
            f"config.json: projector_hidden_act is {activation!r}; LLaVA's mm_projector has 'gelu', so the "
            "same weights would be another function"
        )


def _llava_config(config_dir: Path, model: ModelConfig) -> dict[str, Any]:
    """Return LLaVA's ``config.json`` beside a projector: the language model's, and what the projector goes
    with."""
    config = read_json(config_dir / "config.json")
    vision = config.get("vision_config") or {}
    values = {
        **(config.get("text_config") or {}),
        "model_type": f"llava_{model.language.family}",
        "hidden_size": model.language.hidden_size,
        "mm_hidden_size": model.projector.input_size,
        "mm_projector_type": model.projector.kind,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch" if model.feature_strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": True,
        "use_mm_proj": True,
    }
    if model.anyres is not None:
        values.update(
            image_aspect_ratio="anyres",
            image_grid_pinpoints=[[width, height] for height, width in model.anyres.grid_pinpoints],
            mm_patch_merge_type="spatial_unpad",
        )
    tower = vision.get("_name_or_path")
    return {**values, "mm_vision_tower": tower} if tower else values
