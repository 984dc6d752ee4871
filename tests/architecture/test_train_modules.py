"""``--train-modules``: its syntax, which parameters it names, and what contradicts it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.projector import ProjectorConfig
from megatron_vlm.architecture.train_modules import TrainEntry, assign, parse_train_modules
from megatron_vlm.architecture.vision import VisionConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.rules import validate

MODEL = ModelConfig(
    vision=VisionConfig("clip", 8, 16, 3, 2, 3, 16, 4, "quick_gelu", 1e-5),
    projector=ProjectorConfig("mlp2x_gelu", 8, "gelu", True),
    language=LanguageConfig(
        "llama", 8, 16, 4, 2, 2, 4, 100, 64, "silu", 1e-5, 1e4, False, False, False, False
    ),
    image_token_id=3,
    feature_layers=(2,),  # the last of the three blocks isn't run
    feature_strategy="default",
    dtype="float32",
)
LAYERS = [f"vision_model.decoder.layers.{i}.mlp.linear_fc1.weight" for i in range(2)]
LAYERS += [f"language_model.decoder.layers.{i}.mlp.linear_fc1.weight" for i in range(4)]
NAMES = [
    *("vision_model.class_token", "vision_model.conv1.weight", "vision_model.position_embeddings.weight"),
    *("vision_model.ln_pre.weight", "vision_projection.encoder.linear_fc1.weight"),
    *("vision_projection.encoder.linear_fc2.weight", "language_model.embedding.word_embeddings.weight"),
    *LAYERS,
    *("language_model.decoder.final_layernorm.weight", "language_model.output_layer.weight"),
]
VISION = {name for name in NAMES if name.startswith("vision_model.")}
PROJECTOR = {name for name in NAMES if name.startswith("vision_projection.")}
LANGUAGE = {name for name in NAMES if name.startswith("language_model.")}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all", set(NAMES)),
        ("projector", PROJECTOR),
        ("vision", VISION),
        ("vision.embeddings", set(NAMES[:3])),
        ("vision.layers", set(LAYERS[:2])),
        ("vision.layers.0", {LAYERS[0]}),
        ("vision.last_block", {LAYERS[1]}),
        ("language", LANGUAGE),
        ("language.embedding", {"language_model.embedding.word_embeddings.weight"}),
        ("language.layers", set(LAYERS[2:])),
        ("language.layers.1-2", set(LAYERS[3:5])),
        ("language.output_layer", {"language_model.output_layer.weight"}),
        ("*.ln_pre.*", {"vision_model.ln_pre.weight"}),
        ("vision_model.class_token", {"vision_model.class_token"}),
        ("llm|visual_tokenizer.vit.last_block", {*LANGUAGE, LAYERS[1]}),
    ],
)
def test_what_the_names_mean(text: str, names: set[str]) -> None:
    assert set(assign(parse_train_modules(text), MODEL, NAMES)) == names


def test_the_later_entry_has_what_two_name() -> None:
    entries = parse_train_modules(" all : 1e-5 | vision:2e-6|projector ")
    assert entries == (TrainEntry("all", 1e-5), TrainEntry("vision", 2e-6), TrainEntry("projector"))
    of = assign(entries, MODEL, NAMES)
    assert {of[name].lr for name in VISION} == {2e-6}
    assert {of[name].lr for name in PROJECTOR} == {None}
    assert {of[name].lr for name in LANGUAGE} == {1e-5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["an entry has no name", "name[:lr]|name[:lr]"]),
        ("projector||language", ["an entry has no name"]),
        ("langage", ["no part 'langage'", "did you mean language?", "vision.last_block"]),
        ("projector:fast", ["projector:fast", "number above 0"]),
        ("projector:0", ["projector:0", "leave projector out to freeze it"]),
        ("projector:nan", ["number above 0"]),
        ("projector:1e-3|projector:1e-4", ["names projector twice"]),
        ("vte:1e-3", ["'vte'", "projector here"]),
        ("language.layers.4", ["language.layers.4", "layers 0 to 3"]),
        ("vision.layers.2", ["vision.layers.2", "layers 0 to 1"]),
        ("language.layers.2-1", ["language.layers.2-1", "layers 0 to 3"]),
        ("vision_model.conv1", ["matches no parameter", "vision_model.conv1.weight"]),
        ("vision|all", ["later entries take all parameters of vision"]),
    ],
)
def test_mistakes_are_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        assign(parse_train_modules(text), MODEL, NAMES)
    assert "\n" not in str(error.value)
    for word in ["--train-modules", *words]:
        assert word in str(error.value)


def test_tied_output_layer() -> None:
    tied = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"use language\.embedding"):
        parse_train_modules("language.output_layer")[0].patterns(tied)


@pytest.mark.parametrize(
    ("argv", "trained"),
    [
        ([], ["projector", "language"]),
        (["--stage", "1"], ["projector"]),
        (["--stage", "2", "--freeze-lm"], ["projector"]),
        (["--train-vision"], ["projector", "language", "vision"]),
        (["--stage", "1", "--train-modules", "language.embedding"], ["language.embedding"]),
    ],
)
def test_presets(argv: list[str], trained: list[str]) -> None:
    config = RunConfig.from_flags(argv)
    assert [entry.name for entry in config.model.trained] == trained
    assert RunConfig.from_flags(config.to_flags()) == config


@pytest.mark.parametrize(
    "argv",
    [
        ["--train-modules", "projector|language", "--freeze-lm"],
        ["--train-modules", "projector", "--no-freeze-lm"],
        ["--train-modules", "projector", "--train-vision"],
        ["--train-modules", "all", "--no-train-vision"],
        ["--train-modules", "*.bias", "--freeze-lm"],
    ],
)
def test_contradictions(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{argv[-1]} contradicts --train-modules"):
        RunConfig.from_flags(argv)


def test_a_flag_replaces_what_the_file_trains(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RunConfig.from_flags(["--stage", "1"]).to_dict()))
    config = RunConfig.from_flags(["--config", str(path), "--train-modules", "language:1e-5"])
    assert (config.model.freeze_lm, config.model.train_vision) == (False, False)


def test_layers_are_checked_with_the_model() -> None:
    flags = ["--name", "a", "--save-dir", "b", "--data-path", "c", "--megatron-load-dir", "d"]
    flags += ["--train-iters", "9", "--train-modules", "language.layers.0-9"]
    with pytest.raises(ValueError, match="layers 0 to 3 of the language model are run"):
        validate(RunConfig.from_flags(flags), 1, MODEL)
