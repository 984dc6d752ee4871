"""What is read from a config.json equals what transformers makes of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_vlm.architecture.families.known import TEXT_FAMILIES
from megatron_vlm.architecture.language import RopeScaling
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.rules import validate
from tests.tiny import FAMILIES, LLAMA3_ROPE, tiny_config

TEXTS = list(TEXT_FAMILIES)
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(text: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})


@pytest.mark.parametrize("kind", TEXTS)
def test_a_key_that_is_left_out_takes_the_default_of_transformers(kind: str) -> None:
    expected = transformers.AutoConfig.for_model(kind)
    language = read({"model_type": kind}).language
    assert language.hidden_size == expected.hidden_size
    assert language.ffn_hidden_size == expected.intermediate_size
    assert language.num_layers == expected.num_hidden_layers
    assert language.num_attention_heads == expected.num_attention_heads
    assert language.num_key_value_heads == expected.num_key_value_heads
    own = getattr(expected, "head_dim", None)
    assert language.head_dim == (own or expected.hidden_size // expected.num_attention_heads)
    assert language.vocab_size == expected.vocab_size
    assert language.max_position_embeddings == expected.max_position_embeddings
    assert language.norm_epsilon == expected.rms_norm_eps
    assert language.rope_theta == expected.rope_parameters["rope_theta"]
    assert language.sliding_window == getattr(expected, "sliding_window", None)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("old", [True, False], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", [LLAMA31, LLAMA3_ROPE, {"type": "linear", "factor": 2}, None])
def test_rope_in_both_spellings(kind: str, old: bool, rope: dict[str, Any] | None) -> None:
    if old:
        text = {"model_type": kind, "rope_theta": 500000.0, "rope_scaling": rope}
    else:
        text = {"model_type": kind, "rope_parameters": {"rope_theta": 500000.0, **(rope or {})}}
    expected = transformers.AutoConfig.for_model(**json.loads(json.dumps(text))).rope_parameters
    language = read(text).language
    assert language.rope_theta == expected["rope_theta"]
    if rope is None:
        assert language.rope_scaling is None and expected["rope_type"] == "default"
        return
    assert language.rope_scaling == RopeScaling(
        kind=expected["rope_type"],
        factor=expected["factor"],
        low_freq_factor=expected.get("low_freq_factor"),
        high_freq_factor=expected.get("high_freq_factor"),
        original_max_position_embeddings=expected.get("original_max_position_embeddings"),
    )


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "yarn", "factor": 4.0}, r"'yarn' \(.*\); supported: 'default', 'linear', 'llama3'"),
        ({**LLAMA31, "factor": None}, "factor is None; it has to be above 0"),
        (
            {**LLAMA31, "low_freq_factor": 4},
            "high_freq_factor is 4; it has to be above its low_freq_factor, 4",
        ),
        ({"type": "linear", "factor": "2"}, "factor is '2'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_that_is_not_supported(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"model_type": "llama", "rope_scaling": rope})


WINDOWS = [
    ({"model_type": "mistral"}, 4096),
    ({"model_type": "mistral", "sliding_window": None}, None),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100}, 100),
    ({"model_type": "qwen3", "use_sliding_window": True, "num_hidden_layers": 28}, None),
    ({"model_type": "qwen3", "sliding_window": 100}, None),
    ({"model_type": "llama", "sliding_window": 100}, None),
]


@pytest.mark.parametrize("text, window", WINDOWS)
def test_a_sliding_window_is_the_longest_sequence(text: dict[str, Any], window: int | None) -> None:
    model = read(text)
    assert model.language.sliding_window == window
    flags = ["--name", "a", "--save-dir", "b", "--data-path", "c", "--megatron-load-dir", "d"]
    fits = RunConfig.from_flags([*flags, "--seq-length", str(window or 99999)])
    if window is None or window > model.image_tokens:
        validate(fits, 1, model)
    if window is not None:
        longer = RunConfig.from_flags([*flags, "--seq-length", str(max(window, model.image_tokens) + 1)])
        with pytest.raises(ValueError, match=f"sliding window of {window} .*--seq-length {window} "):
            validate(longer, 1, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_holds_all_of_it(family: str) -> None:
    model = ModelConfig.from_hf(tiny_config(**FAMILIES[family]).to_dict())
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_a_manifest_of_an_older_release() -> None:
    values = read({"model_type": "llama"}).to_dict()
    for key in ("qk_norm", "rope_scaling", "sliding_window", "num_experts", "experts_per_token"):
        del values["language"][key]
    assert ModelConfig.from_dict(values) == read({"model_type": "llama"})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision", "patch_size", 0),
        ("vision", "ffn_hidden_size", None),
        ("vision", "hidden_size", 1.5),
        ("language", "num_layers", "32"),
        ("language", "num_layers", 10**30),
        ("language", "vocab_size", True),
        ("language", "num_experts", -1),
        ("projector", "input_size", {}),
    ],
)
def test_a_manifest_with_a_size_that_is_none(part: str, name: str, value: object) -> None:
    values = read({"model_type": "llama"}).to_dict()
    values[part][name] = value
    with pytest.raises(ValueError, match=f"not a description of a model .{name} is .*damaged"):
        ModelConfig.from_dict(values)


def test_a_damaged_manifest() -> None:
    values = read({"model_type": "llama"}).to_dict()
    values["language"]["color"] = "red"
    with pytest.raises(ValueError, match="not a description of a model"):
        ModelConfig.from_dict(values)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        ModelConfig.from_hf_dir(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ModelConfig.from_hf_dir(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**7, "num_layers is 10000000; supported are up to 10000"),
        ("num_hidden_layers", 0, "num_layers is 0; it has to be a positive integer"),
        ("rms_norm_eps", math.nan, "norm_epsilon is nan; it has to be a positive number"),
        ("rope_theta", math.inf, "rope_theta is inf; it has to be a positive number"),
        ("rms_norm_eps", "small", "norm_epsilon is 'small'; it has to be a positive number"),
        ("rope_theta", "x", "a value is not of its key's kind (could not convert string to float"),
        ("sliding_window", -1, "sliding_window is -1; it has to be a positive integer"),
        ("num_local_experts", 10**6, "layers times num_experts is 32000000; supported are up to 10000"),
        ("rope_scaling", {"rope_type": "linear", "factor": math.nan}, "factor is nan; it has to be a"),
        ("rope_scaling", "linear", "a value is not of its key's kind"),
        ("image_size", math.inf, "a value is not of its key's kind (cannot convert float infinity"),
        ("image_token_index", 3.5, "image_token_index is 3.5; it has to be an integer"),
        ("vision_feature_layer", [], "vision_feature_layer is empty; name a layer, such as -2"),
    ],
)
def test_values_that_no_model_has(tmp_path: Path, key: str, value: object, words: str) -> None:
    kinds = {"sliding_window": "mistral", "num_local_experts": "mixtral"}
    config: dict[str, Any] = {
        "model_type": "llava",
        "image_token_index": 7,
        "text_config": {"model_type": kinds.get(key, "llama")},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    part = {"image_size": "vision_config", "image_token_index": None, "vision_feature_layer": None}
    inside = part.get(key, "text_config")
    (config[inside] if inside else config)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(words)):
        ModelConfig.from_hf_dir(str(tmp_path))
