"""The blocks of a vision transformer, which CLIP's and SigLIP's towers share."""

from __future__ import annotations

from megatron_vlm.architecture.model import VisionConfig
from megatron_vlm.hf.tables.ops import COLUMN, COPY, ROW, MergeQKV, Shape
from megatron_vlm.hf.tables.table import Carry, Entries, Row


def blocks(c: VisionConfig, layers_run: int) -> Entries:
    """Yield CLIP's and SigLIP's blocks, which are the same; those from ``layers_run`` on are carried."""
    h, f = c.hidden_size, c.ffn_hidden_size
    merge = MergeQKV(c.num_attention_heads, c.num_attention_heads)
    for i in range(c.num_layers):
        m, t = f"vision_model.decoder.layers.{i}.", f"{{tower}}encoder.layers.{i}."
        attention, mlp = t + "self_attn.", t + "mlp."
        rows = [
            Row(m + "self_attention.linear_qkv.layer_norm_weight", ((t + "layer_norm1.weight", (h,)),)),
            Row(m + "self_attention.linear_qkv.layer_norm_bias", ((t + "layer_norm1.bias", (h,)),)),
            Row(
                m + "self_attention.linear_qkv.weight",
                tuple((attention + f"{x}_proj.weight", (h, h)) for x in "qkv"),
                merge,
                COLUMN,
            ),
            Row(
                m + "self_attention.linear_qkv.bias",
                tuple((attention + f"{x}_proj.bias", (h,)) for x in "qkv"),
                merge,
                COLUMN,
            ),
            Row(
                m + "self_attention.linear_proj.weight", ((attention + "out_proj.weight", (h, h)),), COPY, ROW
            ),
            Row(m + "self_attention.linear_proj.bias", ((attention + "out_proj.bias", (h,)),)),
            Row(m + "mlp.linear_fc1.layer_norm_weight", ((t + "layer_norm2.weight", (h,)),)),
            Row(m + "mlp.linear_fc1.layer_norm_bias", ((t + "layer_norm2.bias", (h,)),)),
            Row(m + "mlp.linear_fc1.weight", ((mlp + "fc1.weight", (f, h)),), COPY, COLUMN),
            Row(m + "mlp.linear_fc1.bias", ((mlp + "fc1.bias", (f,)),), COPY, COLUMN),
            Row(m + "mlp.linear_fc2.weight", ((mlp + "fc2.weight", (h, f)),), COPY, ROW),
            Row(m + "mlp.linear_fc2.bias", ((mlp + "fc2.bias", (h,)),)),
        ]
        if i < layers_run:
            yield from rows
        else:
            yield Carry(
                tuple(pair for row in rows for pair in row.hf), "a block behind the last feature layer"
            )


def positions(c: VisionConfig) -> tuple[str, Shape]:
    """Return the name and the shape of the learned positions."""
    return "{tower}embeddings.position_embedding.weight", (c.sequence_length, c.hidden_size)


def post_layernorm(c: VisionConfig) -> Carry:
    """Return the norm behind the last block, which LLaVA does not run."""
    return Carry(
        tuple(("{tower}post_layernorm." + name, (c.hidden_size,)) for name in ("weight", "bias")),
        "behind the last feature layer: LLaVA takes hidden states from before it",
    )


def position_ids(c: VisionConfig) -> Carry:
    """Return the buffer of positions that old releases of transformers wrote."""
    return Carry(
        (("{tower}embeddings.position_ids", (1, c.sequence_length)),),
        "a buffer of old releases, 0 to the number of positions",
        optional=True,
    )
