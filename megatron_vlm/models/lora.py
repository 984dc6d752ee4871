"""LoRA beside megatron-core's parallel linears (Hu et al., https://arxiv.org/abs/2106.09685).

Each Hugging Face projection has an A and a B of its own, also where megatron-core fuses several into
one linear (query, key and value; gate and up), so that a run equals PEFT's on the same model. Cut by
tensor parallelism as the linear is:

    column parallel    A whole on every rank, B by rows, as the output
    row parallel       A by columns, as the input; B whole on every rank

What crosses ranks is only ever ``rank`` wide: ``A x``, gathered, reduced or reduced and scattered.
With sequence parallelism A of the one and B of the other see a part of the sequence each, so their
gradients are marked to be summed over the tensor parallel ranks; without, they are whole already.

Parameters are named ``<linear>.adapters.<projection>.lora_A.weight``, and ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vlm.architecture.lora import LoRAConfig

_OWN_STREAM = "model-parallel-rng"  # random numbers that differ between tensor parallel ranks
# The projections in the order in which the fused linear's output holds them.
_QKV = ("q_proj", "k_proj", "v_proj")
LANGUAGE_PROJECTIONS = {
    "linear_qkv": _QKV,
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
VISION_PROJECTIONS = {
    "linear_qkv": _QKV,
    "linear_proj": ("out_proj",),
    "linear_fc1": ("fc1",),
    "linear_fc2": ("fc2",),
}


def add_adapters(
    layers: Iterable[ModuleSpec],
    projections: Mapping[str, tuple[str, ...]],
    targets: tuple[str, ...],
    lora: LoRAConfig,
) -> None:
    """Put adapters beside the linears of layer specs, in place.

    Args:
        layers: specs from :func:`specs.layer_spec`; several may be one object.
        projections: ``LANGUAGE_PROJECTIONS`` or ``VISION_PROJECTIONS``.
        targets: the projections that get adapters.
    """
    for layer in {id(layer): layer for layer in layers}.values():
        attention = layer.submodules.self_attention.submodules
        mlp = getattr(layer.submodules.mlp, "submodules", None)  # experts have no adapters
        for place, names in projections.items():
            if set(names) & set(targets):
                part = attention if hasattr(attention, place) else mlp
                setattr(part, place, _with_adapters(getattr(part, place), names, targets, lora))


def _with_adapters(
    linear: type, projections: tuple[str, ...], targets: tuple[str, ...], lora: LoRAConfig
) -> type:
    """Return the class ``linear`` with adapters.

    It is a subclass, so that its own parameters keep their names.
    """
    kind = _RowAdapters if _is_row_parallel(linear) else _ColumnAdapters
    facts = {"projections": projections, "targets": targets, "lora": lora}
    return type(f"LoRA{linear.__name__}", (kind, linear), facts)


def _is_row_parallel(linear: type) -> bool:
    return issubclass(linear, RowParallelLinear) or linear.__name__ == "TERowParallelLinear"


class Adapter(torch.nn.Module):
    """A and B of one projection, this rank's part of each.

    Args:
        input_size: columns of A on this rank.
        output_size: rows of B on this rank.
    """

    def __init__(self, input_size: int, output_size: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        options: Any = dict(bias=False, dtype=dtype, device=torch.cuda.current_device())
        self.lora_A = torch.nn.utils.skip_init(torch.nn.Linear, input_size, rank, **options)
        self.lora_B = torch.nn.utils.skip_init(torch.nn.Linear, rank, output_size, **options)


class _Adapters(torch.nn.Module):
    """The common part of adapters beside a column and beside a row parallel linear; a mixin."""

    projections: tuple[str, ...]
    targets: tuple[str, ...]
    lora: LoRAConfig
    cut: ClassVar[dict[str, int]]  # which of A and B tensor parallelism cuts, and along which dimension
    config: TransformerConfig
    adapters: Any  # torch.nn.ModuleDict of Adapter, by projection

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        **options: Any,
    ) -> None:
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **options)
        self.group = tp_group
        self.cut_sequence = config.sequence_parallel and tp_group.size() > 1
        self.part_sizes = self._local_output_sizes(output_size)
        self.query_groups = config.num_query_groups // tp_group.size() if self.projections == _QKV else 1
        self.adapters = torch.nn.ModuleDict(
            {
                name: Adapter(self._local_input_size(input_size), size, self.lora.rank, config.params_dtype)
                for name, size in zip(self.projections, self.part_sizes, strict=True)
                if name in self.targets
            }
        )
        for adapter in self.adapters.values():
            self._mark(adapter.lora_A.weight, "lora_A")
            self._mark(adapter.lora_B.weight, "lora_B")

    def _local_input_size(self, input_size: int) -> int:
        raise NotImplementedError

    def _local_output_sizes(self, output_size: int) -> list[int]:
        raise NotImplementedError

    def _mark(self, weight: torch.nn.Parameter, name: str) -> None:
        """Tell megatron-core which parameters are cut, and whose gradients are of a part of the sequence."""
        if name in self.cut:
            set_tensor_model_parallel_attributes(weight, True, self.cut[name], 1)
        else:
            weight.sequence_parallel = self.cut_sequence  # type: ignore[attr-defined]

    def _dropped(self, x: Tensor, stream: str) -> Tensor:
        """Apply dropout with random numbers from the tracker: they are saved with a run, and no data
        loader draws from them."""
        if not self.training or self.lora.dropout == 0.0:
            return x
        with get_cuda_rng_tracker().fork(stream):
            return F.dropout(x, self.lora.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the linear's entries and the adapters'."""
        # The linear takes the adapters for parameters of its own that are not cut.
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        entries.update(
            make_sharded_tensors_for_checkpoint(
                self.adapters.state_dict(keep_vars=True),
                f"{prefix}adapters.",
                {f"{name}.{part}.weight": dim for name in self.adapters for part, dim in self.cut.items()},
                sharded_offsets,
                tp_group=self.group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        return entries


class _ColumnAdapters(_Adapters):
    """``W x + scale * B A x`` where the output is cut."""

    cut = {"lora_B": 0}  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Transformer Engine fuses the norm into the linear; A needs what comes after the norm.
        self.has_norm = hasattr(self, "return_layernorm_output")
        if self.has_norm:
            self.return_layernorm_output = True

    def _local_input_size(self, input_size: int) -> int:
        return input_size

    def _local_output_sizes(self, output_size: int) -> list[int]:
        config, ranks = self.config, self.group.size()
        if self.projections == _QKV:
            heads = [config.num_attention_heads, config.num_query_groups, config.num_query_groups]
            return [count * config.kv_channels // ranks for count in heads]
        return [output_size // len(self.projections) // ranks] * len(self.projections)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``[s, b, input_size]`` (``s / tp`` with sequence parallelism) to ``[s, b, output_size /
        tp]``."""
        output, bias, x = self._base(x)
        # Parts of a sequence need masks of their own, copies of it the same one.
        stream = _OWN_STREAM if self.cut_sequence else get_data_parallel_rng_tracker_name()
        low = [F.linear(self._dropped(x, stream), a.lora_A.weight) for a in self.adapters.values()]
        together = torch.cat(low, dim=-1)  # one exchange for all projections
        if self.cut_sequence:
            together = tensor_parallel.gather_from_sequence_parallel_region(together, group=self.group)
        else:
            together = tensor_parallel.copy_to_tensor_model_parallel_region(together, group=self.group)
        low_of = dict(zip(self.adapters, together.split(self.lora.rank, dim=-1), strict=True))
        deltas = [
            F.linear(low_of[name], self.adapters[name].lora_B.weight)
            if name in low_of
            else together.new_zeros(*together.shape[:-1], size)
            for name, size in zip(self.projections, self.part_sizes, strict=True)
        ]
        return output + self.lora.scale * _fuse(deltas, self.query_groups), bias

    def _base(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return output and bias of the linear, and the input that its weight was applied to."""
        if not self.has_norm:
            return (*super().forward(x), x)
        if self.te_return_bias:
            output, bias, normed = super().forward(x)
            return output, bias, normed
        (output, normed), _ = super().forward(x)
        return output, None, normed


class _RowAdapters(_Adapters):
    """``W x + scale * B A x`` where the input is cut and the output is a sum over ranks."""

    cut = {"lora_A": 1}  # noqa: RUF012

    def _local_input_size(self, input_size: int) -> int:
        return input_size // self.group.size()

    def _local_output_sizes(self, output_size: int) -> list[int]:
        return [output_size]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``[s, b, input_size / tp]`` to ``[s, b, output_size]`` (``s / tp`` with sequence
        parallelism)."""
        output, bias = super().forward(x)
        (adapter,) = self.adapters.values()
        low = F.linear(self._dropped(x, _OWN_STREAM), adapter.lora_A.weight)
        # Not summed with the linear's output: that sum is inside the linear, and on every rank the
        # gradient of B would lack the others' share.
        if self.cut_sequence:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.group)
        return output + self.lora.scale * F.linear(low, adapter.lora_B.weight), bias


def _fuse(parts: list[Tensor], groups: int) -> Tensor:
    """Return projections' outputs as the fused linear holds them: group after group, one after the other
    in each."""
    return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)


def is_adapter(name: str) -> bool:
    """Return whether a parameter's name is that of an adapter's A or B."""
    return ".lora_A." in name or ".lora_B." in name
