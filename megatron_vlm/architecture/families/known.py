"""The families: whole models as this folder lists them, text models and towers as an entry each.

An entry holds what transformers' config class assumes for a key that config.json leaves out, and which
parts the family has. A ``model_type`` or a value that these models can't express is refused with the reason
and with what works instead, before anything is read but config.json.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, Collection, Dict, Mapping, Optional, Tuple

from megatron_vlm.architecture.families import llava
from megatron_vlm.architecture.families.family import Family
from megatron_vlm.system.registry import Registry

_ENCODERS = "megatron_vlm.architecture.encoders"


@dataclass(frozen=True)
class TextFamily:
    """A family of text models, and what sets it apart from the others.

    Attributes:
        defaults: values of keys that config.json leaves out.
        qkv_bias: queries, keys and values always have a bias.
        attention_bias: the config's key of that name is obeyed.
        mlp_bias: the config's key of that name is obeyed.
        qk_norm: an RMSNorm over each query head and each key head, before RoPE.
        window: which layers attend to ``sliding_window`` tokens: "all"; "some", as ``use_sliding_window`` and
            what belongs to it say; or "none", whatever the config has.
        experts: the MLP is a mixture of experts.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: str = "none"
    experts: bool = False


_COMMON: Dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_LLAMA: Dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL: Dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL: Dict[str, Any] = {
    **_MISTRAL,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
}
_QWEN2: Dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3: Dict[str, Any] = {**_QWEN2, "head_dim": 128, "attention_bias": False}

