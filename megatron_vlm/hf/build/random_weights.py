"""Random weights for a model of which only ``config.json`` is there."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.formats.folder import SHARD_BYTES, TensorInfo, split_into_shards
from megatron_vlm.hf.tables.model import build_table, check_exported
from megatron_vlm.hf.tables.table import IN_MODEL, ON_THE_HUB, PREFIXES, fixed_tensors

# What save_pretrained of transformers 5 calls the parts.
_SAVED = {**ON_THE_HUB, "tower": PREFIXES["tower"][1]}


class RandomWeights:
    """The tensors of a LLaVA as transformers initialises them; read like ``HFFolder``.

    The model has no memory of its own: reading a tensor fills one layer, embedding, projector or head, which
    is kept until the next one is asked for. Each is seeded by its name, so the order of reading, and with
    it the layout, changes nothing.

    Args:
        directory: a folder whose ``config.json`` describes the model; the file is all that is read.
        seed: of all weights.

    Raises:
        ValueError: there is no config, or transformers doesn't take it.
    """

    def __init__(self, directory: str | os.PathLike[str], seed: int) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.path, self.seed = Path(directory), seed
        self._model_config = ModelConfig.from_hf_dir(str(directory))
        check_exported(self._model_config)  # what transformers can't hold it can't initialise
        try:
            config = AutoConfig.from_pretrained(directory)
            with torch.device("meta"):
                self._model: Any = AutoModelForImageTextToText.from_config(config)
        except Exception as error:  # transformers raises many types for a config that it doesn't take
            reason = " ".join(str(error).split())
            raise ValueError(f"{directory}: transformers cannot build this model ({reason})") from None
        model = self._model_config
        self._fixed = fixed_tensors(build_table(model, model.language.vocab_size, _SAVED))
        self._names: dict[str, tuple[str, str]] = {}  # by the name on disk: the parameter's, inside and there
        self.tensors: dict[str, TensorInfo] = {}
        dtype = getattr(torch, self._model_config.dtype)
        for name, parameter in self._model.named_parameters():
            if name == "lm_head.weight" and self._model_config.language.tie_word_embeddings:
                continue
            part = next(part for part, prefix in IN_MODEL.items() if name.startswith(prefix))
            whole = _SAVED[part] + name.removeprefix(IN_MODEL[part])
            for saved, value in _as_saved(whole, parameter):
                self._names[saved] = name, whole
                self.tensors[saved] = TensorInfo(saved, dtype, tuple(value.shape))
        self.files = split_into_shards(list(self.tensors.values()), SHARD_BYTES)
        self.metadata = {file: {"format": "pt"} for file in self.files}
        self._filled: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> Tensor:
        """Make one tensor."""
        if name in self._fixed:
            return self._fixed[name]().to(self.tensors[name].dtype)
        inside, whole = self._names[name]
        unit = _unit(inside)
        if self._filled[0] != unit:
            self._filled = ("", {})  # gone before the next one is made
            self._filled = (unit, self._fill(unit))
        saved = dict(_as_saved(whole, self._filled[1][inside.removeprefix(unit + ".")]))
        return saved[name].to(self.tensors[name].dtype)

    def _fill(self, unit: str) -> dict[str, Tensor]:
        if unit == "model.image_newline":
            return {unit: self._newline(unit)}
        module = copy.deepcopy(self._model.get_submodule(unit)).to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.data = torch.full_like(parameter, float("nan"), dtype=torch.float32)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(zlib.crc32(f"{self.seed} {unit}".encode()))  # of a seed, 32 bits are used
            module.apply(self._owner(unit)._init_weights)  # children first, as transformers does it
        return {name: parameter.detach() for name, parameter in module.named_parameters()}

    def _newline(self, name: str) -> Tensor:
        """Return ``image_newline``, which transformers initialises with the whole model around it."""
        hidden_size = self._model_config.language.hidden_size
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.randn(hidden_size, generator=generator) / hidden_size**0.5

    def _owner(self, unit: str) -> Any:
        """Return the innermost pre-trained model around a unit, which knows how its parts are initialised."""
        from transformers import PreTrainedModel

        path = unit.split(".")
        around = (self._model.get_submodule(".".join(path[:n])) for n in range(len(path) - 1, -1, -1))
        return next(module for module in around if isinstance(module, PreTrainedModel))


def _as_saved(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter under its name on disk; Mixtral's experts, which share parameters inside, one by
    one."""
    layer, _, fused = name.partition(".mlp.experts.")
    if not fused:
        yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), parameter
    parts = ("w1", "w3") if fused == "gate_up_proj" else ("w2",)
    for number, expert in enumerate(parameter if fused else ()):
        for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{layer}.block_sparse_moe.experts.{number}.{part}.weight", tensor


def _unit(name: str) -> str:
    """Return the module that is filled at once: a layer, or a direct part of tower, language model or
    whole."""
    path = name.split(".")
    if "layers" in path:
        return ".".join(path[: path.index("layers") + 2])
    if name.startswith(("model.vision_tower.", "model.language_model.")):
        return ".".join(path[:3])
    return ".".join(path[:-1]) if path[0] == "lm_head" else ".".join(path[:2])
