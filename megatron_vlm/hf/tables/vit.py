"""The blocks of a vision transformer, which CLIP's and SigLIP's towers share."""

from __future__ import annotations

from megatron_vlm.architecture.encoders.blocks import block_layers
from megatron_vlm.architecture.vision import VisionConfig
from megatron_vlm.hf.tables.ops import MergeQKV
from megatron_vlm.hf.tables.table import Carry, Entries, Merged, described

# The description's names of what turns pixels into the first block's input, and the Hugging Face ones.
EMBEDDING = {
    "conv1": "{tower}embeddings.patch_embedding",
    "position_embeddings": "{tower}embeddings.position_embedding",
}
# The description's names of a block, and the Hugging Face ones.
_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "layer_norm1.",
    "self_attention.linear_proj": "self_attn.out_proj",
    "mlp.linear_fc1.layer_norm_": "layer_norm2.",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}


def blocks(c: VisionConfig, layers_run: int) -> Entries:
    """Yield CLIP's and SigLIP's blocks, which are the same; those from ``layers_run`` on are carried."""
    merge = MergeQKV(c.num_attention_heads, c.num_attention_heads)
    for i in range(c.num_layers):
        t = f"{{tower}}encoder.layers.{i}."
        names: dict[str, str | Merged] = {ours: t + theirs for ours, theirs in _NAMES.items()}
        qkv = {t + f"self_attn.{x}_proj": c.hidden_size for x in "qkv"}
        names["self_attention.linear_qkv"] = Merged(qkv, merge)
        layers = block_layers(c, lora=None)
        rows = list(described(layers, f"vision_model.decoder.layers.{i}.", names))
        if i < layers_run:
            yield from rows
        else:
            yield Carry(
                tuple(pair for row in rows for pair in row.hf), "a block behind the last feature layer"
            )


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
