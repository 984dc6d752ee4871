"""Tiny random LLaVA models of each family, with odd sizes, as Hugging Face folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.data.tiny_data import make_processor

_CLIP = dict(
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=4,
)
_SIGLIP = dict(_CLIP, image_size=22)  # a strip at the edge is narrower than a patch
_TOWERS: dict[str, tuple[type, dict[str, Any]]] = {
    "clip": (transformers.CLIPVisionConfig, _CLIP),
    "siglip": (transformers.SiglipVisionConfig, _SIGLIP),
    "siglip2": (transformers.SiglipVisionConfig, _CLIP),  # at a fixed resolution it is a SigLIP
}
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
_TEXTS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _LLAMA),
    "mistral": (transformers.MistralConfig, _LLAMA),
    "mixtral": (transformers.MixtralConfig, dict(_LLAMA, num_local_experts=5, num_experts_per_tok=2)),
    "qwen2": (transformers.Qwen2Config, dict(_LLAMA, num_key_value_heads=4, rope_theta=1e6)),
    "qwen3": (transformers.Qwen3Config, dict(_LLAMA, head_dim=16)),
}
# Of the six wavelengths one lies below 12.8 tokens, one between, the others above 42.7.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=3.0,
    low_freq_factor=1.5,
    high_freq_factor=5.0,
    original_max_position_embeddings=64,
)

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
    "clip-llama3": dict(text_extra=dict(rope_parameters=LLAMA3_ROPE)),
    "clip-mistral": dict(
        text="mistral",
        # A head size that hidden_size / heads is not, as in Mistral-Nemo, and a window that no text fills.
        text_extra=dict(
            head_dim=16, sliding_window=100, rope_parameters=dict(rope_type="linear", factor=2.5)
        ),
    ),
    "clip-qwen3-tied": dict(text="qwen3", tie_word_embeddings=True),
    "clip-mixtral": dict(text="mixtral", text_extra=dict(num_experts_per_tok=3)),
    "siglip-qwen3-biases": dict(
        text="qwen3",
        vision="siglip",
        vision_feature_select_strategy="full",
        text_extra=dict(attention_bias=True),
    ),
}

# Those that cut images into tiles, of 5 patches a side.
for _name, _options in {
    "next-clip-llama": dict(kind="llava_next", image_grid_pinpoints=[[20, 40], [40, 20], [40, 40], [60, 20]]),
    "onevision-siglip-qwen2": dict(
        kind="llava_onevision",
        text="qwen2",
        vision="siglip",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=[[22 * rows, 22 * columns] for rows in range(1, 4) for columns in range(1, 4)],
    ),
}.items():
    FAMILIES[_name] = {**_options, "text_extra": dict(max_position_embeddings=512)}
FAMILIES["vip-clip-llama"] = dict(kind="vipllava", vision_feature_layers=[-2, 1, -3])
# Of images, height and width: wide, tall, small, nearly square, and thin.
SIZES = [(14, 41), (50, 33), (9, 8), (64, 70), (5, 97), (90, 21), (22, 44)]

# What differs from those above in numbers only: each is compared and converted, but no more.
ALIKE: dict[str, dict[str, Any]] = {
    # Vicuna is a Llama whose heads share no keys; Qwen2.5 is a Qwen2 whose heads do.
    "clip-vicuna": dict(text_extra=dict(num_key_value_heads=4)),
    "clip-qwen2.5": dict(text="qwen2", text_extra=dict(num_key_value_heads=2, rms_norm_eps=1e-6)),
    "siglip2-mistral": dict(text="mistral", vision="siglip2", vision_feature_select_strategy="full"),
    "siglip-mixtral": dict(text="mixtral", vision="siglip", vision_feature_select_strategy="full"),
}
ALL = {**FAMILIES, **ALIKE}

MODELS: dict[str, tuple[type, type]] = {
    "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
    "llava_next": (transformers.LlavaNextConfig, transformers.LlavaNextForConditionalGeneration),
    "llava_onevision": (
        transformers.LlavaOnevisionConfig,
        transformers.LlavaOnevisionForConditionalGeneration,
    ),
    "vipllava": (transformers.VipLlavaConfig, transformers.VipLlavaForConditionalGeneration),
}


def tiny_config(
    kind: str = "llava",
    text: str = "llama",
    vision: str = "clip",
    projector: str = "mlp2x_gelu",
    tie_word_embeddings: bool = False,
    text_extra: dict[str, Any] | None = None,
    **extra: Any,
) -> Any:
    """The config of a tiny LLaVA."""
    text_class, text_sizes = _TEXTS[text]
    vision_class, vision_sizes = _TOWERS[vision]
    if projector == "linear":
        extra.update(projector_hidden_act="linear", mm_projector_type="linear")
    config_class, _ = MODELS[kind]
    return config_class(
        text_config=text_class(
            **{**text_sizes, **copy.deepcopy(text_extra or {})},  # transformers writes into rope_parameters
            tie_word_embeddings=tie_word_embeddings,
        ),
        vision_config=vision_class(**vision_sizes),
        tie_word_embeddings=tie_word_embeddings,
        image_token_index=200,
        **extra,
    )


def build(config: Any) -> Any:
    """transformers' model of a config, its weights as transformers initialises them."""
    return MODELS[config.model_type][1](config)


