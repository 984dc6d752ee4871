"""The blocks that CLIP's and SigLIP's towers share. Source: megatron-core ``CLIPViTModel``."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Attention, Convolution, Layer, Linear, norm
from megatron_vlm.architecture.model import ModelConfig, VisionConfig


def patch_embedding(vision: VisionConfig, bias: bool) -> Convolution:
    """Return the convolution that turns patches of pixels into positions."""
    shape = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
    return Convolution("conv1", shape, vision.num_patches, vision.sequence_length, bias)


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
