"""Megatron-LM's classic checkpoints, ``iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt``, one file per rank.

Names and cuts are those of upstream's ``LLaVAModel``, so that its ``load_state_dict`` takes each rank's file
strictly. A rank numbers its layers from 0 on; with interleaved stages its chunks are ``model0``, ``model1``
and so on; with tied embeddings and more than one stage, the last one has a copy of the embedding as its
output layer. Both of upstream's layer specs are known: Transformer Engine fuses a norm with the
linear layer behind it, the local spec has modules of their own. What upstream's model has no place for,
``image_newline`` and ViP-LLaVA's norm, stands in the file beside the model, under :data:`BESIDE`.

Source: Megatron-LM ``megatron/training/checkpointing.py`` (``get_checkpoint_name``, ``generate_state_dict``)
and megatron-core ``models/multimodal/llava_model.py``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.formats.stored import Stored, reason, saved_tensors
from megatron_vlm.hf.formats.streaming import same_bits
from megatron_vlm.hf.tables.ops import REPLICATED, Shape, ShardRule
from megatron_vlm.hf.tables.table import Row
from megatron_vlm.plan.pipeline import StageCosts, deal_layers

FORMAT = "classic"
FILE = "model_optim_rng.pt"
POST_NORM = "vision_model.ln_post."  # upstream's SigLIP runs it, LLaVA takes features from before it
BESIDE = "not_in_llava_model"  # a key of a rank's file, beside "model"
TE, LOCAL = "transformer_engine", "local"  # upstream's layer specs

_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_CHUNK = re.compile(r"model(\d*)")
_LANGUAGE_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")  # TEGroupedMLP's
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"
NOT_IN_LLAVA_MODEL = (
    "vision_projection.image_newline",
    "vision_projection.norm.weight",
    "vision_projection.norm.bias",
)
_TE_TO_LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class ClassicLayout:
    """The cut of a classic checkpoint.

    Attributes:
        layers: of the language model, of each stage in the order of the model; ``pp * vpp`` numbers.
            Stage ``k`` is chunk ``k // pp`` of pipeline rank ``k % pp``.
        spec: whose names: :data:`TE` or :data:`LOCAL`.
    """

    tp: int
    pp: int
    vpp: int
    layers: tuple[int, ...]
    spec: str = TE

    def __post_init__(self) -> None:
        if len(self.layers) != self.pp * self.vpp or min(self.layers) < 1:
            raise ValueError(
                f"--layers-per-stage {','.join(map(str, self.layers))}: give {self.pp * self.vpp} numbers, "
                "one for each stage, from 1 on"
            )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace, num_layers: int) -> ClassicLayout | None:
        """Return the layout that the flags of ``cli.add_layout_flags`` say; None for the native format.

        Args:
            num_layers: of the language model.

        Raises:
            ValueError: they don't fit each other or the model.
        """
        if flags.format != FORMAT:
            for name in ("vpp", "layers_per_stage", "names"):
                if getattr(flags, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} is of --format classic; torch_dist loads at any layout")
            return None
        vpp = flags.vpp or 1
        if flags.pp * vpp > num_layers:
            raise ValueError(
                f"--pp {flags.pp} x --vpp {vpp}: the language model has only {num_layers} layers"
            )
        layers = flags.layers_per_stage or deal_layers(num_layers, StageCosts(layer=1), flags.pp, vpp)
        if sum(layers) != num_layers:
            given = ",".join(map(str, layers))
            raise ValueError(f"--layers-per-stage {given}: {sum(layers)} layers; the model has {num_layers}")
        return cls(flags.tp, flags.pp, vpp, tuple(layers), flags.names or TE)

    @property
    def stages(self) -> int:
        """Parts of the model, in order."""
        return self.pp * self.vpp


def rank_folder(tp_rank: int, pp_rank: int, pp: int) -> str:
    """Return the name of a rank's folder."""
    return f"mp_rank_{tp_rank:02d}" if pp == 1 else f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"


