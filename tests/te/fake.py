"""A make-believe Transformer Engine: the modules that layer specs use, from torch alone, for CPUs.

Parameters and ``_extra_state`` are named and cut as the engine's own, which
``tests/models/test_engine_keys.py`` holds against ``keys.json``; the mathematics is what its documentation
says. megatron-core's wrappers around them are the real ones, in a copy of its module that finds this engine.

Source: Transformer Engine 2.11, ``pytorch/module`` and ``pytorch/attention/dot_product_attention``.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import utils
from megatron.core.extensions import transformer_engine as wrappers
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from packaging.version import Version
from torch import Tensor

VERSION = "2.11.0"


@dataclass
class DelayedScaling:
    """A recipe."""

    amax_history_len: int = 1


class _ScalingState:
    def __init__(self, recipe: DelayedScaling, tensors: int) -> None:
        self.scale = torch.ones(tensors)
        self.amax_history = torch.zeros(recipe.amax_history_len, tensors)


class _Module(torch.nn.Module):
    """The common part of linears and attention: state for FP8, pickled into a tensor of bytes; empty
    without any."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def start_scaling(self, recipe: DelayedScaling) -> None:
        """Start scaling as the first iteration under the recipe does."""
        self.fp8_meta.update(recipe=recipe, num_gemms=1, fp8_checkpoint=True)
        self.fp8_meta["scaling_fwd"] = _ScalingState(recipe, 3)
        self.fp8_meta["scaling_bwd"] = _ScalingState(recipe, 2)

    def get_extra_state(self) -> Tensor:
        if not self.fp8_meta["fp8_checkpoint"]:
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {"num_gemms": 1}}
        for end in ("fwd", "bwd"):
            kept = self.fp8_meta[f"scaling_{end}"]
            state[f"scale_{end}"], state[f"amax_history_{end}"] = kept.scale, kept.amax_history
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        content = pickle.loads(state.numpy().tobytes())
        self.fp8_meta.update(content["extra_fp8_variables"])
        self.start_scaling(content["recipe"])
        for end in ("fwd", "bwd"):
            kept = self.fp8_meta[f"scaling_{end}"]
            kept.scale.copy_(content[f"scale_{end}"])
            kept.amax_history.copy_(content[f"amax_history_{end}"])


class _Linear(_Module):
    """``weight`` and ``bias`` cut along the output (column) or the input (row), with the exchanges around."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.group, ranks = options["tp_group"], options["tp_size"]
        self.parallel_mode, self.return_bias = options["parallel_mode"], options["return_bias"]
        self.sequence_parallel = options["sequence_parallel"] and ranks > 1
        self.in_features, self.out_features = in_features, out_features
        if self.parallel_mode == "column":
            self.out_features //= ranks
        else:
            self.in_features //= ranks
        self.factory: dict[str, Any] = {"device": options["device"], "dtype": options["params_dtype"]}

    def _make(self, init_method: Any, bias: bool) -> None:
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **self.factory))
        init_method(self.weight)
        cut = 0 if self.parallel_mode == "column" else 1
        set_tensor_model_parallel_attributes(self.weight, True, cut, 1)
        self.use_bias = bias
        if not bias:
            self.bias = torch.empty(0, **self.factory)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **self.factory))
        if self.parallel_mode == "column":
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
        else:
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _product(self, x: Tensor) -> Tensor:
        bias = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = gather_from_sequence_parallel_region(x, group=self.group)
            else:
                x = copy_to_tensor_model_parallel_region(x, self.group)
            return F.linear(x, self.weight, bias)
        output = F.linear(x, self.weight)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.group)
        else:
            output = reduce_from_tensor_model_parallel_region(output, self.group)
        return output if bias is None else output + bias


class Linear(_Linear):
    def __init__(self, *, init_method: Any, bias: bool, **options: Any) -> None:
        super().__init__(**options)
        self._make(init_method, bias)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        output = self._product(x)
        return (output, self.bias) if self.return_bias else output


class LayerNormLinear(_Linear):
    def __init__(
        self,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        init_method: Any,
        bias: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        assert not zero_centered_gamma and self.parallel_mode == "column"
        self.eps, self.normalization = eps, normalization
        self.return_layernorm_output = return_layernorm_output
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(self.in_features, **self.factory))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(self.in_features, **self.factory))
        for parameter in self.parameters():
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self._make(init_method, bias)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = _normalise(x, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        output = [self._product(normed)]
        if self.return_bias:
            output.append(self.bias)
        if self.return_layernorm_output:
            output.append(normed)
        return output[0] if len(output) == 1 else tuple(output)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(torch.nn.Module):
    """Has no products, and so nothing to scale, but an extra state all the same."""

    has_bias = False

    def __init__(
        self,
        *,
        hidden_size: int,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: Any,
        device: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight)) if self.has_bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _normalise(x, self.weight, self.bias, self.eps)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class LayerNorm(RMSNorm):
    has_bias = True


class DotProductAttention(_Module):
    """Attention without dropout, to whole sequences (``sbhd``) or to samples in one (``thd``)."""

    def __init__(
        self,
        *,
        num_attention_heads: int,
        kv_channels: int,
        attention_dropout: float,
        attn_mask_type: str,
        softmax_scale: float | None,
        num_gqa_groups: int,
        tp_size: int,
        **options: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and num_attention_heads % num_gqa_groups == 0
        self.scale, self.groups = softmax_scale, num_gqa_groups // tp_size
        self.head_dim = kv_channels

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        **packed: Any,
    ) -> Tensor:
        assert attention_mask is None and key.shape[-2:] == (self.groups, self.head_dim)
        if qkv_format == "sbhd":
            masks = {"causal": True, "no_mask": False}
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v, masks[attn_mask_type]).permute(2, 0, 1, 3).flatten(2)
        assert qkv_format == "thd" and cu_seqlens_q is not None and cu_seqlens_q.dtype == torch.int32
        masks = {"padding_causal": True, "padding": False}
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q and sum(lengths) == len(query)
        samples = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
        parts = [self._attend(*(x[None] for x in one), masks[attn_mask_type]) for one in samples]
        return torch.cat(parts, 2)[0].transpose(0, 1).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=True)


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    *,
    tensor_format: str,
    fused: bool,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Turn pairs ``(i, i + d / 2)`` of each head by ``freqs`` ``[positions, 1, 1, d]``, sample by sample."""
    assert fused and not interleaved and cp_size == 1 and freqs.dtype == torch.float32
    if tensor_format == "thd":
        assert cu_seqlens is not None
        samples = t.split(cu_seqlens.diff().tolist())
        return torch.cat([_turn(x, freqs[: len(x), 0]) for x in samples])
    assert tensor_format == "sbhd" and len(t) <= len(freqs)
    return _turn(t, freqs[: len(t)])


