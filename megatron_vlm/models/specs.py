"""megatron-core's layer specs: the class at each place of a transformer layer.

``transformer_engine`` for bfloat16 where that is installed and the device is a GPU, else ``local``.
Both save under Transformer Engine's names, so a checkpoint of one loads with the other.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vlm.models.attention import ScaledDotProductAttention, SelfAttentionWithOutputBias, TorchNorm
from megatron_vlm.models.experts import MixtureOfExperts
from megatron_vlm.parallel.engine import why_not

# The local spec's norms are modules of their own; Transformer Engine fuses them into the linear after, and
# names them so.
_LOCAL_TO_SAVED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def choose_transformer_impl(
    device: str, wanted: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Return ``"transformer_engine"`` where it is installed and ``device`` is "cuda", else ``"local"``.

    Args:
        wanted: one of the two, whatever the default would be.
        dtype: of the parameters. In fp32 the default is ``"local"``: the engine multiplies fp32 matrices in
            TF32, and its attention keeps the scores.

    Raises:
        ValueError: Transformer Engine is wanted where it doesn't run, or is there and can't be used.
    """
    if wanted is None and dtype == torch.float32:
        return "local"
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and device != "cuda":
        raise ValueError("--transformer-impl transformer_engine: Transformer Engine needs GPUs; use local")
    if wanted != "local" and device == "cuda" and why_not() is not None:
        raise ValueError(f"Transformer Engine {why_not()}; mend that, or use --transformer-impl local")
    if wanted == "transformer_engine" and not installed:
        raise ValueError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed here; use local"
        )
    return wanted or ("transformer_engine" if installed and device == "cuda" else "local")


def layer_spec(
    impl: str, causal: bool, output_bias: bool, qk_norm: bool = False, experts: bool = False
) -> ModuleSpec:
    """Return the spec of one transformer layer.

    Args:
        impl: ``"local"`` or ``"transformer_engine"``.
        causal: a language model's layer; a tower's has no mask.
        output_bias: the attention's output projection has a bias.
        qk_norm: each head's queries and keys are normalised before RoPE. ``config.qk_layernorm`` must
            say the same: by it megatron-core sums the norms' gradients over the tensor parallel ranks,
            each of which sees other heads.
        experts: a mixture of experts is the MLP, with a norm that is fused with nothing.
    """
    if impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        column, row, attention = TELayerNormColumnParallelLinear, TERowParallelLinear, TEDotProductAttention
        norm, saved_names = IdentityOp, {}  # the column parallel linears normalise their input themselves
    else:
        column, row, attention = ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention
        norm, saved_names = TorchNorm, _LOCAL_TO_SAVED
    head_norm = standalone_norm(impl) if qk_norm else IdentityOp
    mlp: Any = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    if experts:
        mlp = MixtureOfExperts
        saved_names = {own: saved for own, saved in saved_names.items() if own != "pre_mlp_layernorm."}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttentionWithOutputBias,
                params={
                    "attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask,
                    "output_bias": output_bias,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=attention,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=standalone_norm(impl) if experts else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=saved_names,
        ),
    )


def block_spec(
    impl: str, num_layers: int, output_bias: bool, qk_norm: bool = False, experts: bool = False
) -> TransformerBlockSubmodules:
    """Return the specs of a pipeline stage's layers, and of the norm after the last of all.

    Args:
        num_layers: layers of this stage.
    """
    layer = layer_spec(impl, causal=True, output_bias=output_bias, qk_norm=qk_norm, experts=experts)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers,
        layer_norm=standalone_norm(impl),
    )


def standalone_norm(impl: str) -> type:
    """Return the class of a norm that is fused with nothing: the last one of all, and those of queries and
    keys."""
    if impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return TorchNorm


def projector_submodules(impl: str) -> MLPSubmodules:
    """Return the two linear layers of an ``mlp2x_gelu`` projector; no norm in front."""
    if impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
