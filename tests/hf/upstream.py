"""Upstream's own LLaVAModel on this rank, for tests of the classic format; runs in the pool."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from megatron_vlm import parallel
from megatron_vlm.config.model import LanguageConfig, ModelConfig


def load_classic_and_save(
    checkpoint: Path, hf_dir: Path, saved: Path, layout: dict[str, Any], padded_vocab_size: int
) -> list[str]:
    """Load this rank's file into upstream's model, strictly, and let megatron-core save what it loaded.

    Args:
        checkpoint: folder with the ranks' folders.
        layout: ``tp``, ``pp``, ``vpp``, and ``first``: layers of the first pipeline stage, or None.

    Returns:
        Names of the parameters that kept the values they were made with.
    """
    from megatron_vlm.parallel import cpu, sharded_files

    model = ModelConfig.from_hf_dir(str(hf_dir))
    ranks = parallel.initialize(tp=layout["tp"], pp=layout["pp"], vpp=layout["vpp"])
    cpu.import_megatron_core()
    chunks = [
        build(model, ranks, layout.get("first"), padded_vocab_size, chunk) for chunk in range(layout["vpp"])
    ]
    folder = f"mp_rank_{ranks.tp_rank:02d}" + (f"_{ranks.pp_rank:03d}" if ranks.pp > 1 else "")
    content = torch.load(checkpoint / folder / "model_optim_rng.pt", weights_only=False)
    assert content["checkpoint_version"] == 3.0
    assert content["args"].tensor_model_parallel_size == ranks.tp
    kept, sharded = [], {}
    for number, chunk in enumerate(chunks):
        before = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
        chunk.load_state_dict(content["model" if len(chunks) == 1 else f"model{number}"], strict=True)
        kept += [n for n, parameter in chunk.named_parameters() if torch.equal(parameter, before[n])]
        sharded[f"chunk{number}"] = {
            name: entry for name, entry in chunk.sharded_state_dict().items() if "_extra_state" not in name
        }
    sharded_files.save(sharded, str(saved))
    return kept


def build(model: ModelConfig, ranks: Any, first: int | None, padded_vocab_size: int, chunk: int) -> Any:
    """Upstream's model with local layer specs, as Megatron-LM's ``examples/multimodal/model.py`` makes it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    language, vision = model.language, model.vision
    common = dict(tensor_model_parallel_size=ranks.tp, gradient_accumulation_fusion=False)
    language_config = TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.head_dim,
        ffn_hidden_size=language.ffn_hidden_size,
        gated_linear_unit=True,
        normalization="RMSNorm",
        add_bias_linear=language.mlp_bias,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        **experts_of(language),
        pipeline_model_parallel_size=ranks.pp,
        virtual_pipeline_model_parallel_size=ranks.vpp if ranks.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        pipeline_dtype=torch.float32,
        **common,
    )
    vision_config = TransformerConfig(
        num_layers=model.num_vision_layers_run,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        **common,
    )
    vision_config.vision_model_type = vision.family
    language_config.language_model_type = ""
    projector_config = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        ffn_hidden_size=language.hidden_size,
        **common,
    )
    # Its norms are Transformer Engine's unless another class is named, which LLaVAModel doesn't let one do.
    llava_model.CLIPViTModel = functools.partial(
        CLIPViTModel, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm
    )
    first_stage = ranks.is_first_stage and chunk == 0
    side = vision.image_size // vision.patch_size * vision.patch_size
    return llava_model.LLaVAModel(
        language_transformer_config=language_config,
        language_transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=language.num_experts, qk_layernorm=language.qk_norm, normalization="RMSNorm"
        ),
        language_vocab_size=padded_vocab_size,
        language_max_sequence_length=language.max_position_embeddings,
        vision_transformer_config=vision_config,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=vision.has_class_token,
        vision_projection_config=projector_config,
        vision_projection_layer_spec=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
        ),
        vision_projection_type="mlp",
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        language_position_embedding_type="rope",
        pre_process=first_stage,
        post_process=ranks.is_last_stage and chunk == ranks.vpp - 1,
        add_encoder=first_stage,
        img_h=side,
        img_w=side,
        patch_dim=vision.patch_size,
        vp_stage=chunk if ranks.vpp > 1 else None,
    )


def experts_of(language: LanguageConfig) -> dict[str, Any]:
    """What ``--num-experts`` and ``--moe-router-topk`` set."""
    if language.num_experts is None:
        return {}
    return dict(
        num_moe_experts=language.num_experts,
        moe_router_topk=language.experts_per_token,
        moe_ffn_hidden_size=language.ffn_hidden_size,
        moe_router_load_balancing_type="none",
    )