class ClassicWriter:
    """The writer of all ranks' files at once, tensor by tensor, each straight to its place.

    The files are laid out first, full of holes, and then filled. So nothing is held; but the zip archives
    lack their checksums, which ``torch.load`` doesn't read.

    Args:
        folder: an existing folder.
        rows: the tensors, with their cuts.
        dtypes: of each tensor.
        layout: how to cut them.
        model: for ``args`` of each file, and whether the last stage repeats the embedding.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        dtypes: Mapping[str, torch.dtype],
        layout: ClassicLayout,
        model: ModelConfig,
    ) -> None:
        self.path, self._layout, self._rows = folder, layout, {row.native: row for row in rows}
        self._places = {row.native: [_place(row.native, layout)] for row in rows}
        if model.language.tie_word_embeddings and layout.stages > 1:
            self._places[_EMBEDDING].append((layout.stages - 1, _OUTPUT))
        self._models: dict[tuple[int, int], dict[str, Stored]] = {}  # by tensor-parallel rank and stage
        arguments = _arguments(model, layout, self._rows[_EMBEDDING].native_shape[0])
        for tp_rank in range(layout.tp):
            for pp_rank in range(layout.pp):
                self._make_file(tp_rank, pp_rank, dtypes, arguments)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        rule = self._rows[name].shard
        for stage, local in self._places[name]:
            for tp_rank in range(self._layout.tp):
                self._models[tp_rank, stage][local].write(rule.shard(tensor, tp_rank, self._layout.tp))

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Return whether the files hold the tensor that was written, put together again."""
        stage, local = self._places[name][0]
        shards = [self._models[tp_rank, stage][local].read() for tp_rank in range(self._layout.tp)]
        return same_bits(_unshard(self._rows[name].shard, shards), tensor)

    def _make_file(
        self, tp_rank: int, pp_rank: int, dtypes: Mapping[str, torch.dtype], arguments: dict[str, Any]
    ) -> None:
        layout = self._layout
        models: list[dict[str, Tensor]] = [{} for _ in range(layout.vpp)]
        beside: dict[str, Tensor] = {}
        with FakeTensorMode():
            for name, places in self._places.items():
                for stage, local in places:
                    if stage % layout.pp == pp_rank:
                        shape = _shard_shape(self._rows[name], layout.tp)
                        part = beside if name in NOT_IN_LLAVA_MODEL else models[stage // layout.pp]
                        part[local] = torch.empty(shape, dtype=dtypes[name])
        named = {"model": models[0]} if layout.vpp == 1 else {f"model{i}": m for i, m in enumerate(models)}
        content = {
            "args": argparse.Namespace(**arguments),
            "checkpoint_version": 3.0,
            "iteration": 0,
            **named,
            **({BESIDE: beside} if beside else {}),
        }
        path = self.path / rank_folder(tp_rank, pp_rank, layout.pp) / FILE
        path.parent.mkdir()
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
        loaded = _load(path)
        for chunk, key in enumerate(named):
            own = loaded[BESIDE] if beside and chunk == 0 else {}
            self._models[tp_rank, chunk * layout.pp + pp_rank] = {**loaded[key], **own}


class ClassicReader:
    """The reader of a classic checkpoint's tensors: each whole, one at a time, whatever the layout.

    Args:
        folder: holds the ranks' folders.
        rules: how tensor parallelism cuts each tensor of the model; others are read as replicated.

    Raises:
        ValueError: a file is missing, damaged, or holds anything but weights; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str], rules: Mapping[str, ShardRule]) -> None:
        self.path = Path(folder)
        self._rules = rules
        ranks = _rank_files(self.path)
        self.arguments: dict[str, Any] = {}  # Megatron-LM's flags in the run that wrote it
        self.tp = 1 + max(tp_rank for tp_rank, _ in ranks)
        self.pp = 1 + max(pp_rank for _, pp_rank in ranks)
        self._shards: dict[str, list[Stored]] = {}
        per_rank = [self._pipeline(ranks, tp_rank) for tp_rank in range(self.tp)]
        for name in dict.fromkeys(name for tensors in per_rank for name in tensors):
            if any(name not in tensors for tensors in per_rank):
                raise ValueError(f"{self.path}: {name} is missing on some tensor-parallel rank")
            self._shards[name] = [tensors[name] for tensors in per_rank]
        if _OUTPUT in self._shards and _OUTPUT not in rules:
            pairs = zip(self._shards.get(_EMBEDDING, ()), self._shards.pop(_OUTPUT), strict=False)
            if not all(same_bits(embedding.read(), output.read()) for embedding, output in pairs):
                raise ValueError(
                    f"{self.path}: {_OUTPUT} differs from {_EMBEDDING}, but the config ties them"
                )
        for name in [name for name in self._shards if name.startswith(POST_NORM)]:
            del self._shards[name]  # travels beside the weights, as LLaVA doesn't run it

    @property
    def names(self) -> list[str]:
        """All tensors of the model."""
        return list(self._shards)

    def shape(self, name: str) -> Shape:
        """Return the global shape of a tensor."""
        shards, rule = self._shards[name], self._rules.get(name, REPLICATED)
        shape = list(shards[0].shape)
        if rule.dim is not None:
            shape[rule.dim] = sum(shard.shape[rule.dim] for shard in shards)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._shards[name][0].dtype

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, in its stored dtype.

        Raises:
            ValueError: ranks that should hold the same don't, or their parts don't fit each other.
        """
        stored, rule = self._shards[name], self._rules.get(name, REPLICATED)
        if any(shard.shape != stored[0].shape or shard.dtype != stored[0].dtype for shard in stored):
            raise ValueError(f"{self.path}: {name} has other shapes or dtypes on other tensor-parallel ranks")
        shards = [shard.read() for shard in stored]
        if rule.dim is None and not all(same_bits(shards[0], shard) for shard in shards[1:]):
            raise ValueError(f"{self.path}: {name} differs between tensor-parallel ranks")
        return _unshard(rule, shards)

    def _pipeline(self, ranks: Mapping[tuple[int, int], Path], tp_rank: int) -> dict[str, Stored]:
        """Return one tensor-parallel rank's tensors, all stages together, under global names."""
        stages: dict[tuple[int, int], dict[str, Stored]] = {}
        for pp_rank in range(self.pp):
            content = _load(ranks[tp_rank, pp_rank])
            for chunk, model in enumerate(_models(ranks[tp_rank, pp_rank], content)):
                stages[chunk, pp_rank] = model
            arguments = content.get("args")
            self.arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
        found: dict[str, Stored] = {}
        before = 0  # layers of earlier stages
        for _, model in sorted(stages.items()):
            layers = 0
            for local, tensor in model.items():
                name, layer = _global_name(local, before, self._rules)
                layers = max(layers, layer + 1)
                if name in found:
                    raise ValueError(f"{self.path}: {name} is on two stages")
                found[name] = tensor
            before += layers
        return found


def check_arguments(path: Path, found: Mapping[str, Any], model: ModelConfig) -> None:
    """Check the flags that no tensor's shape tells, though the order of its rows depends on them.

    Args:
        found: :attr:`ClassicReader.arguments`.

    Raises:
        ValueError: they are of another model.
    """
    language = model.language
    for name, wanted in (
        ("num_attention_heads", language.num_attention_heads),
        ("num_query_groups", language.num_key_value_heads if found.get("group_query_attention") else None),
        ("kv_channels", language.head_dim),
    ):
        value = found.get(name)
        if None not in (value, wanted) and value != wanted:
            raise ValueError(f"{path}: was trained with {name} {value}; config.json implies {wanted}")


def _arguments(model: ModelConfig, layout: ClassicLayout, padded_vocab_size: int) -> dict[str, Any]:
    """Return the arguments that Megatron-LM takes from a checkpoint with ``--use-checkpoint-args``."""
    language = model.language
    experts: dict[str, Any] = {}
    if language.num_experts is not None:
        experts = {
            "num_experts": language.num_experts,
            "moe_router_topk": language.experts_per_token,
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": False,
        }
    return {
        **experts,
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": language.num_key_value_heads,
        "kv_channels": language.head_dim,
        "max_position_embeddings": language.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": language.rope_theta,
        "normalization": "RMSNorm",
        "norm_epsilon": language.norm_epsilon,
        "swiglu": True,
        "qk_layernorm": language.qk_norm,
        "add_bias_linear": language.mlp_bias,
        "add_qkv_bias": language.qkv_bias,
        "untie_embeddings_and_output_weights": not language.tie_word_embeddings,
        "padded_vocab_size": padded_vocab_size,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "transformer_impl": layout.spec,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _place(name: str, layout: ClassicLayout) -> tuple[int, str]:
    """Return the stage that holds a tensor, and the tensor's name there."""
    match = _LANGUAGE_LAYER.fullmatch(name)
    stage, local = 0, name
    if match:
        layer = int(match[2])
        while layer >= layout.layers[stage]:
            layer -= layout.layers[stage]
            stage += 1
        local = f"{match[1]}{layer}{match[3]}"
    elif name in (_OUTPUT, "language_model.decoder.final_layernorm.weight"):
        stage = layout.stages - 1
    if layout.spec == LOCAL:
        for fused, own in _TE_TO_LOCAL.items():
            local = local.replace(fused, own)
    return stage, local


def _global_name(local: str, layers_before: int, known: Container[str]) -> tuple[str, int]:
    """Return the name in the whole model, and the language model's layer on its stage (-1: not of a layer).

    Args:
        known: the model's names; another one is taken for a layer spec's own.
    """
    match = _LANGUAGE_LAYER.fullmatch(local)
    layer = int(match[2]) if match else -1
    name = f"{match[1]}{layer + layers_before}{match[3]}" if match else local
    if name not in known:
        name = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\2.\1", name)
        for fused, own in _TE_TO_LOCAL.items():
            name = re.sub(rf"(\.layers\.\d+\.){re.escape(own)}", rf"\g<1>{fused}", name)
    return name, layer


def _unshard(rule: ShardRule, shards: Sequence[Tensor]) -> Tensor:
    return rule.unshard(shards) if len(shards) > 1 else shards[0]


def _shard_shape(row: Row, tp: int) -> Shape:
    shape = list(row.native_shape)
    if row.shard.dim is not None:
        row.shard.chunks(row.native_shape, tp)  # raises where it can't be cut
        shape[row.shard.dim] //= tp
    return tuple(shape)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2] or 0)] = path / FILE
        elif path.name.startswith("mp_rank_"):
            raise ValueError(
                f"{path}: not of tensor and pipeline parallelism only; supported: mp_rank_TT[_PPP]"
            )
    if not found:
        raise ValueError(f"{folder}: no mp_rank_* folders; not a classic checkpoint")
    for tp_rank in range(1 + max(tp_rank for tp_rank, _ in found)):
        for pp_rank in range(1 + max(pp_rank for _, pp_rank in found)):
            path = found.get((tp_rank, pp_rank), folder / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" / FILE)
            if not path.is_file():
                raise ValueError(f"{path}: missing; the other ranks' files are there")
    return found


def _models(path: Path, content: Any) -> list[dict[str, Stored]]:
    """Return the state dicts of a rank's chunks, without what isn't a weight."""
    chunks: dict[int, dict[str, Stored]] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        match = _CHUNK.fullmatch("model" if key == BESIDE else str(key))
        if match and isinstance(value, dict):
            kept = {name: item for name, item in value.items() if not str(name).endswith("_extra_state")}
            for name, item in kept.items():
                if not isinstance(item, Stored):
                    raise ValueError(f"{path}: {name} is no tensor; not a file of weights")
            chunks.setdefault(int(match[1] or 0), {}).update(kept)
    if sorted(chunks) != list(range(len(chunks))) or not chunks:
        raise ValueError(f"{path}: holds no model (key 'model', or 'model0' and so on)")
    return [chunks[i] for i in range(len(chunks))]


class _Inert:
    """A stand-in for what a checkpoint holds beside weights: its pickle makes one, and nothing comes of
    it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _load(path: Path) -> Any:
    """Return a file's content, with the places of its tensors.

    Megatron-LM's own classes, which describe the run, come out as nothing, its flags as they are; any
    other class is refused.
    """
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [
            (type("_Inert", (_Inert,), {}), name)
            for name in asked
            if name.startswith(("megatron.", "numpy.", "types.SimpleNamespace", "signal.", "_io.BytesIO"))
        ]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            return saved_tensors(path)
    except Exception as error:  # torch raises many types for what is not a file of weights
        raise ValueError(f"{path}: not a file of weights ({reason(error)})") from None
