"""Upstream's own LLaVAModel on this rank, for tests of the classic format; runs in the pool."""

from __future__ import annotations

import argparse
import functools
import io
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlm import parallel
from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.model import ModelConfig


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


def save_as_megatron_lm(folder: Path, hf_dir: Path, layout: dict[str, Any], padded_vocab_size: int) -> None:
    """Make upstream's model of random weights, and save this rank's file as Megatron-LM's trainer does.

    Source: Megatron-LM ``megatron/training/checkpointing.py``, ``generate_state_dict`` and ``get_rng_state``.
    """
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    from megatron_vlm.parallel import cpu

    model = ModelConfig.from_hf_dir(str(hf_dir))
    ranks = parallel.initialize(tp=layout["tp"], pp=layout["pp"], vpp=layout["vpp"])
    cpu.import_megatron_core()
    chunks = [
        build(model, ranks, layout.get("first"), padded_vocab_size, chunk) for chunk in range(layout["vpp"])
    ]
    generator = torch.Generator().manual_seed(ranks.rank)
    shared = torch.Generator().manual_seed(1000)
    embedding = torch.randn(padded_vocab_size, model.language.hidden_size, generator=shared)
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            rows = len(parameter)
            if "word_embeddings" in name or ("output_layer" in name and model.language.tie_word_embeddings):
                value = embedding[ranks.tp_rank * rows : (ranks.tp_rank + 1) * rows]
            elif getattr(parameter, "tensor_model_parallel", False):
                value = torch.randn(parameter.shape, generator=generator)
            else:  # the same on every tensor-parallel rank
                seed = sum(name.encode()) + 31 * (number * ranks.pp + ranks.pp_rank)
                value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(value)
        # Transformer Engine's modules leave bytes behind, in a tensor or in a file in memory.
        extra = {f"extra{i}._extra_state": item for i, item in enumerate((None, io.BytesIO(b"x")))}
        state["model" if len(chunks) == 1 else f"model{number}"] = {**chunk.state_dict(), **extra}
    language = model.language
    parameters = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
    content = {
        "args": argparse.Namespace(
            num_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            group_query_attention=True,
            num_query_groups=language.num_key_value_heads,
            kv_channels=language.head_dim,
            params_dtype=torch.float32,
            attention_backend=AttnBackend.auto,
            attn_mask_type=AttnMaskType.causal,
            exit_signal=signal.SIGTERM,
        ),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "num_floating_point_operations_so_far": 1.5e9,
        "optimizer": {
            "optimizer": {
                "state": {i: {"exp_avg": p.clone(), "step": 7} for i, p in enumerate(parameters)},
                "param_groups": [{"lr": 1e-4, "params": list(range(len(parameters)))}],
            },
            "fp32_from_fp16_params": [[p.clone() for p in parameters]],
        },
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 7},
        **state,
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }
    suffix = f"_{ranks.pp_rank:03d}" if ranks.pp > 1 else ""
    own = folder / f"mp_rank_{ranks.tp_rank:02d}{suffix}"
    own.mkdir()
    torch.save(content, own / "model_optim_rng.pt")


def build(
    model: ModelConfig,
    ranks: Any,
    first: int | None,
    padded_vocab_size: int,
    chunk: int,
    engine: bool = False,
) -> Any:
    """Upstream's model, as Megatron-LM's ``examples/multimodal/model.py`` makes it.

    Args:
        engine: with Transformer Engine's layer specs, else with local ones.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.vit_layer_specs import (
        get_vit_layer_with_local_spec,
        get_vit_layer_with_transformer_engine_spec,
    )
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
    experts = dict(num_experts=language.num_experts, qk_layernorm=language.qk_norm)
    if engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        llava_model.CLIPViTModel = CLIPViTModel
        layer = get_gpt_layer_with_transformer_engine_spec(**experts)
        vision_layer = get_vit_layer_with_transformer_engine_spec()
        linears: Any = TEColumnParallelLinear, TERowParallelLinear
    else:
        # Its norms are the engine's unless another class is named, which LLaVAModel doesn't let one do.
        llava_model.CLIPViTModel = functools.partial(
            CLIPViTModel, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm
        )
        layer = get_gpt_layer_local_spec(**experts, normalization="RMSNorm")
        vision_layer = get_vit_layer_with_local_spec()
        linears = ColumnParallelLinear, RowParallelLinear
    first_stage = ranks.is_first_stage and chunk == 0
    side = vision.image_size // vision.patch_size * vision.patch_size
    return llava_model.LLaVAModel(
        language_transformer_config=language_config,
        language_transformer_layer_spec=layer,
        language_vocab_size=padded_vocab_size,
        language_max_sequence_length=language.max_position_embeddings,
        vision_transformer_config=vision_config,
        vision_transformer_layer_spec=vision_layer,
        drop_vision_class_token=vision.prefix_tokens > 0,
        vision_projection_config=projector_config,
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=linears[0], linear_fc2=linears[1]),
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
    """Return the settings of ``--num-experts`` and ``--moe-router-topk``."""
    if language.num_experts is None:
        return {}
    return dict(
        num_moe_experts=language.num_experts,
        moe_router_topk=language.experts_per_token,
        moe_ffn_hidden_size=language.ffn_hidden_size,
        moe_router_load_balancing_type="none",
    )