TEXT_FAMILIES: Dict[str, TextFamily] = {
    "llama": TextFamily(_LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": TextFamily(_MISTRAL, window="all"),
    "mixtral": TextFamily(_MIXTRAL, window="all", experts=True),
    "qwen2": TextFamily(_QWEN2, qkv_bias=True, window="some"),
    "qwen3": TextFamily(_QWEN3, attention_bias=True, qk_norm=True, window="some"),
}

# By model_type: what transformers' config class of a tower assumes, and the tower's kind.
TOWERS: Mapping[str, Mapping[str, Any]] = Registry(_ENCODERS, "DEFAULTS", key="MODEL_TYPE")
TOWER_KINDS: Mapping[str, str] = Registry(_ENCODERS, "KIND", key="MODEL_TYPE")
# By model_type: kinds of vision-language models, a file each in this folder.
FAMILIES: Mapping[str, Family] = Registry("megatron_vlm.architecture.families", "FAMILY")
BUILT = tuple(kind for kind, family in FAMILIES.items() if family.built)
PLAIN = llava.KIND  # what is built unless asked for another
# What transformers takes a part for whose config has no model_type.
UNNAMED_TEXT = "llama"
UNNAMED_TOWER = "clip_vision_model"
ROPE_TYPES = ("default", "linear", "llama3")

_SCALED_NORM = "its norms multiply by 1 + weight and its embeddings are scaled"
_PARTIAL_ROTARY = "it turns only a part of each head by its position (partial_rotary_factor)"
_MLA = "it has multi-head latent attention (kv_lora_rank)"
_SHARED = "it has experts of their own size (moe_intermediate_size), which Mixtral has not"
_NO_ROPE = "some of its layers have no positions (no_rope_layers)"
_LEARNED = "its positions are not rotary"
_PARALLEL = "attention and MLP of a layer run beside each other"
# Types that no one has looked at are refused too, but without a reason.
_REFUSED_TEXT: Dict[str, str] = {
    "arcee": "its MLP has no gate",
    "bloom": _LEARNED,
    "cohere": f"{_PARALLEL} and its logits are scaled (logit_scale)",
    "cohere2": f"{_PARALLEL} and its logits are scaled (logit_scale)",
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "exaone4": "its norms come after attention and MLP, and layers differ in their windows (layer_types)",
    "falcon": f"{_PARALLEL} (parallel_attn)",
    "gemma": _SCALED_NORM,
    "gemma2": "it soft-caps attention scores and logits (attn_logit_softcapping, final_logit_softcapping)",
    "gemma3_text": "its layers differ in window and in rotary base (layer_types)",
    "glm": _PARTIAL_ROTARY,
    "glm4": _PARTIAL_ROTARY,
    "gpt2": _LEARNED,
    "gpt_neox": _PARTIAL_ROTARY,
    "gpt_oss": "its attention has sinks and its experts clamp what they compute (swiglu_limit)",
    "granite": "it scales embeddings, residuals, scores and logits (residual_multiplier)",
    "llama4_text": "its layers differ in attention (attention_chunk_size) and some have no positions",
    "mamba": "its layers are not attention (state_size)",
    "ministral": "its layers differ in their windows (layer_types)",
    "mpt": _LEARNED,
    "nemotron": f"{_PARTIAL_ROTARY} and its MLP has no gate",
    "olmo": "its norms have no weights",
    "olmo2": "its norms come after attention and MLP",
    "olmo3": "its norms come after attention and MLP, and layers differ in their windows (layer_types)",
    "opt": _LEARNED,
    "phi": _PARTIAL_ROTARY,
    "phi3": "its checkpoints hold fused projections, for which there is no table",
    "phimoe": "its router is not a softmax over the chosen experts and its norms are LayerNorms with biases",
    "qwen2_moe": f"{_SHARED}, and a shared one",
    "qwen3_moe": _SHARED,
    "qwen3_next": "most of its layers have linear attention (linear_conv_kernel_dim)",
    "smollm3": _NO_ROPE,
    "stablelm": _PARTIAL_ROTARY,
    "starcoder2": "its MLP has no gate",
}
_WHOLE = "that is a whole model: vision_config has to be its vision_config"
_PATCHES = "it takes images of any shape as sequences of patches, and a tower here squares of one size"
_REFUSED_TOWERS: Dict[str, str] = {
    "clip": _WHOLE,
    "dinov2": "it scales what each block adds (layerscale_value)",
    "dinov3_vit": "its positions are rotary (rope_theta)",
    "idefics3_vision": _PATCHES,
    "internvl_vision": "it scales what each block adds (layer_scale_init_value)",
    "mllama_vision_model": "its blocks attend over all tiles of an image (max_num_tiles)",
    "pixtral": f"{_PATCHES} with rotary positions",
    "qwen2_5_vl_vision": _PATCHES,
    "siglip": _WHOLE,
    "siglip2_vision_model": (
        f"this is NaFlex: {_PATCHES}; SigLIP 2's fixed-resolution checkpoints, such as "
        "google/siglip2-so400m-patch14-384, work: their type is siglip_vision_model"
    ),
}
_WITHOUT = "a model that was scaled later can do without, up to the length it was trained on"
_REFUSED_ROPE: Dict[str, str] = {
    "dynamic": f"its frequencies depend on each text's length; {_WITHOUT}",
    "longrope": "it has a factor for each frequency and scales attention",
    "yarn": f"it scales attention, too; {_WITHOUT}",
}
_BUILDER = "scripts/convert/build_llava_jp.py"
# Releases of LLaVA in the format of LLaVA's own repository, by their image_aspect_ratio: their names, the
# script of transformers that converts them, and what it has made of one.
_ORIGINAL_TYPES = tuple(
    f"llava_{text}" for text in ("llama", "mpt", "mistral", "mixtral", "gemma", "qwen", "qwen_moe")
)
_ORIGINALS: Tuple[Tuple[str, str, str, str], ...] = (
    (
        "anyres_max",
        "LLaVA-OneVision",
        "convert_llava_onevision_weights_to_hf.py",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    ),
    (
        "anyres",
        "LLaVA-NeXT (LLaVA-1.6)",
        "convert_llava_next_weights_to_hf.py",
        "llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    ("", "LLaVA-1.5", "convert_llava_weights_to_hf.py", "llava-hf/llava-1.5-7b-hf"),
)
# Keys that change what a model computes, wherever they stand.
_REFUSED_KEYS: Dict[str, str] = {
    "attn_logit_softcapping": "attention here has no soft cap on its scores",
    "final_logit_softcapping": "the loss here has no soft cap on its logits",
    "quantization_config": "the weights are quantised; convert the checkpoint that they were made from",
}


def check_text(text: Mapping[str, Any], where: str = "config.json: text_config.") -> TextFamily:
    """Return the family of a text model.

    Args:
        text: its config, as JSON has it.
        where: begins the message.

    Raises:
        ValueError: it can't be expressed; the line says why, and what is supported.
    """
    kind = text.get("model_type", UNNAMED_TEXT)
    _check_type(where, kind, TEXT_FAMILIES, _REFUSED_TEXT)
    check_keys(text, where)
    return TEXT_FAMILIES[kind]


def check_tower(vision: Mapping[str, Any], where: str = "config.json: vision_config.") -> None:
    """Check a tower as :func:`check_text` does a text model."""
    _check_type(where, vision.get("model_type", UNNAMED_TOWER), TOWERS, _REFUSED_TOWERS)


def other_model(config: Mapping[str, Any], folder: str = "<its folder>") -> str:
    """Return what a model is that is none of transformers' LLaVAs, and what makes one of it; else empty.

    Args:
        config: its ``config.json``.
        folder: where that lies.
    """
    original = original_llava(config)
    if original:
        return original
    kind = config.get("model_type")
    if kind in FAMILIES:
        return ""
    folder = folder if folder.startswith("<") else shlex.quote(folder)
    if kind in TEXT_FAMILIES:
        command = f"{_BUILDER} --text-model {folder} --vision-model <tower> --save-dir <llava>"
        return f"model_type is {kind!r}, a text model; join it with a tower: {command}"
    if kind in TOWERS or _REFUSED_TOWERS.get(str(kind)) == _WHOLE:
        command = f"{_BUILDER} --text-model <text model> --vision-model {folder} --save-dir <llava>"
        return f"model_type is {kind!r}, a tower; join it with a text model: {command}"
    because = _because(_REFUSED_TEXT.get(str(kind)))
    supported = f"supported: {_quoted(FAMILIES)} (build one with {_BUILDER})"
    return f"model_type is {kind!r}{because}; {supported}"


def original_llava(config: Mapping[str, Any]) -> str:
    """Return what a checkpoint of LLaVA's own repository is, and where its conversion is; empty for all
    others."""
    kind, tower = config.get("model_type"), config.get("mm_vision_tower")
    if config.get("vision_config") or not (kind in _ORIGINAL_TYPES or tower or "mm_hidden_size" in config):
        return ""
    ratio = str(config.get("image_aspect_ratio"))
    name, script, example = next(row[1:] for row in _ORIGINALS if ratio.startswith(row[0]))
    what = f"model_type is {kind!r} with mm_vision_tower {tower!r} and without vision_config"
    return (
        f"{what}: {name} in the format of LLaVA's own repository; give its conversion, such as {example} of "
        f"the hub, or convert it with transformers' {script}"
    )


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a whole model.

    Args:
        config: its ``config.json``.

    Raises:
        ValueError: its ``model_type`` is not supported.
    """
    problem = other_model(config)
    if problem:
        raise ValueError(f"config.json: {problem}")
    return FAMILIES[config["model_type"]]


def check_choice(key: str, value: Any, allowed: Tuple[str, ...]) -> None:
    """Check a value that is one of a few.

    Raises:
        ValueError: it is another one; the message names the key and what is supported.
    """
    if value not in allowed:
        raise ValueError(f"config.json: {key} is {value!r}; supported: {', '.join(map(repr, allowed))}")


def check_keys(config: Mapping[str, Any], where: str = "config.json: ") -> None:
    """Check that a config asks for nothing that is not there, in keys that any family may have.

    Raises:
        ValueError: it does; the line says why.
    """
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key):
            raise ValueError(f"{where}{key} is set: {reason}")


def check_rope_type(kind: Any) -> None:
    """Check how rotary frequencies are scaled.

    Raises:
        ValueError: in a way that is not supported.
    """
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"config.json: text_config rope's rope_type is {kind!r}{_because(_REFUSED_ROPE.get(kind))}; "
            f"supported: {_quoted(ROPE_TYPES)}"
        )


def _check_type(where: str, kind: Any, known: Collection[str], refused: Mapping[str, str]) -> None:
    if kind in known:
        return
    raise ValueError(
        f"{where}model_type is {kind!r}{_because(refused.get(kind))}; supported: {_quoted(known)}"
    )


def _because(reason: Optional[str]) -> str:
    return f" ({reason})" if reason else ""


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))
