"""The architecture of a LLaVA's language model, read from its part of ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional

from megatron_vlm.architecture.families.known import (
    UNNAMED_TEXT,
    TextFamily,
    check_choice,
    check_rope_type,
    check_text,
)

TEXT_ACTIVATIONS = ("silu",)


@dataclass(frozen=True)
class RopeScaling:
    """The way in which rotary frequencies are lowered for texts longer than a model was first trained on.

    ``linear`` divides all of them by ``factor``; ``llama3`` those whose wavelength is above
    ``original_max_position_embeddings / low_freq_factor`` tokens, none below
    ``original_max_position_embeddings / high_freq_factor``, and goes smoothly from one to the other between.

    Source: transformers ``modeling_rope_utils``.
    """

    kind: str  # "linear" or "llama3"; the values below factor are llama3's
    factor: float
    low_freq_factor: Optional[float] = None
    high_freq_factor: Optional[float] = None
    original_max_position_embeddings: Optional[int] = None


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder-only language model."""

    family: str  # a key of families.TEXT_FAMILIES
    hidden_size: int
    ffn_hidden_size: int  # of each expert, where there are some
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    activation: str
    norm_epsilon: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    # With defaults, since checkpoints of older releases describe their models without them.
    qk_norm: bool = False  # an RMSNorm over each query head and each key head, before RoPE
    rope_scaling: Optional[RopeScaling] = None
    # In some layer a token attends to this many at most, itself included. Here all layers attend to the
    # whole sequence, which is the same as long as no sequence is longer.
    sliding_window: Optional[int] = None
    num_experts: Optional[int] = None  # the MLP is a mixture of so many
    experts_per_token: Optional[int] = None


def language_config(raw: Dict[str, Any], llava: Dict[str, Any]) -> LanguageConfig:
    """Read the ``text_config`` of a LLaVA's ``config.json``.

    Args:
        llava: all of it.

    Raises:
        ValueError: the model is of a kind that is not supported.
    """
    kind = raw.get("model_type", UNNAMED_TEXT)
    family = check_text(raw)
    get = {**family.defaults, **raw}
    check_choice("text_config.hidden_act", get["hidden_act"], TEXT_ACTIVATIONS)
    if get.get("pretraining_tp", 1) not in (None, 1):
        raise ValueError(f"config.json: text_config.pretraining_tp is {get['pretraining_tp']}; supported: 1")
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling, which win there.
    rope = dict(get.get("rope_scaling") or get.get("rope_parameters") or {})
    if rope.get("partial_rotary_factor", get.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError("config.json: text_config partial_rotary_factor is not 1; supported: 1")
    heads = get["num_attention_heads"]
    groups = get["num_key_value_heads"] or heads
    if heads % groups:
        raise ValueError(
            f"config.json: text_config.num_key_value_heads is {groups}; it has to divide the {heads} "
            "num_attention_heads"
        )
    # A family without such a switch would read it but not obey it.
    attention_bias = family.attention_bias and bool(get["attention_bias"])
    return LanguageConfig(
        family=kind,
        hidden_size=get["hidden_size"],
        ffn_hidden_size=get["intermediate_size"],
        num_layers=get["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        # Qwen2's attention reads a head_dim from its config too, when there is one.
        head_dim=get.get("head_dim") or get["hidden_size"] // heads,
        vocab_size=get["vocab_size"],
        max_position_embeddings=get["max_position_embeddings"],
        activation=get["hidden_act"],
        norm_epsilon=get["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or get["rope_theta"]),
        tie_word_embeddings=bool(
            llava.get("tie_word_embeddings", False) or raw.get("tie_word_embeddings", False)
        ),
        qkv_bias=family.qkv_bias or attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=family.mlp_bias and bool(get["mlp_bias"]),
        qk_norm=family.qk_norm,
        rope_scaling=_rope_scaling(rope, get),
        sliding_window=_sliding_window(family, get),
        **(_experts(get) if family.experts else {}),
    )


def _experts(text: Dict[str, Any]) -> Dict[str, int]:
    count, chosen = text["num_local_experts"], text["num_experts_per_tok"]
    if type(count) is not int or type(chosen) is not int or not 2 <= chosen <= count:
        raise ValueError(
            f"config.json: text_config.num_experts_per_tok is {chosen!r} of {count!r} experts; supported: "
            "2 up to all of them"
        )
    if text["router_jitter_noise"]:
        raise ValueError(
            f"config.json: text_config.router_jitter_noise is {text['router_jitter_noise']}; supported: 0, "
            "since the noise would differ between layouts; set it so, nothing but training reads it"
        )
    return {"num_experts": count, "experts_per_token": chosen}


def _rope_scaling(rope: Dict[str, Any], text: Dict[str, Any]) -> Optional[RopeScaling]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_rope_type(kind)
    if kind == "default":
        return None
    factor = _rope_number(rope, "factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    low, high = _rope_number(rope, "low_freq_factor"), _rope_number(rope, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"config.json: text_config rope's high_freq_factor is {high:g}; "
            f"it has to be above its low_freq_factor, {low:g}"
        )
    original = (
        text.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or text["max_position_embeddings"]
    )
    return RopeScaling(kind, factor, low, high, original)


def _rope_number(rope: Dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"config.json: text_config rope's {key} is {value!r}; it has to be above 0")
    return float(value)


def _sliding_window(family: TextFamily, text: Dict[str, Any]) -> Optional[int]:
    if family.window == "all":
        return text["sliding_window"]
    if family.window == "none" or not text["use_sliding_window"]:
        return None
    types = text.get("layer_types")
    some = "sliding_attention" in types if types else text["max_window_layers"] < text["num_hidden_layers"]
    return text["sliding_window"] if some else None