def transformers_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A microbatch of ``make_batch`` as transformers' models take it."""
    if not len(batch["pixel_values"]):
        return {"input_ids": batch["input_ids"]}
    names = {"input_ids", "pixel_values", "image_sizes", "batch_num_images"} & batch.keys()
    return {name: batch[name] for name in names}


def tiny_llava(family: str, seed: int = 0) -> Any:
    """A tiny LLaVA whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    options = ALL[family]
    model = build(tiny_config(**options)).eval()
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


def save_tiny_llava(folder: Path, family: str, seed: int = 0) -> Any:
    """Save :func:`tiny_llava` as a Hugging Face folder and return it."""
    model = tiny_llava(family, seed)
    model.save_pretrained(folder)
    return model


def save_llava(
    folder: Path,
    tie_word_embeddings: bool,
    seed: int = 5,
    num_layers: int = 2,
    experts: bool = False,
    kind: str = "llava",
) -> None:
    """A Hugging Face LLaVA to train and ask: weights, tokenizer, template and image processor."""
    processor = make_processor("llava")
    text_class = transformers.MixtralConfig if experts else transformers.LlamaConfig
    vision: Any = transformers.CLIPVisionConfig(**dict(_CLIP, intermediate_size=64))
    options: dict[str, Any] = {}
    if kind != "llava":
        options = {"image_grid_pinpoints": [[20, 40], [40, 20], [40, 40], [60, 20]]}
    if kind == "llava_onevision":
        vision = transformers.SiglipVisionConfig(**dict(_CLIP, intermediate_size=64))
        options["vision_aspect_ratio"] = "anyres_max_2"
    config_class, _ = MODELS[kind]
    config = config_class(
        vision_config=vision,
        text_config=text_class(
            vocab_size=450,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie_word_embeddings,
            **(dict(num_local_experts=4, num_experts_per_tok=2) if experts else {}),
            initializer_range=0.1,  # large enough for the projector alone to make a difference
        ),
        tie_word_embeddings=tie_word_embeddings,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    )
    torch.manual_seed(seed)
    build(config).save_pretrained(folder)
    save_processor(folder, processor, kind, options)


def save_processor(folder: Path, plain: Any, kind: str, options: dict[str, Any]) -> None:
    """The processor of a :func:`save_llava`: tokenizer and template of ``plain``, and how images are cut."""
    square = {"height": 20, "width": 20}
    if kind == "llava":
        plain.save_pretrained(folder)
    elif kind == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 20},
            crop_size=square,
            image_grid_pinpoints=options["image_grid_pinpoints"],
        )
        transformers.LlavaNextProcessor(
            images, plain.tokenizer, 4, "default", plain.chat_template, num_additional_image_tokens=1
        ).save_pretrained(folder)
    else:  # LlavaOnevisionProcessor asks for torchvision, for videos
        pinpoints = options["image_grid_pinpoints"]
        LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints).save_pretrained(folder)
        plain.tokenizer.chat_template = plain.chat_template
        plain.tokenizer.save_pretrained(folder)
