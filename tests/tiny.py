"""Tiny random LLaVA models of each family, with odd sizes, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_CLIP = dict(
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=4,
)
_SIGLIP = dict(_CLIP, image_size=22)  # a strip at the edge is narrower than a patch
_LLAMA = dict(
    vocab_size=203,
    hidden_size=48,
    intermediate_size=68,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
)
_QWEN2 = dict(_LLAMA, num_key_value_heads=4, rope_theta=1e6)

# Each family with another choice of what can vary.
FAMILIES: dict[str, dict[str, Any]] = {
    "clip-llama": {},
    "siglip-qwen2": dict(
        text="qwen2", vision="siglip", vision_feature_select_strategy="full", projector_hidden_act="linear"
    ),
    "clip-qwen2-tied": dict(text="qwen2", tie_word_embeddings=True, vision_feature_layer=-1),
    "siglip-llama-biases": dict(
        vision="siglip",
        vision_feature_select_strategy="full",
        text_extra=dict(attention_bias=True, mlp_bias=True, head_dim=16),
    ),
    "clip-llama-linear": dict(
        projector="linear", vision_feature_layer=[-2, -1], text_extra=dict(attention_bias=True)
    ),
}


def tiny_config(
    text: str = "llama",
    vision: str = "clip",
    projector: str = "mlp2x_gelu",
    tie_word_embeddings: bool = False,
    text_extra: dict[str, Any] | None = None,
    **extra: Any,
) -> transformers.LlavaConfig:
    """The config of a tiny LLaVA."""
    text_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[text]
    text_sizes = {"llama": _LLAMA, "qwen2": _QWEN2}[text]
    vision_class = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[vision]
    vision_sizes = {"clip": _CLIP, "siglip": _SIGLIP}[vision]
    if projector == "linear":
        extra.update(projector_hidden_act="linear", mm_projector_type="linear")
    return transformers.LlavaConfig(
        text_config=text_class(
            **{**text_sizes, **(text_extra or {})}, tie_word_embeddings=tie_word_embeddings
        ),
        vision_config=vision_class(**vision_sizes),
        tie_word_embeddings=tie_word_embeddings,
        image_token_index=200,
        **extra,
    )


def tiny_llava(family: str, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """A tiny LLaVA whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    options = FAMILIES[family]
    model = transformers.LlavaForConditionalGeneration(tiny_config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
        if options.get("projector") == "linear":
            identity = model.model.multi_modal_projector.linear_2
            identity.weight.copy_(torch.eye(len(identity.weight)))
            identity.bias.zero_()
    return model


def save_tiny_llava(folder: Path, family: str, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """Save :func:`tiny_llava` as a Hugging Face folder and return it."""
    model = tiny_llava(family, seed)
    model.save_pretrained(folder)
    return model
