"""The blocks that CLIP's and SigLIP's towers share. Source: megatron-core ``CLIPViTModel``."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional

from megatron_vlm.architecture.layers import COLUMN, ROW, Attention, Convolution, Layer, Linear, norm
from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.architecture.vision import VisionConfig

# What transformers assumes of both. Source: ``CLIPVisionConfig``, ``SiglipVisionConfig``.
SIZES: Dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}


def patch_embedding(vision: VisionConfig, bias: bool) -> Convolution:
    """Return the convolution that turns patches of pixels into positions."""
    shape = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
    return Convolution("conv1", shape, vision.num_patches, vision.sequence_length, bias)


def block_layers(vision: VisionConfig, lora: Optional[LoRAConfig]) -> Iterator[Layer]:
    """Yield the layers of one block."""
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    rank, targets = (lora.rank, lora.vision_targets) if lora else (0, ())
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
