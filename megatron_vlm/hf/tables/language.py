"""The table of the language model."""

from __future__ import annotations

from megatron_vlm.architecture.decoder import decoder_layers
from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.hf.tables.ops import COLUMN, GATED, Concatenate, MergeQKV, PadVocabulary
from megatron_vlm.hf.tables.table import Alias, Carry, Entries, Merged, Row, described


def entries(c: LanguageConfig, padded_vocab_size: int) -> Entries:
    """Yield the rows of transformers' Llama, Mistral, Mixtral, Qwen2 and Qwen3 and megatron-core's
    ``GPTModel``.

    They differ in biases, in Qwen3's norms of queries and keys and in Mixtral's experts: the config tells.
    """
    h = c.hidden_size
    pad = PadVocabulary(c.vocab_size, padded_vocab_size)
    embedding, head = "{text}embed_tokens.weight", "{head}weight"
    yield Row(
        "language_model.embedding.word_embeddings.weight", ((embedding, (c.vocab_size, h)),), pad, COLUMN
    )
    for i in range(c.num_layers):
        t = f"{{text}}layers.{i}."
        names = _names(c, t)
        yield from described(decoder_layers(c, lora=None), f"language_model.decoder.layers.{i}.", names)
        yield Carry(
            ((t + "self_attn.rotary_emb.inv_freq", (c.head_dim // 2,)),),
            "a buffer of old releases, computed from the config",
            optional=True,
        )
    yield Row("language_model.decoder.final_layernorm.weight", (("{text}norm.weight", (h,)),))
    if c.tie_word_embeddings:
        yield Alias(head, embedding, (c.vocab_size, h))
    else:
        yield Row("language_model.output_layer.weight", ((head, (c.vocab_size, h)),), pad, COLUMN)


def _names(c: LanguageConfig, t: str) -> dict[str, str | Merged]:
    """Return the description's names of a layer, and the Hugging Face ones, which ``t`` begins.

    Mixtral's experts: w1 is the gate, w3 up, w2 down. transformers 5 writes these names too.
    """
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    qkv = {t + "self_attn.q_proj": queries, t + "self_attn.k_proj": keys, t + "self_attn.v_proj": keys}
    names: dict[str, str | Merged] = {
        "self_attention.linear_qkv.layer_norm_": t + "input_layernorm.",
        "self_attention.linear_qkv": Merged(qkv, MergeQKV(c.num_attention_heads, c.num_key_value_heads)),
        "self_attention.q_layernorm": t + "self_attn.q_norm",
        "self_attention.k_layernorm": t + "self_attn.k_norm",
        "self_attention.linear_proj": t + "self_attn.o_proj",
        "pre_mlp_layernorm": t + "post_attention_layernorm",
        "mlp.linear_fc1.layer_norm_": t + "post_attention_layernorm.",
        "mlp.linear_fc1": _gated(c, t + "mlp.gate_proj", t + "mlp.up_proj"),
        "mlp.linear_fc2": t + "mlp.down_proj",
        "mlp.router": t + "block_sparse_moe.gate",
    }
    for i in range(c.num_experts or 0):
        ours, theirs = f"mlp.experts.local_experts.{i}.", f"{t}block_sparse_moe.experts.{i}."
        names[ours + "linear_fc1"] = _gated(c, theirs + "w1", theirs + "w3")
        names[ours + "linear_fc2"] = theirs + "w2"
    return names


def _gated(c: LanguageConfig, *names: str) -> Merged:
    return Merged(dict.fromkeys(names, c.ffn_hidden_size), Concatenate(len(names)), GATED)
