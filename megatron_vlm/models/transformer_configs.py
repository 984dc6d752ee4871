"""megatron-core's ``TransformerConfig`` of each part, from a :class:`ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.fused import weight_gradient_kernels
from megatron_vlm.plan.pipeline import StageCosts, deal_layers


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Apply CLIP's activation. Source: transformers ``QuickGELUActivation``."""
    return x * torch.sigmoid(1.702 * x)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Leave a tensor as it is: an initialiser, or an activation, that does nothing."""
    return weight


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "linear": _leave,  # transformers' name for no activation
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


@dataclass(frozen=True)
class TransformerConfigs:
    """The configs of the parts.

    They differ in more than sizes: only the language model is cut into pipeline stages and sequence
    shards.
    """

    vision: TransformerConfig
    projector: TransformerConfig
    language: TransformerConfig


def transformer_configs(
    model: ModelConfig, layout: Layout, options: ModelOptions = ModelOptions(), fused_rope: bool = False
) -> TransformerConfigs:
    """Return the configs of a model on this layout.

    Args:
        fused_rope: rotate queries and keys with Transformer Engine's kernel. Without it, packed samples
            make the host wait for the GPU twice in each layer.
    """
    dtype, fp8 = options.dtype, options.fp8
    on_gpu = layout.device.type == "cuda"
    common: dict[str, Any] = dict(
        tensor_model_parallel_size=layout.tp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights always come from a checkpoint, and a load that misses one is an error. Still,
        # megatron-core marks a weight as cut by tensor parallelism only where it initialises it,
        # and without the mark the gradient norm leaves it out.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=weight_gradient_kernels(layout.device.type) is not None,
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        calculate_per_token_loss=True,
        deterministic_mode=options.deterministic,
        cross_entropy_loss_fusion=False,
    )
    language, vision, projector = model.language, model.vision, model.projector
    all_layers = language.num_layers + vision.num_layers
    recomputation = _recomputation(options.recompute, options.recompute_num_layers or all_layers)
    return TransformerConfigs(
        vision=TransformerConfig(
            num_layers=model.num_vision_layers_run,
            hidden_size=vision.hidden_size,
            num_attention_heads=vision.num_attention_heads,
            ffn_hidden_size=vision.ffn_hidden_size,
            activation_func=_ACTIVATIONS[vision.activation],
            bias_activation_fusion=False,
            normalization="LayerNorm",
            layernorm_epsilon=vision.norm_epsilon,
            add_bias_linear=True,
            **recomputation,
            **common,
        ),
        projector=TransformerConfig(
            num_layers=1,
            hidden_size=language.hidden_size,
            num_attention_heads=language.num_attention_heads,
            ffn_hidden_size=language.hidden_size,
            activation_func=_ACTIVATIONS[projector.activation],
            bias_activation_fusion=False,
            add_bias_linear=projector.bias,
            **(_fp8(fp8) if fp8 is not None and fp8.projector else {}),
            **common,
        ),
        language=TransformerConfig(
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_query_groups=language.num_key_value_heads,
            kv_channels=language.head_dim,
            ffn_hidden_size=language.ffn_hidden_size,
            activation_func=_ACTIVATIONS[language.activation],
            gated_linear_unit=True,
            bias_activation_fusion=on_gpu,
            normalization="RMSNorm",
            layernorm_epsilon=language.norm_epsilon,
            add_bias_linear=language.mlp_bias,
            add_qkv_bias=language.qkv_bias,
            qk_layernorm=language.qk_norm,
            **_experts(language),
            pipeline_model_parallel_size=layout.pp,
            pipeline_model_parallel_layout=_pipeline_layout(model, layout, options.layers_per_stage),
            pipeline_dtype=dtype,
            # Gloo mixes the two directions of a batched exchange up, and interleaved stages exchange
            # with both neighbours at a time, which at PP 2 are one rank.
            batch_p2p_comm=on_gpu and layout.vpp == 1,
            overlap_p2p_comm=layout.vpp > 1,
            sequence_parallel=options.sequence_parallel,
            apply_rope_fusion=fused_rope,
            **(_fp8_of_layers(fp8) if fp8 is not None else {}),
            **recomputation,
            **common,
        ),
    )


def _experts(language: LanguageConfig) -> dict[str, Any]:
    if language.num_experts is None:
        return {}
    return dict(
        num_moe_experts=language.num_experts,
        moe_router_topk=language.experts_per_token,
        moe_ffn_hidden_size=language.ffn_hidden_size,
        moe_router_load_balancing_type="none",
    )


def _fp8(fp8: Fp8Config) -> dict[str, Any]:
    return dict(
        fp8=fp8.format,
        fp8_recipe=fp8.recipe,
        # Of delayed scaling: Transformer Engine's defaults. megatron-core's own is a history of one.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )


def _fp8_of_layers(fp8: Fp8Config) -> dict[str, Any]:
    return _fp8(fp8) | dict(
        fp8_param=fp8.param_gather,
        first_last_layers_bf16=bool(fp8.bf16_at_start or fp8.bf16_at_end),
        num_layers_at_start_in_bf16=fp8.bf16_at_start,
        num_layers_at_end_in_bf16=fp8.bf16_at_end,
    )


def _recomputation(recompute: str, num_layers: int) -> dict[str, Any]:
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=num_layers)
    if recompute == "selective":
        # Not core_attn, megatron-core's own choice: fused attention keeps no scores anyway.
        return dict(recompute_granularity="selective", recompute_modules=["mlp"])
    return {}


def _pipeline_layout(
    model: ModelConfig, layout: Layout, layers_per_stage: Sequence[int] | None
) -> list[list[str]] | None:
    """Return what each stage holds, in the words of megatron-core's ``PipelineParallelLayerLayout``."""
    if layout.pp == 1:
        return None
    if layers_per_stage is None:
        layers_per_stage = deal_layers(model.language.num_layers, StageCosts(layer=1), layout.pp, layout.vpp)
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
