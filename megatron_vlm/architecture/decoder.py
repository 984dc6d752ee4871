"""The layers of the language model. Source: megatron-core ``GPTModel``."""

from __future__ import annotations

from typing import Iterator, Optional

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.layers import COLUMN, ROW, Attention, Experts, Layer, Linear, norm
from megatron_vlm.architecture.lora import LoRAConfig


def decoder_layers(language: LanguageConfig, lora: Optional[LoRAConfig]) -> Iterator[Layer]:
    """Yield the layers of one of the language model's blocks."""
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    query = language.num_attention_heads * language.head_dim
    key = language.num_key_value_heads * language.head_dim
    rank, targets = (lora.rank, lora.language_targets) if lora else (0, ())
    qkv = Linear("self_attention.linear_qkv", hidden, query + 2 * key, COLUMN, language.qkv_bias)
    proj = Linear("self_attention.linear_proj", query, hidden, ROW, language.attention_output_bias)
    yield norm(f"{qkv.name}.layer_norm_", hidden)
    yield qkv.adapted(rank, targets, q_proj=query, k_proj=key, v_proj=key)
    if language.qk_norm:
        yield norm("self_attention.q_layernorm.", language.head_dim)
        yield norm("self_attention.k_layernorm.", language.head_dim)
    yield Attention(query)
    yield proj.adapted(rank, targets, o_proj=hidden)
    if language.num_experts is not None and language.experts_per_token is not None:
        yield norm("pre_mlp_layernorm.", hidden)
        yield Experts(language.num_experts, language.experts_per_token, hidden, ffn)
        return
    fc1 = Linear("mlp.linear_fc1", hidden, 2 * ffn, COLUMN, language.mlp_bias)
    fc2 = Linear("mlp.linear_fc2", ffn, hidden, ROW, language.mlp_bias)
    yield norm(f"{fc1.name}.layer_norm_", hidden)
    yield fc1.adapted(rank, targets, gate_proj=ffn, up_proj=ffn)
    yield fc2.adapted(rank, targets, down_proj=hidden)
