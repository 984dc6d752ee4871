"""Refusals from config.json alone, with transformers' own config classes as input."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_vlm.architecture.families import known as families
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import resolve_checkpoint


def config_of(kind: str, **values: Any) -> dict[str, Any]:
    """Return a config as transformers writes it, all keys included."""
    return transformers.AutoConfig.for_model(kind, **values).to_dict()


def refusal(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> str:
    """The line that a LLaVA of these parts gives."""
    config = {"model_type": "llava", "image_token_index": 7, **more}
    config |= {"text_config": text} if text else {}
    config |= {"vision_config": vision} if vision else {}
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", families._REFUSED_TEXT)
def test_text_models(kind: str) -> None:
    config = config_of(kind)
    message = refusal(text=config)
    assert message.startswith(f"config.json: text_config.model_type is '{kind}' (")
    assert message.endswith("; supported: " + ", ".join(map(repr, families.TEXT_FAMILIES)))
    check_keys_are_the_configs(message, config)


@pytest.mark.parametrize("kind", families._REFUSED_TOWERS)
def test_towers(kind: str) -> None:
    config = config_of(kind)
    message = refusal(vision=config)
    assert message.startswith(f"config.json: vision_config.model_type is '{kind}' (")
    assert message.endswith("; supported: 'clip_vision_model', 'siglip_vision_model'")
    check_keys_are_the_configs(message, config)


def check_keys_are_the_configs(message: str, config: dict[str, Any]) -> None:
    """A reason that names keys names such as are there, so it is about this model."""
    reason = message[message.index("(") + 1 : message.rindex(");")]
    keys = {**config, **(config.get("rope_parameters") or {})}
    for inner in re.findall(r"\(([a-z_, ]+)\)", reason):
        assert all(key in keys for key in inner.split(", ")), inner


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (config_of("gemma2"), "soft-caps attention scores and logits"),
        (config_of("phi3"), "no table"),
        (config_of("phi"), "only a part of each head"),
        (config_of("deepseek_v3"), "multi-head latent attention"),
        (config_of("llama", attn_logit_softcapping=50.0), "attn_logit_softcapping is set"),
        (config_of("qwen2", partial_rotary_factor=0.5), "partial_rotary_factor is not 1"),
        (
            config_of("qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
            "'yarn' (it scales attention, too; a model that was scaled later can do without",
        ),
        (
            {
                "model_type": "llama",
                "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]},
            },
            "'longrope' (it has a factor for each frequency and scales attention); supported: 'default', ",
        ),
        (
            config_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "its frequencies depend on each text's length",
        ),
        (config_of("llama", hidden_act="gelu"), "hidden_act is 'gelu'; supported: 'silu'"),
        (config_of("llama", pretraining_tp=2), "pretraining_tp is 2; supported: 1"),
        (config_of("mixtral", router_jitter_noise=0.1), "router_jitter_noise is 0.1; supported: 0"),
        (config_of("mixtral", num_experts_per_tok=1), "num_experts_per_tok is 1 of 8 experts; supported: 2"),
        (config_of("llama", num_key_value_heads=12), "num_key_value_heads is 12; it has to divide the 32"),
        ({"model_type": "internlm2"}, "is 'internlm2'; supported: 'llama'"),
    ],
)
def test_what_is_said(text: dict[str, Any], words: str) -> None:
    assert words in refusal(text=text)


# As configs of LLaVA's own repository have it: of liuhaotian/llava-v1.5-7b, liuhaotian/llava-v1.6-mistral-7b
# and lmms-lab/llava-onevision-qwen2-7b-ov.
ORIGINAL = {"mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
ORIGINALS = [
    (
        {"model_type": "llava", "image_aspect_ratio": "pad", "image_grid_pinpoints": None},
        "LLaVA-1.5 in the format of LLaVA's own repository; give its conversion, such as llava-hf/llava-1.5",
        "convert_llava_weights_to_hf.py",
    ),
    (
        {
            "model_type": "llava_mistral",
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
        },
        "LLaVA-NeXT (LLaVA-1.6) in the format of LLaVA's own",
        "convert_llava_next_weights_to_hf.py",
    ),
    (
        {"model_type": "llava_qwen", "image_aspect_ratio": "anyres_max_9"},
        "LLaVA-OneVision in the format of LLaVA's own",
        "convert_llava_onevision_weights_to_hf.py",
    ),
    ({"model_type": "llava_llama"}, "LLaVA-1.5 in the format of", "convert_llava_weights_to_hf.py"),
]


@pytest.mark.parametrize(
    ("config", "words", "script"), ORIGINALS, ids=[c["model_type"] for c, *_ in ORIGINALS]
)
def test_llavas_own_format_is_named(config: dict[str, Any], words: str, script: str, tmp_path: Path) -> None:
    tower = "openai/clip-vit-large-patch14-336"
    config = {**ORIGINAL, **config, "mm_vision_tower": tower, "hidden_size": 64, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf_dir(str(tmp_path), "--hf-dir")
    message = str(caught.value)
    named = f"model_type is '{config['model_type']}' with mm_vision_tower '{tower}'"
    assert message.startswith(f"--hf-dir {tmp_path}: {named} and without vision_config: {words}")
    assert message.endswith(f"transformers' {script}") and "\n" not in message


def test_a_config_of_transformers_is_no_original() -> None:
    """Keys that a folder made here has too."""
    config = config_of("llava", image_token_index=7)
    assert ModelConfig.from_hf({**config, "mm_projector_type": "mlp2x_gelu"})
    assert ModelConfig.from_hf({**config, **ORIGINAL, "mm_vision_tower": "openai/clip-vit-large-patch14-336"})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qwen2", "a text model; join it with a tower: scripts/convert/build_llava_jp.py --text-model {}"),
        ("clip_vision_model", "a tower; join it with a text model: scripts/convert/build_llava_jp.py --text"),
        ("clip", "a tower; join it with a text model: scripts/convert/build_llava_jp.py --text-model"),
        ("gemma2", "(it soft-caps attention scores and logits"),
        ("qwen2_vl", "supported: 'llava', 'llava_next', 'llava_onevision', 'vipllava' (build one with"),
    ],
)
def test_a_folder_of_another_model(kind: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    expected = words.format(f"'{folder}'")
    for flag in ("--tokenizer-load-dir", ""):
        with pytest.raises(ValueError) as caught:
            ModelConfig.from_hf_dir(str(folder), flag)
        assert str(caught.value).startswith(f"{flag} {folder}: model_type is '{kind}'".lstrip())
        assert expected in str(caught.value)
    with pytest.raises(ValueError) as caught:
        resolve_checkpoint(folder, "--megatron-load-dir")
    begins = f"--megatron-load-dir {folder}: not a checkpoint of this project, but a Hugging Face model; "
    assert str(caught.value).startswith(f"{begins}model_type is '{kind}'")
    assert expected in str(caught.value)


def test_a_llava_that_is_not_converted_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(
        ValueError, match=rf"convert it: .*convert_hf_to_megatron.py --hf-dir {tmp_path} --meg"
    ):
        resolve_checkpoint(tmp_path)


def test_what_is_wrong_in_a_folder_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_feature_layer": []}))
    with pytest.raises(ValueError, match=rf"^--hf-dir {tmp_path}/config.json: vision_feature_layer is empty"):
        ModelConfig.from_hf_dir(str(tmp_path), "--hf-dir")


def test_quantised_weights_are_refused_wherever_the_config_says_so() -> None:
    quantised = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    words = "quantization_config is set: the weights are quantised; convert the checkpoint"
    assert words in refusal(**quantised)
    assert words in refusal(text={**config_of("llama"), **quantised})


# As the configs of google/siglip2-base-patch16-512 and google/siglip2-so400m-patch14-384 have it.
SIGLIP2 = [
    {"image_size": 512, "model_type": "siglip_vision_model"},
    {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
]


@pytest.mark.parametrize("config", SIGLIP2, ids=["base-512", "so400m-384"])
def test_siglip_2_at_a_fixed_resolution(config: dict[str, Any]) -> None:
    llava = {"model_type": "llava", "vision_config": config, "vision_feature_select_strategy": "full"}
    vision = ModelConfig.from_hf({**llava, "image_token_index": 7}).vision
    expected = transformers.AutoConfig.for_model(**config)
    assert (vision.family, vision.prefix_tokens) == ("siglip", 0)
    assert (vision.hidden_size, vision.ffn_hidden_size) == (expected.hidden_size, expected.intermediate_size)
    assert (vision.image_size, vision.patch_size) == (expected.image_size, expected.patch_size)
    assert (vision.num_layers, vision.norm_epsilon) == (expected.num_hidden_layers, expected.layer_norm_eps)
    assert vision.activation == expected.hidden_act
    embeddings = transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings(expected)
    assert vision.sequence_length == embeddings.num_positions


def test_siglip_2_with_native_aspect_ratios_says_what_works() -> None:
    message = refusal(vision=config_of("siglip2_vision_model"))
    assert "NaFlex" in message and "google/siglip2-so400m-patch14-384, work" in message


ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "families.md").read_text()


def test_the_docs_name_every_family_and_every_refusal() -> None:
    supported, refused = (part.split("\n## ")[0] for part in DOCS.split("\n## What is refused\n"))
    known = [*families.FAMILIES, *families.TEXT_FAMILIES, *families.TOWERS, *families.ROPE_TYPES]
    assert [name for name in known if f"`{name}`" not in supported] == []
    reasons = families._REFUSED_TEXT, families._REFUSED_TOWERS, families._REFUSED_ROPE, families._REFUSED_KEYS
    named = set(re.findall(r"`([a-z0-9_]+)`", refused))
    others = {"partial_rotary_factor", "vision_config"}
    assert named - others == {name for table in reasons for name in table}


def test_the_docs_show_what_is_there() -> None:
    """The diff that adds a family, against the files it is of."""
    (diff,) = re.findall(r"```diff\n(.*?)```", DOCS, re.DOTALL)
    files = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    assert len(files) == 4
    for path, hunks in zip(files[::2], files[1::2], strict=True):
        text = (ROOT / path).read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            assert all(line.startswith("+") for line in lines)
            assert "".join(line[1:] for line in lines) in text, hunk


# Formats of records and of prompts that are called like a model.
NO_FAMILIES = {
    ("megatron_vlm/data/prepare/records/shapes.py", "llava"),
    ("scripts/data/prepare.py", "llava"),
    ("megatron_vlm/data/chat_templates.py", "mistral"),
    ("megatron_vlm/artifacts/templates.py", "mistral"),
    ("megatron_vlm/config/other_trainers/models.py", "mistral"),
    ("megatron_vlm/config/other_trainers/models.py", "qwen2"),
}


def compared(source: str) -> Iterator[tuple[int, str]]:
    """The strings that code compares, looks up, matches or lists, with their lines."""
    for node in ast.walk(ast.parse(source)):
        found: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            found = [*node.elts]
        elif isinstance(node, ast.Dict):
            found = [*node.keys]
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.MatchValue):
            found = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = [*node.args] if node.func.attr in ("startswith", "endswith", "get", "index") else []
        for part in found:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


def test_no_familys_name_is_compared_outside_its_folder() -> None:
    names = {*families.FAMILIES, *families.TEXT_FAMILIES}
    folder = ROOT / "megatron_vlm" / "architecture" / "families"
    found = []
    for path in sorted([*ROOT.glob("megatron_vlm/**/*.py"), *ROOT.glob("scripts/**/*.py")]):
        if folder not in path.parents:
            file = str(path.relative_to(ROOT))
            for line, text in compared(path.read_text(encoding="utf-8")):
                if text in names and (file, text) not in NO_FAMILIES:
                    found.append(f"{file}:{line} {text}")
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "kind == 'llava'",
        "'llava' != kind",
        "kind in ('x', 'llava')",
        "kind in ['llava']",
        "kind in {'llava'}",
        "{'llava': 1}[kind]",
        "table['llava']",
        "kind.startswith('llava')",
        "match kind:\n    case 'x' | 'llava':\n        pass",
    ],
)
def test_a_comparison_is_seen(code: str) -> None:
    assert "llava" in [text for _, text in compared(code)]
    assert "llava" not in [text for _, text in compared("def f(kind='llava'):\n    'llava'\n")]


def test_each_family_is_named_as_transformers_names_it() -> None:
    for kind, family in families.FAMILIES.items():
        config = getattr(transformers, f"{family.class_prefix}Config")
        assert config.model_type == kind
        assert hasattr(transformers, f"{family.class_prefix}ForConditionalGeneration")
