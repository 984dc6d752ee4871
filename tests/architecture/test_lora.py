"""LoRA's flags: what they stand for, and which don't go together."""

from __future__ import annotations

import pytest

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import assign, parse_train_modules
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.lora import LoraSection
from megatron_vlm.plan.rules import validate
from tests.tiny import tiny_config


def test_defaults_are_llavas() -> None:
    config = RunConfig.from_flags(["--lora-rank", "128"])
    assert config.lora.adapters == LoRAConfig(128, 256, 0.0, LANGUAGE_TARGETS)
    assert (config.model.freeze_lm, config.optimizer.lr) == (True, 2e-4)
    assert RunConfig.from_flags([]).lora.adapters is None


def test_targets_have_one_order() -> None:
    found = LoraSection(4, lora_targets=("vision.fc1", "v_proj", "q_proj", "q_proj")).adapters
    assert found is not None and found.targets == ("q_proj", "v_proj", "vision.fc1")
    assert (found.language_targets, found.vision_targets) == (("q_proj", "v_proj"), ("fc1",))


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ([], ["projector", "lora"]),
        (["--train-modules", "lora:1e-4|projector"], ["lora", "projector"]),
        (["--train-modules", "language.embedding"], ["language.embedding", "lora"]),
    ],
)
def test_adapters_are_always_trained(flags: list[str], trained: list[str]) -> None:
    config = RunConfig.from_flags(["--lora-rank", "4", *flags])
    assert [entry.name for entry in config.trained] == trained
    assert RunConfig.from_dict(config.to_dict()) == config


def test_no_weight_is_trained_beside_its_adapters() -> None:
    model = ModelConfig.from_hf(tiny_config().to_dict())
    layer = "language_model.decoder.layers.0.mlp.linear_fc2"
    names = [
        f"{layer}.weight",
        f"{layer}.adapters.down_proj.lora_A.weight",
        "vision_projection.encoder.weight",
    ]
    assigned = assign(parse_train_modules("projector|lora"), model, names)
    assert [str(assigned.get(name)) for name in names] == ["None", "lora", "projector"]
    with pytest.raises(ValueError, match=r"language trains .*linear_fc2.weight, which has adapters"):
        assign(parse_train_modules("language|lora"), model, names)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 16.0)])
def test_scale(rslora: bool, scale: float) -> None:
    assert LoRAConfig(16, 64, 0.0, ("q_proj",), rslora).scale == scale


def test_survives_a_manifest() -> None:
    model = ModelConfig.from_hf(tiny_config().to_dict())
    lora = LoRAConfig(4, 8, 0.1, ("q_proj", "vision.fc1"), True)
    values = {**model.to_dict(), "lora": None}
    assert ModelConfig.from_dict(values) == model
    del values["lora"]  # written before there were adapters
    assert ModelConfig.from_dict(values) == model
    adapted = ModelConfig(**{**model.__dict__, "lora": lora})
    assert ModelConfig.from_dict(adapted.to_dict()) == adapted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora-alpha 8", "--lora-alpha needs --lora-rank"),
        ("--lora-load-dir a", "--lora-load-dir needs --lora-rank"),
        ("--lora-rank 0", "--lora-rank 0: must be above 0"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha 0: must be above 0"),
        ("--lora-rank 4 --lora-dropout 1", "--lora-dropout 1.0: must be at least 0 and below 1"),
        ("--lora-rank 4 --lora-targets q_prj", r"--lora-targets q_prj: did you mean q_proj\? choose from q_"),
        ("--lora-rank 4 --lora-targets fc1", r"fc1: did you mean vision\.fc1\? choose from q_proj"),
        ("--lora-rank 4 --lora-targets lm_head", "--lora-targets lm_head: choose from q_proj"),
        ("--lora-rank 4 --stage 1", "use --stage 2"),
        ("--lora-rank 4 --no-freeze-lm", "drop one"),
        ("--lora-rank 4 --train-vision --lora-targets vision.fc1", "drop one"),
    ],
)
def test_contradictions(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RunConfig.from_flags(flags.split())
    assert "\n" not in str(error.value)


def test_experts_have_no_adapters() -> None:
    model = ModelConfig.from_hf(tiny_config(text="mixtral").to_dict())
    flags = ["--name", "a", "--save-dir", "b", "--data-path", "c", "--megatron-load-dir", "d"]
    flags += ["--seq-length", "100", "--lora-rank", "4"]
    validate(RunConfig.from_flags([*flags, "--lora-targets", "q_proj", "vision.fc1"]), 1, model)
    with pytest.raises(
        ValueError, match="can't have adapters; use --lora-targets q_proj k_proj v_proj o_proj"
    ):
        validate(RunConfig.from_flags(flags), 1, model)
    with pytest.raises(ValueError, match=r"--lora-targets up_proj: .* use --lora-targets vision\.fc1$"):
        validate(RunConfig.from_flags([*flags, "--lora-targets", "vision.fc1", "up_proj"]), 1, model)