def _turn(t: Tensor, freqs: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return (t * freqs.cos() + torch.cat([-second, first], dim=-1) * freqs.sin()).to(t.dtype)


class _Unused(ModuleType):
    """Parts of the engine that megatron-core names as its module is imported, and that nothing here calls."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def installed() -> Iterator[Any]:
    """The engine is there, for this project's layer specs, and so are its wrappers; gives these."""
    own: dict[str, ModuleType] = {
        "transformer_engine": ModuleType("transformer_engine"),
        "transformer_engine.pytorch": ModuleType("transformer_engine.pytorch"),
        "transformer_engine.pytorch.attention": ModuleType("transformer_engine.pytorch.attention"),
    }
    for name in ("common", "common.recipe", "pytorch.fp8", "pytorch.ops", "pytorch.distributed"):
        own[f"transformer_engine.{name}"] = _Unused(name)
    own["transformer_engine.pytorch.router"] = _Unused("router")
    own["transformer_engine.pytorch.attention.rope"] = sys.modules[__name__]
    engine: Any = own["transformer_engine"]
    engine.__version__ = VERSION
    engine.pytorch, engine.common = own["transformer_engine.pytorch"], own["transformer_engine.common"]
    engine.common.recipe = own["transformer_engine.common.recipe"]
    for name in ("ops", "distributed"):
        setattr(engine.pytorch, name, own[f"transformer_engine.pytorch.{name}"])
    for kind in (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention):
        setattr(engine.pytorch, kind.__name__, kind)
    engine.pytorch.GroupedLinear = torch.nn.Module

    assert wrappers.__file__ is not None
    spec = importlib.util.spec_from_file_location(wrappers.__name__, wrappers.__file__)
    assert spec is not None and spec.loader is not None
    copy: Any = importlib.util.module_from_spec(spec)
    own[wrappers.__name__] = copy
    before = {name: sys.modules.get(name) for name in own}
    version = utils._te_version
    fused = rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd
    sys.modules.update(own)
    utils._te_version = Version(VERSION)
    try:
        spec.loader.exec_module(copy)
        rope_utils.fused_apply_rotary_pos_emb = copy.fused_apply_rotary_pos_emb
        rope_utils.fused_apply_rotary_pos_emb_thd = copy.fused_apply_rotary_pos_emb_thd
        yield copy
    finally:
        rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd = fused
        utils._te_version = version
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
