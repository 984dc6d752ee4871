"""The table of the language model."""

from __future__ import annotations

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.hf.tables.ops import COLUMN, COPY, GATED, ROW, Concatenate, MergeQKV, PadVocabulary
from megatron_vlm.hf.tables.table import Alias, Carry, Entries, Row


def entries(c: LanguageConfig, padded_vocab_size: int) -> Entries:
    """Yield the rows of transformers' Llama, Mistral, Mixtral, Qwen2 and Qwen3 and megatron-core's
    ``GPTModel``.

    They differ in biases, in Qwen3's norms of queries and keys and in Mixtral's experts: the config tells.
    """
    h = c.hidden_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    merge = MergeQKV(c.num_attention_heads, c.num_key_value_heads)
    pad = PadVocabulary(c.vocab_size, padded_vocab_size)
    embedding, head = "{text}embed_tokens.weight", "{head}weight"
    yield Row(
        "language_model.embedding.word_embeddings.weight", ((embedding, (c.vocab_size, h)),), pad, COLUMN
    )
    for i in range(c.num_layers):
        m, t = f"language_model.decoder.layers.{i}.", f"{{text}}layers.{i}."
        attention = t + "self_attn."
        yield Row(m + "self_attention.linear_qkv.layer_norm_weight", ((t + "input_layernorm.weight", (h,)),))
        yield Row(
            m + "self_attention.linear_qkv.weight",
            (
                (attention + "q_proj.weight", (queries, h)),
                (attention + "k_proj.weight", (keys, h)),
                (attention + "v_proj.weight", (keys, h)),
            ),
            merge,
            COLUMN,
        )
        if c.qkv_bias:
            yield Row(
                m + "self_attention.linear_qkv.bias",
                (
                    (attention + "q_proj.bias", (queries,)),
                    (attention + "k_proj.bias", (keys,)),
                    (attention + "v_proj.bias", (keys,)),
                ),
                merge,
                COLUMN,
            )
        if c.qk_norm:
            for x in "qk":
                norm = (attention + f"{x}_norm.weight", (c.head_dim,))
                yield Row(m + f"self_attention.{x}_layernorm.weight", (norm,))
        yield Row(
            m + "self_attention.linear_proj.weight", ((attention + "o_proj.weight", (h, queries)),), COPY, ROW
        )
        if c.attention_output_bias:
            yield Row(m + "self_attention.linear_proj.bias", ((attention + "o_proj.bias", (h,)),))
        yield from _expert_rows(c, m, t) if c.num_experts else _mlp_rows(c, m, t)
        yield Carry(
            ((attention + "rotary_emb.inv_freq", (c.head_dim // 2,)),),
            "a buffer of old releases, computed from the config",
            optional=True,
        )
    yield Row("language_model.decoder.final_layernorm.weight", (("{text}norm.weight", (h,)),))
    if c.tie_word_embeddings:
        yield Alias(head, embedding, (c.vocab_size, h))
    else:
        yield Row("language_model.output_layer.weight", ((head, (c.vocab_size, h)),), pad, COLUMN)


def _mlp_rows(c: LanguageConfig, m: str, t: str) -> Entries:
    """Yield a layer's gated MLP and the norm before it; ``m`` and ``t`` begin the names of either side."""
    h, f, mlp = c.hidden_size, c.ffn_hidden_size, t + "mlp."
    yield Row(m + "mlp.linear_fc1.layer_norm_weight", ((t + "post_attention_layernorm.weight", (h,)),))
    yield Row(
        m + "mlp.linear_fc1.weight",
        ((mlp + "gate_proj.weight", (f, h)), (mlp + "up_proj.weight", (f, h))),
        Concatenate(2),
        GATED,
    )
    yield Row(m + "mlp.linear_fc2.weight", ((mlp + "down_proj.weight", (h, f)),), COPY, ROW)
    if c.mlp_bias:
        yield Row(
            m + "mlp.linear_fc1.bias",
            ((mlp + "gate_proj.bias", (f,)), (mlp + "up_proj.bias", (f,))),
            Concatenate(2),
            GATED,
        )
        yield Row(m + "mlp.linear_fc2.bias", ((mlp + "down_proj.bias", (h,)),))


def _expert_rows(c: LanguageConfig, m: str, t: str) -> Entries:
    """Yield Mixtral's router and experts: w1 is the gate, w3 up, w2 down.

    transformers 5 writes these names too.
    """
    h, f, moe = c.hidden_size, c.ffn_hidden_size, t + "block_sparse_moe."
    assert c.num_experts is not None
    yield Row(m + "pre_mlp_layernorm.weight", ((t + "post_attention_layernorm.weight", (h,)),))
    yield Row(m + "mlp.router.weight", ((moe + "gate.weight", (c.num_experts, h)),))
    for i in range(c.num_experts):
        expert, theirs = m + f"mlp.experts.local_experts.{i}.", moe + f"experts.{i}."
        yield Row(
            expert + "linear_fc1.weight",
            ((theirs + "w1.weight", (f, h)), (theirs + "w3.weight", (f, h))),
            Concatenate(2),
            GATED,
        )
        yield Row(expert + "linear_fc2.weight", ((theirs + "w2.weight", (h, f)),), COPY, ROW)
