"""The layers of a CLIP or SigLIP vision tower. Source: megatron-core ``CLIPViTModel``."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Attention, Convolution, Layer, Linear, norm, vector
from megatron_vlm.architecture.model import ModelConfig


def embedding_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield what turns pixels into the first block's input."""
    vision = model.vision
    hidden, patch = vision.hidden_size, vision.patch_size
    yield Convolution(
        "conv1",
        (hidden, vision.num_channels, patch, patch),
        patches=vision.num_patches,
        positions=vision.sequence_length,
        bias=not vision.has_class_token,
    )
    if vision.has_class_token:
        yield vector("class_token", 1, 1, hidden)
    yield vector("position_embeddings.weight", vision.sequence_length, hidden)
    if vision.has_class_token:
        yield norm("ln_pre.", hidden, bias=True)


def block_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the layers of one block."""
    hidden, ffn = model.vision.hidden_size, model.vision.ffn_hidden_size
    rank, targets = (model.lora.rank, model.lora.vision_targets) if model.lora else (0, ())
    qkv = Linear("self_attention.linear_qkv", hidden, 3 * hidden, COLUMN, bias=True)
    proj = Linear("self_attention.linear_proj", hidden, hidden, ROW, bias=True)
    fc1 = Linear("mlp.linear_fc1", hidden, ffn, COLUMN, bias=True)
    fc2 = Linear("mlp.linear_fc2", ffn, hidden, ROW, bias=True)
    yield norm(f"{qkv.name}.layer_norm_", hidden, bias=True)
    yield qkv.adapted(rank, targets, q_proj=hidden, k_proj=hidden, v_proj=hidden)
    yield Attention(hidden)
    yield proj.adapted(rank, targets, out_proj=hidden)
    yield norm(f"{fc1.name}.layer_norm_", hidden, bias=True)
    yield fc1.adapted(rank, targets, fc1=ffn)
    yield fc2.adapted(rank, targets, fc2=hidden)
